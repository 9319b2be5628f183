"""Scores of images and breasts: the highest tile, the mean of the highest few, and noisy-or; tile tables come in parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.special import logit

if TYPE_CHECKING:
    from mammostream.train.levels.calibration import Calibration

PROBABILITY = "prob:"  # column prefix of the tile table
TOP_TILES = 3
MAX, TOP, NOISY_OR = "max", "top{}", "noisy_or"
_CERTAIN = 1e-7  # a probability nearer to 0 or 1 counts as this near: about what float32 resolves at 1


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

    def table(self, calibration: Mapping[str, Calibration] | None = None) -> pd.DataFrame:
        """Return one row per group, in the order they came: `by`, ``tiles``, and the :func:`score_columns` of each class.

        Parameters
        ----------
        calibration
            Score (``max`` and so on) -> what turns it into a probability of the group; a score without one stays as it is.
        """
        keys = list(self._groups)
        columns: dict[str, Any] = {name: [key[i] for key in keys] for i, name in enumerate(self._by)}
        columns["tiles"] = [count for count, _, _ in self._groups.values()]
        shape = len(keys), len(self._names)
        log_none = np.reshape([none for _, _, none in self._groups.values()], shape)
        scores = {
            MAX: np.reshape([highest[-1] for _, highest, _ in self._groups.values()], shape),
            TOP.format(self._top): np.reshape([highest.mean(0) for _, highest, _ in self._groups.values()], shape),
            NOISY_OR: -np.expm1(log_none),
        }
        for score, values in scores.items():
            if calibration and score in calibration:
                scores[score] = calibration[score](noisy_or_logits(log_none) if score == NOISY_OR else logits_of(values))
        for c, name in enumerate(self._names):
            columns |= {f"{score}:{name}": values[:, c] for score, values in scores.items()}
        return pd.DataFrame(columns)


def score_columns(class_name: str, top: int = TOP_TILES) -> list[str]:
    """Return the names of a class's columns in a table of images or breasts, in their order.

    ``max:<class>``, from the highest tile; ``top3:<class>``, from the mean of the three highest (of all if there are fewer);
    and ``noisy_or:<class>``, from ``1 - prod(1 - p)``: the probability that any tile is positive if tiles were independent.
    They overlap, so they are not, and with many tiles it is near 1 for every image: only its calibrated form is a probability.
    Never the mean over all tiles: a lesion would drown in a normal breast.
    """
    return [f"{kind}:{class_name}" for kind in (MAX, TOP.format(top), NOISY_OR)]


def logits_of(probabilities: np.ndarray) -> np.ndarray:
    """Return the logits of probabilities, float64, finite for 0 and 1 as well."""
    return logit(np.clip(np.asarray(probabilities, np.float64), _CERTAIN, 1 - _CERTAIN))


def noisy_or_logits(log_none: np.ndarray) -> np.ndarray:
    """Return the logits of noisy-or from ``sum(log(1 - p))``, which still tells images apart whose noisy-or rounds to 1."""
    log_none = np.clip(log_none, -1e9, -_CERTAIN)
    return np.log(-np.expm1(log_none)) - log_none


def unit_logits(probabilities: np.ndarray, units: np.ndarray, top: int = TOP_TILES) -> dict[str, np.ndarray]:
    """Return the logits of each score of images or breasts.

    Parameters
    ----------
    probabilities
        (N, C) of tiles.
    units
        (N,) image or breast of each tile, as numbers from 0 to G - 1.
    top
        How many of the highest tiles the mean is of.

    Returns
    -------
    dict
        ``max``, ``top<top>``, ``noisy_or`` -> (G, C).
    """
    p = np.asarray(probabilities, np.float64)
    count = int(units.max()) + 1 if len(units) else 0
    found = {name: np.empty((count, p.shape[1])) for name in (MAX, TOP.format(top), NOISY_OR)}
    for c in range(p.shape[1]):
        order = np.lexsort((-p[:, c], units))
        rows = pd.DataFrame({"unit": units[order], "p": p[order, c]})
        groups = rows.groupby("unit")["p"]
        found[MAX][:, c] = logits_of(groups.first())
        found[TOP.format(top)][:, c] = logits_of(rows[groups.cumcount() < top].groupby("unit")["p"].mean())
        with np.errstate(divide="ignore"):
            found[NOISY_OR][:, c] = noisy_or_logits(np.log1p(-rows["p"]).groupby(rows["unit"]).sum().to_numpy())
    return found


def aggregate(
    tiles: pd.DataFrame, by: Sequence[str], top: int = TOP_TILES, calibration: Mapping[str, Calibration] | None = None
) -> pd.DataFrame:
    """Aggregate a whole tile table to images or breasts.

    Parameters
    ----------
    tiles
        A tile table with probability columns.
    by
        The columns that name a group.
    top
        How many of the highest tiles the mean is of.
    calibration
        See :meth:`Groups.table`.

    Returns
    -------
    pandas.DataFrame
        See :meth:`Groups.table`.
    """
    names = [c.removeprefix(PROBABILITY) for c in tiles.columns if c.startswith(PROBABILITY)]
    groups = Groups(by, names, top)
    groups.add(tiles)
    return groups.table(calibration)
