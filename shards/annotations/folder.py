"""A plain folder of mammograms, with or without a CSV that describes them.

The CSV has a column ``image_id`` (the file's name without its ending, or its path below the folder without it) and any of
``patient_id, study_id, laterality, view, split, pixel_spacing_mm``; every further column of 0, 1 and empty cells becomes a
label.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pandas as pd

from common.errors import BadInput, nearest
from common.files import read_csv
from common.progress import progress
from preprocess.reading import IMAGE_SUFFIXES, Header, is_dicom, read_header
from shards.manifest import LABEL_PREFIX

_DESCRIPTION = ("patient_id", "study_id", "laterality", "view", "split", "pixel_spacing_mm")


def find_images(root: Path) -> dict[str, Path]:
    """Return the images below a folder by id: the file's name without its ending where all differ, else its path.

    Raises
    ------
    BadInput
        The folder is missing or holds no image, or two files differ only in their ending.
    """
    if not root.is_dir():
        raise BadInput(f"images folder {root} does not exist; check --images-root")
    paths = sorted(
        Path(folder) / name
        for folder, _, names in os.walk(root)
        for name in names
        if not name.startswith(".") and _may_be_image(Path(folder) / name)
    )
    if not paths:
        raise BadInput(
            f"images folder {root} holds no images; put files of one of these endings there: {' '.join(IMAGE_SUFFIXES)}"
        )
    for path in paths:
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise BadInput(f"the file name {str(path)!r} is not UTF-8, so no table can hold it; rename the file") from None
    images = {path.stem: path for path in paths}
    if len(images) < len(paths):
        images = {path.relative_to(root).with_suffix("").as_posix(): path for path in paths}
    if len(images) < len(paths):
        seen = set(images.values())
        twin = next(path for path in paths if path not in seen)
        raise BadInput(f"{twin} has a namesake with another ending in its folder; keep one of them")
    return images


def _may_be_image(path: Path) -> bool:
    """Tell by the file's ending; a file without one, as archives export DICOM, by its first bytes."""
    if path.suffix:
        return path.suffix.lower() in IMAGE_SUFFIXES
    try:
        return is_dicom(path)
    except OSError:
        return False


def folder_rows(root: Path, csv_paths: tuple[Path, ...], patient_regex: str | None) -> tuple[pd.DataFrame, list[str]]:
    """Return manifest rows (``split`` empty where the CSV gives none) and a line for each file that could not be read.

    Parameters
    ----------
    root
        The folder.
    csv_paths
        CSVs to describe its images, may be empty.
    patient_regex
        What part of the patient id, or of the path where there is none, names the patient: the first group, else the
        whole match.

    Raises
    ------
    BadInput
        No images; a CSV without ``image_id``, with an unknown image or a label that is not 0, 1 or empty; an image
        whose patient is unknown.
    """
    images = find_images(root)
    described = _read_descriptions(csv_paths, images)
    pattern = _compile(patient_regex)
    rows, unreadable = [], []
    for image_id, path in progress(images.items(), "reading headers", "file", total=len(images)):
        try:
            header = read_header(path)
        except BadInput as error:
            unreadable.append(str(error))
            if pattern is None and "patient_id" not in described.get(image_id, {}):
                continue  # its patient would have stood in its header
            header = Header(0, 0, bits=0)
        row = {
            "image_id": image_id,
            "path": str(path),
            "patient_id": header.patient_id,
            "study_id": header.study_id,
            "laterality": header.laterality,
            "view": header.view,
            "split": "",
            "pixel_spacing_mm": header.spacing_mm,
            "spacing_source": header.spacing_source,
            "bits": header.bits,
        }
        given = described.get(image_id, {})
        if "pixel_spacing_mm" in given:
            row["spacing_source"] = "csv"
        row |= given
        side = str(row["laterality"]).strip().upper()[:1]
        row["laterality"] = side if side in ("L", "R") else ""
        row["patient_id"] = _patient(row["patient_id"], path.relative_to(root), pattern)
        rows.append(row)
    if not rows:
        raise BadInput(f"none of the {len(images)} images below {root} can be read; the first: {unreadable[0]}")
    return pd.DataFrame(rows), unreadable


def _compile(patient_regex: str | None) -> re.Pattern[str] | None:
    try:
        return re.compile(patient_regex) if patient_regex else None
    except re.error as error:
        raise BadInput(f"--patient-regex {patient_regex!r} is no regular expression: {error}") from error


def _patient(patient_id: str, path: Path, pattern: re.Pattern[str] | None) -> str:
    if pattern is None:
        if not patient_id:
            raise BadInput(f"{path} names no patient; give --patient-regex, or a CSV with image_id and patient_id")
        return patient_id
    source = patient_id or path.as_posix()
    match = pattern.search(source)
    if not match:
        raise BadInput(f"--patient-regex {pattern.pattern!r} does not match '{source}' of {path}; correct it")
    return match.group(1) if pattern.groups else match.group(0)


def _read_descriptions(csv_paths: tuple[Path, ...], images: dict[str, Path]) -> dict[str, dict]:
    """Return the non-empty cells of the CSVs by image id."""
    described: dict[str, dict] = {}
    for csv_path in csv_paths:
        frame = read_csv(csv_path, "CSV", ["image_id"])
        labels = [c for c in frame.columns if c not in (*_DESCRIPTION, "image_id")]
        for label in labels:
            wrong = frame[~(frame[label].isin([0, 1]) | frame[label].isna())]
            if len(wrong):
                line = wrong.index[0] + 2
                raise BadInput(
                    f"CSV {csv_path} line {line}, column '{label}': '{wrong[label].iloc[0]}' is not 0, 1 or empty; "
                    "correct it or drop the column"
                )
        if "pixel_spacing_mm" in frame.columns:
            given = frame["pixel_spacing_mm"]
            wrong = given[given.notna() & ~(pd.to_numeric(given, errors="coerce") > 0)]
            if len(wrong):
                raise BadInput(
                    f"CSV {csv_path} line {wrong.index[0] + 2}, column 'pixel_spacing_mm': '{wrong.iloc[0]}' is no size in mm; "
                    "correct it or leave it empty"
                )
        frame = frame.rename(columns={label: LABEL_PREFIX + label for label in labels})
        for number, row in enumerate(frame.to_dict("records"), start=2):
            image_id = str(row.pop("image_id"))
            if image_id not in images:
                raise BadInput(
                    f"CSV {csv_path} line {number}: no image '{image_id}'{nearest(image_id, images)} below the folder"
                )
            described.setdefault(image_id, {}).update({k: v for k, v in row.items() if not pd.isna(v)})
    return described
