#!/bin/sh
# A policy of 2 % of a frozen denoiser that was stopped early, from rewards alone: UPO's setting (4x4 Sudoku, 8 blanks,
# cell accuracy), a denoiser of 791,428 parameters. Three training seeds each of one block of 32 channels that reads the
# denoiser's hidden states, of one that does not, and of a copy of the denoiser, with two passes; 1,000 test puzzles.
#   benchmarks/narrow.sh
set -eu
runs=runs/narrow task=sudoku4:blanks=8,reward=cell_accuracy orders=""
unmask pretrain mdm --task sudoku4 --steps 60 --batch 128 --dim 128 --layers 4 --lr 3e-3 --warmup 50 --ema 0.95 --seed 0 \
    --threads 1 --resume auto --out "$runs/denoiser"
for seed in 0 1 2; do
    shared="--env $task --denoiser $runs/denoiser --defer-above 2 --levels 8 --puzzles 100 --seed $seed --threads 1 --resume auto"
    unmask train $shared --no-copy --dim 32 --layers 1 --num-passes 1 --read-hidden --out "$runs/hidden-$seed"
    unmask train $shared --no-copy --dim 32 --layers 1 --num-passes 1 --out "$runs/no-hidden-$seed"
    unmask train $shared --out "$runs/copy-$seed"
    for policy in hidden no-hidden copy; do
        orders="$orders $runs/$policy-$seed belief:$runs/$policy-$seed"
    done
done
python benchmarks/compare.py --task "$task" --denoiser "$runs/denoiser" --limit 1000 --metric cell_accuracy --orders \
    random max_confidence margin entropy oracle $orders --out benchmarks/results/narrow.json
