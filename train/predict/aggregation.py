"""From tiles to images and breasts: the highest tile, the mean of the highest few, and noisy-or; tile tables come in parts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

PROBABILITY = "prob:"  # column prefix of the tile table
TOP_TILES = 3
MAX, TOP, NOISY_OR = "max", "top{}", "noisy_or"


class Groups:
    """Tiles gathered by image or breast; what is kept of a group does not grow with its tiles.

    Parameters
    ----------
    by
        The columns that name a group.
    class_names
        C classes; each has a column ``prob:<class>``.
    top
        How many of the highest tiles the mean is of.
    """

    def __init__(self, by: Sequence[str], class_names: Sequence[str], top: int = TOP_TILES) -> None:
        self._by, self._names, self._top = list(by), list(class_names), top
        # By group: number of tiles; the highest probabilities, ascending, (<= top, C); sum of log(1 - p), (C,).
        self._groups: dict[tuple, tuple[int, np.ndarray, np.ndarray]] = {}

    def add(self, tiles: pd.DataFrame) -> None:
        """Add tiles; those without a probability, which could not be read, count for nothing."""
        columns = [PROBABILITY + name for name in self._names]
        tiles = tiles[tiles[columns].notna().all(axis=1)]
        for key, rows in tiles.groupby(self._by, sort=False, dropna=False):
            p = rows[columns].to_numpy(np.float64)
            count, highest, log_none = self._groups.get(key, (0, p[:0], 0.0))
            with np.errstate(divide="ignore"):  # of a tile that is certain
                log_none = log_none + np.log1p(-p).sum(0)
            highest = np.sort(np.concatenate([highest, p]), axis=0)[-self._top :]
            self._groups[key] = (count + len(p), highest, log_none)

    def table(self) -> pd.DataFrame:
        """Return a row a group, in the order they came: `by`, ``tiles``, and of each class :func:`score_columns`."""
        keys = list(self._groups)
        columns = {name: [key[i] for key in keys] for i, name in enumerate(self._by)}
        columns["tiles"] = [count for count, _, _ in self._groups.values()]
        for c, name in enumerate(self._names):
            scores = (
                [highest[-1, c] for _, highest, _ in self._groups.values()],
                [highest[:, c].mean() for _, highest, _ in self._groups.values()],
                [-np.expm1(log_none[c]) for _, _, log_none in self._groups.values()],
            )
            columns |= dict(zip(score_columns(name, self._top), scores, strict=True))
        return pd.DataFrame(columns)


def score_columns(class_name: str, top: int = TOP_TILES) -> list[str]:
    """Return the names of a class's columns in a table of images or breasts, in their order.

    ``max:<class>``; ``top3:<class>``, the mean of the three highest tiles (of all, where there are fewer); and
    ``noisy_or:<class>``, ``1 - prod(1 - p)``: the probability that any tile is positive, were tiles independent. They overlap,
    so they are not: it ranks rather than measures. Never the mean over all tiles: a lesion would drown in a normal breast.
    """
    return [f"{kind}:{class_name}" for kind in (MAX, TOP.format(top), NOISY_OR)]


def aggregate(tiles: pd.DataFrame, by: Sequence[str], top: int = TOP_TILES) -> pd.DataFrame:
    """Aggregate a whole tile table to images or breasts.

    Parameters
    ----------
    tiles
        A tile table with probability columns.
    by
        The columns that name a group.
    top
        How many of the highest tiles the mean is of.

    Returns
    -------
    pandas.DataFrame
        See :meth:`Groups.table`.
    """
    names = [c.removeprefix(PROBABILITY) for c in tiles.columns if c.startswith(PROBABILITY)]
    groups = Groups(by, names, top)
    groups.add(tiles)
    return groups.table()
