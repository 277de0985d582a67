"""Imitation: the losses by hand, the collected states, and a run that learns."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tasks
from agents import imitation
from agents.imitation import EASY, ImitationConfig, States, choose_right_loss, imitation_loss
from agents.policy import OrderPolicy, PolicyShape, load_policy
from pretrain.checkpoint import CheckpointError
from tasks import Instances, Task, UnmaskError
from tests.oracles.enumeration import TableTask, random_joint
from unmask_env import reference
from unmask_env.core import Actions, Denoised, Observation, Rules
from unmask_env.denoiser import FrozenDenoiser, TableDenoiser, load_denoiser

INF = math.inf
SHAPE = PolicyShape(copy=False, layers=1, dim=8, heads=2)


@pytest.fixture(scope="module")
def sudoku6() -> Task:
    return tasks.get("sudoku6")


@pytest.fixture(scope="module")
def tiny(sudoku6: Task) -> FrozenDenoiser:
    return load_denoiser("sudoku6-tiny", sudoku6)


class Given(OrderPolicy):
    """A policy with the given choice (N, L) and beliefs (R, N, L, V)."""

    def __init__(self, choice: Tensor, beliefs: Tensor | None = None) -> None:
        super().__init__(2, [[i] for i in range(choice.shape[1])], dim=4, layers=1, heads=1)
        self.choice, self.given = choice.log(), None if beliefs is None else beliefs.log()

    def read(self, observation: Observation) -> tuple[list[Tensor], Tensor]:
        given = torch.zeros(1, *self.choice.shape, 2) if self.given is None else self.given
        return list(given), torch.zeros(*self.choice.shape, 4)

    def read_log_prob(self, observation: Observation, belief: Tensor, states: Tensor | None = None) -> Tensor:
        return self.choice

    def log_prob(self, observation: Observation) -> Tensor:
        return self.choice


# Two positions' most likely symbols are 0 and 1 in the first row, 1 and 0 in the second; all is open but [1, 2].
P = torch.tensor([[[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]], [[0.3, 0.7], [0.55, 0.45], [0.5, 0.5]]])
OPEN = torch.tensor([[True, True, True], [True, True, False]])
OBSERVATION = Observation(torch.where(OPEN, 2, 0), OPEN, Denoised(P.log()))
CHOICE = torch.tensor([[0.5, 0.2, 0.3], [0.75, 0.25, 0.0]])


# ---------------------------------------------------------------------- losses
def test_choose_right_loss_by_hand() -> None:
    right = torch.tensor([[True, False, True], [False, True, False]])
    log_prob = CHOICE.log().requires_grad_()
    loss = choose_right_loss(log_prob, right)
    torch.testing.assert_close(loss, torch.tensor([-math.log(0.8), -math.log(0.25)]))
    loss.sum().backward()
    expected = torch.tensor([[-0.5 / 0.8, 0.0, -0.3 / 0.8], [0.0, -1.0, 0.0]])
    torch.testing.assert_close(log_prob.grad, expected)


def test_imitation_of_the_oracle_by_hand() -> None:
    """Right are (0, 0) and (0, 1) in row 0, (1, 1) in row 1; the readings are asked for every open answer."""
    answers = torch.tensor([[0, 1, 1], [0, 0, 0]])
    beliefs = torch.tensor(
        [
            [[[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]], [[0.5, 0.5], [0.5, 0.5], [0.01, 0.99]]],
            [[[0.8, 0.2], [0.4, 0.6], [0.1, 0.9]], [[0.2, 0.8], [0.7, 0.3], [0.01, 0.99]]],
        ]
    )
    loss = imitation_loss(Given(CHOICE, beliefs), reference.Oracle(), OBSERVATION, answers)
    choosing = -(math.log(0.7) + math.log(0.25)) / 2
    first = math.log(2)
    second = -(math.log(0.8 * 0.6 * 0.9) / 3 + math.log(0.2 * 0.7) / 2) / 2
    assert loss.item() == pytest.approx(choosing + (first + second) / 2, rel=1e-5)


def test_rows_without_a_right_position_teach_no_choice() -> None:
    answers = torch.tensor([[0, 1, 1], [0, 1, 0]])  # row 1: both top symbols are wrong
    even = torch.full((1, 2, 3, 2), 0.5)
    loss = imitation_loss(Given(CHOICE, even), reference.Oracle(), OBSERVATION, answers)
    assert loss.item() == pytest.approx(-math.log(0.7) + math.log(2), rel=1e-5)
    answers = torch.tensor([[1, 0, 1], [0, 1, 0]])  # no row has one
    loss = imitation_loss(Given(CHOICE, even), reference.Oracle(), OBSERVATION, answers)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-5)


def test_imitation_of_a_deterministic_reference_splits_ties() -> None:
    p = torch.tensor([[[0.9, 0.1], [0.1, 0.9], [0.6, 0.4]], [[0.3, 0.7], [0.55, 0.45], [1.0, 0.0]]])
    observation = Observation(OBSERVATION.tokens, OPEN, Denoised(p.log()))
    answers = torch.zeros(2, 3, dtype=torch.long)
    loss = imitation_loss(Given(CHOICE), reference.MaxConfidence(), observation, answers)
    tied = -(math.log(0.5) + math.log(0.2)) / 2
    assert loss.item() == pytest.approx((tied - math.log(0.75)) / 2, rel=1e-5)


def test_imitation_of_a_stochastic_reference_is_least_at_the_reference() -> None:
    """There it is the reference's entropy."""
    target = reference.SoftmaxConfidence(0.3)
    g = target.log_prob(OBSERVATION).exp()
    answers = torch.zeros(2, 3, dtype=torch.long)
    entropy = -torch.xlogy(g, g).sum(1).mean().item()
    assert imitation_loss(Given(g), target, OBSERVATION, answers).item() == pytest.approx(entropy, rel=1e-5)
    assert imitation_loss(Given(CHOICE), target, OBSERVATION, answers).item() > entropy


@pytest.mark.parametrize("name", ["max_confidence", "margin", "entropy", "softmax_confidence", "oracle"])
def test_a_new_policy_has_a_finite_loss_on_every_board(sudoku6, tiny, name: str) -> None:
    """Also where the denoiser is sure, and its most confident position is not the reference's."""
    answers = sudoku6.heldout(50).answers
    hidden = torch.rand(answers.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    tokens = torch.where(hidden, sudoku6.mask_id, answers)
    observation = Observation(tokens, hidden, tiny(tokens))
    policy = imitation.new_policy(PolicyShape(), sudoku6, tiny, seed=0, gate=1.0)
    assert (~policy.unsure(observation)).any()
    loss = imitation_loss(policy, reference.get(name), observation, answers)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in policy.parameters())
    assert policy.gate.grad != 0


# ---------------------------------------------------------------------- states
def check_states(states: States, mask_id: int, denoiser, sure: float) -> None:
    """Every kept state is on the path to its answer, has a right and a wrong position, and is marked truly."""
    hole = states.tokens == mask_id
    assert (hole | (states.tokens == states.answers)).all(), "the answer path was left"
    log_probs = denoiser(states.tokens).log_probs
    right = log_probs.argmax(-1) == states.answers
    assert (hole & right).any(1).all()
    assert (hole & ~right).any(1).all()
    confidence = log_probs.max(-1).values.exp().masked_fill(~hole, 0.0).max(1).values
    assert torch.equal(states.stuck, confidence < sure)


def test_collected_states_of_sudoku(sudoku6, tiny) -> None:
    states = States(sudoku6)
    generator = torch.Generator().manual_seed(0)
    states.collect(sudoku6, tiny, sudoku6.sample(60, generator), 0.97, generator)
    assert states.stuck.any()
    assert (~states.stuck).any()
    check_states(states, sudoku6.mask_id, tiny, 0.97)


class Unlucky(TableTask):
    """Answers that the denoiser finds least likely, so that often no open position's top symbol is right."""

    def sample(self, n: int, generator: torch.Generator) -> Instances:
        answers = torch.randint(self.vocab_size, (n, self.length), generator=generator)
        return Instances(torch.full_like(answers, self.mask_id), answers)


def test_collecting_never_leaves_the_answer_path() -> None:
    joint = random_joint(2, 6, seed=1)
    task, denoiser = Unlucky(joint), TableDenoiser(joint)
    states, generator = States(task), torch.Generator().manual_seed(0)
    states.collect(task, denoiser, task.sample(200, generator), 2.0, generator)
    assert len(states.tokens) > 100
    check_states(states, task.mask_id, denoiser, 2.0)


def test_sampling_states(sudoku6) -> None:
    """The share of easy states, fresh guises that stay consistent with their answers, and pools of one kind."""
    states = States(sudoku6)
    instances = sudoku6.heldout(20)
    stuck = torch.arange(20) < 5
    given = instances.answers
    boards = {"tokens": instances.tokens, "answers": instances.answers, "given": given}
    states.load_state_dict(boards | {"stuck": stuck, "reopened": torch.zeros_like(given)})
    holes = {tuple(h): i for i, h in enumerate((instances.tokens == 6).sum(1, keepdim=True).tolist())}
    assert len(holes) > 1

    drawn, given, reopened = states.sample(sudoku6, 40, 0.25, torch.Generator().manual_seed(0))
    assert len(drawn) == 40
    assert torch.equal(given, drawn.answers), "what they began with is in the same guise"
    assert torch.equal(reopened, torch.zeros_like(given))
    blank = drawn.tokens == sudoku6.mask_id
    assert torch.equal(drawn.tokens[~blank], drawn.answers[~blank])
    assert sudoku6.valid(drawn.answers, drawn).all()
    again, *_ = states.sample(sudoku6, 40, 0.25, torch.Generator().manual_seed(0))
    assert torch.equal(again.tokens, drawn.tokens)
    assert len({tuple(row) for row in drawn.tokens.tolist()}) == 40, "in new guises"

    plain = TableTask(torch.ones(2, 2))  # without symmetries, rows can be told apart
    few = States(plain)
    tokens = torch.tensor([[2, 0], [2, 1], [0, 2], [1, 2]])
    both = {"tokens": tokens, "answers": tokens, "given": tokens, "reopened": torch.zeros_like(tokens)}
    few.load_state_dict(both | {"stuck": torch.tensor([True, True, False, False])})
    for easy, expected in ((0.25, 10), (0.0, 0), (1.0, 40)):
        got = few.sample(plain, 40, easy, torch.Generator().manual_seed(0))[0].tokens
        assert int((got[:, 1] == 2).sum()) == expected
    for kind in (True, False):
        few.load_state_dict(both | {"stuck": torch.full((4,), kind)})
        assert len(few.sample(plain, 40, 0.25, torch.Generator().manual_seed(0))[0]) == 40
    few.load_state_dict(few.state_dict())


# ---------------------------------------------------------------------- runs
def small(out: Path, **changes: object) -> ImitationConfig:
    settings: dict[str, object] = {"puzzles": 100, "steps": 60, "batch": 32, "lr": 1e-2, "threads": 1, "shape": SHAPE}
    return ImitationConfig(out=str(out), **settings | changes)


def table() -> tuple[Task, TableDenoiser]:
    joint = random_joint(3, 4, seed=2)
    return Unlucky(joint), TableDenoiser(joint)


def measure(policy: OrderPolicy, target: reference.Reference) -> float:
    """The loss on states that training did not see."""
    task, denoiser = table()
    states, generator = States(task), torch.Generator().manual_seed(99)
    states.collect(task, denoiser, task.sample(300, generator), 0.97, generator)
    observation = Observation(states.tokens, states.tokens == task.mask_id, denoiser(states.tokens))
    with torch.no_grad():
        return imitation_loss(policy, target, observation, states.answers).item()


@pytest.mark.parametrize("name", ["oracle", "softmax_margin"])
def test_a_short_run_lowers_the_loss(tmp_path: Path, name: str) -> None:
    task, denoiser = table()
    target = reference.get(name)
    settings = small(tmp_path / "run", reference=name)
    before = imitation.new_policy(SHAPE, task, denoiser, seed=0, gate=1.0)
    trained = imitation.train(settings, task, denoiser)
    assert measure(trained, target) < 0.9 * measure(before, target)
    saved = load_policy(tmp_path / "run", task)
    assert measure(saved, target) == measure(trained, target)
    assert not saved.training


@pytest.mark.parametrize("actions", ["single", "set+remask"])
def test_a_run_may_start_from_a_policy(tmp_path: Path, actions: Actions, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over sets that policy plays the boards, too; its own threshold stays as it is."""
    rules, before = Rules(actions), Rules("single" if actions == "single" else "set")
    first = imitation.train(small(tmp_path / "first", steps=20, rules=before), *table())
    played_by = []
    collect = States.collect_sets

    def spied(self: States, *args: object) -> None:
        played_by.append(args[-1])
        collect(self, *args)

    monkeypatch.setattr(States, "collect_sets", spied)
    start = {"init": str(tmp_path / "first"), "rules": rules, "steps": 1, "seed": 5}
    still = imitation.train(small(tmp_path / "still", lr=0.0, **start), *table())
    assert still.threshold == first.threshold
    for name, weights in first.state_dict().items():
        assert torch.equal(still.state_dict()[name], weights), name
    for player in played_by:
        assert player is not still
        assert torch.equal(player.head.weight, first.head.weight)
    assert len(played_by) == (actions != "single")
    moved = imitation.train(small(tmp_path / "moved", **start), *table())
    assert not torch.equal((moved.doubter or moved).head.weight, first.head.weight)
    with pytest.raises(UnmaskError, match="init is for imitating the oracle, not margin"):
        imitation.train(small(tmp_path / "other", reference="margin", **start), *table())
    other = Rules("set" if actions == "single" else "single")
    with pytest.raises(CheckpointError, match="cannot play with actions"):
        imitation.train(small(tmp_path / "other", **start | {"rules": other}), *table())


@torch.no_grad()
def test_boards_played_by_a_policy_are_those_it_meets(sudoku6: Task, tiny: FrozenDenoiser) -> None:
    """One that closes a position at a time, at whatever threshold, meets every number of holes up to a mistake."""
    task, denoiser = sudoku6, tiny
    timid = imitation.new_policy(PolicyShape(), task, denoiser, seed=0, sets=True)
    timid.together.bias.fill_(-50.0)
    instances, generator = task.heldout(1, "validation"), torch.Generator().manual_seed(0)
    states = States(task)
    states.collect_sets(task, denoiser, instances, Rules("set"), generator, timid)
    holes = (states.tokens == task.mask_id).sum(1)
    assert holes[0] == (instances.tokens == task.mask_id).sum()
    assert len(holes) > 5
    assert (holes.diff() == -1).all()


def test_the_same_seed_gives_the_same_run(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(name) + seed)
        imitation.train(small(tmp_path / name, steps=5, seed=seed), *table())
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_a_run_resumes_whether_its_share_of_easy_states_was_given_or_not(tmp_path: Path) -> None:
    given = EASY["single"]
    for name, first, second in (("left", None, given), ("given", given, None)):
        imitation.train(small(tmp_path / name, steps=2, easy=first), *table())
        imitation.train(small(tmp_path / name, steps=2, easy=second, resume=True), *table())
    with pytest.raises(UnmaskError, match="easy"):
        imitation.train(small(tmp_path / "left", steps=2, easy=given / 2, resume=True), *table())


def test_a_run_that_would_learn_its_states_by_heart_says_so(tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match="shows no guises, and each of .* states will be seen about .* take more puzzles"
    ):
        imitation.train(small(tmp_path / "run", puzzles=4, steps=10), *table())


def test_a_run_without_a_state_to_learn_from_says_so(tmp_path: Path) -> None:
    """The denoiser is right everywhere: no order can go wrong."""
    joint = torch.zeros(2, 2, 2)
    joint[0, 1, 0] = 1
    with pytest.raises(UnmaskError) as error:
        imitation.train(small(tmp_path / "run"), TableTask(joint), TableDenoiser(joint))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"easy": -0.1}, {"easy": 1.1}, {"puzzles": 0}, {"steps": 0}, {"batch": 0}, {"save_every": 0}, {"log_every": 0},
        {"lr": -1.0}, {"grad_clip": -1.0}, {"seed": -1}, {"threads": 0}, {"device": "gpu"}, {"denoiser": "sudoku7"},
        {"env": "Unmask/Sudoku5x5-v0"}, {"shape": PolicyShape(layers=4)}, {"resume": True},
    ],
    ids=lambda changes: next(f"{key}={value}" if key != "shape" else key for key, value in changes.items()),
)  # fmt: skip
def test_settings_that_do_not_fit(tmp_path: Path, changes: dict) -> None:
    few = {"denoiser": "sudoku6-tiny", "puzzles": 4, "steps": 1, "batch": 4, "shape": PolicyShape()}
    with pytest.raises(UnmaskError) as error:
        imitation.train(small(tmp_path / "run", **few | changes))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists(), "nothing was written"


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    with pytest.raises(UnmaskError, match=r"policy has weights that are not finite after step 2; .* lower lr"):
        imitation.train(small(tmp_path / "run", lr=math.inf, grad_clip=math.inf, steps=2), *table())
    assert not (tmp_path / "run" / "model.safetensors").exists()
