"""Calibrations of tiles, images and breasts fitted on validation tiles, and figures that the fit does not flatter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mammostream.train.levels.aggregation import unit_logits
from mammostream.train.levels.calibration import BREAST, IMAGE, PROB, TILE, Calibrations, fit_calibration
from mammostream.train.levels.labels import labels_of_units

FOLDS = 5


@dataclass(frozen=True)
class TileLogits:
    """Tiles of a validation: N rows, C classes.

    Attributes
    ----------
    labels, logits
        (N, C); labels are 1, 0 and NaN for a missing one.
    images, breasts
        (N,) image and breast of each tile; "" if unknown.
    groups
        (N,) what a fit must not be judged on: the tile's patient, or its film if the patient is unknown.
    """

    labels: np.ndarray
    logits: np.ndarray
    images: np.ndarray
    breasts: np.ndarray
    groups: np.ndarray

    def take(self, rows: np.ndarray) -> TileLogits:
        """Return some of the rows, by a mask."""
        return TileLogits(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))

    def units(self, level: str) -> np.ndarray:
        """Return the (N,) names of the images or breasts."""
        return self.images if level == IMAGE else self.breasts


@dataclass(frozen=True)
class Judged:
    """Scores of one level as probabilities, next to their labels: (N, C) each, and the (N,) groups of the rows.

    ``found`` says which probabilities are at or above their threshold, 0.5 if none was fitted.
    """

    labels: np.ndarray
    probabilities: np.ndarray
    found: np.ndarray
    groups: np.ndarray


def fit_levels(tiles: TileLogits) -> Calibrations:
    """Fit the calibration of tiles, and on the scores of the calibrated tiles those of images and breasts."""
    tile = fit_calibration(tiles.labels, tiles.logits)
    fitted: Calibrations = {TILE: {PROB: tile}}
    for level in (IMAGE, BREAST):
        named = tiles.units(level) != ""
        if named.any():
            _, units = np.unique(tiles.units(level)[named], return_inverse=True)
            labels = labels_of_units(tiles.labels[named], units)
            scores = unit_logits(_stored(tile(tiles.logits[named])), units)
            fitted[level] = {score: fit_calibration(labels, logits) for score, logits in scores.items()}
    return fitted


def judge(tiles: TileLogits, calibrations: Calibrations) -> dict[tuple[str, str], Judged]:
    """Return the probabilities of each level and score, such as ``("image", "max")``."""
    tile = calibrations[TILE][PROB]
    probabilities = _stored(tile(tiles.logits))
    found = {(TILE, PROB): (tile, tiles.labels, probabilities, tiles.groups)}
    for level in set(calibrations) - {TILE}:
        named = tiles.units(level) != ""
        _, first, units = np.unique(tiles.units(level)[named], return_index=True, return_inverse=True)
        labels, groups = labels_of_units(tiles.labels[named], units), tiles.groups[named][first]
        for score, logits in unit_logits(probabilities[named], units).items():
            calibration = calibrations[level][score]
            found[level, score] = (calibration, labels, calibration(logits), groups)
    return {
        key: Judged(labels, p, p >= [0.5 if t is None else t for t in calibration.thresholds], groups)
        for key, (calibration, labels, p, groups) in found.items()
    }


def cross_fitted(tiles: TileLogits, folds: int = FOLDS, seed: int = 0) -> tuple[dict[tuple[str, str], Judged], int]:
    """Return what :func:`judge` does, each group judged by calibrations and thresholds fitted on other groups only.

    Figures of calibrations on the data that they were fitted on are flattered; these are not.

    Returns
    -------
    judged, folds
        Empty and 0 if there are fewer than two groups.
    """
    unique, group = np.unique(tiles.groups, return_inverse=True)
    folds = min(folds, len(unique))
    if folds < 2:
        return {}, 0
    fold_of = (np.random.default_rng(seed).permutation(len(unique)) % folds)[group]
    parts: dict[tuple[str, str], list[Judged]] = {}
    for fold in range(folds):
        calibrations = fit_levels(tiles.take(fold_of != fold))
        for key, judged in judge(tiles.take(fold_of == fold), calibrations).items():
            parts.setdefault(key, []).append(judged)
    fields: Any = Judged.__dataclass_fields__
    joined = {key: Judged(*(np.concatenate([getattr(p, f) for p in some]) for f in fields)) for key, some in parts.items()}
    return joined, folds


def _stored(probabilities: np.ndarray) -> np.ndarray:
    """Return probabilities as precise as tables hold them: images are scored on those."""
    return probabilities.astype(np.float32).astype(np.float64)
