"""Imitation: the losses by hand, the collected states, and a run that learns."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tasks
from agents import imitation
from agents.decoding import Thresholds
from agents.imitation import CERTAIN_FRACTION, ImitationConfig, choose_right_loss, imitation_loss
from agents.policy import OrderPolicy, PolicyConfig, load_policy, new_policy
from agents.remask_policy import RemaskPolicy
from agents.states import States
from tasks import Instances, Task, UnmaskError
from tests.oracles.enumeration import TableTask, random_joint
from tests.toys import observation as observation_of
from unmask_env.denoiser import FrozenDenoiser, TableDenoiser, load_denoiser
from unmask_env.distributions import Categorical
from unmask_env.process import Unmasking
from unmask_env.reference import MaxConfidence, Oracle, Reference, SoftmaxConfidence, reference
from unmask_env.state import Actions, Denoised, Observation, Rules

INF = math.inf
SHAPE = PolicyConfig(copy=False, layers=1, dim=8, heads=2)


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
        self.head.forward = lambda *_: Categorical(self.choice)

    def read(self, observation: Observation) -> tuple[list[Tensor], Tensor]:
        given = torch.zeros(1, *self.choice.shape, 2) if self.given is None else self.given
        return list(given), torch.zeros(*self.choice.shape, 4)


# Two positions' most likely symbols are 0 and 1 in the first row, 1 and 0 in the second; all is masked but [1, 2].
P = torch.tensor([[[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]], [[0.3, 0.7], [0.55, 0.45], [0.5, 0.5]]])
OPEN = torch.tensor([[True, True, True], [True, True, False]])
OBSERVATION = observation_of(torch.where(OPEN, 2, 0), OPEN, Denoised.of(P.log()))
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
    """Right are (0, 0) and (0, 1) in row 0, (1, 1) in row 1; every pass's belief is asked for every masked answer."""
    answers = torch.tensor([[0, 1, 1], [0, 0, 0]])
    beliefs = torch.tensor(
        [
            [[[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]], [[0.5, 0.5], [0.5, 0.5], [0.01, 0.99]]],
            [[[0.8, 0.2], [0.4, 0.6], [0.1, 0.9]], [[0.2, 0.8], [0.7, 0.3], [0.01, 0.99]]],
        ]
    )
    loss = imitation_loss(Given(CHOICE, beliefs), Oracle(), OBSERVATION, answers)
    choosing = -(math.log(0.7) + math.log(0.25)) / 2
    first = math.log(2)
    second = -(math.log(0.8 * 0.6 * 0.9) / 3 + math.log(0.2 * 0.7) / 2) / 2
    assert loss.item() == pytest.approx(choosing + (first + second) / 2, rel=1e-5)


def test_rows_without_a_right_position_teach_no_choice() -> None:
    answers = torch.tensor([[0, 1, 1], [0, 1, 0]])  # row 1: both top symbols are wrong
    even = torch.full((1, 2, 3, 2), 0.5)
    loss = imitation_loss(Given(CHOICE, even), Oracle(), OBSERVATION, answers)
    assert loss.item() == pytest.approx(-math.log(0.7) + math.log(2), rel=1e-5)
    answers = torch.tensor([[1, 0, 1], [0, 1, 0]])  # no row has one
    loss = imitation_loss(Given(CHOICE, even), Oracle(), OBSERVATION, answers)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-5)


def test_imitation_of_a_deterministic_reference_splits_ties() -> None:
    p = torch.tensor([[[0.9, 0.1], [0.1, 0.9], [0.6, 0.4]], [[0.3, 0.7], [0.55, 0.45], [1.0, 0.0]]])
    observation = observation_of(OBSERVATION.tokens, OPEN, Denoised.of(p.log()))
    answers = torch.zeros(2, 3, dtype=torch.long)
    loss = imitation_loss(Given(CHOICE), MaxConfidence(), observation, answers)
    tied = -(math.log(0.5) + math.log(0.2)) / 2
    assert loss.item() == pytest.approx((tied - math.log(0.75)) / 2, rel=1e-5)


def test_imitation_of_a_stochastic_reference_is_least_at_the_reference() -> None:
    """There it is the reference's entropy."""
    target = SoftmaxConfidence(0.3)
    g = target(OBSERVATION).log_probs.exp()
    answers = torch.zeros(2, 3, dtype=torch.long)
    entropy = -torch.xlogy(g, g).sum(1).mean().item()
    assert imitation_loss(Given(g), target, OBSERVATION, answers).item() == pytest.approx(entropy, rel=1e-5)
    assert imitation_loss(Given(CHOICE), target, OBSERVATION, answers).item() > entropy


@pytest.mark.parametrize("name", ["max_confidence", "margin", "entropy", "softmax_confidence", "oracle"])
def test_a_new_policy_has_a_finite_loss_on_every_board(sudoku6, tiny, name: str) -> None:
    """Also where the denoiser is confident, and its most confident position is not the reference's."""
    answers = sudoku6.heldout(50).answers
    hidden = torch.rand(answers.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    tokens = torch.where(hidden, sudoku6.mask_id, answers)
    observation = observation_of(tokens, hidden, tiny(tokens))
    policy = new_policy(PolicyConfig(), sudoku6, tiny, seed=0, belief_weight=1.0)
    assert (~policy.uncertain(observation)).any()
    loss = imitation_loss(policy, reference(name), observation, answers)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in policy.parameters())
    assert policy.head.belief_weight.grad != 0


# ---------------------------------------------------------------------- states
def check_states(states: States, mask_id: int, denoiser, defer_above: float) -> None:
    """Every kept state is on the path to its answer, has a right and a wrong position, and is marked truly."""
    hole = states.tokens == mask_id
    assert (hole | (states.tokens == states.answers)).all(), "the answer path was left"
    log_probs = denoiser(states.tokens).log_probs
    right = log_probs.argmax(-1) == states.answers
    assert (hole & right).any(1).all()
    assert (hole & ~right).any(1).all()
    confidence = log_probs.max(-1).values.exp().masked_fill(~hole, 0.0).max(1).values
    assert torch.equal(states.uncertain, confidence < defer_above)


def test_collected_states_of_sudoku(sudoku6, tiny) -> None:
    states = States(sudoku6)
    generator = torch.Generator().manual_seed(0)
    states.collect(Unmasking(sudoku6, tiny), sudoku6.sample(60, generator), 0.97, generator)
    assert states.uncertain.any()
    assert (~states.uncertain).any()
    check_states(states, sudoku6.mask_id, tiny, 0.97)


class Unlucky(TableTask):
    """Answers that the denoiser finds least likely, so that often no masked position's top symbol is right."""

    def sample(self, n: int, generator: torch.Generator) -> Instances:
        answers = torch.randint(self.vocab_size, (n, self.length), generator=generator)
        return Instances(torch.full_like(answers, self.mask_id), answers)


def test_collecting_never_leaves_the_answer_path() -> None:
    joint = random_joint(2, 6, seed=1)
    task, denoiser = Unlucky(joint), TableDenoiser(joint)
    states, generator = States(task), torch.Generator().manual_seed(0)
    states.collect(Unmasking(task, denoiser), task.sample(200, generator), 2.0, generator)
    assert len(states.tokens) > 100
    check_states(states, task.mask_id, denoiser, 2.0)


NONE = {"values": torch.zeros(0)}


def test_sampling_states(sudoku6) -> None:
    """The share of certain states, fresh symmetries that stay consistent with their answers, and pools of one kind."""
    states = States(sudoku6)
    instances = sudoku6.heldout(20)
    uncertain = torch.arange(20) < 5
    given = instances.answers
    boards = {"tokens": instances.tokens, "answers": instances.answers, "given": given}
    states.load_state_dict(boards | {"uncertain": uncertain, "remask_count": torch.zeros_like(given)} | NONE)
    holes = {tuple(h): i for i, h in enumerate((instances.tokens == 6).sum(1, keepdim=True).tolist())}
    assert len(holes) > 1

    drawn = states.sample(sudoku6, 40, 0.25, torch.Generator().manual_seed(0))
    assert len(drawn.tokens) == 40
    assert torch.equal(drawn.given, drawn.answers), "what they began with is under the same symmetry"
    assert torch.equal(drawn.remask_count, torch.zeros_like(drawn.given))
    blank = drawn.tokens == sudoku6.mask_id
    assert torch.equal(drawn.tokens[~blank], drawn.answers[~blank])
    assert sudoku6.valid(drawn.answers, Instances(drawn.tokens, drawn.answers)).all()
    again = states.sample(sudoku6, 40, 0.25, torch.Generator().manual_seed(0))
    assert torch.equal(again.tokens, drawn.tokens)
    assert len({tuple(row) for row in drawn.tokens.tolist()}) == 40, "under new symmetries"

    plain = TableTask(torch.ones(2, 2))  # without symmetries, rows can be told apart
    few = States(plain)
    tokens = torch.tensor([[2, 0], [2, 1], [0, 2], [1, 2]])
    both = {"tokens": tokens, "answers": tokens, "given": tokens, "remask_count": torch.zeros_like(tokens)} | NONE
    few.load_state_dict(both | {"uncertain": torch.tensor([True, True, False, False])})
    for certain_fraction, expected in ((0.25, 10), (0.0, 0), (1.0, 40)):
        got = few.sample(plain, 40, certain_fraction, torch.Generator().manual_seed(0)).tokens
        assert int((got[:, 1] == 2).sum()) == expected
    for kind in (True, False):
        few.load_state_dict(both | {"uncertain": torch.full((4,), kind)})
        assert len(few.sample(plain, 40, 0.25, torch.Generator().manual_seed(0)).tokens) == 40
    few.load_state_dict(few.state_dict())


# ---------------------------------------------------------------------- runs
def small(out: Path, **changes: object) -> ImitationConfig:
    settings: dict[str, object] = {"puzzles": 100, "steps": 60, "batch": 32, "lr": 1e-2, "threads": 1, "policy": SHAPE}
    return ImitationConfig(out=str(out), **settings | changes)


def process() -> Unmasking:
    return Unmasking(*table())


def table() -> tuple[Task, TableDenoiser]:
    joint = random_joint(3, 4, seed=2)
    return Unlucky(joint), TableDenoiser(joint)


def measure(policy: OrderPolicy, target: Reference) -> float:
    """The loss on states that training did not see."""
    task, denoiser = table()
    states, generator = States(task), torch.Generator().manual_seed(99)
    states.collect(Unmasking(task, denoiser), task.sample(300, generator), 0.97, generator)
    observation = observation_of(states.tokens, states.tokens == task.mask_id, denoiser(states.tokens))
    with torch.no_grad():
        return imitation_loss(policy, target, observation, states.answers).item()


@pytest.mark.trains
@pytest.mark.parametrize("name", ["oracle", "softmax_margin"])
def test_a_short_run_lowers_the_loss(tmp_path: Path, name: str) -> None:
    task, denoiser = table()
    target = reference(name)
    settings = small(tmp_path / "run", reference=name)
    before = new_policy(SHAPE, task, denoiser, seed=0, belief_weight=1.0)
    trained = imitation.train(settings, Unmasking(task, denoiser))
    assert measure(trained, target) < 0.9 * measure(before, target)
    saved = load_policy(tmp_path / "run", task)
    assert measure(saved, target) == measure(trained, target)
    assert not saved.training


@pytest.mark.trains
@pytest.mark.parametrize("actions", ["single", "set+remask"])
def test_a_run_may_start_from_a_policy(tmp_path: Path, actions: Actions, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over sets that policy plays the boards, too, at thresholds of its own height."""
    rules, before = Rules(actions), Rules("single" if actions == "single" else "set")
    first = imitation.train(small(tmp_path / "first", steps=20, rules=before), process())
    played_by: list[object] = []
    collect = States.collect_sets

    def spied(self: States, *args: object) -> None:
        played_by.append(args[-1])
        collect(self, *args)

    monkeypatch.setattr(States, "collect_sets", spied)
    start = {"init": str(tmp_path / "first"), "rules": rules, "steps": 1, "seed": 5}
    still = imitation.train(small(tmp_path / "still", lr=0.0, **start), process())
    filling = still.fill if isinstance(still, RemaskPolicy) else still
    assert isinstance(still, RemaskPolicy) == (actions == "set+remask")
    for name, weights in first.state_dict().items():
        assert torch.equal(filling.state_dict()[name], weights), name
    assert played_by == ([] if actions == "single" else [still])
    moved = imitation.train(small(tmp_path / "moved", **start), process())
    trained = moved.remask if isinstance(moved, RemaskPolicy) else moved
    assert not torch.equal(trained.reader.head.weight, first.reader.head.weight)
    only = "init is for imitating the oracle" if actions == "single" else "over sets the oracle is what can be imitated"
    with pytest.raises(UnmaskError, match=f"{only}, not margin"):
        imitation.train(small(tmp_path / "other", reference="margin", **start), process())
    other = Rules("set" if actions == "single" else "single")
    with pytest.raises(UnmaskError, match=f"is for actions '{before.actions}', not '{other.actions}'"):
        imitation.train(small(tmp_path / "other", **start | {"rules": other}), process())


@torch.no_grad()
def test_boards_played_by_a_policy_are_those_it_meets(sudoku6: Task, tiny: FrozenDenoiser) -> None:
    """One that fills a position at a time, at whatever threshold, meets every number of holes up to a mistake."""
    task, denoiser = sudoku6, tiny
    timid = new_policy(PolicyConfig(), task, denoiser, seed=0, sets=True)
    timid.head.state_head.bias.fill_(-50.0)
    instances, generator = task.heldout(1, "validation"), torch.Generator().manual_seed(0)
    states = States(task)
    states.collect_sets(Unmasking(task, denoiser, Rules("set")), instances, generator, timid)
    holes = (states.tokens == task.mask_id).sum(1)
    assert holes[0] == (instances.tokens == task.mask_id).sum()
    assert len(holes) > 5
    assert (holes.diff() == -1).all()


@pytest.mark.trains
def test_the_same_seed_gives_the_same_run(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(name) + seed)
        imitation.train(small(tmp_path / name, steps=5, seed=seed), process())
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


@pytest.mark.trains
def test_a_run_resumes_whether_its_share_of_easy_states_was_given_or_not(tmp_path: Path) -> None:
    given = CERTAIN_FRACTION["single"]
    for name, first, second in (("left", None, given), ("given", given, None)):
        imitation.train(small(tmp_path / name, steps=2, certain_fraction=first), process())
        imitation.train(small(tmp_path / name, steps=2, certain_fraction=second, resume="must"), process())
    with pytest.raises(UnmaskError, match="certain_fraction"):
        imitation.train(small(tmp_path / "left", steps=2, certain_fraction=given / 2, resume="must"), process())


@pytest.mark.trains
def test_a_run_that_would_learn_its_states_by_heart_says_so(tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match="has no symmetries, and each of .* states will be seen about .* take more puzzles"
    ):
        imitation.train(small(tmp_path / "run", puzzles=4, steps=10), process())


def test_a_run_without_a_state_to_learn_from_says_so(tmp_path: Path) -> None:
    """The denoiser is right everywhere: no order can go wrong."""
    joint = torch.zeros(2, 2, 2)
    joint[0, 1, 0] = 1
    with pytest.raises(UnmaskError) as error:
        imitation.train(small(tmp_path / "run"), Unmasking(TableTask(joint), TableDenoiser(joint)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"puzzles": 0}, {"device": "gpu"}, {"denoiser": "sudoku7"}, {"env": "Unmask/Sudoku5x5-v0"},
        {"policy": PolicyConfig(layers=4)}, {"resume": "must"},
    ],
    ids=lambda changes: next(f"{key}={value}" if key != "policy" else key for key, value in changes.items()),
)  # fmt: skip
def test_settings_that_do_not_fit(tmp_path: Path, changes: dict) -> None:
    few = {"denoiser": "sudoku6-tiny", "puzzles": 4, "steps": 1, "batch": 4, "policy": PolicyConfig()}
    with pytest.raises(UnmaskError) as error:
        imitation.train(small(tmp_path / "run", **few | changes))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists(), "nothing was written"


@pytest.mark.trains
def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    broken, task = tmp_path / "run", process()
    with pytest.raises(UnmaskError, match=r"policy has weights that are not finite after step [0-9]+; .* lower lr"):
        imitation.train(small(broken, lr=1e9, grad_clip=1e9, weight_decay=1e9, steps=20), task)
    kept = load_policy(broken, task.task, task.denoiser)
    assert all(bool(weight.isfinite().all()) for weight in kept.parameters()), "the save before"


# ---------------------------------------------------------------------- what the labels weigh
@pytest.mark.trains
def test_the_error_cost_makes_a_policy_fill_later() -> None:
    """One feature-less position whose top symbol is right three times in four: the best odds of filling it are those of
    being right over the error cost, so log(3 / cost)."""
    torch.manual_seed(0)
    answers = torch.tensor([[0], [0], [0], [1]])
    tokens = torch.full((4, 1), 2)
    seen = observation_of(tokens, tokens == 2, Denoised.of(torch.tensor([[[0.6, 0.4]]]).log().expand(4, 1, 2)))
    for cost in (1.0, 20.0):
        policy = OrderPolicy(2, [[0]], dim=4, layers=1, heads=1, distribution="bernoulli")
        optimizer = torch.optim.Adam(policy.head.parameters(), lr=0.05)
        for _ in range(600):
            optimizer.zero_grad()
            imitation.set_imitation_loss(policy, seen, answers, cost).backward()
            optimizer.step()
        assert float(policy.log_odds(seen)[0, 0].detach()) == pytest.approx(math.log(3 / cost), abs=0.05)


def test_lost_boards_teach_nothing_where_mistakes_are_final() -> None:
    """No collected state holds a symbol that is not the answer's, though thresholds this low make many mistakes."""
    joint = random_joint(2, 6, seed=1)
    process_of_sets = Unmasking(Unlucky(joint), TableDenoiser(joint), Rules("set"))
    states, generator = States(process_of_sets.task), torch.Generator().manual_seed(0)
    instances = process_of_sets.task.sample(200, generator)
    states.collect_sets(process_of_sets, instances, generator)
    filled = states.tokens != 2
    assert filled.any()
    assert (states.tokens[filled] == states.answers[filled]).all()
    played = process_of_sets.rollout(reference("soft_threshold:theta=0.5"), instances, generator)
    assert (played.tokens != instances.answers).any(), "mistakes were made"


def test_thresholds_out_of_range_are_refused() -> None:
    for value in (0.0, 1.0, 2.0):
        with pytest.raises(UnmaskError, match=f"fill must be a number above 0 and below 1, not {value}"):
            Thresholds(value)
