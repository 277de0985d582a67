#!/bin/sh
# Every heuristic of single positions on every registered environment with its default denoiser: the reference scores of
# the environments' pages.
#   benchmarks/references.sh [ID...]
set -eu
[ $# -gt 0 ] || set -- $(python -c 'import unmask_env; print(*unmask_env.ids())')
for id in "$@"; do
    case $id in
        Unmask/FreeText-*) how="--limit 300" ;;
        Unmask/Sudoku9x9-*) how="--limit 100" ;;
        Unmask/TextInfill-*) how="--limit 400" ;;
        *) how="--limit 1000" ;;
    esac
    python benchmarks/compare.py --task "$id" $how --orders random left_to_right max_confidence margin entropy \
        --out "benchmarks/results/references/$(basename "$id").json"
done
