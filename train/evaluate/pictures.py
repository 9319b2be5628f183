"""Plots: ROC, precision and recall, reliability, FROC, and AUC by subgroup."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


def draw_comparison(labels: np.ndarray, first: np.ndarray, second: np.ndarray, class_names: Sequence[str], path: Path) -> None:
    """Draw the ROC curves of two predictions of the same rows: the first with a solid line, the second with a broken one.

    Parameters
    ----------
    labels, class_names, path
        As for :func:`draw_roc`.
    first, second
        (N, C) in [0, 1].
    """
    from sklearn.metrics import roc_auc_score, roc_curve

    figure, axes = _square("ROC of both", "1 - specificity", "sensitivity")
    axes.plot([0, 1], [0, 1], color="#9aa7b0", linestyle=":")
    for which, probabilities, style in (("first", first, "-"), ("second", second, "--")):
        for name, y, p, colour in _classes(labels, probabilities, class_names, both=True):
            fpr, tpr, _ = roc_curve(y, p)
            axes.plot(fpr, tpr, color=colour, linestyle=style, label=f"{name}, {which}, AUC {roc_auc_score(y, p):.3f}")
    save_figure(_with_legend(figure, axes), path)


def draw_froc(curves: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]], path: Path, highest: float = 4) -> None:
    """Draw sensitivity against false positives per image: lesions with a solid line, breasts with a broken one.

    Parameters
    ----------
    curves
        Class -> ``lesion_wise`` and ``breast_wise`` -> false positives per image and sensitivity, ascending.
    path
        The PNG.
    highest
        The last number of false positives per image that is shown.
    """
    figure, axes = _square("FROC", "false positives per image", "sensitivity")
    axes.set(xlim=(0, highest), aspect="auto")
    for c, (name, drawn) in enumerate(curves.items()):
        for what, words, style in (("lesion_wise", "lesions", "-"), ("breast_wise", "breasts", "--")):
            if what in drawn:
                false, found = (np.append(values, values[-1:]) for values in drawn[what])
                false[-1] = max(highest, false[-1])  # no threshold gives more
                axes.step(false, found, where="post", color=f"C{c % 10}", linestyle=style, label=f"{name}, {words}")
    save_figure(_with_legend(figure, axes, "undefined: no box on a judged image"), path)


def draw_subgroups(subgroups: Mapping[str, Any], path: Path) -> None:
    """Draw the AUC of each class in each subgroup with its interval; subgroups without figures are named only.

    Parameters
    ----------
    subgroups
        As :func:`mammostream.train.evaluate.subgroups.judge_subgroups` returns them.
    path
        The PNG.
    """
    names = [name for column in subgroups.values() for group in column["values"][:1] for name in group["per_class"]]
    names = list(dict.fromkeys(names))
    rows = [(f"{column} {group['value']}", group) for column, found in subgroups.items() for group in found["values"]]
    figure = new_figure(6.0, 1.4 + 0.3 * len(rows))
    axes = figure.subplots()
    for c, name in enumerate(names):
        for row, (_, group) in enumerate(rows):
            figures = group["per_class"][name]
            place = row + 0.5 * (c + 0.5) / len(names) - 0.25
            if figures.get("auc") is not None:
                low, high = figures["intervals"]["auc"] or (figures["auc"],) * 2
                axes.plot([low, high], [place, place], color=f"C{c % 10}", linewidth=1.5)
                axes.plot(figures["auc"], place, "o", color=f"C{c % 10}", markersize=4)
        axes.plot([], [], "o-", color=f"C{c % 10}", markersize=4, label=name)
    axes.axvline(0.5, color="#9aa7b0", linestyle=":")
    axes.set(xlim=(0, 1.02), ylim=(len(rows) - 0.5, -0.5), yticks=range(len(rows)))
    axes.set_yticklabels([f"{text}  (n = {group['rows']})" for text, group in rows], fontsize=9, parse_math=False)
    axes.set_xlabel("AUC", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    save_figure(figure, path)


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


def _with_legend(figure: Figure, axes: Axes, otherwise: str = "undefined: no class has both values") -> Figure:
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=9)
    else:
        axes.text(0.5, 0.5, otherwise, ha="center", fontsize=10, transform=axes.transAxes)
    return figure
