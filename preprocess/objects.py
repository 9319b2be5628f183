"""What kind of DICOM object a file is: a mammogram, or something else that archives export next to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mammostream.common.errors import BadInput
from mammostream.preprocess.dicom_dataset import items, text
from mammostream.preprocess.mammogram import ReadingConfig

if TYPE_CHECKING:
    import pydicom

_STORAGE = "1.2.840.10008.5.1.4.1.1."
# Digital mammography, breast tomosynthesis and its projections (PS3.4 B.5), for presentation and for processing.
_MAMMOGRAPHY = {_STORAGE + end for end in ("1.2", "1.2.1", "13.1.3", "13.1.4", "13.1.5")}
# Computed and digital radiography and secondary captures: scanned films, and mammograms of older devices.
_RADIOGRAPHY = {_STORAGE + end for end in ("1", "1.1", "1.1.1", "7", "7.1", "7.2", "7.3", "7.4")}
_FOR_PROCESSING = {_STORAGE + end for end in ("1.1.1", "1.2.1", "13.1.5")}
_MODALITIES = {"MG", "CR", "DX", "RG", "OT", ""}
_STANDARD = "1.2.840.10008."


class OtherObject(BadInput):
    """A DICOM object that is no image of a breast. `kind` says what it is, in a word or two."""

    def __init__(self, message: str, kind: str = "not a mammogram") -> None:
        super().__init__(message)
        self.kind = kind


def is_for_processing(dataset: pydicom.Dataset) -> bool:
    """Tell raw detector data by their intent or their SOP class."""
    return text(dataset, "PresentationIntentType") == "FOR PROCESSING" or text(dataset, "SOPClassUID") in _FOR_PROCESSING


def object_facts(dataset: pydicom.Dataset) -> dict[str, str]:
    """Return what a data set says of its kind, without what it leaves open.

    Returns
    -------
    dict
        ``sop_instance``; ``raw`` where it is FOR PROCESSING; ``frames`` where there are several; ``colour``, the photometric
        interpretation, where it is not grey; ``acquired``, date and time; ``sources``, the instances it was made from.
    """
    photometric = text(dataset, "PhotometricInterpretation").upper()
    sources = [text(item, "ReferencedSOPInstanceUID") for item in items(dataset, "SourceImageSequence")]
    facts = {
        "sop_instance": text(dataset, "SOPInstanceUID"),
        "raw": "raw" if is_for_processing(dataset) else "",
        "frames": text(dataset, "NumberOfFrames"),
        "colour": "" if photometric in ("", "MONOCHROME1", "MONOCHROME2") else photometric,
        "acquired": " ".join(filter(None, (text(dataset, f"Acquisition{name}") for name in ("Date", "Time")))),
        "sources": " ".join(filter(None, sources)),
    }
    return {name: value for name, value in facts.items() if value and (name, value) != ("frames", "1")}


def refuse_other_objects(dataset: pydicom.Dataset) -> None:
    """Refuse what is not of mammography: other modalities, reports, presentation states, documents.

    Raises
    ------
    OtherObject
        Without the file's name.
    """
    from pydicom.uid import UID

    modality, sop_class = text(dataset, "Modality"), text(dataset, "SOPClassUID")
    if not sop_class:  # a DICOMDIR names its class in the file meta only
        sop_class = str(getattr(dataset, "file_meta", {}).get("MediaStorageSOPClassUID") or "")
    if sop_class in _MAMMOGRAPHY:
        return
    if modality not in _MODALITIES or (sop_class.startswith(_STANDARD) and sop_class not in _RADIOGRAPHY):
        what = UID(sop_class).name if sop_class else "of no SOP class"
        raise OtherObject(f"is no mammogram: modality {modality or 'unknown'}, {what}; it is left out", modality or "other")


def why_left_out(facts: Mapping[str, str], config: ReadingConfig) -> OtherObject | None:
    """Return why a build with the same options would refuse an image, or None; `facts` as :func:`object_facts`."""
    if "colour" in facts:
        return OtherObject(f"is {facts['colour']}, not one grey plane; it is left out", "colour")
    if "frames" in facts and config.frame is None:
        return OtherObject(
            f"has {facts['frames']} frames (tomosynthesis, perhaps); give --frame to use one of them", "multi-frame"
        )
    if "raw" in facts and not config.allow_for_processing:
        return OtherObject(
            "is FOR PROCESSING (raw detector data); give --allow-for-processing where there is no processed version",
            "for processing",
        )
    return None
