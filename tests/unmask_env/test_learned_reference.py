"""The order that a denoiser has learned, as a reference policy."""

import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from agents import upo
from agents.policy import PolicyConfig
from tasks import Instances, UnmaskError
from tests.oracles.boards import BOARDS, SEQUENCES, L, M, V, backbone, generator, hide
from tests.oracles.enumeration import TableTask, random_joint
from tests.toys import observation as observation_of
from tests.toys import rollout
from unmask_env import exact
from unmask_env.denoiser import FrozenDenoiser, TableDenoiser
from unmask_env.process import Unmasking
from unmask_env.reference import reference, require_full_support
from unmask_env.state import Denoised, Observation

INF = math.inf
LEARNED = ["positions", "symbols", "context"]

# ---------------------------------------------------------------------- the reference `learned`
TASK = TableTask(random_joint(V, L, seed=1), clues=())


def observe(denoiser: FrozenDenoiser, tokens: Tensor) -> Observation:
    return observation_of(tokens, tokens == M, denoiser(tokens))


@pytest.mark.parametrize("order", LEARNED)
def test_the_learned_reference_chooses_in_proportion_to_the_exponents(order):
    model = backbone(order=order)
    found = reference("learned")(observe(FrozenDenoiser(model, TASK), BOARDS)).log_probs
    own = model.order.reverse(*model(BOARDS))[1]
    spread = 0.0
    for board, row, log_prob in zip(BOARDS, own, found, strict=True):
        holes = (board == M).nonzero().flatten().tolist()
        assert all(log_prob[i] == -INF for i in range(L) if i not in holes)
        for i in holes:
            assert math.exp(log_prob[i]) == pytest.approx(float(row[i] / row[holes].sum()), rel=1e-4)
            spread = max(spread, abs(math.exp(log_prob[i]) - 1 / len(holes)))
    assert spread > 0.05, "the weights prefer some positions"


@pytest.mark.parametrize("order", LEARNED)
def test_the_greedy_learned_order_takes_the_largest_exponent(order):
    model = backbone(order=order)
    boards = BOARDS[(BOARDS == M).any(1)]
    found = reference("learned_greedy")(observe(FrozenDenoiser(model, TASK), boards)).log_probs.exp()
    own = model.order.reverse(*model(boards))[1].masked_fill(boards != M, -INF)
    best = own == own.max(1, keepdim=True).values
    torch.testing.assert_close(found, best / best.sum(1, keepdim=True).float())
    with pytest.raises(UnmaskError, match="deterministic reference learned_greedy"):
        require_full_support(reference("learned_greedy"))


@pytest.mark.parametrize("order", LEARNED)
def test_the_environment_fills_with_the_symbols_that_the_order_implies(order):
    model = backbone(order=order)
    denoised = FrozenDenoiser(model, TASK)(BOARDS)
    log_probs, own = model.order.reverse(*model(BOARDS))
    torch.testing.assert_close(denoised.log_probs, log_probs)
    torch.testing.assert_close(denoised.order_weights, own)


@pytest.mark.parametrize(
    "denoiser", [FrozenDenoiser(backbone(), TASK), TableDenoiser(TASK.joint)], ids=["none", "table"]
)
def test_a_denoiser_without_an_order_has_no_learned_reference(denoiser):
    assert denoiser(BOARDS).order_weights is None
    with pytest.raises(UnmaskError, match="this denoiser has learned no order") as caught:
        reference("learned")(observe(denoiser, BOARDS))
    assert "\n" not in str(caught.value)


def test_the_learned_reference_has_full_support_and_no_options():
    require_full_support(reference("learned"))
    with pytest.raises(UnmaskError, match="reference policy 'learned' takes no options; not tau"):
        reference("learned", tau=0.1)


def instances(n: int = 12) -> Instances:
    """With different numbers of holes."""
    drawn = TASK.sample(n, generator(4))
    shown = torch.arange(n).unsqueeze(1) % L > torch.arange(L)
    return Instances(torch.where(shown, drawn.answers, M), drawn.answers)


def test_outputs_joined_and_cut_keep_their_exponents():
    whole = FrozenDenoiser(backbone(order="context"), TASK)(BOARDS)
    parts = [FrozenDenoiser(backbone(order="context"), TASK)(some) for some in BOARDS.split(10)]
    joined = Denoised.join(parts, torch.cat)
    torch.testing.assert_close(joined.order_weights, whole.order_weights)
    observation = observation_of(BOARDS, BOARDS == M, whole)[torch.tensor([5, 2])]
    assert torch.equal(observation.denoised.order_weights, whole.order_weights[[5, 2]])
    assert Denoised.join([dataclasses.replace(whole, order_weights=None)] * 2, torch.cat).order_weights is None


def test_enumerated_boards_keep_their_exponents():
    model = backbone(order="context")
    graph = exact.enumerate_boards(Unmasking(TASK, FrozenDenoiser(model, TASK), temperature=1.0), instances(), batch=5)
    own = model.order.reverse(*model(BOARDS))[1]
    for level in graph.levels:
        at = (level.observation.tokens * torch.tensor([9, 3, 1])).sum(1)
        torch.testing.assert_close(level.observation.denoised.order_weights, own[at])
    table = exact.tabulate(graph, reference("learned"))
    values = exact.evaluate(graph, table, exact.tabulate(graph, reference("random")))
    assert values.trajectory_kl.max() > 0.01


def test_rollouts_flattened_for_upo_keep_their_exponents():
    model = backbone(order="context")
    played = rollout(
        TASK,
        FrozenDenoiser(model, TASK),
        reference("learned"),
        instances(),
        generator=generator(1),
        record=True,
    )
    batch = upo.flatten(played, torch.zeros(12))
    own = model.order.reverse(*model(batch.observation.tokens))[1]
    torch.testing.assert_close(batch.observation.denoised.order_weights, own)
    log_g = reference("learned")(batch.observation).log_probs
    torch.testing.assert_close(log_g[batch.action], batch.old_log_prob)


def test_the_learned_order_in_a_rollout_has_the_law_of_its_exponents():
    """First positions chosen on the empty board."""
    model, n = backbone(order="context"), 4000
    empty = Instances(torch.full((n, L), M), torch.zeros(n, L, dtype=torch.long))
    played = rollout(
        TASK,
        FrozenDenoiser(model, TASK),
        reference("learned"),
        empty,
        generator=generator(2),
        record=True,
    )
    found = played.steps[0].action.sum(0) / n
    own = model.order.reverse(*model(empty.tokens[:1]))[1][0]
    assert (found - own / own.sum()).abs().max() < 5 * 0.5 / n**0.5


@pytest.mark.trains
def test_upo_trains_against_the_learned_order(tmp_path: Path):
    settings = upo.UPOConfig(
        out=str(tmp_path / "run"),
        reference="learned",
        beta=0.1,
        iterations=2,
        puzzles=4,
        group=2,
        minibatches=2,
        threads=1,
        policy=PolicyConfig(copy=False, layers=1, dim=8, heads=2),
    )
    policy = upo.train(settings, Unmasking(TASK, FrozenDenoiser(backbone(order="context"), TASK)))
    assert all(p.isfinite().all() for p in policy.parameters())
    with pytest.raises(UnmaskError, match="has learned no order"):
        upo.train(
            dataclasses.replace(settings, out=str(tmp_path / "other")), Unmasking(TASK, TableDenoiser(TASK.joint))
        )


def test_hiding_is_what_the_other_tests_take_it_for():
    assert hide(SEQUENCES, (0, 2)).tolist() == [[M, b, M] for _, b, _ in itertools.product(range(V), repeat=L)]
