"""Damage that knows the structure of film files: DICOM elements, PNG chunks, TIFF tags, JPEG frames."""

from __future__ import annotations

import io
import struct
import zlib
from random import Random
from typing import Any

from benchmarks.fuzz.damage import pack

# Elements that decide what a film's pixels are: wrong ones can be noticed.
DECISIVE = ("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "SamplesPerPixel", "PixelData", "NumberOfFrames")
OTHERS = [
    "PixelRepresentation",
    "PhotometricInterpretation",
    "PixelSpacing",
    "ImagerPixelSpacing",
    "WindowCenter",
    "WindowWidth",
    "VOILUTFunction",
    "RescaleSlope",
    "RescaleIntercept",
    "TransferSyntaxUID",
    "PatientID",
    "ImageLaterality",
    "ViewPosition",
    "SOPClassUID",
    "SOPInstanceUID",
    "PixelPaddingValue",
    "VOILUTSequence",
    "ViewCodeSequence",
    "PresentationLUTShape",
    "PresentationIntentType",
    "Modality",
    "BurnedInAnnotation",
    "SharedFunctionalGroupsSequence",
    "PlanarConfiguration",
    "LossyImageCompression",
    "EstimatedRadiographicMagnificationFactor",
]
NUMBERS = (0, 1, 2, 3, 7, 17, 32, 33, 64, 255, 65535, 40000)
TEXTS = ("", "0", "-1", "nan", "inf", "1e308", "1e-308", "abc", "0\\0", "-1\\-1", "1\\2\\3", "1e300\\1e300", "99999999", "\\\\")
VRS = ("US", "SS", "UL", "DS", "IS", "CS", "LO", "OB", "UN", "SQ", "FD", "AT", "UI")


def dicom_damage(data: bytes, rng: Random) -> tuple[bytes, str]:
    """An element removed, emptied, of another VR, or of an absurd value; or the encapsulation's lengths."""
    import pydicom
    from pydicom.datadict import dictionary_VR, tag_for_keyword

    if rng.random() < 0.15 and (found := _item_damage(data, rng)):
        return found
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    pydicom.config.settings.writing_validation_mode = pydicom.config.IGNORE
    dataset = pydicom.dcmread(io.BytesIO(data), force=True)
    name = rng.choice(DECISIVE if rng.random() < 0.6 else OTHERS)
    home: Any = dataset.file_meta if name == "TransferSyntaxUID" else dataset
    tag: Any = tag_for_keyword(name)
    how = rng.choice(("remove", "empty", "value", "value", "value", "vr"))
    note = f"{name} {how}"
    try:
        if how == "remove":
            home.pop(tag, None)
        elif how == "empty":
            home.add_new(tag, dictionary_VR(tag).split(" ")[0], None)
        else:
            vr = dictionary_VR(tag).split(" ")[0] if how == "value" else rng.choice(VRS)
            value = _value(vr, rng)
            home.add_new(tag, vr, value)
            note += f" {vr} {value!r:.30}"
        file = io.BytesIO()
        pydicom.dcmwrite(file, dataset, enforce_file_format=False)
    except Exception:  # pydicom cannot hold or write it: damage that is less clever
        file = io.BytesIO(data.replace(struct.pack("<HH", tag >> 16, tag & 65535), b"\0\0\0\0", 1))
        note = f"{name} tag zeroed"
    return file.getvalue(), note


def _value(vr: str, rng: Random) -> Any:
    if vr in ("US", "UL", "SS", "AT"):
        return rng.choice(NUMBERS[:9] if vr == "SS" else NUMBERS)
    if vr == "SQ":
        import pydicom

        return pydicom.Sequence([pydicom.Dataset()] * rng.randrange(3))
    if vr in ("OB", "OW", "UN"):
        return rng.randbytes(rng.choice((0, 2, 1000)))
    if vr == "FD":
        return rng.choice((float("nan"), float("inf"), -1.0, 0.0))
    if vr == "UI":
        return rng.choice(("1.2.840.10008.1.2", "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.5", "1.2.3", "x"))
    return rng.choice(TEXTS)


def _item_damage(data: bytes, rng: Random) -> tuple[bytes, str] | None:
    """Another length or offset for an item of encapsulated pixels."""
    at = data.find(b"\xe0\x7f\x10\x00")
    items = []
    while at >= 0 and (at := data.find(b"\xfe\xff\x00\xe0", at + 1)) >= 0 and len(items) < 4:
        items.append(at)
    if not items:
        return None
    at = rng.choice(items) + 4
    value = rng.choice((0, 1, 3, 2**31, 2**32 - 1, 2**32 - 2, 100, len(data)))
    if rng.random() < 0.3:  # a basic offset table that leads nowhere
        table = struct.pack("<I", 8) + struct.pack("<II", rng.choice((5, 2**31, 2**32 - 1)), value)
        return data[: items[0] + 4] + table + data[items[0] + 8 :], f"offset table {value}"
    return data[:at] + struct.pack("<I", value) + data[at + 4 :], f"item length {value}"


def png_damage(data: bytes, rng: Random) -> tuple[bytes, str]:
    """A field of the header or a chunk, with a correct checksum."""
    chunks = []
    at = 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        chunks.append([data[at + 4 : at + 8], data[at + 8 : at + 8 + length]])
        at += 12 + length
    how = rng.choice(("width", "height", "depth", "colour", "interlace", "drop", "double", "stream", "tRNS"))
    header = bytearray(chunks[0][1])
    if how in ("width", "height"):
        at = 0 if how == "width" else 4
        (old,) = struct.unpack(">I", header[at : at + 4])
        header[at : at + 4] = pack(">I", rng.choice((0, 1, old - 1, old + 1, 10 * old, 100_000, 2**31 - 1, 2**32 - 1)))
    elif how in ("depth", "colour", "interlace"):
        header[{"depth": 8, "colour": 9, "interlace": 12}[how]] = rng.choice((0, 1, 2, 3, 4, 6, 8, 16, 255))
    elif how == "drop":
        chunks.pop(rng.randrange(1, len(chunks)))
    elif how == "double":
        chunks.insert(1, rng.choice(chunks))
    elif how == "stream":
        body = next(c for c in chunks if c[0] == b"IDAT")
        body[1] = body[1][: rng.randrange(1, len(body[1]))]
    else:
        chunks.insert(1, [rng.choice((b"tRNS", b"PLTE", b"iCCP", b"gAMA", b"acTL")), rng.randbytes(6)])
    chunks[0][1] = bytes(header) if chunks[0][0] == b"IHDR" else chunks[0][1]
    body = b"".join(struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks)
    return data[:8] + body, f"png {how}"


def tiff_damage(data: bytes, rng: Random) -> tuple[bytes, str]:
    """The type, count or value of a tag of the first directory."""
    (first,) = struct.unpack("<I", data[4:8])
    (count,) = struct.unpack("<H", data[first : first + 2])
    at = first + 2 + 12 * rng.randrange(count)
    (tag,) = struct.unpack("<H", data[at : at + 2])
    what, place, fmt = rng.choice(
        (("type", 2, "<H"), ("count", 4, "<I"), ("value", 8, "<I"), ("value", 8, "<I"), ("tag", 0, "<H"))
    )
    value = rng.choice((0, 1, 2, 3, 5, 8, 16, 32, 50000, 65535, 2**31 - 1, 2**32 - 1, len(data)))
    new = pack(fmt, value)
    return data[: at + place] + new + data[at + place + len(new) :], f"tag {tag} {what} = {value}"


def jpeg_damage(data: bytes, rng: Random) -> tuple[bytes, str]:
    """Size, precision or components of a frame header; the scan cut."""
    at = next(i for i in range(len(data) - 1) if data[i] == 0xFF and data[i + 1] in (0xC0, 0xC1, 0xC2, 0xC3, 0xF7))
    how = rng.choice(("height", "width", "precision", "components", "marker", "scan"))
    if how == "scan":
        middle = rng.randrange(at + 20, len(data) - 2)
        return data[:middle] + data[-2:], "scan cut, end mark kept"
    place, fmt = {
        "precision": (4, ">B"),
        "height": (5, ">H"),
        "width": (7, ">H"),
        "components": (9, ">B"),
        "marker": (1, ">B"),
    }[how]
    value = rng.choice((0, 1, 2, 3, 4, 8, 12, 16, 0xC0, 0xC2, 255, 5000, 65500, 65535))
    new = pack(fmt, value)
    return data[: at + place] + new + data[at + place + len(new) :], f"frame {how} = {value}"


def jpeg2000_damage(data: bytes, rng: Random) -> tuple[bytes, str]:
    """A field of the SIZ segment."""
    at = data.find(b"\xff\x4f\xff\x51")
    place = at + 6 + 2 * rng.randrange(20)
    size = rng.choice((1, 2, 4))
    new = rng.choice((bytes(size), b"\xff" * size, b"\x7f" + b"\xff" * (size - 1), rng.randbytes(size)))
    return data[:place] + new + data[place + size :], f"SIZ byte {place - at}"
