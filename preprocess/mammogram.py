"""A decoded mammogram, what its file says of it, and how files are to be read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mammostream.common.errors import BadInput
from mammostream.common.options import option

# Three times the largest detector: more is a damaged header, refused before it takes the machine's memory.
MAX_PIXELS = 2**27


@dataclass(frozen=True)
class ReadingConfig:
    """What is read of files that hold more, or other, than one film for presentation."""

    frame: int | None = option(
        None, "Use this frame of multi-frame DICOM files, counted from 1; default: such files are refused."
    )
    allow_for_processing: bool = option(
        False,
        "Read FOR PROCESSING DICOM files (raw detector data): turned over where MONOCHROME1, no logarithm, "
        "then mapped by percentiles; default: such files are refused.",
    )

    def __post_init__(self) -> None:
        if self.frame is not None and self.frame < 1:
            raise BadInput(f"--frame {self.frame} is not a frame; frames are counted from 1")


@dataclass(frozen=True)
class Header:
    """What a file says of its image without its pixels being decoded.

    Attributes
    ----------
    height, width
        Size in native pixels.
    bits
        Stored bits per pixel: 8 to 16, rarely fewer in DICOM.
    spacing_mm
        Size of a native pixel in mm, or None where the file does not say.
    spacing_source
        ``dicom:PixelSpacing``, ``dicom:ImagerPixelSpacing``, or empty.
    laterality, view, patient_id, study_id
        As the file has them, or empty.
    flags
        What was assumed or put right in reading the file: the flag, and its particulars or "".
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
    flags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Mammogram:
    """A decoded mammogram.

    Attributes
    ----------
    pixels
        (H, W) uint8 or uint16; brighter is denser (MONOCHROME1 is undone), padding is 0. A NumPy array, perhaps read-only,
        or a CuPy array where it was read with ``device="cuda"``.
    header
        What the file says of it; `with_spacing` and `with_view` override it.
    voi
        (N,) float32 in [0, 1]: ``voi[pixels]`` is the display by the file's own VOI LUT or window; N > ``pixels.max()``.
        None where the file has none.
    """

    pixels: Any
    header: Header
    voi: Any | None = None

    def with_spacing(self, spacing_mm: float | None, source: str) -> Mammogram:
        """Return the mammogram with another pixel spacing (mm) and where it came from."""
        return replace(self, header=replace(self.header, spacing_mm=spacing_mm, spacing_source=source))

    def with_view(self, view: str) -> Mammogram:
        """Return the mammogram with another view; an empty one leaves the file's."""
        return replace(self, header=replace(self.header, view=view)) if view else self


def check_size(height: int, width: int) -> None:
    """Refuse sizes that no mammogram has, before pixels are decoded.

    Raises
    ------
    ValueError
        An edge is 0, or there are more than `MAX_PIXELS` pixels.
    """
    if min(height, width) < 1 or height * width > MAX_PIXELS:
        raise ValueError(f"{height} x {width} pixels is no size of a mammogram")
