"""The exact columns of an evaluation: each instance gets its own numbers, whatever it is listed beside."""

import pytest
import torch
from rich.console import Console
from torch import Tensor

from agents.evaluate import Exact, add_exact, compare, exact_table
from tasks import Instances
from tests.oracles.enumeration import TableTask, random_joint
from tests.toys import WrongDenoiser
from unmask_env import exact
from unmask_env.exact import TooLargeError
from unmask_env.process import Unmasking
from unmask_env.reference import Margin, Oracle, Random, SoftmaxConfidence, SoftmaxMargin

INF = float("inf")


class Sums(TableTask):
    """The reward is the mean symbol, whatever the answer."""

    def __init__(self) -> None:
        super().__init__(random_joint(3, 4, seed=1))

    def reward(self, tokens: Tensor, instances: Instances) -> Tensor:
        return tokens.float().mean(1) / 2


PROCESS = Unmasking(Sums(), WrongDenoiser(3, 4, seed=2))
TARGET = SoftmaxConfidence(0.5)
ORDERS = {"random": Random(), "oracle": Oracle(), "soft": SoftmaxMargin(0.1)}
# Boards of one to four holes, in no order; the third and the last are the same board with other answers.
TOKENS = [[3, 3, 0, 3], [3, 3, 3, 3], [1, 3, 3, 2], [3, 0, 3, 3], [2, 3, 1, 0], [0, 3, 3, 3], [1, 3, 3, 2]]


def instances() -> Instances:
    tokens = torch.tensor(TOKENS)
    answers = torch.where(tokens == 3, torch.arange(7).unsqueeze(1) % 3, tokens)
    return Instances(tokens, answers)


def columns(given: Instances, **options: object) -> dict[str, Exact | None]:
    results = compare(PROCESS, ORDERS, given)
    return {r.order: r.exact for r in add_exact(results, PROCESS, ORDERS, given, TARGET, **options)}


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_each_instance_has_its_own_numbers(batch: int) -> None:
    given = instances()
    found = columns(given, batch=batch)
    assert found["oracle"] is None
    for name in ("random", "soft"):
        for i in range(7):
            graph = exact.enumerate_boards(PROCESS, given[i : i + 1])
            values = exact.evaluate(graph, ORDERS[name], TARGET)
            expected = (values.reward, exact.best_reward(graph), values.trajectory_kl, values.terminal_kl)
            for column, value in zip(found[name], expected, strict=True):
                assert float(column[i]) == pytest.approx(float(value), abs=1e-12), (name, i)
        assert len(found[name].reward.unique()) == 6, "the boards differ in what they earn"
        assert (found[name].best >= found[name].reward - 1e-12).all()
        assert (found[name].trajectory_kl >= found[name].terminal_kl - 1e-12).all()
        assert (found[name].trajectory_kl > 0.01).any()


def test_the_order_of_the_instances_is_kept() -> None:
    given, shuffled = instances(), torch.tensor([4, 6, 0, 5, 2, 3, 1])
    straight, mixed = columns(given, batch=3), columns(given[shuffled], batch=3)
    for name in ("random", "soft"):
        for one, other in zip(straight[name], mixed[name], strict=True):
            torch.testing.assert_close(other, one[shuffled])


def test_rows_are_means_over_instances() -> None:
    results = compare(PROCESS, ORDERS, instances())
    assert not any(key.startswith("exact") for result in results for key in result.row())
    plain, (random, oracle, _) = results, add_exact(results, PROCESS, ORDERS, instances(), TARGET)
    assert random.metrics is plain[0].metrics
    assert not any(key.startswith("exact") for key in oracle.row())
    row = random.row()
    assert [key for key in row if key.startswith("exact")] == [
        "exact_reward", "exact_best", "exact_trajectory_kl", "exact_terminal_kl",
    ]  # fmt: skip
    for name, values in random.exact._asdict().items():
        assert row[f"exact_{name}"] == pytest.approx(float(values.mean()))


def test_the_table_shows_the_means_and_leaves_the_oracle_empty() -> None:
    results = compare(PROCESS, ORDERS, instances())
    results = add_exact(results, PROCESS, ORDERS, instances(), TARGET)
    console = Console(width=80)
    with console.capture() as capture:
        console.print(exact_table(results, "softmax_confidence"))
    lines = {line.split()[0]: line.split()[1:] for line in capture.get().splitlines() if line.strip()}
    for result in (results[0], results[2]):
        assert lines[result.order] == [f"{float(values.mean()):.4f}" for values in result.exact]
    assert lines["oracle"] == []
    assert "softmax_confidence" in capture.get()


def test_a_deterministic_reference_is_infinitely_far() -> None:
    """Of an order that goes elsewhere; itself it is at distance 0."""
    orders = {"random": Random(), "margin": Margin()}
    results = compare(PROCESS, orders, instances())
    results = add_exact(results, PROCESS, orders, instances(), Margin())
    assert bool((results[0].exact.trajectory_kl == INF).any())
    assert results[0].row()["exact_trajectory_kl"] is None  # JSON knows no infinity
    assert results[1].row()["exact_trajectory_kl"] == pytest.approx(0, abs=1e-9)


def test_too_many_holes_are_refused_before_any_board_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Long(TableTask):
        def __init__(self) -> None:
            self.name, self.symbols, self.shape = "long", ("a", "b"), (1, 17)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a board was listed")

    monkeypatch.setattr(exact, "enumerate_boards", never)
    tokens = torch.tensor([[0] * 16 + [2], [2] * 17])
    with pytest.raises(TooLargeError, match="17 holes, and 16 are allowed"):
        add_exact([], Unmasking(Long(), PROCESS.denoiser), {}, Instances(tokens, torch.zeros_like(tokens)), TARGET)
