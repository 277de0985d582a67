#!/bin/sh
# Policy iteration from rewards alone, three training seeds: one position per forward, and sets, beside every reference
# and "its belief fills" (belief:RUN) on 2,000 test puzzles, differences in pairs. A run that was cut off goes on.
#   benchmarks/rewards.sh [TASK ENV DENOISER OPTIONS...]
set -eu
task=${1:-sudoku6} env=${2:-Unmask/Sudoku6x6-v0} denoiser=${3:-sudoku6-tiny}
[ $# -gt 3 ] && shift 3 || set --
runs=runs/rewards/$(basename "$denoiser") single="" sets=""
for seed in 0 1 2; do
    shared="--env $env --denoiser $denoiser --seed $seed --threads 1 --resume auto"
    unmask train policy-iteration $shared "$@" --out "$runs-$seed/single"
    unmask train policy-iteration $shared "$@" --actions set --num-passes 3 --puzzles 1500 --steps 400 \
        --out "$runs-$seed/set"
    single="$single $runs-$seed/single belief:$runs-$seed/single" sets="$sets $runs-$seed/set"
done
python benchmarks/compare.py --task "$task" --denoiser "$denoiser" --limit "${LIMIT:-2000}" \
    --orders random max_confidence margin entropy $single --out "benchmarks/results/rewards-$(basename "$denoiser").json"
python benchmarks/frontier.py --task "$task" --denoiser "$denoiser" --limit "${LIMIT:-2000}" --orders threshold $sets \
    --out "benchmarks/results/rewards-sets-$(basename "$denoiser").png"
