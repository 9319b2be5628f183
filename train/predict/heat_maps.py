"""Heat maps: tile probabilities blended over a film, and the picture of it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mammostream.preprocess.preview import Box
from mammostream.preprocess.resampling import block_mean
from mammostream.train.run.charts import new_figure, save_figure

CAUTION = "Research use only. Not for diagnostic use."
_PANEL_INCHES = 8.0  # a film's height in the picture
_COLOURS = "inferno"
_ALPHA = (0.15, 0.65)  # of probability 0 and 1: what is cold leaves the film to be seen
# What a tile's window is at its edge, as a share of its middle: where edges meet, a point needs some weight.
_EDGE_WEIGHT = 1e-3


def heat_step(size: int) -> int:
    """Return the distance between a heat map's points for tiles of an edge length, in pixels: 32 points along an edge."""
    return max(1, size // 32)


def heat_map(
    shape: tuple[int, int], x: np.ndarray, y: np.ndarray, size: int, probabilities: np.ndarray, step: int
) -> np.ndarray:
    """Blend tile probabilities over a film: each point gets the weighted mean of the tiles that hold its centre.

    A tile's weight is a raised cosine (a Hann window) in both directions: highest in its middle, near 0 at its edges. So the
    map changes smoothly where tiles overlap, and keeps a tile's probability where it lies alone.

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
    rows, columns = (
        _windows((np.arange(-(-length // step)) + 0.5) * step, corners, size)
        for length, corners in zip(shape, (y, x), strict=True)
    )
    # The window is a product of both directions, so a sum over tiles is a product of matrices.
    weight = rows.T @ columns
    total = rows.T @ (columns * np.asarray(probabilities, np.float64)[:, None])
    return np.divide(total, weight, out=np.full_like(total, np.nan), where=weight > 0).astype(np.float32)


def _windows(centres: np.ndarray, corners: np.ndarray, size: int) -> np.ndarray:
    """Return each tile's weight (N, P) at each point along one direction, 0 outside the tile."""
    place = (centres - np.asarray(corners, np.float64)[:, None]) / size
    return np.where((place >= 0) & (place < 1), _EDGE_WEIGHT + np.sin(np.pi * place) ** 2, 0.0)


def draw_heat_map(image: np.ndarray, heat: np.ndarray, step: int, boxes: Sequence[Box], path: Path, title: str) -> None:
    """Draw a film alone with its boxes, and next to it with a heat map over it and the map's colours.

    Parameters
    ----------
    image
        (H, W) float in [0, 1].
    heat, step
        As :func:`heat_map` returns and takes them.
    boxes
        (xmin, ymin, xmax, ymax) in pixels of `image`.
    path
        The PNG.
    title
        Lines above the picture.
    """
    import matplotlib as mpl
    from matplotlib.cm import ScalarMappable
    from matplotlib.patches import Rectangle

    height, width = image.shape
    panel = _PANEL_INCHES * width / height
    figure = new_figure(2 * panel + 1.2, _PANEL_INCHES + 1.0)
    left, right = figure.subplots(1, 2)
    factor = max(1, height // 1200)
    film = block_mean(image, factor)
    for axes in (left, right):
        axes.imshow(film, cmap="gray", vmin=0, vmax=1, extent=_extent(film, factor))
        for xmin, ymin, xmax, ymax in boxes:
            corner = (xmin, ymin), xmax - xmin, ymax - ymin
            axes.add_patch(Rectangle(*corner, facecolor="none", edgecolor="#39d0ff", linewidth=1.5))
        axes.set_axis_off()
    shown = mpl.colormaps[_COLOURS](np.nan_to_num(heat))
    shown[..., 3] = np.where(np.isnan(heat), 0, np.interp(heat, (0, 1), _ALPHA))
    right.imshow(shown, extent=_extent(heat, step), interpolation="nearest")
    for axes in (left, right):
        axes.set(xlim=(0, width), ylim=(height, 0))
    bar = figure.colorbar(ScalarMappable(mpl.colors.Normalize(0, 1), _COLOURS), ax=right, fraction=0.04, pad=0.02)
    bar.set_label("probability", fontsize=11)
    bar.ax.tick_params(labelsize=10)
    # A $ in a name is no formula.
    lines = "\n".join(textwrap.fill(line, round(11 * (2 * panel + 1.2))) for line in title.splitlines())
    figure.suptitle(lines, fontsize=12, parse_math=False)
    figure.supxlabel(CAUTION, fontsize=10, color="#404040")
    save_figure(figure, path)


def _extent(picture: np.ndarray, step: int) -> tuple[int, int, int, int]:
    """Return where a picture lies whose points are `step` pixels of the film wide; the last may reach over its edge."""
    height, width = picture.shape
    return 0, width * step, height * step, 0
