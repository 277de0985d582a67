#!/bin/sh
# UPO's setting (4x4 Sudoku, 8 blanks, cell accuracy) on denoisers made weak on purpose by stopping training early: the
# heuristics, the oracle, UPO from the max-confidence reference alone (the paper's, with cross-entropy), imitation of the
# oracle, and UPO from there. A small denoiser trained to the end leaves an order no room at all.
#   benchmarks/denoiser_strength.sh [SEED]
set -eu
seed=${1:-0} task=sudoku4:blanks=8,reward=cell_accuracy
for steps in 100 140 180; do
    runs=runs/strength/$steps-$seed
    unmask pretrain mdm --task sudoku4 --steps $steps --batch 128 --dim 48 --layers 3 --lr 3e-3 --warmup 50 --ema 0.95 \
        --seed "$seed" --threads 1 --resume auto --out "$runs/denoiser"
    shared="--env $task --denoiser $runs/denoiser --defer-above 2 --seed $seed --threads 1 --resume auto"
    unmask train upo $shared --reference max_confidence --iterations 60 --num-passes 1 --out "$runs/upo-alone"
    unmask train imitation $shared --puzzles 1500 --steps 500 --out "$runs/imitation"
    unmask train upo $shared --init "$runs/imitation" --iterations 20 --out "$runs/upo"
    python benchmarks/compare.py --task "$task" --denoiser "$runs/denoiser" --limit 1000 --orders random left_to_right \
        max_confidence margin entropy oracle "$runs/upo-alone" "$runs/imitation" "$runs/upo" \
        --out "benchmarks/results/denoiser-strength-$steps.json"
done
