"""Metrics: multi-label classification with missing labels, intervals over patients, calibration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from scipy.sparse import csr_array
from sklearn.metrics import average_precision_score, balanced_accuracy_score, roc_auc_score, roc_curve

CALIBRATION_BINS = 15  # as Guo et al. 2017
_FALSE_POSITIVE_RATE = 0.1  # 90 % specificity
_OF_ONE_VALUE = ("accuracy", "brier", "ece")  # defined where a class has one value only, too
_PER_CLASS = ("auc", "ap", "sensitivity_at_90_specificity", "balanced_accuracy", *_OF_ONE_VALUE)
MEANS = {"mean_auc": "auc", "mean_ap": "ap", "brier": "brier", "ece": "ece"}
_CELLS = 1 << 22  # numbers in memory at a time while bootstrapping


class ExtraFigure(Protocol):
    """A figure of a class that is computed on request only, such as :class:`mammostream.train.evaluate.figures.PartialAUC`."""

    @property
    def name(self) -> str:
        """Its key in ``metrics.json``."""

    @property
    def title(self) -> str:
        """Its column on the console."""

    def prepare(
        self, labels: np.ndarray, probabilities: np.ndarray, group: np.ndarray, groups: int
    ) -> Callable[[np.ndarray], np.ndarray]:
        """Return what gives the figure from (R, G) counts of the groups: (R,), NaN where undefined.

        Takes (N,) labels of 0 and 1, their finite probabilities and the group, 0 to `groups` - 1, of each row.
        """


def evaluate_predictions(
    labels: np.ndarray,
    probabilities: np.ndarray,
    class_names: Sequence[str],
    patients: np.ndarray,
    thresholds: Sequence[float | None] | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
    extra: Sequence[ExtraFigure] = (),
) -> dict[str, Any]:
    """Return :func:`classification_metrics` with 95 % intervals over patients.

    Tiles of one film, and films of one patient, resemble each other: resampling them singly would give intervals that are
    too narrow. So whole patients are drawn, with replacement (the cluster bootstrap, Davison and Hinkley 1997, section 3.8),
    the same ones for each class. A resample in which a figure is undefined is left out of that figure's interval; a mean over
    classes is taken over those that the resample defines.

    Parameters
    ----------
    labels, probabilities, class_names, thresholds
        See :func:`classification_metrics`.
    patients
        (N,) patient of each row, or whatever else the rows depend on.
    bootstrap
        Resamples; 0 for no intervals.
    seed
        Seed of the resampling; the same seed gives the same intervals.
    extra
        Further figures of each class.

    Returns
    -------
    dict
        That of :func:`classification_metrics`; ``intervals`` in it and in each class: figure -> [low, high], or None where
        the figure itself is None or there are fewer than two patients; ``patients`` and ``bootstrap``: how many.

    Raises
    ------
    ValueError
        The shapes do not fit each other, or a label is not 0, 1 or NaN.
    """
    metrics = classification_metrics(labels, probabilities, class_names, thresholds)
    labels, probabilities = np.asarray(labels, np.float64), np.asarray(probabilities, np.float64)
    if np.shape(patients) != (len(labels),):
        raise ValueError(f"patients {np.shape(patients)} for {len(labels)} rows")
    cuts = np.array([figures["threshold"] for figures in metrics["per_class"].values()])
    complete = ~np.isnan(labels).any(1)
    matches = ((probabilities >= cuts) == (labels == 1)).all(1) & complete
    draws = bootstrap_draws(labels, probabilities, cuts, patients, bootstrap, seed, extra, np.stack([matches, complete], 1))
    with np.errstate(invalid="ignore", divide="ignore"):
        overall = {name: mean_over_classes(draws.of(figure)) for name, figure in MEANS.items()}
        overall["exact_match"] = draws.sums[:, 0] / draws.sums[:, 1]
    for c, figures in enumerate(metrics["per_class"].values()):
        figures |= {figure.name: extra_value(figure, labels[:, c], probabilities[:, c]) for figure in extra}
        figures["intervals"] = {
            name: interval(draws.of(name)[c]) if figures[name] is not None else None for name in draws.names
        }
    metrics["intervals"] = {name: interval(values) if metrics[name] is not None else None for name, values in overall.items()}
    return metrics | {"patients": len(np.unique(patients)), "bootstrap": bootstrap}


class Draws(NamedTuple):
    """Figures of resamples of whole patients; the same patients for each class and figure."""

    names: tuple[str, ...]
    """F figures."""
    figures: np.ndarray
    """(C, F, R), NaN where a resample does not define one."""
    sums: np.ndarray
    """(R, K) sums over the drawn rows."""

    def of(self, name: str) -> np.ndarray:
        """Return one figure: (C, R)."""
        return self.figures[:, self.names.index(name)]


def bootstrap_draws(
    labels: np.ndarray,
    probabilities: np.ndarray,
    cuts: np.ndarray,
    patients: np.ndarray,
    bootstrap: int,
    seed: int = 0,
    extra: Sequence[ExtraFigure] = (),
    sums: np.ndarray | None = None,
) -> Draws:
    """Return the figures of each class in resamples of whole patients, none where there are fewer than two patients.

    Parameters
    ----------
    labels, probabilities
        (N, C); a missing label is NaN.
    cuts
        (C,) a probability of at least this is a positive.
    patients, bootstrap, seed, extra
        See :func:`evaluate_predictions`.
    sums
        (N, K) values whose sums over the drawn rows are wanted, too.
    """
    unique, group = np.unique(np.asarray(patients), return_inverse=True)
    gathered = [_gather(labels[:, c], probabilities[:, c], cuts[c], group, len(unique)) for c in range(labels.shape[1])]
    prepared = [
        [figure.prepare(*_known(labels[:, c], probabilities[:, c], group), len(unique)) for figure in extra]
        for c in range(labels.shape[1])
    ]
    rows = _sum_by(group, len(unique), np.zeros((len(labels), 0)) if sums is None else sums)
    resamples = bootstrap if len(unique) > 1 else 0
    names = (*_PER_CLASS, *(figure.name for figure in extra))
    drawn = np.full((labels.shape[1], len(names), resamples), np.nan)
    summed = np.full((resamples, rows.shape[1]), np.nan)
    rng = np.random.default_rng(seed)
    # An extra figure may need as many numbers as there are rows.
    step = max(1, _CELLS // max([1, len(unique), *(terms.hits.shape[0] for terms in gathered), len(labels) if extra else 1]))
    with np.errstate(invalid="ignore", divide="ignore"):  # what a resample does not define is NaN
        for part in (slice(start, min(start + step, resamples)) for start in range(0, resamples, step)):
            counts = draw_patients(rng, len(unique), part.stop - part.start)
            for c, terms in enumerate(gathered):
                drawn[c, : len(_PER_CLASS), part] = _resampled(terms, counts)
                for i, resampled in enumerate(prepared[c], len(_PER_CLASS)):
                    drawn[c, i, part] = resampled(counts)
            summed[part] = counts @ rows
    return Draws(names, drawn, summed)


def extra_value(figure: ExtraFigure, labels: np.ndarray, probabilities: np.ndarray) -> float | None:
    """Return an extra figure of all rows of a class, None where undefined."""
    with np.errstate(invalid="ignore", divide="ignore"):
        (value,) = figure.prepare(*_known(labels, probabilities, np.zeros(len(labels), int)), 1)(np.ones((1, 1)))
    return None if np.isnan(value) else float(value)


def classification_metrics(
    labels: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str], thresholds: Sequence[float | None] | None = None
) -> dict[str, Any]:
    """Return per-class and mean metrics of a multi-label classifier, as plain types without NaN.

    Parameters
    ----------
    labels
        (N, C) of 0, 1 and NaN for a missing label, which counts nowhere.
    probabilities
        (N, C) in [0, 1].
    class_names
        C names.
    thresholds
        C, as :func:`mammostream.train.levels.calibration.fit_thresholds` returns them: a probability of at least this is a
        positive. None, for one class or for all, is 0.5.

    Returns
    -------
    dict
        ``per_class``: name -> ``auc``, ``ap`` (average precision), ``sensitivity_at_90_specificity`` (the highest among the
        thresholds of at least that specificity, not interpolated), ``balanced_accuracy`` and ``accuracy`` at ``threshold``,
        ``brier``, ``ece`` (see :func:`expected_calibration_error`), ``positives``, ``negatives``;
        ``mean_auc``, ``mean_ap``, ``brier``, ``ece``: the mean over the classes that have one;
        ``exact_match``: share of the rows without a missing label whose labels are all predicted; ``rows``: N.
        None where undefined: all of a class without labels or with probabilities that are not finite; but for accuracy,
        Brier score and ECE, a class with one value only; a mean over no class; an exact match without a complete row.

    Raises
    ------
    ValueError
        The shapes do not fit each other, or a label is not 0, 1 or NaN.
    """
    labels, probabilities = np.asarray(labels, np.float64), np.asarray(probabilities, np.float64)
    if labels.shape != probabilities.shape or labels.ndim != 2 or labels.shape[1] != len(class_names):
        raise ValueError(f"labels {labels.shape} and probabilities {probabilities.shape} for {len(class_names)} classes")
    thresholds = [None] * len(class_names) if thresholds is None else thresholds
    if len(thresholds) != len(class_names):
        raise ValueError(f"{len(thresholds)} thresholds for {len(class_names)} classes")
    limits = np.array([0.5 if t is None else t for t in thresholds])
    known = ~np.isnan(labels)
    if not np.isin(labels[known], (0, 1)).all():
        raise ValueError("labels must be 0, 1 or NaN")

    per_class: dict[str, dict[str, Any]] = {}
    for c, name in enumerate(class_names):
        y, p = labels[known[:, c], c], probabilities[known[:, c], c]
        figures: dict[str, Any] = dict.fromkeys(_PER_CLASS)
        if len(y) and np.isfinite(p).all():
            predicted = p >= limits[c]
            figures["accuracy"] = float((predicted == y).mean())
            figures["brier"] = float(np.mean((p - y) ** 2))
            figures["ece"] = expected_calibration_error(y, p)
            if 0 < y.sum() < len(y):
                fpr, tpr, _ = roc_curve(y, p, drop_intermediate=False)  # a point that it drops may be the best
                figures["auc"] = float(roc_auc_score(y, p))
                figures["ap"] = float(average_precision_score(y, p))
                figures["sensitivity_at_90_specificity"] = float(tpr[fpr <= _FALSE_POSITIVE_RATE].max())
                figures["balanced_accuracy"] = float(balanced_accuracy_score(y, predicted))
        figures |= {"positives": int((y == 1).sum()), "negatives": int((y == 0).sum()), "threshold": float(limits[c])}
        per_class[name] = figures

    complete = known.all(1)
    countable = complete.any() and np.isfinite(probabilities[complete]).all()
    matches = ((probabilities >= limits) == (labels == 1)).all(1)
    means = {name: _mean([m[figure] for m in per_class.values()]) for name, figure in MEANS.items()}
    exact_match = float(matches[complete].mean()) if countable else None
    return {"per_class": per_class, "exact_match": exact_match, "rows": len(labels)} | means


def expected_calibration_error(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Return the mean distance of probability and share of positives over 15 bins of equal width (Guo et al. 2017).

    Parameters
    ----------
    labels
        (N,) of 0 and 1, N of at least 1.
    probabilities
        (N,) in [0, 1].
    """
    mean_probability, share, count = reliability(labels, probabilities)
    return float((np.abs(mean_probability - share) * count).sum() / count.sum())


def reliability(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return mean probability, share of positives and number of rows of each bin of probability that has any.

    Parameters
    ----------
    labels
        (N,) of 0 and 1.
    probabilities
        (N,) in [0, 1].

    Returns
    -------
    mean_probability, share, count
        (B,) each, ascending; B of at most :data:`CALIBRATION_BINS`.
    """
    bins = _bin_of(probabilities)
    count = np.bincount(bins)
    held = count > 0
    sums = (np.bincount(bins, weights=values)[held] for values in (probabilities, labels))
    mean_probability, share = (total / count[held] for total in sums)
    return mean_probability, share, count[held]


def _mean(values: list[float | None]) -> float | None:
    """Return the mean of the values that are not None, or None."""
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None


def _bin_of(probabilities: np.ndarray) -> np.ndarray:
    return np.clip(np.ceil(probabilities * CALIBRATION_BINS).astype(int) - 1, 0, CALIBRATION_BINS - 1)


def draw_patients(rng: np.random.Generator, groups: int, resamples: int) -> np.ndarray:
    """Return how often each group is drawn in each resample: (resamples, groups) float64."""
    draws = rng.integers(groups, size=(resamples, groups)) + groups * np.arange(resamples)[:, None]
    return np.bincount(draws.ravel(), minlength=resamples * groups).reshape(resamples, groups).astype(np.float64)


def _sum_by(group: np.ndarray, groups: int, values: np.ndarray) -> np.ndarray:
    """Return the sums of (N, K) values within each group: (groups, K)."""
    return _counts_by(group, np.arange(len(group)), (groups, len(group))) @ values.astype(np.float64)


def _counts_by(place: np.ndarray, column: np.ndarray, shape: tuple[int, int]) -> csr_array:
    """Return how many rows lie at each place in each column."""
    return csr_array((np.ones(len(place)), (place, column)), shape)


class _Gathered(NamedTuple):
    """One class's rows, gathered by group once: a resample only changes how often each group counts."""

    hits: csr_array
    """(K, G) positives at each of their K distinct scores."""
    false: csr_array
    """(K, G) negatives from each of those scores up to the next."""
    tied: csr_array
    """(K, G) negatives at each of those scores exactly."""
    sums: np.ndarray
    """(G, 5 + bins): positives, negatives, those of each found rightly, squared error, calibration error by bin."""


def _known(labels: np.ndarray, probabilities: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the rows of a class that have a label; none if one of their probabilities is not finite."""
    known = ~np.isnan(labels)
    known &= np.isfinite(probabilities[known]).all()  # else the class counts as one without labels
    return labels[known], probabilities[known], group[known]


def _gather(labels: np.ndarray, probabilities: np.ndarray, threshold: float, group: np.ndarray, groups: int) -> _Gathered:
    y, p, group = _known(labels, probabilities, group)
    positive, found = y == 1, p >= threshold
    scores, at = np.unique(p[positive], return_inverse=True)
    below = np.searchsorted(scores, p, side="right") - 1  # the highest of the scores that is not above
    false = ~positive & (below >= 0)
    tied = false & np.isin(p, scores)
    shape = (len(scores), groups)
    terms = [positive, ~positive, positive & found, ~positive & ~found, (p - y) ** 2]
    in_bin = np.eye(CALIBRATION_BINS)[_bin_of(p)]
    return _Gathered(
        _counts_by(at, group[positive], shape),
        _counts_by(below[false], group[false], shape),
        _counts_by(below[tied], group[tied], shape),
        _sum_by(group, groups, np.column_stack([*terms, in_bin * (p - y)[:, None]])),
    )


def _resampled(terms: _Gathered, counts: np.ndarray) -> np.ndarray:
    """Return a class's figures for (R, G) counts of the groups: (7, R) in the order of ``_PER_CLASS``, NaN where undefined."""
    positives, negatives, true_positives, true_negatives, squared, *in_bins = (counts @ terms.sums).T
    rows = positives + negatives
    hits, tied = terms.hits @ counts.T, terms.tied @ counts.T
    true, false = (np.cumsum(v[::-1], 0)[::-1] for v in (hits, terms.false @ counts.T))  # of each score and higher
    # Mann-Whitney: each positive beats the negatives below it, and half of those that tie.
    auc = (hits * (negatives - false + tied / 2)).sum(0) / (positives * negatives)
    precision = true / np.maximum(true + false, 1)  # whole numbers: 1 stands in for 0 alone
    sensitivity = np.where(false <= _FALSE_POSITIVE_RATE * negatives, true, 0).max(0, initial=0) / positives
    figures = {
        "auc": auc,
        "ap": (hits * precision).sum(0) / positives,
        "sensitivity_at_90_specificity": sensitivity,
        "balanced_accuracy": (true_positives / positives + true_negatives / negatives) / 2,
        "accuracy": (true_positives + true_negatives) / rows,
        "brier": squared / rows,
        "ece": np.abs(in_bins).sum(0) / rows,
    }
    both = (positives > 0) & (negatives > 0)
    return np.stack([np.where(both | (name in _OF_ONE_VALUE), figures[name], np.nan) for name in _PER_CLASS])


def mean_over_classes(drawn: np.ndarray) -> np.ndarray:
    """Return the mean over the classes that are defined, of (C, R): (R,), NaN where none is."""
    known = ~np.isnan(drawn)
    return np.where(known, drawn, 0).sum(0) / known.sum(0)


def interval(values: np.ndarray) -> list[float] | None:
    """Return the 2.5 and 97.5 % points of the values that are not NaN, or None without any."""
    known = values[~np.isnan(values)]
    return [float(v) for v in np.percentile(known, (2.5, 97.5))] if known.size else None
