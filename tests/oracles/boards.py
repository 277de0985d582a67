"""Models made of tables on all boards of three positions, and what they imply by enumeration."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributions import Exponential, kl_divergence

from pretrain.backbone import Backbone, Output
from pretrain.masking import PolynomialSchedule
from pretrain.objectives.masked import integrand
from pretrain.orders import ContextOrder, NoOrder, PositionOrder, SymbolOrder

V, L, M = 2, 3, 2

SEQUENCES = torch.tensor(list(itertools.product(range(V), repeat=L)))  # (8, L)

BOARDS = torch.tensor(list(itertools.product(range(V + 1), repeat=L)))  # (27, L), row i has index i

ORDERS = list(itertools.permutations(range(L)))

HIDDEN = [subset for size in range(1, L + 1) for subset in itertools.combinations(range(L), size)]

KINDS = ["none", "positions", "symbols", "context", "free"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def index(boards: Tensor) -> Tensor:
    """(N,) the row of ``BOARDS`` that each board is."""
    return (boards * torch.tensor([(V + 1) ** (L - 1 - i) for i in range(L)])).sum(-1)


def hide(clean: Tensor, hidden: tuple[int, ...]) -> Tensor:
    noisy = clean.clone()
    noisy[:, list(hidden)] = M
    return noisy


class Lookup(nn.Module):
    """A network from hidden states to one number per position, arbitrary for each board: the states name the board."""

    def __init__(self, draw: torch.Generator, scale: float = 2.0) -> None:
        super().__init__()
        self.table = nn.Parameter(scale * torch.randn(len(BOARDS), L, generator=draw, dtype=torch.float64))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.table[hidden[:, 0, 0].long()].unsqueeze(-1)


class FreeOrder(NoOrder):
    """Exponents that no parameterisation holds together: any of the clean sequence, any others of the board."""

    learned = True
    reads_clean = True

    def __init__(self, draw: torch.Generator) -> None:
        super().__init__()
        self.masking, self.revealing = Lookup(draw, 0.7), Lookup(draw, 0.7)

    def order_weights(self, clean: Tensor, hidden: Tensor | None) -> Tensor:
        return self.masking(hidden).squeeze(-1).exp()

    def reverse(self, logits: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return logits.log_softmax(-1), self.revealing(hidden).squeeze(-1).exp()


class Tables(nn.Module):
    """Has what the bounds and samplers use of a :class:`Backbone`; its logits are a table of the 27 boards."""

    length, mask_id, block_length, noise, prompt_length = L, M, None, "mask", 0

    def __init__(self, kind: str = "none", seed: int = 0) -> None:
        super().__init__()
        draw = generator(seed)
        self.table = nn.Parameter(1.5 * torch.randn(len(BOARDS), L, V, generator=draw, dtype=torch.float64))
        if kind == "context":
            self.order = ContextOrder(Lookup(draw), Lookup(draw), 0.7, 0.65)
        elif kind == "free":
            self.order = FreeOrder(draw)
        else:
            self.order = {"none": NoOrder, "positions": lambda: PositionOrder(L), "symbols": lambda: SymbolOrder(V)}[
                kind
            ]()
            for raw in self.order.parameters():
                raw.data = 0.8 * torch.randn(raw.shape, generator=draw, dtype=torch.float64)

    def trunk(self, tokens: Tensor) -> Tensor:
        return index(tokens).double().view(-1, 1, 1).expand(-1, L, 1)

    def forward(self, tokens: Tensor) -> Output:
        return Output(self.table[index(tokens)], self.trunk(tokens))


class Exact:
    """Per sequence of ``clean`` (N, L): exponents ``w`` (N, L) of the masking process and, for each set of hidden
    positions, the cross-entropies ``ce`` (N, L) and the model's exponents ``own`` (N, L)."""

    def __init__(self, model: Tables, clean: Tensor = SEQUENCES) -> None:
        self.w = model.order.order_weights(clean, model.trunk(clean)).double().expand(clean.shape)
        self.ce, self.own = {}, {}
        for hidden in HIDDEN:
            log_p, own = model.order.reverse(*model(hide(clean, hidden)))
            self.ce[hidden] = -log_p.gather(2, clean.unsqueeze(2)).squeeze(2).double()
            self.own[hidden] = own.double()

    def along(self, order: tuple[int, ...]) -> list[tuple[int, tuple[int, ...], Tensor, Tensor]]:
        """Per step of ``order``: what is revealed, what is hidden before, and the sums of both exponents over it."""
        left = [tuple(sorted(order[step:])) for step in range(L)]
        return [
            (i, h, self.w[:, list(h)].sum(1), self.own[h][:, list(h)].sum(1)) for i, h in zip(order, left, strict=True)
        ]

    def chance(self, order: tuple[int, ...]) -> Tensor:
        """(N,) of revealing in this order what the process masked: Plackett-Luce."""
        return torch.stack([self.w[:, i] / total for i, _, total, _ in self.along(order)]).prod(0)

    def joint(self, order: tuple[int, ...]) -> Tensor:
        """(N,) p(order, x) of the event process."""
        steps = self.along(order)
        return torch.stack([self.own[h][:, i] / total * (-self.ce[h][:, i]).exp() for i, h, _, total in steps]).prod(0)

    def nll(self) -> Tensor:
        """(N,) -log p(x), summed over all orders."""
        return -sum(self.joint(order) for order in ORDERS).log()

    def order_bound(self) -> Tensor:
        return sum(self.chance(o) * (self.chance(o).log() - self.joint(o).log()) for o in ORDERS)

    def waiting(self) -> Tensor:
        """(N,) expected sum over steps of the KL between the times until something is revealed, both exponential."""
        return sum(
            self.chance(order) * kl_divergence(Exponential(total), Exponential(own))
            for order in ORDERS
            for _, _, total, own in self.along(order)
        )

    def path_bound(self) -> Tensor:
        return self.order_bound() + self.waiting()

    def step_form(self) -> tuple[Tensor, Tensor]:
        """The two sums over steps that :func:`likelihood.bound` estimates, (path, order)."""
        path, by_order = torch.zeros(len(self.w)).double(), torch.zeros(len(self.w)).double()
        for order in ORDERS:
            for _, hidden, total, own_total in self.along(order):
                for i in hidden:
                    w, own, ce = self.w[:, i], self.own[hidden][:, i], self.ce[hidden][:, i]
                    path = path + self.chance(order) / total * (w * ce + w * (w / own).log() - w + own)
                    logs = (w / total).log() - (own / own_total).log()
                    by_order = by_order + self.chance(order) * w / total * (ce + logs)
        return path, by_order

    def at_time(self, t: Tensor) -> Tensor:
        """(N, T) expected :func:`integrand` at times ``t`` (T,)."""
        schedule = PolynomialSchedule(self.w.repeat_interleave(len(t), 0))
        times = t.repeat(len(self.w))
        probability, velocity = schedule.masked_probability(times), schedule.velocity(times)
        total = torch.zeros(len(times), dtype=torch.float64)
        for hidden in HIDDEN:
            masked = torch.zeros(L, dtype=torch.bool)
            masked[list(hidden)] = True
            weight = torch.where(masked, probability, 1 - probability).prod(1)
            ce, own = (part[hidden].repeat_interleave(len(t), 0) for part in (self.ce, self.own))
            total = total + weight * integrand(ce, velocity, own / times.unsqueeze(1), masked.expand(ce.shape))
        return total.view(len(self.w), len(t))

    def integral(self, least: float = 0.0) -> Tensor:
        """(N,) the integral of :meth:`at_time` over [least, 1], by Gauss-Legendre quadrature in log(-log t)."""
        furthest = 45 / float(self.w.detach().min()) if least == 0 else -math.log(least)
        nodes, weights = gauss(-28.0, math.log(furthest), panels=40)
        t = (-nodes.exp()).exp()
        return self.at_time(t) @ (weights * t * nodes.exp())


def gauss(start: float, end: float, panels: int = 1) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the composite 12-point Gauss-Legendre rule."""
    beta = torch.arange(1, 12, dtype=torch.float64)
    beta = beta / (4 * beta**2 - 1).sqrt()
    x, vectors = torch.linalg.eigh(torch.diag(beta, 1) + torch.diag(beta, -1))  # Golub and Welsch
    w = 2 * vectors[0] ** 2
    width = (end - start) / panels
    left = start + width * torch.arange(panels, dtype=torch.float64).unsqueeze(1)
    return (left + width * (x + 1) / 2).flatten(), (w * width / 2).repeat(panels)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def agrees(sample: Tensor, expected: Tensor, visible: float) -> None:
    """The mean over the first dimension is ``expected`` within 5 standard errors, which are below ``visible``."""
    error = sample.std(0) / len(sample) ** 0.5
    assert error.max() < visible, f"the test must be able to see an error of {visible}, not of {error.max()}"
    assert ((sample.mean(0) - expected).abs() <= 5 * error + 1e-9).all(), (sample.mean(0), expected, error)


def backbone(block_length: int | None = None, order: str = "none", seed: int = 3, length: int = L, **more) -> Backbone:
    """A tiny backbone that looks at what it sees, and whose order is far from its start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = {"dim": 8, "layers": 1, "heads": 2} | more
        model = Backbone(V, [[i] for i in range(length)], order=order, block_length=block_length, **sizes)
    draw = generator(seed)
    for name, parameter in model.named_parameters():
        if name.startswith(("symbols", "positions", "order.raw", "head")):
            parameter.data = 1.2 * torch.randn(parameter.shape, generator=draw)
        if name.endswith(("masking.4.weight", "revealing.4.weight")):
            parameter.data = 1.2 * torch.randn(parameter.shape, generator=draw)
    return model.eval()


@torch.no_grad()
def block_nll(model: Backbone, clean: Tensor) -> Tensor:
    """(N,) the sum over blocks of the average over orders of -log p(block | blocks before), from plain forwards."""
    n, length = clean.shape
    total = torch.zeros(n, dtype=torch.float64)
    starts = range(0, length, model.block_length)
    for start in starts:
        block = range(start, min(start + model.block_length, length))
        orders = list(itertools.permutations(block))
        for order in orders:
            for step, i in enumerate(order):
                noisy = clean.clone()
                noisy[:, list(order[step:])] = M
                noisy[:, block.stop :] = M
                log_p = model(noisy).logits.double().log_softmax(2)[:, i]
                total -= log_p.gather(1, clean[:, i : i + 1]).squeeze(1) / len(orders)
    return total


def counted(model: nn.Module, name: str) -> list[int]:
    """Rows of every call of a method, noted from now on."""
    rows: list[int] = []
    inner: Callable[..., object] = getattr(model, name)

    def noting(tokens: Tensor, *rest: Tensor) -> object:
        rows.append(len(tokens))
        return inner(tokens, *rest)

    setattr(model, name, noting)
    return rows
