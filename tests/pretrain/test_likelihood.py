"""The bounds on -log p(x), against enumeration of all masks, orders and sequences of three positions.

The models here are tables: arbitrary predictions and exponents for each of the 27 boards, in float64. With them the
bound is computed in three ways that share no code: as an integral over time of :func:`integrand`, as a sum over orders
of log-ratios of path densities, and as the sum over steps that :func:`bound` samples.
"""

import itertools
import math

import pytest
import torch
from torch import Tensor

from pretrain import likelihood
from pretrain.backbone import Backbone
from pretrain.masking import PolynomialSchedule, blocks_of
from pretrain.objectives.masked import integrand, masked_diffusion_loss
from tests.oracles.block_schedule import BlockSchedule
from tests.oracles.boards import (
    BOARDS,
    HIDDEN,
    KINDS,
    ORDERS,
    SEQUENCES,
    Exact,
    L,
    M,
    Tables,
    V,
    agrees,
    backbone,
    block_nll,
    close,
    counted,
    gauss,
    generator,
)

# ---------------------------------------------------------------------- models made of tables


# ---------------------------------------------------------------------- what they imply, by enumeration


# ---------------------------------------------------------------------- the bound, without sampling
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_three_forms_of_the_bound_are_one_number(kind, seed):
    exact = Exact(Tables(kind, seed))
    path, by_order = exact.step_form()
    close(exact.integral(), exact.path_bound())
    close(path, exact.path_bound())
    close(by_order, exact.order_bound())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_the_bounds_are_bounds_and_their_gaps_are_divergences(kind, seed):
    exact = Exact(Tables(kind, seed))
    close((-exact.nll()).exp().sum(), torch.tensor(1.0).double())  # the event process is a distribution
    posterior = [exact.joint(order) / (-exact.nll()).exp() for order in ORDERS]
    gap = sum(exact.chance(o) * (exact.chance(o) / p).log() for o, p in zip(ORDERS, posterior, strict=True))
    close(exact.order_bound() - exact.nll(), gap)
    assert (gap > 1e-4).all(), "predictions that fit no joint distribution leave a gap"
    assert (exact.waiting() > -1e-12).all()
    knows = kind in ("none", "positions")  # the model's exponents are those of the masking process
    assert knows == bool((exact.waiting() < 1e-12).all())


def test_equal_exponents_are_plain_masked_diffusion():
    exact = Exact(Tables("none"))
    average = sum(-exact.joint(order).log() - math.log(math.factorial(L)) for order in ORDERS) / len(ORDERS)
    close(exact.path_bound(), average)
    close(exact.order_bound(), average)


def test_a_common_factor_of_all_exponents_changes_nothing():
    """It only changes the pace of time."""
    exact = Exact(Tables("free"))
    path = exact.path_bound()
    exact.w, exact.own = 3 * exact.w, {hidden: 3 * own for hidden, own in exact.own.items()}
    close(exact.integral(), path)


def test_the_best_revealing_exponent_is_the_expected_masking_one():
    """Given the board: the rest of the bound is a Bregman divergence of the velocities."""
    model = Tables("free", 1)
    weight = torch.full((8,), 1 / 8).double()
    t = torch.tensor([0.3]).double()
    clean, masked = SEQUENCES, torch.tensor([True, True, False])
    w = model.order.order_weights(clean, model.trunk(clean)).detach()
    q = (
        torch.where(masked, PolynomialSchedule(w).masked_probability(t.expand(8)), 1 - t.unsqueeze(1) ** w).prod(1)
        * weight
    )
    q = q * (clean[:, 2] == 1)  # the sequences that the board M M 1 may come from
    expected = (q.unsqueeze(1) * w).sum(0) / q.sum()

    def value(own: Tensor) -> Tensor:
        velocity, reverse = w / t, own.expand(8, L) / t
        return (q * integrand(torch.zeros(8, L).double(), velocity, reverse, masked.expand(8, L))).sum()

    for change in itertools.product([0.9, 1.0, 1.1], repeat=2):
        moved = expected * torch.tensor([*change, 1.0])
        assert value(moved) >= value(expected) - 1e-15
        assert (change == (1.0, 1.0)) == (float(value(moved) - value(expected)) < 1e-12)


# ---------------------------------------------------------------------- the estimates
@pytest.mark.parametrize("kind", KINDS)
def test_estimates_are_unbiased(kind):
    model, copies = Tables(kind, 4), 3000
    exact = Exact(model)
    found = likelihood.bound(model, SEQUENCES.repeat(copies, 1), generator(1), samples=2)
    assert found.path.dtype == found.order.dtype == torch.float64
    assert found.path.shape == (8 * copies,)
    assert not found.exact
    assert found.truncated is None
    with torch.no_grad():
        agrees(found.path.view(copies, 8), exact.path_bound(), visible=0.1)
        agrees(found.order.view(copies, 8), exact.order_bound(), visible=0.1)


@pytest.mark.parametrize("samples", [1, 3, 5])
def test_estimates_are_unbiased_for_any_number_of_samples(samples):
    """Strata that do not fall on whole numbers of positions too."""
    model, copies = Tables("context", 2), 6000 // samples
    found = likelihood.bound(model, SEQUENCES.repeat(copies, 1), generator(2), samples=samples)
    with torch.no_grad():
        agrees(found.path.view(copies, 8), Exact(model).path_bound(), visible=0.05)
        agrees(found.order.view(copies, 8), Exact(model).order_bound(), visible=0.05)


def test_strata_take_each_number_of_positions_once():
    """With as many samples as positions every step of an order is seen, so predictions that depend on the number of
    hidden positions alone leave nothing to chance."""
    model = Tables("none")
    model.table.data[:] = 0
    model.table.data[..., 0] = 1.5 * (BOARDS == M).sum(1, keepdim=True)
    with torch.no_grad():
        expected = Exact(model).order_bound()
    close(likelihood.bound(model, SEQUENCES, generator(), samples=L).path[[0, -1]], expected[[0, -1]])
    close(likelihood.bound(model, SEQUENCES, generator(), samples=2 * L).order[[0, -1]], expected[[0, -1]])
    assert not torch.allclose(likelihood.bound(model, SEQUENCES, generator(), samples=1).path[0], expected[0])


@pytest.mark.parametrize("kind", ["none", "symbols", "context"])
def test_the_truncated_estimate_is_the_integral_that_it_says(kind):
    model, copies = Tables(kind, 5), 4000
    found = likelihood.bound(model, SEQUENCES.repeat(copies, 1), generator(3), samples=2, truncated=True)
    assert found.epsilon == 1e-3
    with torch.no_grad():
        agrees(found.truncated.view(copies, 8), Exact(model).integral(least=1e-3), visible=0.3)


@torch.no_grad()
def test_truncation_at_a_time_far_from_zero():
    """Where the share of time that is left out would show."""
    model, copies = Tables("context", 5), 4000
    exact, clean = Exact(model), SEQUENCES.repeat(copies, 1)
    found = likelihood._at_time(model, clean, PolynomialSchedule(exact.w.repeat(copies, 1)), generator(3), epsilon=0.3)
    agrees(found.view(copies, 8), exact.integral(least=0.3), visible=0.05)


@pytest.mark.parametrize("c1", [0.7, 0.3])
def test_the_truncated_integral_is_no_bound(c1):
    """For exponents below 1 much is dropped: with equal exponents and certain-free predictions, a share eps^w."""
    model = Tables("context")
    model.table.data[:] = 0
    model.order.c1, model.order.c2 = c1, 0.0
    exact = Exact(model)
    expected = torch.full((8,), L * math.log(V) * (1 - 1e-3**c1)).double()
    close(exact.integral(least=1e-3), expected, 1e-6)  # the context order computes in float32
    assert (exact.integral(least=1e-3) < exact.nll() - 0.01).all()
    model = Tables("context", 3)
    assert (Exact(model).integral(least=1e-3) < Exact(model).path_bound()).all()


def test_the_same_generator_gives_the_same_estimate():
    model = Tables("context")
    one, same, other = (likelihood.bound(model, SEQUENCES, generator(seed), truncated=True) for seed in (0, 0, 1))
    for name in ("path", "order", "truncated"):
        assert torch.equal(getattr(one, name), getattr(same, name))
        assert not torch.equal(getattr(one, name), getattr(other, name))


def test_mean_and_error_by_hand():
    mean, error = likelihood.mean_and_error(torch.tensor([1.0, 2.0, 6.0]))
    assert mean == pytest.approx(3.0)
    assert error == pytest.approx((7 / 3) ** 0.5)  # the variance is (4 + 1 + 9) / 2


# ---------------------------------------------------------------------- windows
def window_integral(exact: Exact, block: Tensor) -> Tensor:
    """(N,) the integral over t of the expected integrand under a window schedule, exact within each window."""
    windows = BlockSchedule(block)
    total = torch.zeros(len(exact.w), dtype=torch.float64)
    for window in range(windows.blocks):
        nodes, weights = gauss(window / windows.blocks, (window + 1) / windows.blocks)
        probability, velocity = windows.masked_probability(nodes), windows.velocity(nodes)
        for hidden in HIDDEN:
            masked = torch.zeros(L, dtype=torch.bool)
            masked[list(hidden)] = True
            q = torch.where(masked, probability, 1 - probability).prod(1)
            for n in range(len(total)):
                ce = exact.ce[hidden][n].expand(len(nodes), L)
                total[n] += (weights * q * integrand(ce, velocity, velocity, masked.expand(ce.shape))).sum()
    return total


def order_average(exact: Exact, orders: list[tuple[int, ...]]) -> Tensor:
    """(N,) -log p(x) of the chain rule, averaged over ``orders``."""
    return sum(exact.ce[hidden][:, i] for order in orders for i, hidden, _, _ in exact.along(order)) / len(orders)


def block_orders(length: int) -> list[tuple[int, ...]]:
    """All orders that finish a block before the next one."""
    block = blocks_of(L, length).tolist()
    return [order for order in ORDERS if [block[i] for i in order] == sorted(block)]


@torch.no_grad()
@pytest.mark.parametrize(("length", "orders"), [(1, 1), (2, 2), (3, 6)])
def test_windows_average_over_the_orders_within_blocks(length, orders):
    """Blocks of one are autoregression, a block of all is masked diffusion, others are block diffusion."""
    exact = Exact(Tables("none", 6))
    assert len(block_orders(length)) == orders
    expected = order_average(exact, block_orders(length))
    close(window_integral(exact, blocks_of(L, length)), expected)
    if length == 1:
        close(expected, exact.ce[0, 1, 2][:, 0] + exact.ce[1, 2][:, 1] + exact.ce[2,][:, 2])
    if length == 3:
        close(expected, exact.integral())


@torch.no_grad()
def test_an_extreme_schedule_per_position_is_nearly_autoregressive():
    exact = Exact(Tables("none", 6))
    expected = order_average(exact, [(0, 1, 2)])
    gaps = []
    for ratio in (4.0, 40.0, 400.0):
        exact.w = torch.tensor([ratio**2, ratio, 1.0]).double().expand(8, L)
        exact.own = dict.fromkeys(HIDDEN, exact.w)
        gaps.append(float((exact.path_bound() - expected).abs().max()))
    assert gaps[0] > 4 * gaps[1] > 16 * gaps[2] > 0


# ---------------------------------------------------------------------- bounds of blocks


@pytest.mark.parametrize("length", [3, 5])
def test_autoregressive_models_have_an_exact_likelihood(length):
    model = backbone(1, length=length)
    every = torch.tensor(list(itertools.product(range(V), repeat=length)))
    found = likelihood.bound(model, every, generator(), samples=4)
    assert found.exact
    close(found.path, block_nll(model, every), 1e-5)
    assert torch.equal(found.path, found.order)
    assert float((-found.path).exp().sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("block_length", "length"), [(2, 3), (3, 3), (2, 4), (3, 5)])
def test_estimates_of_block_models_are_unbiased(block_length, length):
    """The last block may be shorter."""
    model, copies = backbone(block_length, length=length, seed=1), 1500
    clean = torch.randint(V, (8, length), generator=generator(8))
    expected = block_nll(model, clean)
    for samples in (1, 3):
        found = likelihood.bound(model, clean.repeat(copies, 1), generator(9), samples=samples)
        assert not found.exact
        agrees(found.path.view(copies, 8), expected, visible=0.25)
        assert torch.equal(found.path, found.order)


def test_one_block_of_all_positions_is_the_bound_of_masked_diffusion():
    model, copies = backbone(seed=2), 3000
    expected = Exact(model).order_bound().detach()
    model.block_length = L
    found = likelihood.bound(model, SEQUENCES.repeat(copies, 1), generator(4), samples=1)
    agrees(found.path.view(copies, 8), expected, visible=0.1)


def test_how_many_forwards_an_estimate_takes():
    model = backbone(order="context")
    rows = counted(model, "forward")
    likelihood.bound(model, SEQUENCES, generator(), samples=5)
    assert rows == [8] * 5
    for block_length, forwards in ((1, 1), (2, 5)):
        model = backbone(block_length)
        rows = counted(model, "predict_blocks")
        likelihood.bound(model, SEQUENCES, generator(), samples=5)
        assert rows == [8] * forwards


def test_estimates_leave_no_graph_and_no_gradient():
    model = backbone(order="context")
    found = likelihood.bound(model, SEQUENCES, generator(), truncated=True)
    assert not found.path.requires_grad
    assert not found.truncated.requires_grad


@pytest.mark.parametrize("kind", ["none", "positions", "symbols", "context"])
def test_estimates_of_a_backbone_are_unbiased(kind):
    model, copies = backbone(order=kind, seed=3), 2000
    with torch.no_grad():
        exact = Exact(model)
        found = likelihood.bound(model, SEQUENCES.repeat(copies, 1), generator(5), samples=3)
        agrees(found.path.view(copies, 8), exact.path_bound(), visible=0.1)
        agrees(found.order.view(copies, 8), exact.order_bound(), visible=0.1)


# ---------------------------------------------------------------------- prompts
def after_the_first(model: Backbone) -> Tensor:
    """(8,) the bound on -log p(x2, x3 | x1) by hand: the mean over both orders of the sum of cross-entropies."""

    def cross_entropy(at: int, hidden: list[int]) -> Tensor:
        board = SEQUENCES.clone()
        board[:, hidden] = M
        log_probs = model(board).logits.double().log_softmax(-1)
        return -log_probs[:, at].gather(1, SEQUENCES[:, at : at + 1]).squeeze(1)

    orders = [cross_entropy(1, [1, 2]) + cross_entropy(2, [2]), cross_entropy(2, [1, 2]) + cross_entropy(1, [1])]
    return torch.stack(orders).mean(0)


@torch.no_grad()
def test_prompts_are_given_and_what_is_behind_them_is_bounded():
    model, copies = backbone(prompt_length=1), 2000
    exact = after_the_first(model)
    found = likelihood.bound(model, SEQUENCES.repeat(copies, 1), generator(6), samples=3, truncated=True)
    agrees(found.path.view(copies, 8), exact, visible=0.1)
    agrees(found.order.view(copies, 8), exact, visible=0.1)
    agrees(found.truncated.view(copies, 8), exact, visible=0.1)
    draws = [
        2 * float(masked_diffusion_loss(model, SEQUENCES, M, generator(seed), prompt_length=1)) for seed in range(3000)
    ]
    agrees(torch.tensor(draws).double().unsqueeze(1), exact.mean().unsqueeze(0), visible=0.1)
