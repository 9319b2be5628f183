"""The pectoral muscle on oblique views: a straight line along its edge, refined to a curve; or none.

The two steps are those of the published methods: a straight line (N. Karssemeijer, Phys. Med. Biol. 43, 1998, 365-378, by
the Hough transform), then a curve along the edge near it (S. M. Kwok et al., IEEE Trans. Med. Imaging 23, 2004, 1129-1140).
Here all lines across the upper corner at the chest wall are compared, and the curve is the best path in a band around the best.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter1d

from mammostream.preprocess.backend import Backend, backend_of
from mammostream.preprocess.resampling import block_mean
from mammostream.preprocess.segmentation import Segmentation
from mammostream.preprocess.views import normal_view

_FROM_ABOVE, _OF_A_PART = ("FB", "CV"), {"magnification", "spot", "tangential"}
GRID_MM = 0.8
EDGE_SIGMA_MM = 2.0
HALF_GRADIENT = 0.015  # of tissue's range per mm: an edge of this gradient counts half, a steep one 1
# Lines that are compared: where they cut the upper end of the breast, and the chest wall below it.
TOPS_MM, ENDS_MM = np.arange(8.0, 101.0, 2.0), np.arange(28.0, 221.0, 4.0)
# Degrees between line and chest wall; with the curve's steepest slope against its line (27), less than a right angle.
MIN_ANGLE, MAX_ANGLE = 8.0, 62.0
LINE_POINTS = 48
LENGTH_POWER = 0.35  # of two lines with the same edge the longer one counts more, by this power
TISSUE_BEYOND_MM = 4.0  # the skin line, with nothing beyond, is no edge of the muscle
BAND_MM, BEND_COST, DEVIATION_COST, END_MM = 12.0, 0.06, 0.2, 2.0
SMOOTHING_MM = 3.0
# Mean edge along the curve, 0-1: below it, there is no muscle. Where the view is unknown the shape has to show more.
MIN_EDGE, MIN_CLEAR_EDGE = 0.4, 0.5
CLEAR_PART, MIN_CLEAR_PART = 0.3, 0.85  # this part of the curve has an edge of at least so much
MAX_ABOVE_MM, MIN_TOP_MM, MIN_WIDTH_MM, MIN_WIDENING = 4.0, 20.0, 40.0, 0.8


def view_of(text: str) -> str:
    """Return ``CC``, ``MLO`` or, for any other view, part of one and an unknown one, "".

    Exaggerated CC views, ``CV`` (cleavage) and ``FB`` (from below) count as CC: seen along the same axis. A magnified or spot
    MLO view shows a part of the breast, most often without the muscle.
    """
    view, letters = normal_view(str(text)), re.sub("[^A-Z]", "", str(text).upper())
    # Also in words that name no known view: none is drawn where CC may be meant.
    if view.name in _FROM_ABOVE or re.search("CC|CRANIOCAUD|CAUDOCRANI", letters):
        return "CC"
    return "MLO" if view.name == "MLO" and _OF_A_PART.isdisjoint(view.modifiers) else ""


def pectoral_muscle(coarse: Any, segmentation: Segmentation, view: str = "") -> Any:
    """Find the pectoral muscle in the upper corner at the chest wall.

    Parameters
    ----------
    coarse
        (h, w) image on the mask's grid, brighter = denser.
    segmentation
        The breast.
    view
        As a header or a manifest has it. On CC views there is none. On views that are neither MLO nor CC, and unknown ones, it
        has to show clearly, in a breast that reaches the film's upper end.

    Returns
    -------
    Any
        (h, w) bool, within the breast's mask; all False where no muscle is found.
    """
    backend = backend_of(coarse)
    xp = backend.xp
    muscle = xp.zeros(coarse.shape, dtype=bool)
    known = view_of(view)
    if known == "CC" or not segmentation.side:
        return muscle
    # Seen with the chest wall at the left, within the film's borders.
    image, mask, inner = (a[segmentation.inside] for a in (coarse, segmentation.mask, muscle))
    if segmentation.side == "R":
        image, mask, inner = image[:, ::-1], mask[:, ::-1], inner[:, ::-1]
    corner = _Corner.of(backend, xp.nan_to_num(image, posinf=0, neginf=0), mask, segmentation.spacing_mm)
    line = corner and _best_line(corner)
    if not (corner and line) or not (known or _shape_shows(corner, *line)):
        return muscle
    rows, columns, edge = _curve(corner, *line)
    if edge.mean() < MIN_EDGE:
        return muscle
    if not known and (edge.mean() < MIN_CLEAR_EDGE or (edge >= CLEAR_PART).mean() < MIN_CLEAR_PART):
        return muscle
    step = corner.grid_mm / segmentation.spacing_mm
    width = np.interp(np.arange(len(inner)) + 0.5, rows * step, columns * step, right=0.0)
    inner[...] = mask & (xp.arange(inner.shape[1])[None] + 0.5 < xp.asarray(width)[:, None])
    return muscle


@dataclass(frozen=True)
class _Corner:
    """A breast with the chest wall at the left, on a grid of about 0.8 mm.

    Attributes
    ----------
    mask
        (h, w) bool, the breast.
    down, out
        (h, w) steepness of the brightness' fall downwards and away from the wall, together at most 1.
    top
        The breast's first row.
    """

    backend: Backend
    mask: Any
    down: Any
    out: Any
    top: int
    grid_mm: float

    @classmethod
    def of(cls, backend: Backend, image: Any, mask: Any, spacing: float) -> _Corner | None:
        xp = backend.xp
        step = max(1, round(GRID_MM / spacing))
        grid = spacing * step
        image, mask = block_mean(image, step), block_mean(mask, step) > 0.5
        if not bool(mask.any()):
            return None
        low, high = float(xp.percentile(image, 2.0)), float(xp.percentile(image[mask], 99.0))
        image = xp.clip((image - low) / max(high - low, 1e-6), 0, 1)
        down, out = (-backend.ndimage.gaussian_filter(image, EDGE_SIGMA_MM / grid, order=o) / grid for o in ((1, 0), (0, 1)))
        steep = xp.hypot(down, out) + HALF_GRADIENT
        return cls(backend, mask, down / steep, out / steep, int(mask.any(axis=1).argmax()), grid)

    def edge(self, y: np.ndarray, x: np.ndarray, down: Any, out: Any) -> np.ndarray:
        """Return how steeply brightness falls at points (mm below `top` and from the wall) in a direction, -1 to 1.

        It is 0 outside the breast, and where the breast ends in that direction.
        """
        xp = self.backend.xp
        height, width = self.mask.shape

        def place(beyond: float) -> tuple[Any, Any, Any]:
            row = np.floor((y + down * beyond) / self.grid_mm).astype(int) + self.top
            column = np.floor((x + out * beyond) / self.grid_mm).astype(int)
            there = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            return tuple(xp.asarray(a) for a in (np.clip(row, 0, height - 1), np.clip(column, 0, width - 1), there))

        row, column, there = place(TISSUE_BEYOND_MM)
        tissue = self.mask[row, column] & there
        row, column, there = place(0.0)
        fall = self.down[row, column] * xp.asarray(down) + self.out[row, column] * xp.asarray(out)
        return self.backend.to_host(xp.where(tissue & there, fall, 0))


def _best_line(corner: _Corner) -> tuple[float, float] | None:
    """Return where the line along the best edge cuts the upper end of the breast (mm from the wall) and the wall (mm below)."""
    top, end = (a.ravel() for a in np.meshgrid(TOPS_MM, ENDS_MM, indexing="ij"))
    angle = np.arctan2(top, end)
    rows = corner.mask[corner.top : corner.top + max(1, round(8 / corner.grid_mm))]
    width = float(rows.sum(axis=1).max()) * corner.grid_mm
    tried = (angle >= np.radians(MIN_ANGLE)) & (angle <= np.radians(MAX_ANGLE)) & (top < width)
    if not tried.any():
        return None
    top, end, angle = top[tried], end[tried], angle[tried, None]
    along = (np.arange(LINE_POINTS) + 0.5) / LINE_POINTS
    edge = corner.edge(np.outer(end, along), np.outer(top, 1 - along), np.sin(angle), np.cos(angle))
    best = (edge.mean(axis=1) * np.hypot(top, end) ** LENGTH_POWER).argmax()
    return float(top[best]), float(end[best])


def _shape_shows(corner: _Corner, top: float, end: float) -> bool:
    """Return whether a line lies as the muscle's edge does: in a breast that comes from above, and is wide where it ends.

    The edge of a CC view's gland, or of a part of a breast, ends where the breast does.
    """
    width = corner.mask.sum(axis=1) * corner.grid_mm
    rows = corner.top + np.array([0.5, end / corner.grid_mm + 0.5]).astype(int)
    if corner.top * corner.grid_mm > MAX_ABOVE_MM or top < MIN_TOP_MM or rows[1] >= len(width):
        return False
    above, below = (float(width[row]) for row in rows)
    return below >= max(MIN_WIDTH_MM, MIN_WIDENING * above)


def _curve(corner: _Corner, top: float, end: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the curve along the best edge near a line: its rows (increasing), its columns, and the edge along it."""
    grid = corner.grid_mm
    length = np.hypot(top, end)
    down, out = top / length, end / length  # across the line, away from the muscle; along it: out, -down
    along = np.arange(-BAND_MM, length + BAND_MM, grid)
    across = np.arange(-round(2 * BAND_MM / grid), round(2 * BAND_MM / grid) + 1) * grid / 2
    y = along[:, None] * out + across * down
    x = top - along[:, None] * down + across * out
    edge = corner.edge(y, x, down, out)
    own = (along >= 0) & (along <= length)
    edge[~own] = 0  # the film's edge, and what lies below the muscle
    value = edge - DEVIATION_COST * (across / BAND_MM) ** 2
    value[np.ix_(along >= length, across > END_MM)] = -len(along)  # it ends at the wall
    path = _best_path(value)
    edge = edge[np.arange(len(along)), path][own]
    offset = gaussian_filter1d(across[path], SMOOTHING_MM / grid, mode="nearest")
    return (y[:, 0] + (offset - across[0]) * down) / grid + corner.top, (x[:, 0] + (offset - across[0]) * out) / grid, edge


def _best_path(value: np.ndarray) -> np.ndarray:
    """Return for each row of values the column of the path of the greatest sum, which moves by at most 1 at a cost."""
    total, moves = value[0], np.zeros(value.shape, dtype=int)
    reached = np.full((3, value.shape[1]), -np.inf)
    for row in range(1, len(value)):
        reached[0, 1:], reached[1], reached[2, :-1] = total[:-1] - BEND_COST, total, total[1:] - BEND_COST
        moves[row] = reached.argmax(axis=0) - 1
        total = reached.max(axis=0) + value[row]
    path = np.empty(len(value), dtype=int)
    path[-1] = total.argmax()
    for row in range(len(value) - 1, 0, -1):
        path[row - 1] = path[row] + moves[row][path[row]]
    return path
