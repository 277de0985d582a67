"""References over sets: laws by enumeration, rules by hand, and what they have in common with single orders."""

import itertools
import math

import pytest
import torch

import tasks
from agents import evaluate
from tests.oracles.enumeration import TableTask, random_joint
from unmask_env import core, parallel, reference
from unmask_env.core import Denoised, Memory, Observation, Rules
from unmask_env.denoiser import TableDenoiser, load_denoiser

L, V = 5, 3


def observation(n: int = 6, remask: bool = False, seed: int = 0) -> Observation:
    g = torch.Generator().manual_seed(seed)
    is_open = torch.rand(n, L, generator=g) < 0.6
    is_open[0] = True
    tokens = torch.randint(V, (n, L), generator=g).masked_fill(is_open, V)
    log_probs = (2 * torch.randn(n, L, V, generator=g)).log_softmax(-1)
    reopenable = ~is_open & (torch.rand(n, L, generator=g) < 0.8) if remask else None
    previous = (log_probs + 0.05 * torch.randn(n, L, V, generator=g)).log_softmax(-1)
    memory = Memory(torch.arange(n), torch.rand(n, L, generator=g), previous)
    return Observation(tokens, is_open, Denoised(log_probs), reopenable, memory=memory)


def every_set(entries: int) -> torch.Tensor:
    """(2^A, A) bool."""
    return torch.tensor(list(itertools.product([False, True], repeat=entries)))


STOCHASTIC = [parallel.SoftThreshold(), parallel.SoftThreshold(theta=0.5, tau=0.3, reopen=0.2)]
DETERMINISTIC = [
    parallel.FixedK(2),
    parallel.FixedK(1, "entropy"),
    parallel.FixedK(9, "confidence"),
    parallel.Threshold(0.6),
    parallel.Threshold(0.99, "margin"),
    parallel.Factor(0.8),
    parallel.EntropyBounded(0.5),
    parallel.KLStability(0.4, 0.01),
    parallel.Schedule(4),
    parallel.Schedule(8, "linear", "margin"),
]
REMASKING = [
    parallel.ReMDM(8, "cap", 0.1),
    parallel.ReMDM(8, "rescale", 0.3),
    parallel.ReMDM(8, "loop", 0.2),
    parallel.ReMDM(8, "conf"),
    parallel.SelfPlanning(8),
]


@pytest.mark.parametrize("remask", [False, True])
@pytest.mark.parametrize("order", STOCHASTIC + DETERMINISTIC, ids=repr)
def test_probabilities_of_all_sets_sum_to_one(order, remask: bool) -> None:
    seen = observation(remask=remask)
    sets = every_set(seen.choices.shape[1])
    total = torch.stack([order.log_prob_of(seen, s.expand(len(seen.tokens), -1)) for s in sets]).logsumexp(0)
    torch.testing.assert_close(total, torch.zeros_like(total), atol=1e-5, rtol=0)


@pytest.mark.parametrize("order", REMASKING, ids=repr)
def test_probabilities_with_positions_opened_again_sum_to_one(order) -> None:
    seen = observation(remask=True)
    sets = every_set(2 * L)
    total = torch.stack([order.log_prob_of(seen, s.expand(len(seen.tokens), -1)) for s in sets]).logsumexp(0)
    torch.testing.assert_close(total, torch.zeros_like(total), atol=1e-5, rtol=0)


@pytest.mark.parametrize("order", STOCHASTIC + REMASKING[:4], ids=repr)
def test_samples_follow_the_law(order) -> None:
    seen = observation(remask=True)[torch.zeros(4000, dtype=torch.long)]
    drawn = order.sample(seen, torch.Generator().manual_seed(0))
    assert not (drawn & ~seen.choices).any()
    wanted = order.log_inclusion(seen)[0].exp()
    error = 4 * (wanted * (1 - wanted) / 4000).sqrt() + 1e-6
    assert ((drawn.float().mean(0) - wanted).abs() <= error).all()


def test_soft_threshold_by_hand() -> None:
    log_probs = torch.tensor([[[0.9, 0.1], [0.6, 0.4], [0.5, 0.5]]]).log()
    seen = Observation(torch.tensor([[2, 2, 0]]), torch.tensor([[True, True, False]]), Denoised(log_probs))
    found = parallel.SoftThreshold(theta=0.7, tau=0.1).log_inclusion(seen).exp()
    expected = [1 / (1 + math.exp(-2)), 1 / (1 + math.exp(1)), 0.0]
    torch.testing.assert_close(found, torch.tensor([expected]))


def test_fixed_k_and_threshold_by_hand() -> None:
    top = torch.tensor([[0.95, 0.7, 0.9, 0.99], [0.6, 0.7, 0.65, 0.8]])
    log_probs = torch.stack([top, 1 - top], -1).log()
    is_open = torch.tensor([[True, True, True, False], [True, True, True, False]])
    seen = Observation(torch.where(is_open, 2, 0), is_open, Denoised(log_probs))

    def chosen(order) -> list[list[int]]:
        return [row.nonzero().flatten().tolist() for row in order.sample(seen, None)]

    assert chosen(parallel.FixedK(2, "confidence")) == [[0, 2], [1, 2]]
    assert chosen(parallel.Threshold(0.9)) == [[0, 2], [1]]  # below the threshold the best one, closed ones never
    assert chosen(parallel.Threshold(0.65)) == [[0, 1, 2], [1, 2]]
    assert chosen(parallel.Threshold(0.35, "margin")) == [[0, 1, 2], [1]]


def closed_by(order, top: list[list[float]], memory: Memory | None = None) -> list[list[int]]:
    """Which of all-open positions of two symbols are closed; ``top`` are the confidences."""
    p = torch.tensor(top)
    seen = Observation(
        torch.full(p.shape, 2), torch.ones_like(p, dtype=torch.bool), Denoised(torch.stack([p, 1 - p], -1).log()),
        memory=memory,
    )  # fmt: skip
    return [row.nonzero().flatten().tolist() for row in order.sample(seen, None)]


def test_factor_by_hand() -> None:
    # (n + 1)(1 - c_n): row 0: 2 * .1 = .2, 3 * .2 = .6, 4 * .3 = 1.2; row 1: 2 * .5 = 1 is not below 1.
    assert closed_by(parallel.Factor(1.0), [[0.7, 0.9, 0.8], [0.5, 0.5, 0.5]]) == [[1, 2], [0]]
    assert closed_by(parallel.Factor(1.3), [[0.7, 0.9, 0.8], [0.5, 0.5, 0.5]]) == [[0, 1, 2], [0]]


def test_entropy_bound_by_hand() -> None:
    # Entropies: .6109 (.7), .3251 (.9), .5004 (.8). Without the largest: 0, .3251, .8255.
    for gamma, closed in ((0.0, [1]), (0.32, [1]), (0.33, [1, 2]), (0.82, [1, 2]), (0.83, [0, 1, 2])):
        assert closed_by(parallel.EntropyBounded(gamma), [[0.7, 0.9, 0.8]]) == [closed]


def test_stability_by_hand() -> None:
    before = torch.tensor([[0.7, 0.5, 0.8]])
    log_before = torch.stack([before, 1 - before], -1).log()
    memory = Memory(torch.ones(1).long(), torch.ones(1, 3), log_before)
    # KL(.9 || .5) = .368; the others have not moved. The most confident one is closed in any case.
    assert closed_by(parallel.KLStability(0.75, 0.01), [[0.7, 0.9, 0.8]], memory) == [[1, 2]]
    assert closed_by(parallel.KLStability(0.65, 0.01), [[0.7, 0.9, 0.8]], memory) == [[0, 1, 2]]
    assert closed_by(parallel.KLStability(0.65, 0.01), [[0.7, 0.9, 0.8]], memory._replace(previous=None)) == [[1]]
    assert closed_by(parallel.KLStability(0.75, 0.01), [[0.9, 0.7, 0.8]], memory) == [[0, 2]]


def test_schedules_leave_open_what_they_say() -> None:
    task, denoiser, instances = sudoku()
    holes = (instances.tokens == task.mask_id).sum(1)
    for shape, share in (("linear", lambda s: 1 - s / 4), ("cosine", lambda s: math.cos(math.pi * s / 8))):
        order = parallel.Schedule(4, shape)
        played = core.rollout(task, denoiser, order, instances, rules=Rules("set"), record=True)
        assert (played.nfe <= 4).all()
        for s, step in enumerate(played.steps):
            left = step.observation.open.sum(1)
            # Every forward rounds down what it leaves; it closes one position at least.
            assert ((left - (share(s) * holes).floor()) <= 0).all()
            assert ((share(s) * holes - left) <= s + 1e-6).all() or shape == "cosine"


def test_self_planning_opens_again_what_has_become_unlikely() -> None:
    # Position 0 is closed with a symbol that now has probability .2; 1 and 2 are open.
    p = torch.tensor([[0.2, 0.9, 0.6, 0.95]])
    seen = Observation(
        torch.tensor([[0, 2, 2, 0]]),
        torch.tensor([[False, True, True, False]]),
        Denoised(torch.stack([p, 1 - p], -1).log()),
        torch.tensor([[True, False, False, False]]),  # position 3 is given
        memory=Memory(torch.tensor([1]), torch.ones(1, 4)),
    )
    chosen = parallel.SelfPlanning(3).sample(seen, None)  # after two of three forwards two of the three are closed
    assert chosen.tolist() == [[False, True, True, False, True, False, False, False]]
    never = parallel.SelfPlanning(3, eta=0.0).sample(seen, None)
    assert never.tolist() == [[False, True, False, False, False, False, False, False]]


@pytest.mark.parametrize("budget", [0, 1, 2])
@pytest.mark.parametrize("order", [*REMASKING, parallel.SoftThreshold(0.5, 0.3, 0.5)], ids=repr)
def test_references_open_no_more_again_than_a_budget_leaves(order, budget: int) -> None:
    task = TableTask(random_joint(2, 5, seed=3))
    instances = core.Instances(torch.full((50, 5), 2), torch.zeros(50, 5, dtype=torch.long))
    played = core.rollout(
        task,
        TableDenoiser(task.joint, task),
        order,
        instances,
        rules=Rules("set+remask", "raise", nfe_budget=20, remask_budget=budget),
        order_generator=torch.Generator().manual_seed(0),
    )
    assert played.state.reopened.sum(1).max() <= budget


def test_self_planning_spends_a_budget_on_the_least_likely_symbols() -> None:
    p = torch.tensor([[0.4, 0.2, 0.3, 0.9]])  # positions 0 to 2 are closed with symbols of these probabilities
    seen = Observation(
        torch.tensor([[0, 0, 0, 2]]),
        torch.tensor([[False, False, False, True]]),
        Denoised(torch.stack([p, 1 - p], -1).log()),
        torch.tensor([[True, True, True, False]]),
        memory=Memory(torch.tensor([0]), torch.ones(1, 4), reopenings=torch.tensor([2])),
    )
    chosen = parallel.SelfPlanning(4).sample(seen, None)
    assert chosen.tolist() == [[False, False, False, True, False, True, True, False]]


def test_the_sampler_of_remdm_and_its_reference_have_one_law() -> None:
    """Expected number of visible positions after every forward, on a denoiser whose symbols do not matter."""
    task = TableTask(random_joint(2, 5, seed=3))
    instances = core.Instances(torch.full((4000, 5), 2), torch.zeros(4000, 5, dtype=torch.long))
    order = parallel.ReMDM(6, "cap", 0.2)
    levels = parallel.Remasking("cap", 0.2).visible(6)
    state, steps = core.begin(instances, 2), torch.zeros(4000, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    denoised = TableDenoiser(task.joint, task)(state.tokens)
    for s, (_, then, _) in enumerate(levels[:-1]):
        # Complete rows, which end an episode, go on here as they do in the sampler.
        memory = Memory(steps + s, torch.ones(4000, 5))
        seen = Observation(state.tokens, state.open, denoised, ~state.open, memory=memory)
        action = order.sample(seen, generator)
        close, reopen = action[:, :5], action[:, 5:]
        tokens = torch.where(close, 0, state.tokens).masked_fill(reopen, 2)
        state = core.State(tokens, tokens == 2, instances, steps, torch.zeros_like(tokens))
        error = 4 * (then * (1 - then) / (4000 * 5)) ** 0.5
        assert abs(float((tokens != 2).float().mean()) - then) < error


def test_rules_that_look_back_say_so_in_environments() -> None:
    seen = Observation(**{**vars(observation(remask=True)), "memory": None})
    for order in (parallel.ReMDM(), parallel.SelfPlanning(), parallel.Schedule(), parallel.KLStability()):
        with pytest.raises(tasks.UnmaskError, match=f"{type(order).__name__} looks back"):
            order.log_inclusion(seen)
    for order in (parallel.ReMDM(), parallel.SelfPlanning()):
        with pytest.raises(tasks.UnmaskError, match="opens positions again; play with actions"):
            order.log_inclusion(observation())


def sudoku():
    task = tasks.get("sudoku4")
    return task, load_denoiser("sudoku4", task), task.heldout(64)


@pytest.mark.parametrize("score", ["confidence", "margin", "entropy"])
def test_one_at_a_time_is_the_single_mode_bit_for_bit(score: str) -> None:
    task, denoiser, instances = sudoku()
    single = {"confidence": reference.MaxConfidence, "margin": reference.Margin, "entropy": reference.Entropy}[score]()
    one = core.rollout(task, denoiser, single, instances, record=True)
    sets = core.rollout(task, denoiser, parallel.FixedK(1, score), instances, rules=Rules(actions="set"), record=True)
    assert len(one.steps) == len(sets.steps)
    for a, b in zip(one.steps, sets.steps, strict=True):
        assert a.observation.tokens.equal(b.observation.tokens)
        assert a.action[a.alive].equal(b.action[b.alive].int().argmax(1))
    assert one.state.tokens.equal(sets.state.tokens)
    assert one.reward.equal(sets.reward)
    assert one.nfe.equal(sets.nfe)


@pytest.mark.parametrize("order", [parallel.Threshold(0.7), parallel.SoftThreshold(0.7, 0.2)], ids=repr)
def test_one_long_block_and_no_budget_to_open_again_change_nothing(order) -> None:
    task, denoiser, instances = sudoku()

    def play(**rules):
        generator = torch.Generator().manual_seed(3) if not order.deterministic else None
        return core.rollout(task, denoiser, order, instances, rules=Rules(**rules), order_generator=generator)

    plain = play(actions="set")
    assert (plain.nfe < (instances.tokens == task.mask_id).sum(1)).any()
    assert play(actions="set", block_length=task.length).state.tokens.equal(plain.state.tokens)
    if order.deterministic:  # a stochastic one draws numbers for entries that may not be chosen, too
        again = play(actions="set+remask", remask_budget=0)
        assert again.state.tokens.equal(plain.state.tokens)
        assert again.nfe.equal(plain.nfe)


def test_a_rollout_out_of_budget_keeps_its_holes() -> None:
    task, denoiser, instances = sudoku()
    played = core.rollout(
        task, denoiser, parallel.FixedK(2), instances, rules=Rules(actions="set", nfe_budget=3), record=True
    )
    holes = (instances.tokens == task.mask_id).sum(1)
    left = (played.state.tokens == task.mask_id).sum(1)
    assert left.equal((holes - 6).clamp(min=0))
    assert (played.nfe <= 3).all()
    assert (played.reward[left > 0] == 0).all()
    assert len(played.steps) == 3


def test_opening_again_goes_on_until_the_budget_of_forwards() -> None:
    """Every position is opened again whenever it can be: only the budget ends that."""
    task = TableTask(random_joint(2, 4, seed=1))
    instances = task.sample(8, torch.Generator().manual_seed(0))

    class Restless:
        def sample(self, observation: Observation, generator: torch.Generator | None) -> torch.Tensor:
            first = observation.open & (observation.open.cumsum(1) == 1)
            return torch.cat([first, observation.reopenable], 1)

    played = core.rollout(
        task, TableDenoiser(task.joint, task), Restless(), instances, rules=Rules("set+remask", nfe_budget=7)
    )
    assert (played.nfe == 7).all()
    assert (played.state.reopened.sum(1) == 6).all()
    assert (played.reward == 0).all()


def test_errors_in_one_line() -> None:
    with pytest.raises(tasks.UnknownNameError, match="unknown set reference 'margin'"):
        parallel.get("margin")
    for make, message in (
        (lambda: parallel.get("threshold", theta=0.5, tau=1), "does not take tau"),
        (lambda: parallel.FixedK(0), "k must be a whole number of at least 1, not 0"),
        (lambda: parallel.FixedK(2, "luck"), "unknown score 'luck'"),
        (lambda: parallel.SoftThreshold(theta=1.5), "theta must be between 0 and 1, not 1.5"),
        (lambda: parallel.SoftThreshold(tau=0), "tau must be a number greater than 0, not 0"),
    ):
        with pytest.raises(tasks.UnmaskError, match=message):
            make()


def test_positions_are_opened_again_on_uniform_diffusion_too() -> None:
    """An absorbing denoiser of uniform diffusion: what is opened again holds noise, and is decided anew."""
    task = tasks.get("sudoku4")
    denoiser, instances = load_denoiser("sudoku4-audm", task), task.heldout(16)
    order, rules = parallel.SoftThreshold(0.8, 0.1, reopen=0.3), Rules("set+remask", remask_budget=4)
    played = core.rollout(
        task, denoiser, order, instances, rules=rules, order_generator=torch.Generator().manual_seed(0)
    )
    given = instances.tokens != task.mask_id
    assert played.state.reopened.sum(1).max() == 4
    assert (played.state.tokens != task.mask_id).all()
    assert played.state.tokens[given].equal(instances.tokens[given])


def test_oracle_closes_what_is_right_and_opens_what_is_wrong() -> None:
    seen = observation(remask=True)
    top = seen.denoised.log_probs.argmax(-1)
    answers = torch.where(torch.rand(top.shape, generator=torch.Generator().manual_seed(3)) < 0.5, top, (top + 1) % V)
    chosen = parallel.OracleSets().with_answers(answers).sample(seen, None)
    close, reopen = chosen.split(L, 1)
    right = seen.open & (top == answers)
    some = right.any(1)
    assert some.any()
    assert torch.equal(close[some], right[some])
    surest = reference.confidence(seen).masked_fill(~seen.open, -1.0).argmax(1)
    assert close[~some].sum(1).eq(seen.open[~some].any(1)).all()
    assert all(close[row, surest[row]] for row in (~some & seen.open.any(1)).nonzero().squeeze(1).tolist())
    assert torch.equal(reopen, seen.reopenable & (seen.tokens != answers))
    with pytest.raises(tasks.UnmaskError, match="sees the answers"):
        parallel.OracleSets().sample(seen, None)
    with pytest.raises(tasks.UnmaskError, match="takes no options"):
        evaluate.load_order("oracle:theta=1", tasks.get("sudoku4"), actions="set")
