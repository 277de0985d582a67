"""Quality against the number of forwards: every method's setting swept over the same instances.

A method is a reference over sets, whose options are its setting, or a policy over sets, whose threshold is. Play is
greedy but for the stochastic references.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from agents.evaluate import (
    PlayCommand,
    Result,
    compare,
    empty_table,
    interval,
    paired_difference,
    prepare,
    progress_bar,
    until_stopped,
)
from agents.page import fill_page
from agents.policy import load_policy
from pretrain.checkpoint import read_json
from tasks import Instances, UnknownNameError, UnmaskError
from tasks.errors import MissingLibraryError, optional
from tasks.files import check_writable, write_atomically, write_json
from tasks.registry import name_and_options
from tasks.settings import AtLeast1
from unmask_env.process import Unmasking
from unmask_env.reference import Policy, Reference, sweeps

PAGE = Path(__file__).parent / "frontier.html"
THRESHOLDS = (0.003, 0.03, 0.1, 0.2, 0.35, 0.5, 0.7, 0.85, 0.95, 0.99)
READ_THRESHOLDS = (0.35, 0.7, 0.95)  # of policies that do not read every board
Methods = dict[str, list[tuple[dict[str, Any], Policy]]]
"""Per method its settings, in the order of a curve, each with the policy that it means."""


@dataclass(frozen=True)
class Point:
    """One setting of one method."""

    method: str
    setting: dict[str, Any]
    learned: bool
    result: Result

    @property
    def order(self) -> str:
        """As it is typed; see :func:`as_typed`."""
        return as_typed(self.method, self.setting, self.learned)

    def row(self) -> dict[str, Any]:
        """The JSON row."""
        return {"method": self.method, "setting": self.setting, "learned": self.learned} | self.result.row()


def as_typed(method: str, setting: dict[str, Any], learned: bool) -> str:
    """A setting of a method: ``threshold:theta=0.6``, of a policy ``NAME:threshold=0.35,read=first``."""
    # curves begin with the name of what plays them
    name = method.removesuffix(f", reads {setting.get('read')}") if learned else method.partition(" ")[0]
    return f"{name}:{','.join(f'{option}={value}' for option, value in setting.items())}"


def methods(names: Sequence[str], process: Unmasking) -> Methods:
    """Per method its settings: ``heuristics`` stands for all that the rules allow, other names for one of those, or for
    a policy over sets by packaged name, folder or hub id. A policy has three curves: it reads the board in every
    forward, in the ``first`` and where nothing is certain, or there only (``unsure``).

    Raises:
        UnknownNameError, CheckpointError: in one line. UnmaskError: rules or a policy of single positions.
    """
    if process.rules.actions == "single":
        raise UnmaskError("the frontier is of sets: play with --actions set or set+remask")
    curves = sweeps(process.rules.actions)
    chosen: Methods = {}
    for name in names:
        for method in curves if name == "heuristics" else [name]:
            if method in curves:
                rule, settings = curves[method]
                chosen[method] = [(setting, rule(**setting)) for setting in settings]
                continue
            if name_and_options(method)[1] is not None:
                raise UnmaskError(f"{method}: the frontier sweeps thresholds itself; leave them out")
            try:
                policy = load_policy(method, process.task, process.denoiser).to(process.device)
            except UnknownNameError:
                raise UnknownNameError("order", method, ["heuristics", *curves]) from None
            if policy.actions == "single":
                raise UnmaskError(f"order policy {method} chooses single positions; the frontier is of sets")
            chosen[method] = [({"threshold": t}, policy.at(t)) for t in THRESHOLDS]
            if policy.actions == "set":
                for read in ("first", "unsure"):
                    settings = [{"threshold": t, "read": read} for t in READ_THRESHOLDS]
                    chosen[f"{method}, reads {read}"] = [(setting, policy.at(**setting)) for setting in settings]
    return chosen


def sweep(
    process: Unmasking, chosen: Methods, instances: Instances, seed: int = 0, batch: int = 50, progress: bool = False
) -> list[Point]:
    """Every setting of every method on the same instances. In small batches less is computed for rows that have
    ended."""
    return list(sweeping(process, chosen, instances, seed, batch, progress))


def sweeping(
    process: Unmasking, chosen: Methods, instances: Instances, seed: int, batch: int, progress: bool
) -> Iterator[Point]:
    """What :func:`sweep` returns, each point as soon as it was played."""
    with progress_bar(progress) as bar:
        work = bar.add_task("frontier", total=sum(len(settings) for settings in chosen.values()))
        for method, settings in chosen.items():
            bar.update(work, description=method)
            for setting, policy in settings:
                [result] = compare(process, {method: policy}, instances, seed, batch)
                yield Point(method, setting, not isinstance(policy, Reference), result)
                bar.advance(work)


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
    view = empty_table(title, [], ["NFE", "passes", "s", f"{metric} %", "95 %"])
    view.add_column("order", overflow="fold")
    for point in sorted([*best_of(points, False), *best_of(points, True)], key=lambda p: p.result.nfe):
        low, high = interval(point.result.solved)
        spent = (point.result.nfe, float((point.result.passes + point.result.policy_passes).double().mean()))
        cells = (*(f"{count:.2f}" for count in spent), f"{point.result.seconds:.1f}")
        cells += (f"{100 * _mean(point):.1f}", f"{100 * low:.1f}-{100 * high:.1f}")
        view.add_row(*cells, escape(point.order), style="bold" if point.learned else "")
    return view


def matplotlib() -> Any:
    """The library that draws. Raises :class:`tasks.UnmaskError`, saying what to install, where it is missing."""
    with optional("figures", "unmask[plot]"):
        import matplotlib.figure
        import matplotlib.ticker
    return matplotlib


def draw(points: Sequence[Point], title: str, path: Path) -> None:
    """The curves with their 95 % bands, as a PNG."""
    library = matplotlib()
    figure = library.figure.Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for method in dict.fromkeys(point.method for point in points):
        curve = sorted((p for p in points if p.method == method), key=lambda p: p.result.nfe)
        nfe, mean = [p.result.nfe for p in curve], [_mean(p) for p in curve]
        low, high = zip(*(interval(p.result.solved) for p in curve), strict=True)
        line = axes.plot(nfe, mean, "o-" if curve[0].learned else ".--", markersize=4, label=method)[0]
        axes.fill_between(nfe, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(xlabel="mean number of denoiser forwards (NFE)", ylabel=next(iter(points[0].result.metrics)), title=title)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(library.ticker.FixedLocator([1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 50, 100]))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(library.ticker.NullLocator())
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120, format="png"))


# ---------------------------------------------------------------------- as a page
def page_data(rows: Sequence[dict[str, Any]], title: str) -> dict[str, Any]:
    """What the page is told. Per curve its points, by setting: the order as it is typed, the mean of the first metric
    with its 95 % interval, the number of instances, and what was spent on each: forwards, passes of both networks
    together, and seconds; None where that was not measured.

    Args:
        rows: those of :meth:`Point.row`, also as read from JSON; of results that are older, too.
    """
    curves: dict[str, dict[str, Any]] = {}
    metric = _metric(rows[0])
    for row in rows:
        setting = row.get("setting", row.get("knob", {}))
        passes = row["passes"] + row["policy_passes"] if "passes" in row else None
        seconds = row["seconds"] / row["n"] if row.get("seconds") else None
        spent = {"forwards": row["nfe"], "passes": passes, "seconds": seconds}
        typed = as_typed(row["method"], setting, row["learned"])
        point = {"order": typed, "mean": row[metric], "interval": row["ci95"], "n": row["n"], "spent": spent}
        curve = curves.setdefault(row["method"], {"name": row["method"], "learned": row["learned"], "points": []})
        curve["points"].append(point)
    return {"title": title, "metric": metric.replace("_", " "), "curves": list(curves.values())}


def write_page(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """One page that holds all that it needs, with the curves of ``rows``, against forwards, passes or seconds."""
    fill_page(PAGE, page_data(rows, title), path)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The points of a JSON file, of :func:`write` or of ``benchmarks/frontier.py``. Raises :class:`tasks.UnmaskError`
    where it has none."""
    content = read_json(path)
    rows = content.get("points") if isinstance(content, dict) else content
    if not rows or not isinstance(rows, list) or not all(_is_point(row, _metric(rows[0])) for row in rows):
        raise UnmaskError(f"{path} holds no points of a frontier; give what unmask frontier wrote beside its picture")
    return rows


def _metric(row: Any) -> str:
    """The first metric of a row: what follows its order; empty where there is none."""
    keys = list(row) if isinstance(row, dict) else []
    behind = keys[keys.index("order") + 1 :] if "order" in keys else []
    return behind[0] if behind else ""


def _is_point(row: Any, metric: str) -> bool:
    """Whether a page can show ``row``, a point as :meth:`Point.row` has it, or as older versions had it."""
    if not isinstance(row, dict) or not {"method", "order", "learned", "nfe", "n", "ci95", metric} <= row.keys():
        return False
    spent = [row.get(name, 0) for name in ("passes", "policy_passes")] + [row.get("seconds") or 0]
    if ("passes" in row and "policy_passes" not in row) or not isinstance(row["ci95"], list) or len(row["ci95"]) != 2:
        return False
    numbers = all(_finite(value) for value in (row["nfe"], row["n"], row[metric], *spent, *row["ci95"]))
    named = isinstance(row["method"], str) and isinstance(row.get("setting", row.get("knob", {})), dict)
    return numbers and named and isinstance(row["learned"], bool) and row["n"] > 0


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def write(points: Sequence[Point], title: str, path: Path) -> None:
    """The picture at ``path`` and the numbers beside it (``.json``)."""
    write_json(path.with_suffix(".json"), [point.row() for point in points])
    draw(points, title, path)


# ---------------------------------------------------------------------- the command
@dataclass(frozen=True)
class FrontierCommand(PlayCommand):
    """Solve rate against forwards: sweep the setting of every method over sets, and draw the curves.

    ``orders``: ``heuristics`` for all references, one of their curves such as "fixed_k margin", or policies over sets.
    """

    task: str | None = None
    """as of unmask evaluate; not needed with ``read``"""
    out: Path = Path("frontier.png")
    """the picture (PNG), where matplotlib is installed; the numbers are written beside it (JSON)"""
    html: Path | None = None
    """write an interactive page of the curves here; it needs no server and no network"""
    read: Path | None = None
    """JSON of a frontier that was played before: nothing is played, the page at ``html`` is drawn from it"""
    batch: AtLeast1 = 50


def run(command: FrontierCommand) -> None:
    """``unmask frontier``."""
    check_writable(command.html, "--html")
    if command.read is not None:
        if command.html is None:
            raise UnmaskError("--read draws a page; say where with --html FILE")
        for option in fields(command):
            if option.name not in ("read", "html") and getattr(command, option.name) != option.default:
                raise UnmaskError(f"--read plays nothing; leave --{option.name.replace('_', '-')} out")
        if command.read.exists() and command.html.exists() and command.read.samefile(command.html):
            raise UnmaskError(f"--read and --html both name {command.html}; name two files")
        write_page(read_rows(command.read), command.read.stem, command.html)
        return
    if command.task is None:
        raise UnmaskError("give --task, or --read with a frontier that was played before")
    if command.out.suffix != ".png":
        raise UnmaskError(f"--out is a picture; {command.out} must end in .png")
    check_writable(command.out, "--out")
    check_writable(command.out.with_suffix(".json"), "the numbers beside --out,")
    drawn = True
    try:
        matplotlib()  # before the work
    except MissingLibraryError as error:
        drawn = False
        print(f"unmask frontier: no picture, numbers alone: {error}", file=sys.stderr)
    process, instances, title = prepare(command, "set")
    chosen = methods(command.orders or ("heuristics",), process)
    points, stopped = until_stopped(sweeping(process, chosen, instances, command.seed, command.batch, progress=True))
    if drawn:
        write(points, title, command.out)
    else:
        write_json(command.out.with_suffix(".json"), [point.row() for point in points])
    if command.html is not None:
        write_page([point.row() for point in points], title, command.html)
    Console().print(table(points, title))
    if stopped:
        raise KeyboardInterrupt
