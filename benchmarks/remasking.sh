#!/bin/sh
# What masking again is worth: a packaged policy over sets, learned from rewards alone, beside itself with a remask network
# (three training seeds), at equal forwards. Filling is the same network's in all.
#   benchmarks/remasking.sh [DENOISER POLICY TRAIN_PUZZLES STEPS]
set -eu
denoiser=${1:-sudoku6-tiny} policy=${2:-sudoku6-tiny-sets-rewards} puzzles=${3:-5000} steps=${4:-1000}
for seed in 0 1 2; do
    out=runs/remasking/$denoiser-$seed
    unmask train imitation --denoiser "$denoiser" --actions set+remask --init "$policy" --puzzles "$puzzles" \
        --steps "$steps" --seed $seed --threads 1 --resume auto --out "$out"
    python benchmarks/compare.py --task sudoku6 --denoiser "$denoiser" --limit 1000 --batch 250 --threads 1 \
        --thresholds 0.35 0.5 0.7 0.85 0.95 --orders "$policy" "$out" \
        --out "benchmarks/results/remasking-$denoiser-$seed.json"
done
