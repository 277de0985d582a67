"""Named orders beside each other on the same instances, and each one against the best reference among them, in pairs.

    python benchmarks/compare.py --task sudoku6 --denoiser sudoku6-tiny --orders margin entropy sudoku6-tiny-rewards \\
        --limit 2000 --out benchmarks/results/NAME.json

``unmask evaluate`` with paired differences. The oracles are no rivals. A sets' policy is played at each of
``--thresholds``, and compared with the first policy named at equal forwards. Ctrl-C keeps the orders that were played.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from common import in_pairs, report
from torch import Tensor

from agents import evaluate, frontier
from tasks import UnmaskError
from unmask_env.reference import Reference


@dataclass(frozen=True)
class Compare(evaluate.PlayCommand):
    """Orders in pairs."""

    thresholds: tuple[float, ...] = ()
    """of policies over sets"""
    metric: str | None = None
    """of the paired differences; default: the task's first"""
    against: tuple[str, ...] = ()
    """orders, among those named, that each learned one is compared with; default: the best reference"""
    out: Path | None = None
    """JSON"""


def main(command: Compare) -> None:
    process, instances, title = evaluate.prepare(command, "single")
    orders = evaluate.read_orders(command.orders, process)
    rules = {name for name, order in orders.items() if isinstance(order, Reference)}
    played = dict(orders)
    for name in orders.keys() - rules if command.thresholds else ():
        del played[name]
        played |= {f"{name} at {threshold}": orders[name].at(threshold) for threshold in command.thresholds}
    if missing := set(command.against) - played.keys():
        raise UnmaskError(f"--against names {', '.join(sorted(missing))}, which is not among --orders")
    play = evaluate.play(process, played, instances, command.seed, command.batch, progress=True)
    done, stopped = evaluate.until_stopped(play)
    results = evaluate.Comparison(tuple(done), title)
    rivals = [result for result in results if result.order in rules and not orders[result.order].sees_answers]
    if command.metric not in (None, *results[0].metrics):
        print(results)
        raise UnmaskError(f"--metric {command.metric} is none of this task; they are {', '.join(results[0].metrics)}")

    def values(result: evaluate.Result) -> Tensor:
        return result.solved if command.metric is None else result.metrics[command.metric]

    best = max(rivals, key=lambda result: float(values(result).mean()), default=results[0])
    others = [result for result in results if result.order in command.against] or [best]
    learned = [result for result in results if result.order not in rules]
    pairs = [
        {"order": r.order, "against": o.order} | in_pairs(values(r), values(o))
        for r in learned
        for o in others
        if r is not o
    ]
    first = [
        result for result in results if command.thresholds and result.order.startswith(f"{next(iter(orders))} at ")
    ]
    level = {r.order: frontier.at_equal_forwards(first, r) for r in results if r not in first} if first else {}
    report(command.out, task=command.task, rows=results.rows, pairs=pairs, at_equal_forwards=level)
    print(results)
    for pair in pairs:
        print(pair)
    if stopped:
        raise KeyboardInterrupt


if __name__ == "__main__":
    main(tyro.cli(Compare, config=(tyro.conf.OmitArgPrefixes,)))
