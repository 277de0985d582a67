#!/bin/sh
# What each part of the order policy buys, on 6x6 Sudoku: one short imitation run per variant, all else equal. Evaluated
# on the validation puzzles, so that choices made here do not leak into the test results.
set -eu
train() {
    name=$1
    shift
    unmask train imitation --denoiser sudoku6-tiny --puzzles 1500 --steps 400 --threads 1 --resume auto \
        --out "runs/ablations/$name" "$@"
}
train as-shipped
train one-pass --num-passes 1
train not-copied --no-copy
train without-tokens --no-read-tokens
train without-denoiser --no-read-denoiser
train with-hidden --read-hidden
unmask train upo --denoiser sudoku6-tiny --reference softmax_margin --iterations 30 --threads 1 --resume auto \
    --out runs/ablations/upo-alone
python benchmarks/compare.py --task sudoku6 --denoiser sudoku6-tiny --split validation --limit 2000 \
    --orders margin runs/ablations/* --out benchmarks/results/ablations.json
