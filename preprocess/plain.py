"""PNG, TIFF and PGM: grey images of 1 to 16 bits, or colour files that are grey."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from mammostream.common.errors import BadInput
from mammostream.preprocess.mammogram import Header, Mammogram, check_size

_BETWEEN = rb"(?:\s|#[^\r\n]*[\r\n])+"
_PGM = re.compile(rb"P([25])" + _BETWEEN + _BETWEEN.join([rb"(\d{1,9})"] * 3) + rb"(?:#[^\r\n]*)?\s")


def read_plain_header(path: Path) -> Header:
    """Return size and stored bits of a PNG, TIFF or PGM; raises what the decoders raise."""
    suffix = path.suffix.lower()
    if suffix == ".png":
        with path.open("rb") as file:
            start = file.read(33)
        if start[:8] != b"\x89PNG\r\n\x1a\n" or start[12:16] != b"IHDR":
            raise ValueError("not a PNG file")
        width, height, depth, colour = (int.from_bytes(start[a:b]) for a, b in ((16, 20), (20, 24), (24, 25), (25, 26)))
        bits = 8 if colour == 3 else depth  # a palette's colours have 8 bits, whatever its indices have
    elif suffix in (".tif", ".tiff"):
        import tifffile

        with tifffile.TiffFile(path) as tiff:
            page: Any = tiff.pages[0]
            height, width = page.imagelength, page.imagewidth
            bits = 8 if page.photometric == tifffile.PHOTOMETRIC.PALETTE else int(page.bitspersample)
    elif suffix == ".pgm":
        with path.open("rb") as file:
            _, width, height, largest, _ = _pgm_header(file.read(4096))
        bits = largest.bit_length()
    else:
        from PIL import Image

        with Image.open(path) as image:
            height, width, bits = image.height, image.width, 16 if image.mode.startswith("I") else 8
    check_size(height, width)
    return Header(height, width, max(8, bits))  # fewer than 8 bits are stretched to 8


def read_plain(path: Path) -> Mammogram:
    """Read a PNG, TIFF or PGM; raises BadInput without the file's name, or what the decoders raise."""
    header = read_plain_header(path)
    suffix = path.suffix.lower()
    if suffix == ".png":
        import imagecodecs

        pixels = imagecodecs.png_decode(path.read_bytes())
    elif suffix in (".tif", ".tiff"):
        pixels = _read_tiff(path)
    elif suffix == ".pgm":
        pixels = _read_pgm(path.read_bytes())
    else:
        from PIL import Image

        with Image.open(path) as image:
            pixels = np.asarray(image)
    pixels = _one_plane(pixels)
    if pixels.dtype not in (np.uint8, np.uint16):
        raise BadInput(f"has {pixels.dtype} pixels; convert it to 8 or 16 bit unsigned")
    if pixels.shape != (header.height, header.width):
        raise BadInput(f"has shape {pixels.shape}, not one plane of {header.height} x {header.width}; export a single image")
    return Mammogram(np.ascontiguousarray(pixels), header)


def _one_plane(pixels: np.ndarray) -> np.ndarray:
    """Return the one channel of (H, W), or of (H, W, 2 to 4) whose colours are equal; alpha is left out."""
    if pixels.ndim == 3 and pixels.shape[-1] in (2, 3, 4):
        grey = np.ascontiguousarray(pixels[..., 0])
        if pixels.shape[-1] > 2 and not all(np.array_equal(grey, pixels[..., c]) for c in (1, 2)):
            raise BadInput("is in colour; convert it to grey")
        return grey
    if pixels.ndim != 2:
        raise BadInput(f"has shape {pixels.shape}, not one plane; export a single grey image")
    return pixels


def _read_tiff(path: Path) -> np.ndarray:
    import tifffile

    with tifffile.TiffFile(path) as tiff:
        page: Any = tiff.pages[0]
        pixels: Any = tiff.asarray()
        bits, kind = int(page.bitspersample), page.photometric
        if page.planarconfig == tifffile.PLANARCONFIG.SEPARATE and pixels.ndim == 3:
            pixels = np.moveaxis(pixels, 0, -1)
        if kind == tifffile.PHOTOMETRIC.PALETTE:
            return (page.colormap.T[pixels] >> 8).astype(np.uint8)
    if pixels.dtype.kind not in "bu":
        return pixels
    if kind == tifffile.PHOTOMETRIC.MINISWHITE:  # 0 is white, as in MONOCHROME1
        pixels = ~pixels if bits == 1 else (2**bits - 1) - pixels
    if bits < 8:
        return (pixels.astype(np.uint8) * (255 // (2**bits - 1))).astype(np.uint8)
    return pixels


def _pgm_header(data: bytes) -> tuple[int, int, int, int, int]:
    """Return kind (2 = text, 5 = binary), width, height, largest value, and where the pixels start."""
    found = _PGM.match(data)
    if found is None:
        raise ValueError("not a PGM file (P2 or P5)")
    kind, width, height, largest = (int(g) for g in found.groups())
    if not 1 <= largest <= 65535:
        raise ValueError(f"maxval {largest} is not between 1 and 65535")
    return kind, width, height, largest, found.end()


def _read_pgm(data: bytes) -> np.ndarray:
    kind, width, height, largest, start = _pgm_header(data)
    wanted = np.uint8 if largest < 256 else np.uint16
    if kind == 5:
        pixels: Any = np.frombuffer(data, np.dtype(wanted).newbyteorder(">"), width * height, start).astype(wanted, copy=False)
    else:
        pixels = np.fromstring(data[start:], dtype=np.int64, sep=" ")[: width * height]
    if pixels.max() > largest or pixels.min() < 0:
        raise ValueError(f"a pixel lies outside 0 to maxval {largest}")
    pixels = pixels.reshape(height, width)
    if largest < 128:
        return np.rint(pixels * (255 / largest)).astype(np.uint8)  # as PNGs of few bits are
    return pixels.astype(wanted, copy=False)
