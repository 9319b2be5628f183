"""A decoded mammogram, what its file says of it, and how files are to be read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mammostream.common.errors import BadInput
from mammostream.common.options import option

# Three times the largest detector: more is a damaged header, refused before it takes the machine's memory.
MAX_PIXELS = 2**27
# What a film's pixels measure, from the finest detectors and scanners to small copies of films. Others are a wrong unit.
PLAUSIBLE_SPACING_MM = (0.02, 0.4)
PIXELS_MISSING = "pixels_missing"  # a header's flag: such a file gives no mammogram
_FRAME_WORDS = ("middle", "max")


@dataclass(frozen=True)
class ReadingConfig:
    """What is read of files that hold more, or other, than one film for presentation."""

    frame: str | int | None = option(
        None,
        "Read this of multi-frame DICOM (tomosynthesis): a frame from 1 on, 'middle', or 'max' (maximum intensity projection).",
    )
    allow_for_processing: bool = option(
        False,
        "Read FOR PROCESSING (raw) DICOM: turned over where MONOCHROME1, no logarithm, mapped by percentiles.",
    )

    def __post_init__(self) -> None:
        word = str(self.frame).strip().lower()
        frame: str | int | None
        if self.frame is None or word in _FRAME_WORDS:
            frame = None if self.frame is None else word
        elif word.isdecimal() and int(word) > 0:
            frame = int(word)
        else:
            raise BadInput(f"--frame {self.frame} is not a frame; frames are counted from 1, or give 'middle' or 'max'")
        object.__setattr__(self, "frame", frame)


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
    laterality, view, view_modifiers
        ``L`` or ``R``, an acronym of :data:`mammostream.preprocess.views.VIEWS` (another word in capitals), and names of
        :data:`mammostream.preprocess.views.MODIFIERS` with spaces between them; empty where the file does not say.
    patient_id, study_id, manufacturer, model
        As the file has them, or empty.
    implant, partial_view
        ``YES``, ``NO`` or empty: DICOM's BreastImplantPresent and PartialView.
    intent
        ``FOR PRESENTATION``, ``FOR PROCESSING`` or empty.
    flags
        What was assumed or put right in reading the file: the flag, and its particulars or "".
    lossy
        Whether the pixels were compressed with loss, as far as the file says; None where it does not.
    facts
        Of DICOM, what kind of object it is: see :func:`mammostream.preprocess.objects.object_facts`.
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
    view_modifiers: str = ""
    implant: str = ""
    partial_view: str = ""
    manufacturer: str = ""
    model: str = ""
    intent: str = ""
    flags: Mapping[str, str] = field(default_factory=dict)
    lossy: bool | None = None
    facts: Mapping[str, str] = field(default_factory=dict)


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
    voi_name
        Where `voi` is from, such as ``window 2048/4096``, or empty.
    """

    pixels: Any
    header: Header
    voi: Any | None = None
    voi_name: str = ""

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
