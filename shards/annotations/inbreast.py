"""INbreast: a table, ``AllDICOMs/<file>_<patient>_MG_<side>_<view>_ANON.dcm``, contours in ``AllXML/<file>.xml``.

Moreira et al. 2012, doi:10.1016/j.acra.2011.09.014: 410 full-field films of 115 cases, 70 µm a pixel, 14 bits. Form as read
by public programs: ``INbreast.csv`` is separated by semicolons, ``Patient ID;Patient age;Laterality;View;Acquisition
date;File Name;ACR;Bi-Rads``, with ``removed`` for every patient, so the patient is the second part of the file's name; the
workbook has further columns ``Mass, Micros, Distortion, Asymmetry`` that hold an X. Contours are property lists of OsiriX
(``Images[0]["ROIs"]``, ``Name``, ``Point_px`` such as ``(1234.5, 678.9)`` from the top left corner); names come in several
spellings. Films of BI-RADS 1 have no XML file. What regions called ``Unnamed`` or ``Point 1`` are is not documented: they
are left out. There is no pathology.
"""

from __future__ import annotations

import plistlib
import re
from pathlib import Path
from xml.parsers.expat import ExpatError

import numpy as np
import pandas as pd

from mammostream.common.errors import BadInput
from mammostream.preprocess.reading import is_dicom
from mammostream.shards.annotations.annotations import Annotations, Problem, findings_frame
from mammostream.shards.annotations.csv_rows import (
    birads_labels,
    coded,
    density_labels,
    four_categories,
    read_rows,
    refuse_duplicates,
)
from mammostream.shards.annotations.tree import ImageTree, name_without_ending
from mammostream.shards.manifest import LABEL_PREFIX

COLUMNS = ("Laterality", "View", "File Name", "ACR", "Bi-Rads")
# What no other data set's table has.
OWN_COLUMNS = ("File Name", "Acquisition date", "Bi-Rads")
SPACING_MM = 0.07
# Columns of the workbook that are marked with an X.
_MARKS = {
    "Mass": "mass",
    "Micros": "calcification",
    "Distortion": "architectural_distortion",
    "Asymmetry": "asymmetry",
}
_REGIONS = {
    "mass": ("mass",),
    "calcification": ("calcification",),
    "calcifications": ("calcification",),
    "cluster": ("calcification", "calcification_cluster"),
    "distortion": ("architectural_distortion",),
    "asymmetry": ("asymmetry",),
    "assymetry": ("asymmetry",),
    "spiculated region": ("spiculated_region",),
    "espiculated region": ("spiculated_region",),
}
_LABELS = sorted({label for labels in _REGIONS.values() for label in labels})
_NAME = re.compile(r"(?P<file>\d+)(?:_(?P<patient>[0-9a-f]+)_MG_[LR]_\w+_ANON)?", re.IGNORECASE)
_POINT = re.compile(r"\(\s*(-?[\d.]+)\s*,\s*(-?[\d.]+)\s*\)")


def inbreast_films(tree: ImageTree, path: Path) -> Annotations:
    """Return INbreast's films, all for training, with labels of BI-RADS (4a to 4c are 4), density and findings, and boxes.

    A film without a contour file has no finding if it is BI-RADS 1; of others it is not known.

    Raises
    ------
    BadInput
        The table lacks a column or holds a value that the data set does not know or a film twice, or a film's name lacks the
        patient.
    """
    frame = read_rows(path, COLUMNS, known=tuple(_MARKS))
    frame["File Name"] = frame["File Name"].str.replace(r"\.0+$", "", regex=True)
    notes = []
    blank = frame["File Name"] == ""
    if blank.any():  # the workbook ends with rows of averages
        notes.append(f"{blank.sum()} rows of {path} name no film and are left out")
        frame = frame[~blank].reset_index(drop=True)
    refuse_duplicates(frame, "File Name")
    files = _files(tree)
    of_film = [
        tree.require_inside(files[name], where) if name in files else None
        for name, where in zip(frame["File Name"], frame["where"], strict=True)
    ]
    films = pd.DataFrame(
        {
            "image_id": frame["File Name"],
            "path": of_film,
            "where": frame["where"],
            "patient_id": [_patient(file) if file else "" for file in of_film],
            "laterality": coded(frame, "Laterality", {"L": "L", "R": "R"}),
            "view": frame["View"],
            "split": "train",
            # Of the films as published; a conversion may have been made smaller.
            "pixel_spacing_mm": [SPACING_MM if file and is_dicom(file) else np.nan for file in of_film],
        }
    )
    films["spacing_source"] = films["pixel_spacing_mm"].map(lambda spacing: "" if pd.isna(spacing) else "dataset")
    frame["birads"] = frame["Bi-Rads"].str.lower().str.replace(r"^4\s*[abc]$", "4", regex=True)
    films = films.join(birads_labels(frame, "birads", range(1, 7)))
    frame["density"] = frame["ACR"].str.strip("' ")  # an apostrophe stands for an unknown one
    films = films.join(density_labels(frame, "density", four_categories()))
    annotations = Annotations(films, notes=notes)
    _add_findings(annotations, frame, tree, path)
    return annotations


def _files(tree: ImageTree) -> dict[str, Path]:
    """Return images by the number that their name begins with."""
    files: dict[str, Path] = {}
    for path in tree.paths:
        match = _NAME.fullmatch(name_without_ending(path))
        if match and (first := files.setdefault(match["file"], path)) != path:
            raise BadInput(f"{first} and {path} are both film {match['file']}; give the folder of one of them as --images-root")
    return files


def _patient(path: Path) -> str:
    match = _NAME.fullmatch(name_without_ending(path))
    if match is None or not match["patient"]:
        raise BadInput(f"{path} names no patient; keep the names of the data set, <file>_<patient>_MG_<side>_<view>_ANON")
    return match["patient"]


def _add_findings(annotations: Annotations, frame: pd.DataFrame, tree: ImageTree, table: Path) -> None:
    """Add a label a kind of finding, from contours and marks, and the contours' boxes."""
    films = annotations.films
    folder = next((f for f in (table.parent, tree.root, tree.root.parent) if (f / "AllXML").is_dir()), None)
    found: dict[str, set[str]] = {}
    boxes: list[tuple] = []
    if folder is None:
        annotations.notes.append(f"no folder AllXML next to {table} or {tree.root}: the films have no boxes")
    else:
        for image_id in films.loc[films["path"].notna(), "image_id"]:
            contours = folder / "AllXML" / f"{image_id}.xml"
            if contours.is_file():
                regions = _regions(contours, annotations.problems)
                if regions is None:
                    continue
                found[image_id] = {label for label, _ in regions}
                boxes += [(image_id, label, *box) for label, box in regions]
    # BI-RADS 1 is negative, so nothing was drawn.
    clean = folder is not None and films["label:birads_1"].eq(1).fillna(False)
    known = films["image_id"].isin(list(found)) | clean
    for label in _LABELS:
        present = films["image_id"].map(lambda image_id, label=label: label in found.get(image_id, ()))
        films[LABEL_PREFIX + label] = present.astype("Int8").where(known)
    for column, label in _MARKS.items():
        if column in frame:
            marked = frame[column].str.upper() == "X"
            films[LABEL_PREFIX + label] = films[LABEL_PREFIX + label].mask(marked, 1)
    annotations.findings = findings_frame(boxes)


def _regions(path: Path, problems: list[Problem]) -> list[tuple[str, tuple[float, float, float, float]]] | None:
    """Return label and box of each region that an OsiriX file outlines, None if it is torn; others become problems."""
    try:
        with path.open("rb") as file:
            regions = plistlib.load(file)["Images"][0]["ROIs"]
    except (plistlib.InvalidFileException, ExpatError, KeyError, IndexError, TypeError, ValueError, OSError) as error:
        problems.append(Problem("no box", f"{path} cannot be read as contours of OsiriX: {error!r}"))
        return None
    found = []
    for region in regions:
        name = str(region.get("Name", "")).strip()
        points = [(float(x), float(y)) for text in region.get("Point_px", ()) for x, y in _POINT.findall(str(text))]
        labels = _REGIONS.get(name.lower(), ())
        if not labels or not points:
            problems.append(
                Problem("no box", f"{path}: a region '{name}' {'has no points' if labels else 'is of no known kind'}")
            )
            continue
        low, high = np.floor(np.min(points, axis=0)), np.floor(np.max(points, axis=0)) + 1
        found += [(label, (low[0], low[1], high[0], high[1])) for label in labels]
    return found
