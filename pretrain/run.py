"""A training run's folder: settings, logs, progress, the state to resume from, a clean stop on Ctrl-C."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from rich.console import RenderableType
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text
from torch import Tensor, nn

from pretrain import processes
from pretrain.checkpoint import CheckpointError, checked_device, load_state, save_state
from pretrain.logs import Logs
from tasks import UnmaskError
from tasks.errors import first_line
from tasks.files import absent, remove_empty, write_json
from tasks.settings import AtLeast0, AtLeast1, NotNegative, Positive, Seed, Threads, check

MAY_CHANGE = {"resume", "save_every", "log_every", "out", "threads", "wandb"}  # they do not change what is learned
MODELS = ("config.json", "model.safetensors", "adapter_config.json", "adapter_model.safetensors")
STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
STOPPING = "stopping after this step and saving; once more stops without saving"
MEASURED = 3.0  # seconds of steps from which the duration is estimated
LONG = 60.0  # seconds from which on it is told
LONGER = 1.5  # times the seconds that were left before, from which on it is told again
HALF_A_MINUTE = 30.0


@dataclass(frozen=True)
class FitConfig:
    """What all trainings of denoisers share."""

    task: str
    """what to learn, for example sudoku6 (``unmask list`` shows all)"""
    out: str
    """folder for what is trained, the logs and the state to resume from"""
    steps: AtLeast1 = 4000
    batch: AtLeast1 = 256
    """sequences per step, over all processes"""
    lr: NotNegative = 2e-3
    warmup: AtLeast0 = 100
    """steps of linear warm-up"""
    schedule: Literal["cosine", "constant"] = "cosine"
    weight_decay: NotNegative = 0.01
    grad_clip: Positive = 1.0
    seed: Seed = 0
    device: str = "cpu"
    threads: Threads | None = None
    """CPU threads; the default is torch's"""
    resume: Literal["never", "must", "auto"] = "never"
    """auto: go on from the state in ``out`` if there is one; must: there has to be one"""
    log_every: AtLeast1 = 50
    save_every: AtLeast1 = 500
    wandb: str | None = None
    """a project of Weights & Biases to log to, too (the extra wandb)"""


class Interrupted(Exception):  # noqa: N818 - not an error: the run stopped where it was asked to
    """Ctrl-C, SIGTERM or SIGHUP: the state was saved; the same command with --resume auto goes on."""


class _StoppedAtOnce(KeyboardInterrupt):
    """A stop in the middle of a step, which nothing on the way takes for an error."""


def resolve_device(device: str, threads: int | None = None) -> torch.device:
    """``device`` if this machine has it; ``threads`` limits the CPU's.

    Raises:
        UnmaskError: an unknown device, CUDA where there is none, or fewer than one thread.
    """
    if threads is not None:
        check("threads", threads, Threads)
        torch.set_num_threads(threads)
    return checked_device(device)


class Bar(Progress):
    """A bar at most 80 columns wide for a name of up to 30, and none off a terminal; its note stands below it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            TextColumn("{task.description}", markup=False, table_column=Column(overflow="fold")),
            BarColumn(20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            **options,
        )
        self.disable = self.disable or not self.console.is_terminal

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        for task in self.tasks:
            if task.fields.get("note"):
                yield Padding(Text(task.fields["note"]), (0, 0, 0, 2))


def duration(seconds: float) -> str:
    """As people say it: ``about 6 minutes``."""
    units = {"day": 86400, "hour": 3600, "minute": 60}
    unit = next((name for name, size in units.items() if seconds >= 2 * size), "second")
    count = max(1, round(seconds / units.get(unit, 1)))
    return f"about {count} {unit}{'s' * (count != 1)}"


class Run:
    """Drives a loop over ``steps`` steps in the folder ``out``; use as a context manager.

    Files: ``run.json`` (settings), ``state.safetensors`` (everything to resume from), ``tb/`` (TensorBoard, where it is
    installed), and the model with its card, as it was at the last save. While a run is going on no other can begin in
    its folder.

    Under ``torchrun`` the first process alone reads, writes and shows; all go on from the state that it has read, so
    nobody else needs to see the folder. The state is the same in all processes, and the number of them may change.

    A resumed run may be longer: ``iterations``, or ``steps`` where there are none, may grow. What depends on its
    length, such as a learning rate that falls to its end, is from there on what it is in the longer run.

    Args:
        settings: a frozen dataclass with ``out``, ``resume`` and ``save_every``; saved as ``run.json``. Its ``wandb``,
            if any, is a project of Weights & Biases to log to.
        steps: length of the loop.
        parts: named objects with ``state_dict`` and ``load_state_dict`` that make up the state.
        title: begins the lines of the log; what stands behind it in brackets is told once.
        publish: writes the model after so many steps to a folder; called after each save of the state, so that a folder
            with a model is known to be a run's, and a run that is killed in between writes the model when it goes on.
        round_length: every so many steps there is one that takes longer; default: the first alone does.

    Raises:
        UnmaskError: ``out`` already holds a run and ``resume`` is never, holds one with other settings or a model of
            another origin, or another run is going on in it; Weights & Biases is asked for and takes no logs.
        CheckpointError: there is nothing to resume, or it is damaged.
    """

    def __init__(
        self,
        settings: Any,
        steps: int,
        parts: dict[str, Any],
        title: str,
        publish: Callable[[int, Path], None] | None = None,
        round_length: int | None = None,
    ) -> None:
        self.settings, self.steps, self.parts, self.main = settings, steps, parts, processes.rank() == 0
        self.publish = publish
        self.out = Path(settings.out)
        self.step = 0
        self._stop = self._interruptible = False
        self.title, _, self._details = title.partition(" (")
        self._round_length, self._clock = round_length or steps, []
        self._over: float | None = None  # when it is to end, by what was told last
        state_file = self.out / "state.safetensors"
        described = json.loads(json.dumps(dataclasses.asdict(settings), default=str))
        described["kind"] = type(settings).__name__  # two kinds of run may have the same settings
        state = processes.from_first(lambda: _state_to_resume(settings, steps, described))
        if state is not None:
            self._load(state, state_file)
        for part in parts.values():
            if isinstance(part, nn.Module):
                processes.same_weights(part)
        self._described = described
        lock = processes.from_first(lambda: _lock(self.out))
        self._lock, made = lock if self.main else (None, [])
        if self.main:
            try:
                self.logs = Logs(self.out, described, self.step, getattr(settings, "wandb", None))
                write_json(self.out / "run.json", described)
            except (UnmaskError, OSError):
                self._unlock()
                remove_empty(made)
                raise
            self.progress = Bar()

    def _load(self, state: dict[str, Any], file: Path) -> None:
        try:
            for name, part in self.parts.items():
                if isinstance(part, torch.optim.Optimizer):
                    _check_optimizer(part, state["parts"][name])
                part.load_state_dict(state["parts"][name])
        except (LookupError, RuntimeError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
            raise CheckpointError(f"{file} does not belong to this run ({first_line(error)})") from None
        if (name := self._not_finite()) is not None:
            raise CheckpointError(f"{file} is damaged: the {name} has weights that are not finite")
        self.step = state["step"]

    def __enter__(self) -> Run:
        if threading.current_thread() is threading.main_thread():
            ignored = {getattr(signal, "SIGHUP", None)}  # where nohup says so
            heeded = [n for n in STOPS if n not in ignored or signal.getsignal(n) != signal.SIG_IGN]
            self._old_handlers = {number: signal.signal(number, self._interrupt) for number in heeded}
        try:
            self._begin()
        except BaseException as error:  # a full disk, say: nobody else calls __exit__
            self.__exit__(type(error))
            raise
        return self

    def _begin(self) -> None:
        if not self.main:
            return
        self.progress.start()
        self._bar = self.progress.add_task(self.title, total=self.steps, completed=self.step, note="")
        if self.logs.missing:
            self.say(f"{self.title}: {self.logs.missing}")
        if self._details:
            self.say(f"{self.title}: {self._details.removesuffix(')')}, {self.steps} steps")
        if not (self.out / "state.safetensors").exists():
            self.save()  # so that --resume works from the first moment on
        elif self.publish is not None:
            self.publish(self.step, self.out)  # which a kill right after the state was saved may have left out

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._old_handlers.items():
                signal.signal(number, handler)
        if self.main:
            self.progress.stop()
            self.logs.close(failed=kind not in (None, Interrupted))
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _interrupt(self, signum: int, frame: FrameType | None) -> None:
        if self._stop:
            raise KeyboardInterrupt
        self._stop = True
        if self._interruptible:
            raise _StoppedAtOnce
        if self.main:
            os.write(2, f"\nunmask: {STOPPING}\n".encode())  # at once: a lock of print's may be held

    def loop(self) -> Iterator[int]:
        """The steps still to do. After each: save when due; on Ctrl-C, SIGTERM or SIGHUP save and raise
        :class:`Interrupted`. Weights that are not finite are an :class:`UnmaskError` in place of the save."""
        self._clock = [time.monotonic()]
        self._line = (self.step, time.perf_counter())
        while self.step < self.steps:
            yield self.step
            self.step += 1
            if self.main:
                self.progress.update(self._bar, completed=self.step)
                self._tell_duration()
            stop = processes.any_of(self._stop)  # one process's Ctrl-C stops all of them after the same step
            if stop or self.step % self.settings.save_every == 0 or self.step == self.steps:
                self._require_finite()
                self.save()
            if stop:
                raise self._stopped()

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Around long work of a step that changes none of the run's parts: a stop leaves it at once and saves the state
        of the step before. Several processes stop together, and so after the step."""
        if processes.count() > 1:
            yield
            return
        try:
            self._interruptible = True
            if self._stop:
                raise _StoppedAtOnce
            yield
        except _StoppedAtOnce:
            self._require_finite()
            self.save()
            raise self._stopped() from None
        finally:
            self._interruptible = False

    def _stopped(self) -> Interrupted:
        return Interrupted(f"stopped at step {self.step} of {self.steps}; the same command with --resume auto goes on")

    def _not_finite(self) -> str | None:
        """The model or optimizer that holds numbers that are not finite."""
        for name, part in self.parts.items():
            if not all(bool(number.isfinite().all()) for number in _trained(part)):
                return name
        return None

    def _require_finite(self) -> None:
        if (name := self._not_finite()) is not None:
            raise UnmaskError(
                f"the {name} has weights that are not finite after step {self.step}; {self.out} keeps the state of "
                "the save before. Try a lower lr in another --out"
            )

    def _tell_duration(self) -> None:
        """Say how long the rest will take, where that is long: from the first steps, and again after the first step of
        a later round where that makes it half as long again."""
        now = time.monotonic()
        self._clock.append(now)
        if self._over is None:
            begun, first = self._clock[:2]
            if len(self._clock) == 2 or now - begun < MEASURED:
                return
            self._each = (now - first) / (len(self._clock) - 2)
            left, when = self.remaining(first - begun, self._each), ""
        else:
            before, self._clock = self._clock[-2], [now]
            if (self.step - 1) % self._round_length:
                return
            left, when = self.remaining(now - before, self._each), "now "
            if left < LONGER * (self._over - now):
                return
        self._over = now + left
        if left >= LONG:
            self.say(f"{self.title}: {when}{duration(left)} on this machine")

    def remaining(self, first: float, each: float) -> float:
        """Seconds that the steps left to do take, if the first of a round takes ``first`` and others ``each``."""
        rounds = -(-self.steps // self._round_length) - (-(-self.step // self._round_length))
        return (self.steps - self.step) * each + rounds * max(0.0, first - each)

    def log(self, values: dict[str, float], note: str = "") -> None:
        """Scalars of the current step to the logs; ``note`` below the progress bar, off a terminal a line of its
        own."""
        if self.main:
            self.logs.write(values, self.step)
            if note:
                self.note(note)
        if note:
            self._line = (self.step + 1, time.perf_counter())

    def rate(self, each: float) -> float:
        """Of what every step has ``each``, how many a second took since the last line of the log."""
        return each * (self.step + 1 - self._line[0]) / (time.perf_counter() - self._line[1])

    def note(self, text: str) -> None:
        """Show ``text`` below the progress bar, off a terminal as a line of its own."""
        if self.main:
            self.progress.update(self._bar, note=text)
            if not self.progress.console.is_terminal:
                self.say(f"{self.title} {self.step + 1}/{self.steps} {text}")

    def counter(self, what: str, most: int) -> Callable[[int], None]:
        """For long work within a step: a function that takes how much more was done, and twice a minute notes how much
        of at most ``most`` it is. ``what`` has places for both: ``"{:,} of up to {:,} states"``."""
        done, said = 0, time.monotonic()

        def count(more: int) -> None:
            nonlocal done, said
            done += more
            if time.monotonic() - said >= HALF_A_MINUTE:
                said = time.monotonic()
                self.note(what.format(done, most))

        return count

    def say(self, line: str) -> None:
        """``line`` on stdout, above the progress bar where there is one."""
        if self.main:
            self.progress.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def save(self) -> None:
        """Write the weights and the state to resume from; only the first process does."""
        if self.main:
            state = {
                "step": self.step,
                "settings": self._described,
                "parts": {name: part.state_dict() for name, part in self.parts.items()},
            }
            save_state(self.out / "state.safetensors", state)
            if self.publish is not None:
                self.publish(self.step, self.out)


def _state_to_resume(settings: Any, steps: int, described: dict[str, Any]) -> dict[str, Any] | None:
    """The state in ``settings.out`` that a run of ``steps`` steps goes on from; None: it begins.

    Raises:
        UnmaskError: as :class:`Run`, before the parts are loaded.
    """
    _check_place(settings)
    out = Path(settings.out)
    state_file = out / "state.safetensors"
    if settings.resume == "never" or (settings.resume == "auto" and not state_file.exists()):
        if state_file.exists():
            raise UnmaskError(f"{out} already holds a run; add --resume auto to go on, or name another --out")
        return None
    state = load_state(state_file)
    kinds = {"settings": dict, "parts": dict, "step": int}
    if not isinstance(state, dict) or not all(type(state.get(key)) is kinds[key] for key in kinds):
        raise CheckpointError(f"{state_file} is not the state of a run")
    length = "iterations" if "iterations" in described else "steps"
    differing = [
        f"{key} was {json.dumps(value, default=str)}, is {json.dumps(described.get(key))}"
        for key, value in state["settings"].items()
        if key not in MAY_CHANGE and not _same(described.get(key), value)
        if not (key == length and type(value) is int and described[key] > value)
    ]
    if differing:
        raise UnmaskError(
            f"cannot resume {out} with other settings: {'; '.join(differing)}; name another --out, or delete the folder"
        )
    if not 0 <= state["step"] <= steps:
        raise CheckpointError(f"{state_file} is at step {state['step']} of a run of {steps}: it is damaged")
    return state


def _same(setting: Any, stored: Any) -> bool:
    """Whether both are equal, of JSON; nothing equals a tensor."""
    return type(setting) is type(stored) and setting == stored


def _check_place(settings: Any) -> None:
    """Raises :class:`tasks.UnmaskError` where ``out`` is no place for a run: a file, or a model that none made."""
    out = Path(settings.out)
    if not str(settings.out).strip() or "\0" in str(out):
        raise UnmaskError(f"--out must name a folder, not {str(settings.out)!r}")
    try:
        if out.exists() and not out.is_dir():
            raise UnmaskError(f"{out} is a file; name a folder with --out")
        written = [place.resolve() for place in (out, out / "best") if place.exists()]
        for name in ("denoiser", "init", "base"):
            source = getattr(settings, name, None)
            if isinstance(source, str) and _folder(source).resolve() in written:
                raise UnmaskError(f"--{name} and --out are the same folder, {_folder(source)}; name another --out")
        models = [
            file for place in ("", "best") for name in MODELS if (out / (file := os.path.join(place, name))).exists()
        ]
        if models and not (out / "state.safetensors").exists():
            raise UnmaskError(f"{out} holds a model that no run here made ({models[0]}); name another --out")
    except (OSError, RuntimeError) as error:  # too long a name; links in a circle
        raise UnmaskError(f"cannot write in {out}: {getattr(error, 'strerror', None) or first_line(error)}") from None


def _check_optimizer(optimizer: torch.optim.Optimizer, state: Any) -> None:
    """Raises :class:`ValueError` where ``state`` is not of the optimizer's form; torch would find out as it steps."""
    for own, group in zip(optimizer.state_dict()["param_groups"], state["param_groups"], strict=True):
        for name, value in own.items():
            pairs = [(group[name], value)]
            if isinstance(value, list | tuple):
                pairs = zip(group[name], value, strict=True)
            if not all(_alike(stored, each) for stored, each in pairs):
                raise ValueError(f"{name} of the optimizer is {group[name]!r:.40}")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, kept in state["state"].items():
        for name, value in kept.items():
            if not isinstance(value, Tensor) or (value.ndim and value.shape != parameters[number].shape):
                raise ValueError(f"{name} of the optimizer has another form")
            if not value.is_floating_point():
                raise ValueError(f"{name} of the optimizer holds no floating numbers")


def _alike(stored: Any, own: Any) -> bool:
    """Whether both are of a kind: numbers, and finite, or of the same type."""
    if isinstance(own, int | float) and not isinstance(own, bool):
        return type(stored) in (int, float) and abs(stored) <= sys.float_info.max
    return type(stored) is type(own)


def _trained(part: Any) -> list[Tensor]:
    """The numbers of a model, an optimizer or anything else with parameters."""
    if isinstance(part, nn.Module):
        return list(part.state_dict().values())
    if isinstance(part, torch.optim.Optimizer):
        return [value for kept in part.state.values() for value in kept.values() if isinstance(value, Tensor)]
    return list(getattr(part, "parameters", {}).values())


def _folder(source: str) -> Path:
    """The folder that a model's name with its options may mean."""
    source = source.removeprefix("hf:").removeprefix("source=")
    return Path(source if Path(source).exists() else re.split("[:,]", source.strip('"'))[0])


def _lock(out: Path) -> tuple[int | None, list[Path]]:
    """A lock of the folder that dies with its process, None where the system has none; and the folders made for it, the
    innermost first.

    Raises:
        UnmaskError: another process holds it, or nothing can be written there.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None, []
    made = absent(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".run.tmp").touch()
        (out / ".run.tmp").unlink()
        file = os.open(out, os.O_RDONLY)
    except OSError as error:
        remove_empty(made)
        raise UnmaskError(f"cannot write in {out}: {error.strerror}; name another --out") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        raise UnmaskError(f"another run is going on in {out}; wait for it, or name another --out") from None
    return file, made


def learning_rate(config: FitConfig, step: int) -> float:
    """Linear warm-up, then cosine decay to a tenth, or constant."""
    scale = min(1.0, (step + 1) / max(1, config.warmup))
    if config.schedule == "cosine":
        scale *= 0.55 + 0.45 * math.cos(math.pi * min(1.0, step / config.steps))
    return config.lr * scale


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Of every parameter group, times its ``multiple`` where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = value * group.get("multiple", 1.0)


def decayed_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for AdamW: matrices decay, vectors (norms, biases) do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
