"""Class-balanced sampling: which tiles an epoch reads, how often, and in which order.

The training tiles form *strata*: the positives of each class that has any, and the tiles that are positive in no class. A tile
that is positive in several classes is in the stratum of each; a missing label counts as not positive. An epoch has as many
draws as there are tiles. Each stratum gets the same number of them (those left over go to strata at random, one each), and
within a stratum every tile is drawn equally often (but for one, at random). So a small stratum is repeated and of a large one a
part is left out, another part each epoch. Everything follows from the labels, the seed and the epoch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mammostream.common.errors import BadInput


def strata_of(labels: np.ndarray) -> list[np.ndarray]:
    """Return the rows of each stratum: one per class, in their order, then that of no class; empty ones stay in the list.

    Parameters
    ----------
    labels
        (N, C) of 1, 0 and NaN for a missing label.
    """
    positive = labels == 1
    return [*map(np.flatnonzero, positive.T), np.flatnonzero(~positive.any(1))]


def check_strata(labels: np.ndarray, class_names: Sequence[str]) -> None:
    """Check that there is something to balance.

    Raises
    ------
    BadInput
        Only one stratum has tiles, or none.
    """
    if sum(len(rows) > 0 for rows in strata_of(labels)) < 2:
        found = "all training tiles are" if (labels == 1).any() else "no training tile is"
        raise BadInput(
            f"--sampling balanced: {found} positive (classes: {', '.join(class_names)}), so there is nothing to balance; use "
            "--sampling natural"
        )


def balanced_numbers(numbers: np.ndarray, labels: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Return the tiles that an epoch draws, in a random order: (N,) of `numbers`.

    Parameters
    ----------
    numbers
        (N,) what names each tile.
    labels
        (N, C) of 1, 0 and NaN for a missing label.
    seed, epoch
        Decide all draws; epochs count from 0.
    """
    rng = np.random.default_rng([seed, epoch])
    strata = [rows for rows in strata_of(labels) if len(rows)]
    share, left = divmod(len(labels), len(strata))
    draws = share + (rng.permutation(len(strata)) < left)
    drawn = []
    for rows, count in zip(strata, draws.tolist(), strict=True):
        times, rest = divmod(count, len(rows))
        drawn += [np.repeat(rows, times), rng.permutation(rows)[:rest]]
    return numbers[rng.permutation(np.concatenate(drawn))]


def expected_draws(labels: np.ndarray) -> np.ndarray:
    """Return how often an epoch draws each row on average: float64 (N,), with the sum N."""
    strata = [rows for rows in strata_of(labels) if len(rows)]
    expected = np.zeros(len(labels))
    for rows in strata:
        expected[rows] += len(labels) / len(strata) / len(rows)
    return expected


def describe_sampling(labels: np.ndarray, class_names: Sequence[str]) -> str:
    """Return one line on the strata for the console."""
    named = zip([*class_names, "positive in no class"], strata_of(labels), strict=True)
    filled = [(name, len(rows)) for name, rows in named if len(rows)]
    each = len(labels) / len(filled)
    return f"balanced sampling, {len(labels)} draws an epoch, about {each:.0f} from each of: " + ", ".join(
        f"{name} ({count} tiles, {each / count:.2g} times each)" for name, count in filled
    )
