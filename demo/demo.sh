#!/usr/bin/env bash
# The whole way: plan, pack, run and verify the shipped model A in a third of its bytes, and draw the page.
# Usage: demo/demo.sh [PYTHON]. Writes out/demo and out/demo-report.html, and starts afresh every time.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}
export XDG_CACHE_HOME=$PWD/out/demo/cache # calibrate here and now, rather than read what an earlier run left
rm -rf out/demo out/demo-report.html
mkdir -p out/demo
model=$("$python" -c 'import os; from haversack.data import reference_model; print(os.path.relpath(reference_model("a")))')

step() {
    local title=$1 shown= argument
    shift
    for argument in "$@"; do
        if [[ $argument == *' '* ]]; then argument="'$argument'"; fi
        shown+=" $argument"
    done
    printf '\n== %s\n$ haversack%s\n' "$title" "$shown"
    "$python" -m haversack "$@"
}

started=$SECONDS
step '1/5 plan: weigh every option on this model, choose within 9 MiB, promise' \
    plan "$model" --tensor-budget 9MiB --context 512 \
    --calibrate --calibration-tokens 4096 --evaluations 2 -o out/demo/plan.json
step '2/5 pack: apply the plan' \
    pack "$model" --plan out/demo/plan.json --calibration-tokens 4096 -o out/demo/packed
step '3/5 run: generate from the packed folder' \
    run out/demo/packed --prompt 'The function returns a list of' --max-new-tokens 40
step '4/5 verify: predicted against measured, in fresh processes' \
    verify out/demo/packed
step '5/5 report: one page' \
    report out/demo/packed -o out/demo-report.html
printf '\nDone in %d s. Open out/demo-report.html.\n' $((SECONDS - started))
