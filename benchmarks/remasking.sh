#!/bin/sh
# What masking again is worth: a packaged policy over sets, learned from rewards alone, beside itself with a remask network
# (three training seeds), at equal forwards. Filling is the same network's in all.
#   benchmarks/remasking.sh [DENOISER POLICY TRAIN_PUZZLES STEPS]
set -eu
denoiser=${1:-sudoku6-tiny} policy=${2:-sudoku6-tiny-sets-rewards} puzzles=${3:-5000} steps=${4:-1000}
learned=""
for seed in 0 1 2; do
    out=runs/remasking/$denoiser-$seed
    unmask train imitation --denoiser "$denoiser" --actions set+remask --init "$policy" --puzzles "$puzzles" \
        --steps "$steps" --seed $seed --threads 1 --resume auto --out "$out"
    learned="$learned $out"
done
python benchmarks/compare.py --task sudoku6 --denoiser "$denoiser" --limit 2000 --batch 50 --orders "$policy" $learned \
    --thresholds 0.1 0.2 0.35 0.5 0.6 0.7 0.85 0.95 0.99 --out "benchmarks/results/remasking-$denoiser.json"
