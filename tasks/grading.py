"""Whether a text holds the right answer of a mathematical problem, by ``math-verify`` in processes of its own.

Some texts keep the library busy for ever. The processes (:mod:`tasks.grading_worker`) therefore end at a deadline,
which counts as wrong, and are replaced. One starts with the first answer, and more where that pays; they serve all
tasks, and end with the process that asks.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from tasks.errors import MissingLibraryError, UnmaskError, first_line
from tasks.settings import Range

DEADLINE = 2.0  # seconds of processor time
Deadline = Annotated[float, Range(least=0.1, most=600)]
MOST = 8  # processes
AHEAD = 16  # requests that a process has at a time
PIPE = 32_000  # bytes of them: below what a pipe holds, so that sending never waits for grading
OVERTIME = (-signal.SIGPROF, -signal.SIGALRM)  # how a process ends at its deadline
KEPT = 4096  # verdicts: metrics ask what the reward has asked before
BOXED = "\\boxed{"


def grade(asked: Sequence[tuple[str, str]], deadline: float = DEADLINE) -> list[bool]:
    """Of each text and answer, whether the answer found in the text equals ``answer``: the last number or formula, or
    what is marked as it (``\\boxed{}``, ``####``). No text is ever run.

    Args:
        deadline: seconds of processor time that one may take, and four times as many by the clock; then it is wrong.

    Raises:
        UnmaskError: the library is missing or does not load.
    """
    marked = {(text, answer): text.rpartition("####")[2] for text, answer in asked}
    verdicts = {
        (text, answer): bool(_bare(answer)) and _bare(answer) in (_bare(found), _bare(_boxed(found)))
        for (text, answer), found in marked.items()
    }
    requests = {
        pair: json.dumps([_readings(found), pair[1], deadline]) for pair, found in marked.items() if not verdicts[pair]
    }
    judged = {request: _judged[request] for request in requests.values() if request in _judged}
    new = [request for request in dict.fromkeys(requests.values()) if request not in judged]
    if new:
        check_library()
        judged |= zip(new, _pool.ask(new), strict=True)
    verdicts |= {pair: judged[request] for pair, request in requests.items()}
    _judged.update(judged)
    for request in [*_judged][:-KEPT]:
        _judged.pop(request, None)
    return [verdicts[pair] for pair in asked]


def check_library() -> None:
    """Raises :class:`UnmaskError`, saying what to install, where ``math-verify`` is missing."""
    try:
        found = importlib.util.find_spec("math_verify")
    except (ImportError, ValueError):
        found = None
    if found is None:
        raise MissingLibraryError("checking answers", "No module named 'math_verify'", "unmask[text]")


def _bare(text: str) -> str:
    """Without the marks of bold print, of formulas and of a sentence's end around it."""
    return text.strip("*$ \t\r\n").rstrip(".").rstrip("*$ ")


def _boxed(text: str) -> str:
    """What the last ``\\boxed{}`` holds; nothing where there is none, or where it does not close."""
    start, depth = text.rfind(BOXED) + len(BOXED), 1
    for end in range(start, len(text) if BOXED in text else 0):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end]
    return ""


def _readings(text: str) -> list[str]:
    """A line may be a formula without saying so."""
    line = _bare(text)
    formula = "\n" not in line and "$" not in line and BOXED not in line and any(mark in line for mark in "\\^_")
    return [text, f"${line}$"] if formula else [text]


class _Worker(subprocess.Popen[bytes]):
    """One process. It says ``+`` when it is ready, and then 1 or 0 to every request, in their order."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("grading_worker.py")
        # -P: beside the script are modules of common names. A session of its own: Ctrl-C is for the parent. A fixed
        # hash: the order of sets must not change a verdict.
        try:
            super().__init__(
                [sys.executable, "-P", str(script)],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=os.environ | {"PYTHONHASHSEED": "0"},
                start_new_session=True,
            )
        except OSError as error:
            raise UnmaskError(f"no process to grade answers can be started ({first_line(error)})") from None
        self.started, self.ready = time.monotonic(), False
        self.held: deque[int] = deque()  # indices of the requests without a reply
        self.send(json.dumps(sys.path))

    def send(self, lines: str) -> None:
        data = memoryview(lines.encode() + b"\n")
        with contextlib.suppress(BrokenPipeError):  # it has ended, as reading will show
            while data:
                data = data[self.stdin.write(data) :]

    def close(self) -> None:
        for pipe in (self.stdin, self.stdout, self.stderr):
            pipe.close()

    def end(self) -> None:
        self.kill()
        self.wait()
        self.close()


class _Pool:
    """Processes that grade, at most as many as there are processors, each with a few requests at a time."""

    def __init__(self, size: int | None = None) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.size = min(MOST, cores) if size is None else size
        self.startup = self.waited = 0.0  # seconds: the last start's, and of requests since that one
        self.forget()

    def forget(self) -> None:
        """In a forked process: those there are belong to the parent, and must see it end."""
        for worker in getattr(self, "_workers", ()):
            worker.close()
            worker.returncode = 0
        self._lock, self._workers = threading.Lock(), []

    def end(self) -> None:
        for worker in self._workers:
            worker.end()
        self._workers = []

    def ask(self, requests: Sequence[str]) -> list[bool]:
        """The verdicts on requests, in their order."""
        with self._lock:
            return self._ask(requests)

    def _ask(self, requests: Sequence[str]) -> list[bool]:
        verdicts, waiting, again = [False] * len(requests), deque(range(len(requests))), set()
        try:
            while waiting or any(worker.held for worker in self._workers):
                self._start(len(waiting))
                self._hand_out(requests, waiting)
                for worker in self._listen(bool(waiting)):
                    said = worker.stdout.read(AHEAD)
                    if said == b"+":
                        self.startup, worker.ready = time.monotonic() - worker.started, True
                        continue
                    for reply in said:
                        verdicts[worker.held.popleft()] = reply == ord("1")
                    if not said and self._ended(worker) not in OVERTIME and worker.held[0] not in again:
                        again.add(worker.held[0])  # somebody else ended it: another one judges
                        waiting.extendleft(reversed(worker.held))
                    elif not said:
                        waiting.extendleft(reversed([*worker.held][1:]))
        finally:  # an interruption leaves no reply behind that a later request would read
            for worker in [worker for worker in self._workers if worker.held]:
                self._workers.remove(worker)
                worker.end()
        return verdicts

    def _start(self, waiting: int) -> None:
        """The first process at once; as many again once requests have waited for three times what a start takes."""
        for worker in [worker for worker in self._workers if worker.ready and not worker.held]:
            if worker.poll() is not None:
                self._ended(worker)
        there = len(self._workers)
        enough = all(worker.ready for worker in self._workers) and self.waited >= 3 * self.startup
        if waiting and there < self.size and (enough or not there):
            self._workers += [_Worker() for _ in range(min(max(there, 1), self.size - there, waiting))]
            self.waited = 0.0

    def _hand_out(self, requests: Sequence[str], waiting: deque[int]) -> None:
        """Some requests to every process that has none: fewer towards the end, and none that would fill its pipe."""
        for worker in [worker for worker in self._workers if worker.ready and not worker.held]:
            most, lines = min(AHEAD, -(-len(waiting) // (2 * self.size))), []
            while len(lines) < most and (not lines or sum(map(len, [*lines, requests[waiting[0]]])) < PIPE):
                worker.held.append(waiting.popleft())
                lines.append(requests[worker.held[-1]])
            if lines:
                worker.send("\n".join(lines))

    def _listen(self, waiting: bool) -> list[_Worker]:
        """Those that have said something or ended; none where it is time for a further process."""
        room = waiting and all(worker.ready for worker in self._workers)
        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                if worker.held or not worker.ready:
                    selector.register(worker.stdout, selectors.EVENT_READ, worker)
            began = time.monotonic()
            patient = room and len(self._workers) < self.size
            heard = selector.select(max(0.0, 3 * self.startup - self.waited) if patient else None)
            self.waited += room * (time.monotonic() - began)
        return [key.data for key, _ in heard]

    def _ended(self, worker: _Worker) -> int:
        """Its return code. Raises :class:`UnmaskError` where it was never ready: no other will be."""
        self._workers.remove(worker)
        code, said = worker.wait(), worker.stderr.read().decode(errors="replace").split("\n")
        worker.close()
        if not worker.ready:
            why = next((line for line in reversed(said) if line.strip()), f"exit code {code}")
            raise UnmaskError(f"answers cannot be graded, as math-verify does not load: {why[:200]}")
        return code


_judged: dict[str, bool] = {}  # by request, the latest last
_pool = _Pool()
atexit.register(_pool.end)
os.register_at_fork(after_in_child=_pool.forget)
