"""Speed as a factor of the reward or as a summand: UPO over sets under both, from the same start.

    python benchmarks/haste.py --threads 1 --out benchmarks/results/haste.json

With the factor r ((H - NFE + 1) / H)^alpha a wrong board earns nothing however fast; with the summand
r + alpha (H - NFE + 1) / H it earns its speed, and from some alpha on, filling the whole board at once earns most. The
start is the soft threshold, where policies over sets begin by default; puzzles are validation puzzles.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from agents import evaluate, upo
from agents.policy import load_policy
from pretrain.checkpoint import write_json
from unmask_env import parallel, registration
from unmask_env.core import Rules


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--denoiser", default="sudoku6-tiny")
    parser.add_argument("--env", default="Unmask/Sudoku6x6-v0")
    parser.add_argument("--init", default=None, help="a policy over sets to start from, instead of the reference")
    parser.add_argument("--weights", type=float, nargs="+", default=[10.0], help="alpha")
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--groups", type=int, default=16, help="puzzles per iteration, 8 trajectories each")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--puzzles", type=int, default=500, help="validation puzzles")
    parser.add_argument("--runs", type=Path, default=Path("runs/haste"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    task, denoiser = registration.resolve(args.env, args.denoiser)
    instances = task.heldout(args.puzzles, "validation")
    rows: list[dict[str, Any]] = []

    def add(name: str, policy: Any, **settings: Any) -> None:
        result = evaluate.evaluate(task, denoiser, {name: policy}, instances, rules=Rules("set"))[0]
        rows.append(settings | result.row())

    before = parallel.SoftThreshold() if args.init is None else load_policy(args.init, task, denoiser, "set")
    add("before", before)
    for form in ("product", "sum"):
        for weight in args.weights:
            out = args.runs / f"{form}-{weight:g}-seed{args.seed}"
            config = upo.UPOConfig(
                out=str(out),
                env=args.env,
                denoiser=args.denoiser,
                init=args.init,
                rules=Rules("set", speed=weight, speed_form=form),
                iterations=args.iterations,
                puzzles=args.groups,
                lr=args.lr,
                beta=0.0,
                mine=0.0,
                seed=args.seed,
                threads=args.threads,
                resume=(out / "state.safetensors").exists(),
            )
            add(f"{form}, alpha {weight:g}", upo.train(config), speed_form=form, speed=weight)
    report = {"command": "python benchmarks/haste.py " + " ".join(sys.argv[1:]), "rows": rows}
    write_json(args.out, report | {"date": datetime.date.today().isoformat()})
    view = Table("reward", "solved %", "NFE")
    for row in rows:
        view.add_row(row["order"], f"{100 * row['solve_rate']:.1f}", f"{row['nfe']:.2f}")
    Console().print(view)


if __name__ == "__main__":
    main()
