#!/usr/bin/env bash
# Stage 1: the geometric expert, its projection and the geometry heads learn to reconstruct; the rest stays frozen.
#   bash train/stage1_geometry.sh [--config configs/NAME.yaml] [--key.subkey value ...]     (--help lists the keys)
# Several processes: NPROC=8 bash train/stage1_geometry.sh ... (torchrun; TORCHRUN_ARGS for several machines)
set -euo pipefail
cd "$(dirname "$0")/.."
NPROC="${NPROC:-1}"
if [ -z "${PYTHON:-}" ]; then
    if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; else PYTHON=python3; fi
fi
if ! "$PYTHON" -c 'from importlib.util import find_spec as f; exit(not (f("torch") and f("jsonargparse")))'; then
    echo "error: $PYTHON has no torch or jsonargparse" >&2
    echo "  fix: make test (or make quickstart) makes .venv; or set PYTHON to an environment with the package" >&2
    exit 3
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( ($(getconf _NPROCESSORS_ONLN) + NPROC - 1) / NPROC ))}"
if [ "$NPROC" -gt 1 ]; then
    # shellcheck disable=SC2086
    exec "$PYTHON" -m torch.distributed.run --nproc-per-node "$NPROC" ${TORCHRUN_ARGS:-} -m train.run "$@"
fi
exec "$PYTHON" -m train.run "$@"
