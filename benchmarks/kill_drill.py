"""Kill training runs at random moments and around saves, resume them, and compare with the run that nobody touched.

    python benchmarks/kill_drill.py --points 100 --out benchmarks/results/kill-drill.json

Seven learners in turn, each on 4x4 Sudoku for seconds, in processes of their own. A point is one kill (SIGKILL) of a
run: after a random time, or when a save is under way or has just been made. Then the same command with ``--resume
auto`` ends it. Its model, its state's step and the best policy must be those of the untouched run to the bit.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import tyro
from common import report
from rich.console import Console

from pretrain.checkpoint import load_state

SHARED = "--env Unmask/Sudoku4x4-v0 --threads 1 --save-every 1 --seed 3"
RUNS = {
    "policy-iteration": f"train policy-iteration {SHARED} --iterations 3 --puzzles 100 --steps 20 --defer-above 2 "
    "--validate-every 20",
    "imitation": f"train imitation {SHARED} --puzzles 100 --steps 60 --defer-above 2 --validate-every 20",
    "upo": f"train upo {SHARED} --iterations 12 --imitation 2 --puzzles 8 --group 4 --validate-every 4",
    "ppo-sb3": f"train ppo-sb3 {SHARED} --iterations 12 --num-envs 8 --validate-every 4",
    "ppo-torchrl": f"train ppo-torchrl {SHARED} --iterations 12 --num-envs 8 --validate-every 4",
    "grpo-torchrl": f"train grpo-torchrl {SHARED} --iterations 12 --puzzles 8 --group 4 --validate-every 4",
    "pretrain mdm": "pretrain mdm --task sudoku4 --threads 1 --save-every 1 --seed 3 --steps 60 --batch 32 --dim 32 "
    "--layers 2",
}


def start(name: str, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "agents.cli", *RUNS[name].split(), "--resume", "auto", "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(name: str, out: Path) -> float:
    """Run to the end; the seconds it took."""
    began = time.perf_counter()
    process = start(name, out)
    said = process.communicate()[1].decode(errors="replace").strip()
    if process.returncode:
        raise SystemExit(f"{name} ended with code {process.returncode}: {said[-300:]}")
    return time.perf_counter() - began


def kept(out: Path) -> dict[str, Any]:
    files = [out / "model.safetensors", out / "config.json", out / "best" / "model.safetensors"]
    return {str(path.relative_to(out)): path.read_bytes() for path in files if path.exists()} | {
        "step": load_state(out / "state.safetensors")["step"]
    }


def kill_one(name: str, out: Path, seconds: float, draws: random.Random, around_save: bool) -> str:
    """Kill a run of ``seconds``; where it was."""
    process, state = start(name, out), out / "state.safetensors"
    wait, deadline = draws.uniform(0.2, 1.0) * seconds, time.perf_counter() + 3 * seconds
    saves, seen, began = draws.randint(1, 6), 0, time.perf_counter()
    last = None
    while process.poll() is None and time.perf_counter() < deadline:
        if around_save:
            temporary = [
                path for path in (out / ".state.safetensors.tmp", out / ".model.safetensors.tmp") if path.exists()
            ]
            now = state.stat().st_mtime_ns if state.exists() else None
            seen += now is not None and now != last
            last = now
            if seen >= saves and (temporary or draws.random() < 0.02):
                break
        elif time.perf_counter() - began > wait:
            break
        time.sleep(0.0005)
    process.kill()
    process.wait()
    if process.stderr is not None:
        process.stderr.close()
    return f"step {load_state(state)['step']}" if state.exists() else "before the first save"


def main(points: int = 100, seed: int = 0, runs: Path = Path("runs/kill-drill"), out: Path | None = None) -> None:
    """Args: points: kills in all, spread over the learners."""
    console, draws = Console(), random.Random(seed)
    shutil.rmtree(runs, ignore_errors=True)
    whole = {}
    for name in RUNS:
        folder = runs / name.replace(" ", "-") / "whole"
        seconds = finish(name, folder)
        whole[name] = kept(folder), seconds
        console.print(f"{name}: untouched in {seconds:.1f} s")
    rows: list[dict[str, Any]] = []
    for point in range(points):
        name = list(RUNS)[point % len(RUNS)]
        folder = runs / name.replace(" ", "-") / str(point)
        around = point // len(RUNS) % 2 == 1
        where = kill_one(name, folder, whole[name][1], draws, around)
        finish(name, folder)
        same = kept(folder) == whole[name][0]
        rows.append({"learner": name, "moment": "around a save" if around else "random", "killed": where, "same": same})
        console.print(rows[-1])
        shutil.rmtree(folder)
        report(out, seed=seed, points=len(rows), lost=sum(not row["same"] for row in rows), rows=rows)
    console.print(f"{len(rows)} kills, {sum(not row['same'] for row in rows)} not bit-identical")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
