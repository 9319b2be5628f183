"""Out-of-fold predictions: the tables of a fold's test patients, and the figures of all folds, each and pooled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from mammostream.common.errors import BadInput
from mammostream.common.files import parquet_facts, read_parquet, write_parquet
from mammostream.shards.identity import seen_by
from mammostream.train.classify.spread import spread, spread_words
from mammostream.train.evaluate.metrics import evaluate_predictions
from mammostream.train.levels.aggregation import MAX, PROBABILITY, aggregate
from mammostream.train.levels.calibration import (
    BREAST,
    IMAGE,
    PROB,
    TILE,
    Calibrations,
    calibrations_of,
    plain,
    stored_calibrations,
)
from mammostream.train.levels.fitting import Judged
from mammostream.train.levels.labels import labels_of_units
from mammostream.train.run.labels import LabelledTiles

TABLES = {
    IMAGE: "image_predictions.parquet",
    BREAST: "breast_predictions.parquet",
    TILE: "predictions.parquet",  # written last: it marks a fold as finished
}
_DECIDED = ("accuracy", "balanced_accuracy")  # depend on the thresholds, which each fold has its own of
_SPREAD = ("auc", "ap", "sensitivity_at_90_specificity", "balanced_accuracy", "brier", "ece")
Fold = Mapping[tuple[str, str], Judged]


def write_fold(
    folder: Path, tiles: LabelledTiles, logits: np.ndarray, checkpoint: Mapping[str, Any], facts: Mapping[str, Any], **more: Any
) -> None:
    """Write the tables of tiles, images and, where sides are known, breasts, with the columns that ``evaluate`` reads.

    Parameters
    ----------
    folder
        Where they go.
    tiles, logits
        The fold's test tiles, and their (N, C) logits.
    checkpoint
        The model that predicted, for its calibrations and what it was fitted on.
    facts
        What is written next to the rows.
    more
        Further columns: values by tile, or one value for all tables.
    """
    calibrations = stored_calibrations(checkpoint)
    classes = list(checkpoint["class_names"])
    probabilities = calibrations[TILE][PROB](logits).astype(np.float32)
    frame = pd.DataFrame({"key": tiles.keys, "image_id": tiles.groups, "patient_id": tiles.patients})
    frame = frame.assign(**{PROBABILITY + name: probabilities[:, c] for c, name in enumerate(classes)})
    frame["laterality"] = [name[-1:] for name in tiles.breasts]
    tables = {
        IMAGE: aggregate(frame, ["image_id", "patient_id"], calibration=calibrations.get(IMAGE)),
        BREAST: aggregate(frame[frame["laterality"] != ""], ["patient_id", "laterality"], calibration=calibrations.get(BREAST)),
        TILE: frame.drop(columns="laterality"),
    }
    facts = {"class_names": classes, "calibration": plain(calibrations)} | dict(facts)
    for level, name in TABLES.items():
        table = tables[level]
        films = table["image_id"] if "image_id" in table else table["patient_id"]
        table["seen"], table["reason"] = seen_by(checkpoint["fitted_on"], table["patient_id"], films), ""  # as infer has them
        table = table.assign(**{name: value for name, value in more.items() if level == TILE or np.ndim(value) == 0})
        if level != BREAST or len(table):
            _write(folder / name, table, facts)


def _write(path: Path, frame: pd.DataFrame, facts: Mapping[str, Any]) -> None:
    table = pa.Table.from_pandas(frame, preserve_index=False)
    write_parquet(path, table, facts)


def read_facts(path: Path) -> dict[str, Any]:
    """Return what a table has next to its rows.

    Raises
    ------
    BadInput
        The file is no such table.
    """
    read_parquet(path, "out-of-fold predictions", "delete its folder to train that fold again", ["key"])
    return parquet_facts(path)


def read_fold(folder: Path, tiles: LabelledTiles, class_names: Sequence[str]) -> Fold:
    """Return the probabilities of a finished fold next to the labels, for each level and score.

    Parameters
    ----------
    folder
        With the tables that :func:`write_fold` wrote.
    tiles
        The fold's test tiles.
    class_names
        C names.

    Raises
    ------
    BadInput
        The tables are not of these tiles.
    """
    facts = read_facts(folder / TABLES[TILE])
    calibrations: Calibrations = calibrations_of(facts["calibration"])
    names = {TILE: tiles.keys, IMAGE: tiles.groups, BREAST: tiles.breasts}
    found: dict[tuple[str, str], Judged] = {}
    for level in (TILE, IMAGE, BREAST):
        path = folder / TABLES[level]
        known = names[level] != ""
        if level not in calibrations or not path.is_file() or not known.any():
            continue
        table = pd.read_parquet(path)
        of_rows = table["patient_id"] + " " + table["laterality"] if level == BREAST else table[table.columns[0]]
        unique, first, units = np.unique(names[level][known], return_index=True, return_inverse=True)
        table = table.set_index(of_rows.to_numpy(str))
        if sorted(table.index) != unique.tolist():
            raise BadInput(f"{path} has other {level}s than the labels give its fold; delete the folder to train it again")
        table = table.loc[unique]
        labels, people = labels_of_units(tiles.labels[known], units), tiles.people[known][first]
        for score, calibration in calibrations[level].items():
            p = table[[f"{score}:{name}" for name in class_names]].to_numpy(np.float64)
            limits = [0.5 if threshold is None else threshold for threshold in calibration.thresholds]
            found[level, score] = Judged(labels, p, p >= limits, people)
    return found


def gather_tables(folders: Sequence[Path], output_dir: Path, facts: Mapping[str, Any]) -> None:
    """Write one table of all folds for each level."""
    for name in TABLES.values():
        parts = [pd.read_parquet(folder / name) for folder in folders if (folder / name).is_file()]
        if parts:
            _write(output_dir / name, pd.concat(parts, ignore_index=True), facts)


def summarise_folds(folds: Sequence[Fold], class_names: Sequence[str], bootstrap: int = 1000) -> dict[str, dict[str, Any]]:
    """Return level -> score -> ``folds`` and ``pooled``.

    ``folds`` has mean, standard deviation (of the sample, n - 1) and values over the folds of each figure, ``pooled`` the
    figures of all predictions together with 95 % intervals over patients. Figures of decisions use each fold's own thresholds.
    """
    found: dict[str, dict[str, Any]] = {}
    for level, score in folds[0]:
        parts = [fold[level, score] for fold in folds if (level, score) in fold]
        each = [_figures(part, class_names, 0) for part in parts]
        fields: Any = Judged.__dataclass_fields__
        pooled = Judged(*(np.concatenate([getattr(part, name) for part in parts]) for name in fields))
        found.setdefault(level, {})[score] = {
            "folds": {
                **{name: spread([figures[name] for figures in each]) for name in ("mean_auc", "mean_ap", "exact_match")},
                "per_class": {
                    name: {figure: spread([figures["per_class"][name][figure] for figures in each]) for figure in _SPREAD}
                    for name in class_names
                },
            },
            "pooled": _figures(pooled, class_names, bootstrap),
        }
    return found


def _figures(judged: Judged, class_names: Sequence[str], bootstrap: int) -> dict[str, Any]:
    data = judged.labels, class_names, judged.groups
    figures, decided = (
        evaluate_predictions(data[0], values, *data[1:], bootstrap=bootstrap)
        for values in (judged.probabilities, judged.found.astype(np.float64))
    )
    for name in class_names:
        mine, other = figures["per_class"][name], decided["per_class"][name]
        mine.pop("threshold")
        for figure in _DECIDED:
            mine[figure], mine["intervals"][figure] = other[figure], other["intervals"][figure]
    figures["exact_match"], figures["intervals"]["exact_match"] = decided["exact_match"], decided["intervals"]["exact_match"]
    return figures


def summary_lines(summary: Mapping[str, Mapping[str, Any]], count: int) -> list[str]:
    """Return the AUC and average precision of each class, for tiles and for the highest tile of images and breasts."""
    lines = []
    for level, score in ((TILE, PROB), (IMAGE, MAX), (BREAST, MAX)):
        if score not in summary.get(level, {}):
            continue
        folds, pooled = (summary[level][score][name] for name in ("folds", "pooled"))
        for name, figures in pooled["per_class"].items():
            words = [
                f"{figure.upper()} {_fold_words(folds['per_class'][name][figure])}, pooled {_pooled_words(figures, figure)}"
                for figure in ("auc", "ap")
            ]
            known = figures["positives"] + figures["negatives"]
            lines.append(f"{level}s, {name}: {'; '.join(words)} ({figures['positives']} of {known} positive)")
    ending = f"mean ± standard deviation over {count} folds; pooled with 95 % intervals over patients"
    return [*lines, ending]


def _fold_words(found: Mapping[str, Any]) -> str:
    undefined = found["values"].count(None)
    return f"undefined in {undefined} of {len(found['values'])} folds" if undefined else spread_words(found)


def _pooled_words(figures: Mapping[str, Any], name: str) -> str:
    interval = figures["intervals"][name]
    value = "undefined" if figures[name] is None else f"{figures[name]:.3f}"
    return value + (f" ({interval[0]:.3f}-{interval[1]:.3f})" if interval else "")
