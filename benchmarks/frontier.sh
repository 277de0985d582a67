#!/bin/sh
# Solve rate against forwards: policies over sets (imitation on boards played by thresholds, then UPO with rewards that
# count forwards) for three training seeds, beside every setting of every reference on the same 2,000 test puzzles.
# A policy sees the denoiser's distributions and not the denoiser, so one that a small denoiser trained may start the
# training for a larger one: INIT, in which SEED stands for the seed.
#   benchmarks/frontier.sh [TASK ENV DENOISER TRAIN_PUZZLES STEPS ITERATIONS INIT]
set -eu
task=${1:-sudoku6} env=${2:-Unmask/Sudoku6x6-v0} denoiser=${3:-sudoku6-tiny}
puzzles=${4:-10000} steps=${5:-3000} iterations=${6:-20} init=${7:-}
learned=""
for seed in 0 1 2; do
    runs=runs/frontier/$(basename "$denoiser")-$seed
    shared="--env $env --denoiser $denoiser --actions set --seed $seed --threads 1 --resume auto"
    unmask train imitation $shared --puzzles "$puzzles" --steps "$steps" --out "$runs/imitation" \
        ${init:+--init "$(echo "$init" | sed "s/SEED/$seed/")"}
    last=$runs/imitation
    if [ "$iterations" -gt 0 ]; then
        unmask train upo $shared --init "$runs/imitation" --speed 1 --lr 1e-4 --beta 0 --iterations "$iterations" \
            --out "$runs/upo"
        last=$runs/upo
    fi
    learned="$learned $last"
done
python benchmarks/frontier.py --task "$task" --denoiser "$denoiser" --limit "${LIMIT:-2000}" --until "${UNTIL:-6}" --orders heuristics $learned \
    --out "benchmarks/results/frontier-$(basename "$denoiser").png"
