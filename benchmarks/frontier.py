"""``unmask frontier``, and beside it each learned point against the best heuristic of as many forwards or more (up to
``--until`` of them, and any number), the oracle, and on small boards the exact bound. Differences are paired by puzzle.

    python benchmarks/frontier.py --task sudoku6 --denoiser sudoku6-tiny --orders heuristics sudoku6-tiny-sets-rewards
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import tyro
from common import in_pairs, report
from rich.console import Console
from torch import Tensor

from agents import evaluate, frontier
from agents.frontier import FrontierCommand, Point
from unmask_env import exact_sets
from unmask_env.reference import reference


@dataclass(frozen=True)
class Frontier(FrontierCommand):
    """The frontier with its yardsticks."""

    until: float = 6.0
    """forwards"""
    exact: int = 200
    """first instances for the exact bound, where it can be had"""


def against(point: Point, heuristics: list[Point], until: float) -> dict[str, Any] | None:
    """``point`` beside the best heuristic of as many forwards or more, and at most ``until``."""
    rivals = [p for p in heuristics if point.result.nfe <= p.result.nfe <= until]
    if not rivals:
        return None
    best = max(rivals, key=lambda p: float(p.result.solved.mean()))
    named = {"rival": best.method, "setting": best.setting, "nfe": best.result.nfe}
    return named | in_pairs(point.result.solved, best.result.solved)


def bound(fewest: Tensor) -> list[dict[str, float]]:
    """The frontier that no order can pass that masks nothing again, from the fewest forwards (N,) that each instance
    needs: it gives up, in one forward, whatever takes more than n."""
    points = []
    for n in fewest[fewest.isfinite()].unique().tolist():
        solved = fewest <= n
        points.append({"nfe": float(fewest.where(solved, 1.0).mean()), "solved": float(solved.double().mean())})
    return points


def main(command: Frontier) -> None:
    if command.read is not None:
        frontier.run(command)
        return
    process, instances, title = evaluate.prepare(command, "set")
    chosen = frontier.methods(command.orders or ("heuristics",), process)
    points = frontier.sweep(process, chosen, instances, command.seed, command.batch, progress=True)
    heuristics = [point for point in points if not point.learned]
    [oracle] = evaluate.compare(process, {"oracle": reference("oracle_sets")}, instances)
    holes = (instances.tokens == process.task.mask_id).sum(1)
    small = process.task.one_answer and int(holes.max()) <= exact_sets.MAX_HOLES and "solved" in oracle.metrics
    listed = instances[: command.exact] if small and process.rules.actions == "set" else None
    learned = [
        {"method": point.method, "setting": point.setting, "nfe": point.result.nfe}
        | {f"up to {command.until:g} forwards": against(point, heuristics, command.until)}
        | {"any number": against(point, heuristics, float("inf"))}
        for point in points
        if point.learned
    ]
    report(
        command.out.with_suffix(".json"),
        points=[point.row() for point in points],
        best_heuristics=[point.row() for point in frontier.best_of(points, False)],
        oracle=oracle.row(),
        exact_bound=None if listed is None else bound(exact_sets.fewest_forwards(process, listed)),
        learned=learned,
    )
    if command.html is not None:
        frontier.write_page([point.row() for point in points], title, command.html)
    best = [dataclasses.replace(p, method="best of the heuristics") for p in frontier.best_of(points, False)]
    frontier.draw([*best, *(point for point in points if point.learned)], title, command.out)
    Console().print(frontier.table(points, title))


if __name__ == "__main__":
    main(tyro.cli(Frontier, config=(tyro.conf.OmitArgPrefixes,)))
