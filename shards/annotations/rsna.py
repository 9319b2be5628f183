"""RSNA Screening Mammography Breast Cancer Detection: ``train.csv``, ``train_images/<patient_id>/<image_id>.dcm``.

``test.csv`` of the competition has no outcome, only ``prediction_id``; its films are the test split, without labels.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from mammostream.shards.annotations.annotations import Annotations
from mammostream.shards.annotations.csv_rows import (
    DENSITIES,
    binary,
    birads_labels,
    coded,
    density_labels,
    filled,
    read_rows,
    refuse_duplicates,
)
from mammostream.shards.annotations.tree import ImageTree
from mammostream.shards.manifest import LABEL_PREFIX

COLUMNS = ("patient_id", "image_id", "laterality", "view", "cancer")
TEST_COLUMNS = (*COLUMNS[:-1], "prediction_id")
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
    """Return RSNA's films; labels are of the breast, and all films but those of ``test.csv`` are for training.

    Raises
    ------
    BadInput
        A CSV lacks a column or holds a value that the data set does not know, an image twice, or a path out of the folder.
    """
    frame = pd.concat([_read(path) for path in csv_paths], ignore_index=True).fillna("")
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
            "split": frame["split"],
        }
    )
    training = frame[frame["split"] == "train"]
    for column, label in _LABELS.items():
        if column in training and len(training):
            films[LABEL_PREFIX + label] = binary(training, column).reindex(frame.index)
    if "BIRADS" in training:
        # 0: to be followed up, 1: negative, 2: normal.
        films = films.join(birads_labels(training, "BIRADS", range(3)))
    if "density" in training:
        films = films.join(density_labels(training, "density", {d.upper(): d for d in DENSITIES}))
    return Annotations(films)


def _read(path: Path) -> pd.DataFrame:
    frame = read_rows(path, COLUMNS[:-1], known=("cancer", "prediction_id", "BIRADS", "density", *_LABELS))
    if "prediction_id" in frame and "cancer" not in frame:
        # What else stands there says nothing of an outcome.
        return frame[[*TEST_COLUMNS, "where"]].assign(split="test")
    if "cancer" not in frame:
        read_rows(path, COLUMNS)  # says what is missing
    return frame.assign(split="train")
