"""Exact solutions against brute force over every path, identities that hold exactly, and the real 4x4 denoiser."""

import itertools
import math
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tasks
from tasks import Instances, UnmaskError
from tests.oracles.enumeration import TableTask, random_joint, sequences, terminal_distribution
from tests.oracles.tables import TablePolicy, sequence_log_prob
from tests.toys import RewardTask, WrongDenoiser, codes, rollout
from tests.toys import observation as observation_of
from unmask_env import exact
from unmask_env.denoiser import TableDenoiser, load_denoiser
from unmask_env.distributions import Categorical, masked_log_softmax
from unmask_env.exact import TooLargeError
from unmask_env.process import Unmasking
from unmask_env.reference import REFERENCES, LeftToRight, MaxConfidence, Policy, Random, reference
from unmask_env.state import Denoised, Observation

INF = math.inf
TEMPERATURES = (0.0, 1.0, 0.6)


SINGLE_NAMES = [
    name
    for name, rule in REFERENCES.items()
    if rule.actions == "single" and name not in ("oracle", "learned", "learned_greedy")
]


class FreePolicy(nn.Module, Policy):
    """One free logit per (board, position); with ``holes`` about a third of the positions are never chosen."""

    def __init__(self, vocab_size: int, length: int, seed: int, holes: bool = False) -> None:
        super().__init__()
        self.base, generator = vocab_size + 1, torch.Generator().manual_seed(seed)
        shape = (self.base**length, length)
        logits = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
        self.logits = nn.Parameter(logits, requires_grad=False)
        self.kept = (torch.rand(shape, generator=generator) > 0.35) | (not holes)

    def forward(self, observation: Observation) -> Categorical:
        code = codes(observation.tokens, self.base)
        kept = observation.fillable & self.kept[code]
        allowed = torch.where(kept.any(1, keepdim=True), kept, observation.fillable)
        return Categorical.of(self.logits[code], allowed)


class Toy:
    """An empty board of a random problem, and all that can become of it."""

    def __init__(self, vocab_size: int, length: int, seed: int, temperature: float) -> None:
        self.size, self.temperature = (vocab_size, length), temperature
        self.task = RewardTask(vocab_size, length, seed)
        self.denoiser = WrongDenoiser(vocab_size, length, seed)
        self.start = self.task.sample(1, torch.Generator().manual_seed(seed))
        self.process = Unmasking(self.task, self.denoiser, temperature=temperature)
        self.graph = exact.enumerate_boards(self.process, self.start)

    def order(self, seed: int, holes: bool = False) -> FreePolicy:
        return FreePolicy(*self.size, seed, holes)

    def fills(self, board: tuple[int, ...], position: int) -> list[tuple[tuple[int, ...], float]]:
        """The boards after filling ``position``, with their probabilities, computed apart from the code under test."""
        p = self.denoiser.table[codes(torch.tensor([board]), self.denoiser.base)][0, position].double().exp()
        p = (p == p.max()).double() if self.temperature == 0 else p ** (1 / self.temperature)
        p = p / p.sum()
        return [((*board[:position], v, *board[position + 1 :]), float(q)) for v, q in enumerate(p) if q > 0]

    def distribution(self, order: FreePolicy) -> dict[tuple[int, ...], float]:
        """Of the complete sequence, as a sum over every permutation and every filling."""
        out: dict[tuple[int, ...], float] = {}

        def walk(board: tuple[int, ...], mass: float) -> None:
            tokens = torch.tensor([board])
            masked = tokens == self.task.mask_id
            if not masked.any():
                out[board] = out.get(board, 0.0) + mass
                return
            where = order(observation_of(tokens, masked, self.denoiser(tokens))).log_probs[0].exp()
            for position in masked[0].nonzero().flatten().tolist():
                for after, p in self.fills(board, position):
                    walk(after, mass * float(where[position]) * p)

        walk(tuple(self.start.tokens[0].tolist()), 1.0)
        return out

    def best(self) -> float:
        """The best E[r] of any adaptive order, by recursion over boards."""

        @cache
        def value(board: tuple[int, ...]) -> float:
            holes = [i for i, token in enumerate(board) if token == self.task.mask_id]
            if not holes:
                return float(self.task.rewards[board])
            return max(sum(p * value(after) for after, p in self.fills(board, i)) for i in holes)

        return value(tuple(self.start.tokens[0].tolist()))


@cache
def toy(vocab_size: int = 2, length: int = 3, seed: int = 0, temperature: float = 1.0) -> Toy:
    return Toy(vocab_size, length, seed, temperature)


toys = st.builds(toy, st.integers(2, 3), st.just(3), st.integers(0, 7), st.sampled_from(TEMPERATURES))


def objective(graph: exact.Graph, policy, other, beta: float) -> Tensor:
    values = exact.evaluate(graph, policy, other)
    return values.reward - beta * values.trajectory_kl


def terminal_objective(graph: exact.Graph, policy, other, beta: float) -> Tensor:
    values = exact.evaluate(graph, policy, other)
    return values.reward - beta * values.terminal_kl


def unrestricted(graph: exact.Graph, other, beta: float) -> float:
    """beta log E_g exp(r / beta): the optimum over all distributions of sequences, reachable by an order or not."""
    boards, _, probability = exact.finished(graph, other)
    reward = torch.cat([level.reward[level.complete] for level in graph.levels])
    assert len(boards) == len(reward)
    return float(beta * (probability.log() + reward / beta).logsumexp(0))


# ---------------------------------------------------------------------- distributions
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("vocab", [2, 3])
def test_the_forward_distribution_equals_a_sum_over_every_path(vocab: int, temperature: float) -> None:
    case, order = toy(vocab, 4, 1, temperature), FreePolicy(vocab, 4, seed=3)
    tokens, start, probability = exact.finished(case.graph, order)
    found = {tuple(board): p for board, p in zip(tokens.tolist(), probability.tolist(), strict=True)}
    expected = case.distribution(order)
    assert found.keys() == expected.keys()
    assert all(abs(found[board] - p) < 1e-9 for board, p in expected.items())
    assert (start == 0).all()
    assert abs(float(probability.sum()) - 1) < 1e-12
    for visits, level in zip(exact.evaluate(case.graph, order).visits, case.graph.levels, strict=True):
        assert len(visits) == len(level.start)
        assert abs(float(visits.sum()) - 1) < 1e-12  # no level loses mass: all boards have four holes
    if temperature == 1:
        oracle = terminal_distribution(order, case.denoiser, case.start.tokens[0].tolist(), vocab)
        torch.testing.assert_close(probability, oracle[tuple(tokens.T)], atol=1e-6, rtol=0)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_subset_programme_gives_each_sequence_its_probability(temperature: float) -> None:
    case, order = toy(3, 4, 2, temperature), FreePolicy(3, 4, seed=5, holes=True)
    every = sequences(3, 4)
    instances = Instances(case.start.tokens.expand(len(every), -1), every)
    found = sequence_log_prob(case.process, order, instances, batch=5).exp()
    tokens, _, probability = exact.finished(case.graph, order)
    expected = torch.zeros((3,) * 4, dtype=torch.float64)
    expected[tuple(tokens.T)] = probability
    torch.testing.assert_close(found, expected.flatten(), atol=1e-12, rtol=0)
    assert abs(float(found.sum()) - 1) < 1e-12


def test_the_subset_programme_with_clues_and_without_holes() -> None:
    case, order = toy(2, 3), FreePolicy(2, 3, seed=1)
    tokens = torch.tensor([[0, 2, 2], [0, 2, 2], [0, 1, 1], [0, 1, 1]])
    answers = torch.tensor([[0, 1, 1], [1, 1, 1], [0, 1, 1], [0, 1, 0]])
    found = sequence_log_prob(case.process, order, Instances(tokens, answers))
    assert -INF < found[0] < 0
    assert found[1:].tolist() == [-INF, 0, -INF], "clues are never overwritten"


def test_symbols_of_probability_zero_are_left_out_and_the_exact_denoiser_gives_the_joint() -> None:
    joint = random_joint(3, 3, seed=4, zeros=10)
    joint[2] = 0
    task = TableTask(joint)
    graph = exact.enumerate_boards(
        Unmasking(task, TableDenoiser(joint), temperature=1.0), task.sample(1, torch.Generator().manual_seed(0))
    )
    tokens, _, probability = exact.finished(graph, FreePolicy(3, 3, seed=0))
    assert len(tokens) == (joint > 0).sum() < 18
    torch.testing.assert_close(probability, task.joint[tuple(tokens.T)], atol=1e-6, rtol=0)
    clue = torch.tensor([[2, 3, 3]])
    with pytest.raises(UnmaskError, match="probability 0"):
        exact.enumerate_boards(Unmasking(task, TableDenoiser(joint), temperature=1.0), Instances(clue, clue))


# ---------------------------------------------------------------------- KLs and gradients
@settings(max_examples=40)
@given(case=toys, seed=st.integers(0, 1000))
def test_the_trajectory_kl_bounds_the_terminal_kl(case: Toy, seed: int) -> None:
    values = exact.evaluate(case.graph, case.order(seed, holes=bool(seed % 2)), case.order(seed + 1))
    assert values.trajectory_kl >= values.terminal_kl - 1e-12
    assert values.terminal_kl >= -1e-12
    same = exact.evaluate(case.graph, case.order(seed, holes=True), case.order(seed, holes=True))
    assert same.trajectory_kl == same.terminal_kl == 0


def test_the_kls_equal_sums_over_sequences_and_paths() -> None:
    case = toy(2, 3, 3, 1.0)
    policy, other = case.order(1), case.order(2)
    p, q = case.distribution(policy), case.distribution(other)
    values = exact.evaluate(case.graph, policy, other)
    assert float(values.terminal_kl) == pytest.approx(sum(p[x] * math.log(p[x] / q[x]) for x in p), abs=1e-9)
    assert float(values.reward) == pytest.approx(sum(p[x] * float(case.task.rewards[x]) for x in p), abs=1e-9)

    def path_kl(board: tuple[int, ...]) -> float:
        tokens = torch.tensor([board])
        observation = observation_of(tokens, tokens == 2, case.denoiser(tokens))
        pi, g = policy(observation).log_probs[0].tolist(), other(observation).log_probs[0].tolist()
        total = 0.0
        for i in (i for i, token in enumerate(board) if token == 2):
            after = sum(w * path_kl(b) for b, w in case.fills(board, i))
            total += math.exp(pi[i]) * (pi[i] - g[i] + after)
        return total

    assert float(values.trajectory_kl) == pytest.approx(path_kl((2, 2, 2)), abs=1e-9)


def test_a_policy_that_goes_where_the_reference_never_does_has_infinite_kl() -> None:
    case = toy(2, 3, 0, 0.0)
    values = exact.evaluate(case.graph, Random(), LeftToRight())
    assert values.trajectory_kl == INF
    assert values.terminal_kl == INF
    back = exact.evaluate(case.graph, LeftToRight(), Random())
    assert float(back.trajectory_kl) == pytest.approx(math.log(6))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_gradients_equal_finite_differences(temperature: float) -> None:
    case = toy(3, 3, 1, temperature)
    other = exact.tabulate(case.graph, case.order(1))
    drawn = exact.tabulate(case.graph, case.order(2, holes=True))
    allowed = [table > -INF for table in drawn]
    assert any((a.sum(1) == 1).any() for a in allowed), "zeros in the policy"

    def values(*logits: Tensor) -> tuple[Tensor, ...]:
        table = [masked_log_softmax(x, a) for x, a in zip(logits, allowed, strict=True)]
        return exact.evaluate(case.graph, table, other)[:3]

    logits = [table.masked_fill(~a, 0.0).requires_grad_() for table, a in zip(drawn, allowed, strict=True)]
    assert torch.autograd.gradcheck(values, logits, eps=1e-6, atol=1e-7)
    assert any(g.abs().max() > 1e-3 for g in torch.autograd.grad(values(*logits)[2], logits, allow_unused=True)[:-1])


def test_gradients_reach_the_orders_parameters_and_do_not_depend_on_the_batch() -> None:
    case = toy(3, 3, 1, 1.0)
    grads = []
    for batch in (3, 1000):
        order = case.order(4).requires_grad_()
        exact.evaluate(case.graph, exact.tabulate(case.graph, order, batch), Random()).terminal_kl.backward()
        grads.append(order.logits.grad)
    torch.testing.assert_close(*grads)
    assert grads[0].isfinite().all()
    assert grads[0].abs().max() > 1e-3


# ---------------------------------------------------------------------- soft optimum
@settings(max_examples=30)
@given(case=toys, seed=st.integers(0, 1000), beta=st.sampled_from([0.05, 0.3, 2.0]))
def test_every_policy_falls_short_of_the_soft_optimum_by_its_kl_from_it(case: Toy, seed: int, beta: float) -> None:
    """J(pi) = J(pi*) - beta sum_s d_pi(s) KL(pi(.|s) || pi*(.|s)): pi* is the optimum and the only one."""
    other = case.order(seed)
    best = exact.soft_optimal(case.graph, other, beta)
    pi = case.order(seed + 1, holes=bool(seed % 2))
    shortfall = beta * exact.evaluate(case.graph, pi, best.policy).trajectory_kl
    torch.testing.assert_close(objective(case.graph, pi, other, beta), best.value - shortfall, atol=1e-10, rtol=0)
    torch.testing.assert_close(best.reward - beta * best.trajectory_kl, best.value, atol=1e-10, rtol=0)
    assert best.trajectory_kl > 0


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_limits_of_beta(temperature: float) -> None:
    case = toy(3, 3, 2, temperature)
    other = case.order(1)
    loose, tight = (exact.soft_optimal(case.graph, other, beta) for beta in (1e-6, 1e6))
    torch.testing.assert_close(loose.value, exact.best_reward(case.graph), atol=1e-4, rtol=0)
    torch.testing.assert_close(tight.value, exact.evaluate(case.graph, other).reward, atol=1e-5, rtol=0)
    assert loose.value > tight.value + 0.01


def test_optima_stay_where_the_reference_goes() -> None:
    case = toy(3, 3, 3, 1.0)
    other = exact.tabulate(case.graph, case.order(2, holes=True))
    for best in (exact.soft_optimal(case.graph, other, 0.1), exact.terminal_optimal(case.graph, other, 0.1)):
        for pi, g in zip(best.policy, other, strict=True):
            assert torch.equal(pi > -INF, g > -INF)
        assert best.value.isfinite().all()
    only = exact.soft_optimal(case.graph, LeftToRight(), 0.01)
    torch.testing.assert_close(only.value, exact.evaluate(case.graph, LeftToRight()).reward)


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan])
def test_beta_must_be_positive(beta: float) -> None:
    for solve in (exact.soft_optimal, exact.terminal_optimal):
        with pytest.raises(UnmaskError, match="beta must be greater than 0"):
            solve(toy().graph, Random(), beta)


# ---------------------------------------------------------------------- best reward
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_best_reward_equals_a_recursion_over_boards(temperature: float, seed: int) -> None:
    case = toy(2, 3, seed, temperature)
    assert float(exact.best_reward(case.graph)) == pytest.approx(case.best(), abs=1e-9)


def test_best_reward_with_greedy_filling_equals_the_best_permutation() -> None:
    case = toy(3, 4, 1, 0.0)
    rewards = []
    for permutation in itertools.permutations(range(4)):
        board = tuple(case.start.tokens[0].tolist())
        for position in permutation:
            ((board, _),) = case.fills(board, position)
        rewards.append(float(case.task.rewards[board]))
    assert float(exact.best_reward(case.graph)) == pytest.approx(max(rewards))
    assert len(set(rewards)) > 2, "the order decides what is written"


# ---------------------------------------------------------------------- terminal optimum
@settings(max_examples=15)
@given(case=toys, seed=st.integers(0, 1000), beta=st.sampled_from([0.05, 0.3, 1.0]))
def test_the_terminal_optimum_is_above_every_policy_and_below_the_bound(case: Toy, seed: int, beta: float) -> None:
    other = exact.tabulate(case.graph, case.order(seed))
    best = exact.terminal_optimal(case.graph, other, beta, tolerance=1e-5)
    assert best.gap < 1e-5
    torch.testing.assert_close(terminal_objective(case.graph, best.policy, other, beta), best.value)
    assert best.value <= unrestricted(case.graph, other, beta) + 1e-9
    soft = exact.soft_optimal(case.graph, other, beta)
    rivals = [soft.policy, other, case.order(seed + 1), case.order(seed + 2, holes=True)]
    for rival in rivals:
        assert terminal_objective(case.graph, rival, other, beta) <= best.value + best.gap + 1e-9
    assert best.value >= soft.value - 1e-9
    if case.temperature == 0:
        assert best.iterations == 1
        assert float(best.value) == pytest.approx(unrestricted(case.graph, other, beta), abs=1e-9)
        torch.testing.assert_close(best.value, soft.value)


def test_the_terminal_optimum_equals_gradient_ascent() -> None:
    case, beta = toy(2, 3, 1, 1.0), 0.2
    best = exact.terminal_optimal(case.graph, Random(), beta, tolerance=1e-9)
    base = exact.tabulate(case.graph, Random())
    order = case.order(0).requires_grad_()
    ascent = torch.optim.LBFGS(order.parameters(), max_iter=400, line_search_fn="strong_wolfe", tolerance_change=1e-14)

    def loss() -> Tensor:
        ascent.zero_grad()
        value = -terminal_objective(case.graph, order, base, beta)
        value.backward()
        return value

    ascent.step(loss)
    reached = terminal_objective(case.graph, order.requires_grad_(False), base, beta)
    torch.testing.assert_close(reached, best.value, atol=1e-6, rtol=0)
    soft = exact.soft_optimal(case.graph, base, beta)
    assert best.value > terminal_objective(case.graph, soft.policy, base, beta) + 1e-3, "the two objectives differ"
    assert best.value < unrestricted(case.graph, base, beta) - 1e-3, "no order gives the unrestricted optimum"


def test_the_gap_is_honest_when_the_iterations_run_out() -> None:
    case, beta = toy(3, 3, 1, 1.0), 0.5
    best = exact.terminal_optimal(case.graph, Random(), beta, tolerance=1e-8)
    values = []
    for iterations in (0, 1, 2, 4, 8, 16):
        early = exact.terminal_optimal(case.graph, Random(), beta, max_iterations=iterations)
        assert early.iterations == iterations
        assert early.gap > 1e-6
        assert early.value <= best.value + 1e-9 <= early.value + early.gap + 2e-9
        values.append(float(early.value))
    assert values == sorted(values)


# ---------------------------------------------------------------------- starts
def test_equal_starts_are_merged_and_weighted() -> None:
    joint = random_joint(2, 3, seed=6)
    task, denoiser = TableTask(joint), WrongDenoiser(2, 3, seed=6)
    tokens = torch.tensor([[2, 2, 2], [0, 2, 2], [2, 2, 2], [2, 2, 2], [0, 1, 1], [2, 0, 2]])
    answers = torch.tensor([[0, 0, 0], [0, 1, 0], [1, 1, 1], [0, 0, 0], [0, 1, 1], [1, 0, 1]])
    instances = Instances(tokens, answers)
    graph = exact.enumerate_boards(Unmasking(task, denoiser, temperature=1.0), instances, batch=3)
    assert graph.starts == 4
    assert torch.equal(graph.levels[0].observation.tokens[graph.start_of], tokens)
    torch.testing.assert_close(
        graph.weight[graph.start_of], torch.tensor([3, 1, 3, 3, 1, 1]) / torch.tensor(6).double()
    )
    values = exact.evaluate(graph, FreePolicy(2, 3, seed=0))
    separate = [
        exact.evaluate(
            exact.enumerate_boards(Unmasking(task, denoiser, temperature=1.0), instances[i : i + 1]),
            FreePolicy(2, 3, 0),
        ).reward
        for i in range(6)
    ]
    torch.testing.assert_close((graph.weight * values.reward).sum(), torch.cat(separate).mean())
    complete = torch.tensor([0, 1, 1])
    assert values.reward[graph.start_of[4]] == 1, "nothing is left to fill"
    assert graph.boards == 27 + 9 + 9 + 1
    boards, start, probability = exact.finished(graph, FreePolicy(2, 3, seed=0))
    assert (boards == complete).all(1).sum() == 3, "boards of different starts are kept apart"
    sums = torch.zeros(4, dtype=torch.float64).index_add(0, start, probability)
    torch.testing.assert_close(sums, torch.ones(4, dtype=torch.float64))
    for beta in (0.05, 0.5):
        best = exact.terminal_optimal(graph, Random(), beta)
        assert (best.gap < 1e-6).all()
        alone = exact.terminal_optimal(
            exact.enumerate_boards(Unmasking(task, denoiser, temperature=1.0), instances[1:2]), Random(), beta
        )
        torch.testing.assert_close(best.value[graph.start_of[1]], alone.value[0], atol=2e-6, rtol=0)


def test_boards_wider_than_one_integer_are_told_apart() -> None:
    """40 positions of 3 symbols: their codes take two words."""
    vocab, length = 3, 40

    class Task(RewardTask):
        def __init__(self) -> None:
            self.name, self.symbols, self.shape = "wide", tuple("abc"), (1, length)

    class Flat:
        hidden_dim, device, calls = None, torch.device("cpu"), 0

        def __call__(self, tokens: Tensor) -> Denoised:
            return Denoised.of(torch.full((*tokens.shape, vocab), -math.log(vocab)))

    tokens = torch.zeros(2, length, dtype=torch.long)
    tokens[:, [0, 20, 39]] = vocab
    tokens[1, 30] = 1
    task = Task()
    task.reward = lambda tokens, instances: (tokens == instances.answers).all(1).float()
    graph = exact.enumerate_boards(Unmasking(task, Flat(), temperature=1.0), Instances(tokens, tokens.clamp(max=2)))
    assert [len(level.start) for level in graph.levels] == [2, 2 * 9, 2 * 27, 2 * 27]
    boards, start, probability = exact.finished(graph, Random())
    assert len(torch.cat([start.unsqueeze(1), boards], 1).unique(dim=0)) == 54
    torch.testing.assert_close(probability, torch.full((54,), 1 / 27).double())


# ---------------------------------------------------------------------- limits
class Product:
    """The same independent distribution at every position: any order gives the product."""

    hidden_dim, device, calls = None, torch.device("cpu"), 0
    log_probs = torch.tensor([0.3, 0.7]).log()

    def __call__(self, tokens: Tensor) -> Denoised:
        return Denoised.of(self.log_probs.expand(*tokens.shape, 2))


class Bits(TableTask):
    def __init__(self, length: int) -> None:
        self.name, self.symbols, self.shape = "bits", ("0", "1"), (1, length)


def bits(length: int) -> Instances:
    return Instances(torch.full((1, length), 2), (torch.arange(length) % 3 == 0).long().unsqueeze(0))


def test_sixteen_holes_are_allowed_and_seventeen_are_not() -> None:
    found = sequence_log_prob(Unmasking(Bits(16), Product(), temperature=1.0), MaxConfidence(), bits(16))
    assert float(found) == pytest.approx(6 * math.log(0.7) + 10 * math.log(0.3), abs=1e-5)
    with pytest.raises(TooLargeError, match="17 holes, and 16 are allowed"):
        sequence_log_prob(Unmasking(Bits(17), Product(), temperature=1.0), Random(), bits(17))
    with pytest.raises(TooLargeError, match="17 holes, and 16 are allowed"):
        exact.enumerate_boards(Unmasking(Bits(17), Product()), bits(17))


def test_too_many_boards_are_refused() -> None:
    exact.enumerate_boards(Unmasking(Bits(4), Product(), temperature=1.0), bits(4), max_states=81)
    with pytest.raises(TooLargeError, match="at least 81 boards, and 80 are allowed"):
        exact.enumerate_boards(Unmasking(Bits(4), Product(), temperature=1.0), bits(4), max_states=80)
    with pytest.raises(UnmaskError, match="temperature"):
        Unmasking(Bits(4), Product(), temperature=-1.0)


# ---------------------------------------------------------------------- tables as policies
def test_a_table_as_a_policy() -> None:
    case = toy(3, 4, 1, 0.0)
    order = TablePolicy(case.graph, exact.tabulate(case.graph, MaxConfidence()))
    for one, other in zip(exact.tabulate(case.graph, order), exact.tabulate(case.graph, MaxConfidence()), strict=True):
        assert torch.equal(one, other)
    played = [rollout(case.task, case.denoiser, o, case.start) for o in (order, MaxConfidence())]
    assert torch.equal(played[0].state.tokens, played[1].state.tokens)
    unknown = torch.tensor([[3, 3, 3, 3], [0, 1, 2, 3]])
    reached = torch.cat([level.observation.tokens for level in case.graph.levels])
    assert not (reached == unknown[1]).all(1).any()
    with pytest.raises(UnmaskError, match=r"board \[0, 1, 2, 3\] is not in the graph"):
        order(observation_of(unknown, unknown == 3, case.denoiser(unknown)))


def test_playing_the_soft_optimum_earns_its_reward() -> None:
    case = toy(2, 3, 4, 1.0)
    best = exact.soft_optimal(case.graph, Random(), 0.02)
    many = Instances(case.start.tokens.expand(20_000, -1), case.start.answers.expand(20_000, -1))
    played = rollout(
        case.task,
        case.denoiser,
        TablePolicy(case.graph, best.policy),
        many,
        generator=torch.Generator().manual_seed(0),
        temperature=1.0,
        fill_generator=torch.Generator().manual_seed(1),
    )
    assert float(played.reward.mean()) == pytest.approx(float(best.reward), abs=4 * float(played.reward.std()) / 141)


# ---------------------------------------------------------------------- the packaged denoiser
def test_the_packaged_denoiser_on_real_puzzles() -> None:
    task = tasks.get("sudoku4", blanks=6)
    denoiser, puzzles = load_denoiser("sudoku4", task), task.heldout(5)
    graph = exact.enumerate_boards(Unmasking(task, denoiser), puzzles, hidden=True)
    assert graph.starts == 5
    assert all(
        level.observation.denoised.hidden.shape == (len(level.start), 16, denoiser.hidden_dim) for level in graph.levels
    )
    best = exact.best_reward(graph)
    for name in SINGLE_NAMES:
        assert (exact.evaluate(graph, reference(name)).reward <= best + 1e-12).all(), name
    played = rollout(task, denoiser, MaxConfidence(), puzzles)
    certain = exact.evaluate(graph, MaxConfidence()).reward
    torch.testing.assert_close(certain[graph.start_of], played.reward.double())
