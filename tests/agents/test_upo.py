"""UPO's loss and regularisers against hand-computed numbers, and their gradients against exact enumeration."""

import itertools
import math
import signal
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tasks
from agents import upo
from agents.forks import uncertain_states
from agents.policy import OrderPolicy, PolicyConfig, load_policy, new_policy
from agents.replay import Replay
from agents.setup import setup
from agents.upo import (
    Batch,
    Tempered,
    UPOConfig,
    check_regulariser,
    flatten,
    group_advantage,
    regularised_advantage,
    trajectory_kl_surrogate,
    upo_loss,
)
from pretrain.checkpoint import save_model
from pretrain.run import Interrupted
from tasks import Instances, UnmaskError
from tests.agents.test_setup import Misled, scalars
from tests.oracles.enumeration import TableTask, random_joint
from tests.oracles.tables import sequence_log_prob
from tests.toys import JOINT, SEQUENCE_REWARD, FreePolicy, one_of, rollout
from tests.toys import observation as observation_of
from unmask_env import exact
from unmask_env.denoiser import TableDenoiser, load_denoiser
from unmask_env.distributions import Categorical
from unmask_env.process import Unmasking
from unmask_env.reference import (
    Factor,
    Margin,
    Policy,
    Random,
    Reference,
    SoftmaxConfidence,
    SoftmaxMargin,
    TopK,
    reference,
)
from unmask_env.state import Denoised, Observation, Rules

INF = math.inf
NEVER = 99.0  # a reward or bound that no test reaches


class Fixed(Policy):
    """A reference from a table of probabilities per row."""

    def __init__(self, probabilities: list[list[float]]) -> None:
        self.table = torch.tensor(probabilities)

    def __call__(self, observation: Observation) -> Categorical:
        return Categorical(self.table.log())


class Forbidden(Policy):
    """Must not be asked."""

    def __call__(self, observation: Observation) -> Categorical:
        raise AssertionError("the reference was called")


# ---------------------------------------------------------------------- three positions, every trajectory
class Toy(NamedTuple):
    """All orders of filling one board greedily, as a recorded batch: row t * L + n is step n of trajectory t."""

    batch: Batch  # advantage holds the reward
    reward: Tensor


def enumerate_toy(length: int = 3) -> Toy:
    """Play all L! orders on an empty board with the exact denoiser and greedy filling."""
    denoiser = TableDenoiser(JOINT)
    tokens, is_open, log_probs, actions, rewards = [], [], [], [], []
    orders = list(itertools.permutations(range(length)))
    for order in orders:
        board = torch.full((1, length), 3)
        for position in order:
            tokens.append(board)
            is_open.append(board == 3)
            log_probs.append(denoiser(board).log_probs)
            actions.append(position)
            board = board.clone()
            board[0, position] = log_probs[-1][0, position].argmax()
        rewards.append(SEQUENCE_REWARD[tuple(board[0].tolist())])
    observation = observation_of(torch.cat(tokens), torch.cat(is_open), Denoised.of(torch.cat(log_probs)))
    reward = torch.stack(rewards)
    trajectory = torch.arange(len(orders)).repeat_interleave(length)
    return Toy(
        Batch(
            observation,
            one_of(actions, length),
            torch.zeros(len(actions)),
            trajectory,
            torch.arange(length).repeat(len(orders)),
            reward[trajectory],
        ),
        reward,
    )


@pytest.fixture(scope="module")
def toy() -> Toy:
    made = enumerate_toy()
    assert len(made.reward.unique()) >= 3, "the order decides what is written"
    return made


def chosen_log_prob(policy: Policy, batch: Batch) -> Tensor:
    return policy(batch.observation).log_prob(batch.action)


def per_trajectory(values: Tensor) -> Tensor:
    return values.view(-1, 3).sum(1)


def gradient(loss: Tensor, policy: nn.Module) -> Tensor:
    return torch.autograd.grad(loss, policy.parameters())[0]


def on_policy(policy: nn.Module, batch: Batch) -> Batch:
    return batch._replace(old_log_prob=chosen_log_prob(policy, batch).detach())


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_the_trajectory_kl_surrogate_has_the_exact_gradient_on_policy(toy: Toy, seed: int | None) -> None:
    """In expectation over trajectories from the policy itself, against autograd through the enumerated KL."""
    policy, target = FreePolicy(3, 3, seed), SoftmaxConfidence(0.3)
    batch = on_policy(policy, toy.batch)
    chosen = chosen_log_prob(policy, batch)
    log_target = chosen_log_prob(target, batch)
    log_p, log_g = per_trajectory(chosen), per_trajectory(log_target)
    expected = gradient((log_p.exp() * (log_p - log_g)).sum(), policy)

    chosen = chosen_log_prob(policy, batch)
    surrogate = trajectory_kl_surrogate(chosen, batch.old_log_prob, log_target, batch.trajectory, 6)
    estimate = gradient((log_p.detach().exp() * surrogate).sum(), policy)
    torch.testing.assert_close(estimate, expected, atol=1e-6, rtol=1e-5)
    assert expected.abs().max() > 1e-2


@pytest.mark.parametrize("seed", [None, 3, 4])
def test_the_trajectory_kl_is_the_expected_sum_of_step_kls(toy: Toy, seed: int | None) -> None:
    policy, target = FreePolicy(3, 3, seed), SoftmaxMargin(0.5)
    log_p = per_trajectory(chosen_log_prob(policy, toy.batch))
    g = target(toy.batch.observation)
    log_g = per_trajectory(chosen_log_prob(target, toy.batch))
    steps = per_trajectory(policy(toy.batch.observation).kl(g))
    whole = (log_p.exp() * (log_p - log_g)).sum()
    torch.testing.assert_close((log_p.exp() * steps).sum(), whole)


@pytest.mark.parametrize("beta", [0.0, 0.1, 2.0])
@pytest.mark.parametrize("seed", [None, 1])
def test_the_regularised_advantage_makes_the_gradient_exact(toy: Toy, beta: float, seed: int | None) -> None:
    """E[loss gradient] = - gradient of (E[r] - beta * E[sum of step KLs]), both by enumeration of all trajectories.

    All six orders form one group, so the baselines are constants of (trajectory set, time) and drop out.
    """
    policy, target = FreePolicy(3, 3, seed), SoftmaxConfidence(0.2)
    p = per_trajectory(chosen_log_prob(policy, toy.batch)).exp()
    kl = policy(toy.batch.observation).kl(target(toy.batch.observation))
    expected = -gradient((p * (toy.reward - beta * per_trajectory(kl))).sum(), policy)

    batch = on_policy(policy, toy.batch)
    batch = batch._replace(advantage=group_advantage(toy.reward, 6, False)[batch.trajectory])
    batch = batch._replace(advantage=regularised_advantage(batch, kl.detach(), beta, 6))
    losses = []
    for t in range(6):
        part = batch.rows((batch.trajectory == t).nonzero().squeeze(1))
        losses.append(upo_loss(policy, target, part, "step_kl", beta, clip=0.2)[0])
    estimate = gradient((p.detach() * torch.stack(losses)).sum(), policy)
    torch.testing.assert_close(estimate, expected, atol=2e-6, rtol=1e-4)
    assert expected.abs().max() > 1e-2

    naive = batch._replace(advantage=group_advantage(toy.reward, 6, False)[batch.trajectory])
    losses = [
        upo_loss(policy, target, naive.rows((naive.trajectory == t).nonzero().squeeze(1)), "step_kl", beta, 0.2)[0]
        for t in range(6)
    ]
    without = gradient((p.detach() * torch.stack(losses)).sum(), policy)
    assert torch.allclose(without, expected, atol=2e-6) == (beta == 0), "the correction is needed"


def test_regularised_advantage_by_hand() -> None:
    """Two trajectories of one group, of three and of two steps (KLs 1, 2, 4 and 8, 16)."""
    nothing = observation_of(torch.zeros(5, 1), torch.ones(5, 1, dtype=torch.bool), Denoised.of(torch.zeros(5, 1, 1)))
    shuffled = torch.tensor([3, 0, 4, 2, 1])  # the order of the steps in the batch does not matter
    batch = Batch(
        nothing,
        torch.zeros(5),
        torch.zeros(5),
        torch.tensor([0, 0, 0, 1, 1]),
        torch.tensor([0, 1, 2, 0, 1]),
        torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0]),
    )
    # Future KLs: (6, 4, 0) and (16, 0, 0); their means: 11, 2, 0.
    expected = torch.tensor([1 + 0.5, 1 - 0.2, 1.0, -1 - 0.5, -1 + 0.2])
    kl = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    torch.testing.assert_close(regularised_advantage(batch, kl, 0.1, 2), expected)
    mixed = Batch(nothing, *(part[shuffled] for part in batch[1:]))
    torch.testing.assert_close(regularised_advantage(mixed, kl[shuffled], 0.1, 2), expected[shuffled])


# ---------------------------------------------------------------------- the loss by hand
class Given(Policy):
    """An order with the given probabilities, one row per step of the batch (the logits can be differentiated)."""

    def __init__(self, probabilities: list[list[float]]) -> None:
        self.logits = torch.tensor(probabilities).log().requires_grad_()

    def __call__(self, observation: Observation) -> Categorical:
        return Categorical(self.logits)


OLD = [0.5, 0.5, 0.25]
ACTIONS = [0, 1, 2]
G = [[0.25, 0.5, 0.25], [0.1, 0.8, 0.1], [0.2, 0.3, 0.5]]


def tiny_batch(advantage: list[float]) -> Batch:
    """Trajectory 4 has steps 0 and 1, trajectory 7 has step 2."""
    observation = observation_of(
        torch.full((3, 3), 2), torch.ones(3, 3, dtype=torch.bool), Denoised.of(torch.full((3, 3, 2), 0.5).log())
    )
    return Batch(
        observation,
        one_of(ACTIONS, 3),
        torch.tensor(OLD).log(),
        torch.tensor([4, 4, 7]),
        torch.tensor([0, 1, 0]),
        torch.tensor(advantage),
    )


# The ratios of the actions are 0.5 / 0.5 = 1, 0.6 / 0.5 = 1.2 and 0.5 / 0.25 = 2.
NOW = [[0.5, 0.25, 0.25], [0.2, 0.6, 0.2], [0.25, 0.25, 0.5]]


@pytest.mark.parametrize(
    ("advantage", "clip", "over_steps", "loss", "clipped"),
    [
        # No clipping: -(1 * 1 + 1.2 * 1 + 2 * 3) / 2 trajectories; with means over steps -(2.2 / 2 + 6) / 2.
        ([1.0, 1.0, 3.0], 5.0, "sum", -4.1, 0.0),
        ([1.0, 1.0, 3.0], 5.0, "mean", -3.55, 0.0),
        # Clipped at 1.1 where the advantage is positive: -(1 + 1.1 + 1.1 * 3) / 2.
        ([1.0, 1.0, 3.0], 0.1, "sum", -2.7, 2 / 3),
        ([1.0, 1.0, 3.0], 0.1, "mean", -2.175, 2 / 3),
        # Where it is negative the worse, unclipped ratio counts: -(1 - 1.2 - 2 * 3) / 2.
        ([1.0, -1.0, -3.0], 0.1, "sum", 3.1, 2 / 3),
        ([1.0, -1.0, -3.0], 0.1, "mean", 3.05, 2 / 3),
    ],
)
def test_policy_loss_by_hand(advantage: list[float], clip: float, over_steps: str, loss: float, clipped: float) -> None:
    policy = Given(NOW)
    total, parts = upo_loss(policy, Forbidden(), tiny_batch(advantage), "none", NEVER, clip, over_steps)
    assert total.item() == pytest.approx(loss, rel=1e-6)
    assert parts["loss/policy"] == pytest.approx(loss, rel=1e-6)
    assert parts["ratio/clipped"] == pytest.approx(clipped, rel=1e-6)
    total.backward()
    slopes = policy.logits.grad
    assert policy.logits.grad.nonzero().tolist() == [
        [row, action]
        for row, action in enumerate(ACTIONS)
        if clip > 1 or row == 0 or advantage[row] < 0  # a clipped gain has no gradient
    ]
    assert slopes[0, 0].item() == pytest.approx(-0.5 * (0.5 if over_steps == "mean" else 1.0) * advantage[0])


def test_a_small_ratio_by_hand() -> None:
    """Ratio 0.5, clip 0.2: a positive advantage keeps 0.5 (and its gradient), a negative one is held at 0.8."""
    for advantage, loss in ((1.0, -0.5), (-1.0, 0.8)):
        batch = tiny_batch([advantage] * 3).rows(torch.tensor([2]))
        policy = Given([[0.5, 0.375, 0.125]])
        total, _ = upo_loss(policy, Forbidden(), batch, "none", NEVER, 0.2)
        total.backward()
        assert total.item() == pytest.approx(loss, rel=1e-6)
        assert bool(policy.logits.grad.any()) == (advantage > 0)


def step_kls() -> list[float]:
    return [sum(p * math.log(p / g) for p, g in zip(now, ref, strict=True)) for now, ref in zip(NOW, G, strict=True)]


def cross_entropies() -> list[float]:
    return [-sum(g * math.log(p) for p, g in zip(now, ref, strict=True)) for now, ref in zip(NOW, G, strict=True)]


@pytest.mark.parametrize(
    ("regulariser", "values"), [("step_kl", step_kls()), ("cross_entropy", cross_entropies())], ids=["kl", "ce"]
)
@pytest.mark.parametrize("over_steps", ["sum", "mean"])
def test_regularised_loss_by_hand(regulariser: str, values: list[float], over_steps: str) -> None:
    share = 0.5 if over_steps == "mean" else 1.0
    total, parts = upo_loss(Given(NOW), Fixed(G), tiny_batch([0.0] * 3), regulariser, 0.3, 0.2, over_steps)
    expected = 0.3 * (share * (values[0] + values[1]) + values[2]) / 2
    assert total.item() == pytest.approx(expected, rel=1e-6)
    assert parts[f"divergence/{regulariser}"] == pytest.approx(sum(values) / 3, rel=1e-6)
    assert parts["loss/policy"] == 0


@pytest.mark.parametrize("over_steps", ["sum", "mean"])
def test_trajectory_kl_loss_by_hand(over_steps: str) -> None:
    """The surrogate's weight is P / P_old = 1.2 for the first trajectory and 2 (its bound) for the second."""
    share = 0.5 if over_steps == "mean" else 1.0
    first, second = math.log(0.5 * 0.6), math.log(0.5)
    factors = [1.2 * (1 + first - math.log(0.25 * 0.8)), 2 * (1 + second - math.log(0.5))]
    policy = Given(NOW)
    total, _ = upo_loss(policy, Fixed(G), tiny_batch([0.0] * 3), "trajectory_kl", 0.3, 0.2, over_steps)
    assert total.item() == pytest.approx(0.3 * (share * factors[0] * first + factors[1] * second) / 2, rel=1e-6)
    total.backward()
    expected = torch.zeros(3, 3)
    expected[0, 0] = expected[1, 1] = 0.15 * share * factors[0]
    expected[2, 2] = 0.15 * factors[1]
    torch.testing.assert_close(policy.logits.grad, expected)


@pytest.mark.parametrize(("ratio", "weight"), [(0.01, 0.5), (0.7, 0.7), (1.5, 1.5), (40.0, 2.0)])
def test_the_surrogates_weight_is_clamped(ratio: float, weight: float) -> None:
    log_p = torch.tensor([-3.0, -1.0], requires_grad=True)
    old = log_p.detach() - math.log(ratio) / 2
    trajectory_kl_surrogate(log_p, old, torch.tensor([-2.0, -2.5]), torch.tensor([0, 0]), 1).sum().backward()
    assert log_p.grad.tolist() == pytest.approx([weight * (1 - 4 + 4.5)] * 2)


# ---------------------------------------------------------------------- advantages
def test_group_advantage_by_hand() -> None:
    reward = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.25, 0.75, 0.25, 0.75])
    plain = [0.75, -0.25, -0.25, -0.25, 0, 0, 0, 0, -0.25, 0.25, -0.25, 0.25]
    assert group_advantage(reward, 4, False).tolist() == plain
    # Standard deviations (n - 1): sqrt(0.75 / 3) = 0.5 and sqrt(0.25 / 3).
    over = [0.5] * 4 + [1.0] * 4 + [math.sqrt(0.25 / 3)] * 4
    expected = [a / (s + 1e-4) for a, s in zip(plain, over, strict=True)]
    assert group_advantage(reward, 4, True).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1 / 3])
def test_equal_returns_give_exactly_zero_gradient(normalise: bool, value: float) -> None:
    """Also where the mean of equal float32 numbers is not one of them."""
    task, denoiser = BestSequence(), TableDenoiser(BestSequence.joint_table)
    policy = small_policy(task, denoiser, belief_weight=1.0)
    behaviour = Tempered(policy, 1.0)
    instances = task.sample(2, torch.Generator().manual_seed(0)).repeat(7)
    played = rollout(task, denoiser, behaviour, instances, generator=torch.Generator().manual_seed(1), record=True)
    batch = flatten(played, group_advantage(torch.full((14,), value), 7, normalise))
    loss, _ = upo_loss(behaviour, Forbidden(), batch, "none", 1.0, 0.2)
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in policy.parameters())
    unequal = flatten(played, group_advantage(torch.arange(14.0), 7, normalise))
    upo_loss(behaviour, Forbidden(), unequal, "none", 1.0, 0.2)[0].backward()
    assert any(p.grad is not None and p.grad.any() for p in policy.parameters()), "unequal ones do not"


# ---------------------------------------------------------------------- sampling
def test_tempered_is_the_renormalised_power() -> None:
    policy = Given([[0.5, 0.25, 0.25, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]])
    is_open = torch.tensor([[True] * 4, [False] * 4, [False, False, True, False]])
    observation = observation_of(torch.zeros(3, 4), is_open, Denoised.of(torch.zeros(3, 4, 1)))
    cold, hot = (Tempered(policy, t)(observation).log_probs for t in (0.5, 2.0))
    torch.testing.assert_close(cold[0].exp(), torch.tensor([4 / 6, 1 / 6, 1 / 6, 0]))
    roots = torch.tensor([0.5**0.5, 0.5, 0.5, 0])
    torch.testing.assert_close(hot[0].exp(), roots / roots.sum())
    for tempered in (cold, hot):
        assert tempered[1].tolist() == [-INF] * 4, "a finished board stays without a choice"
        assert tempered[2].tolist() == [-INF, -INF, 0.0, -INF]
    assert torch.equal(Tempered(policy, 1.0)(observation).log_probs, policy.logits)


def test_tempered_gradients_are_finite() -> None:
    task, denoiser = BestSequence(), TableDenoiser(BestSequence.joint_table)
    policy = small_policy(task, denoiser, belief_weight=1.0)
    tokens = torch.tensor([[0, 0, 1], [0, 2, 1], [2, 2, 2]])
    observation = observation_of(tokens, tokens == 2, denoiser(tokens))
    log_prob = Tempered(policy, 0.7)(observation).log_probs
    log_prob[observation.fillable].square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in policy.parameters())
    assert policy.head.belief_weight.grad.any()


def test_boards_that_a_policy_does_not_read_are_played_as_the_deterministic_reference_says() -> None:
    """Where it reads, the policy is as it is; where it defers, it never draws another position."""
    task = tasks.get("sudoku6")
    process = Unmasking(task, load_denoiser("sudoku6-tiny", task))
    policy = setup(config(reference="margin", policy=PolicyConfig(defer_above=0.97)), process).policy
    played = process.rollout(Random(), task.heldout(6), torch.Generator().manual_seed(0), record=True)
    seen = flatten(played, torch.zeros(6)).observation
    behaviour, reads = Tempered(policy, 1.0, Margin()), policy.uncertain(seen)
    assert reads.any()
    assert (~reads).any()
    log_probs = behaviour(seen).log_probs
    assert torch.equal(log_probs[reads], policy(seen).log_probs[reads])
    assert torch.equal(log_probs[~reads], Margin()(seen).log_probs[~reads])
    assert not torch.equal(log_probs[~reads], policy(seen).log_probs[~reads])
    assert behaviour(seen).cross_entropy(Margin()(seen)).isfinite().all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_a_rollout_records_the_distribution_sampled_from(temperature: float) -> None:
    """What is recorded is the tempered log-probability, and the actions come from it."""
    task, denoiser = TableTask(JOINT), TableDenoiser(JOINT)
    policy = FreePolicy(3, 3, seed=2)
    behaviour = Tempered(policy, temperature)
    instances = Instances(torch.full((20_000, 3), 3), torch.zeros(20_000, 3, dtype=torch.long))
    played = rollout(task, denoiser, behaviour, instances, generator=torch.Generator().manual_seed(0), record=True)
    batch = flatten(played, torch.zeros(20_000))
    assert torch.equal(batch.old_log_prob, chosen_log_prob(behaviour, batch))
    first = played.steps[0]
    expected = (policy(first.observation).log_probs[0].exp() ** (1 / temperature)).detach()
    drawn = first.action.float().mean(0)
    torch.testing.assert_close(drawn, expected / expected.sum(), atol=0.012, rtol=0)


def test_flatten_keeps_the_live_steps() -> None:
    """Rows of 3, 1 and 2 holes."""
    task, denoiser = TableTask(JOINT), TableDenoiser(JOINT)
    tokens = torch.tensor([[3, 3, 3], [0, 3, 1], [3, 2, 3]])
    played = rollout(
        task,
        denoiser,
        FreePolicy(3, 3, seed=1),
        Instances(tokens, torch.zeros_like(tokens)),
        generator=torch.Generator().manual_seed(4),
        record=True,
    )
    batch = flatten(played, torch.tensor([0.5, -1.0, 2.0]))
    assert sorted(zip(batch.trajectory.tolist(), batch.time.tolist(), strict=True)) == [
        (0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1),
    ]  # fmt: skip
    assert batch.advantage.tolist() == [[0.5, -1.0, 2.0][t] for t in batch.trajectory]
    assert not (batch.action & ~batch.observation.fillable).any(), "every action was on a masked position"
    assert (batch.action.sum(1) == 1).all()
    assert batch.old_log_prob.isfinite().all()
    for t, n in ((0, 3), (1, 1), (2, 2)):
        rows = (batch.trajectory == t).nonzero().squeeze(1)
        assert sorted(batch.action[rows].int().argmax(1).tolist()) == tokens[t].eq(3).nonzero().flatten().tolist()
        first = rows[batch.time[rows] == 0]
        assert torch.equal(batch.observation.tokens[first[0]], tokens[t])
        assert batch.observation.fillable[rows].sum(1).tolist() == list(range(n, 0, -1))
    expected = denoiser(batch.observation.tokens).log_probs
    assert torch.equal(batch.observation.denoised.log_probs, expected)
    assert batch.observation.denoised.hidden is None


def test_flatten_keeps_hidden_states() -> None:
    task = tasks.get("sudoku6")
    denoiser = load_denoiser("sudoku6-tiny", task)
    instances = task.heldout(3)

    class Reading(Policy):
        reads_hidden = True

        def __call__(self, observation: Observation) -> Categorical:
            return Margin()(observation)

    assert rollout(task, denoiser, Margin(), instances, record=True).steps[0].observation.hidden is None
    played = rollout(task, denoiser, Reading(), instances, record=True)
    batch = flatten(played, torch.zeros(3))
    assert len(batch.action) == int((instances.tokens == task.mask_id).sum())
    last = batch.observation[-1:]
    torch.testing.assert_close(last.denoised.hidden, denoiser(last.tokens).hidden, atol=1e-4, rtol=1e-4)


def test_trajectories_of_different_lengths_by_hand() -> None:
    """Splitting a batch by trajectory and averaging gives the whole batch's loss, also for means over steps."""
    task, denoiser = TableTask(JOINT), TableDenoiser(JOINT)
    policy, now = FreePolicy(3, 3, seed=1), FreePolicy(3, 3, seed=2)
    tokens = torch.tensor([[3, 3, 3], [0, 3, 1], [3, 2, 3]])
    generator = torch.Generator().manual_seed(4)
    instances = Instances(tokens, torch.zeros_like(tokens))
    played = rollout(task, denoiser, policy, instances, generator=generator, record=True)
    batch = flatten(played, torch.tensor([0.5, -1.0, 2.0]))
    for over_steps, regulariser in itertools.product(("sum", "mean"), ("none", "step_kl", "trajectory_kl")):
        target = SoftmaxConfidence(0.5)
        whole, _ = upo_loss(now, target, batch, regulariser, 0.5, 0.2, over_steps)
        parts = []
        for t in range(3):
            part = batch.rows((batch.trajectory == t).nonzero().squeeze(1))
            parts.append(upo_loss(now, target, part, regulariser, 0.5, 0.2, over_steps)[0])
        torch.testing.assert_close(whole, torch.stack(parts).mean(), atol=1e-6, rtol=1e-5)


# ---------------------------------------------------------------------- regularisers and starts
def config(out: Path | str = "unused", **changes: object) -> UPOConfig:
    return UPOConfig(out=str(out), **changes)


def reference_of(settings: UPOConfig) -> Reference:
    return reference(settings.reference)


def test_auto_regulariser() -> None:
    for name in ("max_confidence", "margin", "entropy", "left_to_right"):
        chosen = config(reference=name)
        assert check_regulariser(chosen, reference_of(chosen)) == "cross_entropy"
    for name in ("random", "softmax_confidence", "softmax_margin", "top_k"):
        chosen = config(reference=name)
        assert check_regulariser(chosen, reference_of(chosen)) == "step_kl"
        explicit = replace(chosen, regulariser="trajectory_kl")
        assert check_regulariser(explicit, reference_of(explicit)) == "trajectory_kl"


@pytest.mark.parametrize("regulariser", ["trajectory_kl", "step_kl"])
def test_the_kl_to_a_deterministic_reference_is_refused(tmp_path: Path, regulariser: str) -> None:
    with pytest.raises(UnmaskError, match="KL to the deterministic reference margin is infinite") as error:
        upo.train(config(tmp_path / "run", denoiser="sudoku6-tiny", reference="margin", regulariser=regulariser))
    assert "\n" not in str(error.value)
    assert "cross_entropy" in str(error.value), "it says what to do"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("regulariser", ["auto", "none", "cross_entropy", "trajectory_kl", "step_kl"])
def test_beta_zero_asks_no_reference(regulariser: str) -> None:
    for name in ("margin", "softmax_confidence"):
        chosen = config(reference=name, beta=0.0, regulariser=regulariser)
        assert check_regulariser(chosen, reference_of(chosen)) == "none"
    loss, parts = upo_loss(Given(NOW), Forbidden(), tiny_batch([1.0] * 3), "none", 0.0, 0.2)
    assert loss.isfinite()
    assert set(parts) == {"loss/policy", "ratio/clipped"}


def test_settings_reach_the_reference() -> None:
    process = Unmasking(BestSequence(), TableDenoiser(BestSequence.joint_table))
    assert setup(config(reference="softmax_margin:tau=0.3"), process).reference == SoftmaxMargin(0.3)
    assert setup(config(reference="top_k:k=3"), process).reference == TopK(3)
    assert setup(config(reference="factor", rules=Rules("set")), process).reference == Factor()


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("random", Random()),
        ("softmax_confidence:tau=0.2", SoftmaxConfidence(0.2)),
        ("max_confidence", SoftmaxConfidence(0.05)),
        ("softmax_margin:tau=0.2", SoftmaxMargin(0.2)),
        ("margin", SoftmaxMargin(0.05)),
        ("top_k:k=3", TopK(3)),
    ],
)
def test_a_run_starts_at_its_reference(name: str, target: Reference) -> None:
    """On boards where the denoiser is confident and on boards where it is not."""
    task = tasks.get("sudoku6")
    denoiser = load_denoiser("sudoku6-tiny", task)
    policy = setup(config(reference=name), Unmasking(task, denoiser)).policy
    generator = torch.Generator().manual_seed(0)
    played = rollout(task, denoiser, Random(), task.heldout(6), generator=generator, record=True)
    observation = flatten(played, torch.zeros(6)).observation
    confident = observation.confidence.masked_fill(~observation.fillable, 0.0).max(1).values >= 0.97
    assert confident.any()
    assert (~confident).any()
    divergence = policy(observation).kl(target(observation))
    torch.testing.assert_close(divergence, torch.zeros(len(divergence)), atol=2e-6, rtol=0)


# ---------------------------------------------------------------------- replay
def test_replay_keeps_the_most_recent_failures() -> None:
    task = TableTask(JOINT)
    pool = Replay(task, fraction=0.5, capacity=3)
    for start_at in (0, 10):
        rows = torch.arange(start_at, start_at + 3).unsqueeze(1).expand(3, 3)
        pool.add(Instances(rows, rows + 100), torch.tensor([True, False, True]))
    assert pool.tokens[:, 0].tolist() == [2, 10, 12]
    assert pool.answers[:, 0].tolist() == [102, 110, 112]
    instances, fresh = pool.sample(8, torch.Generator().manual_seed(0))
    assert (len(instances), fresh) == (8, 5), "half of eight, were there four"
    assert sorted(instances.tokens[fresh:, 0].tolist()) == [2, 10, 12]
    assert (instances.tokens[:fresh] == task.mask_id).all()
    other = Replay(task, 0.5)
    other.load_state_dict(pool.state_dict())
    assert torch.equal(other.sample(8, torch.Generator().manual_seed(0))[0].tokens, instances.tokens)
    assert Replay(task, 0.0).sample(4, torch.Generator())[1] == 4


# ---------------------------------------------------------------------- training
class BestSequence(TableTask):
    """Two symbols, three positions; rewarded is the sequence 0 0 0, which greedy filling reaches only by beginning
    with position 1: p(x0 = 1) = 0.6 and p(x2 = 1) = 0.6 mislead."""

    joint_table = torch.zeros(2, 2, 2, dtype=torch.float64)
    joint_table[0, 0, 0] = 0.4
    joint_table[1, 0, 1] = joint_table[1, 1, 1] = 0.3

    def __init__(self) -> None:
        super().__init__(self.joint_table)

    def reward(self, tokens: Tensor, instances: Instances) -> Tensor:
        return (tokens == 0).all(1).float()


SHAPE = PolicyConfig(copy=False, layers=1, dim=8, heads=2)


def small_policy(task: tasks.Task, denoiser: TableDenoiser, belief_weight: float = 0.0) -> OrderPolicy:
    return new_policy(SHAPE, task, denoiser, seed=0, belief_weight=belief_weight)


def small(out: Path, **changes: object) -> UPOConfig:
    settings: dict[str, object] = {
        "reference": "random", "beta": 1e-3, "iterations": 15, "puzzles": 8, "group": 4, "lr": 2e-2, "threads": 1,
        "minibatches": 2, "policy": SHAPE, "imitation": 0,
    }  # fmt: skip
    return UPOConfig(out=str(out), **settings | changes)


@torch.no_grad()
def expected_reward(policy: OrderPolicy) -> float:
    """Exact: the probability of choosing position 1 first (then nothing can go wrong)."""
    tokens = torch.full((1, 3), 2)
    denoised = TableDenoiser(BestSequence.joint_table)(tokens)
    return float(policy(observation_of(tokens, tokens == 2, denoised)).log_probs[0, 1].exp())


@pytest.mark.trains
@pytest.mark.parametrize(
    ("changes", "least"),
    [
        ({}, 0.9),
        ({"regulariser": "trajectory_kl"}, 0.9),
        ({"beta": 0.0, "normalise": True, "over_steps": "mean", "replay_fraction": 0.0}, 0.9),
        ({"temperature": 2.0}, 0.9),
    ],
    ids=["step_kl", "trajectory_kl", "none", "hot"],
)
def test_training_finds_the_better_order(tmp_path: Path, changes: dict, least: float) -> None:
    task, denoiser = BestSequence(), TableDenoiser(BestSequence.joint_table)
    assert expected_reward(setup(small(tmp_path, **changes), Unmasking(task, denoiser)).policy) == pytest.approx(1 / 3)
    trained = upo.train(small(tmp_path / "run", **changes), Unmasking(task, denoiser))
    assert expected_reward(trained) > least
    saved = load_policy(tmp_path / "run", task)
    assert expected_reward(saved) == expected_reward(trained)


@pytest.mark.trains
def test_a_strong_regulariser_holds_the_policy_at_the_reference(tmp_path: Path) -> None:
    """The soft optimum has pi(1) = e^(1/beta) / (e^(1/beta) + 2): at beta = 1 that is 0.576, at beta = 10 0.356."""
    task, denoiser = BestSequence(), TableDenoiser(BestSequence.joint_table)
    for beta in (1.0, 10.0):
        settings = small(tmp_path / f"{beta}", beta=beta, iterations=40, group=16, lr=1e-2)
        trained = upo.train(settings, Unmasking(task, denoiser))
        assert expected_reward(trained) == pytest.approx(math.exp(1 / beta) / (math.exp(1 / beta) + 2), abs=0.08)


@pytest.mark.trains
def test_cross_entropy_pulls_to_a_deterministic_reference(tmp_path: Path) -> None:
    task, denoiser = BestSequence(), TableDenoiser(BestSequence.joint_table)
    settings = small(tmp_path, reference="left_to_right", beta=5.0)
    assert expected_reward(upo.train(settings, Unmasking(task, denoiser))) < 0.1


def weights(policy: OrderPolicy) -> Tensor:
    return torch.cat([p.detach().flatten() for p in policy.parameters()])


@pytest.mark.trains
def test_the_same_seed_gives_the_same_run(tmp_path: Path) -> None:
    task, denoiser = BestSequence(), TableDenoiser(BestSequence.joint_table)
    torch.manual_seed(0)
    one = upo.train(small(tmp_path / "a", iterations=4), Unmasking(task, denoiser))
    torch.manual_seed(1)
    same = upo.train(small(tmp_path / "b", iterations=4), Unmasking(task, denoiser))
    other = upo.train(small(tmp_path / "c", iterations=4, seed=1), Unmasking(task, denoiser))
    assert torch.equal(weights(one), weights(same))
    assert not torch.equal(weights(one), weights(other))
    saved = [(tmp_path / run / "model.safetensors").read_bytes() for run in "ab"]
    assert saved[0] == saved[1]


@pytest.mark.trains
def test_a_short_run_on_sudoku(tmp_path: Path) -> None:
    """Real puzzles with different numbers of blanks, the packaged denoiser, each kind of reference."""
    for name in ("softmax_confidence", "margin", "top_k"):
        settings = UPOConfig(
            out=str(tmp_path / name),
            denoiser="sudoku6-tiny",
            reference=name,
            iterations=1,
            puzzles=3,
            group=2,
            minibatches=2,
            imitation=1,
            validation_puzzles=3,
            threads=1,
        )
        policy = upo.train(settings)
        assert weights(policy).isfinite().all()
        init = replace(settings, imitation=None, out=str(tmp_path / f"{name}-more"), init=str(tmp_path / name), seed=1)
        more = upo.train(init)
        assert not torch.equal(weights(policy), weights(more))


def test_a_kl_to_top_k_from_a_policy_with_other_candidates_is_refused(tmp_path: Path) -> None:
    """Such a policy may choose what the reference never does: the KL would be infinite."""
    task, denoiser = BestSequence(), TableDenoiser(BestSequence.joint_table)
    save_model(small_policy(task, denoiser), tmp_path / "everywhere")
    settings = small(tmp_path / "run", reference="top_k:k=1", init=str(tmp_path / "everywhere"))
    with pytest.raises(UnmaskError) as error:
        upo.train(settings, Unmasking(task, denoiser))
    assert "\n" not in str(error.value)


def test_a_run_where_nothing_is_left_to_decide(tmp_path: Path) -> None:
    """The denoiser is confident on every board, so no loss has a gradient: the policy stays as it was."""
    joint = torch.full((2, 2, 2), 1e-9)
    joint[0, 0, 0] = 1
    task, denoiser = TableTask(joint), TableDenoiser(joint)
    settings = small(tmp_path / "run", reference="softmax_confidence", iterations=2)
    trained = upo.train(settings, Unmasking(task, denoiser))
    assert torch.equal(weights(trained), weights(setup(settings, Unmasking(task, denoiser)).policy))


def test_instances_without_holes_among_the_others(tmp_path: Path) -> None:
    class SometimesFull(BestSequence):
        def sample(self, n: int, generator: torch.Generator) -> Instances:
            drawn = super().sample(n, generator)
            tokens = drawn.tokens.clone()
            tokens[-1] = drawn.answers[-1]
            return Instances(tokens, drawn.answers)

    settings = small(tmp_path, iterations=2, minibatches=1)
    trained = upo.train(settings, Unmasking(SometimesFull(), TableDenoiser(BestSequence.joint_table)))
    assert weights(trained).isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "softmax_margin:tau=0"}, "tau must be a number above 0"),
        ({"reference": "top_k:k=0"}, "k must be a whole number of at least 1, not 0"),
        ({"reference": "oracle"}, "oracle is no reference for actions 'single'"),
        ({"reference": "threshold"}, "threshold is no reference for actions 'single'"),
        ({"rules": Rules("set"), "temperature": 2.0}, "policies over sets are sampled at temperature 1, not 2.0"),
        ({"env": "Unmask/Sudoku5x5-v0"}, "unknown environment 'Unmask/Sudoku5x5-v0'"),
        ({"denoiser": "sudoku7"}, "unknown denoiser 'sudoku7'"),
        ({"init": "sudoku7-upo"}, "unknown order policy 'sudoku7-upo'"),
        ({"device": "gpu"}, "unknown device 'gpu'"),
        ({"policy": PolicyConfig(layers=9)}, "has 3 blocks to copy, not 9"),
        ({"resume": "must"}, "nothing to resume"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_do_not_fit(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(UnmaskError) as error:
        upo.train(UPOConfig(out=str(tmp_path / "run"), **{"denoiser": "sudoku6-tiny"} | changes))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists(), "nothing was written"


@pytest.mark.parametrize(
    "changes",
    [{"puzzles": 0}, {"policy": PolicyConfig(layers=0)}, {"policy": PolicyConfig(copy=False, dim=10, heads=4)}],
    ids=["puzzles", "layers", "heads"],
)
def test_more_settings_that_do_not_fit(tmp_path: Path, changes: dict) -> None:
    few = {"denoiser": "sudoku6-tiny", "iterations": 1, "puzzles": 1, "group": 2}
    with pytest.raises(UnmaskError) as error:
        upo.train(UPOConfig(out=str(tmp_path / "run"), **few | changes))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists(), "nothing was written"


# ---------------------------------------------------------------------- where a run begins
def imitating(out: Path, **changes: object) -> UPOConfig:
    return small(out, reference="left_to_right", **{"imitation": 6, "iterations": 4, "puzzles": 4} | changes)


@pytest.mark.trains
def test_a_new_policy_imitates_a_deterministic_reference_first(tmp_path: Path) -> None:
    """Left to right never begins with position 1; a new policy does in one of three. With a learning rate of 0 in what
    follows, it is the imitation that does it."""
    process = Unmasking(BestSequence(), TableDenoiser(BestSequence.joint_table))
    assert expected_reward(setup(imitating(tmp_path), process).policy) == pytest.approx(1 / 3)
    trained = upo.train(imitating(tmp_path / "run", imitation=12, iterations=1, beta=0.0), process)
    assert expected_reward(trained) < 0.1
    logged = scalars(tmp_path / "run")
    assert logged["imitation/cross_entropy"][0] > 0.4
    assert logged["imitation/cross_entropy"][-1] < 0.3
    assert len(logged["imitation/cross_entropy"]) == 12
    assert len(logged["reward/fresh"]) == 1


@pytest.mark.trains
def test_policies_over_sets_imitate_a_deterministic_rule(tmp_path: Path) -> None:
    """Entries of p >= 0.55 are filled, the soft threshold of 0.9 would fill none of them at once."""
    process = Unmasking(BestSequence(), TableDenoiser(BestSequence.joint_table))
    rule = {"reference": "threshold:theta=0.55", "rules": Rules("set"), "imitation": 15, "iterations": 1}
    upo.train(small(tmp_path / "run", beta=1.0, **rule), process)
    values = scalars(tmp_path / "run")["imitation/cross_entropy"]
    assert len(values) == 15
    assert values[-1] < 0.3 * values[0]


@pytest.mark.parametrize(
    ("changes", "rounds"),
    [
        ({"reference": "left_to_right"}, upo.IMITATION),
        ({"reference": "entropy"}, upo.IMITATION),
        ({"reference": "softmax_margin:tau=0.2"}, upo.IMITATION),
        ({"reference": None}, upo.IMITATION),
        ({"reference": "random", "imitation": 3}, 3),
        ({"reference": "left_to_right", "imitation": 0}, 0),
        ({"reference": "left_to_right", "init": "given"}, 0),
        ({"reference": "factor", "rules": Rules("set")}, upo.IMITATION),
        ({"reference": "soft_threshold", "rules": Rules("set")}, 0),
    ],
)
def test_how_long_a_run_imitates(tmp_path: Path, changes: dict, rounds: int) -> None:
    process = Unmasking(BestSequence(), TableDenoiser(BestSequence.joint_table))
    if "init" in changes:
        save_model(small_policy(process.task, process.denoiser), tmp_path / "given")
        changes = changes | {"init": str(tmp_path / "given")}
    assert upo.with_imitation(small(tmp_path, **{"imitation": None} | changes)).imitation == rounds


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": "given", "imitation": 2}, "imitation of the reference would undo what init has learned"),
        ({"rules": Rules("set"), "imitation": 2, "reference": None}, "only deterministic references are imitated"),
    ],
)
def test_imitation_that_does_not_fit(tmp_path: Path, changes: dict, message: str) -> None:
    process = Unmasking(BestSequence(), TableDenoiser(BestSequence.joint_table))
    if "init" in changes:
        save_model(small_policy(process.task, process.denoiser), tmp_path / "given")
        changes = changes | {"init": str(tmp_path / "given")}
    with pytest.raises(UnmaskError, match=message) as error:
        upo.train(small(tmp_path / "run", **changes), process)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


class Stopping(BestSequence):
    """Presses Ctrl-C in the given draw of training instances."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def heldout(self, n: int | None = None, split: str = "test") -> Instances:
        return super().sample(n, self.split_generator(split))

    def sample(self, n: int, generator: torch.Generator) -> Instances:
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)
        return super().sample(n, generator)


@pytest.mark.trains
@pytest.mark.parametrize("branch", [False, True])
def test_a_run_cut_off_in_its_imitation_and_after_it_ends_with_the_same_weights(tmp_path: Path, branch: bool) -> None:
    denoiser = TableDenoiser(BestSequence.joint_table)
    changes = {"branch": branch, "replay_fraction": 0.5, "lr": 4e-3}
    whole = upo.train(imitating(tmp_path / "whole", **changes), Unmasking(BestSequence(), denoiser))
    for at, stopped in ((2, 2), (6, 8)):  # in the imitation of 6, and after it
        with pytest.raises(Interrupted, match=f"stopped at step {stopped} of 10"):
            upo.train(imitating(tmp_path / "run", resume="auto", **changes), Unmasking(Stopping(at), denoiser))
    again = upo.train(imitating(tmp_path / "run", resume="must", **changes), Unmasking(BestSequence(), denoiser))
    assert torch.equal(weights(again), weights(whole))
    assert scalars(tmp_path / "run")["reward/fresh"] == scalars(tmp_path / "whole")["reward/fresh"]
    bare = upo.train(imitating(tmp_path / "bare", imitation=0, **changes), Unmasking(BestSequence(), denoiser))
    assert not torch.equal(weights(bare), weights(whole))


# ---------------------------------------------------------------------- UPO's three realisations
@pytest.mark.trains
@pytest.mark.parametrize(
    ("reference", "regulariser"),
    [("softmax_confidence:tau=0.3", "step_kl"), ("max_confidence", "cross_entropy"), ("top_k:k=2", "step_kl")],
    ids=["softmax", "deterministic", "top_k"],
)
def test_each_realisation_of_the_paper_trains(tmp_path: Path, reference: str, regulariser: str) -> None:
    """The first two learn to begin with the position that is rewarded; top-k stays among its k."""
    process = Unmasking(Misled(), TableDenoiser(Misled().joint))
    shape = replace(SHAPE, defer_above=2.0)
    changes = {"reference": reference, "policy": shape, "iterations": 25}
    settings = small(tmp_path / "run", **changes)
    ready = setup(settings, process)
    assert check_regulariser(ready.config, ready.reference) == regulariser
    trained = upo.train(settings, process)
    tokens = torch.full((1, 3), 2)
    log_probs = trained(observation_of(tokens, tokens == 2, process.denoiser(tokens))).log_probs[0]
    if reference.startswith("top_k"):
        allowed = TopK(2)(observation_of(tokens, tokens == 2, process.denoiser(tokens))).log_probs[0] > -INF
        assert torch.equal(log_probs > -INF, allowed), "position 0 is not among the two most confident"
        assert log_probs[0] == -INF
        assert trained.head.candidates == 2
    else:
        assert log_probs[0].exp() > 0.9, "it learned to begin with the position that is rewarded"


# ---------------------------------------------------------------------- branching
class Level(TableTask):
    """Three positions of which the denoiser is as unsure as of any other, whatever is filled."""

    def __init__(self) -> None:
        super().__init__(torch.full((2, 2, 2), 1 / 8))


def test_a_fork_takes_each_uncertain_state_of_greedy_play_as_often() -> None:
    """Of 3, 2 and 1 holes; the last leaves nothing to decide."""
    process = Unmasking(Level(), TableDenoiser(Level().joint))
    instances = process.task.heldout(3000)
    states, found = uncertain_states(process, Margin(), instances, 0.9, torch.Generator().manual_seed(0))
    assert found.all()
    left = states.masked.sum(1)
    assert left.bincount(minlength=4).tolist()[:2] == [0, 0]
    assert float((left == 3).float().mean()) == pytest.approx(0.5, abs=0.03)
    assert torch.equal(states.steps, 3 - left), "what is remembered is that of the state"
    assert torch.equal(states.instances.tokens, instances.tokens)
    assert not uncertain_states(process, Margin(), instances, 0.4, torch.Generator().manual_seed(0))[1].any()


def test_the_trajectories_of_a_fork_share_their_prefix(tmp_path: Path) -> None:
    """They begin in the same state, of which no position is confident and which greedy play comes to; and they end,
    rewarded, with as many forwards as from the beginning."""
    task = tasks.get("sudoku6")
    process = Unmasking(task, load_denoiser("sudoku6-tiny", task))
    settings = config(branch=True, puzzles=4, group=3, policy=PolicyConfig(defer_above=0.97))
    ready = setup(settings, process)
    behaviour = Tempered(ready.policy, 1.0)
    played, instances, fresh = upo.play_groups(ready, behaviour, Replay(task, 0.0), torch.Generator().manual_seed(0))
    assert fresh.all()
    first = played.steps[0].observation
    assert torch.equal(first.tokens, first.tokens[::3].repeat_interleave(3, 0))
    assert torch.equal(played.state.instances.tokens, instances.tokens.repeat_interleave(3, 0))
    assert (first.tokens != played.state.instances.tokens).any(1).any(), "play was under way"
    most = first.confidence.masked_fill(~first.fillable, 0.0).max(1).values
    assert (most < 0.97).all()
    holes = (played.state.instances.tokens == task.mask_id).sum(1)
    assert torch.equal(played.nfe, holes)
    for row in range(0, 12, 3):
        greedy = process.rollout(ready.policy, instances[row // 3 : row // 3 + 1], record=True)
        assert any(torch.equal(step.observation.tokens[0], first.tokens[row]) for step in greedy.steps)


@pytest.mark.trains
@pytest.mark.parametrize("rules", [Rules(), Rules("set", nfe_budget=8), Rules("set+remask", remask_budget=2)])
@pytest.mark.parametrize("reference", [None, "kl_stability:theta=0.6,epsilon=10.0"])
def test_branching_goes_with_every_kind_of_action(tmp_path: Path, rules: Rules, reference: str | None) -> None:
    if rules.actions == "single" and reference:
        pytest.skip("a rule of sets")
    process = Unmasking(BestSequence(), TableDenoiser(BestSequence.joint_table), rules)
    changes = {"rules": rules, "reference": reference, "branch": True, "iterations": 2, "replay_fraction": 0.5}
    trained = upo.train(small(tmp_path / "run", **changes, fill_temperature=1.0), process)
    assert weights(trained).isfinite().all()


# ---------------------------------------------------------------------- the exact terminal divergence
class Neighbours:
    """A denoiser of a joint that looks at the two neighbours of a position only, so it is not exact."""

    hidden_dim, device = None, torch.device("cpu")

    def __init__(self, joint: Tensor) -> None:
        self.inner, self.mask_id, self.length = TableDenoiser(joint), joint.shape[0], joint.ndim

    def __call__(self, tokens: Tensor) -> Denoised:
        log_probs = []
        for position in range(self.length):
            near = (torch.arange(self.length) - position).abs() <= 1
            log_probs.append(self.inner(torch.where(near, tokens, self.mask_id)).log_probs[:, position])
        return Denoised.of(torch.stack(log_probs, 1))


class Likely(TableTask):
    """Rewarded are the four most likely sequences; p_data is the joint on them, and every instance is empty."""

    def __init__(self, seed: int) -> None:
        super().__init__(random_joint(2, 4, seed))
        self.rewarded = self.joint >= self.joint.flatten().sort(descending=True).values[3]
        data = self.joint * self.rewarded
        self.data = data / data.sum()

    def reward(self, tokens: Tensor, instances: Instances) -> Tensor:
        return self.rewarded[tuple(tokens.T)].float()

    def graph(self, temperature: float) -> exact.Graph:
        start_board = self.sample(1, torch.Generator())
        return exact.enumerate_boards(Unmasking(self, Neighbours(self.joint), temperature=temperature), start_board)

    @torch.no_grad()
    def kl(self, order: Policy | exact.Table) -> float:
        """KL(p_data || p_order), with sampled filling."""
        tokens, _, probability = exact.finished(self.graph(1.0), order)
        finished = torch.zeros_like(self.data)
        finished[tuple(tokens.T)] = probability
        return float(torch.where(self.rewarded, self.data * (self.data / finished).log(), 0.0).sum())


TAU, BETA = 0.2, 0.02


def train_likely(out: Path, task: Likely, fill_temperature: float = 1.0) -> OrderPolicy:
    settings = UPOConfig(
        out=str(out), reference=f"softmax_confidence:tau={TAU}", beta=BETA, fill_temperature=fill_temperature,
        lr=1e-2, anneal=True, iterations=25, epochs=3, minibatches=2, puzzles=16, group=16, imitation=0,
        threads=1, policy=PolicyConfig(copy=False, dim=16, layers=1, defer_above=2.0, num_passes=1),
    )  # fmt: skip
    return upo.train(settings, Unmasking(task, Neighbours(task.joint)))


@pytest.mark.trains
def test_training_brings_the_sequences_nearer_to_the_data(tmp_path: Path) -> None:
    """UPO's theorem: KL(p_data || p_pi) < KL(p_data || p_g), exactly; and what sequence_log_prob says is the same."""
    gains = []
    for seed in range(2, 6):
        task, target = Likely(seed), SoftmaxConfidence(TAU)
        trained = train_likely(tmp_path / f"run-{seed}", task)
        gains.append(task.kl(target) - task.kl(trained))
    assert min(gains) > 0
    assert sum(gains) / len(gains) > 0.02
    likely = task.data.nonzero()
    instances = Instances(torch.full_like(likely, task.mask_id), likely)
    log_p = sequence_log_prob(Unmasking(task, Neighbours(task.joint), temperature=1.0), trained, instances)
    data = task.data[tuple(likely.T)]
    assert float((data * (data.log() - log_p)).sum()) == pytest.approx(task.kl(trained), abs=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_the_soft_optimum_brings_them_nearer_still(seed: int) -> None:
    task, target = Likely(seed), SoftmaxConfidence(TAU)
    optimum = exact.soft_optimal(task.graph(1.0), target, BETA)
    assert task.kl(optimum.policy) < task.kl(target)


@pytest.mark.trains
@pytest.mark.parametrize("fill_temperature", [0.0, 1.0])
def test_the_terminal_kl_of_a_trained_policy_is_below_its_trajectory_kl(
    tmp_path: Path, fill_temperature: float
) -> None:
    task = Likely(6)
    trained = train_likely(tmp_path / "run", task, fill_temperature)
    with torch.no_grad():
        values = exact.evaluate(task.graph(fill_temperature), trained, SoftmaxConfidence(TAU))
    assert 1e-4 < float(values.terminal_kl) < float(values.trajectory_kl)


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), fill_temperature=st.sampled_from([0.0, 0.7, 1.0]), num_passes=st.integers(1, 2))
def test_the_terminal_kl_of_a_random_policy_is_below_its_trajectory_kl(
    seed: int, fill_temperature: float, num_passes: int
) -> None:
    task, target = Likely(2), SoftmaxConfidence(0.2)
    shape = PolicyConfig(copy=False, dim=8, layers=1, heads=2, defer_above=2.0, num_passes=num_passes)
    policy = new_policy(shape, task, Neighbours(task.joint), seed, "softmax_confidence", 0.2, belief_weight=1.0)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        for parameter in policy.parameters():
            parameter.normal_(std=0.7)
        values = exact.evaluate(task.graph(fill_temperature), policy, target)
    assert -1e-9 <= float(values.terminal_kl) <= float(values.trajectory_kl) + 1e-9
    assert float(values.trajectory_kl) > 1e-3


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("fill_temperature", [0.0, 1.0])
def test_the_terminal_divergence_is_exact_and_a_step_lowers_it(temperature: float, fill_temperature: float) -> None:
    """Of the distribution sampled from; averaged over instances, of which two share a board."""
    task = Likely(4)
    denoiser, target = Neighbours(task.joint), SoftmaxConfidence(0.2)
    tokens = torch.tensor([[2, 2, 2, 2], [2, 2, 2, 2], [0, 2, 2, 2], [2, 2, 1, 2]])
    instances = Instances(tokens, torch.zeros_like(tokens))
    process = Unmasking(task, denoiser, temperature=fill_temperature)
    graph = exact.enumerate_boards(process, instances)
    policy = FreePolicy(2, 4, seed=3)
    behaviour = Tempered(policy, temperature)
    divergence = upo.terminal_divergence(graph, behaviour, target)
    first = divergence()
    singly = [
        exact.evaluate(exact.enumerate_boards(process, instances[i : i + 1]), behaviour, target).terminal_kl
        for i in range(4)
    ]
    assert float(first.detach()) == pytest.approx(float(torch.cat(singly).mean().detach()), rel=1e-6)
    assert first.ndim == 0
    optimizer = torch.optim.SGD(policy.parameters(), lr=2.0)
    for _ in range(2):
        value = divergence()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        assert float(divergence().detach()) < float(value.detach()) - 1e-6, "it is that of the policy as it is"


def test_the_terminal_kl_to_a_deterministic_reference_is_refused(tmp_path: Path) -> None:
    task, denoiser = BestSequence(), TableDenoiser(BestSequence.joint_table)
    with pytest.raises(UnmaskError, match="KL to the deterministic reference margin is infinite") as error:
        upo.train(small(tmp_path / "run", reference="margin", regulariser="terminal_kl"), Unmasking(task, denoiser))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def large_board(out: Path) -> UPOConfig:
    """6x6 puzzles have up to 28 holes."""
    return UPOConfig(
        out=str(out), denoiser="sudoku6-tiny", regulariser="terminal_kl", iterations=1, puzzles=2, group=2, threads=1
    )


def test_the_terminal_kl_on_large_boards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(exact.TooLargeError, match="holes, and 16 are allowed") as error:
        upo.train(large_board(tmp_path / "run"))
    assert "\n" not in str(error.value)


def test_the_terminal_kl_on_large_boards_is_refused_before_anything_is_played(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    played = []
    original = Unmasking.rollout
    monkeypatch.setattr(Unmasking, "rollout", lambda *given, **named: played.append(1) or original(*given, **named))
    with pytest.raises(exact.TooLargeError):
        upo.train(large_board(tmp_path / "run"))
    assert not played


def test_replay_holds_the_puzzles_that_failed_and_no_others(tmp_path: Path) -> None:
    """A task of two kinds of instances: the ones that no order fails and the ones that every order does."""

    class HalfHopeless(BestSequence):
        def reward(self, tokens: Tensor, instances: Instances) -> Tensor:
            return instances.answers[:, 0].float()  # the answer's first symbol decides

    task = HalfHopeless()
    process = Unmasking(task, TableDenoiser(BestSequence.joint_table))
    ready = setup(small(tmp_path / "run", puzzles=40), process)
    replay = Replay(task, 0.5)
    upo.collect(ready, Tempered(ready.policy, 1.0), replay, "none", torch.Generator().manual_seed(0))
    assert 0 < len(replay) < 40
    assert (replay.answers[:, 0] == 0).all()


def test_references_that_look_back_regularise_sets(tmp_path: Path) -> None:
    """KLASS as the reference: the batch keeps the forward before each step, so the loss asks it what play asked."""
    settings = small(
        tmp_path / "run", reference="kl_stability:theta=0.6,epsilon=10.0", beta=0.1, iterations=1, rules=Rules("set")
    )
    process = Unmasking(BestSequence(), TableDenoiser(BestSequence.joint_table), Rules("set"))
    ready = setup(settings, process)
    generator = torch.Generator().manual_seed(0)
    instances = process.task.sample(6, generator)
    played = process.rollout(ready.policy, instances, generator, record=True)
    batch = flatten(played, torch.zeros(6), looks_back=True)
    for step in played.steps:
        asked = ready.reference(step.observation).mode()[step.alive]
        rows = batch.observation[(batch.observation.history.steps == step.observation.history.steps[step.alive][0])]
        assert torch.equal(ready.reference(rows).mode(), asked)
    assert weights(upo.train(settings, process)).isfinite().all()


def test_what_took_long_to_solve_is_not_replayed() -> None:
    """The price of forwards is no failure."""

    class Easy(BestSequence):
        def reward(self, tokens: Tensor, instances: Instances) -> Tensor:
            return torch.ones(len(tokens))

    task = Easy()
    rules = Rules("set", nfe_budget=8, speed=1.0)
    ready = setup(config(policy=SHAPE, rules=rules), Unmasking(task, TableDenoiser(BestSequence.joint_table)))
    replay = Replay(task, 0.5)
    behaviour = Tempered(ready.policy, 1.0)
    _, _, logged = upo.collect(ready, behaviour, replay, "none", torch.Generator().manual_seed(0))
    assert logged["reward/fresh"] < 1
    assert logged["solved/fresh"] == 1
    assert not len(replay)


def test_a_batch_keeps_the_forward_before_each_step_for_references_that_look_back() -> None:
    process = Unmasking(TableTask(JOINT), TableDenoiser(JOINT), Rules("set"))
    policy = new_policy(SHAPE, process.task, process.denoiser, seed=0, sets=True)
    generator = torch.Generator().manual_seed(0)
    instances = Instances(torch.full((40, 3), 3), torch.zeros(40, 3, dtype=torch.long))
    played = process.rollout(policy, instances, generator, record=True)
    batch = flatten(played, torch.zeros(40), looks_back=True)
    at = {(t, n): row for row, (t, n) in enumerate(zip(batch.trajectory.tolist(), batch.time.tolist(), strict=True))}
    seen, later = batch.observation, [(t, n) for t, n in at if n > 0]
    assert len(later) > 10
    now = [at[step] for step in later]
    before = [at[t, n - 1] for t, n in later]
    assert torch.equal(seen.history.previous.log_probs[now], seen.denoised.log_probs[before])
    assert not torch.equal(seen.denoised.log_probs[now], seen.denoised.log_probs[before])
    assert flatten(played, torch.zeros(40)).observation.history.previous is None
