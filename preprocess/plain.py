"""PNG, TIFF, PGM, JPEG, JPEG 2000, BMP and WebP: grey images of 1 to 16 bits, or colour files that are grey."""

from __future__ import annotations

import io
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from mammostream.common.errors import BadInput
from mammostream.preprocess.codestreams import (
    END_MARK,
    JP2_BOX,
    JPEG2000_MARK,
    JPEG_MARK,
    is_lossy,
    jpeg2000_stream,
    jpeg_stream,
)
from mammostream.preprocess.mammogram import Header, Mammogram, check_size

# Endings of each format, and the bytes that its files begin with.
FORMAT_ENDINGS = {
    "png": (".png",),
    "tiff": (".tif", ".tiff"),
    "pgm": (".pgm",),
    "jpeg": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "jpeg2000": (".jp2", ".j2k", ".j2c"),
    "bmp": (".bmp",),
    "webp": (".webp",),
}
_MARKS = {
    "png": (b"\x89PNG\r\n\x1a\n",),
    "tiff": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
    "pgm": (b"P2", b"P5"),
    "jpeg": (JPEG_MARK,),
    "jpeg2000": (JP2_BOX, JPEG2000_MARK),
    "webp": (b"RIFF",),
    "bmp": (b"BM",),
}
_BETWEEN = rb"(?:\s|#[^\r\n]*[\r\n])+"
_PGM = re.compile(rb"P([25])" + _BETWEEN + _BETWEEN.join([rb"(\d{1,9})"] * 3) + rb"(?:#[^\r\n]*)?\s")
# Headers end before, unless large colour profiles or thumbnails come first.
_HEADER_BYTES = 65536
# A lossy codec keeps grey in separate channels of colour only about equal.
_LOSSY_TOLERANCE = 4


def read_plain_header(path: Path) -> Header:
    """Return size, stored bits and lossiness of an image file that is not DICOM; raises what the decoders raise."""
    with path.open("rb") as file:
        start = file.read(64)
        kind = _checked_kind(path, start)
        if kind == "png":
            if start[12:16] != b"IHDR":
                raise ValueError("not a PNG file")
            width, height, depth, colour = (int.from_bytes(start[a:b]) for a, b in ((16, 20), (20, 24), (24, 25), (25, 26)))
            bits, lossy = 8 if colour == 3 else depth, False  # a palette's colours have 8 bits, whatever its indices have
        elif kind == "tiff":
            height, width, bits, lossy = _tiff_facts(path)
        else:
            data = start + file.read(_HEADER_BYTES)
            try:
                height, width, bits, lossy = _facts(kind, data)
            except (ValueError, OSError):
                height, width, bits, lossy = _facts(kind, data + file.read())
    check_size(height, width)
    return Header(height, width, max(8, bits), lossy=lossy)  # fewer than 8 bits are stretched to 8


def read_plain(path: Path) -> Mammogram:
    """Read an image file that is not DICOM; raises BadInput without the file's name, or what the decoders raise."""
    header = read_plain_header(path)
    data = path.read_bytes()
    kind = _kind(data)
    pixels = _read_tiff(path) if kind == "tiff" else _decode(kind, data)
    pixels = _one_plane(pixels, _LOSSY_TOLERANCE if header.lossy else 0)
    if pixels.dtype not in (np.uint8, np.uint16):
        raise BadInput(f"has {pixels.dtype} pixels; convert it to 8 or 16 bit unsigned")
    if pixels.shape != (header.height, header.width):
        raise BadInput(f"has shape {pixels.shape}, not one plane of {header.height} x {header.width}; export a single image")
    return Mammogram(np.ascontiguousarray(pixels), header)


def seems_cut(path: Path) -> bool:
    """Tell at a glance whether a file's end is missing: never wrongly False for a PNG or JPEG that was cut."""
    with path.open("rb") as file:
        start = file.read(64)
        size = file.seek(0, io.SEEK_END)
        file.seek(-min(size, 64), io.SEEK_END)
        end = file.read()
    kind = _kind(start)
    if kind == "png":
        return not end.endswith(b"\0\0\0\0IEND\xaeB`\x82")
    if kind in ("jpeg", "jpeg2000"):
        return END_MARK not in end
    if kind == "pgm":
        header = read_plain_header(path)
        return size < header.height * header.width * header.bits // 8
    if kind == "webp":
        return size < int.from_bytes(start[4:8], "little") + 8
    return kind == "bmp" and size < int.from_bytes(start[2:6], "little")


def _kind(start: bytes) -> str:
    """Tell a file's format by its first bytes: names are mistaken at times."""
    for kind, marks in _MARKS.items():
        if start.startswith(marks) and (kind != "webp" or start[8:12] == b"WEBP"):
            return kind
    raise ValueError("its content is of no image format known here" if start else "the file is empty")


def _checked_kind(path: Path, start: bytes) -> str:
    """Return a file's format, which its ending, if it is an image's, must agree with."""
    kind, suffix = _kind(start), path.suffix.lower()
    if any(suffix in endings and other != kind for other, endings in FORMAT_ENDINGS.items()):
        raise ValueError(f"its content is {kind.upper()}; rename it to {path.stem}{FORMAT_ENDINGS[kind][0]}")
    return kind


def _facts(kind: str, data: bytes) -> tuple[int, int, int, bool]:
    """Return height, width, bits per sample, and whether the coding is lossy; raises where the header is not whole."""
    if kind == "pgm":
        _, width, height, largest, _ = _pgm_header(data)
        return height, width, largest.bit_length(), False
    if kind in ("jpeg", "jpeg2000"):
        stream = jpeg_stream(data) if kind == "jpeg" else jpeg2000_stream(data)
        return stream.height, stream.width, stream.bits, stream.lossy
    with _pillow_image(data) as image:
        return image.height, image.width, 8, bool(is_lossy(data))


def _decode(kind: str, data: bytes) -> np.ndarray:
    import imagecodecs

    if kind == "png":
        return imagecodecs.png_decode(data)
    if kind == "pgm":
        return _read_pgm(data)
    if kind == "jpeg":
        stream = jpeg_stream(data)
        if stream.samples not in (1, 3):
            raise BadInput(f"has {stream.samples} channels; convert it to grey")
        if data.find(END_MARK, stream.start) < 0:
            raise ValueError("it is cut off")  # the decoder would fill up with grey
        return imagecodecs.jpeg8_decode(data)
    if kind == "jpeg2000":
        stream = jpeg2000_stream(data)
        if END_MARK not in data[-64:]:
            raise ValueError("it is cut off")
        return _stretched(imagecodecs.jpeg2k_decode(data), stream.bits)
    with _pillow_image(data) as image:
        if getattr(image, "n_frames", 1) > 1:
            raise BadInput(f"has {image.n_frames} frames; export a single image")
        return np.asarray(image if image.mode in ("L", "RGB", "RGBA") else image.convert("RGB"))


def _pillow_image(data: bytes) -> Any:
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # check_size has its own limit
        return Image.open(io.BytesIO(data))


def _stretched(pixels: np.ndarray, bits: int) -> np.ndarray:
    """Stretch values of fewer than 8 bits to 8, as PNGs of few bits are."""
    if bits >= 8 or pixels.dtype.kind not in "bu":
        return pixels
    return (pixels.astype(np.uint8) * (255 // (2**bits - 1))).astype(np.uint8)


def _one_plane(pixels: np.ndarray, tolerance: int) -> np.ndarray:
    """Return the one channel of (H, W), or of (H, W, 2 to 4) whose colours are equal up to a tolerance; alpha is left out."""
    if pixels.ndim == 3 and pixels.shape[-1] in (2, 3, 4):
        grey = np.ascontiguousarray(pixels[..., 0])
        for channel in (1, 2) if pixels.shape[-1] > 2 else ():
            other = pixels[..., channel]
            if not (np.array_equal(grey, other) or tolerance and np.abs(grey.astype(int) - other).max() <= tolerance):
                raise BadInput("is in colour; convert it to grey")
        return grey
    if pixels.ndim != 2:
        raise BadInput(f"has shape {pixels.shape}, not one plane; export a single grey image")
    return pixels


def _tiff_facts(path: Path) -> tuple[int, int, int, bool]:
    import tifffile

    with tifffile.TiffFile(path) as tiff:
        page: Any = tiff.pages[0]
        bits = 8 if page.photometric == tifffile.PHOTOMETRIC.PALETTE else int(page.bitspersample)
        lossy = page.compression in (tifffile.COMPRESSION.OJPEG, tifffile.COMPRESSION.JPEG_LOSSY)
        if not lossy and page.dataoffsets:
            tiff.filehandle.seek(page.dataoffsets[0])
            lossy = bool(is_lossy(tiff.filehandle.read(min(page.databytecounts[0], _HEADER_BYTES))))
        return page.imagelength, page.imagewidth, bits, lossy


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
    return _stretched(pixels, bits)


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
