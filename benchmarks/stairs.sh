#!/bin/sh
# A task with many right answers, learned from rewards alone: labels of single decisions (values, the default there) or
# of finished boards, three training seeds; 1,000 test instances; on the first 200 the most that any order reaches.
#   benchmarks/stairs.sh
set -eu
runs=runs/stairs task=benchmarks/stairs.py:Stairs learned=""
unmask pretrain mdm --task "$task" --steps 1500 --batch 128 --dim 48 --layers 2 --threads 1 --resume auto \
    --out "$runs/denoiser"
for seed in 0 1 2; do
    for labels in boards values; do
        run=$runs/$labels-$seed
        unmask train --task "$task" --denoiser "$runs/denoiser" --labels "$labels" --seed "$seed" --threads 1 \
            --resume auto --out "$run"
        learned="$learned $run"
    done
    learned="$learned belief:$runs/values-$seed"
done
python benchmarks/compare.py --task "$task" --denoiser "$runs/denoiser" --limit 1000 \
    --orders random left_to_right max_confidence margin entropy oracle $learned --out benchmarks/results/stairs.json
unmask evaluate --task "$task" --denoiser "$runs/denoiser" --limit 200 --exact --orders max_confidence "$runs/values-0" \
    --json benchmarks/results/stairs-exact.json
