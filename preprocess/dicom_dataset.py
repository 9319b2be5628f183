"""DICOM: a file's data set, up to its pixels, and where those lie; what is missing or wrong in the encoding is put right."""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from mammostream.common.errors import BadInput

if TYPE_CHECKING:
    import pydicom
    from pydicom.tag import BaseTag
    from pydicom.uid import UID

_PIXEL_DATA = 0x7FE00010
_FLOAT_PIXEL_DATA = {0x7FE00008: "FloatPixelData", 0x7FE00009: "DoubleFloatPixelData"}
_UNDEFINED = 0xFFFFFFFF
_ITEM = b"\xfe\xff\x00\xe0"
_CODESTREAMS = (b"\xff\xd8\xff", b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  ")  # JPEG and JPEG-LS, JPEG 2000, JP2
_BIG_ENDIAN_PIXELS = "1.2.840.113619.5.2"  # GE's private syntax: an implicit little-endian data set around big-endian pixels


@dataclass(frozen=True)
class PixelElement:
    """Where the pixels of a file lie.

    Attributes
    ----------
    start, length
        First byte of the value in the stream, and how many bytes there are of it.
    encapsulated
        Whether the value is a sequence of fragments.
    bare
        Whether the value is one codestream without fragments around it.
    big_endian, words
        How native pixels of more than 8 bits, and of 8 bits in words, are ordered.
    explicit
        Whether the element says its VR.
    """

    start: int
    length: int
    encapsulated: bool
    bare: bool
    big_endian: bool
    words: bool
    explicit: bool


@dataclass(frozen=True)
class DicomFile:
    """An opened file: its data set without pixels, its pixels, and what was assumed or put right (as in `Header.flags`)."""

    stream: BinaryIO
    dataset: pydicom.Dataset
    syntax: UID
    pixels: PixelElement | None
    flags: dict[str, str]


@contextmanager
def open_dicom(path: Path) -> Iterator[DicomFile]:
    """Open a file; raises BadInput without its name, ValueError where it is no DICOM file, or what pydicom raises."""
    with path.open("rb") as file:
        yield _read(file)


def _read(file: BinaryIO) -> DicomFile:
    import pydicom
    from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    flags: dict[str, str] = {}
    stream: BinaryIO = file
    try:
        dataset: Any = pydicom.dcmread(file, stop_before_pixels=True)
        # An encoding misread gives elements that nobody has.
        read = any(has(dataset, name) for name in ("Rows", "SOPClassUID", "Modality", "PatientID"))
        read = read and dataset.file_meta.get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian
    except Exception:  # pydicom raises what the bytes happen to run into
        read = False
    if not read:
        stream, dataset = _repaired(file, flags)
    said = dataset.file_meta.get("TransferSyntaxUID")
    element = _pixel_element(stream, dataset, said)
    implicit, little = dataset.original_encoding
    native = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian
    if not said:
        flags["transfer_syntax_assumed"] = "" if element and element.encapsulated else native.name
        syntax = native
    else:
        syntax = said
        if element is not None and "transfer_syntax_corrected" not in flags:
            compressed = element.encapsulated or element.bare
            if compressed != _is_compressed(said) and not said.is_private:
                found = "compressed" if compressed else "not compressed"
                flags["transfer_syntax_corrected"] = f"it says {said.name}, its pixels are {found}"
            elif said in (ImplicitVRLittleEndian, ExplicitVRLittleEndian) and said.is_implicit_VR == element.explicit:
                flags["transfer_syntax_corrected"] = f"it says {said.name}, which it is not"
    if element is not None and element.bare:
        flags["not_encapsulated"] = "a codestream without fragments around it"
    return DicomFile(stream, dataset, syntax, element, flags)


def _is_compressed(syntax: UID) -> bool:
    try:
        return syntax.is_encapsulated
    except ValueError:  # no transfer syntax, by its number
        return False


def _repaired(file: BinaryIO, flags: dict[str, str]) -> tuple[BinaryIO, pydicom.Dataset]:
    """Read a data set whose start or encoding is not what the standard or the file itself says."""
    from pydicom.dataset import FileDataset
    from pydicom.filereader import read_dataset
    from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian

    file.seek(0)
    data = file.read()
    at = 132
    if data[128:132] != b"DICM":
        starts = [start for start in (0, 128) if is_bare_dataset(data[start : start + 8])]
        if not starts:
            raise ValueError("it is no DICOM file")
        at = starts[0]
        flags["no_preamble"] = ""
    meta, at = _file_meta(data, at)
    said = meta.get("TransferSyntaxUID")
    found = _encoding(data[at : at + 8])
    body = data[at:]
    if found is None:
        try:
            body = zlib.decompressobj(-zlib.MAX_WBITS).decompress(body)
        except zlib.error:
            raise ValueError("it is no DICOM file, or a damaged one") from None
        found = _encoding(body[:8])
        if found is None:
            raise ValueError("it is no DICOM file, or a damaged one")
        if said != DeflatedExplicitVRLittleEndian:
            flags["transfer_syntax_corrected"] = "it is deflated and does not say so"
        said = meta.TransferSyntaxUID = ExplicitVRLittleEndian
    elif said:
        native = not _is_compressed(said) and not said.is_private
        if said != found if native else found != ExplicitVRLittleEndian:
            flags["transfer_syntax_corrected"] = f"it says {said.name}, it is {UID(found).name}"
            if native:
                meta.TransferSyntaxUID = UID(found)
    stream = BytesIO(body)
    syntax = UID(found)
    implicit, little = syntax.is_implicit_VR, syntax.is_little_endian
    stops = {_PIXEL_DATA, *_FLOAT_PIXEL_DATA}
    elements = read_dataset(stream, implicit, little, stop_when=lambda tag, vr, length: tag in stops)
    dataset = FileDataset(stream, elements, None, meta, implicit, little)
    dataset.set_original_encoding(implicit, little, elements._character_set)
    return stream, dataset


def is_bare_dataset(start: bytes) -> bool:
    """Tell by its first 8 bytes whether a file may be DICOM without the preamble and the DICM mark."""
    return _encoding(start) is not None


def _encoding(start: bytes) -> str | None:
    """Return the transfer syntax of a data set by its first element, whose group is a low one; None where it is none."""
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian
    from pydicom.valuerep import VR

    if len(start) < 8:
        return None
    little, big = (struct.unpack_from(f"{order}H", start)[0] for order in "<>")
    explicit = start[4:6].decode("latin-1") in VR.__members__
    if 0 < little < 0x60:
        if explicit:
            return ExplicitVRLittleEndian
        return ImplicitVRLittleEndian if struct.unpack_from("<I", start, 4)[0] < 0x10000 else None
    return ExplicitVRBigEndian if explicit and 0 < big < 0x60 else None


def _file_meta(data: bytes, at: int) -> tuple[Any, int]:
    """Read the file meta information, explicit little-endian elements of group 2, and where it ends."""
    from pydicom.dataset import FileMetaDataset
    from pydicom.filereader import read_dataset

    stream = BytesIO(data[at : at + 0x10000])
    elements = read_dataset(stream, False, True, stop_when=lambda tag, vr, length: tag.group != 2)
    meta = FileMetaDataset()
    for element in elements:
        if element.keyword not in ("", "FileMetaInformationGroupLength"):
            meta[element.tag] = element
    return meta, at + stream.tell()


def _pixel_element(stream: BinaryIO, dataset: pydicom.Dataset, said: UID | None) -> PixelElement | None:
    """Return where the pixels lie, given a stream at the element that the data set ends before; None where there are none."""
    at = stream.tell()
    head = stream.read(12)
    end = stream.seek(0, os.SEEK_END)
    if len(head) < 8:
        return None
    order = ">" if head[:2] == b"\x7f\xe0" else "<"
    group, number = struct.unpack_from(f"{order}HH", head)
    tag = group << 16 | number
    if tag in _FLOAT_PIXEL_DATA:
        raise BadInput(f"has {_FLOAT_PIXEL_DATA[tag]} (floating point); convert it to integers of 16 bits")
    if tag != _PIXEL_DATA:
        return None
    words, explicit = head[4:6] == b"OW", head[4:6] in (b"OB", b"OW", b"UN")
    if explicit:
        start, length = at + 12, struct.unpack_from(f"{order}I", head, 8)[0]
    else:
        start, length = at + 8, struct.unpack_from(f"{order}I", head, 4)[0]
    there = end - start if length == _UNDEFINED else min(length, end - start)
    stream.seek(start)
    begins = stream.read(12)
    compressed = said is not None and _is_compressed(said)
    encapsulated = begins[:4] == _ITEM and (length == _UNDEFINED or compressed)
    bare = not encapsulated and begins.startswith(_CODESTREAMS) and there < _native_size(dataset)
    big_endian = order == ">" or said == _BIG_ENDIAN_PIXELS
    return PixelElement(start, there, encapsulated, bare, big_endian, words, explicit)


def _native_size(dataset: pydicom.Dataset) -> int:
    """Return how many bytes the pixels have where they are not compressed."""
    sizes = [integer(dataset, name) or 1 for name in ("NumberOfFrames", "Rows", "Columns", "SamplesPerPixel")]
    count = 1
    for size in sizes:
        count *= size
    return count * (integer(dataset, "BitsAllocated") or 8) // 8


# Values, whatever was written in their place. Straight from the bytes where these are plain: a header scan reads thousands.

_BINARY = {"US": "H", "SS": "h", "UL": "I", "SL": "i"}


@cache
def _tag(name: str) -> BaseTag:
    from pydicom.tag import Tag

    return Tag(name)


@cache
def _usual_vr(name: str) -> str:
    from pydicom.datadict import dictionary_VR

    return dictionary_VR(name)


def has(dataset: pydicom.Dataset, name: str) -> bool:
    """Tell whether a data set has an attribute, by its keyword."""
    return _tag(name) in dataset


def items(dataset: pydicom.Dataset, name: str) -> list[pydicom.Dataset]:
    """Return a sequence's items; none where it is missing or no sequence."""
    try:
        found: Any = dataset.get(name) if has(dataset, name) else None
    except Exception:  # pydicom raises what a torn sequence runs into; no film is lost for its view
        return []
    return [item for item in found if hasattr(item, "get_item")] if hasattr(found, "__iter__") else []


def raw_text(dataset: pydicom.Dataset, name: str) -> str:
    """Return an attribute's value as it was written, "" where there is none, whether or not it is valid."""
    if not has(dataset, name):
        return ""
    value: Any = dataset.get_item(_tag(name)).value
    if isinstance(value, bytes):
        return value.decode("latin-1").strip(" \0")
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        return "" if value is None else str(value).strip(" \0")
    return "\\".join(str(v) for v in value)


def text(dataset: pydicom.Dataset, name: str) -> str:
    """Return an attribute's first value as text of one line, "" where there is none; damage may put anything into it."""
    raw = raw_text(dataset, name)
    if not raw.isascii() or "\x1b" in raw:
        with suppress(Exception):  # pydicom raises what the value's kind raises
            raw = raw if (value := dataset.get(name)) is None else str(value)  # in the file's own character set
    first = raw.partition("\\")[0]
    return "".join(c if c.isprintable() else " " for c in first).strip()


def numbers(dataset: pydicom.Dataset, name: str) -> list[float]:
    """Return an attribute's numbers, a decimal comma read as a point; none where it is missing, empty or no numbers."""
    if not has(dataset, name):
        return []
    element: Any = dataset.get_item(_tag(name))
    kind = _BINARY.get(element.VR or _usual_vr(name))
    if kind and isinstance(element.value, bytes):
        order = "<" if element.is_little_endian else ">"
        count = len(element.value) // struct.calcsize(kind)
        return list(map(float, struct.unpack_from(f"{order}{count}{kind}", element.value)))
    if element.VR in ("US or SS", None) and "or" in _usual_vr(name):  # which of them, the sign of the pixels tells
        value = dataset.get(name)
        return [float(v) for v in (value if hasattr(value, "__iter__") else [value]) if isinstance(v, (int, float))]
    parts = raw_text(dataset, name).split("\\")
    try:
        return [float(part) for part in parts]
    except ValueError:
        if not all(re.fullmatch(r"\s*[-+]?\d*,?\d+\s*", part) for part in parts):
            return []
        return [float(part.replace(",", ".")) for part in parts]


def integer(dataset: pydicom.Dataset, name: str) -> int | None:
    """Return an attribute's first value as an integer, None where it is missing or no number."""
    if not has(dataset, name):
        return None
    element: Any = dataset.get_item(_tag(name))
    if element.VR == "US" and isinstance(element.value, bytes) and len(element.value) == 2:
        return int.from_bytes(element.value, "little" if element.is_little_endian else "big")
    found = numbers(dataset, name)
    return int(found[0]) if found and found[0] == found[0] and abs(found[0]) < 2**31 else None
