"""Times `read_mammogram` on one real film (4,688 x 2,592) stored in each format, and the decoders it chose among.

Prints Markdown: python benchmarks/reading.py [--rounds 7]
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
import tifffile
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.pixels.utils import compress
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from mammostream.common.real_films import film_cases
from mammostream.preprocess.reading import read_mammogram

WINDOW = {"WindowCenter": 2000.0, "WindowWidth": 3500.0}


def write_films(folder: Path) -> dict[str, Path]:
    """Write the film in every format; 16 and 12 bits as the format is met in practice."""
    source = next(path for case in film_cases() for path in case.values() if path.name == "1-282.dcm")
    film = pydicom.dcmread(source)
    wide = np.array(film.pixel_array)
    mid, narrow = wide >> 4, (wide >> 8).astype(np.uint8)
    paths = {}

    def dicom(
        name: str, pixels: np.ndarray, syntax: str, frame: bytes | None = None, bits: int = 12, **elements: object
    ) -> None:
        dataset = pydicom.Dataset()
        dataset.file_meta = pydicom.dataset.FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1.2"
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = "1.2.3"
        dataset.Rows, dataset.Columns = pixels.shape
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8 * pixels.itemsize, bits, bits - 1
        dataset.PixelRepresentation, dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 0, 1, "MONOCHROME2"
        for key, value in elements.items():
            setattr(dataset, key, value)
        stored = pixels.astype(">u2") if syntax == ExplicitVRBigEndian else pixels
        dataset.PixelData = stored.tobytes() if frame is None else encapsulate([bytes(frame)])
        dataset["PixelData"].VR = "OW" if frame is None else "OB"
        if elements.pop("rle", False):
            compress(dataset, RLELossless)
        paths[name] = folder / f"{len(paths)}.dcm"
        dataset.save_as(paths[name], enforce_file_format=True)

    dicom("DICOM uncompressed, 12 bits", mid, ExplicitVRLittleEndian)
    dicom("… with a window", mid, ExplicitVRLittleEndian, **WINDOW)
    dicom("… with a window, MONOCHROME1", mid, ExplicitVRLittleEndian, PhotometricInterpretation="MONOCHROME1", **WINDOW)
    dicom("… MONOCHROME1, padded", mid, ExplicitVRLittleEndian, PhotometricInterpretation="MONOCHROME1", PixelPaddingValue=4095)
    dicom("DICOM big endian", mid, ExplicitVRBigEndian)
    dicom("DICOM RLE, 16 bits", wide, ExplicitVRLittleEndian, bits=16, rle=True)
    dicom("DICOM JPEG baseline, 8 bits", narrow, JPEGBaseline8Bit, imagecodecs.jpeg8_encode(narrow, level=95), bits=8)
    dicom("DICOM JPEG lossless, 12 bits", mid, JPEGLosslessSV1, imagecodecs.jpeg8_encode(mid, lossless=True, bitspersample=12))
    dicom("DICOM JPEG-LS, 12 bits", mid, JPEGLSLossless, imagecodecs.jpegls_encode(mid))
    j2k = imagecodecs.jpeg2k_encode(mid, reversible=True, codecformat="j2k", bitspersample=12)
    dicom("DICOM JPEG 2000 lossless, 12 bits", mid, JPEG2000Lossless, j2k)
    dicom("DICOM HTJ2K lossless, 12 bits", mid, HTJ2KLossless, imagecodecs.htj2k_encode(mid, reversible=True))
    for name, pixels in (("8", narrow), ("16", wide)):
        paths[f"PNG, {name} bits"] = folder / f"{name}.png"
        Image.fromarray(pixels).save(folder / f"{name}.png")
    for name, options in (("uncompressed", {}), ("zlib", {"compression": "zlib"})):
        paths[f"TIFF {name}, 16 bits"] = folder / f"{name}.tif"
        tifffile.imwrite(folder / f"{name}.tif", wide, photometric="minisblack", **options)
    paths["PGM, 16 bits"] = folder / "16.pgm"
    Image.fromarray(wide).save(folder / "16.pgm")
    return paths


def decoders(paths: dict[str, Path]) -> dict[str, Callable[[], object]]:
    """Return the decoders for the same bytes, the one in use first."""

    def frame(name: str) -> bytes:
        return pydicom.encaps.get_frame(pydicom.dcmread(paths[name]).PixelData, 0, number_of_frames=1)

    png8, png16 = paths["PNG, 8 bits"].read_bytes(), paths["PNG, 16 bits"].read_bytes()
    jpeg, htj2k = frame("DICOM JPEG lossless, 12 bits"), frame("DICOM HTJ2K lossless, 12 bits")
    return {
        "PNG 8 bits, imagecodecs (libpng) *": lambda: imagecodecs.png_decode(png8),
        "PNG 8 bits, Pillow": lambda: np.asarray(Image.open(io.BytesIO(png8))),
        "PNG 16 bits, imagecodecs (libpng) *": lambda: imagecodecs.png_decode(png16),
        "PNG 16 bits, Pillow": lambda: np.asarray(Image.open(io.BytesIO(png16))),
        "JPEG lossless, jpeg8 (libjpeg-turbo) *": lambda: imagecodecs.jpeg8_decode(jpeg),
        "JPEG lossless, ljpeg": lambda: imagecodecs.ljpeg_decode(jpeg),
        "JPEG lossless, jpegsof3": lambda: imagecodecs.jpegsof3_decode(jpeg),
        "HTJ2K, jpeg2k (OpenJPEG) *": lambda: imagecodecs.jpeg2k_decode(htj2k),
        "HTJ2K, htj2k (OpenJPH; hides damage)": lambda: imagecodecs.htj2k_decode(htj2k),
    }


def medians(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, str]:
    """Time calls in turn, round by round; return medians in ms, or the error of those that fail."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    failed = {}
    for _ in range(rounds + 1):  # the first warms up
        for name, call in calls.items():
            start = time.perf_counter()
            try:
                call()
            except Exception as error:
                failed[name] = type(error).__name__
            taken[name].append(time.perf_counter() - start)
    return {name: failed.get(name) or f"{1000 * statistics.median(times[1:]):.0f}" for name, times in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    names = ("imagecodecs", "pydicom", "numpy", "tifffile", "pillow")
    cpu = next((x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), "")
    print(f"{cpu or platform.machine()}, {os.cpu_count()} cores; Python {platform.python_version()}, ", end="")
    print(", ".join(f"{name} {version(name)}" for name in names) + f"; medians of {rounds} interleaved rounds, one process\n")
    with tempfile.TemporaryDirectory() as folder:
        paths = write_films(Path(folder))
        print("| file | MB | read_mammogram, ms |\n|---|---|---|")
        for name, taken in medians({n: lambda p=p: read_mammogram(p) for n, p in paths.items()}, rounds).items():
            print(f"| {name} | {paths[name].stat().st_size / 1e6:.1f} | {taken} |")
        print("\n| decoder (* in use) | ms |\n|---|---|")
        for name, taken in medians(decoders(paths), rounds).items():
            print(f"| {name} | {taken} |")


if __name__ == "__main__":
    main()
