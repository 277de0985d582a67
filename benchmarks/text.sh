#!/bin/sh
# Masked diffusion against its relatives on English text (State of the Union addresses: trained on until 1995, tested from
# 2008 on): the unbiased bound on 2,000 held-out windows. One network, one corpus, one optimiser. Plain masked diffusion
# is trained twice: for as many steps as the others, and for as much longer as LoMDM's run costs.
set -eu
one() {
    name=$1 kind=$2 steps=$3 seed=$4
    shift 4
    run=runs/text/$name-$seed
    unmask pretrain "$kind" --task text --batch 16 --dim 64 --layers 3 --lr 3e-3 --ema 0.998 --log-every 25 \
        --steps "$steps" --seed "$seed" --threads 1 --resume auto --out "$run" "$@"
    unmask likelihood --task text --denoiser "$run" --limit 2000 --seed 1 --json "benchmarks/results/text-$name-$seed.json"
}
for seed in 0 1 2; do
    one lomdm lomdm 10000 $seed
    one mdm mdm 10000 $seed
    one mdm-longer mdm 16000 $seed
done
for kind in genmd4 learned-schedule ar block; do one $kind $kind 10000 0; done
for kind in udm audm; do one $kind $kind 10000 0 --prompt-fraction 0; done  # nothing is given here
