#!/bin/sh
# Speed as a factor of the reward or as a summand: UPO over sets under both, from the soft threshold, where policies over
# sets begin, and beside that reference's mode; 500 validation puzzles. With the factor r ((H - NFE + 1) / H)^alpha a wrong
# board earns nothing however fast; with the summand r + alpha (H - NFE + 1) / H it earns its speed.
set -eu
shared="--denoiser sudoku6-tiny --actions set --speed 10 --iterations 40 --puzzles 16 --lr 1e-3 --beta 0"
for form in no-speed-bonus speed-bonus; do
    unmask train upo $shared --$form --threads 1 --resume auto --out runs/speed/$form
done
python benchmarks/compare.py --task sudoku6 --denoiser sudoku6-tiny --split validation --limit 500 \
    --orders soft_threshold threshold:theta=0.9 runs/speed/no-speed-bonus runs/speed/speed-bonus \
    --against soft_threshold threshold:theta=0.9 --out benchmarks/results/haste.json
