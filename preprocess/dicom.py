"""DICOM films: what a file says of its film, and its pixels with their display by the file's own VOI LUT or window."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mammostream.common.errors import BadInput
from mammostream.preprocess.dicom_dataset import DicomFile, integer, open_dicom, text
from mammostream.preprocess.dicom_display import display_of, modality_of, to_pixels
from mammostream.preprocess.dicom_header import header_of, take_frame_groups
from mammostream.preprocess.dicom_pixels import Stored, stored_values
from mammostream.preprocess.mammogram import Header, Mammogram, ReadingConfig
from mammostream.preprocess.objects import is_for_processing, refuse_other_objects


def read_dicom_header(path: Path) -> Header:
    """Return what the file says, of its first frame where it has several; raises BadInput or what pydicom raises."""
    with open_dicom(path) as film:
        refuse_other_objects(film.dataset)
        take_frame_groups(film.dataset, 0)
        return header_of(film)


def read_dicom(path: Path, config: ReadingConfig, device: str) -> Mammogram:
    """Read a film; raises BadInput without the file's name, or what the decoders raise.

    Pixels come on the host, or on the GPU where `device` is ``cuda`` and nvImageCodec decoded them.
    """
    with open_dicom(path) as film:
        return _read(film, config, device)


def _read(film: DicomFile, config: ReadingConfig, device: str) -> Mammogram:
    dataset, flags = film.dataset, film.flags
    if "Rows" not in dataset:
        refuse_other_objects(dataset)
    frames = max(1, integer(dataset, "NumberOfFrames") or 1)
    index = _frame_index(frames, config.frame)
    raw = is_for_processing(dataset)
    if raw and not config.allow_for_processing:
        raise BadInput(
            "is FOR PROCESSING (raw detector data); give its FOR PRESENTATION version, or --allow-for-processing to use it raw"
        )
    take_frame_groups(dataset, index)
    header = header_of(film)
    if film.pixels is None:
        raise BadInput(f"has no pixel data (modality {text(dataset, 'Modality') or 'unknown'}); leave it out")
    photometric = text(dataset, "PhotometricInterpretation").upper()
    if int(dataset.SamplesPerPixel) != 1 or photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise BadInput(f"is {photometric}, not one grey plane; convert it to MONOCHROME2")
    modality = modality_of(dataset, flags)
    monochrome1 = photometric == "MONOCHROME1"
    if config.frame == "max" and frames > 1:
        stored = _projection(film, frames, monochrome1)
    else:
        stored = stored_values(film, index, frames, device)
    # What is white is dense: the modality's transform counts, not the sign of what is stored.
    inverted = monochrome1 != (modality is not None and modality.falls(stored.values))
    pixels, shown = to_pixels(stored.values, dataset, inverted)
    display = None if raw else display_of(dataset, shown, stored, modality, flags)
    voi = None if display is None else 1 - display.table if monochrome1 else display.table
    header = replace(header, bits=stored.bits, flags=flags)
    pixels = pixels.astype("uint8" if stored.bits <= 8 else "uint16", copy=False)
    return Mammogram(pixels, header, voi, "" if display is None else display.name)


def _frame_index(frames: int, wanted: int | str | None) -> int:
    """Return the index, from 0, of the frame that ``--frame`` asks for; of a projection, the frame whose facts count."""
    if frames == 1:
        return 0
    if wanted is None:
        raise BadInput(
            f"has {frames} frames; give --frame N to use one of them, --frame middle, or --frame max for their maximum "
            "intensity projection; or export it as a single image"
        )
    index = wanted - 1 if isinstance(wanted, int) else frames // 2
    if index >= frames:
        raise BadInput(f"has {frames} frames and no frame {index + 1}; give another --frame")
    return index


def _projection(film: DicomFile, frames: int, dark: bool) -> Stored:
    """Return the maximum intensity projection, of MONOCHROME1 the minimum; two frames are in memory at a time."""
    values: Any = None
    bits = 0
    for index in range(frames):
        frame = stored_values(film, index, frames)
        bits = max(bits, frame.bits)
        if values is None:
            values = np.array(frame.values)
        else:
            (np.minimum if dark else np.maximum)(values, frame.values, out=values)
    return Stored(values, bits)
