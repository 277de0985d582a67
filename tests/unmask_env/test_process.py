"""The decision process against hand-computed boards and exact enumeration."""

import dataclasses
import math
import re
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tasks
from tasks import IncompatibleDenoiserError, Instances, UnmaskError
from tests.oracles import enumeration
from tests.toys import FavouriteDenoiser, one_of, rollout, stepped
from unmask_env.denoiser import TableDenoiser
from unmask_env.process import Unmasking, checked_metrics
from unmask_env.reference import (
    Entropy,
    LeftToRight,
    Margin,
    MaxConfidence,
    Oracle,
    Policy,
    Random,
    SoftmaxConfidence,
    SoftmaxMargin,
    Threshold,
    TopK,
    reference,
)
from unmask_env.registration import make_process
from unmask_env.state import Denoised, InvalidActionError, Rules, State

M = 4  # the mask of a 4-symbol board

# A board of two rows: 3 positions, 4 symbols. Row 0 has holes at 0 and 2, row 1 at 1 only.
INSTANCES = Instances(torch.tensor([[M, 1, M], [2, M, 0]]), torch.tensor([[3, 1, 0], [2, 2, 0]]))
# The denoiser's favourites: row 0 says 3, 1, 2 (position 2 should be 0: a mistake); row 1 says 0, 2, 3.
FAVOURITE = torch.tensor([[3, 1, 2], [0, 2, 3]])
CONFIDENCE = torch.tensor([[-0.5, -0.1, -0.2], [-0.3, -0.2, -0.1]])
GIVEN = 1  # a position of row 0 that may not be filled
DENOISER = FavouriteDenoiser(FAVOURITE, CONFIDENCE, vocab_size=4)


class Line(tasks.Task):
    """Three positions of four symbols; the reward is the share of positions that equal the answer."""

    name, symbols, shape = "line", ("a", "b", "c", "d"), (1, 3)

    def sample(self, n: int, generator: torch.Generator) -> Instances:
        answers = torch.randint(4, (n, 3), generator=generator)
        return Instances(torch.full((n, 3), M), answers)

    def reward(self, tokens: Tensor, instances: Instances) -> Tensor:
        return (tokens == instances.answers).float().mean(1)


class Outcome(NamedTuple):
    """What one step did to rows that were in play."""

    state: State
    reward: Tensor
    terminated: Tensor
    truncated: Tensor
    illegal: Tensor


def act(state: State, action: Tensor, process: Unmasking) -> Outcome:
    after, reward = stepped(process, state, action)
    playing = ~state.done
    return Outcome(after, reward, after.terminated & playing, after.truncated & playing, after.illegal)


def begin(instances: Instances) -> State:
    return Unmasking(Line(), DENOISER).reset(instances)


def step(state: State, action: list[int], **options) -> Outcome:
    return act(state, one_of(action, 3), Unmasking(Line(), DENOISER, Rules(**options)))


def test_reset_masks_the_holes() -> None:
    state = begin(INSTANCES)
    assert state.tokens.tolist() == [[M, 1, M], [2, M, 0]]
    assert state.masked.tolist() == [[True, False, True], [False, True, False]]
    assert state.steps.tolist() == [0, 0]


def test_two_steps_by_hand() -> None:
    first = step(begin(INSTANCES), [2, 1])
    assert first.state.tokens.tolist() == [[M, 1, 2], [2, 2, 0]]
    assert first.state.masked.tolist() == [[True, False, False], [False, False, False]]
    assert first.reward.tolist() == [0.0, 1.0]  # row 1 is complete and right; row 0 is not finished
    assert first.reward.dtype == torch.float32
    assert first.terminated.tolist() == [False, True]
    assert first.truncated.tolist() == first.illegal.tolist() == [False, False]
    assert first.state.steps.tolist() == [1, 1]

    second = step(first.state, [0, 1])  # row 1 is finished: it idles, and its action is not illegal
    assert second.state.tokens.tolist() == [[3, 1, 2], [2, 2, 0]]
    assert second.reward.tolist() == pytest.approx([2 / 3, 0.0])  # position 2 was filled wrongly
    assert second.terminated.tolist() == [True, False]
    assert second.illegal.tolist() == second.truncated.tolist() == [False, False]
    assert second.state.steps.tolist() == [2, 1]


def test_the_given_state_is_not_written_to() -> None:
    state = begin(INSTANCES)
    step(state, [0, 1])
    state.put(torch.tensor([0]), begin(INSTANCES[1:]))
    assert state.tokens.tolist() == INSTANCES.tokens.tolist() == [[M, 1, M], [2, M, 0]]
    assert state.masked.tolist() == [[True, False, True], [False, True, False]]


def test_illegal_noop_changes_nothing_but_counts() -> None:
    after = step(begin(INSTANCES), [GIVEN, 1])
    assert after.state.tokens.tolist() == [[M, 1, M], [2, 2, 0]]
    assert after.state.masked[0].tolist() == [True, False, True]
    assert after.illegal.tolist() == [True, False]
    assert after.terminated.tolist() == [False, True]
    assert after.reward.tolist() == [0.0, 1.0]
    assert after.state.steps.tolist() == [1, 1]


def test_illegal_terminate_ends_the_episode_without_reward() -> None:
    after = step(begin(INSTANCES), [GIVEN, 1], on_illegal="terminate", nfe_budget=1)
    assert after.terminated.tolist() == [True, True]
    assert after.truncated.tolist() == [False, False]
    assert after.reward.tolist() == [0.0, 1.0]
    assert after.state.tokens[0].tolist() == [M, 1, M]


def test_illegal_raise_names_the_row_and_the_masked_positions() -> None:
    state = begin(INSTANCES)
    with pytest.raises(
        InvalidActionError, match=rf"row 0: positions \[{GIVEN}\] may not be filled now; those that may are \[0, 2\]"
    ):
        step(state, [GIVEN, 1], on_illegal="raise")
    step(state, [0, 1], on_illegal="raise")


def test_a_finished_row_may_act_anywhere_even_under_raise() -> None:
    state = step(begin(INSTANCES), [0, 1]).state
    after = step(state, [2, 0], on_illegal="raise", nfe_budget=1)
    assert after.illegal.tolist() == [False, False]
    assert after.truncated.tolist() == [False, False]


def test_truncation_by_hand() -> None:
    state = begin(INSTANCES)
    outcomes = []
    for _ in range(3):
        after = step(state, [1, 0], nfe_budget=2)
        state = after.state
        outcomes.append((after.truncated.tolist(), after.terminated.tolist()))
    assert outcomes[0] == ([False, False], [False, False])
    assert outcomes[1] == ([True, True], [False, False])
    last = step(step(begin(INSTANCES), [1, 0], nfe_budget=2).state, [0, 1], nfe_budget=2)
    assert last.truncated.tolist() == [True, False]  # row 1 became complete with its last action: terminated
    assert last.terminated.tolist() == [False, True]


def test_rows_put_anew_by_hand() -> None:
    state = step(begin(INSTANCES), [0, 1]).state
    fresh = Instances(torch.tensor([[0, M, 3]]), torch.tensor([[0, 1, 3]]))
    after = state.put(torch.tensor([1]), begin(fresh))
    assert after.tokens.tolist() == [[3, 1, M], [0, M, 3]]
    assert after.masked.tolist() == [[False, False, True], [False, True, False]]
    assert after.instances.answers.tolist() == [[3, 1, 0], [0, 1, 3]]
    assert after.instances.tokens.tolist() == [[M, 1, M], [0, M, 3]]
    assert after.steps.tolist() == [1, 0]


# ---------------------------------------------------------------------- rows are independent
@st.composite
def boards(draw, n: int) -> State:
    tokens = torch.tensor(draw(st.lists(st.integers(0, M), min_size=n * 3, max_size=n * 3))).view(n, 3)
    answers = torch.tensor(draw(st.lists(st.integers(0, M - 1), min_size=n * 3, max_size=n * 3))).view(n, 3)
    steps = torch.tensor(draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)))
    return dataclasses.replace(begin(Instances(tokens, answers)), steps=steps)


@st.composite
def pairs(draw):
    """Two batches that agree in row ``keep`` only: states, denoisers and actions."""
    n = draw(st.integers(1, 4))
    keep = draw(st.integers(0, n - 1))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    states, symbols, actions = [], [], []
    for _ in range(2):
        actions.append(torch.tensor(draw(st.lists(st.booleans(), min_size=n * 3, max_size=n * 3))).view(n, 3))
        states.append(draw(boards(n)))
        symbols.append(torch.randint(M, (n, 3), generator=generator))
    one = torch.tensor([keep])
    states[1] = states[1].put(one, states[0][one])
    for batch in (symbols, actions):
        batch[1][keep] = batch[0][keep]
    favourites = [FavouriteDenoiser(part, torch.full((n, 3), -0.5), vocab_size=4) for part in symbols]
    return keep, list(zip(states, favourites, actions, strict=True))


def flat(state: State) -> tuple[Tensor, ...]:
    return (
        state.instances.answers,
        state.instances.tokens,
        state.masked,
        state.steps,
        state.tokens,
        state.fill_prob,
        state.remask_count,
        state.done,
    )


@given(pair=pairs(), on_illegal=st.sampled_from(["noop", "terminate"]), actions=st.sampled_from(["single", "set"]))
def test_a_step_of_one_row_never_touches_another(pair, on_illegal, actions) -> None:
    keep, batches = pair
    rules = Rules(actions, on_illegal=on_illegal, nfe_budget=4)
    one, two = (act(state, action, Unmasking(Line(), favourite, rules)) for state, favourite, action in batches)
    for a, b in zip((*flat(one.state), *one[1:]), (*flat(two.state), *two[1:]), strict=True):
        assert torch.equal(a[keep], b[keep])


@given(data=st.data(), n=st.integers(1, 5))
def test_rows_put_anew_touch_no_others(data, n: int) -> None:
    state, fresh = data.draw(boards(n)), data.draw(boards(n)).instances
    rows = torch.tensor(data.draw(st.lists(st.integers(0, n - 1), unique=True)), dtype=torch.long)
    begun = begin(fresh[: len(rows)])
    after = state.put(rows, begun)
    others = torch.ones(n, dtype=torch.bool)
    others[rows] = False
    for old, new, first in zip(flat(state), flat(after), flat(begun), strict=True):
        assert torch.equal(new[others], old[others])
        assert torch.equal(new[rows], first)


# ---------------------------------------------------------------------- every order gives the data distribution
JOINTS = [enumeration.random_joint(3, 3, seed=0), enumeration.random_joint(3, 3, seed=1, zeros=12)]
ORDERS = {
    "random": Random(),
    "left_to_right": LeftToRight(),
    "max_confidence": MaxConfidence(),
    "margin": Margin(),
    "entropy": Entropy(),
    "softmax_confidence": SoftmaxConfidence(tau=0.2),
    "softmax_confidence, literal": SoftmaxConfidence(tau=0.2, literal=True),
    "softmax_margin": SoftmaxMargin(tau=0.2),
    "top_k": TopK(2),
    "oracle": Oracle(),
}


@pytest.mark.parametrize("joint", JOINTS, ids=["positive", "with zeros"])
@pytest.mark.parametrize("name", ORDERS)
def test_every_order_gives_the_joint_exactly(name: str, joint: Tensor) -> None:
    denoiser = TableDenoiser(joint)
    order = ORDERS[name]
    if name == "oracle":  # whatever the answer, an order cannot bend an exact denoiser's distribution
        order = Oracle(torch.tensor([[2, 0, 1]]))
    terminal = enumeration.terminal_distribution(order, denoiser, [3, 3, 3], vocab_size=3)
    torch.testing.assert_close(terminal, joint, atol=1e-6, rtol=0)

    given_clue = joint.clone()
    given_clue[:, [0, 2]] = 0
    terminal = enumeration.terminal_distribution(order, denoiser, [3, 1, 3], vocab_size=3)
    torch.testing.assert_close(terminal, given_clue / given_clue.sum(), atol=1e-6, rtol=0)


def test_the_enumeration_notices_a_denoiser_that_is_not_exact() -> None:
    joint = JOINTS[0]
    marginals = TableDenoiser(joint)(torch.tensor([[3, 3, 3]])).log_probs

    def independent(tokens: Tensor) -> Denoised:
        return Denoised.of(marginals.expand(len(tokens), -1, -1))

    terminal = enumeration.terminal_distribution(Random(), independent, [3, 3, 3], vocab_size=3)
    torch.testing.assert_close(terminal.sum(), torch.tensor(1.0, dtype=torch.float64))
    assert (terminal - joint).abs().max() > 0.05


@pytest.mark.parametrize("name", ORDERS)
def test_sampled_rollouts_follow_the_joint(name: str) -> None:
    joint, n = JOINTS[1], 20_000
    task, order = enumeration.TableTask(joint), ORDERS[name]
    denoiser = TableDenoiser(joint, task)
    done = rollout(
        task,
        denoiser,
        order,
        Instances(torch.full((n, 3), 3), torch.tensor([[2, 0, 1]]).expand(n, -1)),
        generator=torch.Generator().manual_seed(1),
        temperature=1.0,
        fill_generator=torch.Generator().manual_seed(2),
    )
    assert denoiser.calls == 3
    counts = (done.tokens @ torch.tensor([9, 3, 1])).bincount(minlength=27)
    p = joint.flatten()
    assert (counts[p == 0] == 0).all()
    possible = p > 0
    chi2 = float(((counts - n * p)[possible] ** 2 / (n * p[possible])).sum())
    freedom = int(possible.sum()) - 1
    assert chi2 < freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("group", [1, 4])
def test_groups_share_their_luck_and_each_row_still_follows_the_joint(group: int) -> None:
    """Whatever the order, a position gets the same random number in every row of a group: one of marginals alone, where
    orders change nothing, gives the same board; and over groups boards are drawn from the joint."""
    joint, n = JOINTS[1], 20_000
    instances = Instances(torch.full((n, 3), 3), torch.tensor([[2, 0, 1]]).expand(n, -1))

    def played(denoiser: TableDenoiser) -> Tensor:
        draws = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
        process = Unmasking(enumeration.TableTask(joint), denoiser, temperature=1.0)
        return process.rollout(Random(), instances, *draws, group=group).tokens.view(-1, group, 3)

    one, two, three = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.4, 0.4, 0.2]])
    independent = one[:, None, None] * two[:, None] * three
    alike = played(TableDenoiser(independent, enumeration.TableTask(independent)))
    assert (alike == alike[:, :1]).all()
    assert len(alike[:, 0].unique(dim=0)) == 27
    boards = played(TableDenoiser(joint, enumeration.TableTask(joint)))
    assert group == 1 or (boards != boards[:, :1]).any()  # an order still changes what a number means
    for member in range(group):
        p, m = joint.flatten(), n // group
        counts = (boards[:, member] @ torch.tensor([9, 3, 1])).bincount(minlength=27)
        chi2 = ((counts - m * p)[p > 0] ** 2 / (m * p[p > 0])).sum()
        freedom = int((p > 0).sum()) - 1
        assert float(chi2) < freedom + 5 * (2 * freedom) ** 0.5


def test_rows_are_whole_groups() -> None:
    task = enumeration.TableTask(JOINTS[1])
    process = Unmasking(task, TableDenoiser(JOINTS[1], task), temperature=1.0)
    instances = Instances(torch.full((5, 3), 3), torch.zeros(5, 3, dtype=torch.long))
    for group in (0, 2):
        with pytest.raises(UnmaskError, match=f"group must divide the rows, 5, not {group}"):
            process.rollout(Random(), instances, None, torch.Generator(), group=group)


def test_a_position_that_may_be_filled_twice_is_filled_apart_in_every_row() -> None:
    task = enumeration.TableTask(JOINTS[1])
    process = Unmasking(task, TableDenoiser(JOINTS[1], task), Rules("set+remask", remask_budget=2), temperature=1.0)
    instances = Instances(torch.full((64, 3), 3), torch.tensor([[2, 0, 1]]).expand(64, -1))
    draws = None, torch.Generator().manual_seed(2)
    played = process.rollout(reference("remdm"), instances, *draws, group=64)
    assert len(played.tokens.unique(dim=0)) > 1


def test_greedy_filling_takes_the_most_likely_symbol_and_random_orders_then_differ() -> None:
    # p(0, 0) = .4, p(1, 1) = .35, p(1, 0) = .25: symbol 1 leads in position 0 (.6), symbol 0 in position 1 (.65).
    joint = torch.tensor([[0.4, 0.0], [0.25, 0.35]])
    task = enumeration.TableTask(joint)
    start = Instances(torch.full((1, 2), 2), torch.tensor([[1, 1]]))

    def finish(order: Policy) -> list[int]:
        return rollout(task, TableDenoiser(joint), order, start).state.tokens[0].tolist()

    assert finish(LeftToRight()) == [1, 1]  # 1 first; then p(1 | 1) = .35 / .6
    assert finish(MaxConfidence()) == [0, 0]  # position 1 (.65 > .6) first; then p(0 | 0) = .4 / .65


def test_rollout_idles_short_rows_and_records_what_was_done() -> None:
    joint = enumeration.random_joint(3, 3, seed=2)
    task = enumeration.TableTask(joint)
    denoiser = TableDenoiser(joint, task)
    answers = torch.tensor([[0, 0, 0], [2, 1, 0], [2, 1, 0]])
    instances = Instances(torch.tensor([[3, 3, 3], [3, 1, 0], [2, 1, 0]]), answers)
    done = rollout(task, denoiser, Random(), instances, generator=torch.Generator().manual_seed(0), record=True)
    assert done.nfe.tolist() == [3, 1, 0]
    assert denoiser.calls == len(done.steps) == 3
    assert [s.alive.tolist() for s in done.steps] == [[True, True, False], [True, False, False], [True, False, False]]
    for k, recorded in enumerate(done.steps):
        assert float(recorded.log_prob[0].exp()) == pytest.approx(1 / (3 - k))
        assert bool((recorded.observation.fillable[0] & recorded.action[0]).sum() == 1)
    expected = task.reward(done.tokens, instances)
    assert done.reward.tolist() == [*expected[:2].tolist(), 0.0]  # the last row was complete from the start
    assert not done.state.masked.any()


def test_rollouts_refuse_what_does_not_suit_the_rules() -> None:
    process = make_process("sudoku4", "sudoku4")
    instances = process.task.heldout(4, "validation")
    for name in ("fixed_k", "remdm"):
        order = reference(name)
        with pytest.raises(UnmaskError, match=re.escape(f"{name} is for actions '{order.actions}', and the rules")):
            process.rollout(order, instances, torch.Generator().manual_seed(0))
    with pytest.raises(UnmaskError, match="a policy is played, not 'margin'"):
        process.rollout("margin", instances)
    sets = make_process("sudoku4", "sudoku4", actions="set")
    assert sets.rollout(reference("margin"), instances).reward.tolist() == [1.0] * 4  # one at a time is a set, too


class Overflowing(FavouriteDenoiser):
    """Fine in its first forward, no numbers at one position from then on."""

    def __call__(self, tokens: Tensor, where: Tensor | None = None) -> Denoised:
        denoised = super().__call__(tokens, where)
        if self.calls == 1:
            return denoised
        return Denoised.of(denoised.log_probs.index_fill(1, torch.tensor([2]), torch.nan))


def test_numbers_that_a_later_forward_loses_are_told() -> None:
    process = Unmasking(Line(), Overflowing(FAVOURITE, CONFIDENCE, vocab_size=4))
    assert process.rollout(MaxConfidence(), INSTANCES).nfe.tolist() == [2, 1]  # position 2 is filled by then
    process = Unmasking(Line(), Overflowing(FAVOURITE, CONFIDENCE, vocab_size=4))
    with pytest.raises(IncompatibleDenoiserError, match=r"no numbers \(NaN\) after forwards that were fine; float16"):
        process.rollout(LeftToRight(), INSTANCES)


def test_rollout_gives_the_oracle_its_answers() -> None:
    joint = torch.tensor([[0.4, 0.0], [0.25, 0.35]])
    task = enumeration.TableTask(joint)
    start = Instances(torch.full((2, 2), 2), torch.tensor([[1, 1], [0, 0]]))
    done = rollout(task, TableDenoiser(joint), Oracle(), start)
    assert done.reward.tolist() == [1.0, 1.0]  # it starts where the denoiser's favourite is right: 0, and 1


# ---------------------------------------------------------------------- sets, blocks, remasking
REMASK = {"actions": "set+remask"}


def step_sets(state: State, action: list[list[int]], **options) -> Outcome:
    rules = Rules(**({"actions": "set"} | options))
    return act(state, torch.tensor(action).bool(), Unmasking(Line(), DENOISER, rules))


def permitted(task: tasks.Task, state: State, rules: Rules) -> tuple[Tensor, Tensor | None]:
    return Unmasking(task, DENOISER, rules).permitted(state)


def test_a_set_fills_all_of_its_positions_in_one_forward() -> None:
    after = step_sets(begin(INSTANCES), [[1, 0, 1], [0, 1, 0]])
    assert after.state.tokens.tolist() == [[3, 1, 2], [2, 2, 0]]
    assert after.terminated.tolist() == [True, True]
    assert after.state.steps.tolist() == [1, 1]
    assert after.reward.tolist() == pytest.approx([2 / 3, 1.0])


def test_an_empty_set_fills_the_most_confident_position() -> None:
    after = step_sets(begin(INSTANCES), [[0, 0, 0], [0, 0, 0]])
    assert after.state.tokens.tolist() == [[M, 1, 2], [2, 2, 0]]  # position 1 of row 0 is more confident, but given
    assert not after.illegal.any()


def test_a_set_with_a_filled_position_is_illegal_as_a_whole() -> None:
    state, wrong = begin(INSTANCES), [[1, 1, 0], [0, 1, 0]]
    after = step_sets(state, wrong)
    assert after.illegal.tolist() == [True, False]
    assert after.state.tokens.tolist() == [[M, 1, M], [2, 2, 0]]
    assert after.state.steps.tolist() == [1, 1]
    ended = step_sets(state, wrong, on_illegal="terminate")
    assert ended.terminated.tolist() == [True, True]
    assert ended.reward.tolist() == [0.0, 1.0]
    with pytest.raises(
        InvalidActionError, match=r"row 0: positions \[1\] may not be filled now; those that may are \[0, 2\]"
    ):
        step_sets(state, wrong, on_illegal="raise")


def test_remasking_by_hand() -> None:
    state = step_sets(begin(INSTANCES), [[1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]], **REMASK).state
    fillable, remaskable = permitted(Line(), state, Rules(**REMASK))
    assert fillable.tolist() == [[False, False, True], [False, False, False]]
    assert remaskable.tolist() == [[True, False, False], [False, False, False]]  # given ones and finished boards never
    after = step_sets(state, [[0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 0]], **REMASK)
    assert after.state.tokens.tolist() == [[M, 1, 2], [2, 2, 0]]
    assert after.state.remask_count.tolist() == [[1, 0, 0], [0, 0, 0]]
    twice = step_sets(after.state, [[1, 0, 0, 0, 0, 0], [0] * 6], **REMASK)
    assert twice.terminated.tolist() == [True, False]
    assert after.state.put(torch.tensor([0]), begin(INSTANCES[:1])).remask_count.tolist() == [[0] * 3] * 2
    assert after.illegal.tolist() == [False, False]
    assert not after.terminated.any()
    spent = Rules(**REMASK, remask_budget=1)
    assert not permitted(Line(), after.state, spent)[1].any()
    for wrong, why in (
        ([0, 0, 1, 0, 1, 0], r"positions \[1\] may not be masked again"),
        ([1, 0, 0, 0, 0, 0], r"positions \[0\] may not be filled now"),
    ):
        with pytest.raises(InvalidActionError, match=why):
            step_sets(state, [wrong, [0] * 6], **REMASK, on_illegal="raise")


def test_no_more_positions_are_masked_again_than_the_budget_leaves() -> None:
    empty = Instances(torch.full((2, 3), M), torch.zeros(2, 3, dtype=torch.long))
    state = step_sets(begin(empty), [[1, 1, 0, 0, 0, 0]] * 2, **REMASK).state
    both = [[0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 0, 0]]
    after = step_sets(state, both, **REMASK, remask_budget=1)
    assert after.illegal.tolist() == [True, False]
    assert after.state.remask_count.tolist() == [[0, 0, 0], [1, 0, 0]]
    with pytest.raises(InvalidActionError, match="row 0: 2 positions to mask again, where the budget leaves 1"):
        step_sets(state, both, **REMASK, remask_budget=1, on_illegal="raise")


class Prompted(Line):
    """Seven positions, the first one a prompt."""

    shape, prompt_length = (1, 7), 1


def test_blocks_are_filled_one_after_the_other_behind_the_prompt() -> None:
    tokens = torch.tensor([[0, M, M, M, M, M, M], [0, 1, 1, M, 1, M, M], [0, 1, 1, 1, 1, 1, 1]])
    denoiser = FavouriteDenoiser(tokens.clamp(max=3), torch.full((3, 7), -0.5), vocab_size=4)
    state = Unmasking(Prompted(), denoiser).reset(Instances(tokens, tokens))
    fillable, _ = permitted(Prompted(), state, Rules(block_length=2))
    assert [row.nonzero().flatten().tolist() for row in fillable] == [[1, 2], [3], []]
    whole, _ = permitted(Prompted(), state, Rules(block_length=6))
    assert whole.equal(state.masked)
    action = one_of([3, 5, 0], 7)  # of later blocks: illegal
    after = act(state, action, Unmasking(Prompted(), denoiser, Rules(block_length=2)))
    assert after.illegal.tolist() == [True, True, False]


@pytest.mark.parametrize(
    "action", [torch.zeros(2, 1).bool(), torch.zeros(2, 3), torch.zeros(3, 3).bool(), torch.zeros(2, 6).bool()]
)
def test_actions_of_the_wrong_shape_or_kind_are_refused(action: Tensor) -> None:
    with pytest.raises(InvalidActionError, match=r"actions must be bool of shape \(2, 3\), not"):
        act(begin(INSTANCES), action, Unmasking(Line(), DENOISER))


def test_one_position_has_to_be_chosen() -> None:
    for action, count in (([[0, 0, 0], [0, 1, 0]], 0), ([[1, 0, 1], [0, 1, 0]], 2)):
        with pytest.raises(InvalidActionError, match=f"row 0: {count} positions where one must be chosen"):
            act(begin(INSTANCES), torch.tensor(action).bool(), Unmasking(Line(), DENOISER, Rules(on_illegal="raise")))


def test_single_positions_play_alike_under_every_kind_of_rules() -> None:
    joint = enumeration.random_joint(3, 3, seed=2)
    task = enumeration.TableTask(joint)
    instances = task.sample(20, torch.Generator().manual_seed(0))
    played = [
        rollout(
            task,
            TableDenoiser(joint),
            SoftmaxMargin(),
            instances,
            rules=Rules(actions),
            generator=torch.Generator().manual_seed(1),
        )
        for actions in ("single", "set", "set+remask")
    ]
    for other in played[1:]:
        assert torch.equal(other.tokens, played[0].tokens)
        assert torch.equal(other.nfe, played[0].nfe)


# ---------------------------------------------------------------------- speed, what is remembered, budgets
def test_an_episode_is_rewarded_for_its_speed_by_hand() -> None:
    """Two forwards for two masks count half: (H - NFE + 1) / H = 1/2; and one forward for one mask counts whole."""
    first = step(begin(INSTANCES), [2, 1], speed=1.0)
    assert first.reward.tolist() == [0.0, 1.0]
    assert step(first.state, [0, 0], speed=1.0).reward.tolist() == pytest.approx([2 / 3 / 2, 0.0])


def test_the_probability_of_filled_symbols_is_remembered() -> None:
    state = begin(INSTANCES)
    assert state.fill_prob.tolist() == [[1.0] * 3] * 2
    after = step(state, [2, 1]).state
    expected = torch.ones(2, 3)
    expected[0, 2], expected[1, 1] = math.exp(-0.2), math.exp(-0.2)
    torch.testing.assert_close(after.fill_prob, expected)
    later = step(after, [0, 0]).state
    torch.testing.assert_close(later.fill_prob[0], torch.tensor([math.exp(-0.5), 1.0, math.exp(-0.2)]))


def test_a_remask_budget_is_a_sum_over_positions() -> None:
    """Two different positions were masked again once each: a budget of 2 is spent, though no count is 2."""
    empty = Instances(torch.full((1, 3), M), torch.zeros(1, 3, dtype=torch.long))
    state = begin(empty)
    for action in ([1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0], [1, 0, 0, 0, 1, 0]):
        state = step_sets(state, [action], **REMASK).state
    assert state.remask_count.tolist() == [[1, 1, 0]]
    assert not permitted(Line(), state, Rules(**REMASK, remask_budget=2))[1].any()
    assert permitted(Line(), state, Rules(**REMASK, remask_budget=3))[1].any()


# ---------------------------------------------------------------------- what tasks and denoisers of users give
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.ones(2, 1), r"the reward of task line must be a tensor of shape \(2,\), not \(2, 1\)"),
        (torch.ones(()), r"shape \(2,\), not \(\)"),
        (torch.ones(1), r"shape \(2,\), not \(1,\)"),
        (torch.ones(3), r"shape \(2,\), not \(3,\)"),
        ([1.0, 1.0], r"shape \(2,\), not list"),
        (None, r"shape \(2,\), not NoneType"),
        (torch.tensor([1.0, torch.nan]), "the reward of task line must be finite; at row 1 it is nan"),
        (torch.tensor([-torch.inf, 0.0]), "must be finite; at row 0 it is -inf"),
        (torch.tensor([1.0, 1e300], dtype=torch.float64), "must be finite; at row 1 it is inf"),
        (torch.ones(2, dtype=torch.complex64), "of plain real numbers, not torch.complex64"),
        (torch.ones(2, device="meta"), "of plain real numbers, not torch.float32, torch.strided, on meta"),
        (torch.ones(2).to_sparse(), "of plain real numbers, not torch.float32, torch.sparse_coo"),
    ],
)
def test_rewards_of_another_form_are_refused(given, message: str) -> None:
    class Odd(Line):
        def reward(self, tokens: Tensor, instances: Instances) -> Tensor:
            return given

    with pytest.raises(tasks.UnmaskError, match=message) as raised:
        rollout(Odd(), DENOISER, LeftToRight(), INSTANCES)
    assert len(str(raised.value)) <= 300


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float64, torch.float16])
def test_rewards_of_every_number_type_are_float32(dtype: torch.dtype) -> None:
    class Odd(Line):
        def reward(self, tokens: Tensor, instances: Instances) -> Tensor:
            return torch.tensor([1, 0], dtype=dtype)

    reward = rollout(Odd(), DENOISER, LeftToRight(), INSTANCES).reward
    assert reward.dtype == torch.float32
    assert reward.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "the metrics of task line must be a dictionary with one at least, not None"),
        ({}, "with one at least"),
        ({"a": torch.ones(2, 1)}, r"the metric 'a' of task line must be a tensor of shape \(2,\), not \(2, 1\)"),
        ({"a": torch.tensor([0.0, torch.nan])}, "the metric 'a' of task line must be finite; at row 1 it is nan"),
    ],
)
def test_metrics_of_another_form_are_refused(given, message: str) -> None:
    class Odd(Line):
        def metrics(self, tokens: Tensor, instances: Instances) -> dict[str, Tensor]:
            return given

    with pytest.raises(tasks.UnmaskError, match=message):
        checked_metrics(Odd(), INSTANCES.answers, INSTANCES)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16])
def test_metrics_of_every_number_type_are_float32_without_a_gradient(dtype: torch.dtype) -> None:
    class Odd(Line):
        def metrics(self, tokens: Tensor, instances: Instances) -> dict[str, Tensor]:
            return {"a": torch.tensor([1, 0], dtype=dtype), "b": torch.ones(2, requires_grad=True)}

    shown = checked_metrics(Odd(), INSTANCES.answers, INSTANCES)
    assert [(value.dtype, value.requires_grad) for value in shown.values()] == [(torch.float32, False)] * 2
    assert shown["a"].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("denoiser", "parts"),
    [(None, ()), ("sudoku4", ()), (lambda tokens: tokens, ()), (DENOISER, ("device",))],
)
def test_what_is_no_denoiser_is_told(denoiser, parts) -> None:
    class Bare:
        device, hidden_dim = "cpu", None  # no torch.device

        def __call__(self, tokens: Tensor) -> None: ...

    with pytest.raises(IncompatibleDenoiserError, match="a denoiser is called with tokens and has device"):
        Unmasking(Line(), Bare() if parts else denoiser)


EVEN = torch.full((2, 3, 4), 0.25).log()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (EVEN, "the denoiser Odd returned a Tensor; it must return"),
        (None, "returned a NoneType; it must return"),
        (Denoised(4), r"of shape \(\) and type NoneType over 4 symbols; task line needs \(2, 3, 4\)"),
        (Denoised.of(EVEN[:1]), r"of shape \(1, 3, 4\) .* task line needs \(2, 3, 4\), torch.float32"),
        (Denoised.of(EVEN[:, :2]), r"of shape \(2, 2, 4\)"),
        (Denoised.of(EVEN[..., :3]), r"of shape \(2, 3, 3\) .* over 3 symbols"),
        (Denoised.of(EVEN[0]), r"of shape \(3, 4\)"),
        (Denoised.of(EVEN.sum()), r"of shape \(.*\) .* over 0 symbols"),
        (Denoised.of([[0.0]]), r"of shape \(\) and type list over 0 symbols"),
        (Denoised.of(EVEN.to("meta")), "log-probabilities on meta, torch.strided; the boards are on cpu"),
        (Denoised.of(torch.full_like(EVEN, -torch.inf)), "log-probabilities of -inf alone"),
        (Denoised.of(EVEN, order_weights=torch.full((2, 3), torch.nan)), "order weights that are not finite"),
        (Denoised.of(EVEN, order_weights=[1.0]), "order weights of shape list"),
        (replace(Denoised.of(EVEN), passes=torch.ones(2)), "passes of type torch.float32"),
        (Denoised.of(EVEN.double()), "type torch.float64"),
        (Denoised.of(EVEN.half()), "type torch.float16"),
        (
            Denoised.of(EVEN.masked_fill(torch.arange(3)[:, None] == 2, torch.nan)),
            "sum to nan, not 1, at row 0, position 2",
        ),
        (Denoised.of(EVEN.masked_fill(torch.arange(4) == 1, torch.inf)), "sum to inf, not 1, at row 0, position 0"),
        (Denoised.of(EVEN.exp()), r"sum to 5.136, not 1, at row 0, position 0; normalise them"),
        (Denoised.of(torch.zeros_like(EVEN)), "sum to 4, not 1"),
        (Denoised.of(EVEN - 1), "sum to 0.3679, not 1"),
        (Denoised.of(EVEN, hidden=torch.zeros(1, 3, 8)), r"hidden states of shape \(1, 3, 8\) for 2 boards of 3"),
        (Denoised.of(EVEN, order_weights=torch.zeros(2)), r"order weights of shape \(2,\) for 2 boards"),
    ],
)
def test_what_is_no_answer_of_a_denoiser_is_refused(answer, message: str) -> None:
    class Odd(FavouriteDenoiser):
        def __call__(self, tokens: Tensor, where: Tensor | None = None) -> Denoised:
            return answer

    denoiser = Odd(FAVOURITE, CONFIDENCE, vocab_size=4)
    with pytest.raises(tasks.IncompatibleDenoiserError, match=message) as raised:
        rollout(Line(), denoiser, LeftToRight(), INSTANCES)
    assert len(str(raised.value).splitlines()) == 1
    assert len(str(raised.value)) <= 300


def test_rows_that_go_missing_later_are_noticed_too() -> None:
    class Forgetful(FavouriteDenoiser):
        def __call__(self, tokens: Tensor, where: Tensor | None = None) -> Denoised:
            self.calls += 1
            return Denoised.of(EVEN[: 3 - self.calls])

    with pytest.raises(tasks.IncompatibleDenoiserError, match=r"of shape \(1, 3, 4\)"):
        rollout(Line(), Forgetful(FAVOURITE, CONFIDENCE, vocab_size=4), LeftToRight(), INSTANCES)


def test_forwards_in_parts_change_nothing() -> None:
    """The boards of a step in micro-batches: as many calls as parts, and the play of whole ones."""
    whole = make_process("sudoku6", "sudoku6-tiny", actions="set", block_length=12)
    parts = make_process("sudoku6", "sudoku6-tiny", actions="set", block_length=12, forward_batch=3)
    instances = whole.task.heldout(7)
    order = Threshold(theta=0.8)
    one, other = whole.rollout(order, instances, record=True), parts.rollout(order, instances, record=True)
    assert torch.equal(one.tokens, other.tokens)
    assert torch.equal(one.nfe, other.nfe)
    assert parts.denoiser.calls == 3 * whole.denoiser.calls
    for a, b in zip(one.steps, other.steps, strict=True):
        seen = (a.observation.denoised.log_probs, b.observation.denoised.log_probs)
        torch.testing.assert_close(*seen, rtol=0, atol=1e-5)
    with pytest.raises(UnmaskError, match="forward_batch must be a whole number of at least 1"):
        make_process("sudoku6", "sudoku6-tiny", forward_batch=0)
