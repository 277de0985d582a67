"""References over sets: distributions by enumeration, rules by hand, and what they share with single positions."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import tasks
from agents import evaluate
from pretrain.samplers import Remasking
from tasks import Instances
from tests.oracles.enumeration import TableTask, random_joint
from tests.toys import FavouriteDenoiser, rollout
from tests.toys import observation as observation_of
from unmask_env.denoiser import TableDenoiser, load_denoiser
from unmask_env.distributions import Bernoulli
from unmask_env.reference import (
    Entropy,
    EntropyBounded,
    Factor,
    FixedK,
    KLStability,
    Margin,
    MaxConfidence,
    Oracle,
    OracleSets,
    Policy,
    ReMDM,
    Schedule,
    SelfPlanning,
    SoftThreshold,
    Threshold,
    certainly,
    reference,
)
from unmask_env.state import Denoised, History, Observation, Rules

L, V = 5, 3


def observation(n: int = 6, remask: bool = False, seed: int = 0) -> Observation:
    g = torch.Generator().manual_seed(seed)
    masked = torch.rand(n, L, generator=g) < 0.6
    masked[0] = True
    tokens = torch.randint(V, (n, L), generator=g).masked_fill(masked, V)
    log_probs = (2 * torch.randn(n, L, V, generator=g)).log_softmax(-1)
    remaskable = ~masked & (torch.rand(n, L, generator=g) < 0.8) if remask else None
    previous = (log_probs + 0.05 * torch.randn(n, L, V, generator=g)).log_softmax(-1)
    history = History(torch.arange(n) + 1, torch.rand(n, L, generator=g), Denoised.of(previous))
    return observation_of(tokens, masked, Denoised.of(log_probs), remaskable, history=history)


def every_set(entries: int) -> torch.Tensor:
    """(2^A, A) bool."""
    return torch.tensor(list(itertools.product([False, True], repeat=entries)))


STOCHASTIC = [SoftThreshold(), SoftThreshold(theta=0.5, tau=0.3, remask=0.2)]
DETERMINISTIC = [
    FixedK(2),
    FixedK(1, "entropy"),
    FixedK(9, "confidence"),
    Threshold(0.6),
    Threshold(0.99, "margin"),
    Factor(0.8),
    EntropyBounded(0.5),
    KLStability(0.4, 0.01),
    Schedule(4),
    Schedule(8, "linear", "margin"),
]
REMASKING = [
    ReMDM(8, "cap", 0.1),
    ReMDM(8, "rescale", 0.3),
    ReMDM(8, "loop", 0.2),
    ReMDM(8, "conf"),
    SelfPlanning(8),
]


@pytest.mark.parametrize("remask", [False, True])
@pytest.mark.parametrize("order", STOCHASTIC + DETERMINISTIC, ids=repr)
def test_probabilities_of_all_sets_sum_to_one(order, remask: bool) -> None:
    seen = observation(remask=remask)
    sets = every_set(seen.action_mask.shape[1])
    total = torch.stack([order(seen).log_prob(s.expand(len(seen.tokens), -1)) for s in sets]).logsumexp(0)
    torch.testing.assert_close(total, torch.zeros_like(total), atol=1e-5, rtol=0)


@pytest.mark.parametrize("order", REMASKING, ids=repr)
def test_probabilities_with_remasking_sum_to_one(order) -> None:
    seen = observation(remask=True)
    sets = every_set(2 * L)
    total = torch.stack([order(seen).log_prob(s.expand(len(seen.tokens), -1)) for s in sets]).logsumexp(0)
    torch.testing.assert_close(total, torch.zeros_like(total), atol=1e-5, rtol=0)


@pytest.mark.parametrize("order", STOCHASTIC + REMASKING[:4], ids=repr)
def test_samples_follow_the_distribution(order) -> None:
    seen = observation(remask=True)[torch.zeros(4000, dtype=torch.long)]
    drawn = order(seen).act(torch.Generator().manual_seed(0))
    assert not (drawn & ~seen.action_mask).any()
    wanted = order(seen).entry_log_probs()[0].exp()
    error = 4 * (wanted * (1 - wanted) / 4000).sqrt() + 1e-6
    assert ((drawn.float().mean(0) - wanted).abs() <= error).all()


def test_soft_threshold_by_hand() -> None:
    log_probs = torch.tensor([[[0.9, 0.1], [0.6, 0.4], [0.5, 0.5]]]).log()
    seen = observation_of(torch.tensor([[2, 2, 0]]), torch.tensor([[True, True, False]]), Denoised.of(log_probs))
    found = SoftThreshold(theta=0.7, tau=0.1)(seen).entry_log_probs().exp()
    expected = [1 / (1 + math.exp(-2)), 1 / (1 + math.exp(1)), 0.0]
    torch.testing.assert_close(found, torch.tensor([expected]))


def test_fixed_k_and_threshold_by_hand() -> None:
    top = torch.tensor([[0.95, 0.7, 0.9, 0.99], [0.6, 0.7, 0.65, 0.8]])
    log_probs = torch.stack([top, 1 - top], -1).log()
    masked = torch.tensor([[True, True, True, False], [True, True, True, False]])
    seen = observation_of(torch.where(masked, 2, 0), masked, Denoised.of(log_probs))

    def chosen(order) -> list[list[int]]:
        return [row.nonzero().flatten().tolist() for row in order(seen).mode()]

    assert chosen(FixedK(2, "confidence")) == [[0, 2], [1, 2]]
    assert chosen(Threshold(0.9)) == [[0, 2], [1]]  # below the threshold the best one, filled ones never
    assert chosen(Threshold(0.65)) == [[0, 1, 2], [1, 2]]
    assert chosen(Threshold(0.92, at_least=2)) == [[0, 2], [1, 2]]
    assert chosen(Threshold(0.5, at_least=1)) == chosen(Threshold(0.5, at_least=3)) == [[0, 1, 2], [0, 1, 2]]
    assert chosen(Threshold(0.35, "margin")) == [[0, 1, 2], [1]]


def filled_by(order, top: list[list[float]], history: History | None = None) -> list[list[int]]:
    """Which of the positions of two symbols, all of them masked, are filled; ``top`` are the confidences."""
    p = torch.tensor(top)
    seen = observation_of(
        torch.full(p.shape, 2), torch.ones_like(p, dtype=torch.bool), Denoised.of(torch.stack([p, 1 - p], -1).log()),
        history=history,
    )  # fmt: skip
    return [row.nonzero().flatten().tolist() for row in order(seen).mode()]


def test_factor_by_hand() -> None:
    # (n + 1)(1 - c_n): row 0: 2 * .1 = .2, 3 * .2 = .6, 4 * .3 = 1.2; row 1: 2 * .5 = 1 is not below 1.
    assert filled_by(Factor(1.0), [[0.7, 0.9, 0.8], [0.5, 0.5, 0.5]]) == [[1, 2], [0]]
    assert filled_by(Factor(1.3), [[0.7, 0.9, 0.8], [0.5, 0.5, 0.5]]) == [[0, 1, 2], [0]]


def test_entropy_bound_by_hand() -> None:
    # Entropies: .6109 (.7), .3251 (.9), .5004 (.8). Without the largest: 0, .3251, .8255.
    for gamma, filled in ((0.0, [1]), (0.32, [1]), (0.33, [1, 2]), (0.82, [1, 2]), (0.83, [0, 1, 2])):
        assert filled_by(EntropyBounded(gamma), [[0.7, 0.9, 0.8]]) == [filled]


def test_stability_by_hand() -> None:
    before = torch.tensor([[0.7, 0.5, 0.8]])
    log_before = torch.stack([before, 1 - before], -1).log()
    history = History(torch.ones(1).long(), torch.ones(1, 3), Denoised.of(log_before))
    # KL(.9 || .5) = .368; the others have not moved. The most confident one is filled in any case.
    assert filled_by(KLStability(0.75, 0.01), [[0.7, 0.9, 0.8]], history) == [[1, 2]]
    assert filled_by(KLStability(0.65, 0.01), [[0.7, 0.9, 0.8]], history) == [[0, 1, 2]]
    assert filled_by(KLStability(0.65, 0.01), [[0.7, 0.9, 0.8]], replace(history, previous=None)) == [[1]]
    assert filled_by(KLStability(0.75, 0.01), [[0.9, 0.7, 0.8]], history) == [[0, 2]]


def test_schedules_leave_masked_what_they_say() -> None:
    task, denoiser, instances = sudoku()
    holes = (instances.tokens == task.mask_id).sum(1)
    for shape, share in (("linear", lambda s: 1 - s / 4), ("cosine", lambda s: math.cos(math.pi * s / 8))):
        order = Schedule(4, shape)
        played = rollout(task, denoiser, order, instances, rules=Rules("set"), record=True)
        assert (played.nfe <= 4).all()
        for s, step in enumerate(played.steps):
            left = step.observation.fillable.sum(1)
            # Every forward rounds down what it leaves; it fills one position at least.
            assert ((left - (share(s) * holes).floor()) <= 0).all()
            assert ((share(s) * holes - left) <= s + 1e-6).all() or shape == "cosine"


class Letters(tasks.Task):
    """A line of two letters."""

    name, symbols = "letters", ("a", "b")

    def __init__(self, length: int) -> None:
        self.shape = (1, length)

    def sample(self, n: int, generator: torch.Generator) -> Instances:
        raise NotImplementedError

    def reward(self, tokens: torch.Tensor, instances: Instances) -> torch.Tensor:
        return torch.zeros(len(tokens))


def filled_per_forward(order: Schedule, holes: list[bool], block_length: int | None = None) -> list[int]:
    """How many positions each forward fills, of a line with these ``holes``."""
    task = Letters(len(holes))
    tokens = torch.tensor(holes).long().mul(task.mask_id).unsqueeze(0)
    rules = Rules("set", block_length=block_length)
    denoiser = FavouriteDenoiser(torch.zeros_like(tokens), torch.linspace(-0.5, -0.1, len(holes)).unsqueeze(0), 2)
    played = rollout(task, denoiser, order, Instances(tokens, torch.zeros_like(tokens)), rules=rules, record=True)
    return [int(step.action.sum()) for step in played.steps]


@pytest.mark.parametrize("per_forward", [1, 2, 3, 5])
@pytest.mark.parametrize("steps", [1, 2, 7, 12, 30])
def test_a_linear_schedule_of_an_exact_multiple_is_exact(steps: int, per_forward: int) -> None:
    assert filled_per_forward(Schedule(steps, "linear"), [True] * (steps * per_forward)) == [per_forward] * steps


def test_a_schedule_deals_its_forwards_to_the_blocks() -> None:
    linear, whole = Schedule(12, "linear"), [True] * 24
    for block_length in (2, 4, 6, 8, 12, 24, None):
        assert filled_per_forward(linear, whole, block_length) == [2] * 12
    # By hand: 1 - s / 3 of 6 leaves 4, 2, 0; cos(pi s / 6) leaves 5.2 -> 5, then 5 * .5 / .866 = 2.9 -> 2.
    assert filled_per_forward(Schedule(6, "linear"), whole[:12], 6) == [2, 2, 2] * 2
    assert filled_per_forward(Schedule(6), whole[:12], 6) == [1, 3, 2] * 2
    # Blocks with more holes take more of the forwards: 12 holes in six are two each, wherever they lie.
    assert filled_per_forward(Schedule(6, "linear"), [False] * 6 + [True] * 12, 8) == [2] * 6
    assert filled_per_forward(Schedule(4), whole, 6) == [6] * 4
    assert filled_per_forward(Schedule(2), whole, 6) == [6] * 4  # a forward per block at least


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_a_schedule_over_blocks_takes_its_forwards_or_one_per_block(shape: str) -> None:
    draw = np.random.default_rng(0)
    for _ in range(100):
        length, steps = draw.integers(1, 30), int(draw.integers(1, 20))
        block_length, holes = int(draw.integers(1, length + 1)), draw.random(length) < draw.random()
        if not holes.any():
            continue
        blocks = len(set(np.flatnonzero(holes) // block_length))
        filled = filled_per_forward(Schedule(steps, shape), holes.tolist(), block_length)
        assert sum(filled) == holes.sum()
        assert len(filled) <= max(steps, blocks)
        if shape == "linear":
            assert len(filled) == min(max(steps, blocks), holes.sum())


@pytest.mark.parametrize(
    "order", [ReMDM(12, strategy) for strategy in ("cap", "rescale")] + [SelfPlanning(12)], ids=repr
)
def test_rules_that_mask_again_deal_their_forwards_to_the_blocks_too(order) -> None:
    """24 holes in blocks of 6: three forwards each, so that a block is done after 3, 6, 9 and 12."""
    tokens = torch.full((40, 24), 2)
    denoiser = FavouriteDenoiser(torch.zeros_like(tokens), torch.linspace(-0.5, -0.1, 24).expand(40, -1), 2)
    rules = Rules("set+remask", block_length=6)
    played = rollout(
        Letters(24),
        denoiser,
        order,
        Instances(tokens, tokens * 0),
        rules=rules,
        record=True,
        generator=torch.Generator(),
    )
    assert (played.nfe <= 12).all()
    assert (played.nfe >= 11).float().mean() > 0.5  # an unlikely block may be whole before its last forward
    left = torch.stack([step.observation.masked.sum(1) for step in played.steps[::3]])
    assert (left <= torch.tensor([[24], [18], [12], [6]])[: len(left)]).all()


def test_a_board_ahead_of_its_schedule_or_behind_it_goes_on() -> None:
    """As when another policy made the first moves: of 8 holes in two blocks, two forwards each."""
    tokens, masked = torch.full((3, 8), 2), torch.ones(3, 8, dtype=torch.bool)
    masked[0, :4] = False  # ahead: the second block already in the second forward
    denoised = Denoised.of(torch.tensor([0.6, 0.4]).log().expand(3, 8, 2))
    history = History(
        torch.tensor([1, 1, 3]), torch.ones(3, 8), None, None, torch.tensor([1, 0, 0]), torch.tensor([[4, 4]] * 3)
    )
    fillable = masked & (torch.arange(8) // 4 == history.block.unsqueeze(1))
    seen = observation_of(tokens.masked_fill(~masked, 0), fillable, denoised, history=history)
    assert Schedule(4, "linear")(seen).mode().sum(1).tolist() == [2, 4, 4]


def test_self_planning_masks_again_what_has_become_unlikely() -> None:
    # Position 0 is filled with a symbol that now has probability .2; 1 and 2 are masked.
    p = torch.tensor([[0.2, 0.9, 0.6, 0.95]])
    seen = observation_of(
        torch.tensor([[0, 2, 2, 0]]),
        torch.tensor([[False, True, True, False]]),
        Denoised.of(torch.stack([p, 1 - p], -1).log()),
        torch.tensor([[True, False, False, False]]),  # position 3 is given
        history=History(torch.tensor([1]), torch.ones(1, 4)),
    )
    chosen = SelfPlanning(3)(seen).mode()  # after two of three forwards two of the three are filled
    assert chosen.tolist() == [[False, True, True, False, True, False, False, False]]
    never = SelfPlanning(3, eta=0.0)(seen).mode()
    assert never.tolist() == [[False, True, False, False, False, False, False, False]]


@pytest.mark.parametrize("budget", [0, 1, 2])
@pytest.mark.parametrize("order", [*REMASKING, SoftThreshold(0.5, 0.3, 0.5)], ids=repr)
def test_references_mask_no_more_again_than_a_budget_leaves(order, budget: int) -> None:
    task = TableTask(random_joint(2, 5, seed=3))
    instances = Instances(torch.full((50, 5), 2), torch.zeros(50, 5, dtype=torch.long))
    played = rollout(
        task,
        TableDenoiser(task.joint, task),
        order,
        instances,
        rules=Rules("set+remask", "raise", nfe_budget=20, remask_budget=budget),
        generator=torch.Generator().manual_seed(0),
    )
    assert played.state.remask_count.sum(1).max() <= budget


def test_self_planning_spends_a_budget_on_the_least_likely_symbols() -> None:
    p = torch.tensor([[0.4, 0.2, 0.3, 0.9]])  # positions 0 to 2 are filled with symbols of these probabilities
    seen = observation_of(
        torch.tensor([[0, 0, 0, 2]]),
        torch.tensor([[False, False, False, True]]),
        Denoised.of(torch.stack([p, 1 - p], -1).log()),
        torch.tensor([[True, True, True, False]]),
        history=History(torch.tensor([0]), torch.ones(1, 4), remasks_left=torch.tensor([2])),
    )
    chosen = SelfPlanning(4)(seen).mode()
    assert chosen.tolist() == [[False, False, False, True, False, True, True, False]]


def test_the_sampler_of_remdm_and_its_reference_have_one_law() -> None:
    """Expected number of visible positions after every forward, on a denoiser whose symbols do not matter."""
    task = TableTask(random_joint(2, 5, seed=3))
    instances = Instances(torch.full((4000, 5), 2), torch.zeros(4000, 5, dtype=torch.long))
    order = ReMDM(6, "cap", 0.2)
    levels = Remasking("cap", 0.2).visible(6)
    tokens, steps = instances.tokens, torch.zeros(4000, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    denoised = TableDenoiser(task.joint, task)(tokens)
    for s, (_, then, _) in enumerate(levels[:-1]):
        # Complete rows, which end an episode, go on here as they do in the sampler.
        history, masked = History(steps + s, torch.ones(4000, 5)), tokens == 2
        seen = observation_of(tokens, masked, denoised, ~masked, history=history)
        fill, remask = order(seen).act(generator).split(5, 1)
        tokens = torch.where(fill, 0, tokens).masked_fill(remask, 2)
        error = 4 * (then * (1 - then) / (4000 * 5)) ** 0.5
        assert abs(float((tokens != 2).float().mean()) - then) < error


def test_rules_that_look_back_need_a_history() -> None:
    seen = replace(observation(remask=True), history=None)
    for order in (ReMDM(), SelfPlanning(), Schedule(), KLStability()):
        with pytest.raises(tasks.UnmaskError, match=f"{order.name} looks back"):
            order(seen)
    for order in (ReMDM(), SelfPlanning()):
        with pytest.raises(tasks.UnmaskError, match="masks positions again; play with actions"):
            order(observation())


def sudoku():
    task = tasks.get("sudoku4")
    return task, load_denoiser("sudoku4", task), task.heldout(64)


@pytest.mark.parametrize("score", ["confidence", "margin", "entropy"])
def test_one_at_a_time_is_the_single_mode_bit_for_bit(score: str) -> None:
    task, denoiser, instances = sudoku()
    single = {"confidence": MaxConfidence, "margin": Margin, "entropy": Entropy}[score]()
    one = rollout(task, denoiser, single, instances, record=True)
    sets = rollout(task, denoiser, FixedK(1, score), instances, rules=Rules(actions="set"), record=True)
    assert len(one.steps) == len(sets.steps)
    for a, b in zip(one.steps, sets.steps, strict=True):
        assert a.observation.tokens.equal(b.observation.tokens)
        assert a.action[a.alive].equal(b.action[b.alive])
    assert one.state.tokens.equal(sets.state.tokens)
    assert one.reward.equal(sets.reward)
    assert one.nfe.equal(sets.nfe)


@pytest.mark.parametrize("order", [Threshold(0.7), SoftThreshold(0.7, 0.2)], ids=repr)
def test_one_long_block_and_no_remask_budget_change_nothing(order) -> None:
    task, denoiser, instances = sudoku()

    def play(**rules):
        generator = torch.Generator().manual_seed(3) if not order.deterministic else None
        return rollout(task, denoiser, order, instances, rules=Rules(**rules), generator=generator)

    plain = play(actions="set")
    assert (plain.nfe < (instances.tokens == task.mask_id).sum(1)).any()
    assert play(actions="set", block_length=task.length).state.tokens.equal(plain.state.tokens)
    if order.deterministic:  # a stochastic one draws numbers for entries that may not be chosen, too
        again = play(actions="set+remask", remask_budget=0)
        assert again.state.tokens.equal(plain.state.tokens)
        assert again.nfe.equal(plain.nfe)


def test_a_rollout_out_of_budget_keeps_its_holes() -> None:
    task, denoiser, instances = sudoku()
    played = rollout(task, denoiser, FixedK(2), instances, rules=Rules(actions="set", nfe_budget=3), record=True)
    holes = (instances.tokens == task.mask_id).sum(1)
    left = (played.state.tokens == task.mask_id).sum(1)
    assert left.equal((holes - 6).clamp(min=0))
    assert (played.nfe <= 3).all()
    assert (played.reward[left > 0] == 0).all()
    assert len(played.steps) == 3


def test_remasking_goes_on_until_the_budget_of_forwards() -> None:
    """Every position is masked again whenever it can be: only the budget ends that."""
    task = TableTask(random_joint(2, 4, seed=1))
    instances = task.sample(8, torch.Generator().manual_seed(0))

    class Restless(Policy):
        def __call__(self, seen: Observation) -> Bernoulli:
            first = seen.fillable & (seen.fillable.cumsum(1) == 1)
            return Bernoulli(certainly(torch.cat([first, seen.remaskable], 1)), seen.action_mask)

    played = rollout(
        task, TableDenoiser(task.joint, task), Restless(), instances, rules=Rules("set+remask", nfe_budget=7)
    )
    assert (played.nfe == 7).all()
    assert (played.state.remask_count.sum(1) == 6).all()
    assert (played.reward == 0).all()


def test_errors_in_one_line() -> None:
    with pytest.raises(tasks.UnknownNameError, match="unknown reference policy 'luck'"):
        reference("luck")
    for make, message in (
        (lambda: reference("threshold", theta=0.5, tau=1), "takes theta, score, at_least; not tau"),
        (lambda: FixedK(0), "k must be a whole number of at least 1, not 0"),
        (lambda: FixedK(2, "luck"), "score must be confidence or margin or entropy, not 'luck'"),
        (lambda: SoftThreshold(theta=1.5), "theta must be a number above 0 and below 1, not 1.5"),
        (lambda: SoftThreshold(tau=0), "tau must be a number above 0, not 0"),
    ):
        with pytest.raises(tasks.UnmaskError, match=message):
            make()


def test_positions_are_masked_again_on_uniform_diffusion_too() -> None:
    """An absorbing denoiser of uniform diffusion: what is masked again holds noise, and is decided anew."""
    task = tasks.get("sudoku4")
    denoiser, instances = load_denoiser("sudoku4-audm", task), task.heldout(16)
    order, rules = SoftThreshold(0.8, 0.1, remask=0.3), Rules("set+remask", remask_budget=4)
    played = rollout(task, denoiser, order, instances, rules=rules, generator=torch.Generator().manual_seed(0))
    given = instances.tokens != task.mask_id
    assert played.state.remask_count.sum(1).max() == 4
    assert (played.state.tokens != task.mask_id).all()
    assert played.state.tokens[given].equal(instances.tokens[given])


def test_oracle_fills_what_is_right_and_masks_what_is_wrong() -> None:
    seen = observation(remask=True)
    top = seen.denoised.best
    answers = torch.where(torch.rand(top.shape, generator=torch.Generator().manual_seed(3)) < 0.5, top, (top + 1) % V)
    chosen = OracleSets(Oracle(answers))(seen).mode()
    fill, remask = chosen.split(L, 1)
    right = seen.fillable & (top == answers)
    some = right.any(1)
    assert some.any()
    assert torch.equal(fill[some], right[some])
    best = seen.confidence.masked_fill(~seen.fillable, -1.0).argmax(1)
    assert fill[~some].sum(1).eq(seen.fillable[~some].any(1)).all()
    assert all(fill[row, best[row]] for row in (~some & seen.fillable.any(1)).nonzero().squeeze(1).tolist())
    assert torch.equal(remask, seen.remaskable & (seen.tokens != answers))
    with pytest.raises(tasks.UnmaskError, match="sees the answers"):
        OracleSets()(seen)
    with pytest.raises(tasks.UnmaskError, match="not theta"):
        evaluate.load_order("oracle_sets:theta=1", tasks.get("sudoku4"))


def test_stability_measures_from_now_to_before() -> None:
    """By hand: KL(.9, .1 || .5, .5) = .368 is above .4 in the other direction only: KL(.5, .5 || .9, .1) = .511."""
    history = History(
        torch.ones(1).long(), torch.ones(1, 2), Denoised.of(torch.tensor([[[0.5, 0.5], [0.8, 0.2]]]).log())
    )
    assert filled_by(KLStability(0.85, 0.4), [[0.9, 0.95]], history) == [[0, 1]]
    assert filled_by(KLStability(0.85, 0.3), [[0.9, 0.95]], history) == [[1]]


def test_the_first_step_has_nothing_to_be_stable_to() -> None:
    """A row that has just begun beside others in play has their forward's place filled, and must not look at it."""
    same = Denoised.of(torch.tensor([[[0.9, 0.1], [0.8, 0.2]]]).log())
    for steps, filled in ((0, [[0]]), (1, [[0, 1]])):
        history = History(torch.tensor([steps]), torch.ones(1, 2), same)
        assert filled_by(KLStability(0.6, 0.01), [[0.9, 0.8]], history) == filled


def test_remdm_by_hand() -> None:
    """Forward 2 of 4: alpha_t = 1/2, alpha_s = 3/4, so sigma_max = (1 - 3/4) / (1/2) = 1/2."""
    tokens = torch.tensor([[2, 2, 0, 0]])
    seen = observation_of(
        tokens,
        tokens == 2,
        Denoised.of(torch.full((1, 4, 2), 0.5).log()),
        tokens != 2,
        history=History(torch.tensor([2]), torch.tensor([[1.0, 1.0, 0.9, 0.2]])),
    )
    for strategy, eta, sigma in (("cap", 0.04, 0.04), ("cap", 0.9, 0.5), ("rescale", 0.04, 0.02)):
        fill, remask = ReMDM(4, strategy, eta)(seen).entry_log_probs().exp().split(4, 1)
        torch.testing.assert_close(remask, torch.tensor([[0.0, 0.0, sigma, sigma]]))
        # Masked positions are filled more often, so that 3/4 are visible: 1 - (1 - 3/4 - sigma / 2) / (1 / 2).
        at = 1 - (0.25 - sigma / 2) / 0.5
        torch.testing.assert_close(fill, torch.tensor([[at, at, 0.0, 0.0]]))
    _, remask = ReMDM(4, "conf")(seen).entry_log_probs().exp().split(4, 1)
    share = torch.tensor([-0.9, -0.2]).softmax(0)  # the symbol that was unlikely when it was filled in goes first
    torch.testing.assert_close(remask[0, 2:], 0.5 * share)
    assert remask[0, 3] > remask[0, 2]


def test_remdm_conf_remembers_probabilities_in_a_rollout() -> None:
    """After the first forward, the remasking odds of the two filled positions follow their probabilities at filling."""
    joint = torch.tensor([[0.70, 0.10], [0.15, 0.05]])  # p(0) = .8 at position 0, .85 at position 1
    task = TableTask(joint)
    order = ReMDM(4, "conf")
    instances = Instances(torch.full((1, 2), 2), torch.zeros(1, 2, dtype=torch.long))
    generator = torch.Generator().manual_seed(1)
    played = rollout(
        task, TableDenoiser(joint), order, instances, rules=Rules("set+remask"), generator=generator, record=True
    )
    remembered = [step.observation.history.fill_prob[0] for step in played.steps if step.observation.remaskable.any()]
    assert remembered
    assert all((row < 1).any() for row in remembered)
