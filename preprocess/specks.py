"""Specks and clusters of them.

A speck is a local maximum of the response of :func:`mammostream.preprocess.energy.speck_response`. A cluster is a group of at
least 5 specks within a circle of 1 cm, the least that BI-RADS calls grouped calcifications (ACR BI-RADS Atlas, 5th edition,
2013: "as few as five calcifications grouped within 1 cm of each other").
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.spatial import cKDTree

from mammostream.preprocess.backend import backend_of

# Maxima closer than this belong to one speck.
SPECK_SIZE_MM = 0.5


def find_specks(response: Any, spacing_mm: float, min_response: float) -> np.ndarray:
    """Return the specks of a film.

    Parameters
    ----------
    response
        (H, W) speck response in noise deviations.
    spacing_mm
        Size of its pixels in mm.
    min_response
        Minimum response of a speck.

    Returns
    -------
    ndarray
        (N, 2) float64, x and y of pixel centres in pixels of `response`, in row order.
    """
    backend = backend_of(response)
    xp = backend.xp
    rows, columns = xp.nonzero(response >= min_response)
    # Few pixels are that bright: looking around each is faster than a maximum filter over all.
    reach = max(1, round(SPECK_SIZE_MM / 2 / spacing_mm))
    padded = xp.pad(response, reach)
    highest = xp.zeros(rows.shape, dtype=response.dtype)
    for down in range(2 * reach + 1):
        for across in range(2 * reach + 1):
            highest = xp.maximum(highest, padded[rows + down, columns + across])
    peak = response[rows, columns] == highest
    return np.stack([backend.to_host(columns[peak]), backend.to_host(rows[peak])], axis=1) + 0.5


def find_clusters(specks: np.ndarray, diameter: float, min_specks: int) -> np.ndarray:
    """Group specks to clusters: the densest circle first, then the densest of what is left.

    Parameters
    ----------
    specks
        (N, 2) x and y.
    diameter
        Diameter of a cluster, in units of `specks`.
    min_specks
        Minimum number of specks of a cluster, at least 1.

    Returns
    -------
    ndarray
        (K, 4) float64: xmin, ymin, xmax, ymax of each cluster's specks.
    """
    # Circles about each speck; about a point between them there might be a better one, but hardly.
    near = [np.array(found) for found in cKDTree(specks).query_ball_point(specks, diameter / 2)] if len(specks) else []
    count = np.array([len(found) for found in near], dtype=int)
    free = np.ones(len(specks), dtype=bool)
    boxes = []
    while len(count) and count.max() >= min_specks:
        chosen = near[count.argmax()]
        chosen = chosen[free[chosen]]
        boxes.append([*specks[chosen].min(axis=0), *specks[chosen].max(axis=0)])
        free[chosen] = False
        for speck in chosen:
            count[near[speck]] -= 1
    return np.array(boxes).reshape(-1, 4)
