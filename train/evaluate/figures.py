"""Figures of a class that are computed on request: the probabilistic F1 score and areas under a part of the ROC curve."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array

from mammostream.common.errors import BadInput

SENSITIVITY, SPECIFICITY = "sensitivity", "specificity"


class Point(NamedTuple):
    """A wanted sensitivity or specificity."""

    kind: str
    value: float

    def __str__(self) -> str:
        return f"{self.kind}={self.value:g}"


def read_points(texts: Sequence[str], flag: str, *, with_one: bool) -> list[Point]:
    """Read values such as ``sensitivity=0.9``, each once.

    Parameters
    ----------
    texts
        As on the command line.
    flag
        The option, for the error.
    with_one
        Whether 1 itself is allowed.

    Raises
    ------
    BadInput
        Neither sensitivity nor specificity, or not a share.
    """
    points = []
    for text in texts:
        found = re.fullmatch(r"(sensitivity|specificity)\s*=\s*([0-9.eE+-]+)", text.strip())
        try:
            point = Point(found[1], float(found[2])) if found else None
        except ValueError:
            point = None
        if point is None or not (0 < point.value < 1 or with_one and point.value == 1):
            raise BadInput(
                f"{flag} {text} is not a sensitivity or specificity between 0 and 1; write it as sensitivity=0.9 or "
                "specificity=0.95"
            )
        points.append(point)
    return list(dict.fromkeys(points))


@dataclass(frozen=True)
class ProbabilisticF1:
    """The metric of the RSNA 2022 screening mammography challenge (Yacouby and Axman 2020, https://aclanthology.org/2020.eval4nlp-1.9).

    With T the sum of the positives' probabilities and F that of the negatives': precision T / (T + F), recall T / positives,
    and F1 their harmonic mean, 2 T / (T + F + positives). No threshold; 0 where all probabilities of positives are 0.
    """

    name = "pf1"
    title = "pF1"

    def prepare(
        self, labels: np.ndarray, probabilities: np.ndarray, group: np.ndarray, groups: int
    ) -> Callable[[np.ndarray], np.ndarray]:
        """See :class:`mammostream.train.evaluate.metrics.ExtraFigure`."""
        sums = [np.bincount(group, weights=v, minlength=groups) for v in (labels * probabilities, probabilities, labels)]

        def resampled(counts: np.ndarray) -> np.ndarray:
            true, total, positives = (counts @ values for values in sums)
            return np.where(positives > 0, 2 * true / np.where(positives > 0, total + positives, 1), np.nan)

        return resampled


@dataclass(frozen=True)
class PartialAUC:
    """The area under the ROC curve where specificity, or sensitivity, is at least a value; standardised (McClish 1989).

    ``(1 + (area - lowest) / (highest - lowest)) / 2``, where an uninformative curve has the lowest area m² / 2 and a perfect
    one the highest, m, with m = 1 - value: 0.5 is chance and 1 perfect, whatever the range. For specificity it is
    scikit-learn's ``roc_auc_score(max_fpr=m)``; for sensitivity the same with positives and negatives exchanged.
    """

    point: Point

    @property
    def name(self) -> str:
        """``partial_auc_specificity_0.9``."""
        return f"partial_auc_{self.point.kind}_{self.point.value:g}"

    @property
    def title(self) -> str:
        """``pAUC spec. >= 0.9``."""
        return f"pAUC {self.point.kind[:4]}. >= {self.point.value:g}"

    def prepare(
        self, labels: np.ndarray, probabilities: np.ndarray, group: np.ndarray, groups: int
    ) -> Callable[[np.ndarray], np.ndarray]:
        """See :class:`mammostream.train.evaluate.metrics.ExtraFigure`."""
        positive, scores = labels == 1, probabilities
        if self.point.kind == SENSITIVITY:  # mirrored at the other diagonal
            positive, scores = ~positive, -probabilities
        highest = 1 - self.point.value
        distinct, place = np.unique(-scores, return_inverse=True)
        shape = len(distinct), groups
        steps = [csr_array((np.ones(kind.sum()), (place[kind], group[kind])), shape) for kind in (~positive, positive)]

        def resampled(counts: np.ndarray) -> np.ndarray:
            sums = [np.cumsum(step @ counts.T, 0) for step in steps]
            if not len(distinct):
                return np.full(len(counts), np.nan)
            fpr, tpr = (np.concatenate([np.zeros((1, len(counts))), total / total[-1]]) for total in sums)
            left, right = np.minimum(fpr[:-1], highest), np.minimum(fpr[1:], highest)
            rise = np.divide(
                np.diff(tpr, axis=0), np.diff(fpr, axis=0), out=np.zeros_like(left), where=np.diff(fpr, axis=0) > 0
            )
            height = tpr[:-1] + rise * (right - fpr[:-1]) / 2  # in the middle of what is left of the step
            area = ((right - left) * height).sum(0)
            lowest = highest**2 / 2
            return (1 + (area - lowest) / (highest - lowest)) / 2

        return resampled
