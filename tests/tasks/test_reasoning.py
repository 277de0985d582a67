"""Problems of reasoning-gym, and its opinion of answers that this package scores itself."""

import sys

import pytest

from tasks import UnmaskError, reasoning
from tests.oracles.arithmetic import check_expression


def test_without_the_library_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UnmaskError, match="pip install reasoning-gym"):
        reasoning.problems("countdown", 1, "test")


class TestWithTheLibrary:
    @pytest.fixture(autouse=True)
    def _library(self) -> None:
        pytest.importorskip("reasoning_gym")

    def test_problems_are_fixed_and_their_own_answers_right(self) -> None:
        found, again = (reasoning.problems("chain_sum", 5, "test") for _ in range(2))
        assert [p.question for p in found] == [p.question for p in again]
        assert {p.question for p in found}.isdisjoint(p.question for p in reasoning.problems("chain_sum", 5, "train"))
        assert all(p.is_right(f" {p.solution}\n") for p in found)
        assert not any(p.is_right("") or p.is_right("no idea") for p in found)

    def test_it_agrees_on_countdown(self) -> None:
        for problem in reasoning.problems("countdown", 60, "test", min_numbers=3, max_numbers=3):
            numbers, target = problem.entry["metadata"]["numbers"], problem.entry["metadata"]["target"]
            for answer in (problem.solution, f"{numbers[0]}+{numbers[1]}+{numbers[2]}", f"{target}", "9**9", ""):
                assert problem.is_right(answer) == check_expression(answer, numbers, target), answer

    def test_what_it_does_not_know(self) -> None:
        with pytest.raises(UnmaskError, match="reasoning-gym cannot make problems 'nonsense'"):
            reasoning.problems("nonsense", 1, "test")
        with pytest.raises(UnmaskError, match="cannot make problems 'countdown'"):
            reasoning.problems("countdown", 1, "test", colour="red")
