"""Pictures of a film: its mask's contour and its kept tiles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.files import whole_file
from preprocess.backend import backend_of
from preprocess.tiling import Film

RULE_COLOURS = {"breast": "#3fa7ff", "frequency": "#ff5d5d", "both": "#ffc83d"}
Box = tuple[float, float, float, float]


def draw_film(film: Film, tile_size: int, path: Path, title: str, boxes: Sequence[Box] = ()) -> None:
    """Write a PNG with a film, its mask's contour, its kept tiles coloured by rule, and boxes (native pixels) in white.

    Parameters
    ----------
    film
        The tiled film.
    tile_size
        Edge length of its tiles in pixels of ``film.image``.
    path
        The PNG to write.
    title
        Line above the picture.
    boxes
        (xmin, ymin, xmax, ymax) in native pixels.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import PatchCollection
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle

    to_host = backend_of(film.image).to_host
    step = max(1, max(film.image.shape) // 1000)
    thumbnail = to_host(film.image[::step, ::step])
    mask = to_host(film.segmentation.mask)
    height, width = film.image.shape
    figure = Figure(figsize=(6, 6 * height / width + 0.6), layout="tight")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(thumbnail, cmap="gray", vmin=0, vmax=1, extent=(0, width, height, 0))
    edge = film.segmentation.factor / film.scale
    if mask.any() and not mask.all():
        centres = [(np.arange(n) + 0.5) * edge for n in mask.shape]
        axes.contour(centres[1], centres[0], mask, levels=[0.5], colors="#5dff8f", linewidths=1.2)
    for rule, colour in RULE_COLOURS.items():
        chosen = np.flatnonzero(film.selection.rule == rule)
        tiles = [Rectangle((film.tiles.x[i], film.tiles.y[i]), tile_size, tile_size) for i in chosen]
        axes.add_collection(PatchCollection(tiles, facecolor="none", edgecolor=colour, linewidth=0.5, alpha=0.7))
    for xmin, ymin, xmax, ymax in boxes:
        corner, size = (xmin / film.scale, ymin / film.scale), ((xmax - xmin) / film.scale, (ymax - ymin) / film.scale)
        axes.add_patch(Rectangle(corner, *size, facecolor="none", edgecolor="white", linewidth=1.2))
    handles = [Line2D([], [], color="#5dff8f", label="breast")]
    handles += [Line2D([], [], color=colour, label=f"tile: {rule}") for rule, colour in RULE_COLOURS.items()]
    handles += [Line2D([], [], color="white", label="box")] if len(boxes) else []
    axes.legend(handles=handles, fontsize=6, loc="best", facecolor="#222222", labelcolor="white")
    flags = f"  [{' '.join(film.flags)}]" if film.flags else ""
    counts = film.selection.counts
    axes.set_title(f"{title}: {counts['kept']} of {counts['candidates']} tiles{flags}", fontsize=8)
    axes.set_axis_off()
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
