#!/usr/bin/env bash
# Shards by Dask on this machine, with a scheduler of its own: a worker a GPU (dask-cuda) where there are GPUs, else a worker a
# core. The same lines, a worker line on each machine, make a cluster of several machines that share their disks.
#
#   bash examples/dask/build_here.sh --manifest work/manifest.parquet --output-dir work/shards
#
# Without a scheduler to keep, 'mammostream shards build … --dask local' does the same on CPUs.
# Needs: pip install 'mammostream[dask]', and dask-cuda for GPUs. PORT is the scheduler's.
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
