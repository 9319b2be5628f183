"""Peaks of heat maps as the marks of a FROC: points, where tiles as marks are squares."""

from __future__ import annotations

import numpy as np

from mammostream.train.predict.heat_maps import heat_map, heat_step

RADIUS = 0.5  # of a tile's edge: of peaks nearer to each other, only the highest is a mark
REACH = 0.25  # of a tile's edge: a peak this near to a box hits it
_DECIMALS = 5  # of probabilities: below, rounding makes peaks of its own where the map is flat


def find_peaks(x: np.ndarray, y: np.ndarray, size: float, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the peaks of a film's heat map and their heights, the highest first.

    The map is that of :func:`mammostream.train.predict.heat_maps.heat_map`. A peak is a point, or the middle of a flat area,
    that is higher than all around it; a map that is flat everywhere is one peak. Of peaks within :data:`RADIUS` of a higher one
    (of equal ones, the upper, then the left one counts as higher), none is kept.

    Parameters
    ----------
    x, y
        (N,) top-left corners of a film's tiles in native pixels.
    size
        Edge length of the tiles.
    probabilities
        (N,) in [0, 1].

    Returns
    -------
    points : numpy.ndarray
        (M, 2) x and y in native pixels.
    scores : numpy.ndarray
        (M,).
    """
    from skimage.measure import label, regionprops_table
    from skimage.morphology import local_maxima

    step = heat_step(int(size))
    corner = np.array([x.min(), y.min()])
    shape = int(y.max() - corner[1] + size), int(x.max() - corner[0] + size)
    heat = heat_map(shape, x - corner[0], y - corner[1], int(size), probabilities, step)
    heat = np.round(np.nan_to_num(heat.astype(np.float64), nan=-1.0), _DECIMALS)
    padded = np.pad(heat, 1, constant_values=-1.0)  # a flat map is a maximum, too
    regions = label(local_maxima(padded) & (padded >= 0), connectivity=2)
    if not regions.any():
        return np.empty((0, 2)), np.empty(0)
    found = regionprops_table(regions, padded, properties=("centroid", "intensity_max"))
    rows, columns, scores = (found[name] for name in ("centroid-0", "centroid-1", "intensity_max"))
    order = np.lexsort((columns, rows, -scores))
    # Row r of the padded map is the point at (r - 1 + 0.5) steps.
    points = corner + (np.stack([columns, rows], 1)[order] - 0.5) * step
    scores = scores[order]
    kept: list[int] = []
    for i, point in enumerate(points):
        if not kept or np.hypot(*(points[kept] - point).T).min() > RADIUS * size:
            kept.append(i)
    return points[kept], scores[kept]


def distance_to_boxes(points: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return the distance of each point to the nearest point of each box, 0 within: (M, B).

    Parameters
    ----------
    points, boxes
        (M, 2) of x, y and (B, 4) of xmin, ymin, xmax, ymax.
    """
    nearest = np.clip(points[:, None], boxes[None, :, :2], boxes[None, :, 2:])
    return np.hypot(*np.moveaxis(nearest - points[:, None], -1, 0))


def peak_marks(
    x: np.ndarray, y: np.ndarray, size: np.ndarray, scores: np.ndarray, boxes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a film's peaks as marks, as :func:`mammostream.train.evaluate.froc.tile_marks` does with its tiles.

    A peak hits a box that it lies in, or is at most :data:`REACH` away from; tiles cannot tell places apart much better. A peak
    that hits none is a false positive.
    """
    edge = float(np.median(size))
    points, heights = find_peaks(x, y, edge, scores)
    hits = distance_to_boxes(points, boxes) <= REACH * edge
    return heights, hits, np.all(~hits, axis=1)
