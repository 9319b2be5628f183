"""Free-response ROC: tiles or peaks of heat maps as marks against boxes; sensitivity by false positives per image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import csr_array

from mammostream.common.errors import BadInput
from mammostream.shards.identity import clean_ids, clean_patients, clean_sides, film_of_tile, known_breast
from mammostream.shards.manifest import read_findings
from mammostream.train.evaluate.matching import image_names
from mammostream.train.evaluate.metrics import draw_patients, interval
from mammostream.train.evaluate.reading import Predictions, read_label_table
from mammostream.train.levels.aggregation import PROBABILITY
from mammostream.train.levels.calibration import TILE
from mammostream.train.levels.labels import labels_of_units

RATES = (0.25, 0.5, 1.0, 2.0)  # false positives per image
HIT = 0.5  # as `shards labels --min-fraction` has it by default
_RESAMPLES = 100  # drawn at a time
# From x, y, size and score of a film's tiles and its boxes: the marks' scores (M,), which mark hits which box (M, B), and which
# marks are false positives (M,).
Marks = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Marked:
    """Marks of one class, told apart into hits and false positives.

    Attributes
    ----------
    lesions
        One row per box: ``image``, ``patient``, ``breast`` ("" where unknown) and ``score``, that of the highest mark that
        hits it, -inf where none does.
    false
        One row per false positive: ``patient`` and ``score``.
    images
        One row per judged image: ``image``, ``patient``.
    """

    lesions: pd.DataFrame
    false: pd.DataFrame
    images: pd.DataFrame


def suppressed(x: np.ndarray, y: np.ndarray, size: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return which tiles of an image are its marks: those whose centre lies in no mark with a higher score.

    Overlapping tiles see the same thing; without this (greedy non-maximum suppression), one thing would count several times.
    Of equal scores, the earlier tile counts as higher.

    Parameters
    ----------
    x, y, size
        (N,) top-left corners and edge lengths in native pixels.
    scores
        (N,).
    """
    kept = np.zeros(len(x), bool)
    left = np.ones(len(x), bool)
    centre_x, centre_y = x + size / 2, y + size / 2
    for i in np.argsort(-scores, kind="stable"):
        if left[i]:
            kept[i] = True
            inside = (np.abs(centre_x - centre_x[i]) <= size[i] / 2) & (np.abs(centre_y - centre_y[i]) <= size[i] / 2)
            left &= ~inside
    return kept


def overlap_fraction(tiles: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return the larger of the share of each box in each tile and of each tile in each box: (T, B).

    Parameters
    ----------
    tiles, boxes
        (T, 4) and (B, 4) of xmin, ymin, xmax, ymax; far edges exclusive.
    """
    low = np.maximum(tiles[:, None, :2], boxes[None, :, :2])
    high = np.minimum(tiles[:, None, 2:], boxes[None, :, 2:])
    overlap = np.clip(high - low, 0, None).prod(-1)
    area_of_tiles, area_of_boxes = ((edges[:, 2:] - edges[:, :2]).prod(-1) for edges in (tiles, boxes))
    return overlap / np.minimum(area_of_tiles[:, None], np.maximum(area_of_boxes, 1)[None])


def tile_marks(
    x: np.ndarray, y: np.ndarray, size: np.ndarray, scores: np.ndarray, boxes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the tiles of a film that are marks: scores, which of the (B, 4) boxes they hit, and which are false positives.

    A mark hits a box where at least half of the box lies in the tile, or half of the tile in the box, the rule by which tiles
    are labelled. A mark that touches a box by less is neither a hit nor a false positive.
    """
    kept = suppressed(x, y, size, scores)
    fraction = overlap_fraction(np.stack([x, y, x + size, y + size], 1)[kept], boxes)
    return scores[kept], fraction >= HIT, np.all(fraction <= 0, axis=1)


def mark(tiles: pd.DataFrame, boxes: pd.DataFrame, images: pd.DataFrame, marks: Marks = tile_marks) -> Marked:
    """Tell hits and false positives apart; one mark may hit several boxes.

    Parameters
    ----------
    tiles
        ``image, _x, _y, _size, score`` of one class; a score may be missing.
    boxes
        ``image, xmin, ymin, xmax, ymax`` of the class.
    images
        The judged images: ``image, patient, breast``; what is on others counts nowhere.
    marks
        What makes marks of an image's tiles.
    """
    best = np.full(len(boxes), -np.inf)
    false: list[tuple[str, np.ndarray]] = []
    patients = images.set_index("image")["patient"]
    box_rows = dict(iter(boxes.reset_index(drop=True).groupby("image", sort=False)))
    for image, rows in tiles[tiles["image"].isin(patients.index) & tiles["score"].notna()].groupby("image", sort=False):
        x, y, size, scores = (rows[c].to_numpy(np.float64) for c in ("_x", "_y", "_size", "score"))
        mine = box_rows.get(image, boxes.iloc[:0])
        scores, hits, away = marks(x, y, size, scores, mine[["xmin", "ymin", "xmax", "ymax"]].to_numpy(np.float64))
        best[mine.index.to_numpy(int)] = np.where(hits, scores[:, None], -np.inf).max(0, initial=-np.inf)
        false.append((patients[image], scores[away]))
    lesions = boxes[["image"]].reset_index(drop=True).assign(score=best).merge(images, on="image")
    false_rows = pd.DataFrame(
        {
            "patient": np.repeat([patient for patient, _ in false], [len(scores) for _, scores in false]),
            "score": np.concatenate([np.empty(0), *(scores for _, scores in false)]),
        }
    )
    return Marked(lesions, false_rows, images)


def breasts_of(lesions: pd.DataFrame) -> pd.DataFrame:
    """Return one row per known breast with a lesion, with the highest score of any of its lesions in any view."""
    known = lesions[lesions["breast"] != ""]
    return known.groupby("breast", sort=False).agg(patient=("patient", "first"), score=("score", "max")).reset_index()


def curve(scores: np.ndarray, false: np.ndarray, images: int) -> tuple[np.ndarray, np.ndarray]:
    """Return false positives per image and sensitivity at each threshold, from the highest down, starting at (0, 0).

    Parameters
    ----------
    scores
        (L,) highest mark of each lesion, -inf where none hits it.
    false
        (F,) false positives.
    images
        Judged images.
    """
    cuts = np.unique(np.concatenate([scores[np.isfinite(scores)], false]))[::-1]
    found, wrong = (len(v) - np.searchsorted(np.sort(v), cuts, "left") for v in (scores, false))
    return np.append(0, wrong / images), np.append(0, found / len(scores))


def sensitivities(units: pd.DataFrame, marked: Marked, bootstrap: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return the sensitivity at each of :data:`RATES`, and in resamples of the judged images' patients.

    The highest among the thresholds with at most so many false positives per image, not interpolated.

    Parameters
    ----------
    units
        Lesions or breasts, at least one: ``patient, score``.
    marked
        False positives and images.
    bootstrap, seed
        Resamples.

    Returns
    -------
    values : numpy.ndarray
        (4,).
    drawn : numpy.ndarray
        (4, R), NaN where a resample has no lesion.
    """
    patients, group = np.unique(marked.images["patient"].to_numpy(str), return_inverse=True)
    place = {patient: i for i, patient in enumerate(patients)}
    of_unit, of_false = (rows["patient"].map(place).to_numpy(int) for rows in (units, marked.false))
    scores, false = units["score"].to_numpy(), marked.false["score"].to_numpy()
    hit = np.isfinite(scores)
    cuts, at = np.unique(scores[hit], return_inverse=True)
    below = np.searchsorted(cuts, false, side="right") - 1
    counted = below >= 0
    shape = len(cuts), len(patients)
    hits = csr_array((np.ones(hit.sum()), (at, of_unit[hit])), shape)
    wrong = csr_array((np.ones(counted.sum()), (below[counted], of_false[counted])), shape)
    all_units, all_images = (np.bincount(v, minlength=len(patients)).astype(float) for v in (of_unit, group))

    def values(counts: np.ndarray) -> np.ndarray:
        found, mistaken = (np.cumsum((steps @ counts.T)[::-1], 0) for steps in (hits, wrong))
        units_drawn, images = counts @ all_units, counts @ all_images
        best = [np.where(mistaken <= rate * images, found, 0).max(0, initial=0) for rate in RATES]
        return np.divide(best, units_drawn, out=np.full((len(RATES), len(counts)), np.nan), where=units_drawn > 0)

    rng = np.random.default_rng(seed)
    resamples = bootstrap if len(patients) > 1 else 0
    sizes = [min(_RESAMPLES, resamples - start) for start in range(0, resamples, _RESAMPLES)]
    drawn = [values(draw_patients(rng, len(patients), size)) for size in sizes]
    return values(np.ones((1, len(patients))))[:, 0], np.concatenate([np.empty((len(RATES), 0)), *drawn], 1)


def froc(
    predictions: Predictions,
    labels_path: Path,
    findings_path: Path,
    patient_column: str = "patient_id",
    bootstrap: int = 1000,
    marks: Marks = tile_marks,
) -> tuple[dict[str, Any], dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]]:
    """Return the FROC of each predicted class that has boxes.

    Judged are predicted images that the labels name and that have a box of the class or are negative: an image that is
    positive without a box, or of which nobody knows, has no false positives to count.

    Parameters
    ----------
    predictions
        Of tiles with their positions.
    labels_path
        The labels; ``laterality`` in them tells breasts apart.
    findings_path
        ``findings.parquet``: image_id, label, xmin, ymin, xmax, ymax in native pixels.
    patient_column
        Of the labels.
    bootstrap
        Resamples of patients.
    marks
        What makes marks of an image's tiles.

    Returns
    -------
    metrics : dict
        Class -> ``images``, ``false_positives_per_image`` (of all marks), what is left out, and ``lesion_wise`` and
        ``breast_wise``: ``count`` and ``sensitivity`` and ``intervals`` by false positives per image; None without any, and
        None for a class without boxes.
    curves : dict
        Class -> ``lesion_wise`` and ``breast_wise`` -> what :func:`curve` returns.

    Raises
    ------
    BadInput
        The predictions have no tiles with positions, or no class or image has a box.
    """
    tiles = _positioned(predictions)
    labels, class_names = read_label_table(labels_path, predictions.class_names)
    films = _described(tiles, labels, class_names, patient_column)
    images = films[films["predicted"]]
    findings = _boxes(findings_path, class_names, images["image"])
    metrics: dict[str, Any] = dict.fromkeys(class_names)
    curves = {}
    unnamed = int((~tiles["image"].drop_duplicates().isin(films["image"])).sum())
    for name in class_names:
        boxes = findings[findings["label"] == name]
        if not len(boxes):
            continue
        has_box = images["image"].isin(boxes["image"])
        judged = images[has_box | (images[_CLASS + name] == 0)]
        boxes_there = boxes[boxes["image"].isin(judged["image"])]
        marked = mark(tiles.assign(score=tiles[PROBABILITY + name]), boxes_there, judged[_ABOUT], marks)
        metrics[name], curves[name] = _judge(marked, bootstrap)
        lost = films.loc[~films["predicted"], "image"]
        metrics[name]["left_out"] = {
            "boxes_on_images_without_prediction": int(boxes["image"].isin(lost).sum()),
            "positive_images_without_box": int((~has_box & (images[_CLASS + name] == 1)).sum()),
            "images_without_label": int((~has_box & images[_CLASS + name].isna()).sum()) + unnamed,
        }
    return metrics, curves


def _boxes(path: Path, class_names: Sequence[str], images: pd.Series) -> pd.DataFrame:
    """Return the boxes with their ``image``; at least one is of a judged class and on one of the images."""
    findings = read_findings(path)
    findings["image"] = clean_ids(findings["image_id"])
    real = (findings["xmax"] > findings["xmin"]) & (findings["ymax"] > findings["ymin"])
    if not real.all():
        row = findings[~real].iloc[0]
        raise BadInput(
            f"--findings {path} row {row.name + 1}, image '{row.image}': xmin {row.xmin:g}, ymin {row.ymin:g}, xmax "
            f"{row.xmax:g}, ymax {row.ymax:g} is no box; correct or remove it"
        )
    mine = findings["label"].isin(class_names)
    if not mine.any():
        have = ", ".join(sorted(map(str, findings["label"].dropna().unique()))) or "none"
        raise BadInput(
            f"--findings {path}: no box has the label of a judged class ({', '.join(class_names)}); its labels are: {have}"
        )
    if not findings.loc[mine, "image"].isin(images).any():
        first = repr(findings.loc[mine, "image"].iloc[0]), repr(images.iloc[0]) if len(images) else "none"
        raise BadInput(
            f"--findings {path} has no box of a judged class on an image that is predicted and labelled (the first of each: "
            f"{' and '.join(first)}); give the findings of these images"
        )
    return findings


def froc_lines(metrics: Mapping[str, Any], title: str = "FROC") -> list[str]:
    """Return the figures as lines for the console."""
    lines = [f"{title}: sensitivity at {', '.join(f'{rate:g}' for rate in RATES)} false positives per image"]
    for name, figures in metrics.items():
        if figures is None:
            lines.append(f"  {name}: undefined, the findings have no box of it")
            continue
        for what, words in (("lesion_wise", "lesions"), ("breast_wise", "breasts")):
            found = figures[what]
            if found is None:
                why = "no box on a judged image" if what == "lesion_wise" else "no box on a breast of known patient and side"
                lines.append(f"  {name}, {words}: undefined, {why}")
                continue
            cells = []
            for rate, value in found["sensitivity"].items():
                limits = found["intervals"][rate]
                cells.append(f"{value:.3f}" + (f" ({limits[0]:.3f}-{limits[1]:.3f})" if limits else ""))
            lines.append(f"  {name}, {found['count']} {words} on {figures['images']} images: {', '.join(cells)}")
        lines += [f"  {name}: {count} {_LEFT_OUT[reason]}" for reason, count in figures["left_out"].items() if count]
    return lines


_ABOUT = ["image", "patient", "breast"]
_CLASS = "class:"  # column of the images' labels: a class may be called like the other columns
_LEFT_OUT = {
    "boxes_on_images_without_prediction": "boxes are on labelled images without prediction: not judged, which may flatter",
    "positive_images_without_box": "predicted images are positive but have no box: not judged",
    "images_without_label": "predicted images are not labelled: not judged",
}


def _judge(marked: Marked, bootstrap: int) -> tuple[dict[str, Any], dict[str, tuple[np.ndarray, np.ndarray]]]:
    images = len(marked.images)
    figures: dict[str, Any] = {"images": images, "marks_without_lesion": len(marked.false)}
    figures["false_positives_per_image"] = len(marked.false) / images if images else None
    curves = {}
    for what, units in (("lesion_wise", marked.lesions), ("breast_wise", breasts_of(marked.lesions))):
        figures[what] = None
        if len(units):
            values, drawn = sensitivities(units, marked, bootstrap)
            rates = [f"{rate:g}" for rate in RATES]
            figures[what] = {
                "count": len(units),
                "sensitivity": dict(zip(rates, map(float, values), strict=True)),
                "intervals": dict(zip(rates, map(interval, drawn), strict=True)),
            }
            curves[what] = curve(units["score"].to_numpy(), marked.false["score"].to_numpy(), images)
    return figures, curves


def _positioned(predictions: Predictions) -> pd.DataFrame:
    """Return the tiles with their image and native position."""
    table = predictions.table
    if predictions.level != TILE or not {"_x", "_y", "_size"} <= {*table}:
        raise BadInput(
            "--findings needs predictions of tiles with their columns x, y and size; give the predictions.parquet that 'infer' "
            f"wrote, not a table of {predictions.level}s"
        )
    tiles = table.assign(image=image_names(table, TILE))
    placed = tiles[["_x", "_y", "_size"]].notna().all(axis=1) & (tiles["_size"] > 0) & (tiles["image"] != "")
    if not placed.all():
        raise BadInput(
            f"--findings needs the position of each tile, but {int((~placed).sum())} of {len(tiles)} predictions have none "
            f"(the first: {tiles.loc[~placed, 'key'].iloc[0]!r}), as tile images have not; predict films or shards"
        )
    return tiles


def _described(tiles: pd.DataFrame, labels: pd.DataFrame, class_names: Sequence[str], patient_column: str) -> pd.DataFrame:
    """Return one row per film that the labels name: ``image, patient, breast, predicted`` and its labels, ``class:<name>``.

    Films of splits of which nothing was predicted are left out, as they are for all other figures.
    """
    films = clean_ids(labels["image_id"]) if "image_id" in labels else pd.Series("", labels.index)
    if "tile_path" in labels:
        films = films.where(films != "", [film_of_tile(path) or "" for path in clean_ids(labels["tile_path"])])
    own = dict(zip(tiles["image"], tiles["patient_id"] if "patient_id" in tiles else [""] * len(tiles), strict=True))
    if "split" in labels:
        asked_for = labels["split"].isin(labels.loc[films.isin(own.keys()), "split"].unique())
        labels, films = labels[asked_for], films[asked_for]
    labels, films = labels[films != ""], films[films != ""]
    names, first, units = np.unique(films.to_numpy(str), return_index=True, return_inverse=True)
    values = labels_of_units(labels[list(class_names)].to_numpy(np.float64), units)
    images = pd.DataFrame(values, columns=[_CLASS + name for name in class_names]).assign(image=names)
    of_labels, sides = (
        clean(labels[source]).to_numpy(str)[first] if source in labels else np.full(len(names), "")
        for source, clean in ((patient_column, clean_patients), ("laterality", clean_sides))
    )
    patients = np.array([own.get(name) or of_label for name, of_label in zip(names, of_labels, strict=True)], dtype=str)
    known = np.where(patients != "", np.char.add("patient:", patients), np.char.add("image:", names))
    return images.assign(patient=known, breast=known_breast(patients, sides), predicted=images["image"].isin(own.keys()))
