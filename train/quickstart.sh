#!/usr/bin/env bash
# The main job on built-in data and a CPU: the tiny preset learns geometry (stage 1) and to answer questions (stage 2),
# is scored on rooms that no training sees beside the demo weights and blind answers, and a report is written.
# Exits with 1 unless the model of stage 1 is clearly better than a constant depth and the losses of stage 2 are finite.
#   bash train/quickstart.sh [--output DIR] [--limit N] [--stage2-steps N] [options of train/stage1_geometry.sh ...]
# --limit N scores only the first N rooms and N questions.
# A finished report is never overwritten: the next run takes a numbered folder. An interrupted run is continued.
set -euo pipefail
cd "$(dirname "$0")/.."
WANTED=runs/quickstart LIMIT= STAGE2_STEPS=500
while [ "${1:-}" = --output ] || [ "${1:-}" = --limit ] || [ "${1:-}" = --stage2-steps ]; do
    case "$1" in
        --output) WANTED="${2:?--output needs a folder}" ;;
        --limit) LIMIT="${2:?--limit needs a number}" ;;
        --stage2-steps) STAGE2_STEPS="${2:?--stage2-steps needs a number}" ;;
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
stage() { # NAME SCRIPT [options of the script]
    local code=0
    bash "train/$2" "${@:3}" --runtime.output "$OUT/$1" --runtime.resume auto || code=$?
    if [ "$code" -eq 75 ]; then say "stopped; the same command goes on from here"; fi
    if [ "$code" -ne 0 ]; then exit "$code"; fi
}
score() { # NAME SCRIPT [options of the script]; a missed gate (1) is told at the end
    local code=0
    rm -rf "${OUT:?}/$1"
    "$PYTHON" "eval/$2" --output "$OUT/$1" ${LIMIT:+--limit "$LIMIT"} --pictures 3 "${@:3}" > /dev/null || code=$?
    if [ "$code" -gt 1 ]; then exit "$code"; fi
}

say "results go to $OUT"
say "stage 1: a tiny model learns geometry from rendered rooms (about 8 minutes on 2 cores)"
stage stage1 stage1_geometry.sh --config configs/tiny_stage1.yaml --runtime.device cpu "$@"

say "stage 2: it learns to answer questions about them (about 4 minutes)"
START=$(cksum < "$OUT/stage1/model/model.safetensors")
if [ "$(cat "$OUT/stage2/start.cksum" 2> /dev/null)" != "$START" ]; then # nothing yet, or begun from another stage 1
    rm -rf "${OUT:?}/stage2"
    mkdir "$OUT/stage2"
    echo "$START" > "$OUT/stage2/start.cksum"
fi
# nothing has taught this model's semantic encoder yet, so it learns from the answers too
stage stage2 stage2_joint.sh --config configs/tiny_stage2.yaml --runtime.device cpu --model "$OUT/stage1/model" \
    --trainable '{semantic_expert: 1.0, embeddings: 1.0, lm_head: 1.0, semantic_encoder: 1.0}' --runtime.steps "$STAGE2_STEPS"

say "evaluation on rooms that no training sees (about 3 minutes)"
score trained recon.py --model "$OUT/stage1/model" --gate 0.8
score demo recon.py --no-baselines
score answers vqa.py --model "$OUT/stage2/model"
rm -rf "${OUT:?}/room"
"$PYTHON" -m eval.quickstart_room "$OUT"
exec "$PYTHON" -m eval.quickstart "$OUT"
