"""Predictions and labels as tables: read from Parquet, CSV or JSON, checked, with what turns predictions into decisions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mammostream.common.errors import BadInput, first_line
from mammostream.common.files import parquet_facts, read_csv, read_parquet, sha256_file
from mammostream.shards.identity import clean_ids, clean_patients, clean_sides, film_of_tile, fitted_subjects, seen_by
from mammostream.shards.manifest import LABEL_PREFIX
from mammostream.train.levels.aggregation import PROBABILITY
from mammostream.train.levels.calibration import (
    BREAST,
    IMAGE,
    PATIENT,
    PROB,
    TILE,
    Calibration,
    Calibrations,
    calibrations_of,
    stored_calibrations,
)

HINT = "give a predictions.parquet, image_predictions.parquet or breast_predictions.parquet, or a JSON, that 'infer' wrote"
BREAST_COLUMNS = ["patient_id", "laterality"]
_CLEANED = {"patient_id": clean_patients, "laterality": clean_sides}
_IDENTITY = ("key", "image_id", "patient_id", "laterality", "seen")
_FURTHER = ("split", "x", "y", "size")  # kept as _split and so on: a class may be called like them


@dataclass(frozen=True)
class Predictions:
    """What a predictions file says.

    Attributes
    ----------
    table
        Identities as text ("" where missing) and a column ``prob:<class>`` per class; ``seen`` if the file says what the model
        was fitted on each patient for; ``_split``, and ``_x``, ``_y`` and ``_size`` of tiles in native pixels, if it has them.
    level
        What a row is: ``tile``, ``image`` or ``breast``.
    score
        Which score of images and breasts was taken, or is to be gathered from tiles.
    calibrations
        Those that the file records, or the model's; thresholds are in them.
    fitted_classes
        The classes of `calibrations`, in their order.
    threshold
        One threshold for all classes that the file records, or None.
    tile_thresholds
        Class -> the threshold of tiles that a file of an earlier version records.
    model_sha256
        Hash of the model that predicted, if the file records it.
    source
        Where `calibrations` come from, in words.
    """

    table: pd.DataFrame
    level: str
    score: str = "max"
    calibrations: Calibrations = field(default_factory=dict)
    fitted_classes: Sequence[str] = ()
    threshold: float | None = None
    tile_thresholds: Mapping[str, float] = field(default_factory=dict)
    model_sha256: str | None = None
    source: str = "the predictions"

    @property
    def class_names(self) -> list[str]:
        """The predicted classes."""
        return [c.removeprefix(PROBABILITY) for c in self.table.columns if c.startswith(PROBABILITY)]

    def calibration(self, level: str, score: str, class_names: Sequence[str]) -> Calibration | None:
        """Return what turns a score into a probability of the level, for these classes; None if nothing is recorded."""
        found = self.calibrations.get(level, {}).get(score)
        if found is None or not set(class_names) <= set(self.fitted_classes):
            return None
        return found.take([list(self.fitted_classes).index(name) for name in class_names])


def read_predictions(path: Path, score: str = "max") -> Predictions:
    """Read predictions of tiles, images, breasts or patients from Parquet, CSV or JSON.

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
        frame = read_parquet(path, "predictions", HINT, nested=("features",))
        facts = recorded_facts(path)
    prefix = next((p for p in (PROBABILITY, f"{score}:") if any(str(c).startswith(p) for c in frame.columns)), None)
    named = {TILE: ["key"], IMAGE: ["image_id"], BREAST: BREAST_COLUMNS, PATIENT: ["patient_id"]}
    level = next((level for level, columns in named.items() if {*columns} <= {*frame}), None)
    if prefix is None or level is None:
        have = ", ".join(map(str, frame.columns))
        raise BadInput(
            f"predictions {path} name no probabilities of tiles, images, breasts or patients (columns: {have}); {HINT}"
        )
    scores = {c: PROBABILITY + c.removeprefix(prefix) for c in frame.columns if c.startswith(prefix)}
    identities = [c for c in _IDENTITY if c in frame]
    further = {c: f"_{c}" for c in _FURTHER if c in frame}
    table = frame[[*identities, *scores, *further]].rename(columns=scores | further)
    for name in further.values():
        table[name] = (
            clean_ids(table[name]) if name == "_split" else pd.to_numeric(table[name], errors="coerce").astype(np.float64)
        )
    for name in identities:
        table[name] = _CLEANED.get(name, clean_ids)(table[name])
    for name in scores.values():
        table[name] = pd.to_numeric(table[name], errors="coerce").astype(np.float64)
        wrong = table.loc[~(table[name].between(0, 1) | table[name].isna()), name]
        if len(wrong):
            raise BadInput(f"predictions {path}, column '{name}': {wrong.iloc[0]:g} is not a probability between 0 and 1")
    try:
        calibrations = calibrations_of(facts.get("calibration") or {})
        thresholds = _recorded_thresholds(facts)
        threshold = None if facts.get("threshold") is None else float(facts["threshold"])
        fitted_classes = [str(name) for name in facts.get("class_names") or ()]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        raise BadInput(f"predictions {path} record a damaged calibration, threshold or class name ({what}); {HINT}") from error
    recorded = fitted_classes, threshold, thresholds, facts.get("model_sha256")
    return Predictions(table, level, score, calibrations, *recorded)


def recorded_facts(path: Path) -> dict[str, Any]:
    """Return what a Parquet file of predictions records besides its rows: what made them, calibrations and thresholds.

    Raises
    ------
    BadInput
        It is damaged.
    """
    try:
        facts = parquet_facts(path)
    except (OSError, ValueError) as error:
        raise BadInput(f"predictions {path}: what the file records is damaged ({first_line(error)}); {HINT}") from error
    if not isinstance(facts, dict):
        raise BadInput(f"predictions {path}: what the file records is no mapping; {HINT}")
    return facts


def with_model(predictions: Predictions, model_path: Path) -> Predictions:
    """Return the predictions with the calibrations and thresholds of a checkpoint, and with what it was fitted on.

    Predictions made with ``--temperature`` keep the thresholds that they record: the checkpoint's hold for its own
    probabilities only.

    Raises
    ------
    BadInput
        The model is not the one that predicted, or is not a classifier.
    """
    if predictions.model_sha256 not in (None, sha256_file(model_path)):
        raise BadInput(f"the predictions are not of {model_path}: its hash is another; give the model that predicted")
    from mammostream.models.checkpoints import entries_of, load_checkpoint  # needs torch, which nothing else here does

    checkpoint = load_checkpoint(model_path, "classifier")
    table, recorded = predictions.table, predictions.calibrations
    with entries_of(model_path, "classifier"):
        stored = stored_calibrations(checkpoint)
        fitted_on = fitted_subjects(checkpoint)
    if "seen" not in table and fitted_on:
        patients = table.get("patient_id", pd.Series("", table.index))
        images = table.get("image_id", patients)
        # A tile that came as an image file has its path for an image.
        films = [film_of_tile(image) or image if "/" in image else image for image in images]
        table = table.assign(seen=seen_by(fitted_on, patients, films))
    if TILE in recorded and not recorded[TILE][PROB].maps_as(stored[TILE][PROB]):
        return replace(predictions, table=table)
    return replace(
        predictions,
        table=table,
        calibrations=stored,
        fitted_classes=list(checkpoint["class_names"]),
        threshold=None,
        tile_thresholds={},
        source=str(model_path),
    )


def _recorded_thresholds(facts: Mapping[str, Any]) -> dict[str, float]:
    """Return the thresholds by class that a file records: a list next to ``class_names``, or by class."""
    thresholds = facts.get("thresholds") or {}
    if not isinstance(thresholds, Mapping):
        thresholds = dict(zip(facts.get("class_names", ()), thresholds, strict=False))
    return {name: float(threshold) for name, threshold in thresholds.items() if threshold is not None}


def _read_json(path: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Read a JSON that ``infer`` writes, of tiles, images or breasts, or the list of images that the guide's script writes."""
    if not path.is_file():
        raise BadInput(f"predictions {path} does not exist; {HINT}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        facts = value if isinstance(value, dict) else {}
        records = next(facts[name] for name in ("tiles", "images", "breasts") if name in facts) if facts else value
        rows = [_json_row(record) for record in records]
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise BadInput(f"predictions {path} cannot be read as JSON of images ({first_line(error)}); {HINT}") from error
    return pd.DataFrame(rows), facts


def _json_row(record: Mapping[str, Any]) -> dict[str, Any]:
    scores = record.get("probabilities", record.get("predictions", {}))
    names = [c for c in _IDENTITY if c in record] or ["image" if "image" in record else "image_path"]
    row = {name if name in _IDENTITY else "image_id": record[name] for name in names}
    for name, value in row.items():
        if not isinstance(value, (str, int, float, type(None))):
            raise TypeError(f"{name} {value!r:.40} is no name")
    columns = {name: value for name, value in record.items() if ":" in name or name in _FURTHER}  # max:<class> and so on
    return row | columns | {PROBABILITY + name: p for name, p in scores.items()}


def read_table(path: Path, what: str, mend: str) -> pd.DataFrame:
    """Read a table from Parquet or CSV, by the ending of its name; `what` and `mend` are for the error."""
    return read_parquet(path, what, mend) if path.suffix == ".parquet" else read_csv(path, f"{what} CSV")


def read_label_table(path: Path, predicted: Sequence[str]) -> tuple[pd.DataFrame, list[str]]:
    """Return the labels with the predicted classes as float columns of their plain names, and those classes."""
    frame = read_table(path, "labels", "give a CSV or Parquet with a 0/1 column a class")
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
