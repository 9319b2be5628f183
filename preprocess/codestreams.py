"""What JPEG, JPEG 2000 and WebP streams say of themselves, without being decoded: size, depth, and whether they are lossy."""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

JPEG_MARK, JPEG2000_MARK, END_MARK = b"\xff\xd8\xff", b"\xff\x4f\xff\x51", b"\xff\xd9"
JP2_BOX = b"\0\0\0\x0cjP  "
# JPEG baseline and extended, near-lossless JPEG-LS; JPEG 2000 and HTJ2K may be either (PS3.5 annex A.4).
LOSSY_SYNTAXES = ("1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.81")
EITHER_SYNTAXES = ("1.2.840.10008.1.2.4.91", "1.2.840.10008.1.2.4.203")


class Stream(NamedTuple):
    """Size in pixels, bits per sample, samples per pixel, whether its coding is lossy, and where its image data starts."""

    height: int
    width: int
    bits: int
    samples: int
    lossy: bool
    start: int


def jpeg_stream(data: bytes) -> Stream:
    """Read a JPEG's segments up to its first scan (ITU-T T.81 annex B); raises ValueError where they end before."""
    at, size = 2, None
    while at + 4 <= len(data):
        mark, length = struct.unpack_from(">HH", data, at)
        if mark == 0xFFFF:  # bytes of 0xFF may fill up before a mark
            at += 1
        elif mark == 0xFFDA and size is not None:
            return Stream(*size, start=at)
        elif mark >> 8 != 0xFF or mark == 0xFFDA:
            break
        else:
            if 0xFFC0 <= mark <= 0xFFCF and mark not in (0xFFC4, 0xFFC8, 0xFFCC) and at + 10 <= len(data):
                bits, height, width, samples = struct.unpack_from(">BHHB", data, at + 4)
                # The third process of each kind is lossless: SOF3, 7, 11 and 15.
                size = height, width, bits, samples, mark & 3 != 3
            at += 2 + length
    raise ValueError("not a whole JPEG header")


def jpeg2000_stream(data: bytes) -> Stream:
    """Read the main header of a JPEG 2000 codestream, bare or in a JP2 file (ITU-T T.800 annex A); raises ValueError.

    The reversible wavelet is taken for lossless: whether its last bit planes were cut off, the header does not say.
    """
    start = data.find(JPEG2000_MARK)
    if start < 0 or len(data) < start + 43:
        raise ValueError("not a whole JPEG 2000 header")
    x1, y1, x0, y0 = struct.unpack_from(">4I", data, start + 8)
    (samples,) = struct.unpack_from(">H", data, start + 40)
    bits = (data[start + 42] & 0x7F) + 1
    at = start + 2
    while at + 14 <= len(data):
        mark, length = struct.unpack_from(">HH", data, at)
        if mark == 0xFF52:  # COD; 0 is the irreversible 9-7 wavelet
            return Stream(y1 - y0, x1 - x0, bits, samples, data[at + 13] == 0, start)
        if mark == 0xFF90 or mark >> 8 != 0xFF:
            break
        at += 2 + length
    raise ValueError("not a whole JPEG 2000 header")


def webp_is_lossy(data: bytes) -> bool:
    """Tell whether a WebP file's image is in a lossy chunk (``VP8 ``), not a lossless one (``VP8L``)."""
    return re.search(rb"VP8[ L]", data) is not None and b"VP8L" not in data[:4096]


def is_lossy(data: bytes) -> bool | None:
    """Tell whether a JPEG, JPEG 2000 or WebP stream is lossy; None where it is none of them or its header is not whole."""
    try:
        if data.startswith(JPEG_MARK):
            return jpeg_stream(data).lossy
        if data.startswith((JPEG2000_MARK, JP2_BOX)):
            return jpeg2000_stream(data).lossy
    except ValueError:
        return None
    return webp_is_lossy(data) if data[8:12] == b"WEBP" else None


def lossy_dicom(syntax: str, declared: str) -> bool | None:
    """Tell whether a DICOM image was compressed with loss, now or earlier.

    Parameters
    ----------
    syntax
        Its transfer syntax.
    declared
        LossyImageCompression (0028,2110): ``01`` stays for good once an image was compressed with loss (PS3.3 C.7.6.1.1.5).

    Returns
    -------
    bool or None
        None where the syntax allows both and the file does not say.
    """
    if syntax in LOSSY_SYNTAXES or declared == "01":
        return True
    return None if syntax in EITHER_SYNTAXES and declared != "00" else False
