"""What a run says of itself: scores by hand, training that does not depend on them, and the lines it prints."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from agents import imitation, sb3_ppo, torchrl_ppo, upo
from agents.imitation import ImitationConfig
from agents.policy import PolicyConfig
from agents.sb3_ppo import SB3PPOConfig
from agents.torchrl_ppo import TorchRLGRPOConfig, TorchRLPPOConfig
from agents.upo import UPOConfig
from agents.validation import Greedy, Validation
from tasks import Instances, UnmaskError
from tests.agents.test_setup import Misled, scalars
from tests.toys import PositionPolicy
from unmask_env.denoiser import TableDenoiser
from unmask_env.process import Unmasking
from unmask_env.reference import LeftToRight, MaxConfidence, Random, SoftmaxConfidence, TopK
from unmask_env.state import Observation

SHAPE = PolicyConfig(copy=False, dim=16, layers=1, defer_above=2.0, num_passes=1)
MISLED = Unmasking(Misled(), TableDenoiser(Misled().joint))
UNIFORM = PositionPolicy(lambda seen: Random()(seen).log_probs)


def config(out: Path | str = "unused", kind: type = UPOConfig, **changes: object) -> UPOConfig:
    sizes = {"num_envs": 8} if kind in (SB3PPOConfig, TorchRLPPOConfig) else {"puzzles": 4, "group": 4}
    sizes |= {"imitation": 0} if kind is UPOConfig else {}
    shared = {"iterations": 4, "minibatches": 2, "lr": 1e-2, "threads": 1, "policy": SHAPE, "validation_puzzles": 10}
    return kind(out=str(out), **shared | sizes | changes)


# ---------------------------------------------------------------------- scores
def test_scores_by_hand() -> None:
    """Rewarded is symbol 1 at position 0, which is written only by those who begin there. The uniform policy's entropy
    is log 3 and log 2 where it decides; where one position is left, nothing is decided."""
    monitor = Validation(config(), MISLED, SoftmaxConfidence())
    scores = monitor.scores(UNIFORM)  # its mode is the lowest index
    assert (scores["validation/policy"], scores["validation/reference"], scores["validation/nfe"]) == (1.0, 0.0, 3.0)
    assert scores["validation/reward"] == 1.0
    assert scores["validation/entropy"] == pytest.approx((math.log(3) + math.log(2)) / 2)
    known = Validation(config(), MISLED, Random()).scores(UNIFORM)
    assert known["validation/divergence"] == pytest.approx(0, abs=1e-6)
    deterministic = Validation(config(), MISLED, LeftToRight()).scores(UNIFORM)
    assert deterministic["validation/divergence"] == pytest.approx((math.log(3) + math.log(2)) / 2)
    assert deterministic["validation/reference"] == 1.0


def test_references_are_played_greedily_and_their_ties_are_drawn() -> None:
    seen = MISLED.observe(MISLED.reset(MISLED.task.sample(300, torch.Generator().manual_seed(0))))
    draws = torch.Generator().manual_seed(0)
    soft = Greedy(SoftmaxConfidence(5.0))(seen).sample(draws)
    assert (MaxConfidence()(seen).log_prob(soft) > -math.inf).all(), "however soft it is"
    drawn = Greedy(TopK(2))(seen).sample(draws).float().mean(0)
    assert drawn.sum() == pytest.approx(1.0)
    assert sorted(drawn.tolist())[1:] == pytest.approx([0.5, 0.5], abs=0.1)


def test_when_it_is_due() -> None:
    every = Validation(config(validate_every=3), MISLED, Random())
    assert [step for step in range(1, 10) if every.due(step)] == [3, 6, 9]
    never = Validation(config(validate_every=0), MISLED, Random())
    assert not any(never.due(step) for step in range(1, 10))


def test_scores_are_the_same_each_time_and_draw_from_no_stream_of_others() -> None:
    sampled = Unmasking(MISLED.task, MISLED.denoiser, temperature=1.0)
    monitor = Validation(config(), sampled, TopK(2))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert monitor.scores(UNIFORM) == monitor.scores(UNIFORM) == Validation(config(), sampled, TopK(2)).scores(UNIFORM)
    assert torch.equal(torch.get_rng_state(), before)


class Few(Misled):
    """Holds out ``count`` instances and no more."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def heldout(self, n: int | None = None, split: str = "test") -> Instances:
        if not self.count or (n or 0) > self.count:
            raise UnmaskError(f"cannot take {n}")
        return super().heldout(self.count, split)


@pytest.mark.parametrize("count", [0, 3])
def test_tasks_that_hold_out_few_instances(count: int) -> None:
    monitor = Validation(config(), Unmasking(Few(count), MISLED.denoiser), Random())
    assert monitor.due(10) == bool(count)
    assert count == (0 if monitor.instances is None else len(monitor.instances))


# ---------------------------------------------------------------------- training does not depend on it
LEARNERS = {
    UPOConfig: upo.train,
    SB3PPOConfig: sb3_ppo.train,
    TorchRLPPOConfig: torchrl_ppo.train,
    TorchRLGRPOConfig: torchrl_ppo.train,
}


@pytest.mark.trains
@pytest.mark.parametrize("kind", LEARNERS)
def test_the_numbers_of_training_do_not_depend_on_it(tmp_path: Path, kind: type) -> None:
    for every in (0, 1):
        LEARNERS[kind](config(tmp_path / str(every), kind, validate_every=every), MISLED)
    saved = [(tmp_path / run / "model.safetensors").read_bytes() for run in "01"]
    assert saved[0] == saved[1]
    logged = [scalars(tmp_path / run) for run in "01"]
    shared = {name for name in logged[0] if not name.startswith("throughput/")}
    assert all(logged[0][name] == logged[1][name] for name in shared)
    assert {name.partition("/")[0] for name in logged[1].keys() - shared} == {"validation", "throughput"}
    assert [len(logged[1][f"validation/{name}"]) for name in ("policy", "reference", "nfe", "entropy")] == [4] * 4
    assert {"learning_rate", "throughput/steps_per_second"} <= logged[0].keys()
    assert any(name.startswith("gradient/") for name in logged[0])
    if kind in (UPOConfig, TorchRLGRPOConfig):
        assert 0 < max(logged[0]["groups/informative"]) <= 1


@pytest.mark.trains
def test_imitation_is_watched_too(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for every in (0, 2):
        settings = {"steps": 5, "batch": 8, "puzzles": 40, "policy": SHAPE, "threads": 1, "log_every": 3}
        run = ImitationConfig(out=str(tmp_path / str(every)), validate_every=every, **settings)
        imitation.train(run, MISLED)
    saved = [(tmp_path / run / "model.safetensors").read_bytes() for run in "02"]
    assert saved[0] == saved[1]
    assert len(scalars(tmp_path / "2")["validation/policy"]) == 3, "after 2, 4 and all 5 steps"
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("imitation table 5/5")]
    assert "validation" not in lines[0]
    assert "(reference 0.0, " in lines[1]


# ---------------------------------------------------------------------- what it prints
@pytest.mark.trains
def test_one_line_for_each_iteration(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    upo.train(config(tmp_path / "run", validate_every=2), MISLED)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("upo table ") and "/4" in line]
    assert len(lines) == 4
    assert lines[0].startswith("upo table 1/4 reward 0.")
    assert "informative" in lines[0]
    assert lines[0].endswith(" lr 2.0e-03"), "the learning rate warms up over 5 iterations"
    assert ["validation" in line for line in lines] == [False, True, False, True], "where it is new"
    known = ("validation 0.0 (reference 0.0, +0.0)", "validation 100.0 (reference 0.0, +100.0)")
    assert any(words in lines[1] for words in known)


def said(capsys: pytest.CaptureFixture, words: str) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if words in line]


@pytest.mark.trains
@pytest.mark.parametrize(("lr", "learns"), [(0.0, False), (3e-2, True)])
def test_a_run_that_learns_nothing_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture, lr: float, learns: bool
) -> None:
    upo.train(config(tmp_path / "run", lr=lr, iterations=12, puzzles=8, beta=0.0), MISLED)
    lines = said(capsys, "no gain above the noise on validation")
    assert len(lines) == (0 if learns else 1)
    if not learns:
        assert "0.0 at the start, 0.0 now" in lines[0]
        assert "try " in lines[0]


@pytest.mark.trains
def test_a_reference_that_is_perfect_leaves_nothing_to_gain(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    upo.train(config(tmp_path / "run", reference="left_to_right"), MISLED)
    output = capsys.readouterr().out
    assert output.count("the reference left_to_right is at 100 % of 10 validation instances") == 1
    assert "no gain" not in output


class Unrewarded(Misled):
    def reward(self, tokens: Tensor, instances: Instances) -> Tensor:
        return torch.zeros(len(tokens))


@pytest.mark.trains
def test_groups_that_are_all_rewarded_alike_are_told_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    upo.train(config(tmp_path / "run", iterations=12), Unmasking(Unrewarded(), MISLED.denoiser))
    assert len(said(capsys, "no group was rewarded unequally")) == 1


@pytest.mark.trains
def test_a_run_from_another_policy_is_compared_with_it(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """It is far above the reference, and was so from the start."""
    upo.train(config(tmp_path / "good", lr=3e-2, iterations=12, puzzles=8, beta=0.0), MISLED)
    capsys.readouterr()
    monitor = Validation(config(init=str(tmp_path / "good")), MISLED, SoftmaxConfidence())
    assert float(monitor.start_played.score.mean()) == 1.0
    assert float(monitor.reference_played.score.mean()) == 0.0


def test_fewer_forwards_at_the_same_score_are_a_gain() -> None:
    from agents.validation import Played

    ones, zeros = torch.ones(20).double(), torch.zeros(20).double()
    many, few = torch.full((20,), 3.0).double(), torch.full((20,), 2.0).double()
    start = Played(ones, ones, many, many)
    assert Played(ones, ones, few, few).gains_over(start)
    assert not Played(ones, ones, many, many).gains_over(start)
    assert not Played(zeros, zeros, few, few).gains_over(start)
    assert Played(zeros, zeros, few, few).falls_below(start)
    assert Played(ones, ones, many, many).gains_over(Played(zeros, ones, many, many))


def test_a_network_is_played_in_evaluation_mode_and_goes_on_as_it_was() -> None:
    class Seen(torch.nn.Module):
        actions, reads_hidden = "single", False

        def forward(self, seen: Observation):
            assert not self.training
            return LeftToRight()(seen)

        def for_instances(self, *_: object) -> "Seen":
            return self

    policy = Seen().train()
    Validation(config(), MISLED, Random()).scores(policy)
    assert policy.training
