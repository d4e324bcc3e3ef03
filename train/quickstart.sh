#!/usr/bin/env bash
# The main job on built-in data and a CPU: train the tiny preset, score it and the demo weights on rooms that no
# training sees, write a report. Exits with 1 unless the trained model is clearly better than a constant depth.
#   bash train/quickstart.sh [--output DIR] [--limit ROOMS] [options of train/stage1_geometry.sh ...]
# A finished report is never overwritten: the next run takes a numbered folder. An interrupted run is continued.
set -euo pipefail
cd "$(dirname "$0")/.."
WANTED=runs/quickstart ROOMS=
while [ "${1:-}" = --output ] || [ "${1:-}" = --limit ]; do
    case "$1" in
        --output) WANTED="${2:?--output needs a folder}" ;;
        --limit) ROOMS="${2:?--limit needs a number}" ;;
    esac
    shift 2
done
OUT="$WANTED" NUMBER=1
while [ -e "$OUT/report.md" ]; do NUMBER=$((NUMBER + 1)) && OUT="$WANTED-$NUMBER"; done
if [ -n "$(ls -A "$OUT" 2> /dev/null)" ] && [ ! -d "$OUT/stage1" ]; then
    echo "error: will not write into  $OUT" >&2
    echo "  why: it holds something else than a quickstart; nothing was changed" >&2
    echo "  fix: choose another --output, or leave it out" >&2
    exit 2
fi
. train/python.sh
CORES=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((CORES < 4 ? CORES : 4))}" # a tiny model gains nothing from more

say() { echo "quickstart: $*" >&2; }
score() { # NAME [options of eval/recon.py]; a missed gate (1) is told at the end
    local code=0
    rm -rf "${OUT:?}/$1"
    "$PYTHON" eval/recon.py --output "$OUT/$1" ${ROOMS:+--limit "$ROOMS"} --pictures 3 "${@:2}" > /dev/null || code=$?
    if [ "$code" -gt 1 ]; then exit "$code"; fi
}

say "results go to $OUT"
say "stage 1: a tiny model learns geometry from rendered rooms (about 8 minutes on 2 cores)"
code=0
bash train/stage1_geometry.sh --config configs/tiny_stage1.yaml --runtime.device cpu "$@" \
    --runtime.output "$OUT/stage1" --runtime.resume auto || code=$?
if [ "$code" -eq 75 ]; then say "stopped; the same command goes on from here"; fi
if [ "$code" -ne 0 ]; then exit "$code"; fi

say "evaluation on rooms that no training sees (about 3 minutes)"
score trained --model "$OUT/stage1/model" --gate 0.8
score demo
exec "$PYTHON" -m eval.quickstart "$OUT"
