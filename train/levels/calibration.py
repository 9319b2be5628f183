"""What a score means: per class the slope and intercept that turn it into a probability, and the decision threshold.

A network that learns with weights for positive labels, label smoothing or a focal loss does not output probabilities, even at
the optimum of its loss. One temperature for all classes cannot undo that: it leaves a logit of 0 at probability 0.5. Slope and
intercept per class can (Platt 1999, "Probabilistic outputs for support vector machines").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import expit, log_expit, logit

from mammostream.common.errors import BadInput

TILE, IMAGE, BREAST, PATIENT = "tile", "image", "breast", "patient"
PROB = "prob"  # the one score of a tile
FEW = 10
"""Below so many positive or negative labels, a class's slope is not fitted."""
FITTED, AT_BOUND, SHIFTED, UNFITTED, GIVEN = "fitted", "at bound", "intercept only", "not fitted", "temperature"
_SLOPES = (1e-3, 100.0)  # of the standardised logits


@dataclass(frozen=True)
class Calibration:
    """Turns logits of C classes into probabilities ``sigmoid(slope * logit + intercept)``.

    Attributes
    ----------
    slope, intercept
        (C,); slopes are above 0, so that the order of the scores stays.
    thresholds
        The probability from which each class counts as found; None if none was fitted.
    fits
        How each class was fitted: ``fitted`` (slope and intercept), ``at bound`` (the slope hit the end of its range: the
        scores hardly tell the class apart, or do so perfectly), ``intercept only`` (too few positives or negatives for a
        slope), ``not fitted`` (no positives or no negatives) or ``temperature`` (the slope is one over a given temperature).
    positives, negatives
        Numbers of labels that each class was fitted on.
    """

    slope: np.ndarray
    intercept: np.ndarray
    thresholds: tuple[float | None, ...]
    fits: tuple[str, ...]
    positives: tuple[int, ...] = ()
    negatives: tuple[int, ...] = ()

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        """Return the probabilities (N, C), float64, of logits (N, C)."""
        return expit(self.slope * np.asarray(logits, np.float64) + self.intercept)

    def take(self, classes: Sequence[int]) -> Calibration:
        """Return the calibration of some of the classes, in this order."""
        rows = list(classes)
        pick = ((getattr(self, name) or (0,) * len(self.fits)) for name in ("thresholds", "fits", "positives", "negatives"))
        lists: list[Any] = [tuple(values[row] for row in rows) for values in pick]
        return Calibration(self.slope[rows], self.intercept[rows], *lists)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain lists, for checkpoints and JSON."""
        lists = {name: list(getattr(self, name)) for name in ("thresholds", "fits", "positives", "negatives")}
        return {"slope": self.slope.tolist(), "intercept": self.intercept.tolist()} | lists

    @classmethod
    def of_dict(cls, fields: Mapping[str, Any]) -> Calibration:
        """Return the calibration that :meth:`as_dict` gave.

        Raises
        ------
        ValueError
            A field is not a value per class.
        """
        lists: dict[str, Any] = {name: tuple(fields[name]) for name in ("thresholds", "fits", "positives", "negatives")}
        slope, intercept = (np.array(fields[name], np.float64) for name in ("slope", "intercept"))
        count = len(lists["fits"])
        if not slope.shape == intercept.shape == (count,) or {len(values) for values in lists.values()} - {0, count}:
            raise ValueError(f"the calibration of {count} classes has fields of other lengths")
        if not (np.isfinite(slope).all() and np.isfinite(intercept).all() and (slope > 0).all()):
            raise ValueError("the calibration has a slope or intercept that is no number, or a slope of 0 or less")
        if not all(value is None or 0 <= value <= 1 for value in lists["thresholds"]):
            raise ValueError("the calibration has a threshold outside 0-1")
        return cls(slope, intercept, **lists)

    def maps_as(self, other: Calibration) -> bool:
        """Return whether both make the same probabilities of the same logits; thresholds are not compared."""
        return bool(np.array_equal(self.slope, other.slope) and np.array_equal(self.intercept, other.intercept))

    @classmethod
    def of_temperature(cls, temperature: float, thresholds: Sequence[float | None]) -> Calibration:
        """Return a calibration that divides all logits by a temperature."""
        count = len(thresholds)
        return cls(np.full(count, 1 / temperature), np.zeros(count), tuple(thresholds), (GIVEN,) * count)


# Level -> score -> its calibration, such as ``["image"]["max"]``.
Calibrations = dict[str, dict[str, Calibration]]


def stored_calibrations(checkpoint: Mapping[str, Any]) -> Calibrations:
    """Return the calibrations of a classifier's checkpoint; one of an earlier version has a temperature for its tiles.

    Raises
    ------
    BadInput
        The checkpoint was saved within an epoch, so that nothing was fitted for its weights.
    """
    if checkpoint.get("unvalidated"):
        raise BadInput(
            f"this {checkpoint['arch']} was saved within epoch {checkpoint['epoch'] + 1} of its fine-tuning, so it has neither "
            "calibration nor thresholds; use best_classification_model.pth, or go on with 'finetune --resume auto'"
        )
    count = len(checkpoint["class_names"])
    if stored := checkpoint.get("calibration"):
        calibrations = calibrations_of(stored)
        if any(len(each.fits) != count for scores in calibrations.values() for each in scores.values()):
            raise ValueError(f"a calibration is not of the {count} classes")
        calibrations[TILE][PROB]  # which must be there
        return calibrations
    thresholds = [*(checkpoint.get("thresholds") or ()), *[None] * count][:count]
    return {TILE: {PROB: Calibration.of_temperature(float(checkpoint.get("temperature") or 1.0), thresholds)}}


def calibrations_of(stored: Mapping[str, Mapping[str, Any]]) -> Calibrations:
    """Return calibrations from the plain form that :func:`plain` makes of them."""
    return {level: {score: Calibration.of_dict(f) for score, f in scores.items()} for level, scores in stored.items()}


def plain(calibrations: Calibrations) -> dict[str, dict[str, dict[str, Any]]]:
    """Return calibrations as plain types, for checkpoints, JSON and the metadata of tables."""
    return {level: {score: each.as_dict() for score, each in scores.items()} for level, scores in calibrations.items()}


def fit_calibration(labels: np.ndarray, logits: np.ndarray) -> Calibration:
    """Fit slope, intercept and threshold of each class, to be done on validation data.

    The slope and intercept have the lowest log loss of Platt's targets, ``(P + 1) / (P + 2)`` for positives and
    ``1 / (N + 2)`` for negatives, which keep the slope finite if the classes can be separated. With fewer than :data:`FEW`
    positives or negatives only the intercept is fitted, so that the mean probability is the share of positives.

    Parameters
    ----------
    labels
        (N, C) of 0, 1 and NaN for a missing label.
    logits
        (N, C).

    Raises
    ------
    ValueError
        The shapes differ.
    """
    labels, logits = np.asarray(labels, np.float64), np.asarray(logits, np.float64)
    if labels.shape != logits.shape:
        raise ValueError(f"labels {labels.shape} and logits {logits.shape}")
    classes = [_fit_class(y[~np.isnan(y)], z[~np.isnan(y)]) for y, z in zip(labels.T, logits.T, strict=True)]
    slope, intercept = (np.array([fit[i] for fit in classes]) for i in (0, 1))
    thresholds = fit_thresholds(labels, expit(slope * logits + intercept))
    counts = ((labels == value).sum(0).tolist() for value in (1, 0))
    return Calibration(slope, intercept, tuple(thresholds), tuple(fit[2] for fit in classes), *map(tuple, counts))


def _fit_class(y: np.ndarray, z: np.ndarray) -> tuple[float, float, str]:
    """Return slope, intercept and how they were fitted, for labels (N,) without NaN."""
    from scipy.optimize import brentq, minimize

    positives, negatives = int(y.sum()), int(len(y) - y.sum())
    if not min(positives, negatives) or not np.isfinite(z).all():
        return 1.0, 0.0, UNFITTED
    if min(positives, negatives) < FEW or z.std() == 0:
        share = positives / len(y)
        reach = np.abs(z).max() + abs(logit(share)) + 1
        return 1.0, float(brentq(lambda shift: expit(z + shift).mean() - share, -reach, reach)), SHIFTED
    centre, spread = z.mean(), z.std()
    x = (z - centre) / spread
    target = np.where(y == 1, (positives + 1) / (positives + 2), 1 / (negatives + 2))

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        t = parameters[0] * x + parameters[1]
        apart = expit(t) - target
        return -float(target @ log_expit(t) + (1 - target) @ log_expit(-t)) / len(t), np.array([apart @ x, apart.sum()]) / len(
            t
        )

    start = np.array([1.0, logit(target.mean())])
    options = {"maxiter": 1000, "ftol": 1e-14, "gtol": 1e-9}
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=[_SLOPES, (None, None)], options=options).x
    slope, intercept = float(found[0] / spread), float(found[1] - found[0] * centre / spread)
    low, high = _SLOPES
    return slope, intercept, FITTED if low * 1.01 < found[0] < high * 0.99 else AT_BOUND


def fit_thresholds(labels: np.ndarray, probabilities: np.ndarray) -> list[float | None]:
    """Return the threshold of each class with the highest balanced accuracy (Youden's J), to be fitted on validation.

    A threshold lies halfway between the lowest probability it takes for positive and the next one below, so that rounding
    moves no row across it. Of equally good ones it is the highest.

    Parameters
    ----------
    labels
        (N, C) of 0, 1 and NaN for a missing label.
    probabilities
        (N, C) in [0, 1].

    Returns
    -------
    list
        C thresholds; None where a class has one value only, or no threshold is better than chance.
    """
    from sklearn.metrics import roc_curve

    labels, probabilities = np.asarray(labels, np.float64), np.asarray(probabilities, np.float64)
    if labels.shape != probabilities.shape or labels.ndim != 2:
        raise ValueError(f"labels {labels.shape} and probabilities {probabilities.shape}")
    thresholds: list[float | None] = []
    for y, p in zip(labels.T, probabilities.T, strict=True):
        y, p = y[~np.isnan(y)], p[~np.isnan(y)]
        threshold = None
        if 0 < y.sum() < len(y) and np.isfinite(p).all():
            fpr, tpr, cuts = roc_curve(y, p, drop_intermediate=False)
            gain = np.round(tpr - fpr, 12)  # rounding alone makes none better
            best = np.argmax(gain)
            if gain[best] > 0:  # then it is not the last cut, which takes all for positive
                threshold = float((cuts[best] + cuts[best + 1]) / 2)
        thresholds.append(threshold)
    return thresholds


def doubts(calibration: Calibration, class_names: Sequence[str], what: str) -> list[str]:
    """Return a line for each class whose calibration is weak, and why."""
    why = {
        AT_BOUND: "the slope of its calibration hit the end of its range",
        SHIFTED: f"fewer than {FEW} positives or negatives: only the intercept of its calibration was fitted",
        UNFITTED: "no positives or no negatives: not calibrated",
    }
    counts = zip(class_names, calibration.fits, calibration.positives, calibration.negatives, strict=False)
    return [f"{what} {name}: {why[fit]} ({p} positive, {n} negative)" for name, fit, p, n in counts if fit in why]
