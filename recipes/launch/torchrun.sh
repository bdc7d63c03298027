#!/usr/bin/env bash
# Run on every machine: torchrun.sh HEAD_NODE MACHINES RECIPE [options]; HEAD_NODE is the name of one of them.
set -euo pipefail
head=$1 machines=$2
shift 2
exec torchrun \
    --nnodes "$machines" \
    --nproc_per_node "${GPUS:-8}" \
    --rdzv_backend c10d \
    --rdzv_endpoint "$head:${PORT:-29500}" \
    --rdzv_id "${RUN_ID:-fewstep}" \
    "$@"
