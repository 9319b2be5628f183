"""DICOM: what a file says of its film, its stored values, and their display by the file's own VOI LUT or window."""

from __future__ import annotations

import math
import struct
import threading
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mammostream.common.errors import BadInput
from mammostream.preprocess.backend import backend_of
from mammostream.preprocess.codestreams import lossy_dicom
from mammostream.preprocess.mammogram import Header, Mammogram, ReadingConfig, check_size
from mammostream.preprocess.objects import is_for_processing, modality_falls, object_facts, refuse_other_objects

if TYPE_CHECKING:
    import pydicom

# A build reads the next film while it reads one: nvImageCodec does not promise that two threads may share a decoder.
_DECODING = threading.Lock()
SQUARE_WITHIN = 0.01  # rows and columns as far apart as 1.01 : 1 count as square
# What enhanced multi-frame objects say frame by frame, and other objects at the top (PS3.3 C.7.6.16).
FRAME_GROUPS = ("FrameAnatomySequence", "PixelMeasuresSequence", "PixelValueTransformationSequence", "FrameVOILUTSequence")


def read_dicom_header(path: Path) -> Header:
    """Return what the file says, of its first frame where it has several; raises BadInput or what pydicom raises."""
    import pydicom

    dataset = pydicom.dcmread(path, stop_before_pixels=True)
    refuse_other_objects(dataset)
    _take_frame_groups(dataset, 0)
    return _header(dataset)


def read_dicom(path: Path, config: ReadingConfig, device: str) -> Mammogram:
    """Read a film; raises BadInput without the file's name, or what the decoders raise.

    Pixels come on the host, or on the GPU where `device` is ``cuda`` and nvImageCodec decoded them.
    """
    import pydicom

    dataset = pydicom.dcmread(path)
    if "Rows" not in dataset:
        refuse_other_objects(dataset)
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames > 1 and config.frame is None:
        raise BadInput(f"has {frames} frames; give --frame N to use one of them, or export it as a single image")
    index = config.frame - 1 if config.frame and frames > 1 else 0
    if index >= frames:
        raise BadInput(f"has {frames} frames and no frame {index + 1}; give another --frame")
    raw = is_for_processing(dataset)
    if raw and not config.allow_for_processing:
        raise BadInput(
            "is FOR PROCESSING (raw detector data); give its FOR PRESENTATION version, or --allow-for-processing to use it raw"
        )
    _take_frame_groups(dataset, index)
    header = _header(dataset)
    photometric = dataset.PhotometricInterpretation
    if int(dataset.SamplesPerPixel) != 1 or photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise BadInput(f"is {photometric}, not one grey plane; convert it to MONOCHROME2")
    stored = _stored_values(dataset, index, frames, device)
    turned = (photometric == "MONOCHROME1") != modality_falls(dataset)
    pixels, shown = _to_pixels(stored, dataset, inverted=turned)
    voi = None if raw else _voi_table(dataset, shown)
    if voi is not None and photometric == "MONOCHROME1":
        voi = 1 - voi
    return Mammogram(pixels.astype("uint8" if header.bits <= 8 else "uint16", copy=False), header, voi)


# What the file says


def _take_frame_groups(dataset: pydicom.Dataset, index: int) -> None:
    """Lift a frame's functional groups to the top of the dataset."""
    shared = dataset.get("SharedFunctionalGroupsSequence") or []
    each = dataset.get("PerFrameFunctionalGroupsSequence") or []
    for groups in (*shared[:1], *each[index : index + 1]):
        for name in FRAME_GROUPS:
            for item in (groups.get(name) or [])[:1]:
                dataset.update(item)


def _header(dataset: pydicom.Dataset) -> Header:
    height, width = int(dataset.Rows), int(dataset.Columns)
    check_size(height, width)
    spacing, source = _spacing(dataset)
    orientation = dataset.get("PatientOrientation")
    # CBIS-DDSM writes the view where the orientation belongs.
    view = dataset.get("ViewPosition") or (orientation if orientation in ("CC", "MLO") else "")
    laterality = (dataset.get(name) for name in ("ImageLaterality", "FrameLaterality", "Laterality"))
    return Header(
        height=height,
        width=width,
        bits=int(dataset.BitsStored),
        spacing_mm=spacing,
        spacing_source=source,
        laterality=str(next(filter(None, laterality), "")),
        view=str(view),
        patient_id=str(dataset.get("PatientID") or ""),
        study_id=str(dataset.get("StudyInstanceUID") or ""),
        lossy=lossy_dicom(
            str(getattr(dataset, "file_meta", {}).get("TransferSyntaxUID")), str(dataset.get("LossyImageCompression"))
        ),
        facts=object_facts(dataset),
    )


def _spacing(dataset: pydicom.Dataset) -> tuple[float | None, str]:
    """Return the pixel size in mm and the attribute it came from.

    ImagerPixelSpacing is taken as it is, at the detector. EstimatedRadiographicMagnificationFactor is left out: it is an
    estimate, often missing, and near 1 in contact views. In magnification views sizes are thus larger than in the breast.
    """
    for name in ("PixelSpacing", "ImagerPixelSpacing", "PixelAspectRatio"):
        value = dataset.get(name)
        pair = [float(v) for v in value] if hasattr(value, "__len__") else []
        if len(pair) != 2 or not all(math.isfinite(v) and v > 0 for v in pair):
            continue
        if max(pair) > (1 + SQUARE_WITHIN) * min(pair):
            raise BadInput(f"has {name} {pair[0]:g} x {pair[1]:g}: pixels that are not square; resample it to square pixels")
        if name != "PixelAspectRatio":
            return pair[0], f"dicom:{name}"
    return None, ""


# From the file's bytes to its stored values


class _Codestream(NamedTuple):
    """What a JPEG, JPEG-LS or JPEG 2000 codestream says of itself."""

    decoder: str  # imagecodecs' name
    height: int
    width: int
    precision: int
    signed: bool
    lossless_jpeg: bool = False


def _stored_values(dataset: pydicom.Dataset, index: int, frames: int, device: str) -> Any:
    """Decode a frame to its stored values: (H, W) integers of 8 or 16 bits, signed where the file says so.

    imagecodecs decodes what is encapsulated; nvImageCodec, where `device` is ``cuda`` and it can.
    """
    import imagecodecs
    from pydicom.encaps import get_frame
    from pydicom.pixels import get_decoder
    from pydicom.uid import RLELossless

    allocated, bits, signed = int(dataset.BitsAllocated), int(dataset.BitsStored), bool(dataset.PixelRepresentation)
    if allocated not in (8, 16) or not 1 <= bits <= allocated or dataset.get("HighBit", bits - 1) != bits - 1:
        raise BadInput(
            f"has {bits} of {allocated} bits with high bit {dataset.get('HighBit')}; convert it to 8 or 16 bits allocated"
        )
    shape = int(dataset.Rows), int(dataset.Columns)
    syntax = dataset.file_meta.TransferSyntaxUID
    if not syntax.is_encapsulated:
        options: Any = {"view_only": True, "correct_unused_bits": False}
        values, _ = get_decoder(syntax).as_array(dataset, index=index, raw=True, **options)
        values = values.astype(values.dtype.newbyteorder("="), copy=False)
        return _to_bits(values, bits, signed, patterns=True)
    offsets = None
    if "ExtendedOffsetTable" in dataset:
        offsets = dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths
    frame = get_frame(dataset.PixelData, index, number_of_frames=frames, extended_offsets=offsets)
    if syntax == RLELossless:
        return _to_bits(_decode_rle(frame, allocated // 8).reshape(shape), bits, signed, patterns=True)
    stream = _codestream(frame)
    if stream is None:
        raise BadInput(f"has the transfer syntax {syntax.name}, which is not supported; convert it to uncompressed DICOM")
    if (stream.height, stream.width) != shape:
        raise ValueError(f"its codestream has {stream.height} x {stream.width} pixels, its header {shape[0]} x {shape[1]}")
    if stream.precision > 16:
        raise ValueError(f"its codestream has {stream.precision} bits per pixel")
    if b"\xff\xd9" not in frame[-64:]:
        raise ValueError("its codestream is cut off")  # the JPEG decoder would fill up with grey
    decoded: Any = _decode_on_device(frame) if device == "cuda" and not signed and not stream.signed else None
    values = getattr(imagecodecs, stream.decoder + "_decode")(frame) if decoded is None else decoded
    if values.shape != shape:
        raise ValueError(f"its codestream gives pixels of shape {values.shape}, not {shape}")
    patterns = stream.lossless_jpeg or signed != stream.signed
    return _to_bits(values, min(bits, stream.precision) if signed else bits, signed, patterns)


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


def _to_bits(values: Any, bits: int, signed: bool, patterns: bool) -> Any:
    """Return values within `bits` bits.

    Parameters
    ----------
    values
        (H, W) integers of 8 or 16 bits.
    bits
        How many of them count.
    signed
        Whether they count as two's complement.
    patterns
        Whether `values` are bit patterns, whose unused high bits may hold anything (PS3.5 8.1.1), or numbers, which a lossy
        codec can push past the range: patterns are cut to `bits`, numbers are clipped.
    """
    xp = backend_of(values).xp
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    if patterns:
        values = values.view(f"{'i' if signed else 'u'}{values.dtype.itemsize}")
    unused = 8 * values.dtype.itemsize - bits
    if unused <= 0 or (values.max() <= high and (not signed or values.min() >= low)):
        return values
    return (values << unused) >> unused if patterns else xp.clip(values, low, high)


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


# From stored values to pixels


def _to_pixels(stored: Any, dataset: pydicom.Dataset, inverted: bool) -> tuple[Any, np.ndarray]:
    """Return pixels that start at 0 and are brighter where tissue is denser, and the stored value each pixel value had.

    Returns
    -------
    pixels, shown
        (H, W) uint8 or uint16, and (N,) int32: pixel value v was stored as ``shown[v]``.
    """
    xp = backend_of(stored).xp
    padding = _padding(stored, dataset, inverted)
    # Padding may lie far outside the film's values: it has no say in their range.
    film = stored if padding is None else xp.where(padding, stored.ravel()[int((~padding).argmax())], stored)
    high = int(film.max())
    low = int(film.min()) if inverted or stored.dtype.kind == "i" else 0
    low = low if inverted else min(low, 0)
    # Differences of a width's own unsigned type, modulo its range, are exact: the range fits.
    kind = np.dtype(f"u{stored.dtype.itemsize}")
    end = kind.type((high if inverted else low) & (2 ** (8 * kind.itemsize) - 1))
    bare = film.view(kind)
    if inverted:
        pixels = end - bare
    else:
        pixels = bare - end if low else bare
    if padding is not None:
        pixels = xp.where(padding, kind.type(0), pixels)
    shown = np.arange(low, high + 1, dtype=np.int32)
    return pixels, shown[::-1] if inverted else shown


def _padding(stored: Any, dataset: pydicom.Dataset, inverted: bool) -> Any | None:
    """Return where the film is padding, as (H, W) bool, or None where it has none to undo.

    Padding is what PixelPaddingValue, or the range from it to PixelPaddingRangeLimit, says (PS3.3 C.7.5.1.1.2). Some files
    name a value there that tissue has too: where padding is not the darkest of the film, only what hangs together with the
    image's border counts.
    """
    ends = [dataset.get(name) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    if ends[0] is None:
        return None
    first, last = (ends[0] if e is None else e for e in ends)
    if stored.dtype.kind == "i":  # some files write signed padding as if it were unsigned
        first, last = (int(np.int64(e).astype(stored.dtype)) for e in (first, last))
    first, last = min(first, last), max(first, last)
    if not inverted and last <= 0 and stored.dtype.kind == "u":
        return None  # it is background already
    kinds = np.iinfo(stored.dtype)
    if last < kinds.min or first > kinds.max:
        return None
    first, last = max(first, kinds.min), min(last, kinds.max)  # CuPy compares with no number that the type cannot hold
    backend = backend_of(stored)
    xp = backend.xp
    padding = (stored >= first) & (stored <= last)
    if not padding.any() or padding.all():
        return None
    if stored.max() <= last if inverted else stored.min() >= first:
        return padding  # nothing is darker
    parts, _ = backend.ndimage.label(padding)
    at_border = xp.zeros(int(parts.max()) + 1, bool)
    for edge in (parts[0], parts[-1], parts[:, 0], parts[:, -1]):
        at_border[edge] = True
    at_border[0] = False
    return at_border[parts] if at_border.any() else None


def _voi_table(dataset: pydicom.Dataset, shown: np.ndarray) -> np.ndarray | None:
    """Return the display in [0, 1], as (N,) float32, of stored values; None where the file has neither VOI LUT nor window.

    The file's first VOI LUT or window counts.
    """
    from pydicom.pixels import apply_rescale, apply_voi_lut

    # Some files carry these without a value.
    for name in ("VOILUTFunction", "RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth"):
        if name in dataset and dataset.get(name) in (None, ""):
            delattr(dataset, name)
    lut = (dataset.get("VOILUTSequence") or [{}])[0]
    values = apply_rescale(shown, dataset)
    if lut.get("LUTDescriptor") and lut.get("LUTData"):
        entries, first, depth = lut.LUTDescriptor
        # pydicom counts a LUT's entries in the type of its values: those of 8 bits would end at the 256th.
        lut.LUTDescriptor = [entries, first, 16]
        values, low, high = np.rint(values).astype(np.int32), 0.0, 2.0**depth - 1
    elif "WindowCenter" in dataset and "WindowWidth" in dataset:
        low, high = _window_output_range(dataset)
    else:
        return None
    display = (apply_voi_lut(values, dataset) - low) / (high - low)
    if not np.isfinite(display).all():
        raise ValueError("its window or rescale gives no numbers")
    return np.clip(display, 0, 1).astype(np.float32)


def _window_output_range(dataset: pydicom.Dataset) -> tuple[float, float]:
    """Return the range of pydicom's apply_voi_lut output for windows: that of all stored values, rescaled."""
    if dataset.get("ModalityLUTSequence"):
        return 0.0, 2.0 ** int(dataset.ModalityLUTSequence[0].LUTDescriptor[2]) - 1
    bits = int(dataset.BitsStored)
    low, high = (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1) if dataset.PixelRepresentation else (0.0, 2.0**bits - 1)
    if "RescaleSlope" in dataset and "RescaleIntercept" in dataset:
        slope, intercept = float(dataset.RescaleSlope), float(dataset.RescaleIntercept)
        return low * slope + intercept, high * slope + intercept
    return low, high
