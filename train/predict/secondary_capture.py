"""A heat map as a DICOM Secondary Capture in the study of its film.

This is the one place where a patient's identity is written: a picture that is to stand next to its film in an archive must say
whose it is. All of it comes from the film's own file.
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mammostream.common.errors import BadInput, first_line
from mammostream.common.files import whole_file
from mammostream.preprocess.reading import is_dicom
from mammostream.train.predict.heat_maps import CAUTION

if TYPE_CHECKING:
    import pydicom

SERIES_NUMBER = 9601  # far from those that scanners give
_REFERRED_TO = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID")
# Optional attributes of the patient and the study that go along where the film has them.
_ALSO_COPIED = (
    *("IssuerOfPatientID", "PatientAge", "StudyDescription", "PatientIdentityRemoved", "DeidentificationMethod"),
    *("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod"),
)


def check_sources(films: Sequence[Path]) -> None:
    """Check, before the work, that secondary captures can be written of films.

    Raises
    ------
    BadInput
        The package that writes them is missing, or a film is not a DICOM file.
    """
    if importlib.util.find_spec("highdicom") is None:
        raise BadInput("--secondary-capture needs the package highdicom; install it with: pip install 'mammostream[dicom-out]'")
    others = [film for film in films if not is_dicom(film)]
    if others:
        raise BadInput(
            f"--secondary-capture takes DICOM films only: {others[0]} is none"
            + (f", nor are {len(others) - 1} others" if others[1:] else "")
            + "; a capture belongs to its film's study, which other files do not name"
        )


def write_secondary_captures(film: Path, pictures: Mapping[str, Path], model_sha256: str) -> list[Path]:
    """Write heat maps of a film as DICOM Secondary Captures next to the pictures, one series of the film's study.

    Parameters
    ----------
    film
        The DICOM file that the heat maps are of. Its patient and study are copied; its pixels are not read.
    pictures
        Class -> PNG of its heat map. The capture holds the same RGB pixels.
    model_sha256
        Hash of the model's checkpoint, whose beginning the series' description names.

    Returns
    -------
    list of Path
        The files: each picture's name, ending in ``.dcm``.

    Raises
    ------
    BadInput
        The film is not a DICOM file, names no study, or holds what no valid file may hold.
    """
    import highdicom
    import pydicom
    from highdicom.sc import SCImage
    from PIL import Image

    check_sources([film])
    source = pydicom.dcmread(film, stop_before_pixels=True)
    missing = [name for name in _REFERRED_TO if not source.get(name)]
    if missing:
        raise BadInput(f"image {film} has no {missing[0]}, so a secondary capture cannot refer to it")
    version, series, paths = importlib.metadata.version("mammostream"), highdicom.UID(), []
    for number, (class_name, picture) in enumerate(pictures.items(), start=1):
        with Image.open(picture) as image:
            pixels = np.asarray(image.convert("RGB"))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # they would print the patient's name
                capture = SCImage.from_ref_dataset(
                    ref_dataset=_readable(source),
                    pixel_array=pixels,
                    photometric_interpretation="RGB",
                    bits_allocated=8,
                    coordinate_system="PATIENT",
                    patient_orientation=("R", "F"),  # the library asks for one; removed below
                    series_instance_uid=series,
                    series_number=SERIES_NUMBER,
                    sop_instance_uid=highdicom.UID(),
                    instance_number=number,
                    manufacturer="mammostream",
                    manufacturer_model_name="mammostream",
                    software_versions=version,
                    series_description=f"Not for diagnostic use: mammostream heat map {model_sha256[:12]}",
                    specific_character_set="ISO_IR 192",
                    transfer_syntax_uid=pydicom.uid.ExplicitVRLittleEndian,
                )
        except (ValueError, TypeError) as error:
            raise BadInput(f"image {film} gives no valid secondary capture: {first_line(error)}") from error
        capture.PatientOrientation = None  # type: ignore[assignment]  # empty: two pictures of the film and a scale of colours have none
        capture.DerivationDescription = (
            f"Heat map of a network's tile probabilities of '{class_name}' over the film, by mammostream {version}, model "
            f"SHA-256 {model_sha256}. {CAUTION}"
        )[:1024]
        capture.BurnedInAnnotation = "YES"  # the title names the image, and its name may say whose it is
        capture.RecognizableVisualFeatures = "NO"
        for name in _ALSO_COPIED:
            if source.get(name):
                setattr(capture, name, source.get(name))
        _refer(capture, source)
        path = picture.with_suffix(".dcm")
        with whole_file(path) as temporary:
            capture.save_as(temporary, enforce_file_format=True)
        paths.append(path)
    return paths


def _readable(source: pydicom.Dataset) -> pydicom.Dataset:
    """Return the film's header with names as text: they are written again, in Unicode."""
    source = copy.copy(source)
    for name in ("PatientName", "ReferringPhysicianName"):
        if source.get(name):
            setattr(source, name, str(source.get(name)))
    return source


def _refer(capture: pydicom.Dataset, source: pydicom.Dataset) -> None:
    """Say which image the capture was made of (PS3.3 C.7.6.1.1.4), and in which series it stands (C.12.2)."""
    from highdicom.content import ReferencedImageSequence
    from pydicom import Dataset

    capture.SourceImageSequence = ReferencedImageSequence([source])
    series = Dataset()
    series.SeriesInstanceUID = source.SeriesInstanceUID
    series.ReferencedInstanceSequence = ReferencedImageSequence([source])
    capture.ReferencedSeriesSequence = [series]
