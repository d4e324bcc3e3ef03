#!/usr/bin/env bash
# Stage 2: the semantic expert learns to answer questions from what the geometric expert sees; configs say what else trains.
#   bash train/stage2_joint.sh [--config configs/NAME.yaml] [--key.subkey value ...]     (--help lists the keys)
# Several processes: NPROC=8 bash train/stage2_joint.sh ... (torchrun; TORCHRUN_ARGS for several machines)
set -euo pipefail
cd "$(dirname "$0")/.."
NPROC="${NPROC:-1}"
. train/python.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( ($(getconf _NPROCESSORS_ONLN) + NPROC - 1) / NPROC ))}"
if [ "$NPROC" -gt 1 ]; then
    # shellcheck disable=SC2086
    exec "$PYTHON" -m torch.distributed.run --nproc-per-node "$NPROC" ${TORCHRUN_ARGS:-} \
        -m train.run --default configs/tiny_stage2.yaml "$@"
fi
exec "$PYTHON" -m train.run --default configs/tiny_stage2.yaml "$@"
