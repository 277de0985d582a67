"""Several processes under ``torchrun``: whose part of the work is whose, and how the parts come together again.

Each process plays and differentiates its share. Gradients are averaged beside the loss, rows are gathered, and the
first process alone writes and shows. Where there is one process, every function here hands back what it was given.

    device = processes.join(device)                                 # once, before anything is made
    mine = processes.share(config, "puzzles")                       # a config with this process's part of them
    generator = step_generator(device, seed, step, processes.rank())  # streams of its own; those of rank 0 are one's
    loss.backward()
    processes.average_gradients(model.parameters())

A process that ends takes the others with it: their next exchange fails in one line, and ``torchrun`` stops them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tasks import UnmaskError
from tasks.errors import first_line

TIMEOUT = timedelta(minutes=30)  # for which a process waits for the others
T = TypeVar("T")


# ---------------------------------------------------------------------- the group
def launched() -> int:
    """How many processes ``torchrun`` has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(device: torch.device) -> torch.device:
    """The device of this process, which has joined the others if ``torchrun`` started several: of CUDA devices one
    each."""
    if launched() == 1:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        with _together():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    return device


def leave() -> None:
    """The end of the work together, if there was any."""
    if _joined():
        dist.destroy_process_group()


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if _joined() else 0


def count() -> int:
    """How many processes work together."""
    return dist.get_world_size() if _joined() else 1


def require_one(what: str) -> None:
    """Raises :class:`tasks.UnmaskError` where ``torchrun`` has started several processes for ``what`` runs in one."""
    if launched() > 1:
        raise UnmaskError(
            f"{what} runs in one process, not in {launched()}; leave torchrun out. Several are for pretrain, "
            "train policy-iteration, imitation and upo, and evaluate"
        )


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """An exchange. Raises :class:`tasks.UnmaskError` where another process takes no part in it any more."""
    try:
        yield
    except RuntimeError as error:  # of either backend
        raise UnmaskError(
            "another process of this run has ended, or did not answer within "
            f"{TIMEOUT.total_seconds() / 60:.0f} minutes; its own message says why ({first_line(error)})"
        ) from None


def _device() -> torch.device:
    """Where exchanges of the group's run."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


# ---------------------------------------------------------------------- parts of the work
def share(config: T, *names: str) -> T:
    """``config``, a dataclass, with this process's part of the counts ``names``, which are those of all processes.

    Raises:
        UnmaskError: one does not split over the processes.
    """
    for name in names:
        if getattr(config, name) % count():
            raise UnmaskError(f"{name} {getattr(config, name)} does not split over {count()} processes")
    return replace(config, **{name: getattr(config, name) // count() for name in names})  # type: ignore[type-var]


def some_of(rows: Sequence[T]) -> Sequence[T]:
    """Every so manieth of ``rows``: those of this process."""
    return rows[rank() :: count()]


# ---------------------------------------------------------------------- and together again
def gather(value: T) -> list[T]:
    """The values of all processes, by rank. Tensors in them are to be on the CPU."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    with _together():
        dist.all_gather_object(values, value)
    return values


def in_order(parts: Iterable[tuple[Tensor, dict[str, Tensor]]]) -> dict[str, Tensor]:
    """Columns of rows that the processes have worked on, in the order of the rows.

    Args:
        parts: of this process: indices (n,) of rows, and columns (n, ...) of them; all on the CPU. Every row is in one.
    """
    everyone = [part for some in gather(list(parts)) for part in some]
    order = torch.cat([rows for rows, _ in everyone]).argsort()
    return {name: torch.cat([columns[name] for _, columns in everyone])[order] for name in everyone[0][1]}


def mean(scalars: dict[str, float]) -> dict[str, float]:
    """Of each scalar over the processes that have it."""
    if count() == 1:
        return scalars
    having: dict[str, list[float]] = {}
    for part in gather(scalars):
        for name, value in part.items():
            having.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in having.items()}


def most(number: int) -> int:
    """The largest of the processes' numbers."""
    return max(gather(number))


def any_of(flag: bool) -> bool:
    """Whether it is so in some process."""
    if count() == 1:
        return flag
    flags = torch.tensor(float(flag), device=_device())
    with _together():
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


def from_first(make: Callable[[], T]) -> T:
    """What ``make`` gives in the first process, which alone runs it; an :class:`tasks.UnmaskError` there is one
    everywhere."""
    if count() == 1:
        return make()
    sent: list[Any] = [None, None]
    failed = None
    if rank() == 0:
        try:
            sent[0] = make()
        except UnmaskError as error:
            failed, sent[1] = error, str(error)
    with _together():
        dist.broadcast_object_list(sent, src=0)
    if failed is not None or sent[1] is not None:
        raise failed or UnmaskError(sent[1])
    return sent[0]


# ---------------------------------------------------------------------- weights
def same_weights(model: nn.Module) -> None:
    """All processes go on from the first one's parameters and buffers."""
    if count() > 1:
        model.load_state_dict(from_first(lambda: {key: value.cpu() for key, value in model.state_dict().items()}))


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """The mean over the processes in place of each gradient, one exchange for all of them.

    A process that has no gradient of a parameter counts as 0. What has none anywhere keeps none, so that an optimizer
    leaves it alone as it does in one process.
    """
    if count() == 1:
        return
    trained = [p for p in parameters if p.requires_grad]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    having = torch.tensor([float(p.grad is not None) for p in trained], device=trained[0].device)
    flat = torch.cat([*(gradient.flatten() for gradient in gradients), having])
    with _together():
        dist.all_reduce(flat)
    *sums, having = flat.split([*(p.numel() for p in trained), len(trained)])
    for p, total, processes in zip(trained, sums, having.tolist(), strict=True):
        p.grad = (total / count()).view_as(p).to(p.dtype) if processes else None
