"""Free text: the scorer's likelihood against the exact bound, and what repetition earns."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import pytest
import torch

import tasks
from agents import demo, imitation, policy_iteration, upo
from agents.evaluate import compare
from agents.policy import PolicyConfig
from agents.policy_iteration import PolicyIterationConfig
from pretrain.backbone import Backbone
from pretrain.likelihood import bound
from tasks import IncompatibleDenoiserError
from tasks.free_text import FreeText, unigram_entropy
from tasks.text import Corpus, Text
from tests.oracles.enumeration import TableTask, random_joint
from unmask_env import make_process
from unmask_env.denoiser import TableDenoiser
from unmask_env.free_text import Scorer, free_text
from unmask_env.process import Unmasking
from unmask_env.reference import reference

PROSE = "the order of things is the order of time, and time is short and quickly gone by now.\n" * 200


@pytest.fixture(scope="module")
def text() -> Text:
    return Text(Corpus((PROSE,), (PROSE,), (PROSE,)), length=32, hide=1.0)


def model_of(text: Text, block_length: int | None = 1, **options) -> Backbone:
    torch.manual_seed(0)
    shape = {"dim": 16, "layers": 2, "heads": 2, "block_length": block_length} | options
    return Backbone(text.vocab_size, text.coordinates.tolist(), fingerprint=text.fingerprint, **shape)


def test_unigram_entropy_by_hand() -> None:
    tokens = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 1], [0, 1, 2, 3], [5, 5, 5, 1]])
    third = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    expected = torch.tensor([0.0, math.log(2), math.log(4), third], dtype=torch.float64)
    torch.testing.assert_close(unigram_entropy(tokens), expected)


def test_the_likelihood_is_the_exact_one(text: Text) -> None:
    model, answers = model_of(text), text.heldout(20).answers
    scorer = Scorer(model, text)
    task = FreeText(text, scorer)
    exact = bound(model, answers, torch.Generator().manual_seed(0))
    assert exact.exact
    torch.testing.assert_close(scorer(answers), exact.path.double() / text.length, atol=1e-5, rtol=0)
    measured = task.metrics(answers, text.heldout(20))
    torch.testing.assert_close(measured["likelihood"], torch.exp(-scorer(answers)).float())


def test_repetition_earns_nothing_however_likely(text: Text) -> None:
    task, instances = FreeText(text, Scorer(model_of(text), text)), text.heldout(4)
    low, high = task._floor
    assert 0 < low <= high < torch.tensor(32.0).log()
    same = torch.full_like(instances.answers, 3)
    pair = torch.tensor([3, 5]).repeat(4, 16)
    for tokens, entropy in ((same, 0.0), (pair, torch.tensor(2.0).log() / torch.tensor(32.0).log())):
        found = task.metrics(tokens, instances)
        assert (found["reward"] == 0).all()
        assert (found["likelihood"] > 0).all()
        torch.testing.assert_close(found["entropy"], torch.full((4,), float(entropy)))
    assert task.metrics(same, instances)["distinct_4"].tolist() == pytest.approx([1 / 29] * 4)
    assert task.metrics(pair, instances)["distinct_4"].tolist() == pytest.approx([2 / 29] * 4)
    real = task.metrics(instances.answers, instances)
    assert (real["reward"] > 0).any()
    assert (real["reward"] <= real["likelihood"]).all()
    holes = instances.answers.clone()
    holes[:, 5] = task.mask_id
    assert (task.metrics(holes, instances)["reward"] == 0).all()


def test_models_that_cannot_score(text: Text) -> None:
    with pytest.raises(tasks.UnmaskError, match="the scorer given is not autoregressive"):
        Scorer(model_of(text, None), text)
    other = Text(Corpus((PROSE.upper(),), (PROSE.upper(),), (PROSE.upper(),)), length=32)
    with pytest.raises(IncompatibleDenoiserError, match="symbols"):
        Scorer(model_of(text), other)


def test_the_packaged_scorer_prefers_english_to_its_letters_in_another_order() -> None:
    task = free_text()
    real = task.heldout(64)
    shuffled = real.answers[:, torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    english, noise = task.metrics(real.answers, real), task.metrics(shuffled, real)
    assert float(english["likelihood"].mean()) > 3 * float(noise["likelihood"].mean())
    torch.testing.assert_close(english["entropy"], noise["entropy"])
    assert (real.tokens == task.mask_id).all()


def test_text_from_nothing_is_drawn_where_nothing_else_is_said() -> None:
    """The likeliest symbols alone repeat themselves, and earn nothing."""
    process = make_process("Unmask/FreeText-v0")
    assert process.temperature == make_process("free_text", "text").temperature == 1
    assert replace(process, temperature=None).temperature == 1
    assert make_process("Unmask/FreeText-v0", temperature=0.0).temperature == 0
    assert make_process("sudoku4", "sudoku4").temperature == 0
    assert gym.make("Unmask/FreeText-v0").unwrapped.process.temperature == 1
    rewards = [
        compare("free_text", "margin", denoiser="text", limit=8, **temperature)[0].metrics["reward"].mean()
        for temperature in ({}, {"temperature": 0.0})
    ]
    assert rewards[0] > 0.01 > rewards[1]


class Drawn(TableTask):
    """Of three letters, drawn where nothing else is said."""

    fill_temperature = 1.0


@pytest.mark.parametrize("given", [None, -1, "hot", float("nan"), float("inf"), True])
def test_a_temperature_that_is_none(given: object) -> None:
    task = TableTask(random_joint(3, 4, seed=0))
    task.fill_temperature = given
    with pytest.raises(tasks.UnmaskError, match="task TableTask needs a fill_temperature, a number of at least 0, not"):
        Unmasking(task, TableDenoiser(task.joint))


@pytest.mark.trains
@pytest.mark.parametrize(
    "train",
    [
        lambda process, **more: upo.train(upo.UPOConfig(imitation=0, **more), process),
        lambda process, **more: policy_iteration.train(PolicyIterationConfig(steps=1, **more), process),
    ],
)
def test_a_run_keeps_the_temperature_that_it_was_trained_at(train: Callable, tmp_path: Path) -> None:
    """So what it goes on at does not change with the task, and the card has it."""
    task = Drawn(random_joint(3, 4, seed=0))
    small = {"out": str(tmp_path), "iterations": 1, "puzzles": 2, "validate_every": 0}
    small["policy"] = PolicyConfig(copy=False, dim=16, layers=1)
    train(Unmasking(task, TableDenoiser(task.joint)), **small)
    assert json.loads((tmp_path / "run.json").read_text())["fill_temperature"] == 1.0
    task.fill_temperature = 0.0
    with pytest.raises(tasks.UnmaskError, match=r"fill_temperature was 1\.0, is 0\.0"):
        train(Unmasking(task, TableDenoiser(task.joint)), resume="auto", **small)


@pytest.mark.trains
def test_imitation_is_validated_as_the_task_is_played(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    settings = {"env": "Unmask/FreeText-v0", "reference": "margin", "steps": 1, "puzzles": 2, "validation_puzzles": 4}
    imitation.train(imitation.ImitationConfig(str(tmp_path), policy=PolicyConfig(layers=1, num_passes=1), **settings))
    lines = [line for line in capsys.readouterr().out.splitlines() if "validation" in line and "imitation" in line]
    assert "validation 0.0" not in lines[0]


def test_a_replay_draws_too(tmp_path: Path) -> None:
    process = make_process("Unmask/FreeText-v0")
    instances, orders = process.task.heldout(1), {"random": reference("random"), "margin": reference("margin")}
    results = compare(process, orders, instances)
    demo.picture(process, orders, list(results), instances, tmp_path / "replay.gif")
    assert (tmp_path / "replay.gif").stat().st_size > 0
