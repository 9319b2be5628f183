"""Operating points that are asked for by sensitivity or specificity: where the threshold is chosen, and what it achieves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mammostream.common.errors import BadInput
from mammostream.train.evaluate.figures import SENSITIVITY, Point
from mammostream.train.evaluate.matching import Matched
from mammostream.train.evaluate.metrics import bootstrap_draws, interval

_VALIDATION = "val"
# Figure -> the counts of the judged rows that it is a ratio of.
_RATIOS = {
    "sensitivity": ("true_positives", "positives"),
    "specificity": ("true_negatives", "negatives"),
    "ppv": ("true_positives", "found"),
    "npv": ("true_negatives", "not_found"),
}


@dataclass(frozen=True)
class Choice:
    """On which rows thresholds are chosen, and which rows they are judged on.

    Attributes
    ----------
    labels, probabilities
        (M, C) of the rows that they are chosen on.
    judged
        (N,) which of the evaluated rows they are judged on.
    where
        What they are chosen on, in words.
    warning
        Why the figures may be flattered, or "".
    """

    labels: np.ndarray
    probabilities: np.ndarray
    judged: np.ndarray
    where: str
    warning: str = ""


def choose_on(matched: Matched, validation: Matched | None, source: str = "") -> Choice:
    """Return the rows that thresholds are chosen on: those given, else the validation split's, else the judged ones.

    Parameters
    ----------
    matched
        What is evaluated.
    validation
        Predictions of validation patients with their labels, or None.
    source
        What `validation` is, in words.

    Raises
    ------
    BadInput
        `validation` is of another level or lacks a class.
    """
    everything = np.ones(len(matched.labels), bool)
    if validation is not None:
        if validation.level != matched.level or not set(matched.class_names) <= set(validation.class_names):
            raise BadInput(
                f"--choose-on {source} has {validation.level}s with the classes {', '.join(validation.class_names)}, but "
                f"{matched.level}s with {', '.join(matched.class_names)} are judged; give predictions of the same kind"
            )
        columns = [validation.class_names.index(name) for name in matched.class_names]
        shared = len(set(validation.patients) & set(matched.patients))
        warning = (
            f"warning: {shared} of the {len(set(matched.patients))} judged patients are among those that the thresholds of "
            "--at were chosen on: their figures are flattered; choose on other patients"
            if shared
            else ""
        )
        where = f"{len(validation.labels)} {matched.level}s of {source}"
        return Choice(validation.labels[:, columns], validation.probabilities[:, columns], everything, where, warning)
    held = matched.rows["split"].to_numpy(str) == _VALIDATION
    if held.any() and not held.all():
        where = f"the {held.sum()} {matched.level}s of split '{_VALIDATION}', and judged on the other {(~held).sum()}"
        return Choice(matched.labels[held], matched.probabilities[held], ~held, where)
    return Choice(
        matched.labels,
        matched.probabilities,
        everything,
        f"the {len(matched.labels)} {matched.level}s that they are judged on",
        "warning: the thresholds of --at are chosen on the same rows that they are judged on: their figures are flattered; "
        "give predictions of validation patients with --choose-on",
    )


def threshold_at(labels: np.ndarray, probabilities: np.ndarray, point: Point) -> float | None:
    """Return the threshold that reaches a sensitivity or specificity and costs the other least; None without such rows.

    Parameters
    ----------
    labels
        (N,) of 0, 1 and NaN.
    probabilities
        (N,); one of at least the threshold counts as found.
    point
        Sensitivity: the highest score that finds at least this share of the positives. Specificity: the lowest score that
        finds at most the rest of the negatives; just above all scores where none does.
    """
    mine = np.sort(probabilities[labels == (point.kind == SENSITIVITY)])[::-1]
    if not len(mine):
        return None
    if point.kind == SENSITIVITY:
        return float(mine[math.ceil(point.value * len(mine) - 1e-9) - 1])
    allowed = math.floor((1 - point.value) * len(mine) + 1e-9)
    scores = probabilities[~np.isnan(labels)]
    if allowed >= len(mine):
        return float(scores.min())
    above = scores[scores > mine[allowed]]
    return float(above.min() if len(above) else np.nextafter(mine[allowed], np.inf))


def operating_points(matched: Matched, choice: Choice, points: Sequence[Point], bootstrap: int = 1000) -> dict[str, Any]:
    """Return what the wanted points achieve on the judged rows, with 95 % intervals over their patients.

    The thresholds are held fixed while resampling: the intervals are of the judged patients, not of the choice.

    Returns
    -------
    dict
        ``chosen_on`` and ``warning``; ``points``: point (``sensitivity=0.9``) -> class -> ``threshold``, ``sensitivity``,
        ``specificity``, ``ppv`` and ``npv``, their ``intervals`` and counts, and ``chosen`` (sensitivity and specificity on
        the rows that the threshold was chosen on). None where undefined.
    """
    result: dict[str, dict[str, Any]] = {}
    for point in points:
        result[str(point)] = {}
        for c, name in enumerate(matched.class_names):
            threshold = threshold_at(choice.labels[:, c], choice.probabilities[:, c], point)
            figures: dict[str, Any] = dict.fromkeys(("threshold", *_RATIOS)) | {"intervals": {}, "chosen": None}
            if threshold is not None:
                judged = choice.judged
                figures = {"threshold": threshold} | _achieved(
                    matched.labels[judged, c], matched.probabilities[judged, c], threshold, matched.patients[judged], bootstrap
                )
                chosen = _counts(choice.labels[:, c], choice.probabilities[:, c], threshold)
                figures["chosen"] = {figure: _ratio(chosen, figure) for figure in ("sensitivity", "specificity")}
            result[str(point)][name] = figures
    return {"chosen_on": choice.where, "warning": choice.warning or None, "points": result}


def operating_lines(found: Mapping[str, Any]) -> list[str]:
    """Return the operating points as lines for the console."""
    lines = [found["warning"]] if found["warning"] else []
    lines.append(f"operating points, thresholds chosen on {found['chosen_on']}:")
    for point, classes in found["points"].items():
        for name, figures in classes.items():
            if figures["threshold"] is None:
                lines.append(
                    f"  {name} at {point}: undefined, no {'positive' if SENSITIVITY in point else 'negative'} to choose by"
                )
                continue
            cells = (f"{figure} {_cell(figures, figure)}" for figure in ("sensitivity", "specificity", "ppv"))
            lines.append(f"  {name} at {point}: threshold {figures['threshold']:.4f}, {', '.join(cells)}")
    return lines


def _cell(figures: Mapping[str, Any], name: str) -> str:
    if figures[name] is None:
        return "undefined"
    limits = figures["intervals"].get(name)
    return f"{figures[name]:.3f}" + (f" ({limits[0]:.3f}-{limits[1]:.3f})" if limits else "")


def _counts(labels: np.ndarray, probabilities: np.ndarray, threshold: float) -> dict[str, int]:
    return {name: int(rows.sum()) for name, rows in _rows(labels, probabilities, threshold).items()}


def _rows(labels: np.ndarray, probabilities: np.ndarray, threshold: float) -> dict[str, np.ndarray]:
    positive, negative, found = labels == 1, labels == 0, probabilities >= threshold
    return {
        "positives": positive,
        "negatives": negative,
        "true_positives": positive & found,
        "true_negatives": negative & ~found,
        "found": (positive | negative) & found,
        "not_found": (positive | negative) & ~found,
    }


def _ratio(counts: Mapping[str, int], figure: str) -> float | None:
    part, whole = _RATIOS[figure]
    return counts[part] / counts[whole] if counts[whole] else None


def _achieved(
    labels: np.ndarray, probabilities: np.ndarray, threshold: float, patients: np.ndarray, bootstrap: int
) -> dict[str, Any]:
    rows = _rows(labels, probabilities, threshold)
    counts = _counts(labels, probabilities, threshold)
    figures: dict[str, Any] = {figure: _ratio(counts, figure) for figure in _RATIOS}
    none = np.zeros((len(labels), 0))
    sums = bootstrap_draws(none, none, np.zeros(0), patients, bootstrap, sums=np.column_stack(list(rows.values()))).sums
    drawn = dict(zip(rows, sums.T, strict=True))
    with np.errstate(invalid="ignore", divide="ignore"):
        limits = {figure: interval(drawn[part] / drawn[whole]) for figure, (part, whole) in _RATIOS.items()}
    figures["intervals"] = {figure: limits[figure] if figures[figure] is not None else None for figure in _RATIOS}
    return figures | counts
