"""RSNA Screening Mammography Breast Cancer Detection: ``train.csv``, ``train_images/<patient_id>/<image_id>.dcm``."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from mammostream.shards.annotations.annotations import Annotations
from mammostream.shards.annotations.csv_rows import binary, birads_labels, coded, filled, read_rows, refuse_duplicates
from mammostream.shards.annotations.tree import ImageTree
from mammostream.shards.manifest import LABEL_PREFIX

COLUMNS = ("patient_id", "image_id", "laterality", "view", "cancer")
# What no other data set's CSV has.
OWN_COLUMNS = ("site_id", "machine_id", "difficult_negative_case")
_LABELS = {
    "cancer": "cancer",
    "biopsy": "biopsy",
    "invasive": "invasive",
    "implant": "implant",
    "difficult_negative_case": "difficult_negative",
}


def rsna_films(tree: ImageTree, csv_paths: tuple[Path, ...]) -> Annotations:
    """Return RSNA's films; labels are of the breast, and all films are for training.

    Raises
    ------
    BadInput
        A CSV lacks a column or holds a value that the data set does not know, an image twice, or a path out of the folder.
    """
    frame = pd.concat([read_rows(path, COLUMNS) for path in csv_paths], ignore_index=True).fillna("")
    refuse_duplicates(frame, "image_id")
    films = pd.DataFrame(
        {
            "image_id": filled(frame, "image_id"),
            "path": [
                tree.find((f"{patient}/{image}", f"{patient}_{image}", image), where)
                for patient, image, where in zip(filled(frame, "patient_id"), frame["image_id"], frame["where"], strict=True)
            ],
            "where": frame["where"],
            "patient_id": frame["patient_id"],
            "study_id": frame["patient_id"],
            "laterality": coded(frame, "laterality", {"L": "L", "R": "R"}),
            "view": frame["view"],
            "split": "train",
        }
    )
    for column, label in _LABELS.items():
        if column in frame:
            films[LABEL_PREFIX + label] = binary(frame, column)
    if "BIRADS" in frame:
        # 0: to be followed up, 1: negative, 2: normal.
        films = films.join(birads_labels(frame, "BIRADS", range(3)))
    return Annotations(films)
