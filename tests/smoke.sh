#!/usr/bin/env bash
# The commands of the README on tiny inputs, in a temporary folder.
set -euo pipefail
cd "$(dirname "$0")/.."
PY=$("${PY:-python3}" -c 'import sys; print(sys.executable)') # absolute: some commands run elsewhere
OUT=$(mktemp -d)
trap 'rm -rf "$OUT"' EXIT

run() { echo "\$ $*" >&2; "$@"; }
ends_with() { # CODE COMMAND...
    local code=0
    run "${@:2}" || code=$?
    [ "$code" -eq "$1" ] || { echo "smoke: exit code $code instead of $1: ${*:2}" >&2; exit 1; }
}
export PYTHONPATH=$PWD
g2vlm() { run "$PY" -m g2vlm "$@"; }

"$PY" - "$OUT/photos" <<'PYTHON'
import sys
from pathlib import Path

import numpy as np
from PIL import Image

folder = Path(sys.argv[1])
folder.mkdir()
for view in range(3):
    rows, columns = np.mgrid[:120, :160]
    pixels = np.stack([rows, columns, (rows + columns + 40 * view)], axis=-1) % 256
    Image.fromarray(pixels.astype(np.uint8)).save(folder / f"view{view}.png")
PYTHON

g2vlm --help > /dev/null
g2vlm doctor
g2vlm info paper_2b
g2vlm recon "$OUT/photos" --model tiny -o "$OUT/dry" --width 112 --dry-run
g2vlm recon "$OUT/photos" --model tiny -o "$OUT/random" --width 112
g2vlm convert tests/golden/g2vlm_tiny "$OUT/ours" --check
g2vlm convert "$OUT/ours" "$OUT/released" --check
g2vlm recon "$OUT/photos" --model "$OUT/ours" -o "$OUT/room" --width 112
g2vlm info "$OUT/room"
printf 'How many chairs are in this room?\nIs there a lamp?\n' > "$OUT/questions.txt"
sed -n '/^## Ask/,/^## /s/^g2vlm /&/p' README.md > "$OUT/examples"
while read -r example; do
    (cd "$OUT" && eval "${example%%#*} --model tiny --max-new-tokens 8" > /dev/null < questions.txt)
done < "$OUT/examples"
test -s "$OUT/out/lamp/points.ply"
run "$PY" - README.md docs/ask.md "$OUT" <<'PYTHON'
# the Python examples, one after the other, with random weights
import os
import re
import sys
from pathlib import Path

texts = [Path(name).read_text(encoding="utf-8").replace("G2VLM-2B-MoT", "tiny") for name in sys.argv[1:-1]]
os.chdir(sys.argv[-1])
names: dict = {}
for example in re.findall(r"```python\n(.*?)```", "".join(texts), re.DOTALL):
    exec(example, names)
PYTHON
g2vlm data check "$OUT/photos"
g2vlm data preview "$OUT/photos" -o "$OUT/sheet.png"
run "$PY" eval/recon.py --model "$OUT/ours" --limit 2 --pictures 1 -o "$OUT/scores"
run "$PY" eval/recon.py --model tiny --dataset images --data "$OUT/photos" --width 112 -o "$OUT/unscored"
run "$PY" eval/correspondence.py --clips 2 --views 3 --paths 0 --size 112 --pictures 1 -o "$OUT/correspondence"
run "$PY" eval/probe.py --rooms 4 --limit 2 --steps 5 --size 56 --pictures 1 -o "$OUT/probe"
run "$PY" eval/vqa.py --limit 6 --geometry off -o "$OUT/answers"
run "$PY" eval/vqa.py --limit 6 --pictures 2 --compare "$OUT/answers" -o "$OUT/compared"
for file in points.ply points.glb cameras.json preview.png depth/0002.png scene.safetensors; do
    test -s "$OUT/room/$file" || { echo "smoke: $file is missing" >&2; exit 1; }
done
PYTHON="$PY" run bash train/stage1_geometry.sh --runtime.steps 3 --runtime.validation_steps 1 --runtime.output "$OUT/stage1"
PYTHON="$PY" run bash train/stage1_geometry.sh --runtime.steps 5 --runtime.validation_steps 1 --runtime.output "$OUT/stage1" \
    --runtime.resume auto
g2vlm recon "$OUT/photos" --model "$OUT/stage1/model" -o "$OUT/trained"
g2vlm recon "$OUT/photos" -o "$OUT/demo"
g2vlm info
PYTHON="$PY" run bash train/stage2_joint.sh --config configs/extensions/tiny_spatialsv.yaml --runtime.steps 2 \
    --runtime.validation_steps 1 --runtime.output "$OUT/supervised"
g2vlm lift "$OUT/photos" --model "$OUT/supervised/model" --heads "$OUT/supervised/heads/spatialsv" -o "$OUT/lifted"
test -s "$OUT/lifted/points.ply"
# too few steps to pass its gate: exit code 1, and a report all the same
PYTHON="$PY" ends_with 1 bash train/quickstart.sh --output "$OUT/quickstart" --limit 2 --stage2-steps 3 --runtime.steps 3 \
    --runtime.validation_steps 1
for said in "gate MISSED" "BELOW what can be answered without looking" "bit for bit those of stage 1" "true answer"; do
    grep -q "$said" "$OUT/quickstart/report.md" || { echo "smoke: the report does not say: $said" >&2; exit 1; }
done
test -s "$OUT/quickstart/room/recon/points.ply"
ends_with 2 g2vlm recon "$OUT/absent" --model tiny -o "$OUT/none"
echo "smoke: passed"
