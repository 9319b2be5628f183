"""Predictions joined to labels row by row; what is left out is counted by class, by label and by reason."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from mammostream.common.errors import BadInput
from mammostream.shards.identity import (
    ENDINGS,
    clean_ids,
    clean_patients,
    clean_sides,
    film_of_tile,
    key_of_path,
    known_breast,
)
from mammostream.train.evaluate.reading import BREAST_COLUMNS, HINT, Predictions, read_label_table
from mammostream.train.levels.aggregation import PROBABILITY, TOP_TILES, aggregate
from mammostream.train.levels.calibration import BREAST, IMAGE, PATIENT, TILE
from mammostream.train.levels.labels import labels_of_units

UNMATCHED = ("labels_without_prediction", "predictions_without_label")
_DESCRIBED = ["_patient", "_side", "_labelled_split"]
FAILED, CONFLICTING, ABSENT = "failed prediction", "conflicting predictions", "no prediction"

NOTES = {
    "labels_of_other_splits": "{} rows of the labels are of splits without any prediction: not asked for",
    "labels_without_name": "{} rows of the labels name nothing: left out",
    "predictions_without_name": "{} rows of the predictions name nothing: left out",
    "rows_without_label": "{} rows of the labels have no label at all",
    "failed_predictions": "{} rows of the predictions have no probability: left out",
    "repeated_labels": "{} labels are repeated with the same content: counted once",
    "combined_labels": "{} names have rows of labels that differ: positive if one is, negative if all are, missing otherwise",
    "repeated_predictions": "{} predictions are repeated with the same content: counted once",
    "conflicting_predictions": "{} names have predictions with different content: left out",
    "labels_without_prediction": "{} labels have no prediction (the first: {})",
    "predictions_without_label": "{} predictions have no label (the first: {})",
    "unknown_patients": "the patients of {} rows are unknown: each of their images counts as its own patient",
}


@dataclass(frozen=True)
class Matched:
    """Predictions next to their labels.

    Attributes
    ----------
    labels, probabilities
        (N, C); a missing label is NaN.
    class_names
        C names.
    patients
        (N,) patient of each row; the image where the patient is unknown.
    seen
        (N,) what the model was fitted on each row's patient for, "" for nothing; None if nothing is known.
    level
        What a row is: ``tile``, ``image``, ``breast`` or ``patient``.
    counts
        What matched and what did not, by name.
    left_out
        Class -> ``positives`` and ``negatives`` -> reason -> number of labels that are not judged.
    notes
        The same for people, a line each, where it is not 0.
    rows
        What each of the N rows is, as text, "" where unknown: ``name`` (what labels and predictions joined by), ``image``,
        ``patient``, ``side`` (``L`` or ``R``) and ``split``.
    """

    labels: np.ndarray
    probabilities: np.ndarray
    class_names: list[str]
    patients: np.ndarray
    seen: np.ndarray | None
    level: str
    counts: dict[str, int]
    left_out: dict[str, dict[str, dict[str, int]]]
    notes: list[str]
    rows: pd.DataFrame


def match_labels(
    predictions: Predictions, labels_path: Path, patient_column: str = "patient_id", score: str = "max"
) -> Matched:
    """Join predictions to labels.

    Rows join by ``tile_path`` (its file name without ending is a tile's key; a folder decides between tiles of one name), else
    by ``image_id``, else by ``patient_id`` and ``laterality``, whichever both have. Tiles are gathered by image where the
    labels are of images, and labels of tiles by image where the predictions are of images. Classes are columns of their name,
    or ``label:<name>`` as in a manifest. Rows of labels with one name, such as the two views of a breast, are combined:
    positive if one is positive, negative if all are, missing otherwise. Nothing is left out because of its label.

    Parameters
    ----------
    predictions
        What :func:`mammostream.train.evaluate.reading.read_predictions` gave.
    labels_path
        CSV, or Parquet such as a manifest, of 1, 0 and empty cells.
    patient_column
        Column of the labels that names the patient where the predictions do not.
    score
        How to gather tiles by image: ``max``, ``noisy_or``, or ``top3`` and the like.

    Raises
    ------
    BadInput
        No such file, no common class, a label that is not 0, 1 or empty, or no row that matches.
    """
    labels, class_names = read_label_table(labels_path, predictions.class_names)
    table, level, label_names, names = _names(predictions, labels, labels_path, score)
    labels, table = labels.assign(_join=label_names), table.assign(_join=names)
    labels, other_splits = _of_predicted_splits(labels, table)
    labels["_patient"] = clean_patients(labels[patient_column]) if patient_column in labels else ""
    labels["_side"] = clean_sides(labels["laterality"]) if "laterality" in labels else ""
    labels["_labelled_split"] = clean_ids(labels["split"]) if "split" in labels else ""

    counts = {"labels_of_other_splits": other_splits}
    scores = [PROBABILITY + name for name in class_names]
    labels, counts["labels_without_name"] = _keep(labels, labels["_join"] != "")
    table, counts["predictions_without_name"] = _keep(table, table["_join"] != "")
    labels, rows = _combined(labels, class_names)
    counts |= rows
    failed = table.loc[table[scores].isna().any(axis=1), "_join"]
    table, counts["failed_predictions"] = _keep(table, table[scores].notna().all(axis=1))
    table, counts["repeated_predictions"], conflicting = _once(table, scores)
    counts["conflicting_predictions"] = len(conflicting)
    unpredicted, unlabelled = ~labels["_join"].isin(table["_join"]), ~table["_join"].isin(labels["_join"])
    counts["labels_without_prediction"], counts["predictions_without_label"] = int(unpredicted.sum()), int(unlabelled.sum())
    if unlabelled.all():
        named = " and ".join(repr(n.iloc[0]) if len(n) else "nothing" for n in (label_names, names))
        why = "".join(f"; {NOTES[name].format(n)}" for name, n in counts.items() if n and name not in UNMATCHED)
        raise BadInput(
            f"no label of {labels_path} belongs to a prediction (the first of each: {named}){why}; {HINT} for these {level}s"
        )
    joined = table.merge(labels[["_join", *_DESCRIBED, *class_names]], on="_join")
    counts["matched"] = len(joined)
    patients, counts["unknown_patients"] = _patients(joined)
    lost = labels[unpredicted]
    reasons = np.select([lost["_join"].isin(failed), lost["_join"].isin(conflicting)], [FAILED, CONFLICTING], ABSENT)
    examples = {
        "labels_without_prediction": lost["_join"].head(1).tolist(),
        "predictions_without_label": table["_join"][unlabelled].head(1).tolist(),
    }
    return Matched(
        joined[class_names].to_numpy(np.float64),
        joined[scores].to_numpy(np.float64),
        class_names,
        patients,
        joined["seen"].to_numpy(str) if "seen" in joined else None,
        level,
        counts,
        {name: _lost(lost[name], reasons) for name in class_names},
        [NOTES[name].format(n, *examples.get(name, ())) for name, n in counts.items() if n and name != "matched"],
        _rows(joined, level),
    )


def _names(
    predictions: Predictions, labels: pd.DataFrame, path: Path, score: str
) -> tuple[pd.DataFrame, str, pd.Series, pd.Series]:
    """Return the predictions at the labels' level, that level, and what labels and predictions join by."""
    table, level = predictions.table, predictions.level
    if "tile_path" in labels and level not in (BREAST, PATIENT):
        label_names, names = _tile_names(clean_ids(labels["tile_path"]), table)
        if level == IMAGE and not label_names.isin(names).any():
            films = [film_of_tile(path) or "" for path in clean_ids(labels["tile_path"])]
            named = clean_ids(labels["image_id"]) if "image_id" in labels else pd.Series("", labels.index)
            label_names, names = named.where(named != "", films), table["image_id"]
        return table, level, label_names, names
    if "image_id" in labels and "image_id" in table:
        if level == TILE:
            table, level = _gather_images(predictions, score), IMAGE
        return table, level, clean_ids(labels["image_id"]), table["image_id"]
    if {*BREAST_COLUMNS} <= {*labels} and level == BREAST:
        sides = pd.Series(
            known_breast(clean_patients(labels["patient_id"]).to_numpy(str), clean_sides(labels["laterality"]).to_numpy(str)),
            labels.index,
        )
        return table, level, sides, pd.Series(known_breast(*(table[c].to_numpy(str) for c in BREAST_COLUMNS)), table.index)
    if "patient_id" in labels and level == PATIENT:
        return table, level, clean_patients(labels["patient_id"]), table["patient_id"]
    raise BadInput(
        f"labels {path} do not name {level}s, as the predictions do: give tile_path for tiles, image_id for images, "
        f"patient_id for patients, and laterality too for breasts; their columns are: {', '.join(map(str, labels.columns))}"
    )


def _of_predicted_splits(labels: pd.DataFrame, table: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """Return the labels without splits of which nothing was predicted, and the number of their rows.

    A manifest has all splits, predictions are often of one: that the others have no prediction says nothing.
    """
    if "split" not in labels:
        return labels, 0
    predicted = labels.loc[labels["_join"].isin(table["_join"]), "split"].unique()
    return _keep(labels, labels["split"].isin(predicted)) if len(predicted) else (labels, 0)


def _tile_names(tile_paths: pd.Series, table: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
    """Return what labels' paths and tiles join by: the file name as a key; with folders where those names repeat."""
    names = table["key"] if "key" in table else table["image_id"]
    depth = 1
    if (
        "image_id" in table
        and names.map(lambda n: _tail(n, 1)).duplicated().any()
        and table["image_id"].str.contains("/").all()
    ):
        names, depth = table["image_id"], tile_paths.str.count("/").min() + 1
    return tile_paths.map(lambda p: _tail(p, depth)), names.map(lambda n: _tail(n, depth))


def _tail(path: str, parts: int) -> str:
    """Return the last parts of a path as a key, without an image's ending; "" for no path."""
    return key_of_path("/".join(path.split("/")[-parts:])) if path else ""


def _gather_images(predictions: Predictions, score: str) -> pd.DataFrame:
    """Return the tiles' scores by image, calibrated if there is a calibration of images."""
    table = predictions.table
    by = [c for c in ("image_id", "patient_id", "seen") if c in table]
    names = predictions.class_names
    top = re.fullmatch(r"top(\d+)", score)
    calibration = predictions.calibration(IMAGE, score, names)
    images = aggregate(table, by, int(top[1]) if top else TOP_TILES, {score: calibration} if calibration else None)
    images = images[[*by, *(f"{score}:{c}" for c in names)]].rename(columns={f"{score}:{c}": PROBABILITY + c for c in names})
    if "_split" in table:
        images["_split"] = images["image_id"].map(table.drop_duplicates("image_id").set_index("image_id")["_split"])
        by = [*by, "_split"]
    # Images none of whose tiles could be read are failed predictions, not images that nobody predicted.
    lost = table[~table["image_id"].isin(images["image_id"])].drop_duplicates("image_id")[by]
    return pd.concat([images, lost], ignore_index=True)


def _patients(joined: pd.DataFrame) -> tuple[np.ndarray, int]:
    """Return each row's patient, or its image where the patient is unknown, and how many of those there are."""
    patients = joined["patient_id"] if "patient_id" in joined else pd.Series("", joined.index)
    patients = patients.where(patients != "", joined["_patient"])
    unknown = patients == ""
    # Tiles of a folder have their own path for an image; those of one film differ in their position.
    images = joined["_join"].map(lambda name: film_of_tile(name) or name)
    if "image_id" in joined and "key" in joined:
        whole = ~joined["image_id"].map(lambda i: i.lower().endswith(ENDINGS))
        images = images.where(~whole, joined["image_id"])
    return ("patient:" + patients).where(~unknown, "image:" + images).to_numpy(str), int(unknown.sum())


def _rows(joined: pd.DataFrame, level: str) -> pd.DataFrame:
    """Return what each row is, see :class:`Matched`; what the predictions say goes first."""

    def either(column: str, labelled: str) -> pd.Series:
        own = joined[column] if column in joined else pd.Series("", joined.index)
        return own.where(own != "", joined[labelled])

    rows = pd.DataFrame({"name": joined["_join"], "image": image_names(joined, level)})
    rows["patient"], rows["side"] = either("patient_id", "_patient"), either("laterality", "_side")
    return rows.assign(split=either("_split", "_labelled_split")).astype(str).reset_index(drop=True)


def image_names(table: pd.DataFrame, level: str) -> pd.Series:
    """Return the image of each prediction, "" where unknown: tiles of a folder have their own path for an image."""
    images = table["image_id"] if "image_id" in table else pd.Series("", table.index)
    if level != TILE:
        return images
    of_key = table["key"].map(lambda name: film_of_tile(name) or "") if "key" in table else images
    return images.where((images != "") & ~images.map(lambda image: image.lower().endswith(ENDINGS)), of_key)


def _keep(frame: pd.DataFrame, kept: pd.Series) -> tuple[pd.DataFrame, int]:
    return frame[kept], int((~kept).sum())


def _combined(labels: pd.DataFrame, class_names: Sequence[str]) -> tuple[pd.DataFrame, dict[str, int]]:
    """Return one row per name with a label, and how many rows had none, repeated another or were combined with others."""
    empty = int(labels[class_names].isna().all(axis=1).sum())
    distinct = labels.drop_duplicates(["_join", *class_names])
    repeated = len(labels) - len(distinct)
    combined = int(distinct.loc[distinct["_join"].duplicated(), "_join"].nunique())
    names, first, units = np.unique(labels["_join"].to_numpy(str), return_index=True, return_inverse=True)
    values = labels_of_units(labels[class_names].to_numpy(np.float64), units)
    described = labels[_DESCRIBED].iloc[first].reset_index(drop=True)
    frame = pd.concat([pd.DataFrame(values, columns=list(class_names)).assign(_join=names), described], axis=1)
    frame = frame.iloc[np.argsort(first)].reset_index(drop=True)  # in the order of the file
    kept = frame[class_names].notna().any(axis=1)
    return frame[kept], {"rows_without_label": empty, "repeated_labels": repeated, "combined_labels": combined}


def _once(frame: pd.DataFrame, values: list[str]) -> tuple[pd.DataFrame, int, set[str]]:
    """Return one row per name, how many repeated another, and the names that were left out for contradicting themselves."""
    distinct = frame.drop_duplicates(["_join", *values])
    contradicting = distinct["_join"].duplicated(keep=False)
    return distinct[~contradicting], len(frame) - len(distinct), set(distinct.loc[contradicting, "_join"])


def _lost(labels: pd.Series, reasons: np.ndarray) -> dict[str, dict[str, int]]:
    """Return how many positive and negative labels are not judged, by reason."""
    return {
        kind: {
            str(r): int(n) for r, n in zip(*np.unique(reasons[(labels == value).to_numpy()], return_counts=True), strict=True)
        }
        for kind, value in (("positives", 1), ("negatives", 0))
    }
