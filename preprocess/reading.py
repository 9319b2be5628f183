"""Reading a mammogram from DICOM, PNG, TIFF or PGM into a 2-D array where brighter means denser tissue."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

from mammostream.common.errors import BadInput, MachineFault, first_line
from mammostream.preprocess.mammogram import Header, Mammogram, ReadingConfig

__all__ = ["IMAGE_SUFFIXES", "Header", "Mammogram", "ReadingConfig", "is_dicom", "read_header", "read_mammogram"]

DICOM_SUFFIXES = (".dcm", ".dicom")
IMAGE_SUFFIXES = (*DICOM_SUFFIXES, ".png", ".tif", ".tiff", ".pgm", ".jpg", ".jpeg")
AS_IT_COMES = ReadingConfig()
# What the next film would meet too, or this one may not meet again. EIO is not among them: one bad sector must not hold up all.
_MACHINE_FAULTS = (errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN)


def is_dicom(path: Path) -> bool:
    """Tell a DICOM file by its suffix or, whatever it is called, by the DICM mark at byte 128."""
    if path.suffix.lower() in DICOM_SUFFIXES:
        return True
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def read_header(path: str | Path) -> Header:
    """Read what the file says of its image, without decoding pixels.

    Multi-frame and FOR PROCESSING files have a header too; of a multi-frame file it is the first frame's.

    Raises
    ------
    BadInput
        The file is missing, is no image of a supported format, or its pixels are not square.
    MachineFault
        There is no memory, or the drive went away.
    """
    path = _existing(Path(path))
    try:
        if is_dicom(path):
            from mammostream.preprocess.dicom import read_dicom_header

            return read_dicom_header(path)
        from mammostream.preprocess.plain import read_plain_header

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
        The file. Its suffix tells its format; DICOM is also known by its DICM mark.
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
            from mammostream.preprocess.plain import read_plain

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
    if isinstance(error, BadInput):  # says itself how to fix it
        return BadInput(f"image {path} {error}")
    kinds = ", ".join(s.lstrip(".") for s in IMAGE_SUFFIXES)
    return BadInput(f"image {path} cannot be read ({first_line(error)}); give an intact file of one of: {kinds}")
