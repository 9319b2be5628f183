"""DICOM: what a data set says of its film."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mammostream.common.errors import BadInput
from mammostream.preprocess.codestreams import lossy_dicom
from mammostream.preprocess.dicom_dataset import DicomFile, integer, items, numbers, raw_text, text
from mammostream.preprocess.mammogram import PIXELS_MISSING, PLAUSIBLE_SPACING_MM, Header, check_size
from mammostream.preprocess.objects import is_for_processing, object_facts
from mammostream.preprocess.views import View, coded_view, normal_side, normal_view

if TYPE_CHECKING:
    import pydicom

SQUARE_WITHIN = 0.01  # rows and columns as far apart as 1.01 : 1 count as square
# What enhanced multi-frame objects say frame by frame, and other objects at the top (PS3.3 C.7.6.16).
FRAME_GROUPS = ("FrameAnatomySequence", "PixelMeasuresSequence", "PixelValueTransformationSequence", "FrameVOILUTSequence")


def take_frame_groups(dataset: pydicom.Dataset, index: int) -> None:
    """Lift a frame's functional groups to the top of the dataset."""
    shared, each = (items(dataset, name) for name in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"))
    for groups in (*shared[:1], *each[index : index + 1]):
        for name in FRAME_GROUPS:
            for item in items(groups, name)[:1]:
                dataset.update(item)


def header_of(film: DicomFile) -> Header:
    """Return what a file says; attributes left out that have one sensible value are filled into the data set, with a flag.

    Raises
    ------
    BadInput, ValueError
        Without the file's name: it holds no image, one of another size than a film's, or one of pixels that are not square.
    """
    dataset = film.dataset
    height, width = (integer(dataset, name) for name in ("Rows", "Columns"))
    if height is None or width is None:
        what = text(dataset, "Modality") or "no Modality"
        raise BadInput(f"holds no image ({what}, without Rows and Columns); leave it out")
    check_size(height, width)
    bits = _fill_in(film, height, width)
    spacing, source = _spacing(film)
    view = _view(dataset)
    named = (text(dataset, name) for name in ("ImageLaterality", "FrameLaterality", "Laterality"))
    return Header(
        height=height,
        width=width,
        bits=bits,
        spacing_mm=spacing,
        spacing_source=source,
        laterality=next(filter(None, map(normal_side, named)), view.side),
        view=view.name,
        patient_id=text(dataset, "PatientID"),
        study_id=text(dataset, "StudyInstanceUID"),
        view_modifiers=" ".join(view.modifiers),
        implant=text(dataset, "BreastImplantPresent").upper(),
        partial_view=text(dataset, "PartialView").upper(),
        manufacturer=text(dataset, "Manufacturer"),
        model=text(dataset, "ManufacturerModelName"),
        intent="FOR PROCESSING" if is_for_processing(dataset) else text(dataset, "PresentationIntentType").upper(),
        lossy=lossy_dicom(str(film.syntax), text(dataset, "LossyImageCompression")),
        facts=object_facts(dataset),
        flags=film.flags,
    )


def _fill_in(film: DicomFile, height: int, width: int) -> int:
    """Set the attributes of the image's encoding that the file leaves out or that hold no such value; return the bits stored.

    Lengths alone tell whether pixels that are not compressed may be whole.
    """
    dataset = film.dataset
    assumed: dict[str, int | str] = {}
    samples = integer(dataset, "SamplesPerPixel")
    if samples is None:
        samples = assumed["SamplesPerPixel"] = 1
    photometric = text(dataset, "PhotometricInterpretation").upper()
    if not photometric:
        photometric = assumed["PhotometricInterpretation"] = "MONOCHROME2" if samples == 1 else "RGB"
    signed = integer(dataset, "PixelRepresentation")
    if signed not in (0, 1):
        signed = assumed["PixelRepresentation"] = 0
    allocated, stored, high = (integer(dataset, name) for name in ("BitsAllocated", "BitsStored", "HighBit"))
    if not allocated or allocated < 1:
        allocated = assumed["BitsAllocated"] = _bits_allocated(film, samples, stored)
    if not stored or not 1 <= stored <= allocated:
        stored = high + 1 if high is not None and 1 <= high < allocated else allocated
        assumed["BitsStored"] = stored
    for name, value in assumed.items():
        setattr(dataset, name, value)
    if assumed:
        film.flags["attributes_assumed"] = ", ".join(f"{name} {value}" for name, value in assumed.items())
    row = width * samples * allocated // 8
    frames = integer(dataset, "NumberOfFrames") or 1
    compressed = film.pixels is not None and (film.pixels.encapsulated or film.pixels.bare)
    # Less than a row is filled up.
    if film.pixels is None or (not compressed and film.pixels.length <= row * (height * frames - 1)):
        film.flags[PIXELS_MISSING] = ""
    return stored


def _bits_allocated(film: DicomFile, samples: int, stored: int | None) -> int:
    """Return 8 or 16 bits: by the bits stored, else by the length of pixels that are not compressed."""
    if stored and 1 <= stored <= 16:
        return 8 if stored <= 8 else 16
    if film.pixels is None or film.pixels.encapsulated or film.pixels.bare:
        return 16
    count = int(film.dataset.Rows) * int(film.dataset.Columns) * samples * (integer(film.dataset, "NumberOfFrames") or 1)
    return 16 if film.pixels.length >= 2 * count else 8


def _view(dataset: pydicom.Dataset) -> View:
    """Return the view: by ViewCodeSequence, which the mammography IOD requires, else by ViewPosition."""
    for item in items(dataset, "ViewCodeSequence")[:1]:
        modifiers = [*items(item, "ViewModifierCodeSequence"), *items(dataset, "ViewModifierCodeSequence")]
        view = coded_view(*_code(item), [_code(modifier) for modifier in modifiers])
        if view.name:
            return view
    orientation = raw_text(dataset, "PatientOrientation")
    # CBIS-DDSM writes the view where the orientation belongs.
    return normal_view(text(dataset, "ViewPosition") or (orientation if orientation in ("CC", "MLO") else ""))


def _code(item: pydicom.Dataset) -> tuple[str, str]:
    return text(item, "CodeValue"), text(item, "CodeMeaning")


def _spacing(film: DicomFile) -> tuple[float | None, str]:
    """Return the pixel size in mm and the attribute it came from.

    ImagerPixelSpacing is taken as it is, at the detector. EstimatedRadiographicMagnificationFactor is left out: it is an
    estimate, often missing, and near 1 in contact views. In magnification views sizes are thus larger than in the breast.
    """
    ignored = []
    found: tuple[float | None, str] = None, ""
    for name in ("PixelSpacing", "ImagerPixelSpacing", "PixelAspectRatio"):
        pair = numbers(film.dataset, name)
        is_size = name != "PixelAspectRatio"
        if len(pair) != 2 or not all(math.isfinite(v) and v > 0 for v in pair):
            if is_size and raw_text(film.dataset, name):
                ignored.append(f"{name} {raw_text(film.dataset, name)}")
            continue
        if is_size and not all(PLAUSIBLE_SPACING_MM[0] <= v <= PLAUSIBLE_SPACING_MM[1] for v in pair):
            ignored.append(f"{name} {pair[0]:g} x {pair[1]:g} mm")
            continue
        if max(pair) > (1 + SQUARE_WITHIN) * min(pair):
            raise BadInput(f"has {name} {pair[0]:g} x {pair[1]:g}: pixels that are not square; resample it to square pixels")
        if is_size:
            found = pair[0], f"dicom:{name}"
            break
    if ignored:
        film.flags["spacing_ignored"] = ", ".join(ignored)
    return found
