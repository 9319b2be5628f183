"""VinDr-Mammo: ``breast-level_annotations.csv``, boxes of ``finding_annotations.csv``, ``images/<study_id>/<image_id>.dicom``.

Nguyen et al. 2023, doi:10.1038/s41597-023-02100-7. The data set names no patients: a study, one a patient, stands for one.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pandas as pd

from mammostream.common.errors import BadInput
from mammostream.shards.annotations.annotations import Annotations, Problem
from mammostream.shards.annotations.csv_rows import (
    DENSITIES,
    birads_labels,
    coded,
    density_labels,
    filled,
    numbers,
    read_rows,
    refuse,
    refuse_duplicates,
)
from mammostream.shards.annotations.tree import ImageTree
from mammostream.shards.manifest import FINDING_COLUMNS, LABEL_PREFIX

COLUMNS = ("study_id", "image_id", "laterality", "view_position", "breast_birads", "split")
# What no other data set's CSV has.
OWN_COLUMNS = ("series_id", "view_position", "breast_birads", "breast_density")
_FINDING_CSV_COLUMNS = ("image_id", "finding_categories", "xmin", "ymin", "xmax", "ymax")
_SPLITS = {"training": "train", "validation": "val", "test": "test"}
_BOX = ["xmin", "ymin", "xmax", "ymax"]
NO_FINDING = "No Finding"


def vindr_films(tree: ImageTree, csv_paths: tuple[Path, ...], findings_csv: Path | None) -> Annotations:
    """Return VinDr-Mammo's films, with labels of BI-RADS and density and, given the findings, of their categories, and boxes.

    Boxed findings are those above BI-RADS 2 and a few others: a BI-RADS 2 breast has benign findings that nobody boxed, so
    its finding labels are missing, not 0.

    Raises
    ------
    BadInput
        A CSV lacks a column or holds a value that the data set does not know, an image twice, or a path out of the folder.
    """
    frame = pd.concat([_breast_level(path) for path in csv_paths], ignore_index=True)
    refuse_duplicates(frame, "image_id")
    films = pd.DataFrame(
        {
            "image_id": filled(frame, "image_id"),
            "path": [
                tree.find((f"{study}/{image}", f"{study}_{image}", image), where)
                for study, image, where in zip(filled(frame, "study_id"), frame["image_id"], frame["where"], strict=True)
            ],
            "where": frame["where"],
            "patient_id": frame["study_id"],
            "study_id": frame["study_id"],
            "laterality": coded(frame, "laterality", {"L": "L", "R": "R"}),
            "view": frame["view_position"],
            "split": coded(frame, "split", _SPLITS),
        }
    )
    refuse(frame, frame["split"] == "", "split", "is empty; it is training or test")
    for size in ("height", "width"):
        if size in frame:
            films[size] = numbers(frame, size)
    films = films.join(birads_labels(frame, "breast_birads", range(1, 6), prefix="BI-RADS "))
    if "breast_density" in frame:
        films = films.join(density_labels(frame, "breast_density", {f"DENSITY {d.upper()}": d for d in DENSITIES}))
    annotations = Annotations(films, notes=["VinDr-Mammo names no patients: each study counts as one"])
    if findings_csv is not None:
        _add_findings(annotations, findings_csv)
    return annotations


def _breast_level(path: Path) -> pd.DataFrame:
    frame = read_rows(path, COLUMNS, known=("height", "width", "breast_density", "finding_categories"))
    if "finding_categories" in frame:
        raise BadInput(
            f"CSV {path} has a row a finding; give it as --findings-csv, and breast-level_annotations.csv as --csv-path"
        )
    return frame


def _add_findings(annotations: Annotations, path: Path) -> None:
    """Add boxes, and a label a finding category, to the films."""
    films = annotations.films
    frame = read_rows(path, _FINDING_CSV_COLUMNS)
    # A few dozen different lists in 20,000 rows.
    lists = {text: _categories(text) for text in frame["finding_categories"].unique()}
    frame["label"] = frame["finding_categories"].map(lists)
    refuse(frame, frame["label"].isna(), "finding_categories", "is no list like ['Mass']; correct it")
    known = frame["image_id"].isin(films["image_id"])
    annotations.problems += [
        Problem("unknown", f"{where}: the image '{image}' is in none of the other CSVs")
        for where, image in zip(frame.loc[~known, "where"], frame.loc[~known, "image_id"], strict=True)
    ]
    for side in _BOX:
        frame[side] = numbers(frame, side)
    found = frame.explode("label")
    found = found[known.reindex(found.index) & (found["label"] != NO_FINDING)]
    found["label"] = found["label"].str.lower().str.replace(" ", "_")

    clean_if_unboxed = films["image_id"].isin(frame["image_id"]) & (films["label:birads_2"] == 0).fillna(False)
    on_image = pd.crosstab(found["image_id"], found["label"]).reindex(films["image_id"], fill_value=0).set_index(films.index)
    for label in on_image:
        present = on_image[label] > 0
        films[LABEL_PREFIX + label] = present.astype("Int8").mask(~present & ~clean_if_unboxed)

    boxed = found[_BOX].notna().all(axis=1)
    annotations.problems += [
        Problem("no box", f"{where}: '{label}' of image '{image}' has no box")
        for where, label, image in found.loc[~boxed, ["where", "label", "image_id"]].to_numpy()
    ]
    annotations.findings = found.loc[boxed, list(FINDING_COLUMNS)].reset_index(drop=True)


def _categories(text: str) -> list[str] | None:
    """Read the text of a Python list of strings."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return None
    return value if isinstance(value, list) and value and all(isinstance(name, str) for name in value) else None
