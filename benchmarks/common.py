"""What benchmarks share: the report that they write, timing, and runs of many denoisers, single-threaded, resumable."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agents.evaluate import paired_difference
from pretrain.backbone import Backbone
from pretrain.train import PretrainConfig, pretrain
from tasks import Task, UnmaskError
from tasks.files import write_json


def report(out: Path | None, **content: Any) -> None:
    """Write ``content`` as JSON, with the command, the commit and the date; nothing without ``out``."""
    if out is None:
        return
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    made = {"command": " ".join(["python", *sys.argv]), "commit": commit, "date": datetime.date.today().isoformat()}
    write_json(out, made | content)


def interleaved(
    paths: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of every path in each of ``repeats`` rounds, by ``clock``; one more, before them, warms up."""
    spent: dict[str, list[float]] = {name: [] for name in paths}
    for repeat in range(repeats + 1):
        for name, path in paths.items():
            started = clock()
            path()
            if repeat:
                spent[name].append(clock() - started)
    return spent


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Of the rounds."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def once(
    config: PretrainConfig, measure: Callable[[Backbone], dict[str, Any]], task: Task | None = None, **how: Any
) -> dict[str, Any]:
    """What ``measure`` finds of the model that ``config`` trains, with its ``cpu_seconds`` (of this process, so that
    runs beside it hardly matter; None of a resumed run). Kept in the run's folder: a finished run is not repeated.

    Args:
        task: in place of the one that the configuration names. how: settings of the measurement.

    Raises:
        UnmaskError: the folder holds a result of other settings.
    """
    out = Path(config.out)
    finished = out / "result.json"
    settings = json.loads(json.dumps({**dataclasses.asdict(config), **how}, default=str))
    if finished.exists():
        result = json.loads(finished.read_text())
        if result.get("settings") != settings:
            raise UnmaskError(f"{out} holds a result of other settings; name another --runs, or delete the folder")
        return result
    torch.set_num_threads(1)
    resumed = (out / "state.safetensors").exists()
    config = dataclasses.replace(config, threads=1, resume="auto")
    out.mkdir(parents=True, exist_ok=True)
    with (out / "log.txt").open("a") as log, contextlib.redirect_stdout(log):
        started = time.process_time()
        model = pretrain(config, task)
        seconds = time.process_time() - started
    result = {"settings": settings, "steps": config.steps, "seed": config.seed}
    result |= {"cpu_seconds": None if resumed else round(seconds, 1)} | measure(model)
    write_json(finished, result)
    return result


def in_parallel(run: Callable[[Any], dict[str, Any]], jobs: Sequence[Any], processes: int) -> list[dict[str, Any]]:
    """Results in the order of ``jobs``."""
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(run, jobs))


STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 10: 2.262, 20: 2.093}  # 97.5 %, by n


def half_interval(values: Sequence[float]) -> float | None:
    """Half the 95 % interval of the mean over seeds (Student's t); None of one seed."""
    quantile = STUDENT.get(len(values))
    return None if quantile is None else quantile * float(torch.tensor(values).std()) / len(values) ** 0.5


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """The mean with half of its interval, and each value."""
    return {"mean": sum(values) / len(values), "half_interval": half_interval(values), "each": list(values)}


def without_settings(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in result.items() if key != "settings"} for result in results]


def in_pairs(ours: Tensor, other: Tensor) -> dict[str, Any]:
    """Failures, their ratio, and the paired difference (mean, low, high) of what two orders (n,) solve."""
    failures = [float((1 - solved).sum()) for solved in (ours, other)]
    ratio = failures[0] / failures[1] if failures[1] else None
    return {"failures": failures, "failure_ratio": ratio, "difference": paired_difference(ours, other)}
