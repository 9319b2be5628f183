"""ROC, precision-recall and reliability plots."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mammostream.train.run.charts import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_roc(labels: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str], path: Path) -> None:
    """Draw the ROC curve of each class that has both values.

    Parameters
    ----------
    labels
        (N, C) of 0, 1 and NaN for a missing label.
    probabilities
        (N, C) in [0, 1].
    class_names
        C names.
    path
        The PNG.
    """
    from sklearn.metrics import roc_auc_score, roc_curve

    figure, axes = _square("ROC", "1 - specificity", "sensitivity")
    axes.plot([0, 1], [0, 1], color="#9aa7b0", linestyle=":")
    for name, y, p, colour in _classes(labels, probabilities, class_names, both=True):
        fpr, tpr, _ = roc_curve(y, p)
        axes.plot(fpr, tpr, color=colour, label=f"{name}, AUC {roc_auc_score(y, p):.3f}")
    save_figure(_with_legend(figure, axes), path)


def draw_precision_recall(labels: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str], path: Path) -> None:
    """Draw the precision-recall curve of each class that has both values, and its share of positives (dotted).

    Parameters are those of :func:`draw_roc`.
    """
    from sklearn.metrics import average_precision_score, precision_recall_curve

    figure, axes = _square("Precision and recall", "recall (sensitivity)", "precision")
    for name, y, p, colour in _classes(labels, probabilities, class_names, both=True):
        precision, recall, _ = precision_recall_curve(y, p)
        # Steps, not lines: between two points of the curve, no threshold gives what a line would promise.
        axes.step(recall, precision, where="post", color=colour, label=f"{name}, AP {average_precision_score(y, p):.3f}")
        axes.axhline(y.mean(), color=colour, linestyle=":", linewidth=1)
    save_figure(_with_legend(figure, axes), path)


def draw_reliability(labels: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str], path: Path) -> None:
    """Draw each class's share of positives against its probability, in bins; the larger a point, the more rows.

    Parameters are those of :func:`draw_roc`; a class with one value only is drawn, too.
    """
    from mammostream.train.evaluate.metrics import expected_calibration_error, reliability

    figure, axes = _square("Reliability", "mean probability", "share of positives")
    axes.plot([0, 1], [0, 1], color="#9aa7b0", linestyle=":")
    for name, y, p, colour in _classes(labels, probabilities, class_names, both=False):
        mean, share, count = reliability(y, p)
        axes.plot(mean, share, color=colour, linewidth=1, label=f"{name}, ECE {expected_calibration_error(y, p):.3f}")
        axes.scatter(mean, share, s=8 + 120 * count / count.sum(), color=colour, alpha=0.6)
    save_figure(_with_legend(figure, axes), path)


def _classes(
    labels: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str], both: bool
) -> Iterator[tuple[str, np.ndarray, np.ndarray, str]]:
    """Yield name, known labels, their probabilities and a colour of each class that has any; with `both`, both values."""
    for c, name in enumerate(class_names):
        known = ~np.isnan(labels[:, c])
        y, p = labels[known, c], probabilities[known, c]
        if len(y) and np.isfinite(p).all() and (0 < y.sum() < len(y) or not both):
            yield name, y, p, f"C{c % 10}"


def _square(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    figure = new_figure(4.4, 4.2)
    axes = figure.subplots()
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    axes.set_title(title, fontsize=12)
    axes.set_xlabel(x, fontsize=10)
    axes.set_ylabel(y, fontsize=10)
    axes.tick_params(labelsize=9)
    axes.grid(alpha=0.3)
    return figure, axes


def _with_legend(figure: Figure, axes: Axes) -> Figure:
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=9)
    else:
        axes.text(0.5, 0.5, "undefined: no class has both values", ha="center", fontsize=10)
    return figure
