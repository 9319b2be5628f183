"""DICOM: from a file's bytes to the stored values of a frame, on the host or on the GPU."""

from __future__ import annotations

import struct
import threading
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from mammostream.common.errors import BadInput
from mammostream.preprocess.backend import backend_of
from mammostream.preprocess.dicom_dataset import DicomFile, integer

# A build reads the next film while it reads one: nvImageCodec does not promise that two threads may share a decoder.
_DECODING = threading.Lock()
# A lossy codec can push values past the range by this share of it; more is image content.
_OVERSHOOT = 1 / 16


class Stored(NamedTuple):
    """A frame's stored values: (H, W) integers of 8 or 16 bits, signed where the file says so, and how many bits count."""

    values: Any
    bits: int


def stored_values(film: DicomFile, index: int, frames: int, device: str = "cpu") -> Stored:
    """Decode frame `index` (from 0) of `frames`; what was put right goes into ``film.flags``.

    Pixels that are not compressed are read from the file one frame at a time. imagecodecs decodes what is compressed;
    nvImageCodec, where `device` is ``cuda`` and it can.

    Raises
    ------
    BadInput, ValueError
        Without the file's name: of no supported encoding, cut off, or at odds with its header.
    """
    dataset = film.dataset
    allocated, bits, signed = int(dataset.BitsAllocated), int(dataset.BitsStored), bool(dataset.PixelRepresentation)
    high = integer(dataset, "HighBit")
    if allocated not in (8, 16):
        raise BadInput(f"has {bits} of {allocated} bits with high bit {high}; convert it to 8 or 16 bits allocated")
    assert film.pixels is not None
    precision = None
    if film.pixels.encapsulated or film.pixels.bare:
        values, patterns, precision = _decoded(film, index, frames, signed, device)
    else:
        values, patterns = _native(film, index, allocated), True
    values, bits = _right_justified(values, bits, bits - 1 if high is None else high, signed, film.flags)
    return _to_bits(values, min(bits, precision) if signed and precision else bits, signed, patterns, film.flags)


def _shape(film: DicomFile) -> tuple[int, int]:
    return int(film.dataset.Rows), int(film.dataset.Columns)


def _native(film: DicomFile, index: int, allocated: int) -> np.ndarray:
    """Read a frame that is not compressed, (H, W) unsigned; one that lacks less than a row is filled up from the row above."""
    assert film.pixels is not None
    (height, width), each = _shape(film), allocated // 8
    size, row = height * width * each, width * each
    film.stream.seek(film.pixels.start + index * size)
    data = film.stream.read(max(0, min(size, film.pixels.length - index * size)))
    missing = size - len(data)
    if missing >= row or (missing and height < 2):
        raise ValueError(f"its pixels are cut off: {missing} of {size} bytes are missing")
    if missing:
        film.flags["pixels_short"] = f"{missing} of {size} bytes missing"
        data += data[len(data) - row : len(data) - row + missing]
    kind = np.dtype(f"u{each}").newbyteorder(">" if film.pixels.big_endian else "<")
    values = np.frombuffer(data, kind)
    if each == 1 and film.pixels.big_endian and film.pixels.words:
        values = values.reshape(-1, 2)[:, ::-1]
    return values.astype(kind.newbyteorder("="), copy=False).reshape(height, width)


# Compressed frames


class _Codestream(NamedTuple):
    """What a JPEG, JPEG-LS or JPEG 2000 codestream says of itself."""

    decoder: str  # imagecodecs' name
    height: int
    width: int
    precision: int
    signed: bool
    lossless_jpeg: bool = False


def _decoded(film: DicomFile, index: int, frames: int, signed: bool, device: str) -> tuple[Any, bool, int | None]:
    """Return a compressed frame's values, whether they are bit patterns, and the codestream's precision."""
    import imagecodecs
    from pydicom.uid import RLELossless

    shape = _shape(film)
    frame = _frame(film, index, frames)
    stream = _codestream(frame)
    if stream is None:
        each = int(film.dataset.BitsAllocated) // 8
        if film.syntax == RLELossless or _is_rle(frame, each):
            return _decode_rle(frame, each).reshape(shape), True, None
        raise BadInput(f"has the transfer syntax {film.syntax.name}, which is not supported; convert it to uncompressed DICOM")
    if (stream.height, stream.width) != shape:
        raise ValueError(f"its codestream has {stream.height} x {stream.width} pixels, its header {shape[0]} x {shape[1]}")
    if stream.precision > 16:
        raise ValueError(f"its codestream has {stream.precision} bits per pixel")
    frame = _whole(frame, stream, film.flags)
    decoded: Any = _decode_on_device(frame) if device == "cuda" and not signed and not stream.signed else None
    values = getattr(imagecodecs, stream.decoder + "_decode")(frame) if decoded is None else decoded
    if values.shape != shape:
        raise ValueError(f"its codestream gives pixels of shape {values.shape}, not {shape}")
    return values, stream.lossless_jpeg or signed != stream.signed, stream.precision


def _frame(film: DicomFile, index: int, frames: int) -> bytes:
    """Return the bytes of a compressed frame; only a single frame may be cut off or lack the delimiter."""
    from pydicom.encaps import get_frame

    assert film.pixels is not None
    film.stream.seek(film.pixels.start)
    if film.pixels.bare:
        return film.stream.read(film.pixels.length)
    fragments, ended = _fragments(film)
    if not ended:
        film.flags["no_sequence_delimiter"] = ""
    if frames == 1:
        parts = []
        for number, (start, length) in enumerate(fragments):
            film.stream.seek(start)
            part = film.stream.read(length)
            if number or part[:3] in (b"\xff\xd8\xff", b"\xff\x4f\xff"):  # the first is a table of offsets, or empty
                parts.append(part)
        return b"".join(parts)
    dataset, offsets = film.dataset, None
    if "ExtendedOffsetTable" in dataset:
        offsets = dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths
    film.stream.seek(film.pixels.start)
    return get_frame(film.stream, index, number_of_frames=frames, extended_offsets=offsets)


def _fragments(film: DicomFile) -> tuple[list[tuple[int, int]], bool]:
    """Return where each fragment lies and how long it says to be, and whether the delimiter stands after the last."""
    assert film.pixels is not None
    found: list[tuple[int, int]] = []
    at, end = film.pixels.start, film.pixels.start + film.pixels.length
    while at + 8 <= end:
        film.stream.seek(at)
        group, number, length = struct.unpack("<HHI", film.stream.read(8))
        if (group, number) == (0xFFFE, 0xE0DD):
            return found, True
        if (group, number) != (0xFFFE, 0xE000):
            break
        found.append((at + 8, length))
        at += 8 + length
    return found, False


def _is_rle(frame: bytes, bytes_each: int) -> bool:
    """Tell a frame of PS3.5 annex G by its header: as many segments as bytes per pixel, the first right behind it."""
    return len(frame) > 64 and struct.unpack_from("<2I", frame) == (bytes_each, 64)


def _decode_rle(frame: bytes, bytes_each: int) -> np.ndarray:
    """Decode an RLE frame (PS3.5 annex G) to a flat array of `bytes_each` bytes per pixel."""
    import imagecodecs

    count, *starts = struct.unpack_from("<16I", frame)
    starts = [*starts[:count], len(frame)]
    # The decoder trusts them: a damaged one would end the process.
    if count != bytes_each or starts[0] < 64 or any(a >= b for a, b in pairwise(starts)):
        raise ValueError("its RLE header is damaged")
    return np.frombuffer(imagecodecs.dicomrle_decode(frame, f"<u{bytes_each}"), f"u{bytes_each}")


def _codestream(frame: bytes) -> _Codestream | None:
    """Read a codestream's header; None where it is no JPEG, JPEG-LS or JPEG 2000.

    Sizes are compared with the DICOM header's before decoding, so that a damaged one costs no memory. Frames are detected by
    their own marks: transfer syntaxes are mixed up at times.
    """
    if frame[:4] == b"\xff\x4f\xff\x51" or frame[4:8] == b"jP  ":  # JPEG 2000, bare or in a JP2 file
        # JPEG 2000 and HTJ2K through OpenJPEG: imagecodecs' faster HTJ2K decoder takes damaged frames without an error.
        size = frame.find(b"\xff\x4f\xff\x51") + 8
        x1, y1, x0, y0 = struct.unpack_from(">4I", frame, size)
        depth = frame[size + 34]
        return _Codestream("jpeg2k", y1 - y0, x1 - x0, (depth & 0x7F) + 1, bool(depth & 0x80))
    if frame[:2] != b"\xff\xd8":
        return None
    at = 2
    while True:
        mark, length = struct.unpack_from(">HH", frame, at)
        if mark == 0xFFF7 or 0xFFC0 <= mark <= 0xFFCF and mark not in (0xFFC4, 0xFFC8, 0xFFCC):  # a start of frame
            precision, height, width = struct.unpack_from(">BHH", frame, at + 4)
            decoder = "jpegls" if mark == 0xFFF7 else "jpeg8"
            return _Codestream(decoder, height, width, precision, False, lossless_jpeg=mark == 0xFFC3)
        at += 1 if mark == 0xFFFF else 2 + length  # bytes of 0xFF may fill up before a mark


def _whole(frame: bytes, stream: _Codestream, flags: dict[str, str]) -> bytes:
    """Return a frame that ends as its codec wants it; raises ValueError where pixels are missing.

    Some writers leave the end mark out, and some fill the frame up with zeros. Without the mark a decoder's success says
    nothing: JPEG's fills up with grey.
    """
    import imagecodecs

    mark = b"\xff\xd9"
    body = frame.rstrip(b"\0")
    if mark in body[-64:]:
        return frame if len(frame) - len(body) < 64 else body
    zeros = len(frame) - len(body)
    decode = getattr(imagecodecs, stream.decoder + "_decode")
    if stream.decoder == "jpeg2k":
        end = _end_of_tiles(frame)
        # Packets may end in a zero or two; more stand for what is missing.
        candidates = [] if end is None or end > len(body) + 2 else [frame[:end] + mark]
    elif stream.decoder == "jpeg8":
        # Where all pixels are there, it does not matter what follows them. Zeros at the end may be pixels too: those of a whole
        # stream are just enough, those that fill up a torn one are more.
        def complete(kept: int) -> bool:
            first, second = (decode(frame[: len(body) + kept] + fill * 64 + mark) for fill in (b"\x55", b"\xaa"))
            return np.array_equal(first, second)

        few = min(zeros, 2)
        kept = few if complete(few) else zeros if zeros > 6 and complete(zeros) and not complete(zeros - 4) else None
        candidates = [] if kept is None else [frame[: len(body) + kept] + mark]
    else:  # CharLS takes neither too few bytes nor too many; the last may be zero
        candidates = [frame[: len(body) + kept] + mark for kept in range(min(zeros, 3) + 1)]
    for candidate in candidates:
        try:
            if stream.decoder == "jpegls":
                decode(candidate)
        except RuntimeError:
            continue
        flags["no_end_mark"] = "the codestream is whole"
        return candidate
    raise ValueError("its codestream is cut off")


def _end_of_tiles(frame: bytes) -> int | None:
    """Return where the last tile-part of a JPEG 2000 codestream ends by its own lengths; None where not all are there."""
    start = frame.find(b"\xff\x4f\xff\x51")
    x1, y1, _, _, tile_width, tile_height, tile_x, tile_y = struct.unpack_from(">8I", frame, start + 8)
    tiles = -(-(x1 - tile_x) // tile_width) * -(-(y1 - tile_y) // tile_height)
    at = start + 2
    seen: set[int] = set()
    while at + 12 <= len(frame):
        mark, length = struct.unpack_from(">HH", frame, at)
        if mark != 0xFF90:  # a start of tile-part
            if seen:
                break
            at += 2 + length
            continue
        tile, size = struct.unpack_from(">HI", frame, at + 4)
        if size < 12 or at + size > len(frame):
            return None
        seen.add(tile)
        at += size
    return at if len(seen) == tiles and at <= len(frame) else None


# Which bits count


def _right_justified(values: Any, bits: int, high: int, signed: bool, flags: dict[str, str]) -> tuple[Any, int]:
    """Return values whose lowest bit is the lowest that counts, and how many count."""
    width = 8 * values.dtype.itemsize
    if high == bits - 1:
        return values, bits
    if not bits - 1 < high < width:
        flags["high_bit_ignored"] = f"HighBit {high} with BitsStored {bits}"
        return values, bits
    shift = high + 1 - bits
    patterns = values.view(f"u{values.dtype.itemsize}")
    low = patterns & ((1 << shift) - 1)
    if low.any() and int(patterns.max()) < 1 << bits:
        flags["high_bit_ignored"] = f"HighBit {high} with BitsStored {bits}: no value has a bit above"
        return values, bits
    if float((low != 0).mean()) > 0.5:  # an overlay has fewer, noise has more
        flags["bits_exceed_stored"] = f"HighBit {high}, BitsStored {bits}: {high + 1} bits hold image"
        return values, high + 1
    flags["left_justified"] = f"HighBit {high}, BitsStored {bits}: moved by {shift} bits"
    whole = patterns.view(f"{'i' if signed else 'u'}{values.dtype.itemsize}")
    return (whole << (width - 1 - high)) >> (width - bits), bits


def _to_bits(values: Any, bits: int, signed: bool, patterns: bool, flags: dict[str, str]) -> Stored:
    """Return values within their bits, which are more than `bits` where image content needs more.

    Parameters
    ----------
    values
        (H, W) integers of 8 or 16 bits.
    bits
        How many of them count, as the file says.
    signed
        Whether they count as two's complement.
    patterns
        Whether `values` are bit patterns, whose unused high bits may hold anything (PS3.5 8.1.1), or numbers, which a lossy
        codec can push past the range: overlays are cut off patterns, numbers just past the range are clipped.
    flags
        Gets ``bits_exceed_stored`` where image content lies above `bits`.
    """
    xp = backend_of(values).xp
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    if patterns:
        values = values.view(f"{'i' if signed else 'u'}{values.dtype.itemsize}")
    unused = 8 * values.dtype.itemsize - bits
    smallest, largest = int(values.min()), int(values.max())
    if unused <= 0 or (largest <= high and smallest >= low):
        return Stored(values, bits)
    masked = (values << unused) >> unused
    smoother = _is_smoother(masked, values)
    if smoother is False and (patterns or largest > high + _OVERSHOOT * high or smallest < low - _OVERSHOOT * high):
        needed = max(largest.bit_length(), (-1 - smallest).bit_length()) + 1 if signed else largest.bit_length()
        flags["bits_exceed_stored"] = f"BitsStored {bits}, values from {smallest} to {largest}"
        return Stored(values, needed)
    return Stored(masked if patterns or smoother else xp.clip(values, low, high), bits)


def _is_smoother(masked: Any, whole: Any) -> bool | None:
    """Tell whether neighbours differ less without the high bits, where those change; None where they nowhere do.

    Image content goes through the border of its bits in small steps, and cutting it off makes steps of the whole range. An
    overlay on the image is the other way round, by far: noise may have steps of a few bits' range too.
    """
    xp = backend_of(whole).xp
    # Every other row, or all of a few, are enough.
    rows = slice(None, None, 2 if len(whole) > 64 else 1)
    masked, whole = masked[rows].astype(xp.int32), whole[rows].astype(xp.int32)
    high = whole - masked
    changes = high[:, 1:] != high[:, :-1]
    if not changes.any():
        return None
    without, with_all = (xp.abs(xp.diff(v, axis=1))[changes] for v in (masked, whole))
    return bool(3 * xp.median(without) <= xp.median(with_all))


# The GPU


def _decode_on_device(frame: bytes) -> Any | None:
    """Decode a frame with nvImageCodec to a CuPy array; None where it cannot."""
    with _DECODING:
        decoder = _device_decoder()
        image = None if decoder is None else _nvimagecodec_decode(decoder, frame)
    if image is None:
        return None
    import cupy

    return cupy.asarray(image.cuda())[..., 0]


@cache
def _device_decoder() -> Any | None:
    try:
        from nvidia import nvimgcodec

        kinds = (nvimgcodec.HW_GPU_ONLY, nvimgcodec.GPU_ONLY, nvimgcodec.HYBRID_CPU_GPU)
        return nvimgcodec.Decoder(backends=[nvimgcodec.Backend(kind) for kind in kinds])
    except Exception:  # not installed, or not for this GPU and driver: the host decodes
        return None


def _nvimagecodec_decode(decoder: Any, frame: bytes) -> Any | None:
    """Return an nvImageCodec image (H, W, 1) with the values as they are stored; None where it cannot decode the frame."""
    from nvidia import nvimgcodec

    params = nvimgcodec.DecodeParams(color_spec=nvimgcodec.ColorSpec.UNCHANGED, allow_any_depth=True)
    try:
        return decoder.decode(frame, params=params)
    except RuntimeError:  # no codec of its own for this frame
        return None
