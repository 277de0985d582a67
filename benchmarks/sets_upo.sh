#!/bin/sh
# Does UPO improve policies over sets? Imitation on boards played by thresholds, then UPO from that very policy with rewards
# that count forwards, paired by puzzle at equal forwards on 2,000 test puzzles, three training seeds.
#   benchmarks/sets_upo.sh [SEED ...]
set -eu
for seed in ${*:-0 1 2}; do
    runs=runs/sets-upo/$seed
    shared="--env Unmask/Sudoku6x6-v0 --denoiser sudoku6-tiny --actions set --seed $seed --threads 1 --resume auto"
    unmask train imitation $shared --puzzles 10000 --steps "${STEPS:-3000}" --out "$runs/imitation"
    unmask train upo $shared --init "$runs/imitation" --speed 1 --lr 1e-4 --beta 0 --iterations "${ITERATIONS:-20}" \
        --out "$runs/upo"
    python benchmarks/compare.py --task sudoku6 --denoiser sudoku6-tiny --actions set --limit "${LIMIT:-2000}" \
        --thresholds 0.1 0.2 0.35 0.5 0.7 0.85 0.95 0.99 --orders "$runs/imitation" "$runs/upo" \
        --out "benchmarks/results/sets-upo-$seed.json"
done
