#!/bin/sh
# UPO from rewards alone, in the setting of its paper: 4x4 Sudoku, 8 blanks, cell accuracy, a denoiser made weak by
# stopping its training early. The paper's three realisations of the reference, three seeds each.
# 1,000 test puzzles; settings were chosen on validation. Then 6x6 Sudoku, Countdown and Zebra.
#   benchmarks/upo.sh [SEED ...]
set -eu
seeds=${*:-0 1 2} runs=runs/upo task=sudoku4:blanks=8,reward=cell_accuracy
unmask pretrain mdm --task sudoku4 --steps 100 --batch 128 --dim 48 --layers 3 --lr 3e-3 --warmup 50 --ema 0.95 --seed 0 \
    --threads 1 --resume auto --out "$runs/denoiser"
for seed in $seeds; do
    shared="--env $task --denoiser $runs/denoiser --defer-above 2 --iterations 60 --seed $seed --threads 1 --resume auto"
    unmask train upo $shared --reference max_confidence --out "$runs/deterministic-$seed"
    unmask train upo $shared --reference softmax_confidence --out "$runs/softmax-$seed"
    unmask train upo $shared --reference top_k:k=5 --out "$runs/top_k-$seed"
done
python benchmarks/compare.py --task "$task" --denoiser "$runs/denoiser" --limit 1000 --metric cell_accuracy --orders \
    random max_confidence oracle "$runs"/deterministic-* "$runs"/softmax-* "$runs"/top_k-* --out benchmarks/results/upo-sudoku4.json
# Elsewhere: half of the usual groups, 10 iterations of imitation and 30 of UPO.
elsewhere() {
    task=$1 env=$2 denoiser=$3 orders=""
    for seed in $seeds; do
        for reference in max_confidence softmax_confidence top_k:k=5; do
            run=$runs/$denoiser-${reference%%:*}-$seed orders="$orders $run"
            unmask train upo --env "$env" --denoiser "$denoiser" --reference $reference --puzzles 16 --imitation 10 \
                --iterations 30 --seed "$seed" --threads 1 --resume auto --out "$run"
        done
    done
    python benchmarks/compare.py --task "$task" --denoiser "$denoiser" --limit 2000 --orders random margin entropy \
        max_confidence softmax_confidence top_k:k=5 $orders --against max_confidence softmax_confidence top_k:k=5 --out "benchmarks/results/upo-$denoiser.json"
}
elsewhere sudoku6 Unmask/Sudoku6x6-v0 sudoku6-tiny
elsewhere countdown Unmask/Countdown-v0 countdown3
elsewhere zebra:houses=3 Unmask/Zebra-v0 zebra3
