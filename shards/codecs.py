"""Tile codecs: how a 2-D tile becomes the bytes of a shard member and comes back.

A codec's name is its file extension. All but ``jpg`` are lossless; all but ``raw`` are read by DALI's ``fn.decoders.image``.
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lazy_loader
import numpy as np
import tifffile
from PIL import Image

from mammostream.common.errors import BadInput, first_line

imagecodecs = lazy_loader.load("imagecodecs")  # training reads shards through DALI, also where this is not installed
NUMBER_EXTENSION = "num"
META_EXTENSION = "json"
JPEG_QUALITY = 95


# zstd's level and the bytes of a strip, by the bytes of a pixel: measured with benchmarks/codecs.py --layouts. At 8 bits the
# lowest level and short strips are both the fastest and the smallest; at 16 bits level 3 saves 10 % in four times the time.
_TIFF_SETTINGS = {1: (1, 2**16), 2: (1, 2**18)}


def _encode_tif(tile: np.ndarray) -> bytes:
    level, strip = _TIFF_SETTINGS[tile.itemsize]
    buffer = io.BytesIO()
    tifffile.imwrite(
        buffer,
        tile,
        photometric="minisblack",
        compression="zstd",
        compressionargs={"level": level},
        predictor=True,
        rowsperstrip=max(1, strip // (tile.shape[1] * tile.itemsize)),
        metadata=None,
        software=False,
        maxworkers=1,
    )
    return buffer.getvalue()


def _decode_tif(data: bytes) -> np.ndarray:
    return tifffile.imread(io.BytesIO(data))


def _encode_png(tile: np.ndarray) -> bytes:
    return imagecodecs.png_encode(tile, level=6)


def _encode_jpg(tile: np.ndarray) -> bytes:
    return imagecodecs.jpeg8_encode(tile, level=JPEG_QUALITY)


def _encode_raw(tile: np.ndarray) -> bytes:
    return np.ascontiguousarray(tile, dtype=tile.dtype.newbyteorder("<")).tobytes()


def _decode_raw(data: bytes) -> np.ndarray:
    # n² bytes are n x n pixels of 8 bits and 2 n² bytes are as many of 16: no number is both, as √2 is irrational.
    edge = math.isqrt(len(data))
    if edge * edge == len(data):
        return np.frombuffer(data, dtype="u1").reshape(edge, edge)
    edge = math.isqrt(len(data) // 2)
    if 2 * edge * edge != len(data):
        raise ValueError(f"{len(data)} bytes are no square tile of 8 or 16 bits")
    return np.frombuffer(data, dtype="<u2").reshape(edge, edge)


@dataclass(frozen=True)
class Codec:
    """How tiles are encoded and decoded, whether nothing is lost, and the most bits per pixel it holds."""

    encode: Callable[[np.ndarray], bytes]
    decode: Callable[[bytes], np.ndarray]
    lossless: bool = True
    bits: int = 16


CODECS: dict[str, Codec] = {
    "tif": Codec(_encode_tif, _decode_tif),  # zstd with horizontal predictor
    "png": Codec(_encode_png, lambda data: imagecodecs.png_decode(data)),
    "jhc": Codec(  # HTJ2K codestream, reversible (ISO/IEC 15444-15)
        lambda tile: imagecodecs.htj2k_encode(tile), lambda data: imagecodecs.htj2k_decode(data)
    ),
    "jpg": Codec(_encode_jpg, lambda data: imagecodecs.jpeg8_decode(data), lossless=False, bits=8),  # baseline JPEG
    "raw": Codec(_encode_raw, _decode_raw),  # little-endian pixels in row order, nothing else; square tiles only
}


def encode(tile: np.ndarray, codec: str) -> bytes:
    """Encode a (H, W) uint8 or uint16 tile with a codec of :data:`CODECS`."""
    return CODECS[codec].encode(np.ascontiguousarray(tile))


def decode(data: bytes, codec: str) -> np.ndarray:
    """Decode the bytes of :func:`encode` to a (H, W) uint8 or uint16 array."""
    return CODECS[codec].decode(data)


def check_encoded(data: bytes, codec: str, tile: np.ndarray) -> None:
    """Check that another library than the one that encoded a tile decodes it to the same pixels.

    Pillow is the other library (libtiff, its own PNG decoder, OpenJPEG, libjpeg-turbo); NumPy is for raw pixels.

    Parameters
    ----------
    data, codec
        What :func:`encode` made of the tile.
    tile
        (H, W) uint8 or uint16, as :func:`decode` gives it.

    Raises
    ------
    BadInput
        It decodes to something else, or not at all.
    """
    try:
        if codec == "raw":
            other = np.frombuffer(data, tile.dtype.newbyteorder("<")).reshape(tile.shape)
        else:
            with Image.open(io.BytesIO(data)) as image:
                other = np.asarray(image)
        same = other.shape == tile.shape and bool((other == tile).all())
        fault = "" if same else "gives other pixels"
    except Exception as error:  # every decoder has its own exceptions
        fault = f"fails ({first_line(error)})"
    if fault:
        raise BadInput(f"a tile was encoded as .{codec}, but an independent decoder {fault}; choose another --codec")


def pixel_crc32(tile: np.ndarray) -> int:
    """Return the CRC-32 of a tile's pixels in little-endian row order: it also catches what a decoder overlooks."""
    return zlib.crc32(np.ascontiguousarray(tile, dtype=tile.dtype.newbyteorder("<")).tobytes())


def encode_number(number: int) -> bytes:
    """Encode a tile number as 8 bytes (little-endian int64), as DALI reads it."""
    return np.int64(number).astype("<i8").tobytes()


def decode_number(data: bytes) -> int:
    """Decode :func:`encode_number`."""
    return int(np.frombuffer(data, dtype="<i8")[0])


def decode_sample(extension: str, data: bytes) -> Any:
    """Decode one member of a sample, as a handler for ``webdataset.WebDataset(...).decode(decode_sample)``.

    Returns the tile as an array, the tile number as int, or None for an extension that is not ours, which leaves it
    to WebDataset's own handlers.
    """
    extension = extension.lstrip(".")
    if extension in CODECS:
        return decode(data, extension)
    if extension == NUMBER_EXTENSION:
        return decode_number(data)
    return None
