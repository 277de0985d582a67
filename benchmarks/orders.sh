#!/bin/sh
# Learned orders against every heuristic: the demonstration's recipe (imitation of the oracle on uncertain states, then
# UPO) for three training seeds, 2,000 test puzzles, differences in pairs. A run that was cut off goes on.
#   benchmarks/orders.sh [TASK ENV DENOISER TRAIN_PUZZLES STEPS ITERATIONS]
set -eu
task=${1:-sudoku6} env=${2:-Unmask/Sudoku6x6-v0} denoiser=${3:-sudoku6-tiny}
puzzles=${4:-3000} steps=${5:-800} iterations=${6:-20}
runs=runs/orders/$(basename "$denoiser")
for seed in 0 1 2; do
    shared="--env $env --denoiser $denoiser --seed $seed --threads 1 --resume auto"
    unmask train imitation $shared --puzzles "$puzzles" --steps "$steps" --out "$runs-$seed/imitation"
    unmask train upo $shared --init "$runs-$seed/imitation" --iterations "$iterations" --out "$runs-$seed/upo"
done
python benchmarks/compare.py --task "$task" --denoiser "$denoiser" --limit "${LIMIT:-2000}" --orders \
    random left_to_right max_confidence margin entropy softmax_confidence top_k oracle \
    "$runs-0/imitation" "$runs-0/upo" "$runs-1/imitation" "$runs-1/upo" "$runs-2/imitation" "$runs-2/upo" \
    --out "benchmarks/results/orders-$(basename "$denoiser").json"
