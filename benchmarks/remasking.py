"""What opening positions again is worth: policies over sets beside themselves with a doubter, at equal forwards.

    python benchmarks/remasking.py --init "runs/frontier/sudoku6-tiny-set-seed{seed}/imitation" --threads 1 \
        --out benchmarks/results/remasking.json

trains per seed a doubter (``unmask train imitation --actions set+remask --init ...``) for a policy that
``benchmarks/frontier.py`` made, and plays both at several thresholds on the same held-out puzzles. Closing is the same
network's in both. Each point is compared, puzzle by puzzle, with the policy without at the same threshold, and at equal
forwards: with a coin that plays each puzzle at one of two neighbouring thresholds, weighted to take as many forwards on
average. A run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from agents import evaluate, frontier, imitation
from agents.evaluate import Result
from agents.imitation import ImitationConfig
from agents.policy import load_policy
from pretrain.checkpoint import write_json
from unmask_env import registration
from unmask_env.core import Rules

THRESHOLDS = (0.1, 0.2, 0.35, 0.5, 0.6, 0.7, 0.85, 0.95)
ABOVE = 0.99  # without a doubter also here, for the highest of those to be between two points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--denoiser", default="sudoku6-tiny")
    parser.add_argument("--env", default="Unmask/Sudoku6x6-v0")
    parser.add_argument("--init", required=True, help="policies over sets; {seed} in it is the seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train-puzzles", type=int, default=10000)
    parser.add_argument("--steps", type=int, default=1500, help="of imitation")
    parser.add_argument("--puzzles", type=int, default=2000, help="held-out puzzles")
    parser.add_argument("--split", choices=["validation", "test"], default="test")
    parser.add_argument("--runs", type=Path, default=Path("runs/remasking"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    task, denoiser = registration.resolve(args.env, args.denoiser)
    instances = task.heldout(args.puzzles, args.split)
    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        out, init = args.runs / f"{args.denoiser.replace('/', '-')}-seed{seed}", args.init.format(seed=seed)
        imitation.train(
            ImitationConfig(
                out=str(out),
                env=args.env,
                denoiser=args.denoiser,
                init=init,
                rules=Rules("set+remask"),
                puzzles=args.train_puzzles,
                steps=args.steps,
                seed=seed,
                threads=args.threads,
                resume=(out / "state.safetensors").exists(),
            )
        )
        played: dict[str, list[Result]] = {}
        for actions, folder in (("set", init), ("set+remask", str(out))):
            policy = load_policy(folder, task, denoiser, actions).to(denoiser.device)
            played[actions] = []
            heights = (*THRESHOLDS, ABOVE) if actions == "set" else THRESHOLDS
            for threshold in track(heights, f"{actions}, seed {seed}", transient=True):
                policy.threshold = threshold
                rules = Rules(actions)
                played[actions] += evaluate.evaluate(task, denoiser, {actions: policy}, instances, 0, 50, rules=rules)
        for threshold, without, doubting in zip(THRESHOLDS, *played.values(), strict=False):
            rows.append(
                {
                    "seed": seed,
                    "threshold": threshold,
                    "set": without.row(),
                    "set+remask": doubting.row(),
                    "at this threshold": evaluate.paired_difference(doubting.solved, without.solved),
                    "at equal forwards": frontier.at_equal_forwards(played["set"], doubting),
                }
            )
        command = "python benchmarks/remasking.py " + " ".join(sys.argv[1:])
        write_json(args.out, {"command": command, "date": datetime.date.today().isoformat(), "rows": rows})


if __name__ == "__main__":
    main()
