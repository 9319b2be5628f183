"""Charts of a run's metrics, and the figure that every other chart starts from."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mammostream.common.files import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def read_metrics(path: Path) -> list[dict]:
    """Return the lines of a ``metrics.jsonl``, oldest first, without a torn last one (its writer was killed)."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def draw_curves(metrics_path: Path, names: Sequence[str], path: Path, title: str) -> None:
    """Draw metrics of a ``metrics.jsonl`` as :func:`draw_panels` does."""
    draw_panels(read_metrics(metrics_path), names, path, title)


def draw_panels(lines: Sequence[Mapping[str, Any]], names: Sequence[str], path: Path, title: str = "") -> None:
    """Draw metrics against the step, a panel each: single steps in grey, epochs in blue.

    Parameters
    ----------
    lines
        Of a ``metrics.jsonl``, see :func:`read_metrics`.
    names
        The metrics; one that was never logged is left out. Without any, nothing is drawn.
    path
        The PNG.
    title
        Line above the panels.
    """

    def points(name: str) -> np.ndarray:
        return np.array([(line["step"], line[name]) for line in lines if line.get(name) is not None]).reshape(-1, 2).T

    series = {name: (points(name), points(f"epoch_mean/{name}")) for name in names}
    series = {name: both for name, both in series.items() if any(curve.size for curve in both)}
    if not series:
        return
    figure = new_figure(3.4 * len(series), 2.6 + 0.3 * bool(title))
    for axes, (name, (steps, epochs)) in zip(figure.subplots(1, len(series), squeeze=False)[0], series.items(), strict=True):
        axes.plot(*steps, color="#8493a0" if epochs.size else "#1769aa", marker=None if epochs.size else "o", markersize=3)
        axes.plot(*epochs, color="#1769aa", marker="o", markersize=4)
        axes.set_title(metric_title(name), fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=6)
        axes.grid(alpha=0.3)
    if title:
        figure.suptitle(title, fontsize=11)
    save_figure(figure, path)


def metric_title(name: str) -> str:
    """Return a metric's name as people write it."""
    words = re.sub(r"\blr\b", "learning rate", name.replace("_", " "))
    return re.sub(r"\b(auc|ap|ece|mfu|gpu)\b", lambda found: found[0].upper(), words)


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure (inches) that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
