"""Evaluation: intervals against known values, rows in the instances' order, the JSON form."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

import tasks
from agents.evaluate import (
    EvaluateCommand,
    Result,
    compare,
    load_order,
    normal_interval,
    paired_difference,
    table,
    wilson,
)
from agents.policy import OrderPolicy, PolicyConfig, new_policy
from pretrain.checkpoint import save_model
from tasks import Instances, Task, UnknownNameError, UnmaskError
from tests.oracles.enumeration import TableTask, random_joint
from tests.toys import PositionPolicy, generator, rollout, sweep
from unmask_env.denoiser import TableDenoiser, load_denoiser
from unmask_env.process import Unmasking
from unmask_env.reference import LeftToRight, Margin, Oracle, Random, TopK, customary
from unmask_env.state import Rules

KEYS = ["order", "solve_rate", "cell_accuracy", "valid_rate", "nfe", "passes", "policy_passes", "trained", "n"]
KEYS += ["ci95", "seconds"]


# ---------------------------------------------------------------------- intervals
@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.27753),
        (10, 10, 0.72247, 1.0),
        (50, 100, 0.40383, 0.59617),
        (1, 1, 0.20654, 1.0),
        (81, 263, 0.25529, 0.36621),  # Newcombe 1998, table I: 0.2553 to 0.3662
        (15, 148, 0.06239, 0.16049),  # there: 0.0624 to 0.1605
        (0, 20, 0.0, 0.16113),  # there: 0 to 0.1611
        (1, 29, 0.00611, 0.17176),  # there: 0.0061 to 0.1718
    ],
)
def test_wilson_against_known_values(successes: int, n: int, low: float, high: float) -> None:
    assert wilson(successes, n) == pytest.approx((low, high), abs=2e-5)


def test_wilson_is_the_score_test_inverted() -> None:
    """At its ends the proportion lies 1.96 standard errors, of the hypothesis, away."""
    for successes, n in ((3, 17), (40, 50), (999, 1000)):
        for bound in wilson(successes, n):
            z = (successes / n - bound) / math.sqrt(bound * (1 - bound) / n)
            assert abs(z) == pytest.approx(1.959964, abs=1e-5)


def test_normal_interval_by_hand() -> None:
    """Mean 2, standard deviation 1 (n - 1), standard error 1 / sqrt(3)."""
    assert normal_interval(torch.tensor([1.0, 2.0, 3.0])) == pytest.approx(
        (2 - 1.959964 / math.sqrt(3), 2 + 1.959964 / math.sqrt(3))
    )
    assert normal_interval(torch.tensor([0.5])) == (-math.inf, math.inf)


def test_paired_difference_by_hand() -> None:
    a, b = torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 0.0, 0.0])
    half = 1.959964 * math.sqrt(1 / 3) / 2  # differences 0, 1, 0, 1: variance 1 / 3
    assert paired_difference(a, b) == pytest.approx((0.5, 0.5 - half, 0.5 + half))
    assert paired_difference(a, a) == (0.0, 0.0, 0.0)
    mean, low, high = paired_difference(b, a)
    assert (mean, low, high) == pytest.approx((-0.5, -0.5 - half, -0.5 + half))


# ---------------------------------------------------------------------- compare
@pytest.fixture(scope="module")
def sudoku6() -> tasks.Task:
    return tasks.get("sudoku6")


@pytest.fixture(scope="module")
def tiny(sudoku6: tasks.Task) -> Unmasking:
    return Unmasking(sudoku6, load_denoiser("sudoku6-tiny", sudoku6))


@pytest.mark.parametrize("batch", sweep([1, 7, 500], lambda batch: batch == 7))
def test_metrics_come_in_the_order_of_the_instances(sudoku6, tiny, batch: int) -> None:
    """Although boards are played sorted by their number of blanks."""
    instances = sudoku6.heldout(20)
    blanks = (instances.tokens == sudoku6.mask_id).sum(1)
    assert not torch.equal(blanks, blanks.sort().values)
    [result] = compare(tiny, {"left_to_right": LeftToRight()}, instances, batch=batch)
    for i in range(20):
        one = instances[i : i + 1]
        played = rollout(sudoku6, tiny.denoiser, LeftToRight(), one)
        for name, value in sudoku6.metrics(played.tokens, one).items():
            assert result.metrics[name][i] == value[0], (name, i)
    assert float(result.metrics["cell_accuracy"].mean()) > 0
    assert len(result.metrics["cell_accuracy"].unique()) > 1


def test_nfe_is_the_number_of_blanks(sudoku6, tiny) -> None:
    instances = sudoku6.heldout(12)
    blanks = (instances.tokens == sudoku6.mask_id).sum(1).float()
    [result] = compare(tiny, {"random": Random()}, instances, batch=5)
    assert result.nfe == pytest.approx(float(blanks.mean()))
    assert torch.equal(result.forwards, blanks), "each instance has its own"
    assert not torch.equal(blanks, blanks.sort().values)
    fixed = tasks.get("sudoku6", blanks=9)
    [result] = compare(replace(tiny, task=fixed), {"random": Random()}, fixed.heldout(5))
    assert result.nfe == 9


def test_a_forward_per_step_of_the_longest_board(sudoku6, tiny) -> None:
    instances = sudoku6.heldout(8)
    blanks = (instances.tokens == sudoku6.mask_id).sum(1)
    before = tiny.denoiser.calls
    compare(tiny, {"margin": Margin()}, instances)
    assert tiny.denoiser.calls - before == int(blanks.max())


def test_json_rows(sudoku6, tiny) -> None:
    orders = {"random": Random(), "mine": new_policy(PolicyConfig(), sudoku6, tiny.denoiser, seed=0)}
    results = compare(tiny, orders, sudoku6.heldout(10))
    rows = json.loads(json.dumps([result.row() for result in results]))
    assert [row["order"] for row in rows] == ["random", "mine"]
    for row, result in zip(rows, results, strict=True):
        assert list(row) == KEYS
        assert row["n"] == 10
        assert row["solve_rate"] == pytest.approx(float(result.metrics["solved"].mean()))
        assert row["ci95"] == pytest.approx(list(wilson(int(result.solved.sum()), 10)))
        assert row["ci95"][0] <= row["solve_rate"] <= row["ci95"][1]
        assert row["seconds"] > 0


def test_a_row_by_hand() -> None:
    metrics = {
        "solved": torch.tensor([1.0, 0, 0, 0]),
        "cell_accuracy": torch.tensor([1, 0.5, 0.25, 0.25]),
        "valid": torch.tensor([1.0, 1, 0, 0]),
    }
    low, high = wilson(1, 4)
    assert Result("margin", metrics, *torch.tensor([[7.0, 8.0], [9.0, 10.0], [1.0, 0.0]]), 0.25).row() == {
        "order": "margin",
        "solve_rate": 0.25,
        "cell_accuracy": 0.5,
        "valid_rate": 0.5,
        "nfe": 7.5,
        "passes": 9.5,
        "policy_passes": 0.5,
        "trained": "",
        "n": 4,
        "ci95": [low, high],
        "seconds": 0.25,
    }


def test_the_table_shows_every_order(sudoku6, tiny) -> None:
    orders = {"left_to_right": LeftToRight(), "oracle": Oracle()}
    results = compare(tiny, orders, sudoku6.heldout(20))
    console = Console(width=80)
    with console.capture() as capture:
        console.print(table(results, "the title"))
    text = capture.get()
    assert "the title" in text
    assert "oracle*" in text
    assert "* sees the answers" in text, "the upper bound is marked"
    for name in ("solve rate", "cells", "valid", "NFE", "passes"):
        assert name in text
    shown = re.search(r"left_to_right\s+([\d.]+)\D+([\d.]+)\D+([\d.]+)", text)
    assert shown is not None
    solved = int(results[0].solved.sum())
    assert 0 < solved < 20
    expected = [100 * value for value in (solved / 20, *wilson(solved, 20))]
    assert [float(number) for number in shown.groups()] == pytest.approx(expected, abs=0.051)
    with console.capture() as capture:
        console.print(table(results[:1], "the title"))
    assert "*" not in capture.get()


# ---------------------------------------------------------------------- compare, from Python
def test_compare_by_names_is_compare_of_the_objects(sudoku6, tiny, tmp_path: Path) -> None:
    save_model(new_policy(PolicyConfig(), sudoku6, tiny.denoiser, seed=0), tmp_path / "policy")
    names = ["margin", "threshold:theta=0.8", str(tmp_path / "policy")]
    by_name = compare("Unmask/Sudoku6x6-v0", names, denoiser="sudoku6-tiny", limit=12, seed=2)
    objects = {name: load_order(name, sudoku6, tiny.denoiser) for name in names}
    by_object = compare(tiny, objects, sudoku6.heldout(12), seed=2)
    assert [result.order for result in by_name] == names
    assert by_name.title == by_object.title == "sudoku6, denoiser sudoku6-tiny, 12 instances"
    for a, b in zip(by_name.rows, by_object.rows, strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}
    [one] = compare(tiny, Margin(), sudoku6.heldout(12, "validation"))
    assert torch.equal(one.solved, compare(tiny, "margin", split="validation", limit=12)["margin"].solved)
    assert one.order == "margin"
    validation = compare("sudoku6", "margin", denoiser="sudoku6-tiny", split="validation", limit=12, nfe_budget=5)
    assert (validation[0].nfe, float(validation[0].solved.sum())) == (5, 0)


def test_without_orders_all_customary_references_are_compared(tiny) -> None:
    assert [row["order"] for row in compare(tiny, limit=1).rows] == customary("single")


def test_a_comparison_prints_saves_and_plots(tiny, tmp_path: Path) -> None:
    compared = compare(tiny, ["margin", "left_to_right"], limit=8)
    console = Console(width=80, no_color=True)
    with console.capture() as shown:
        console.print(table(compared, compared.title))
    assert str(compared) == shown.get().rstrip()
    assert "margin" in str(compared)
    compared.to_json(tmp_path / "new" / "rows.json")
    assert json.loads((tmp_path / "new" / "rows.json").read_text()) == compared.rows
    axes = compared.plot(tmp_path / "picture.png").axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["margin", "left_to_right"]
    assert axes.lines[0].get_xdata() == pytest.approx([row["solve_rate"] for row in compared.rows])
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"
    assert (len(compared), compared[1].order, compared["margin"]) == (2, "left_to_right", compared[0])
    with pytest.raises(UnknownNameError, match="unknown order 'margn'; did you mean margin"):
        compared["margn"]
    with pytest.raises(UnmaskError, match=r"the file .* is a folder"):
        compared.to_json(tmp_path)


def test_what_compare_refuses(tiny) -> None:
    for arguments, message in (
        ({"orders": []}, "needs at least one order"),
        ({"orders": [Margin(), "margin"]}, "two orders are called margin"),
        ({"orders": [3]}, "an order is a name, a folder or a Policy, not int"),
        ({"orders": "margn"}, "unknown order 'margn'; did you mean margin"),
        ({"denoiser": "sudoku6"}, "a process has its denoiser and its rules"),
        ({"actions": "set"}, "a process has its denoiser and its rules"),
        ({"split": "dev"}, "unknown split 'dev'; known: train, validation, test"),
        ({"limit": 0}, "limit must be a whole number of at least 1, not 0"),
        ({"limit": 3, "instances": tiny.task.heldout(3)}, "limit and split choose among the held-out instances"),
        ({"instances": tiny.task.heldout(3)[:0]}, "there is no instance to play"),
        ({"seed": 1.5}, "seed must be a whole number of at least 0"),
        ({"seed": 2**63}, "seed must be a whole number of at least 0 and below 2"),
    ):
        with pytest.raises(UnmaskError, match=message):
            compare(tiny, **arguments)
    with pytest.raises(UnmaskError, match="task sudoku6 needs a denoiser"):
        compare("sudoku6", "margin")


# ---------------------------------------------------------------------- orders
class Fixed(TableTask):
    """All holes; the reward is the first symbol: which of the two greedy sequences was written."""

    def sample(self, n: int, generator: torch.Generator) -> Instances:
        return Instances(torch.full((n, 2), 2), torch.zeros(n, 2, dtype=torch.long))

    def reward(self, tokens: Tensor, instances: Instances) -> Tensor:
        return tokens[:, 0].float()


def test_references_are_sampled_and_learned_orders_take_their_most_likely_position() -> None:
    """p(00) = .4, p(10) = .3, p(11) = .3: beginning with position 0 writes a 1 there, with position 1 a 0."""
    joint = torch.tensor([[0.4, 0.0], [0.3, 0.3]])
    task, denoiser = Fixed(joint), TableDenoiser(joint)
    learned = OrderPolicy(2, [[0], [1]], base="softmax_confidence", base_tau=1.0, dim=4, layers=1, heads=1)
    orders = {"random": Random(), "learned": learned, "left_to_right": LeftToRight()}
    instances = task.sample(2000, torch.Generator())
    random, most_likely, left = (r.solved for r in compare(Unmasking(task, denoiser), orders, instances, seed=1))
    assert float(random.mean()) == pytest.approx(0.5, abs=0.05)
    assert not most_likely.any(), "position 1, of confidence .7, always comes first"
    assert left.all()


def test_the_seed_decides_the_stochastic_orders() -> None:
    joint = random_joint(3, 3, seed=23)
    task, denoiser = TableTask(joint), TableDenoiser(joint)
    instances = task.sample(200, torch.Generator().manual_seed(0))
    orders = {"random": Random()}
    one, same, other = (compare(Unmasking(task, denoiser), orders, instances, seed=s)[0].solved for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


class Written(Task):
    """Two positions, all holes; the metrics are the symbols."""

    name, symbols, shape = "written", ("a", "b", "c"), (1, 2)

    def sample(self, n: int, generator: torch.Generator) -> Instances:
        return Instances(torch.full((n, 2), 3), torch.zeros(n, 2, dtype=torch.long))

    def reward(self, tokens: Tensor, instances: Instances) -> Tensor:
        return tokens[:, 0].float()

    def metrics(self, tokens: Tensor, instances: Instances) -> dict[str, Tensor]:
        return {"solved": tokens[:, 0].float(), "second": tokens[:, 1].float()}


def test_filling_is_drawn_apart_from_the_order() -> None:
    """An order that is sampled and one that takes its mode, both from left to right, draw the same symbols."""
    task, denoiser = Written(), TableDenoiser(random_joint(3, 2, seed=5))
    process, instances = Unmasking(task, denoiser, temperature=1.0), task.sample(500, torch.Generator())
    learned = PositionPolicy(lambda seen: LeftToRight()(seen).log_probs)
    assert not learned.sampled
    policies = {"reference": LeftToRight(), "mode": learned, "random": Random()}
    left, mode, random = compare(process, policies, instances, seed=3)
    assert mode.metrics["solved"].unique().tolist() == [0, 1, 2], "they are drawn"
    for name in ("solved", "second"):
        assert torch.equal(left.metrics[name], mode.metrics[name])
    played = rollout(
        task, denoiser, Random(), instances, generator=generator(3), temperature=1.0, fill_generator=generator(4)
    )
    assert torch.equal(torch.stack(list(random.metrics.values()), 1), played.tokens.float())


def test_rewards_that_are_no_proportion_get_a_normal_interval() -> None:
    values = torch.tensor([0.0, 0.5, 1.0, 0.25])
    row = Result("x", {"reward": values}, *[torch.ones(len(values))] * 3, 1.0).row()
    assert row["ci95"] == pytest.approx(list(normal_interval(values)))
    assert row["reward"] == pytest.approx(0.4375)


def test_load_order(tmp_path: Path, sudoku6, tiny) -> None:
    assert load_order("top_k", sudoku6) == TopK(5)
    save_model(new_policy(PolicyConfig(), sudoku6, tiny.denoiser, seed=0), tmp_path / "policy")
    assert isinstance(load_order(str(tmp_path / "policy"), sudoku6), OrderPolicy)
    with pytest.raises(UnknownNameError) as error:
        load_order("best", sudoku6)
    assert str(error.value).startswith("unknown order 'best'; known: ")
    assert "margin" in str(error.value)
    with pytest.raises(UnmaskError, match="task sudoku4 has 4 and 16"):
        load_order(str(tmp_path / "policy"), tasks.get("sudoku4"))


def test_a_batch_below_one_is_refused(sudoku6, tiny) -> None:
    with pytest.raises(UnmaskError, match="batch must be a whole number of at least 1, not 0"):
        compare(tiny, {"margin": Margin()}, sudoku6.heldout(2), batch=0)


def test_the_settings_of_a_canvas_reach_the_rules() -> None:
    command = EvaluateCommand("countdown", actions="accept", canvas_steps=4, stop_entropy=None, stop_stable=2)
    assert command.rules("single") == Rules("accept", canvas_steps=4, stop_entropy=None, stop_stable=2)
    assert EvaluateCommand("countdown").rules("single") == Rules()
