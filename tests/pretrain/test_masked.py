"""The masking process and the masked-diffusion objective, against enumeration of all masks, orders and sequences."""

import itertools
import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from pretrain.backbone import Backbone
from pretrain.masking import low_discrepancy_times, mask
from pretrain.objectives.masked import masked_diffusion_loss
from pretrain.train import MDMConfig

V, L, M = 2, 3, 2
SEQUENCES = torch.tensor(list(itertools.product(range(V), repeat=L)))  # (8, 3)
JOINT = torch.tensor([0.30, 0.05, 0.02, 0.13, 0.08, 0.20, 0.15, 0.07], dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Logits(NamedTuple):
    logits: Tensor


class Conditionals(nn.Module):
    """Returns the exact log p(x_l = v | visible tokens) of a joint distribution over ``SEQUENCES``."""

    def __init__(self, joint: Tensor) -> None:
        super().__init__()
        self.joint = joint

    def forward(self, tokens: Tensor) -> Logits:
        agree = ((tokens[:, None] == SEQUENCES) | (tokens[:, None] == M)).all(2)  # (N, 8)
        weight = agree * self.joint  # unnormalised posterior over sequences
        onehot = nn.functional.one_hot(SEQUENCES, V).double()  # (8, L, V)
        return Logits((torch.einsum("ns,slv->nlv", weight, onehot) / weight.sum(1)[:, None, None]).log())


def masks() -> list[tuple[int, ...]]:
    return [subset for size in range(1, L + 1) for subset in itertools.combinations(range(L), size)]


def masked_cross_entropy(model: nn.Module, clean: Tensor, hidden: tuple[int, ...]) -> Tensor:
    """(N,) sum over hidden l of -log p(x_l | the others)."""
    noisy = clean.clone()
    noisy[:, list(hidden)] = M
    log_p = model(noisy).logits.log_softmax(2)
    return -log_p.gather(2, clean.unsqueeze(2)).squeeze(2)[:, list(hidden)].sum(1)


def exact_bound(model: nn.Module, clean: Tensor) -> Tensor:
    """(N,) integral over t in [0, 1] of 1/t * sum over masks: t integrates to (k - 1)! (L - k)! / L!."""
    total = torch.zeros(len(clean), dtype=torch.float64)
    for hidden in masks():
        k = len(hidden)
        weight = math.factorial(k - 1) * math.factorial(L - k) / math.factorial(L)
        total += weight * masked_cross_entropy(model, clean, hidden).double()
    return total


def order_average(model: nn.Module, clean: Tensor) -> Tensor:
    """(N,) -log p(x) of the chain rule, averaged over all L! orders."""
    totals = []
    for order in itertools.permutations(range(L)):
        total = torch.zeros(len(clean), dtype=torch.float64)
        for step, l_next in enumerate(order):
            noisy = clean.clone()
            noisy[:, list(order[step:])] = M
            log_p = model(noisy).logits.log_softmax(2)[:, l_next]
            total -= log_p.gather(1, clean[:, l_next : l_next + 1]).squeeze(1).double()
        totals.append(total)
    return torch.stack(totals).mean(0)


class Inconsistent(nn.Module):
    """A fixed table of random logits per masked sequence: not the conditionals of any joint distribution."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.randn((M + 1) ** L, L, V, generator=generator(7))

    def forward(self, tokens: Tensor) -> Logits:
        return Logits(self.table[tokens @ torch.tensor([(M + 1) ** l for l in range(L)])])  # noqa: E741


# ---------------------------------------------------------------------- the process
@pytest.mark.parametrize("n", [1, 4, 33, 1000])
def test_one_time_in_each_interval(n):
    for seed in range(20):
        t = low_discrepancy_times(n, generator(seed))
        assert t.shape == (n,)
        assert (t > 0).all()
        assert (t <= 1).all()
        assert (t * n - torch.arange(n)).min() > -1e-3
        assert (t * n - torch.arange(1, n + 1)).max() < 1e-3
        torch.testing.assert_close(t.diff(), torch.full((n - 1,), 1 / n), atol=1e-6, rtol=0)


def test_times_are_uniform_on_average():
    draws = torch.stack([low_discrepancy_times(4, generator(seed)) for seed in range(2000)])
    # Each t_i is uniform on an interval of width 1/4: standard deviation 1/4/sqrt(12), here of the mean of 2000.
    tolerance = 4 * 0.25 / 12**0.5 / 2000**0.5
    expected = (torch.arange(4) + 0.5) / 4
    assert (draws.mean(0) - expected).abs().max() < tolerance
    assert draws.mean().item() == pytest.approx(0.5, abs=tolerance)
    assert torch.equal(low_discrepancy_times(4, generator(1)), low_discrepancy_times(4, generator(1)))


def test_masking_at_the_ends_and_in_between():
    clean = torch.randint(0, 6, (2000, 50), generator=generator(1))
    t = torch.linspace(0, 1, 2000)
    noisy = mask(clean, t.unsqueeze(1), 6, generator(2))
    assert torch.equal(noisy[0], clean[0]), "t = 0 hides nothing"
    assert (noisy[-1] == 6).all(), "t = 1 hides everything"
    hidden = noisy == 6
    assert torch.equal(noisy[~hidden], clean[~hidden])
    for part, times in zip(hidden.chunk(10), t.chunk(10), strict=True):
        count = part.numel()
        assert abs(part.double().mean() - times.mean()) < 4 * 0.5 / count**0.5
    assert torch.equal(noisy, mask(clean, t.unsqueeze(1), 6, generator(2)))
    assert not torch.equal(noisy, mask(clean, t.unsqueeze(1), 6, generator(3)))


def test_all_ends_for_many_seeds():
    clean = torch.zeros(2, 1000, dtype=torch.long)
    for seed in range(50):
        noisy = mask(clean, torch.tensor([[0.0], [1.0]]), 1, generator(seed))
        assert noisy.sum(1).tolist() == [0, 1000]


def test_positions_are_masked_independently():
    noisy = mask(torch.zeros(40_000, 2, dtype=torch.long), torch.full((40_000, 1), 0.3), 1, generator(4)).double()
    expected = torch.tensor([0.3, 0.3, 0.09])
    found = torch.stack([noisy[:, 0].mean(), noisy[:, 1].mean(), (noisy[:, 0] * noisy[:, 1]).mean()])
    assert ((found - expected).abs() < 4 * (expected * (1 - expected) / 40_000).sqrt()).all()


# ---------------------------------------------------------------------- the bound, without sampling
def test_exact_conditionals_make_the_bound_tight():
    """For every x the integral over t equals -log p(x): Beta weights of masks are the average over orders."""
    model = Conditionals(JOINT)
    torch.testing.assert_close(exact_bound(model, SEQUENCES), -JOINT.log())
    torch.testing.assert_close(order_average(model, SEQUENCES), -JOINT.log())


def test_the_bound_is_the_average_over_orders_for_any_model():
    model = Inconsistent()
    torch.testing.assert_close(exact_bound(model, SEQUENCES), order_average(model, SEQUENCES))


# ---------------------------------------------------------------------- the loss
@pytest.mark.parametrize("seed", range(5))
def test_one_draw_of_the_loss_by_hand(seed):
    """Repeat the loss's draws of t and masks, then sum cross-entropies in a plain loop."""
    model, clean = Inconsistent(), SEQUENCES
    repeat = generator(seed)
    t = low_discrepancy_times(len(clean), repeat)
    noisy = mask(clean, t.unsqueeze(1), M, repeat)
    log_p = model(noisy).logits.log_softmax(2)
    total = 0.0
    for n, l_at in itertools.product(range(len(clean)), range(L)):
        if noisy[n, l_at] == M:
            total -= float(log_p[n, l_at, clean[n, l_at]]) / float(t[n])
    loss = masked_diffusion_loss(model, clean, M, generator(seed))
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert loss.item() == pytest.approx(total / len(clean) / L, rel=1e-5)


@pytest.mark.parametrize("kind", ["exact", "inconsistent", "uniform"])
def test_the_average_loss_is_the_enumerated_bound(kind):
    """E over x, t and masks of L * loss: the entropy for the exact model, L log V for the uniform one."""
    model = {
        "exact": Conditionals(JOINT),
        "inconsistent": Inconsistent(),
        "uniform": Conditionals(torch.full((8,), 1 / 8, dtype=torch.float64)),
    }[kind]
    expected = float((JOINT * exact_bound(model, SEQUENCES)).sum())
    known = {"exact": float(-(JOINT * JOINT.log()).sum()), "uniform": L * math.log(V)}
    if kind in known:
        assert expected == pytest.approx(known[kind])
    draw = generator(11)
    batches = []
    for _ in range(300):
        clean = SEQUENCES[torch.multinomial(JOINT, 256, replacement=True, generator=draw)]
        batches.append(L * masked_diffusion_loss(model, clean, M, draw).double())
    values = torch.stack(batches)
    error = values.std().item() / len(values) ** 0.5
    assert error < 0.02 * expected, "the test must be able to see an error of a few per cent"
    assert values.mean().item() == pytest.approx(expected, abs=4 * error)


def test_the_gradient_comes_from_hidden_positions_only():
    logits = torch.zeros(4, L, V, requires_grad=True)
    seen: list[Tensor] = []

    class Fixed(nn.Module):
        def forward(self, tokens: Tensor) -> Logits:
            seen.append(tokens)
            return Logits(logits)

    masked_diffusion_loss(Fixed(), SEQUENCES[:4], M, generator(5)).backward()
    hidden = seen[0] == M
    assert hidden.any()
    assert not hidden.all()
    assert torch.equal(logits.grad.abs().sum(2) > 0, hidden)


def test_half_precision_logits_are_summed_in_float32():
    class Half(Inconsistent):
        def forward(self, tokens: Tensor) -> Logits:
            return Logits(super().forward(tokens).logits.bfloat16())

    rounded = Inconsistent()
    rounded.table = rounded.table.bfloat16().float()
    loss = masked_diffusion_loss(Half(), SEQUENCES, M, generator(6))
    assert loss.dtype == torch.float32
    assert torch.equal(loss, masked_diffusion_loss(rounded, SEQUENCES, M, generator(6)))


# ---------------------------------------------------------------------- several passes
@pytest.mark.parametrize("prompt_length", [0, 1])
def test_the_loss_of_several_passes_by_hand(prompt_length: int) -> None:
    """One estimate per pass over the same noisy sequences; what is trained is their mean."""
    torch.manual_seed(0)
    model = Backbone(V, [[i] for i in range(L)], 8, 1, 2, num_passes=3, prompt_length=prompt_length)
    clean, repeat = SEQUENCES, generator(2)
    t = low_discrepancy_times(len(clean), repeat).unsqueeze(1)
    noisy = mask(clean, t * (torch.arange(L) >= prompt_length), M, repeat)
    expected = []
    for log_p in (belief.detach() for belief in model.passes(noisy)[0]):
        total = 0.0
        for n, l_at in itertools.product(range(len(clean)), range(L)):
            if noisy[n, l_at] == M:
                total -= float(log_p[n, l_at, clean[n, l_at]]) / float(t[n])
        expected.append(total / len(clean) / (L - prompt_length))
    assert len({round(value, 4) for value in expected}) == 3, "the passes differ"
    config = MDMConfig("t", "out", passes=3)
    loss, each = config.objective(model, clean, generator(2), 0.0)
    assert each.tolist() == pytest.approx(expected, rel=1e-5)
    assert loss.item() == pytest.approx(sum(expected) / 3, rel=1e-5)
    assert not each.requires_grad
    loss.backward()
    assert (model.head.bias.grad != 0).all()
