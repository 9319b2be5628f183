"""Reading a mammogram from DICOM or an ordinary image format into a 2-D array where brighter means denser tissue."""

from __future__ import annotations

import errno
import re
from dataclasses import replace
from itertools import chain
from pathlib import Path, PurePath

from mammostream.common.errors import BadInput, MachineFault, first_line
from mammostream.preprocess.mammogram import Header, Mammogram, ReadingConfig
from mammostream.preprocess.objects import OtherObject
from mammostream.preprocess.plain import FORMAT_ENDINGS, read_plain, read_plain_header

__all__ = [
    *("IMAGE_SUFFIXES", "Header", "Mammogram", "ReadingConfig", "has_ending", "is_dicom", "may_be_image", "read_header"),
    "read_mammogram",
]

DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
IMAGE_SUFFIXES = (*DICOM_SUFFIXES, *chain.from_iterable(FORMAT_ENDINGS.values()))
AS_IT_COMES = ReadingConfig()
# What the next film would meet too, or this one may not meet again. EIO is not among them: one bad sector must not hold up all.
_MACHINE_FAULTS = (errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN)
_ENDING = re.compile(r"\.(?=[^.]*[a-z])[a-z0-9]{1,5}", re.IGNORECASE)
# Old exports begin with the data set itself: an element of group 2 or 8, implicit or with its VR (PS3.5 7.1).
_DATA_SET = re.compile(rb"(?s)[\x02\x08]\0.\0(?:[A-Z]{2}..|..\0\0)|\0[\x02\x08]\0.[A-Z]{2}")


def has_ending(path: PurePath) -> bool:
    """Tell whether a file's name ends like ``.png``; ``1.2.840.10008`` and ``IM.R CC`` have no ending."""
    return _ENDING.fullmatch(path.suffix) is not None


def may_be_image(path: Path) -> bool:
    """Tell whether a file is taken for an image: by its ending or, where it has none, as archives export DICOM, its content.

    Raises
    ------
    OSError
        A file without ending cannot be read.
    """
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return True
    if has_ending(path):
        return False
    with path.open("rb") as file:
        start = file.read(132)
    return start[128:] == b"DICM" or _DATA_SET.match(start) is not None


def is_dicom(path: Path) -> bool:
    """Tell a DICOM file by its suffix or its DICM mark at byte 128; one without an ending also by its first element."""
    if path.suffix.lower() in DICOM_SUFFIXES:
        return True
    with path.open("rb") as file:
        return _starts_as_dicom(path, file.read(132))


def _starts_as_dicom(path: Path, start: bytes) -> bool:
    return start[128:132] == b"DICM" or (not has_ending(path) and _DATA_SET.match(start) is not None)


def read_header(path: str | Path) -> Header:
    """Read what the file says of its image, without decoding pixels.

    Multi-frame and FOR PROCESSING files have a header too; of a multi-frame file it is the first frame's.

    Raises
    ------
    BadInput
        The file is missing, is no image of a supported format, or its pixels are not square; an
        :class:`mammostream.preprocess.objects.OtherObject` where it is a DICOM object that is no mammogram.
    MachineFault
        There is no memory, or the drive went away.
    """
    path = _existing(Path(path))
    try:
        if is_dicom(path):
            from mammostream.preprocess.dicom import read_dicom_header

            return read_dicom_header(path)
        return read_plain_header(path)
    except Exception as error:  # decoders raise what they like; the caller gets one that names the file
        raise _named(path, error) from error


def read_mammogram(path: str | Path, config: ReadingConfig = AS_IT_COMES, device: str = "cpu") -> Mammogram:
    """Read and decode a mammogram.

    DICOM's modality LUT or rescale, VOI LUT or window, pixel padding and MONOCHROME1 are applied (PS3.3 C.7.6.3, C.7.5.1.1.2,
    C.11.1, C.11.2). RGB and palette images whose channels are equal count as grey.

    Parameters
    ----------
    path
        The file. DICOM is told by its ending or its DICM mark, other formats by their content.
    config
        Whether, and which of, multi-frame and FOR PROCESSING files are read.
    device
        ``cpu`` gives NumPy pixels, ``cuda`` CuPy pixels: nvImageCodec decodes DICOM's JPEG, JPEG lossless above 8 bits,
        JPEG 2000 and HTJ2K frames on the GPU, the host decodes the rest.

    Raises
    ------
    BadInput
        The file is missing, damaged, of no supported format, colour, empty, its pixels are not square, or it is multi-frame
        or FOR PROCESSING and `config` does not ask for that.
    MachineFault
        There is no memory, or the drive went away.
    """
    path = _existing(Path(path))
    try:
        if is_dicom(path):
            from mammostream.preprocess.dicom import read_dicom

            mammogram = read_dicom(path, config, device)
        else:
            mammogram = read_plain(path)
    except Exception as error:
        if type(error).__module__.startswith("cupy"):
            raise  # the GPU is at fault, not the file
        raise _named(path, error) from error
    if device != "cuda":
        return mammogram
    import cupy

    voi = None if mammogram.voi is None else cupy.asarray(mammogram.voi)
    return replace(mammogram, pixels=cupy.asarray(mammogram.pixels), voi=voi)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise BadInput(f"image {path} does not exist; check the path")
    return path


def _named(path: Path, error: Exception) -> BadInput | MachineFault:
    """Return the error to raise, which names the file."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _MACHINE_FAULTS):
        what = "not enough memory; use fewer --workers" if isinstance(error, MemoryError) else error.strerror
        return MachineFault(f"image {path} cannot be read now ({what}); run the command again, it resumes from here")
    if isinstance(error, OtherObject):
        return OtherObject(f"image {path} {error}", error.kind)
    if isinstance(error, BadInput):  # says itself how to fix it
        return BadInput(f"image {path} {error}")
    kinds = ", ".join(s.lstrip(".") for s in IMAGE_SUFFIXES)
    return BadInput(f"image {path} cannot be read ({first_line(error)}); give an intact file of one of: {kinds}")
