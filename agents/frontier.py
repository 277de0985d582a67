"""Quality against the number of forwards: every method's knob swept over the same instances.

A method is a reference over sets, whose options are its knob, or a policy over sets, whose threshold is. Play is
greedy but for the stochastic references.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from rich import box
from rich.progress import Progress
from rich.table import Table

from agents.evaluate import Result, evaluate, interval, paired_difference
from agents.policy import OrderPolicy, load_policy
from pretrain.checkpoint import write_atomically, write_json
from tasks import Instances, Task, UnknownNameError, UnmaskError
from unmask_env import parallel
from unmask_env.core import Rules, SetOrder
from unmask_env.denoiser import Denoiser

SHARES = (0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 0.999)
STEPS = (3, 4, 5, 6, 8, 12)
SWEEPS: dict[str, list[dict[str, Any]]] = {  # options, in the order of a curve
    **{f"fixed_k {score}": [{"k": k, "score": score} for k in (1, 2, 3, 4, 5, 6, 8)] for score in parallel.SCORES},
    "threshold": [{"theta": theta} for theta in SHARES],
    "threshold margin": [{"theta": theta, "score": "margin"} for theta in SHARES],
    "factor": [{"factor": factor} for factor in (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0)],
    "entropy_bounded": [{"gamma": gamma} for gamma in (0.0, 1e-4, 1e-3, 0.01, 0.1, 0.4, 1.5)],
    "kl_stability": [
        {"theta": theta, "epsilon": epsilon} for epsilon in (0.01, 0.1) for theta in (0.6, 0.8, 0.9, 0.95)
    ],
    "schedule cosine": [{"steps": steps} for steps in STEPS],
    "schedule linear": [{"steps": steps, "shape": "linear"} for steps in STEPS],
}
REMASKING_SWEEPS: dict[str, list[dict[str, Any]]] = {
    "self_planning": [{"steps": steps, "eta": eta} for eta in (0.5, 1.0, 2.0) for steps in STEPS],
    **{
        f"remdm {strategy}": [{"steps": steps, "strategy": strategy, "eta": 0.04} for steps in STEPS]
        for strategy in ("cap", "rescale", "loop", "conf")
    },
}
THRESHOLDS = (0.003, 0.03, 0.1, 0.2, 0.35, 0.5, 0.7, 0.85, 0.95, 0.99)


@dataclass(frozen=True)
class Point:
    """One setting of one method's knob."""

    method: str
    knob: dict[str, Any]
    learned: bool
    result: Result

    def row(self) -> dict[str, Any]:
        """The JSON row."""
        return {"method": self.method, "knob": self.knob, "learned": self.learned} | self.result.row()


def methods(
    names: Sequence[str], task: Task, denoiser: Denoiser, rules: Rules
) -> dict[str, list[tuple[dict[str, Any], SetOrder]]]:
    """Per method its settings: ``heuristics`` stands for all that ``rules`` allow, other names for one of those, or for
    a policy over sets by packaged name, folder or hub id.

    Raises:
        UnknownNameError, CheckpointError: in one line. UnmaskError: rules of single positions.
    """
    if rules.actions == "single":
        raise UnmaskError("the frontier is of sets: play with --actions set or set+remask")
    sweeps = SWEEPS | (REMASKING_SWEEPS if rules.actions == "set+remask" else {})
    found: dict[str, list[tuple[dict[str, Any], SetOrder]]] = {}
    for name in names:
        for own in sweeps if name == "heuristics" else [name]:
            if own in sweeps:
                base = own.partition(" ")[0]
                found[own] = [(options, parallel.get(base, **options)) for options in sweeps[own]]
                continue
            try:
                policies = [load_policy(own, task, denoiser, rules.actions) for _ in THRESHOLDS]
            except UnknownNameError:
                raise UnknownNameError("order", own, ["heuristics", *sweeps]) from None
            for policy, threshold in zip(policies, THRESHOLDS, strict=True):
                policy.to(denoiser.device).threshold = threshold
            found[own] = [({"threshold": p.threshold}, p) for p in policies]
    return found


def sweep(
    task: Task,
    denoiser: Denoiser,
    found: dict[str, list[tuple[dict[str, Any], SetOrder]]],
    instances: Instances,
    rules: Rules,
    seed: int = 0,
    batch: int = 50,
    progress: bool = False,
    temperature: float = 0.0,
) -> list[Point]:
    """Every setting of every method of :func:`methods` on the same instances. In small batches less is computed for
    rows that have ended."""
    points = []
    with Progress(transient=True, disable=not progress) as bar:
        work = bar.add_task("frontier", total=sum(len(settings) for settings in found.values()))
        for method, settings in found.items():
            bar.update(work, description=method)
            for knob, order in settings:
                [result] = evaluate(task, denoiser, {method: order}, instances, seed, batch, False, rules, temperature)
                points.append(Point(method, knob, isinstance(order, OrderPolicy), result))
                bar.advance(work)
    return points


def at_equal_forwards(points: Sequence[Result], result: Result) -> tuple[float, float, float] | None:
    """Paired difference (mean, low, high; 95 %) of ``result`` to a coin that plays each instance at one of two
    neighbours among ``points``, weighted to take as many forwards on average; None where ``result`` takes fewer than
    all of them or more.

    The weight is measured on the same instances, and so is the slope between the neighbours: the interval counts both
    (delta method), each instance with its difference less the slope times its surplus of forwards.
    """
    for fewer, more in itertools.pairwise(sorted(points, key=lambda point: point.nfe)):
        if fewer.nfe <= result.nfe <= more.nfe and fewer.nfe < more.nfe:
            weight = (result.nfe - fewer.nfe) / (more.nfe - fewer.nfe)
            slope = float((more.solved - fewer.solved).mean()) / (more.nfe - fewer.nfe)
            mixed = fewer.solved.lerp(more.solved, weight)
            surplus = result.forwards - fewer.forwards.lerp(more.forwards, weight)
            return paired_difference(result.solved - slope * surplus, mixed)
    return None


def best_of(points: Sequence[Point], learned: bool) -> list[Point]:
    """The points that no other of their kind beats: as few forwards and as good. By rising number of forwards."""
    kind = sorted((p for p in points if p.learned == learned), key=lambda p: (p.result.nfe, -_mean(p)))
    best: list[Point] = []
    for point in kind:
        if not best or _mean(point) > _mean(best[-1]):
            best.append(point)
    return best


def _mean(point: Point) -> float:
    return float(point.result.solved.mean())


def table(points: Sequence[Point], title: str) -> Table:
    """The best points of heuristics and of learned policies, by rising number of forwards."""
    metric = next(iter(points[0].result.metrics))
    view = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("NFE", f"{metric} %", "95 %", "method", "knob"):
        view.add_column(column, justify="left" if column in ("method", "knob") else "right")
    best = sorted([*best_of(points, False), *best_of(points, True)], key=lambda p: p.result.nfe)
    for point in best:
        low, high = interval(point.result.solved)
        knob = ", ".join(f"{name} {value}" for name, value in point.knob.items())
        style = "bold" if point.learned else ""
        cells = (f"{point.result.nfe:.2f}", f"{100 * _mean(point):.1f}", f"{100 * low:.1f}-{100 * high:.1f}")
        view.add_row(*cells, point.method, knob, style=style)
    return view


def draw(points: Sequence[Point], title: str, path: Path) -> None:
    """The curves with their 95 % bands, as a PNG."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for method in dict.fromkeys(point.method for point in points):
        own = sorted((p for p in points if p.method == method), key=lambda p: p.result.nfe)
        nfe, mean = [p.result.nfe for p in own], [_mean(p) for p in own]
        low, high = zip(*(interval(p.result.solved) for p in own), strict=True)
        line = axes.plot(nfe, mean, "o-" if own[0].learned else ".--", markersize=4, label=method)[0]
        axes.fill_between(nfe, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(xlabel="mean number of denoiser forwards (NFE)", ylabel=next(iter(points[0].result.metrics)), title=title)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator([1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 50, 100]))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120, format="png"))


def write(points: Sequence[Point], title: str, path: Path) -> None:
    """The picture at ``path`` and the numbers beside it (``.json``)."""
    write_json(path.with_suffix(".json"), [point.row() for point in points])
    draw(points, title, path)
