"""Reading a mammogram from DICOM, PNG, TIFF or PGM into a 2-D array where brighter means denser tissue."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.errors import BadInput, first_line

if TYPE_CHECKING:
    import pydicom

DICOM_SUFFIXES = (".dcm", ".dicom")
IMAGE_SUFFIXES = (*DICOM_SUFFIXES, ".png", ".tif", ".tiff", ".pgm")


@dataclass(frozen=True)
class Header:
    """What a file says of its image without its pixels being decoded.

    Attributes
    ----------
    height, width
        Size in native pixels.
    bits
        Stored bits a pixel (8, 10, 12, 14, 16).
    spacing_mm
        Size of a native pixel in mm, or None where the file does not say.
    spacing_source
        ``dicom:PixelSpacing``, ``dicom:ImagerPixelSpacing``, or empty.
    laterality, view, patient_id, study_id
        As the file has them, or empty.
    """

    height: int
    width: int
    bits: int
    spacing_mm: float | None = None
    spacing_source: str = ""
    laterality: str = ""
    view: str = ""
    patient_id: str = ""
    study_id: str = ""


@dataclass(frozen=True)
class Mammogram:
    """A decoded mammogram.

    Attributes
    ----------
    pixels
        (H, W) uint8 or uint16; brighter is denser (MONOCHROME1 is undone).
    header
        What the file says of it; `with_spacing` overrides the spacing.
    display
        (H, W) float32 in [0, 1] by the file's own VOI LUT or window, or None where it has none.
    """

    pixels: np.ndarray
    header: Header
    display: np.ndarray | None = None

    def with_spacing(self, spacing_mm: float | None, source: str) -> Mammogram:
        """Return the mammogram with another pixel spacing (mm) and where it came from."""
        return replace(self, header=replace(self.header, spacing_mm=spacing_mm, spacing_source=source))


def is_dicom(path: Path) -> bool:
    """Tell a DICOM file by its suffix or, whatever it is called, by the DICM mark at byte 128."""
    if path.suffix.lower() in DICOM_SUFFIXES:
        return True
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def read_header(path: Path) -> Header:
    """Read what the file says of its image, without decoding pixels.

    Raises
    ------
    BadInput
        The file is missing or is no image of a supported format.
    """
    path = _existing(path)
    try:
        if is_dicom(path):
            import pydicom

            return _dicom_header(pydicom.dcmread(path, stop_before_pixels=True))
        from PIL import Image

        with Image.open(path) as image:
            return Header(image.height, image.width, _stored_bits(path, image.mode))
    except Exception as error:  # decoders raise what they like; the caller gets one kind of error that names the file
        raise _unreadable(path, error) from error


def read_mammogram(path: str | Path) -> Mammogram:
    """Read and decode a mammogram.

    DICOM is decoded by pydicom (RLE and JPEG 2000 through pylibjpeg), with rescale, VOI LUT or window, and
    MONOCHROME1 applied (DICOM PS3.3 C.7.6.3, C.11.1, C.11.2). RGB images whose channels are equal count as grey.

    Raises
    ------
    BadInput
        The file is missing, damaged, of no supported format, colour, multi-frame, or empty.
    """
    path = _existing(Path(path))
    try:
        mammogram = _read_dicom(path) if is_dicom(path) else _read_plain(path)
    except BadInput:
        raise
    except Exception as error:  # as above
        raise _unreadable(path, error) from error
    return mammogram


def _stored_bits(path: Path, mode: str) -> int:
    """Return 8 or 16; Pillow's mode alone says 8 for 16-bit files of several channels."""
    suffix = path.suffix.lower()
    if suffix == ".png":
        with path.open("rb") as file:
            return max(8, file.read(25)[24])  # the bit depth in the IHDR chunk
    if suffix in (".tif", ".tiff"):
        import tifffile

        with tifffile.TiffFile(path) as tiff:
            return max(8, int(tiff.pages[0].bitspersample))
    return 16 if mode.startswith("I") else 8


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise BadInput(f"image {path} does not exist; check the path")
    return path


def _unreadable(path: Path, error: Exception) -> BadInput:
    kinds = ", ".join(s.lstrip(".") for s in IMAGE_SUFFIXES)
    return BadInput(f"image {path} cannot be read ({first_line(error)}); give an intact file of one of: {kinds}")


def _dicom_header(dataset: pydicom.Dataset) -> Header:
    spacing, source = None, ""
    for name in ("PixelSpacing", "ImagerPixelSpacing"):
        if (value := dataset.get(name)) and float(value[0]) > 0:
            spacing, source = float(value[0]), f"dicom:{name}"
            break
    orientation = dataset.get("PatientOrientation")
    # CBIS-DDSM writes the view where the orientation belongs.
    view = dataset.get("ViewPosition") or (orientation if orientation in ("CC", "MLO") else "")
    return Header(
        height=int(dataset.Rows),
        width=int(dataset.Columns),
        bits=int(dataset.BitsStored),
        spacing_mm=spacing,
        spacing_source=source,
        laterality=str(dataset.get("ImageLaterality") or dataset.get("Laterality") or ""),
        view=str(view),
        patient_id=str(dataset.get("PatientID") or ""),
        study_id=str(dataset.get("StudyInstanceUID") or ""),
    )


def _read_dicom(path: Path) -> Mammogram:
    import pydicom
    from pydicom.pixels import apply_rescale, apply_voi_lut

    dataset = pydicom.dcmread(path)
    if int(dataset.get("NumberOfFrames") or 1) > 1:
        raise BadInput(f"image {path} has {dataset.NumberOfFrames} frames; export the frame to use as a single image")
    if dataset.get("PresentationIntentType") == "FOR PROCESSING":
        raise BadInput(f"image {path} is FOR PROCESSING (raw detector data); give its FOR PRESENTATION version")
    header = _dicom_header(dataset)
    stored = dataset.pixel_array
    if stored.ndim != 2:
        raise BadInput(f"image {path} has shape {stored.shape}, not one grey plane; convert it to MONOCHROME2")
    inverted = dataset.PhotometricInterpretation == "MONOCHROME1"
    display = None
    # Some files carry these elements without a value.
    if dataset.get("VOILUTSequence") or None not in (dataset.get("WindowWidth"), dataset.get("WindowCenter")):
        values = apply_voi_lut(apply_rescale(stored, dataset), dataset).astype(np.float32)
        low, high = _voi_output_range(dataset)
        display = np.clip((values - low) / (high - low), 0, 1)
        display = 1 - display if inverted else display
    # Shift signed or offset data to start at 0: only differences matter from here on.
    offset = min(int(stored.min()), 0)
    pixels = (stored.astype(np.int32) - offset) if offset else stored
    if inverted:
        pixels = int(pixels.max()) - pixels.astype(np.int32)
    return Mammogram(pixels.astype(np.uint8 if header.bits <= 8 and not offset else np.uint16), header, display)


def _voi_output_range(dataset: pydicom.Dataset) -> tuple[float, float]:
    """Return the range of pydicom's apply_voi_lut output: the LUT's depth, or the window's range in rescaled units."""
    if dataset.get("VOILUTSequence"):
        return 0.0, float(2 ** int(dataset.VOILUTSequence[0].LUTDescriptor[2]) - 1)
    if dataset.get("ModalityLUTSequence"):
        return 0.0, float(2 ** int(dataset.ModalityLUTSequence[0].LUTDescriptor[2]) - 1)
    bits = int(dataset.BitsStored)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if dataset.PixelRepresentation else (0, 2**bits - 1)
    slope, intercept = float(dataset.get("RescaleSlope", 1)), float(dataset.get("RescaleIntercept", 0))
    return low * slope + intercept, high * slope + intercept


def _read_plain(path: Path) -> Mammogram:
    suffix = path.suffix.lower()
    if suffix in (".tif", ".tiff"):
        import tifffile

        with tifffile.TiffFile(path) as tiff:
            pixels = tiff.asarray()
            # 0 is white, as in MONOCHROME1.
            if tiff.pages[0].photometric == tifffile.PHOTOMETRIC.MINISWHITE and pixels.dtype.kind in "bu":
                pixels = ~pixels
    elif suffix == ".png":
        import imagecodecs

        pixels = imagecodecs.png_decode(path.read_bytes())
    else:
        from PIL import Image

        with Image.open(path) as image:
            pixels = np.asarray(image)
    if pixels.dtype == bool:
        pixels = pixels.astype(np.uint8) * 255
    if pixels.ndim == 3 and pixels.shape[-1] in (2, 3, 4):  # channels, not a stack of pages
        colour = pixels[..., :3]
        if colour.shape[-1] == 3 and not (np.ptp(colour, axis=-1) == 0).all():
            raise BadInput(f"image {path} is in colour; convert it to grey")
        pixels = pixels[..., 0]
    if pixels.ndim != 2 or pixels.size == 0:
        raise BadInput(f"image {path} has shape {pixels.shape}, not one plane; export a single grey image")
    if pixels.dtype == np.int32 and pixels.min() >= 0 and pixels.max() <= 65535:  # Pillow's 16-bit PGM
        pixels = pixels.astype(np.uint16)
    if pixels.dtype not in (np.uint8, np.uint16):
        raise BadInput(f"image {path} has {pixels.dtype} pixels; convert it to 8 or 16 bit unsigned")
    return Mammogram(np.ascontiguousarray(pixels), Header(*pixels.shape, bits=8 * pixels.dtype.itemsize))
