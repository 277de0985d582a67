"""Evaluation: policies side by side on the same instances and denoiser, with intervals."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from agents.belief import BeliefFills
from agents.policy import PACKAGED_POLICIES, OrderPolicy, load_policy
from agents.shares import play_share
from pretrain import processes
from pretrain.checkpoint import packaged
from pretrain.run import Bar, resolve_device
from tasks import Instances, Task, UnknownNameError, UnmaskError
from tasks.errors import optional
from tasks.files import STDOUT, check_writable, report_json, write_atomically, write_json
from tasks.registry import name_and_options, read_options
from tasks.settings import AtLeast0, AtLeast1, Positive, Seed, Temperature, Threads, check, validate
from tasks.task import check_instances
from unmask_env import exact
from unmask_env.denoiser import Denoiser, load_denoiser
from unmask_env.process import Unmasking, checked_metrics
from unmask_env.reference import (
    REFERENCES,
    Learned,
    LearnedGreedy,
    Policy,
    Reference,
    customary,
    reference,
    require_full_support,
    require_learned,
)
from unmask_env.registration import make_process, resolve
from unmask_env.shared import name_of
from unmask_env.state import SINGLE, Actions, Rules

T = TypeVar("T")
Z95 = 1.959963984540054
SPENT = ("nfe", "passes", "policy passes")


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
        passes, policy_passes: (n,) float, of the denoiser's network (more than its forwards if it reads its own belief)
            and of the policy's, per instance.
        trained: how the order was: ``imitation``, ``rewards`` or both; empty for rules.
        exact: on small boards, if asked for.
    """

    order: str
    metrics: dict[str, Tensor]
    forwards: Tensor
    passes: Tensor
    policy_passes: Tensor
    seconds: float
    trained: str = ""
    exact: Exact | None = None

    @property
    def solved(self) -> Tensor:
        """(n,) the task's first metric."""
        return next(iter(self.metrics.values()))

    @property
    def nfe(self) -> float:
        """Mean denoiser forwards per instance."""
        return float(self.forwards.double().mean())

    def row(self) -> dict[str, Any]:
        """The JSON row."""
        names = {"solved": "solve_rate", "valid": "valid_rate"}
        exactly = {} if self.exact is None else {f"exact_{k}": float(v.mean()) for k, v in self.exact._asdict().items()}
        return {
            "order": self.order,
            **{names.get(name, name): float(values.double().mean()) for name, values in self.metrics.items()},
            "nfe": self.nfe,
            "passes": float(self.passes.double().mean()),
            "policy_passes": float(self.policy_passes.double().mean()),
            "trained": self.trained,
            "n": len(self.solved),
            "ci95": list(interval(self.solved)),
            "seconds": self.seconds,
            **{name: mean if math.isfinite(mean) else None for name, mean in exactly.items()},  # JSON has no inf
        }


@dataclass(frozen=True)
class Comparison(Sequence[Result]):
    """Orders side by side: a sequence of results, one per order, that prints as a table.

    ``comparison[0]`` and ``comparison["margin"]`` are results, ``comparison.rows`` dictionaries, as for pandas.
    """

    results: tuple[Result, ...]
    title: str = ""

    def __len__(self) -> int:
        return len(self.results)

    def __getitem__(self, key: Any) -> Any:
        """By position or slice, or by the name of an order. Raises :class:`tasks.UnknownNameError`."""
        if not isinstance(key, str):
            return self.results[key]
        named = {result.order: result for result in self.results}
        if key not in named:
            raise UnknownNameError("order", key, named)
        return named[key]

    def __str__(self) -> str:
        console = Console(width=80, no_color=True)
        with console.capture() as shown:
            console.print(table(self.results, self.title))
        return shown.get().rstrip()

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What JSON has of each order; see :meth:`Result.row`."""
        return [result.row() for result in self.results]

    def to_json(self, path: str | Path) -> None:
        """Write the rows, as ``unmask evaluate --json`` does. Raises :class:`tasks.UnmaskError` where it cannot."""
        check_writable(Path(path), "the file")
        write_json(Path(path), self.rows)

    def plot(self, path: str | Path | None = None) -> Any:
        """The first metric of every order with its 95 % interval, as a figure of matplotlib; with a ``path`` also as a
        PNG. Raises :class:`tasks.UnmaskError` where it cannot be written, or matplotlib is missing."""
        with optional("a plot", "unmask[plot]"):
            from matplotlib.figure import Figure
        figure = Figure(figsize=(7, 1.4 + 0.35 * len(self)), layout="constrained")
        axes, names = figure.subplots(), [result.order for result in self]
        means = [float(result.solved.double().mean()) for result in self]
        around = [interval(result.solved) for result in self]
        reach = [[m - low for m, (low, _) in zip(means, around, strict=True)]]
        reach += [[high - m for m, (_, high) in zip(means, around, strict=True)]]
        axes.errorbar(means, range(len(self)), xerr=reach, fmt="o", capsize=3)
        axes.set(yticks=range(len(self)), yticklabels=names, title=self.title)
        axes.set_xlabel(f"{next(iter(self[0].metrics))}, 95 % intervals" if len(self) else "")
        axes.invert_yaxis()
        axes.grid(alpha=0.3)
        if path is not None:
            file = Path(path)
            check_writable(file, "the picture")
            write_atomically(file, lambda temporary: figure.savefig(temporary, dpi=120, format="png"))
        return figure


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


# ---------------------------------------------------------------------- policies by name, and how they play
def load_order(name: str, task: Task, denoiser: Denoiser | None = None) -> Policy:
    """A reference policy by name, or a learned one by packaged name, folder or hub id. Both may carry options:
    ``threshold:theta=0.8``; a policy over sets those of its ``at``: ``runs/sets:threshold=0.7,read=unsure``.

    Raises:
        UnknownNameError, CheckpointError: in one line. UnmaskError: ``learned`` of a denoiser that learned no order, an
            option that the order does not take.
    """
    if name.startswith("belief:"):
        policy = load_order(name.removeprefix("belief:"), task, denoiser)
        if not isinstance(policy, OrderPolicy):
            raise UnmaskError(f"{name}: only an order policy of fillings has a belief that fills; name one")
        return BeliefFills(policy)
    if name.partition(":")[0] in REFERENCES:
        g = reference(name)
        if denoiser is not None and isinstance(g, Learned | LearnedGreedy):
            require_learned(Unmasking(task, denoiser))
        return g
    source, text = name_and_options(name)
    try:
        policy = load_policy(source, task, denoiser)
    except UnknownNameError:
        raise UnknownNameError("order", source, [*REFERENCES, *packaged(PACKAGED_POLICIES)]) from None
    if denoiser is not None:
        policy = policy.to(denoiser.device)
    if text is None:
        return policy
    if policy.actions == "single":
        raise UnmaskError(f"order {name!r}: {source} chooses single positions and takes no options")
    options = read_options(f"order {name!r}", text, policy.at)
    if "remask_threshold" in options and isinstance(policy, OrderPolicy) and not policy.masks_again:
        raise UnmaskError(f"order {name!r}: {source} was not trained to mask again; leave remask_threshold out")
    try:
        return policy.at(**options)
    except UnmaskError as error:
        raise UnmaskError(f"order {name!r}: {error}") from None


def require_suited(name: str, policy: Policy, actions: Actions | None) -> None:
    """Raises :class:`tasks.UnmaskError` where ``actions`` are named and do not allow what ``policy`` does. A learned
    policy that masks again can do without."""
    masks_again = isinstance(policy, Reference) and policy.actions == "set+remask"
    if (actions == "single" and policy.actions != "single") or (actions in ("set", "accept") and masks_again):
        raise UnmaskError(f"{name} is for actions {policy.actions!r}; leave --actions out, or name them")


def played_by(process: Unmasking, policy: Policy) -> Unmasking:
    """``process`` under the rules that ``policy`` is made for, where its own are those of single positions; and filled
    by its belief, where that fills."""
    if isinstance(policy, BeliefFills):
        process = replace(process, denoiser=policy.denoiser(process.denoiser))
    own = process.rules.actions != "single" or policy.actions == "single"
    return process if own else replace(process, rules=replace(process.rules, actions=policy.actions))


def generators(process: Unmasking, policy: Policy, seed: int) -> list[torch.Generator | None]:
    """What the policy is sampled with, and the filling; None for what draws nothing."""
    drawn = (policy.sampled, process.draws)
    return [torch.Generator(process.device).manual_seed(seed + k) if draws else None for k, draws in enumerate(drawn)]


def progress_bar(shown: bool) -> Bar:
    """A bar that goes when it is done; none off a terminal, and of several processes the first alone has one."""
    return Bar(transient=True, disable=not shown or processes.rank() > 0)


Orders = str | Policy | Sequence[str | Policy] | Mapping[str, str | Policy]


def read_orders(orders: Orders | None, process: Unmasking) -> dict[str, Policy]:
    """Policies by the name of their row; names are loaded (:func:`load_order`), None stands for the customary
    references of the rules.

    Raises:
        UnmaskError: no order, two of the same name, or something that is neither a name nor a policy; what
            :func:`load_order` raises.
    """
    given = customary(process.rules.actions) if orders is None else orders
    given = [given] if isinstance(given, str | Policy) else given
    if isinstance(given, Mapping):
        named = list(given.items())
    else:
        named = [(each if isinstance(each, str) else getattr(each, "name", ""), each) for each in given]
    if not named:
        raise UnmaskError("--orders needs at least one order")
    policies: dict[str, Policy] = {}
    for name, order in named:
        if name in policies:
            raise UnmaskError(
                f"two orders are called {name}; leave one out (in Python: name them apart, {{'a name': order}})"
            )
        order = load_order(order, process.task, process.denoiser) if isinstance(order, str) else order
        if not isinstance(order, Policy):
            raise UnmaskError(f"an order is a name, a folder or a Policy, not {type(order).__name__}")
        policies[name] = order
    return policies


def title_of(process: Unmasking, instances: Instances) -> str:
    """What a table says above its rows."""
    return f"{process.task.name}, denoiser {name_of(process.denoiser)}, {len(instances)} instances"


def compare(
    task: str | Task | Unmasking,
    orders: Orders | None = None,
    instances: Instances | None = None,
    seed: int = 0,
    batch: int = 500,
    progress: bool = False,
    *,
    denoiser: Any = None,
    split: str = "test",
    limit: int | None = None,
    **options: Any,
) -> Comparison:
    """Play every instance once with every order, each under the rules that it is made for.

        print(compare("Unmask/Sudoku6x6-v0", ["margin", "runs/policy"], limit=500))

    Reference policies are sampled (a deterministic one only where positions tie), learned ones take their mode.

    Args:
        task: a task, its name with options, an environment's id, or a whole process, which brings its denoiser and
            rules.
        orders: a name, with options as in ``threshold:theta=0.8``, the folder or hub id of an order policy, or a
            policy; or several, in a list or by the name of their row. None: the customary references.
        instances: to play; None: the first ``limit`` held-out ones of the ``split``, or all.
        seed: of the stochastic policies, and of filling by samples.
        batch: instances per forward, of all processes. The rows of deterministic policies do not depend on it; what a
            stochastic one draws for an instance does, as it does on the seed.
        denoiser: packaged name, folder, hub id, backbone or denoiser; an environment has a default one.
        options: ``temperature``, ``device``, ``forward_batch`` and rules, as of
            :func:`unmask_env.registration.make_process`.

    Raises:
        UnmaskError: settings that do not fit together; UnknownNameError, CheckpointError, IncompatibleDenoiserError:
            each in one line.

    Under ``torchrun`` each process plays its part of every batch, and all return the rows of one.
    """
    check("batch", batch, AtLeast1)
    check("seed", seed, Seed)
    if isinstance(task, Unmasking) and (denoiser is not None or options):
        raise UnmaskError("a process has its denoiser and its rules; give a task, or make another process")
    if instances is not None and (limit is not None or split != "test"):
        raise UnmaskError("limit and split choose among the held-out instances; leave them out, or the instances")
    process = task if isinstance(task, Unmasking) else make_process(task, denoiser, **options)
    policies = read_orders(orders, process)
    instances = process.task.select(limit, split=split) if instances is None else instances
    check_instances(process.task, instances)
    if not len(instances):
        raise UnmaskError("there is no instance to play; give at least one")
    results = play(process, policies, instances, seed, batch, progress)
    return Comparison(tuple(results), title_of(process, instances))


def play(
    process: Unmasking, policies: Mapping[str, Policy], instances: Instances, seed: int, batch: int, progress: bool
) -> Iterator[Result]:
    """What :func:`compare` does, once it knows what is compared: each result as soon as it is there."""
    task, device = process.task, process.device
    by_length = (instances.tokens == task.mask_id).sum(1).argsort(stable=True)  # so that rows of a batch end together
    with progress_bar(progress) as bar:
        work = bar.add_task("evaluate", total=len(policies) * len(instances))
        for name, policy in policies.items():
            bar.update(work, description=name)
            started = time.perf_counter()
            playing, draws, parts = played_by(process, policy), generators(process, policy, seed), []
            for rows in by_length.split(batch):
                part = instances[rows].to(device)
                mine, played = play_share(playing, policy, part, draws)
                bar.advance(work, len(rows))
                if len(rows) and not len(mine):  # fewer rows than processes
                    continue
                spent = (played.nfe, played.denoiser_passes, played.policy_passes)
                counts = dict(zip(SPENT, (count.float() for count in spent), strict=True))
                columns = checked_metrics(task, played.tokens, part[mine]) | counts
                parts.append((rows[mine.cpu()], {column: values.cpu() for column, values in columns.items()}))
            columns = processes.in_order(parts)
            spent = [columns.pop(count) for count in SPENT]
            seconds = time.perf_counter() - started
            yield Result(name, columns, *spent, seconds, getattr(policy, "trained", ""))


def add_exact(
    results: Sequence[Result],
    process: Unmasking,
    policies: dict[str, Policy],
    instances: Instances,
    reference_policy: Reference,
    batch: int = 8,
    progress: bool = False,
) -> list[Result]:
    """The results with their exact expectations under greedy filling; the oracle, which sees the answers, has none.

    Args:
        policies: those of ``results``. batch: starts whose boards are listed together.

    Raises:
        TooLargeError: an instance of more than 16 masks, or too many boards.
    """
    exact.check_holes(process.task, instances)
    known = {name: policy for name, policy in policies.items() if not policy.sees_answers}
    parts: dict[str, list[tuple[Tensor, dict[str, Tensor]]]] = {name: [] for name in known}
    hidden = any(policy.reads_hidden for policy in known.values())
    start_of = instances.tokens.unique(dim=0, return_inverse=True)[1]
    # Instances of the same board share its expectations, so they are listed together.
    batches = [(start_of // batch == number).nonzero().squeeze(1) for number in (start_of // batch).unique()]
    with progress_bar(progress) as bar, torch.no_grad():
        work = bar.add_task("exact", total=len(instances))
        for rows in processes.some_of(batches):
            graph = exact.enumerate_boards(process, instances[rows], max_states=3_000_000, hidden=hidden)
            best, log_reference = exact.best_reward(graph), exact.tabulate(graph, reference_policy)
            for name, policy in known.items():
                found = exact.evaluate(graph, policy, log_reference)
                kls = (found.trajectory_kl.clamp(min=0), found.terminal_kl.clamp(min=0))  # 0 may round to below it
                columns = Exact(found.reward, best.maximum(found.reward), *kls)._asdict()
                parts[name].append((rows.cpu(), {name: c[graph.start_of].cpu() for name, c in columns.items()}))
            bar.advance(work, processes.count() * len(rows))
    joined = {name: Exact(**processes.in_order(some)) for name, some in parts.items()}
    return [replace(result, exact=joined.get(result.order)) for result in results]


def empty_table(title: str, names: Sequence[str], numbers: Sequence[str], caption: str | None = None) -> Table:
    """A table with columns of ``names`` and of ``numbers``. Where the terminal is narrow they wrap; nothing is cut."""
    view = Table(title=escape(title), caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in names:
        view.add_column(name, overflow="fold")
    for name in numbers:
        view.add_column(name, justify="right", overflow="fold")
    return view


def exact_table(results: Sequence[Result], reference_name: str) -> Table:
    """A rich table of the exact columns."""
    view = empty_table(
        f"exact, over each order's own choices; divergences from {reference_name} in nats",
        ["order"],
        ["reward", "best possible", "trajectory KL", "terminal KL"],
        "best possible: the most that any order reaches with this denoiser",
    )
    for result in results:
        view.add_row(escape(result.order), *(f"{float(values.mean()):.4f}" for values in result.exact or ()))
    return view


def table(results: Sequence[Result], title: str) -> Table:
    """A rich table, 80 columns wide: the metrics in per cent, the first with its 95 % interval; forwards (NFE), passes
    of the two networks together, and seconds. A learned order says how it was trained."""
    names = {"solved": "solve rate", "cell_accuracy": "cells"}
    stars = ["*" * (result.order in ("oracle", "oracle_sets")) for result in results]
    note = "; * sees the answers (one, where several are right)" if any(stars) else ""
    columns = [*(names.get(name, name) for name in results[0].metrics), "NFE", "passes", "s"]
    view = empty_table(title, ["order"], columns, f"per cent, with 95 % confidence intervals{note}")
    for result, star in zip(results, stars, strict=True):
        cells = []
        for values in result.metrics.values():
            low, high = interval(values)
            cells.append(_percent(float(values.mean())) + f" ({_percent(low)}-{_percent(high)})" * (not cells))
        passes = float((result.passes + result.policy_passes).double().mean())
        how = f" ({result.trained})" * bool(result.trained)
        view.add_row(
            escape(result.order + star + how), *cells, f"{result.nfe:.1f}", f"{passes:.1f}", f"{result.seconds:.1f}"
        )
    return view


# ---------------------------------------------------------------------- the command
@dataclass(frozen=True)
class BoardCommand:
    """What plays: a task with a denoiser, and how it fills."""

    task: str
    """for example sudoku6; a task of your own as file.py:Class or package.module:Class; or an environment's id"""
    denoiser: str | None = None
    """packaged name, folder or hub id; an environment has a default one"""
    actions: Actions | None = None
    """one position per forward, a set of them, or also positions to mask again; accept: what stays on the canvas of a
    denoiser of uniform noise; default: by order"""
    temperature: Temperature | None = None
    """of the filling; 0 takes the denoiser's most likely symbol, 1 samples its distribution; default: the task's"""
    seed: Seed = 0
    """of the stochastic orders"""


@dataclass(frozen=True)
class PlayCommand(BoardCommand):
    """Which orders play which instances of a task with which denoiser, under which rules."""

    orders: tuple[str, ...] | None = None
    """reference policies, with options as in threshold:theta=0.8, and order policies by packaged name, folder or hub
    id, each of which plays the kind of action that it is made for; belief:NAME lets a policy's belief fill, in the
    order of margin. Default: all customary references of ``actions``"""
    puzzles: Path | None = None
    """your own CSV with header Puzzle,Solution: a digit string per board, 0 or . for a blank; Solution may be absent"""
    limit: AtLeast1 | None = None
    """evaluate at most LIMIT held-out instances: the first ones of a fixed list or file, or as many spread over a
    text"""
    difficulty: Literal["all", "easy", "hard"] = "all"
    """packaged Sudoku puzzles that naked and hidden singles alone solve (easy), or those that need more (hard)"""
    split: Literal["validation", "test"] = "test"
    """of the held-out instances; choose settings on the validation split"""
    blanks: AtLeast0 | None = None
    """reveal clues at random until this many blanks are left"""
    nfe_budget: AtLeast1 | None = None
    """cut episodes off after this many forwards"""
    remask_budget: AtLeast0 | None = None
    """positions that an episode may mask again"""
    block_length: AtLeast1 | None = None
    """fill block by block, each of this many positions, behind the prompt (semi-autoregressive)"""
    canvas_steps: AtLeast1 = Rules.canvas_steps
    """with accept, the most forwards of a canvas"""
    stop_entropy: Positive | None = Rules.stop_entropy
    """with accept, a canvas ends earlier where it is stable and its mean entropy is below this (nats); None: never"""
    stop_stable: AtLeast0 = Rules.stop_stable
    """with accept, how many forwards in a row must say the same before a canvas may end earlier"""
    batch: AtLeast1 = 500
    device: str = "cpu"
    threads: Threads | None = None
    """of the CPU; default: as many as PyTorch takes"""

    def rules(self, default: Actions) -> Rules:
        """``default``: the actions, where neither they nor a budget for masking again are given."""
        actions = self.actions or (default if self.remask_budget is None else "set+remask")
        budgets = {"nfe_budget": self.nfe_budget, "remask_budget": self.remask_budget}
        canvas = {name: getattr(self, name) for name in ("canvas_steps", "stop_entropy", "stop_stable")}
        return Rules(actions, block_length=self.block_length, **budgets, **canvas)


@dataclass(frozen=True)
class EvaluateCommand(PlayCommand):
    """Compare orders on the same held-out instances and denoiser: one table, with 95 % confidence intervals."""

    json: Path | None = None
    """write the rows here; - is stdout, and the table then goes to stderr"""
    exact: bool = False
    """on boards of at most 16 blanks: also the exact expected reward of each order, the best that any order could reach
    with this denoiser, and the exact divergences from ``reference``"""
    reference: str = "softmax_confidence"
    """what ``exact`` measures divergences from"""


def prepare(command: PlayCommand, default: Actions) -> tuple[Unmasking, Instances, str]:
    """The process, the instances and the title of the table. Raises :class:`tasks.UnmaskError`."""
    validate(command)
    device = processes.join(resolve_device(command.device, command.threads))
    if command.blanks is not None and command.puzzles is not None:
        raise UnmaskError("--blanks is for the packaged puzzles; your own file says where its blanks are")
    task, source = resolve(
        command.task, command.denoiser, **({} if command.blanks is None else {"blanks": command.blanks})
    )
    instances = task.select(command.limit, command.puzzles, command.difficulty, command.split)
    check_instances(task, instances)
    denoiser = load_denoiser(source, task, device)
    process = Unmasking(task, denoiser, command.rules(default), command.temperature)
    return process, instances, title_of(process, instances)


def run(command: EvaluateCommand) -> None:
    """``unmask evaluate``."""
    processes.join(resolve_device(command.device, command.threads))
    processes.from_first(lambda: check_writable(command.json, "--json"))
    process, instances, title = prepare(command, "single")
    policies = read_orders(command.orders, process)
    for name, policy in policies.items():
        require_suited(name, policy, command.actions)
    if command.exact:
        single = all(policy.actions == "single" for policy in policies.values())
        if not single or process.rules != SINGLE or process.temperature > 0:
            raise UnmaskError(
                "--exact is for greedy filling (--temperature 0), one position at a time, without blocks or budgets"
            )
        exact.check_holes(process.task, instances)
        g = reference(command.reference)
        require_full_support(g)
        if isinstance(g, Learned):
            require_learned(process)
    results, stopped = until_stopped(play(process, policies, instances, command.seed, command.batch, progress=True))
    _report(table(results, title), results, command.json, last=stopped or not command.exact)
    if stopped:
        raise KeyboardInterrupt
    if command.exact:
        results = add_exact(results, process, policies, instances, g, progress=True)
        _report(exact_table(results, command.reference), results, command.json)


def until_stopped(results: Iterable[T]) -> tuple[list[T], bool]:
    """What ``results`` has up to its end or to Ctrl-C, and whether it was that; Ctrl-C before the first goes on up."""
    kept = []
    try:
        for result in results:
            kept.append(result)
    except KeyboardInterrupt:
        if not kept:
            raise
        return kept, True
    return kept, False


def _report(view: Table, results: Sequence[Result], file: Path | None, last: bool = True) -> None:
    """Show a table, and write its rows, to stdout only the ``last`` ones: by the first process alone."""
    if processes.rank() > 0:
        return
    Console(stderr=file == STDOUT).print(view)
    if last or file != STDOUT:
        report_json(file, [result.row() for result in results])
