"""CMMD, the Chinese Mammography Database: a sheet of labelled breasts, and ``CMMD/<patient>/<study>/<series>/1-1.dcm``.

Cui et al. 2021, doi:10.7937/tcia.eqde-4b16. ``CMMD_clinicaldata_revision.xlsx`` (or as CSV) has a row a labelled breast,
``ID1, LeftRight, Age, number, abnormality, classification, subtype``: 1,872 of 1,775 patients; most patients have films of
both breasts and a row of one. Which breast a film shows, and its view (ViewCodeSequence), stand only in the DICOM header. A
breast without a row has no labels: the data set does not say that it is healthy.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pandas as pd

from mammostream.shards.annotations.annotations import Annotations, Problem
from mammostream.shards.annotations.csv_rows import coded, filled, leniently_coded, read_rows
from mammostream.shards.annotations.folder import image_ids
from mammostream.shards.annotations.tree import ImageTree
from mammostream.shards.manifest import LABEL_PREFIX

COLUMNS = ("ID1", "LeftRight", "abnormality", "classification")
# What no other data set's table has.
OWN_COLUMNS = ("ID1", "LeftRight")
_PATIENT = re.compile(r"D[12]-\d+")
_ABNORMALITIES = {"mass": "mass", "calcification": "calcification", "both": "mass calcification"}


def cmmd_films(tree: ImageTree, path: Path) -> Annotations:
    """Return CMMD's films, all for training; labels are of the breast and follow once the headers say which one it is.

    Raises
    ------
    BadInput
        The sheet lacks a column or holds a value that the data set does not know, or contradicts itself.
    """
    frame = read_rows(path, COLUMNS, known=("subtype",))
    frame["side"] = coded(frame, "LeftRight", {"L": "L", "R": "R"})
    filled(frame, "ID1")
    images = image_ids(tree)
    films = pd.DataFrame(
        {
            "image_id": list(images),
            "path": list(images.values()),
            "where": [str(file) for file in images.values()],
            "patient_id": [_patient(file.relative_to(tree.root)) for file in images.values()],
            "split": "train",
        }
    )
    known = set(films["patient_id"])
    problems = [
        Problem("missing", f"{where}: no film of patient '{patient}' below {tree.root}")
        for patient, where in frame.drop_duplicates("ID1")[["ID1", "where"]].to_numpy()
        if patient not in known and "" not in known
    ]
    return Annotations(films, label_films=partial(_label, _of_breasts(frame, problems)), problems=problems)


def _patient(path: Path) -> str:
    """Return the patient that a folder names, or "" where only the header may."""
    return next((match[0] for part in path.parts if (match := _PATIENT.fullmatch(part))), "")


def _of_breasts(frame: pd.DataFrame, problems: list[Problem]) -> pd.DataFrame:
    """Return 0/1 labels by patient and side."""
    severity = leniently_coded(frame, "classification", {name: name for name in ("benign", "malignant")}, problems)
    kinds = leniently_coded(frame, "abnormality", _ABNORMALITIES, problems)
    labels = {name: (severity == name).astype("Int8").mask(severity == "") for name in ("benign", "malignant")}
    for name in ("mass", "calcification"):
        labels[name] = kinds.str.contains(name).astype("Int8").mask(kinds == "")
    if "subtype" in frame:
        subtypes = frame["subtype"].str.lower()
        for subtype in sorted(set(subtypes) - {""}):
            name = "subtype_" + re.sub(r"\W+", "_", subtype).strip("_")
            labels[name] = (subtypes == subtype).astype("Int8").mask(subtypes == "")
    return pd.DataFrame(labels).add_prefix(LABEL_PREFIX).groupby([frame["ID1"], frame["side"]]).max()


def _label(of_breasts: pd.DataFrame, films: pd.DataFrame) -> pd.DataFrame:
    """Return the films with the labels of their breasts."""
    breasts = pd.MultiIndex.from_frame(films[["patient_id", "laterality"]])
    return films.join(of_breasts.reindex(breasts).set_index(films.index))
