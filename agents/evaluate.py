"""Evaluation: orders side by side on the same instances and denoiser, with intervals."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from rich import box
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from agents.policy import PACKAGED_POLICIES, OrderPolicy, load_policy
from pretrain.checkpoint import packaged
from pretrain.run import require_at_least
from tasks import Instances, Task, UnknownNameError, read_options
from unmask_env import exact, parallel, reference
from unmask_env.core import SINGLE, Actions, Order, Rules, SetOrder, rollout
from unmask_env.denoiser import Denoiser

Z95 = 1.959963984540054
ROOMY = 3  # metrics of a table that all have their intervals


class Exact(NamedTuple):
    """Exact expectations over an order's own choices (a learned one sampled), (n,) per instance.

    ``reward`` is E[r]; ``best`` the most that any order reaches; ``trajectory_kl`` and ``terminal_kl`` the divergences
    from a reference, in nats.
    """

    reward: Tensor
    best: Tensor
    trajectory_kl: Tensor
    terminal_kl: Tensor


@dataclass(frozen=True)
class Result:
    """One order's row.

    Attributes:
        metrics: per metric of the task, (n,) values per instance; the first one is the solve rate of tables.
        forwards: (n,) float, of the denoiser, per instance; ``nfe`` is their mean.
        exact: on small boards, if asked for.
    """

    order: str
    metrics: dict[str, Tensor]
    forwards: Tensor
    seconds: float
    exact: Exact | None = None

    @property
    def solved(self) -> Tensor:
        return next(iter(self.metrics.values()))

    @property
    def nfe(self) -> float:
        return float(self.forwards.double().mean())

    def row(self) -> dict[str, Any]:
        """The JSON row."""
        mean = {name: float(values.double().mean()) for name, values in self.metrics.items()}
        n = len(self.solved)
        names = {"solved": "solve_rate", "valid": "valid_rate"}
        exactly = {}
        if self.exact is not None:
            means = {f"exact_{name}": float(values.mean()) for name, values in self.exact._asdict().items()}
            exactly = {name: mean if math.isfinite(mean) else None for name, mean in means.items()}  # JSON has no inf
        return {
            "order": self.order,
            **{names.get(name, name): value for name, value in mean.items()},
            "nfe": self.nfe,
            "n": n,
            "ci95": list(interval(self.solved)),
            "seconds": self.seconds,
            **exactly,
        }


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson 1927): right also near 0 and 1, where the normal one is not."""
    p, z2 = successes / n, Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return 0.0 if successes == 0 else low, 1.0 if successes == n else high  # exact at the ends, whatever the rounding


def normal_interval(values: Tensor) -> tuple[float, float]:
    """95 % normal interval of a mean."""
    mean = float(values.mean())
    half = Z95 * float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return mean - half, mean + half


def interval(values: Tensor) -> tuple[float, float]:
    """95 % interval of a mean of (n,) values in [0, 1]: Wilson's where all are 0 or 1, else the clipped normal one."""
    if bool(((values == 0) | (values == 1)).all()):
        return wilson(int(values.sum()), len(values))
    low, high = normal_interval(values)
    return max(0.0, low), min(1.0, high)


def paired_difference(a: Tensor, b: Tensor) -> tuple[float, float, float]:
    """Mean of a - b over the same instances, with its 95 % normal interval: (mean, low, high)."""
    return (float((a - b).mean()), *normal_interval(a - b))


def _percent(share: float) -> str:
    return f"{100 * share:.1f}" if share < 0.9995 else "100"


def load_order(
    name: str, task: Task, denoiser: Denoiser | None = None, actions: Actions = "single"
) -> Order | SetOrder:
    """A reference policy by name, or a learned policy by packaged name, folder or hub id. Over sets, a reference may
    carry options: ``threshold:theta=0.8``.

    Raises:
        UnknownNameError, CheckpointError: in one line. UnmaskError: ``learned`` of a denoiser that learned no order, an
            option that the reference does not take.
    """
    if actions != "single":
        base, colon, details = name.partition(":")
        if base in parallel.SET_REFERENCES:
            factory = parallel.SET_REFERENCES[base]
            return factory(**read_options(f"order {name!r}", details if colon else None, factory))
        try:
            return load_policy(name, task, denoiser, actions)
        except UnknownNameError:
            raise UnknownNameError("order", name, [*parallel.SET_REFERENCES, *packaged(PACKAGED_POLICIES)]) from None
    if name in reference.REFERENCES:
        if name.startswith("learned") and denoiser is not None:
            reference.require_learned(denoiser, task)
        return reference.get(name)
    try:
        return load_policy(name, task, denoiser)
    except UnknownNameError:
        raise UnknownNameError("order", name, [*reference.REFERENCES, *packaged(PACKAGED_POLICIES)]) from None


def evaluate(
    task: Task,
    denoiser: Denoiser,
    orders: dict[str, Order | SetOrder],
    instances: Instances,
    seed: int = 0,
    batch: int = 500,
    progress: bool = False,
    rules: Rules = SINGLE,
    temperature: float = 0.0,
) -> list[Result]:
    """Play every instance once with every order.

    Reference policies are sampled (a deterministic one only where positions tie), learned ones take their most likely
    position.

    Args:
        orders: by the name of their row. seed: of the stochastic orders, and of filling by samples.
        batch: instances per forward. The rows of deterministic orders do not depend on it; what a stochastic order
            draws for an instance does, as it does on the seed.
        rules: of play, for example blocks.
        temperature: of the filling; 0 is greedy.
    """
    require_at_least(1, batch=batch)
    require_at_least(0, temperature=temperature)
    by_length = (instances.tokens == task.mask_id).sum(1).argsort(stable=True)  # so that rows of a batch end together
    device = getattr(denoiser, "device", torch.device("cpu"))
    results = []
    with Progress(transient=True, disable=not progress) as bar:
        work = bar.add_task("evaluate", total=len(orders) * len(instances))
        for name, order in orders.items():
            bar.update(work, description=name)
            started = time.perf_counter()
            sampled = isinstance(order, reference.Reference | parallel.SetReference)
            generator = torch.Generator(device).manual_seed(seed) if sampled else None
            filling = torch.Generator(device).manual_seed(seed + 1) if temperature > 0 else None
            measured: dict[str, list[Tensor]] = {}
            forwards: list[Tensor] = []
            for rows in by_length.split(batch):
                part = instances[rows].to(device)
                played = rollout(
                    task,
                    denoiser,
                    order,
                    part,
                    rules=rules,
                    order_generator=generator,
                    temperature=temperature,
                    fill_generator=filling,
                )
                for metric, values in task.metrics(played.state.tokens, part).items():
                    measured.setdefault(metric, []).append(values.cpu())
                forwards.append(played.nfe.float().cpu())
                bar.advance(work, len(rows))
            back = by_length.argsort()
            metrics = {metric: torch.cat(values)[back] for metric, values in measured.items()}
            results.append(Result(name, metrics, torch.cat(forwards)[back], time.perf_counter() - started))
    return results


def add_exact(
    results: Sequence[Result],
    task: Task,
    denoiser: Denoiser,
    orders: dict[str, Order],
    instances: Instances,
    reference_policy: reference.Reference,
    batch: int = 8,
    progress: bool = False,
) -> list[Result]:
    """The results with their exact expectations under greedy filling; the oracle, which sees the answers, has none.

    Args:
        orders: those of ``results``. batch: starts whose boards are listed together.

    Raises:
        TooLargeError: an instance of more than 16 holes, or too many boards.
    """
    exact.check_holes(task, instances)
    known = {name: order for name, order in orders.items() if not hasattr(order, "with_answers")}
    parts: dict[str, list[Exact]] = {name: [] for name in known}
    hidden = any(isinstance(order, OrderPolicy) and order.hidden is not None for order in known.values())
    starts, start_of = instances.tokens.unique(dim=0, return_inverse=True)
    # Instances of the same board share its expectations, so they are listed together.
    batches = [(start_of // batch == number).nonzero().squeeze(1) for number in range(-(-len(starts) // batch))]
    with Progress(transient=True, disable=not progress) as bar, torch.no_grad():
        work = bar.add_task("exact", total=len(instances))
        for rows in batches:
            graph = exact.enumerate_boards(task, denoiser, instances[rows], max_states=3_000_000, hidden=hidden)
            best, log_reference = exact.best_reward(graph), exact.tabulate(graph, reference_policy)
            for name, order in known.items():
                values = exact.evaluate(graph, order, log_reference)
                # A divergence of 0 may come out a rounding error below it.
                kls = (values.trajectory_kl.clamp(min=0), values.terminal_kl.clamp(min=0))
                columns = (values.reward, best.maximum(values.reward), *kls)
                parts[name].append(Exact(*(column[graph.start_of].cpu() for column in columns)))
            bar.advance(work, len(rows))
    back = torch.cat(batches).argsort().cpu()
    joined = {name: Exact(*(torch.cat(c)[back] for c in zip(*found, strict=True))) for name, found in parts.items()}
    return [replace(result, exact=joined.get(result.order)) for result in results]


def exact_table(results: Sequence[Result], reference_name: str) -> Table:
    """A rich table of the exact columns."""
    view = Table(
        title=f"exact, over each order's own choices; divergences from {reference_name} in nats",
        caption="best possible: the most that any order reaches with this denoiser",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    view.add_column("order")
    for name in ("reward", "best possible", "trajectory KL", "terminal KL"):
        view.add_column(name, justify="right", no_wrap=True)
    for result in results:
        columns = result.exact or ()
        view.add_row(result.order, *(f"{float(values.mean()):.4f}" for values in columns))
    return view


def table(results: Sequence[Result], title: str) -> Table:
    """A rich table, 80 columns wide: each metric in per cent with its 95 % interval, and NFE. Of many metrics the first
    alone has its interval, so that the orders' names have room."""
    names = {"solved": "solve rate", "cell_accuracy": "cell accuracy", "valid": "rules valid"}
    marked = any(result.order == "oracle" for result in results)
    note = "; * sees the answers" if marked else ""
    view = Table(
        title=title,
        caption=f"per cent, with 95 % confidence intervals{note}",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    view.add_column("order")
    for name in results[0].metrics:
        view.add_column(names.get(name, name), justify="right", no_wrap=True)
    view.add_column("NFE", justify="right", no_wrap=True)
    for result in results:
        cells = []
        for values in result.metrics.values():
            low, high = interval(values)
            roomy = not cells or len(result.metrics) <= ROOMY
            cells.append(_percent(float(values.mean())) + f" ({_percent(low)}-{_percent(high)})" * roomy)
        view.add_row(result.order + "*" * (result.order == "oracle"), *cells, f"{result.nfe:.1f}")
    return view
