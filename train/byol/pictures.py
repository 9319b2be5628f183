"""The picture of what the network is shown: tiles and their views."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mammostream.train.run.charts import new_figure, save_figure


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
    figure = new_figure(1.5 * count + 0.5, 1.5 * len(rows))
    grid = figure.subplots(len(rows), count, squeeze=False)
    # One grey scale for a tile and its views, so that brightness can be compared.
    scales = np.percentile(np.stack(list(rows.values())), [0.2, 99.8], axis=(0, 2, 3))
    for line, (name, tiles) in zip(grid, rows.items(), strict=True):
        for axes, tile, low, high in zip(line, tiles, *scales, strict=True):
            axes.imshow(tile, cmap="gray", vmin=low, vmax=high)
            axes.set_xticks([])
            axes.set_yticks([])
        line[0].set_ylabel(name, fontsize=9)
    save_figure(figure, path)
