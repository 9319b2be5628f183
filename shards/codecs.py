"""Tile codecs: how a 2-D tile becomes the bytes of a shard member and comes back.

Every codec here is lossless and is read by DALI's ``fn.decoders.image``. A codec's name is its file extension.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from typing import Any

import imagecodecs
import numpy as np
import tifffile

NUMBER_EXTENSION = "num"
META_EXTENSION = "json"


def _encode_tif(tile: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, tile, photometric="minisblack", compression="zstd", predictor=True, metadata=None, software=False)
    return buffer.getvalue()


def _decode_tif(data: bytes) -> np.ndarray:
    return tifffile.imread(io.BytesIO(data))


def _encode_png(tile: np.ndarray) -> bytes:
    return imagecodecs.png_encode(tile, level=6)


CODECS: dict[str, tuple[Callable[[np.ndarray], bytes], Callable[[bytes], np.ndarray]]] = {
    "tif": (_encode_tif, _decode_tif),
    "png": (_encode_png, imagecodecs.png_decode),
}


def encode(tile: np.ndarray, codec: str) -> bytes:
    """Encode a (H, W) uint8 or uint16 tile with a codec of :data:`CODECS`, without loss."""
    return CODECS[codec][0](np.ascontiguousarray(tile))


def decode(data: bytes, codec: str) -> np.ndarray:
    """Decode the bytes of :func:`encode` to a (H, W) uint8 or uint16 array."""
    return CODECS[codec][1](data)


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
