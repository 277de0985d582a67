"""Problems of the library ``reasoning-gym``, which writes them anew for every seed and scores any answer."""

from __future__ import annotations

from typing import Any, NamedTuple

from tasks.errors import UnmaskError, first_line, library

SEEDS = {"train": 0, "validation": 10**9, "test": 2 * 10**9}  # problem i is drawn from the seed plus i


class Scored(NamedTuple):
    """A problem, and what scores answers to it."""

    question: str
    solution: str
    source: Any
    entry: dict[str, Any]

    def is_right(self, text: str) -> bool:
        """Whether the library gives ``text`` full marks (it gives a few per cent for any answer at all)."""
        try:
            return float(self.source.score_answer(text.strip(), self.entry)) >= 1.0
        except Exception:  # scorers of a hundred kinds of problems fail in as many ways on texts that are no answer
            return False


def problems(name: str, n: int, split: str, **options: Any) -> list[Scored]:
    """``n`` problems of the kind ``name``, for example ``countdown``, always the same ones for a split.

    Args:
        options: of the kind, for example ``min_numbers=3``.

    Raises:
        UnmaskError: the library is missing, or does not know the kind or its options.
    """
    reasoning_gym = library("reasoning_gym", "these problems take reasoning-gym", "reasoning-gym==0.1.25")
    try:
        source = reasoning_gym.create_dataset(name, size=n, seed=SEEDS[split], **options)
        return [Scored(entry["question"], str(entry["answer"]), source, entry) for entry in source]
    except Exception as error:  # unknown kinds are ValueErrors, wrong options TypeErrors and AssertionErrors
        raise UnmaskError(f"reasoning-gym cannot make problems {name!r}: {first_line(error)}") from None
