#!/bin/sh
# What masking again is worth: policies over sets beside themselves with a remask network, at equal forwards. The first
# policies are those of benchmarks/frontier.sh; filling is the same network's in both.
#   benchmarks/remasking.sh [DENOISER TRAIN_PUZZLES STEPS]
set -eu
denoiser=${1:-sudoku6-tiny} puzzles=${2:-10000} steps=${3:-1500}
for seed in 0 1 2; do
    init=runs/frontier/$denoiser-$seed/imitation out=runs/remasking/$denoiser-$seed
    unmask train imitation --denoiser "$denoiser" --actions set+remask --init "$init" --puzzles "$puzzles" \
        --steps "$steps" --seed $seed --threads 1 --resume auto --out "$out"
    python benchmarks/compare.py --task sudoku6 --denoiser "$denoiser" --limit 2000 --batch 50 --orders "$init" "$out" \
        --thresholds 0.1 0.2 0.35 0.5 0.6 0.7 0.85 0.95 0.99 --out "benchmarks/results/remasking-$denoiser-$seed.json"
done
