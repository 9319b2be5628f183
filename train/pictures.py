"""Pictures of a run: its curves, what the network sees, and where on a film it answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.files import whole_file
from preprocess.preview import Box

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def read_metrics(path: Path) -> list[dict]:
    """Return the lines of a ``metrics.jsonl``, oldest first, without a torn last one (its writer was killed)."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def draw_curves(metrics_path: Path, names: Sequence[str], path: Path, title: str) -> None:
    """Draw metrics of a ``metrics.jsonl`` against the step, a panel each: single steps in grey, epochs in blue.

    A name that was never logged is left out.
    """
    lines = read_metrics(metrics_path)

    def points(name: str) -> np.ndarray:
        return np.array([(line["step"], line[name]) for line in lines if line.get(name) is not None]).reshape(-1, 2).T

    series = {name: (points(name), points(f"epoch_mean/{name}")) for name in names}
    series = {name: both for name, both in series.items() if any(curve.size for curve in both)}
    if not series:
        return
    figure = _figure(3.2 * len(series), 2.8)
    for axes, (name, (steps, epochs)) in zip(figure.subplots(1, len(series), squeeze=False)[0], series.items(), strict=True):
        axes.plot(*steps, color="#9aa7b0" if epochs.size else "#1769aa", marker=None if epochs.size else "o", markersize=3)
        axes.plot(*epochs, color="#1769aa", marker="o", markersize=3)
        axes.set_title(name.replace("_", " "), fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def draw_views(rows: Mapping[str, np.ndarray], path: Path) -> None:
    """Draw rows of tiles below each other, one column a tile.

    Parameters
    ----------
    rows
        Name -> (N, H, W) float in about [0, 1]; all of the same N.
    path
        The PNG.
    """
    count = len(next(iter(rows.values())))
    figure = _figure(1.6 * count + 0.6, 1.6 * len(rows))
    grid = figure.subplots(len(rows), count, squeeze=False)
    # One grey scale for a tile and its views, so that brightness can be compared.
    scales = np.percentile(np.stack(list(rows.values())), [0.2, 99.8], axis=(0, 2, 3))
    for line, (name, tiles) in zip(grid, rows.items(), strict=True):
        for axes, tile, low, high in zip(line, tiles, *scales, strict=True):
            axes.imshow(tile, cmap="gray", vmin=low, vmax=high)
            axes.set_xticks([])
            axes.set_yticks([])
        line[0].set_ylabel(name, fontsize=9)
    _save(figure, path)


def heat_map(
    shape: tuple[int, int], x: np.ndarray, y: np.ndarray, size: int, probabilities: np.ndarray, step: int
) -> np.ndarray:
    """Blend tile probabilities over a film: each point gets the mean of the tiles that cover it.

    Parameters
    ----------
    shape
        (height, width) of the film in pixels.
    x, y
        (N,) top-left corners of the tiles in the same pixels.
    size
        Edge length of a tile.
    probabilities
        (N,) in [0, 1].
    step
        Pixels an edge of a point of the map.

    Returns
    -------
    numpy.ndarray
        (ceil(height / step), ceil(width / step)) float32, NaN where no tile lies.
    """
    total, count = (np.zeros((-(-shape[0] // step), -(-shape[1] // step)), np.float32) for _ in range(2))
    for left, top, probability in zip(x, y, probabilities, strict=True):
        area = np.s_[top // step : -(-(top + size) // step), left // step : -(-(left + size) // step)]
        total[area] += probability
        count[area] += 1
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def draw_heat_map(image: np.ndarray, heat: np.ndarray, boxes: Sequence[Box], path: Path, title: str) -> None:
    """Draw a film with a heat map over it, and beside it the film alone with its boxes.

    Parameters
    ----------
    image
        (H, W) float in [0, 1].
    heat
        (h, w) probabilities with the same corners as `image`, NaN where there is none.
    boxes
        (xmin, ymin, xmax, ymax) in pixels of `image`.
    path
        The PNG.
    title
        Line above the picture.
    """
    from matplotlib.patches import Rectangle

    height, width = image.shape
    step = max(1, height // 1000)
    figure = _figure(9, 4.3 * height / width + 0.5)
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        axes.imshow(image[::step, ::step], cmap="gray", vmin=0, vmax=1, extent=(0, width, height, 0))
        for xmin, ymin, xmax, ymax in boxes:
            corner = (xmin, ymin), xmax - xmin, ymax - ymin
            axes.add_patch(Rectangle(*corner, facecolor="none", edgecolor="#39d0ff", linewidth=1.2))
        axes.set_axis_off()
    drawn = right.imshow(heat, cmap="inferno", alpha=0.55, vmin=0, vmax=1, extent=(0, width, height, 0))
    bar = figure.colorbar(drawn, ax=right, fraction=0.04, pad=0.02)
    bar.ax.tick_params(labelsize=7)
    figure.suptitle(title, fontsize=9)
    _save(figure, path)


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
    _save(_with_legend(figure, axes), path)


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
    _save(_with_legend(figure, axes), path)


def draw_reliability(labels: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str], path: Path) -> None:
    """Draw each class's share of positives against its probability, in bins; the larger a point, the more rows.

    Parameters are those of :func:`draw_roc`; a class with one value only is drawn, too.
    """
    from train.metrics import expected_calibration_error, reliability

    figure, axes = _square("Reliability", "mean probability", "share of positives")
    axes.plot([0, 1], [0, 1], color="#9aa7b0", linestyle=":")
    for name, y, p, colour in _classes(labels, probabilities, class_names, both=False):
        mean, share, count = reliability(y, p)
        axes.plot(mean, share, color=colour, linewidth=1, label=f"{name}, ECE {expected_calibration_error(y, p):.3f}")
        axes.scatter(mean, share, s=8 + 120 * count / count.sum(), color=colour, alpha=0.6)
    _save(_with_legend(figure, axes), path)


def draw_probe(rows: Sequence[Mapping], path: Path) -> None:
    """Draw AUC by share of the labels: a panel a level and class, a colour a network, with intervals over patients.

    Parameters
    ----------
    rows
        What :func:`train.probing.compare` found; what is undefined is left out.
    path
        The PNG.
    """
    levels, classes, networks = (list(dict.fromkeys(row[name] for row in rows)) for name in ("level", "class", "network"))
    figure = _figure(4.2 * len(levels), 3.2 * len(classes) + 0.4)
    grid = figure.subplots(len(classes), len(levels), squeeze=False, sharey=True)
    for line, name in zip(grid, classes, strict=True):
        for axes, level in zip(line, levels, strict=True):
            axes.axhline(0.5, color="#9aa7b0", linestyle=":")
            for number, network in enumerate(networks):
                for probe, style in (("linear", "-"), ("kNN", "--")):
                    wanted = {"network": network, "probe": probe, "level": level, "class": name}
                    found = [row for row in rows if wanted.items() <= row.items() and row["auc"] is not None]
                    if not found:
                        continue
                    share, auc = (np.array([row[column] for row in found]) for column in ("share", "auc"))
                    # Side by side, so that intervals can be told apart.
                    share = share * 1.06 ** (2 * number + (probe == "kNN") - len(networks))
                    axes.plot(share, auc, style, color=f"C{number % 10}", marker="o", markersize=3, label=f"{network}, {probe}")
                    bounded = [
                        (x, row["low"], row["high"]) for x, row in zip(share, found, strict=True) if row["low"] is not None
                    ]
                    if bounded:
                        axes.vlines(*zip(*bounded, strict=True), color=f"C{number % 10}", linewidth=1, alpha=0.6)
            axes.set_xscale("log")
            axes.set_title(f"{name}, by {level}", fontsize=9)
            axes.set_xlabel("share of the labels", fontsize=8)
            axes.set_ylabel("AUC", fontsize=8)
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.3)
    handles = {label: handle for axes in grid.flat for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if handles:
        figure.legend(handles.values(), handles.keys(), fontsize=7, loc="outside lower center", ncols=min(4, len(handles)))
    _save(figure, path)


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
    figure = _figure(5, 4.4)
    axes = figure.subplots()
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x, fontsize=8)
    axes.set_ylabel(y, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    return figure, axes


def _with_legend(figure: Figure, axes: Axes) -> Figure:
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=7)
    else:
        axes.text(0.5, 0.5, "undefined: no class has both values", ha="center", fontsize=8)
    return figure


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
