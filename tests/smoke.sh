#!/usr/bin/env bash
# The commands of the README on tiny inputs, in a temporary folder.
set -euo pipefail
PY=${PY:-python}
"$PY" -c "import g2vlm, geometry"
