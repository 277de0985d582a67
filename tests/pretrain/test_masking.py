"""Schedules, the probabilities of masks and the orders in which positions come back, by hand and by enumeration."""

import itertools
import math

import pytest
import torch

from pretrain.masking import PolynomialSchedule, blocks_of, low_discrepancy_times, mask, plackett_luce
from tests.oracles.block_schedule import BlockSchedule
from tests.oracles.statistics import chi_square, plackett_luce_probability

W = torch.tensor([[0.05, 0.7, 1.35], [1.0, 1.0, 4.0]], dtype=torch.float64)
MASKS = torch.tensor(list(itertools.product([False, True], repeat=3)))  # (8, 3)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------- schedules
SCHEDULES = {
    "powers": PolynomialSchedule(W[:1]),
    "autoregressive": BlockSchedule(torch.arange(3)),
    "blocks": BlockSchedule(torch.tensor([0, 0, 1])),
    "one block": BlockSchedule(torch.zeros(3, dtype=torch.long)),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_velocity_is_the_rate_at_which_masked_positions_return(name):
    """A = -alpha' / (1 - alpha), the derivative taken numerically; 0 where alpha stands still."""
    schedule = SCHEDULES[name]
    t = torch.tensor([0.02, 0.1, 0.3, 0.45, 0.51, 0.6, 0.7, 0.9, 0.99]).double()  # away from the windows' ends
    step = 1e-6
    slope = (schedule.masked_probability(t + step) - schedule.masked_probability(t - step)) / (2 * step)
    probability, velocity = schedule.masked_probability(t), schedule.velocity(t)
    assert probability.shape == velocity.shape == (9, 3)
    torch.testing.assert_close(velocity * probability, slope, rtol=1e-6, atol=1e-9)
    assert (velocity[slope > 1e-6] > 0).all()
    assert (velocity[slope < 1e-6] == 0).all(), "what is hidden for certain or not at all does not return now"


@pytest.mark.parametrize("name", SCHEDULES)
def test_everything_is_visible_at_the_start_and_hidden_at_the_end(name):
    ends = SCHEDULES[name].masked_probability(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert ends.tolist() == [[0.0] * 3, [1.0] * 3]
    grid = SCHEDULES[name].masked_probability(torch.linspace(0, 1, 200, dtype=torch.float64))
    assert (grid.diff(dim=0) >= 0).all(), "time only hides"


def test_powers_by_hand():
    schedule = PolynomialSchedule(torch.tensor([[1.0, 2.0, 0.5]]))
    t = torch.tensor([0.25, 1.0])
    expected = torch.tensor([[0.25, 0.0625, 0.5], [1.0, 1.0, 1.0]])
    torch.testing.assert_close(schedule.masked_probability(t), expected)
    torch.testing.assert_close(schedule.velocity(t), torch.tensor([[4.0, 8.0, 2.0], [1.0, 2.0, 0.5]]))


def test_windows_by_hand():
    """Generation runs from t = 1 down: the first block's window is the last third of time."""
    schedule = BlockSchedule(torch.arange(3))
    assert schedule.blocks == 3
    t = torch.tensor([5 / 6, 0.5, 1 / 6], dtype=torch.float64)
    half = [[0.5, 1, 1], [0, 0.5, 1], [0, 0, 0.5]]
    torch.testing.assert_close(schedule.masked_probability(t), torch.tensor(half).double())
    torch.testing.assert_close(schedule.velocity(t), 6 * torch.eye(3).double())  # 3 blocks over a local time of 1/2


def test_one_block_is_the_linear_schedule():
    t = torch.tensor([0.1, 0.5, 1.0]).double()
    one, linear = SCHEDULES["one block"], PolynomialSchedule(torch.ones(1, 3).double())
    torch.testing.assert_close(one.masked_probability(t), linear.masked_probability(t))
    torch.testing.assert_close(one.velocity(t), linear.velocity(t))


@pytest.mark.parametrize(
    ("length", "block_length", "expected"),
    [(5, 1, [0, 1, 2, 3, 4]), (5, 2, [0, 0, 1, 1, 2]), (4, 2, [0, 0, 1, 1]), (3, 3, [0, 0, 0]), (3, 9, [0, 0, 0])],
)
def test_blocks_of_a_length(length, block_length, expected):
    assert blocks_of(length, block_length).tolist() == expected
    assert BlockSchedule(blocks_of(length, block_length)).blocks == expected[-1] + 1


# ---------------------------------------------------------------------- probabilities of masks
@pytest.mark.parametrize("t", [1e-12, 1e-3, 0.4, 1 - 1e-5, 1 - 1e-12, 1.0])
@pytest.mark.parametrize("row", [0, 1])
def test_the_probabilities_of_all_masks_sum_to_one(t, row):
    log_q = PolynomialSchedule(W[row : row + 1]).log_probability(MASKS, torch.full((8,), t, dtype=torch.float64).log())
    assert log_q.shape == (8,)
    assert log_q.isfinite().all()
    torch.testing.assert_close(log_q.exp().sum(), torch.tensor(1.0).double(), rtol=0, atol=1e-12)


def test_the_probability_of_a_mask_by_hand():
    w, t = W[1], 0.3
    for hidden, log_q in zip(
        MASKS, PolynomialSchedule(W[1:]).log_probability(MASKS, torch.full((8,), t).double().log()), strict=True
    ):
        expected = math.prod(t ** float(a) if h else 1 - t ** float(a) for a, h in zip(w, hidden, strict=True))
        assert math.exp(log_q) == pytest.approx(expected, rel=1e-6)


def test_the_frequencies_of_masks_are_their_probabilities():
    """The masks that :func:`mask` draws with the schedule's probabilities, against log_probability."""
    n, t = 100_000, torch.tensor([0.4], dtype=torch.float64)
    schedule = PolynomialSchedule(W[:1])
    hidden = mask(torch.zeros(n, 3, dtype=torch.long), schedule.masked_probability(t), 1, generator(1)) == 1
    counts = (hidden.long() * torch.tensor([4, 2, 1])).sum(1).bincount(minlength=8).double()
    chi_square(counts, schedule.log_probability(MASKS, t.expand(8).log()).exp())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("t", [1.0, 1 - 6e-8, 0.999, 0.5, 1e-4, 6e-8 / 256, 1e-30])
def test_gradients_of_mask_probabilities_are_finite(t, dtype):
    """At every time that low_discrepancy_times can give, for every mask."""
    w = W[:1].to(dtype).requires_grad_()
    log_q = PolynomialSchedule(w).log_probability(MASKS, torch.full((8,), t, dtype=dtype).log())
    assert log_q.isfinite().all()
    for value in log_q:
        (gradient,) = torch.autograd.grad(value, w, retain_graph=True)
        assert gradient.isfinite().all()
        assert (gradient != 0).any() or t < 1e-20  # a visible position is certain there


def test_a_masked_position_with_an_exponent_of_almost_nothing_has_a_finite_gradient():
    """There alpha rounds to 0, and its logarithm, which is not asked for, has no gradient."""
    w = torch.tensor([[1e-42, 1.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(
        PolynomialSchedule(w).log_probability(torch.tensor([[True, False]]), torch.zeros(1)).sum(), w
    )
    assert gradient.isfinite().all()


def test_the_gradient_of_a_mask_probability_is_right():
    t = torch.full((8,), 0.37, dtype=torch.float64)
    one = W[1:].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda w: PolynomialSchedule(w).log_probability(MASKS, t.log()), one)


# ---------------------------------------------------------------------- orders
ORDERS = list(itertools.permutations(range(3)))


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.375, 0.7, 1.025], [0.05, 1.0, 8.0]])
def test_ranks_are_drawn_from_plackett_luce(weights):
    n, w = 200_000, torch.tensor(weights, dtype=torch.float64)
    rank = plackett_luce(w.expand(n, 3), generator(2))
    assert torch.equal(rank.sort(1).values, torch.arange(3).expand(n, 3))
    order = rank.argsort(1)  # the position of each rank
    counts = (order * torch.tensor([9, 3, 1])).sum(1).bincount(minlength=27).double()
    at = [9 * a + 3 * b + c for a, b, c in ORDERS]
    assert counts[at].sum() == n
    chi_square(counts[at], torch.tensor([plackett_luce_probability(w, order) for order in ORDERS]).double())


def test_each_row_of_ranks_has_its_own_weights():
    n = 20_000
    w = torch.tensor([[9.0, 1.0], [1.0, 1.0]]).repeat(n, 1)
    first = (plackett_luce(w, generator(3))[:, 0] == 0).double().view(n, 2).mean(0)
    assert first[0] == pytest.approx(0.9, abs=5 * 0.3 / n**0.5)
    assert first[1] == pytest.approx(0.5, abs=5 * 0.5 / n**0.5)
    assert torch.equal(plackett_luce(w, generator(3)), plackett_luce(w, generator(3)))


def test_masking_at_one_time_leaves_plackett_luce_orders():
    """Positions hidden when k are hidden: those of the last k ranks, as the order of masking times says."""
    n, w = 100_000, W[0]
    hidden_last = plackett_luce(w.expand(n, 3), generator(4)).argmax(1)
    u = torch.rand(n, 3, generator=generator(5), dtype=torch.float64)
    times = u ** (1 / w)  # masked at the time T with P(T < t) = t^w; revealed in descending order
    for position in range(3):
        one, other = ((last == position).double().mean() for last in (hidden_last, times.argmin(1)))
        assert abs(one - other) < 5 * (0.5 / n) ** 0.5


def test_times_stay_above_zero_and_reach_one():
    """What Powers.log_probability and 1 / t rest on, also where the shared draw comes close to 1."""
    for n in (1, 256):
        t = torch.cat([low_discrepancy_times(n, generator(seed)) for seed in range(500)])
        assert t.min() > 0
        assert t.max() <= 1
        assert t.max() > 1 - 0.05 / n
        assert t.min() < 0.05 / n


# ---------------------------------------------------------------------- the time of a share
@pytest.mark.parametrize(
    "weights", [[1.0, 1.0, 1.0], [0.05, 1.0, 1.95], [1e-3, 0.5, 2.0, 7.0], [1e-6, 5.0, 30.0], [4.0]], ids=str
)
@pytest.mark.parametrize("share", [1e-6, 0.01, 0.3, 0.9, 1 - 1e-6])
def test_the_time_at_which_a_share_is_masked(weights, share):
    log_t = PolynomialSchedule(torch.tensor([weights])).log_time(torch.tensor([share], dtype=torch.float64))
    assert float((torch.tensor(weights).double() * log_t).exp().mean()) == pytest.approx(share, rel=1e-10)


def test_times_of_shares_at_the_ends_and_of_one_schedule_for_all():
    shares = torch.tensor([0.25, 0.5, 1.0])
    one = PolynomialSchedule(torch.tensor([[0.3, 2.0]])).log_time(shares)
    each = PolynomialSchedule(torch.tensor([[0.3, 2.0]] * 3)).log_time(shares)
    assert torch.equal(one, each)
    assert one[2] == 0
    assert torch.equal(PolynomialSchedule(torch.ones(1, 5)).log_time(shares).exp().float(), shares)
