"""Problems of reasoning-gym, and its opinion of answers that this package scores itself."""

import sys
import types

import pytest

from tasks import UnmaskError, reasoning


def test_without_the_library_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UnmaskError, match="pip install reasoning-gym"):
        reasoning.problems("countdown", 1, "test")


@pytest.fixture
def gym(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A library of the same form, with a scorer that fails the test where it is called."""

    class ProceduralDataset(list):
        def score_answer(self, answer: str, entry: dict) -> float:
            return pytest.fail("the library's scorer was called")

    class Own(ProceduralDataset):
        def score_answer(self, answer: str, entry: dict) -> float:
            return pytest.fail("the library's scorer was called")

    kinds = {
        "number": (ProceduralDataset, "-1,250"),
        "words": (ProceduralDataset, "1 2\n3 4"),
        "zebra_puzzles": (Own, "Carol"),
        "countdown": (Own, "unused"),
        "n_queens": (Own, "_ Q"),
    }

    def create_dataset(name: str, size: int, seed: int) -> ProceduralDataset:
        kind, answer = kinds[name]
        entry = {"question": name, "answer": answer, "metadata": {"numbers": [12, 7, 45], "target": 50}}
        return kind([entry] * size)

    made = types.SimpleNamespace(
        create_dataset=create_dataset, dataset=types.SimpleNamespace(ProceduralDataset=ProceduralDataset)
    )
    monkeypatch.setitem(sys.modules, "reasoning_gym", made)
    return made


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [
        ("number", ["-1250", " -1,250\n", "so it is -1250."], ["1250", "no idea", ""]),
        ("words", ["1 2\n3 4", " 1  2 \n3 4\n"], ["1 2 3 4", "1 2\n3 5", "it is 1 2\n3 4", ""]),
        ("zebra_puzzles", ["Carol", "carol "], ["Car ol", "acorl"]),
        ("countdown", ["(45-7)+12", " 12 + 45 - 7\n"], ["45+5", "50", "9**9", "\u0664\u0665-7+12", ""]),
    ],
)
def test_answers_are_compared_here(gym, kind: str, right: list[str], wrong: list[str]) -> None:
    if kind == "number":
        pytest.importorskip("math_verify")
    problem = reasoning.problems(kind, 1, "test")[0]
    evil = ["__import__('os').system('touch evil')", "[print('evil')]", "9**9**9", "(" * 100_000]
    assert [problem.is_right(text) for text in (*right, *wrong, *evil)] == [True] * len(right) + [False] * (
        len(wrong) + len(evil)
    )


def test_kinds_with_many_right_answers_are_refused(gym) -> None:
    with pytest.raises(UnmaskError, match="which may run an answer's text") as raised:
        reasoning.problems("n_queens", 1, "test")
    assert len(str(raised.value)) <= 300


class TestWithTheLibrary:
    @pytest.fixture(autouse=True)
    def _library(self) -> None:
        self.library = pytest.importorskip("reasoning_gym")

    def test_problems_are_fixed_and_their_own_answers_right(self) -> None:
        found, again = (reasoning.problems("chain_sum", 5, "test") for _ in range(2))
        assert [p.question for p in found] == [p.question for p in again]
        assert {p.question for p in found}.isdisjoint(p.question for p in reasoning.problems("chain_sum", 5, "train"))
        assert all(p.is_right(f" {p.solution}\n") for p in found)
        assert not any(p.is_right("") or p.is_right("no idea") for p in found)

    def test_it_agrees_on_countdown(self) -> None:
        options = {"min_numbers": 3, "max_numbers": 3}
        source = self.library.create_dataset("countdown", size=60, seed=reasoning.SEEDS["test"], **options)
        for problem, entry in zip(reasoning.problems("countdown", 60, "test", **options), source, strict=True):
            numbers, target = entry["metadata"]["numbers"], entry["metadata"]["target"]
            for answer in (problem.solution, f"{numbers[0]}+{numbers[1]}+{numbers[2]}", f"{target}", "9", ""):
                assert problem.is_right(answer) == (source.score_answer(answer, entry) >= 1), answer

    @pytest.mark.parametrize("kind", sorted(reasoning.ONE_ANSWER))
    def test_it_agrees_on_kinds_with_one_answer(self, kind: str) -> None:
        source = self.library.create_dataset(kind, size=8, seed=reasoning.SEEDS["test"])
        made = reasoning.problems(kind, 8, "test")
        for problem, other, entry in zip(made, [*made[1:], made[0]], source, strict=True):
            for answer in (problem.answer, other.answer, problem.answer[::-1], problem.answer[:-1]):
                assert problem.is_right(answer) == (source.score_answer(answer.strip(), entry) >= 1), answer

    def test_what_it_does_not_know(self) -> None:
        with pytest.raises(UnmaskError, match="reasoning-gym cannot make problems 'nonsense'"):
            reasoning.problems("nonsense", 1, "test")
        with pytest.raises(UnmaskError, match="cannot make problems 'countdown'"):
            reasoning.problems("countdown", 1, "test", colour="red")
