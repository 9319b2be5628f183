"""Pictures of a run: its curves, what the network sees, and where on a film it answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.files import whole_file
from preprocess.preview import Box

if TYPE_CHECKING:
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


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
