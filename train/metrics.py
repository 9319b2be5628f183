"""Metrics: multi-label classification with missing labels, confidence intervals over groups, signs of collapse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor


def classification_metrics(
    labels: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str], threshold: float = 0.5
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
    threshold
        A probability of at least this is a positive, for `exact_match` alone.

    Returns
    -------
    dict
        ``per_class``: name -> ``auc``, ``ap`` (average precision), ``positives``, ``negatives``;
        ``mean_auc``, ``mean_ap``: over the classes that have one;
        ``exact_match``: share of the rows without a missing label whose labels are all predicted.
        None where undefined: an AUC or AP of labels with one value only or of probabilities that are not finite, a
        mean over no class, an exact match without a complete row or with probabilities that are not finite.

    Raises
    ------
    ValueError
        The shapes do not fit each other, or a label is not 0, 1 or NaN.
    """
    labels, probabilities = np.asarray(labels, np.float64), np.asarray(probabilities, np.float64)
    if labels.shape != probabilities.shape or labels.ndim != 2 or labels.shape[1] != len(class_names):
        raise ValueError(f"labels {labels.shape} and probabilities {probabilities.shape} for {len(class_names)} classes")
    known = ~np.isnan(labels)
    if not np.isin(labels[known], (0, 1)).all():
        raise ValueError("labels must be 0, 1 or NaN")

    per_class: dict[str, dict[str, Any]] = {}
    for c, name in enumerate(class_names):
        y, p = labels[known[:, c], c], probabilities[known[:, c], c]
        positives, negatives = int((y == 1).sum()), int((y == 0).sum())
        defined = positives > 0 and negatives > 0 and np.isfinite(p).all()
        per_class[name] = {
            "auc": float(roc_auc_score(y, p)) if defined else None,
            "ap": float(average_precision_score(y, p)) if defined else None,
            "positives": positives,
            "negatives": negatives,
        }

    complete = known.all(1)
    countable = complete.any() and np.isfinite(probabilities[complete]).all()
    matches = ((probabilities >= threshold) == (labels == 1)).all(1)
    return {
        "per_class": per_class,
        "mean_auc": _mean([m["auc"] for m in per_class.values()]),
        "mean_ap": _mean([m["ap"] for m in per_class.values()]),
        "exact_match": float(matches[complete].mean()) if countable else None,
    }


def bootstrap_auc(
    labels: np.ndarray, probabilities: np.ndarray, groups: np.ndarray, n: int = 1000, seed: int = 0
) -> tuple[float, float] | None:
    """Return the 95 % percentile interval of the AUC under resampling of whole groups.

    Tiles of one film, and films of one patient, resemble each other: resampling them singly would give intervals
    that are too narrow (the cluster bootstrap, Davison and Hinkley 1997, section 3.8). A resample that holds one
    class only has no AUC and is skipped.

    Parameters
    ----------
    labels
        (N,) of 0, 1 and NaN for a missing label.
    probabilities
        (N,) scores.
    groups
        (N,) group of each row: film or patient.
    n
        Resamples.
    seed
        Seed of the resampling; the same seed gives the same interval.

    Returns
    -------
    (low, high) or None
        None where the AUC itself is undefined (see :func:`classification_metrics`) or with fewer than two groups.
    """
    labels, probabilities = np.asarray(labels, np.float64), np.asarray(probabilities, np.float64)
    known = ~np.isnan(labels)
    y, p, names = labels[known], probabilities[known], np.asarray(groups)[known]
    unique, group = np.unique(names, return_inverse=True)
    if len(unique) < 2 or not 0 < y.sum() < len(y) or not np.isfinite(p).all():
        return None

    # Sorted once for all resamples: a resample only changes how often each row counts.
    order = np.argsort(p, kind="stable")
    y, p, group = y[order], p[order], group[order]
    ties = np.flatnonzero(np.r_[True, p[1:] != p[:-1]])  # where each distinct score starts
    rng = np.random.default_rng(seed)
    aucs = []
    for _ in range(n):
        drawn = np.bincount(rng.integers(len(unique), size=len(unique)), minlength=len(unique))
        weight = drawn[group]
        positives, negatives = np.add.reduceat(weight * y, ties), np.add.reduceat(weight * (1 - y), ties)
        pairs = positives.sum() * negatives.sum()
        if pairs > 0:  # Mann-Whitney: each positive beats the negatives below it, and half of those that tie
            aucs.append((positives * (negatives.cumsum() - negatives / 2)).sum() / pairs)
    if not aucs:
        return None
    low, high = np.percentile(aucs, (2.5, 97.5))
    return float(low), float(high)


def fit_thresholds(labels: np.ndarray, probabilities: np.ndarray) -> list[float | None]:
    """Return for each class the probability from which on to call it positive: that of the highest balanced accuracy.

    Parameters
    ----------
    labels, probabilities
        (N, C), as for :func:`classification_metrics`.

    Returns
    -------
    list
        C thresholds halfway between two scores; None where the labels have one value only.
    """
    thresholds: list[float | None] = []
    for y, p in zip(np.asarray(labels).T, np.asarray(probabilities, np.float64).T, strict=True):
        y, p = y[~np.isnan(y)], p[~np.isnan(y)]
        if not 0 < y.sum() < len(y):
            thresholds.append(None)
            continue
        scores = np.unique(p)
        edges = np.r_[scores[0], (scores[1:] + scores[:-1]) / 2]
        sensitivity = 1 - np.searchsorted(np.sort(p[y == 1]), edges) / (y == 1).sum()
        specificity = np.searchsorted(np.sort(p[y == 0]), edges) / (y == 0).sum()
        thresholds.append(float(edges[np.argmax(sensitivity + specificity)]))
    return thresholds


def fit_temperature(labels: np.ndarray, logits: np.ndarray) -> float:
    """Return the temperature T in [0.05, 20] by which to divide logits for the least cross entropy (Guo et al. 2017).

    Parameters
    ----------
    labels, logits
        (N, C); labels of NaN do not count.
    """
    known = ~np.isnan(labels)
    y, x = np.asarray(labels, np.float64)[known], np.asarray(logits, np.float64)[known]
    bounds = (math.log(0.05), math.log(20))
    fit = minimize_scalar(
        lambda t: (np.logaddexp(0, x / math.exp(t)) - y * x / math.exp(t)).mean(), bounds=bounds, method="bounded"
    )
    return float(math.exp(fit.x))


def z_std(projections: Tensor) -> Tensor:
    """Return the mean over dimensions of the standard deviation of l2-normalised rows (Chen and He 2021, SimSiam).

    Near 0 says that the rows have collapsed to one point, which the loss does not show; healthy rows, spread over
    the sphere, have about ``1 / sqrt(d)``. A scalar float32 tensor on the same device: reading it is the caller's
    choice, since that waits for the GPU.

    Parameters
    ----------
    projections
        (N, d), N of at least 2.
    """
    return F.normalize(projections.float(), dim=1).std(0, correction=0).mean()


def effective_rank(features: Tensor) -> Tensor:
    """Return RankMe, the exponential of the singular values' entropy (Garrido et al. 2023, arXiv:2210.02885).

    About how many directions the features use: 1 when all rows are multiples of one vector, at most min(N, d). NaN
    where a feature is not finite, so that watching a diverged run does not end it. A scalar float32 tensor; computing
    it waits for the GPU.

    Parameters
    ----------
    features
        (N, d); N well above d for an estimate that the number of rows does not limit.
    """
    features = features.float()
    if not features.isfinite().all():
        return features.new_tensor(float("nan"))
    epsilon = 1e-7  # the paper's
    singular = torch.linalg.svdvals(features)
    p = singular / (singular.sum() + epsilon) + epsilon
    return torch.exp(-(p * p.log()).sum())


def _mean(values: list[float | None]) -> float | None:
    """Return the mean of the values that are not None, or None."""
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None
