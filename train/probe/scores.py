"""Linear and nearest-neighbour probes of features, and the AUC of their scores with intervals over patients."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mammostream.train.levels.labels import labels_of_units
from mammostream.train.probe.labelled import Fold, ProbeSet, draw_share

SHARES = (0.01, 0.1, 1.0)
"""Shares of the labels to fit on."""

LEVELS = ("tile", "image", "breast")

NEIGHBOURS, TEMPERATURE = 20, 0.07
"""Neighbours and temperature of the vote; the temperature is from Wu et al. 2018 (arXiv:1805.01978)."""

_ROWS = 1024  # rows of similarities in memory at a time

_TOP = {"max": 1, "top3": 3}


def linear_scores(fit: np.ndarray, labels: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Return the probabilities (M,) of a logistic regression on standardised features.

    With scikit-learn's penalty (L2, C = 1), the same for every network.

    Parameters
    ----------
    fit, labels
        (N, D) features and (N,) labels; both 0 and 1 must occur.
    score
        (M, D) features.
    """
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(fit, labels)
    return model.predict_proba(score)[:, 1]


def knn_scores(fit: np.ndarray, labels: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Return the weighted share (M,) of positives among the nearest neighbours by cosine (Wu et al. 2018).

    Each of :data:`NEIGHBOURS` votes with ``exp(cosine / TEMPERATURE)``. Parameters are those of :func:`linear_scores`.
    """
    fit, score = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (fit, score))
    k = min(NEIGHBOURS, len(fit))
    votes = []
    for start in range(0, len(score), _ROWS):
        similarity = score[start : start + _ROWS] @ fit.T
        nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        weight = np.exp(np.take_along_axis(similarity, nearest, 1).astype(np.float64) / TEMPERATURE)
        votes.append((weight * labels[nearest]).sum(1) / weight.sum(1))
    return np.concatenate(votes)


PROBES = {"linear": linear_scores, "kNN": knn_scores}


def score_tiles(
    features: np.ndarray, probe_set: ProbeSet, folds: Sequence[Fold], probe: str, share: float = 1.0, seed: int = 0
) -> tuple[np.ndarray, str]:
    """Return scores of tiles whose patients were not fitted on.

    Parameters
    ----------
    features
        (N, D).
    folds
        See :func:`make_folds`.
    probe
        ``linear`` or ``kNN``.
    share
        Share of the labels to fit on, see :func:`draw_share`.
    seed
        Seed of the draw.

    Returns
    -------
    scores, unit
        (N, C), NaN where a tile is not scored: it was fitted on, or the labels to fit on have one value only, or a
        feature is not finite. The unit by which the share was drawn: ``patients`` or ``tiles``.
    """
    labels = probe_set.tiles.labels
    scores, units = np.full(labels.shape, np.nan), set()
    for c in range(labels.shape[1]):
        for number, fold in enumerate(folds):
            rng = np.random.default_rng([seed, number])
            rows, unit = draw_share(fold.fit, labels[:, c], probe_set.patients, share, rng)
            units.add(unit)
            y = labels[rows, c]
            if 0 < y.sum() < len(y) and np.isfinite(features).all():
                scores[fold.score, c] = PROBES[probe](features[rows], y, features[fold.score])
    return scores, "tiles" if "tiles" in units else "patients"


def gather(
    labels: np.ndarray, scores: np.ndarray, units: np.ndarray, patients: np.ndarray, folds: np.ndarray, top: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Aggregate tiles by image or breast: the mean of its `top` highest scores, and the label that its tiles' labels give.

    See :func:`mammostream.train.levels.labels.labels_of_units`. Tiles without a unit or a score are left out, and units without
    a label. Returns labels, scores, patients and folds of the units.
    """
    kept = (units != "") & ~np.isnan(scores)
    frame = pd.DataFrame({"unit": units, "score": scores, "patient": patients, "fold": folds})[kept]
    names, numbers = np.unique(units[kept], return_inverse=True)
    highest = frame.sort_values("score", ascending=False, kind="stable").groupby("unit").head(top)
    table = frame.groupby("unit")[["patient", "fold"]].max().assign(score=highest.groupby("unit")["score"].mean())
    table["label"] = pd.Series(labels_of_units(labels[kept, None], numbers)[:, 0] if len(names) else [], names, dtype=float)
    table = table[table["label"].notna()]
    return tuple(table[name].to_numpy() for name in ("label", "score", "patient", "fold"))


@dataclass(frozen=True)
class PairCounts:
    """Within one fold, for patients a and b: pairs of a positive of a and a negative of b, and how many are in order."""

    patients: np.ndarray
    pairs: np.ndarray
    ordered: np.ndarray


def count_pairs(labels: np.ndarray, scores: np.ndarray, patients: np.ndarray, folds: np.ndarray) -> list[PairCounts]:
    """Count the pairs behind an AUC, fold by fold.

    Scores of two folds come from two models and are never compared (Forman and Scholz 2010, doi:10.1145/1882471.1882479).
    """
    found = []
    for fold in np.unique(folds):
        here = folds == fold
        unique, number = np.unique(patients[here], return_inverse=True)
        y, s = labels[here] == 1, scores[here]
        ordered = np.zeros((len(unique), len(unique)))
        for b in range(len(unique)):
            negatives = np.sort(s[~y & (number == b)])
            below, up_to = (np.searchsorted(negatives, s[y], side) for side in ("left", "right"))
            ordered[:, b] = np.bincount(number[y], (below + up_to) / 2, minlength=len(unique))
        positives, negatives = (np.bincount(number[which], minlength=len(unique)) for which in (y, ~y))
        found.append(PairCounts(unique, np.outer(positives, negatives).astype(float), ordered))
    return found


def auc_of(counts: Sequence[PairCounts], draws: np.ndarray) -> np.ndarray:
    """Return the AUC (R,) for (R, patients) counts of how often each patient was drawn; NaN if there is no pair."""
    ordered, pairs = (
        sum((((draws[:, c.patients] @ getattr(c, name)) * draws[:, c.patients]).sum(1) for c in counts), np.zeros(len(draws)))
        for name in ("ordered", "pairs")
    )
    return np.divide(ordered, pairs, out=np.full(len(draws), np.nan), where=pairs > 0)


def level_pairs(
    probe_set: ProbeSet, folds: Sequence[Fold], scores: np.ndarray, c: int, level: str, score: str
) -> tuple[list[PairCounts], int, int]:
    """Return the pairs of a class's scores on a level, and the number of positives and negatives scored."""
    of_row = np.full(len(scores), -1)
    for number, fold in enumerate(folds):
        of_row[fold.score] = number
    gathered = gather(
        probe_set.tiles.labels[:, c], scores[:, c], probe_set.units[level], probe_set.patients, of_row, _TOP[score]
    )
    labels, *_ = gathered
    return count_pairs(*gathered), int((labels == 1).sum()), int((labels == 0).sum())


def point_estimate(found: tuple[list[PairCounts], int, int]) -> float | None:
    counts, *_ = found
    patients = max((c.patients.max() + 1 for c in counts), default=0)
    auc = auc_of(counts, np.ones((1, patients)))[0]
    return None if np.isnan(auc) else float(auc)


def summary(found: Sequence[tuple[list[PairCounts], int, int]], bootstrap: int) -> dict[str, Any]:
    """Return the mean AUC over seeds with its spread and its interval over patients."""
    aucs = [point_estimate(one) for one in found]
    known = [auc for auc in aucs if auc is not None]
    patients = np.unique(
        np.concatenate([np.concatenate([c.patients for c in counts] or [np.empty(0, int)]) for counts, *_ in found])
    )
    patients = patients.astype(int)
    interval = None
    if known and bootstrap and len(patients) > 1:
        # The same draws for each network, so that differences between networks do not come from the draws.
        rng = np.random.default_rng(0)
        draws = np.zeros((bootstrap, patients.max() + 1))
        draws[:, patients] = rng.multinomial(len(patients), np.full(len(patients), 1 / len(patients)), size=bootstrap)
        drawn = np.stack([auc_of(counts, draws) for counts, *_ in found])
        defined = (~np.isnan(drawn)).sum(0)
        means = np.nansum(drawn, 0)[defined > 0] / defined[defined > 0]
        interval = np.percentile(means, (2.5, 97.5)) if len(means) else None
    low, high = (None, None) if interval is None else map(float, interval)
    return {
        "auc": float(np.mean(known)) if known else None,
        "sd": float(np.std(known, ddof=1)) if len(known) > 1 else None,
        "low": low,
        "high": high,
        "aucs": aucs,
        "patients": len(patients),
        "positives": max(positives for _, positives, _ in found),
        "negatives": max(negatives for *_, negatives in found),
    }
