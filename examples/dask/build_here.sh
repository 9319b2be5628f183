#!/usr/bin/env bash
# Build shards with Dask on this machine, with a separate scheduler: one worker per GPU (dask-cuda) if there are GPUs, else one per
# core. With the worker line on each machine, the same lines make a cluster of machines that share their disks.
#
#   bash examples/dask/build_here.sh --manifest work/manifest.parquet --output-dir work/shards
#
# If the scheduler need not stay, 'mammostream shards build … --dask local' does the same on CPUs.
# Needs: pip install 'mammostream[dask]', and dask-cuda for GPUs. PORT is the port of the scheduler.
set -euo pipefail

port=${PORT:-8786}
trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT
dask scheduler --port "$port" --no-dashboard &
if nvidia-smi --list-gpus >/dev/null 2>&1; then
    dask cuda worker "tcp://127.0.0.1:$port" &
else
    dask worker "tcp://127.0.0.1:$port" --nworkers "$(nproc)" --nthreads 1 --memory-limit 0 --no-dashboard &
fi
mammostream shards build --dask "tcp://127.0.0.1:$port" "$@"
