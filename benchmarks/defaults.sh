#!/bin/sh
# `unmask train` as it is, on registered environments: the card of each run says how it ended on validation, the JSON in
# its folder how on 2,000 test instances. An hour for those named here; Sudoku9x9 takes two hours of a core, FreeText
# three. A run that was cut off goes on.
#   benchmarks/defaults.sh [ENVIRONMENT ...]
set -eu
for env in ${*:-Sudoku4x4 Sudoku6x6 Zebra Countdown TextInfill}; do
    unmask train --env "Unmask/$env-v0" --threads 1 --resume auto --out "runs/defaults/$env"
    python benchmarks/compare.py --task "Unmask/$env-v0" --limit "${LIMIT:-2000}" --threads 1 \
        --orders max_confidence "runs/defaults/$env" --out "runs/defaults/$env/test.json"
done
