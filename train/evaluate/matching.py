"""Predictions and labels read from tables and joined row by row; what does not match is counted."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from mammostream.common.errors import BadInput, first_line
from mammostream.common.files import read_csv, read_parquet
from mammostream.preprocess.reading import IMAGE_SUFFIXES
from mammostream.shards.manifest import LABEL_PREFIX
from mammostream.train.levels.aggregation import PROBABILITY, aggregate

_IDENTITY = ("key", "image_id", "patient_id", "laterality")

_BREAST = ["patient_id", "laterality"]

_ENDINGS = (*IMAGE_SUFFIXES, ".jpg", ".jpeg")

UNMATCHED = ("labels_without_prediction", "predictions_without_label")

NOTES = {
    "labels_without_name": "{} rows of the labels name nothing: left out",
    "predictions_without_name": "{} rows of the predictions name nothing: left out",
    "rows_without_label": "{} rows of the labels have no label at all: left out",
    "failed_predictions": "{} rows of the predictions have no probability: left out",
    "repeated_labels": "{} labels stand there again with the same content: counted once",
    "conflicting_labels": "{} names stand in the labels with different content: left out",
    "repeated_predictions": "{} predictions stand there again with the same content: counted once",
    "conflicting_predictions": "{} names stand in the predictions with different content: left out",
    "labels_without_prediction": "{} labels have no prediction (the first: {})",
    "predictions_without_label": "{} predictions have no label (the first: {})",
    "unknown_patients": "the patients of {} rows are unknown: each of their images counts as its own patient",
}
_POSITION = re.compile(r"_y\d+_x\d+$")

_HINT = "give a predictions.parquet, image_predictions.parquet or breast_predictions.parquet, or a JSON, that 'infer' wrote"


@dataclass(frozen=True)
class Predictions:
    """What a predictions file says.

    Attributes
    ----------
    table
        Identities as text ("" where missing) and a column ``prob:<class>`` a class.
    level
        What a row is: ``tile``, ``image`` or ``breast``.
    thresholds
        Class -> the threshold that the file records; a class may be missing.
    model_sha256
        Hash of the model that predicted, where the file records it.
    """

    table: pd.DataFrame
    level: str
    thresholds: dict[str, float]
    model_sha256: str | None

    @property
    def class_names(self) -> list[str]:
        """The predicted classes."""
        return [c.removeprefix(PROBABILITY) for c in self.table.columns if c.startswith(PROBABILITY)]


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
    level
        What a row is: ``tile``, ``image`` or ``breast``.
    counts
        What matched and what did not, by name.
    notes
        The same for people, a line each, where it is not 0.
    """

    labels: np.ndarray
    probabilities: np.ndarray
    class_names: list[str]
    patients: np.ndarray
    level: str
    counts: dict[str, int]
    notes: list[str]


def read_predictions(path: Path, score: str = "max") -> Predictions:
    """Read predictions of tiles, images or breasts from Parquet, CSV or JSON.

    Parameters
    ----------
    path
        A table with ``prob:<class>`` (tiles) or ``max:<class>``, ``top3:<class>`` and ``noisy_or:<class>`` (images and
        breasts), or a JSON with the probabilities of each tile or image.
    score
        Which to take of images and breasts: ``max``, ``noisy_or``, or ``top3`` and the like.

    Raises
    ------
    BadInput
        No such file, no identities or probabilities in it, or values that are no probabilities.
    """
    facts: dict[str, Any] = {}
    if path.suffix == ".json":
        frame, facts = _read_json(path)
    elif path.suffix == ".csv":
        frame = read_csv(path, "predictions")
    else:
        frame = read_parquet(path, "predictions", _HINT)
        facts = json.loads((pq.read_schema(path).metadata or {}).get(b"mammostream", b"{}"))
    prefix = next((p for p in (PROBABILITY, f"{score}:") if any(str(c).startswith(p) for c in frame.columns)), None)
    level = "tile" if "key" in frame else "image" if "image_id" in frame else "breast" if {*_BREAST} <= {*frame} else None
    if prefix is None or level is None:
        have = ", ".join(map(str, frame.columns))
        raise BadInput(f"predictions {path} name no probabilities of tiles, images or breasts (columns: {have}); {_HINT}")
    scores = {c: PROBABILITY + c.removeprefix(prefix) for c in frame.columns if c.startswith(prefix)}
    identities = [c for c in _IDENTITY if c in frame]
    table = frame[[*identities, *scores]].rename(columns=scores)
    for name in identities:
        table[name] = _text(table[name])
    for name in scores.values():
        table[name] = pd.to_numeric(table[name], errors="coerce").astype(np.float64)
        wrong = table.loc[~(table[name].between(0, 1) | table[name].isna()), name]
        if len(wrong):
            raise BadInput(f"predictions {path}, column '{name}': {wrong.iloc[0]:g} is not a probability between 0 and 1")
    return Predictions(table, level, _recorded_thresholds(facts, scores.values()), facts.get("model_sha256"))


def match_labels(
    predictions: Predictions, labels_path: Path, patient_column: str = "patient_id", score: str = "max"
) -> Matched:
    """Join predictions to labels.

    Rows join by ``tile_path`` (its file name without ending is a tile's key; a folder decides between tiles of one name), else
    by ``image_id``, else by ``patient_id`` and ``laterality``, whichever both have. Tiles are gathered by image where the
    labels are of images. Classes are columns of their name, or ``label:<name>`` as in a manifest. A row that stands there
    twice with the same content counts once; with different content, not at all.

    Parameters
    ----------
    predictions
        What :func:`read_predictions` gave.
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
    labels, class_names = _read_label_table(labels_path, predictions.class_names)
    table, level = predictions.table, predictions.level
    if "tile_path" in labels and level != "breast":
        label_names, names = _tile_names(_text(labels["tile_path"]), table)
    elif "image_id" in labels and "image_id" in table:
        if level == "tile":
            table, level = _gather_images(table, score), "image"
        label_names, names = _text(labels["image_id"]), table["image_id"]
    elif {*_BREAST} <= {*labels} and level == "breast":
        label_names, names = (_breast_names(_text(f["patient_id"]), _text(f["laterality"])) for f in (labels, table))
    else:
        raise BadInput(
            f"labels {labels_path} do not name {level}s, as the predictions do: give tile_path for tiles, image_id for images, "
            f"patient_id and laterality for breasts; their columns are: {', '.join(map(str, labels.columns))}"
        )
    labels, table = labels.assign(_join=label_names), table.assign(_join=names)

    counts: dict[str, int] = {}
    scores = [PROBABILITY + name for name in class_names]
    labels, counts["labels_without_name"] = _keep(labels, labels["_join"] != "")
    table, counts["predictions_without_name"] = _keep(table, table["_join"] != "")
    labels, counts["rows_without_label"] = _keep(labels, labels[class_names].notna().any(axis=1))
    table, counts["failed_predictions"] = _keep(table, table[scores].notna().all(axis=1))
    labels, counts["repeated_labels"], counts["conflicting_labels"] = _once(labels, class_names)
    table, counts["repeated_predictions"], counts["conflicting_predictions"] = _once(table, scores)
    unpredicted, unlabelled = ~labels["_join"].isin(table["_join"]), ~table["_join"].isin(labels["_join"])
    counts["labels_without_prediction"], counts["predictions_without_label"] = int(unpredicted.sum()), int(unlabelled.sum())
    if unlabelled.all():
        named = " and ".join(repr(n.iloc[0]) if len(n) else "nothing" for n in (label_names, names))
        why = "".join(f"; {NOTES[name].format(n)}" for name, n in counts.items() if n and name not in UNMATCHED)
        raise BadInput(
            f"no label of {labels_path} belongs to a prediction (the first of each: {named}){why}; {_HINT} for these {level}s"
        )
    labels = labels.assign(_patient=_text(labels[patient_column]) if patient_column in labels else "")
    joined = table.merge(labels[["_join", "_patient", *class_names]], on="_join")
    counts["matched"] = len(joined)
    patients, counts["unknown_patients"] = _patients(joined)
    examples = {
        "labels_without_prediction": labels["_join"][unpredicted].head(1).tolist(),
        "predictions_without_label": table["_join"][unlabelled].head(1).tolist(),
    }
    return Matched(
        joined[class_names].to_numpy(np.float64),
        joined[scores].to_numpy(np.float64),
        class_names,
        patients,
        level,
        counts,
        [NOTES[name].format(n, *examples.get(name, ())) for name, n in counts.items() if n and name != "matched"],
    )


def _recorded_thresholds(facts: Mapping[str, Any], columns: Iterable[str]) -> dict[str, float]:
    """Return the thresholds by class that a file records: one for all, a list next to ``class_names``, or by class."""
    if "threshold" in facts:
        return {column.removeprefix(PROBABILITY): facts["threshold"] for column in columns}
    thresholds = facts.get("thresholds") or {}
    if not isinstance(thresholds, Mapping):
        thresholds = dict(zip(facts.get("class_names", ()), thresholds, strict=False))
    return {name: threshold for name, threshold in thresholds.items() if threshold is not None}


def _read_json(path: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Read a JSON that ``infer`` writes, of tiles, images or breasts, or the list of images that the guide's script writes."""
    if not path.is_file():
        raise BadInput(f"predictions {path} does not exist; {_HINT}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        facts = value if isinstance(value, dict) else {}
        records = next(facts[name] for name in ("tiles", "images", "breasts") if name in facts) if facts else value
        rows = [_json_row(record) for record in records]
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise BadInput(f"predictions {path} cannot be read as JSON of images ({first_line(error)}); {_HINT}") from error
    return pd.DataFrame(rows), facts


def _json_row(record: Mapping[str, Any]) -> dict[str, Any]:
    scores = record.get("probabilities", record.get("predictions", {}))
    names = [c for c in _IDENTITY if c in record] or ["image" if "image" in record else "image_path"]
    row = {name if name in _IDENTITY else "image_id": record[name] for name in names}
    columns = {name: value for name, value in record.items() if ":" in name}  # max:<class> and so on
    return row | columns | {PROBABILITY + name: p for name, p in scores.items()}


def _read_label_table(path: Path, predicted: Sequence[str]) -> tuple[pd.DataFrame, list[str]]:
    """Return the labels with the predicted classes as float columns of their plain names, and those classes."""
    if path.suffix == ".parquet":
        frame = read_parquet(path, "labels", "give a CSV or Parquet with a 0/1 column a class")
    else:
        frame = read_csv(path, "labels CSV")
    found = {name: next((c for c in (name, LABEL_PREFIX + name) if c in frame.columns), None) for name in predicted}
    class_names = [name for name, column in found.items() if column is not None]
    if not class_names:
        have = ", ".join(map(str, frame.columns))
        raise BadInput(f"labels {path} have none of the predicted classes ({', '.join(predicted)}); their columns are: {have}")
    for name in class_names:
        values = pd.to_numeric(frame[found[name]], errors="coerce")
        wrong = frame.index[~(values.isin([0, 1]) | frame[found[name]].isna())]
        if len(wrong):
            cell = str(frame.loc[wrong[0], found[name]])
            raise BadInput(
                f"labels {path} line {wrong[0] + 2}, column '{found[name]}': {cell!r} is not 0, 1 or empty; correct it"
            )
        frame[name] = values.astype(np.float64)
    return frame, class_names


def _tile_names(tile_paths: pd.Series, table: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
    """Return what labels' paths and tiles join by: the file name without ending; with folders where those names repeat."""
    names = table["key"] if "key" in table else table["image_id"]
    depth = 1
    if (
        "image_id" in table
        and names.map(lambda n: _tail(n, 1)).duplicated().any()
        and table["image_id"].str.contains("/").all()
    ):
        names, depth = table["image_id"], tile_paths.str.count("/").min() + 1
    return tile_paths.map(lambda p: _tail(p, depth)), names.map(lambda n: _tail(n, depth))


def _breast_names(patients: pd.Series, sides: pd.Series) -> pd.Series:
    return (patients + " " + sides).where((patients != "") & (sides != ""), "")


def _tail(path: str, parts: int) -> str:
    """Return the last parts of a path, without an image's ending."""
    ending = next((suffix for suffix in _ENDINGS if path.lower().endswith(suffix)), "")
    return "/".join(path[: len(path) - len(ending)].split("/")[-parts:])


def _gather_images(table: pd.DataFrame, score: str) -> pd.DataFrame:
    by = [c for c in ("image_id", "patient_id") if c in table]
    scores = [c.removeprefix(PROBABILITY) for c in table.columns if c.startswith(PROBABILITY)]
    top = re.fullmatch(r"top(\d+)", score)
    images = aggregate(table, by, int(top[1])) if top else aggregate(table, by)
    return images[[*by, *(f"{score}:{c}" for c in scores)]].rename(columns={f"{score}:{c}": PROBABILITY + c for c in scores})


def _patients(joined: pd.DataFrame) -> tuple[np.ndarray, int]:
    """Return each row's patient, or its image where the patient is unknown, and how many of those there are."""
    patients = joined["patient_id"] if "patient_id" in joined else pd.Series("", joined.index)
    patients = patients.where(patients != "", joined["_patient"])
    unknown = patients == ""
    # Tiles of a folder have their own path for an image; those of one film differ in their position.
    images = joined["_join"].str.replace(_POSITION, "", regex=True)
    if "image_id" in joined and "key" in joined:
        whole = ~joined["image_id"].map(lambda i: i.lower().endswith(_ENDINGS))
        images = images.where(~whole, joined["image_id"])
    return ("patient:" + patients).where(~unknown, "image:" + images).to_numpy(str), int(unknown.sum())


def _keep(frame: pd.DataFrame, kept: pd.Series) -> tuple[pd.DataFrame, int]:
    return frame[kept], int((~kept).sum())


def _once(frame: pd.DataFrame, values: list[str]) -> tuple[pd.DataFrame, int, int]:
    """Return one row a name, how many repeated another, and how many names were dropped for contradicting themselves."""
    distinct = frame.drop_duplicates(["_join", *values])
    contradicting = distinct["_join"].duplicated(keep=False)
    dropped = distinct.loc[contradicting, "_join"].nunique()
    return distinct[~contradicting], len(frame) - len(distinct), dropped


def _text(values: pd.Series) -> pd.Series:
    return values.astype(object).where(values.notna(), "").astype(str)
