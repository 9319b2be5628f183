"""Which tiles of a film are kept: background gates, then the breast and the frequency rule, then rescue tiles.

The grid alone would lose clusters of specks near the skin line, where its tiles are mostly background and the gates reject
them. A cluster that no kept tile holds gets a **rescue tile**: one off the grid, shifted inwards just as far as the gates ask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

from mammostream.common.errors import BadInput
from mammostream.common.options import option
from mammostream.preprocess.backend import backend_of

NONZERO_ABOVE = 15 / 255
REJECTIONS = ("intensity", "nonzero", "rules", "pectoral", "limit")
# Positions that are tried along each axis for a rescue tile.
RESCUE_POSITIONS = 16


@dataclass(frozen=True)
class SelectionConfig:
    """Tile size and the thresholds of the gates and rules. Intensities above 1 are read on the 8-bit scale."""

    tile_size: int = option(512, "Edge length of a tile in stored pixels.")
    stride: int = option(256, "Distance between tiles in stored pixels; the last tile is flush with the border.")
    min_breast_ratio: float = option(0.15, "Breast rule: minimum share of breast in a tile, 0-1.")
    min_freq_energy: float = option(
        7.5, "Frequency rule: minimum energy of bright specks per cm²; 1 tile in 20 without calcifications has more."
    )
    min_intensity: float = option(40.0, "Gate: minimum mean intensity; above 1 on the 8-bit scale, else on 0-1.")
    min_nonzero: float = option(0.7, "Gate: minimum share of pixels brighter than 15/255, 0-1.")
    select: str = option(
        "either", "Rules that keep a tile that passed the gates.", choices=("either", "both", "breast", "frequency")
    )
    freq_percentile: float | None = option(
        None, "Frequency threshold as a percentile (0-100) of each film's candidates, instead of --min-freq-energy."
    )
    max_pectoral_ratio: float = option(
        1.0, "Maximum share of pectoral muscle in a tile, 0-1; the default drops no tile. 'preview' draws the muscle."
    )
    max_tiles_per_image: int | None = option(None, "Keep at most this many tiles per film, those of highest energy.")
    min_speck: float = option(4.0, "Rescue tiles: minimum response of a speck, in deviations of the noise around.")
    cluster_specks: int = option(5, "Rescue tiles: minimum number of specks of a cluster; 0 makes no rescue tiles.")
    cluster_mm: float = option(10.0, "Rescue tiles: diameter of a cluster in mm.")

    def __post_init__(self) -> None:
        for name in ("tile_size", "stride"):
            if getattr(self, name) < 1:
                raise BadInput(f"--{name.replace('_', '-')} {getattr(self, name)} is not a positive number of pixels")
        for name in ("min_breast_ratio", "min_nonzero", "max_pectoral_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise BadInput(f"--{name.replace('_', '-')} {getattr(self, name)} is not a share between 0 and 1")
        if not 0 <= self.min_intensity <= 255:
            raise BadInput(f"--min-intensity {self.min_intensity} is not between 0 and 255")
        if self.freq_percentile is not None and not 0 <= self.freq_percentile <= 100:
            raise BadInput(f"--freq-percentile {self.freq_percentile} is not between 0 and 100")
        if self.max_tiles_per_image is not None and self.max_tiles_per_image < 1:
            raise BadInput(f"--max-tiles-per-image {self.max_tiles_per_image} is not positive")
        if self.cluster_specks < 0 or self.cluster_mm <= 0 or self.min_speck <= 0:
            raise BadInput("--cluster-specks must not be negative; --cluster-mm and --min-speck must be above 0")

    @property
    def intensity_gate(self) -> float:
        """The intensity gate on the [0, 1] scale."""
        return self.min_intensity / 255 if self.min_intensity > 1 else self.min_intensity


@dataclass(frozen=True)
class ScoreMaps:
    """What tiles are scored by: maps on coarser grids that cover the image, so that any box is measured fast.

    Attributes
    ----------
    intensity, nonzero
        (h, w) mean intensity in [0, 1], and share of pixels above 15/255.
    energy
        (h, w) pixel energy of :func:`mammostream.preprocess.energy.pixel_energy`.
    mask, pectoral
        (h', w') bool, the breast and the pectoral muscle; None for no muscle.
    scale, mask_scale
        Pixels of the image an edge of a pixel of the maps, and of the mask.
    """

    intensity: Any
    nonzero: Any
    energy: Any
    mask: Any
    scale: float
    mask_scale: float
    pectoral: Any = None

    @cached_property
    def _integrals(self) -> dict[str, Any]:
        # Rescue tiles are looked for many times.
        maps = ("intensity", "nonzero", "energy", "mask", "pectoral")
        return {name: integral(values) for name in maps if (values := getattr(self, name)) is not None}

    def measure(self, x: np.ndarray, y: np.ndarray, size: int) -> Scores:
        """Return the scores of tiles of `size` pixels whose left and top edges are `x` and `y`."""
        to_host = backend_of(self.intensity).to_host

        def means(name: str, scale: float) -> np.ndarray:
            return to_host(box_means(self._integrals[name], y / scale, x / scale, size / scale, size / scale))

        muscle = np.zeros(len(x)) if self.pectoral is None else means("pectoral", self.mask_scale)
        return Scores(
            x=x,
            y=y,
            breast_ratio=np.clip(means("mask", self.mask_scale), 0, 1),
            freq_energy=np.maximum(means("energy", self.scale), 0),
            mean_intensity=np.clip(means("intensity", self.scale), 0, 1),
            nonzero_ratio=np.clip(means("nonzero", self.scale), 0, 1),
            # Differences of sums leave 1e-12 where there is no muscle, which a maximum of 0 would reject.
            pectoral_ratio=np.clip(muscle, 0, 1).round(6),
        )


@dataclass(frozen=True)
class Scores:
    """Tiles as columns of equal length (NumPy).

    Attributes
    ----------
    x, y
        Left and top edge in pixels of the image that was given.
    breast_ratio, mean_intensity, nonzero_ratio, pectoral_ratio
        In [0, 1]. The muscle is part of the breast.
    freq_energy
        Energy of bright specks per cm², 0 to 20,000.
    """

    x: np.ndarray
    y: np.ndarray
    breast_ratio: np.ndarray
    freq_energy: np.ndarray
    mean_intensity: np.ndarray
    nonzero_ratio: np.ndarray
    pectoral_ratio: np.ndarray

    def take(self, chosen: np.ndarray) -> Scores:
        """Return the rows that an index or a mask chooses."""
        return Scores(*(getattr(self, field.name)[chosen] for field in fields(self)))

    def append(self, other: Scores) -> Scores:
        """Return these rows and then those of `other`."""
        return Scores(*(np.append(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)))


@dataclass(frozen=True)
class TileSelection:
    """The kept tiles of a film, and what became of the others.

    Attributes
    ----------
    tiles
        The kept tiles: those of the grid in row order, then rescue tiles.
    rule
        ``breast``, ``frequency`` or ``both``: the rules that each tile meets; or ``rescue``.
    candidates, fate
        All tiles of the grid in row order, and for each ``kept`` or what rejected it first: ``intensity``, ``nonzero``,
        ``rules``, ``pectoral``, ``limit``.
    clusters
        (K, 4) xmin, ymin, xmax, ymax of the speck clusters that were looked at.
    unheld
        How many of them no kept tile holds.
    threshold
        Minimum energy that the frequency rule asked for on this film; infinite where a percentile had no candidate to go by.
    """

    tiles: Scores
    rule: np.ndarray
    candidates: Scores
    fate: np.ndarray
    clusters: np.ndarray
    unheld: int
    threshold: float

    @property
    def counts(self) -> dict[str, int]:
        """Counts for ``images.parquet``: candidates, ``rejected_*`` (each candidate once), kept, ``kept_*``, clusters."""
        return {
            "candidates": len(self.fate),
            **{f"rejected_{why}": int((self.fate == why).sum()) for why in REJECTIONS},
            "kept": len(self.rule),
            "kept_breast_only": int((self.rule == "breast").sum()),
            "kept_frequency_only": int((self.rule == "frequency").sum()),
            "kept_both_rules": int((self.rule == "both").sum()),
            "kept_rescue": int((self.rule == "rescue").sum()),
            "clusters": len(self.clusters),
            "clusters_unheld": self.unheld,
        }


def grid_positions(length: int, size: int, stride: int, min_step: int = 1) -> np.ndarray:
    """Return the tile offsets along one axis: every `stride` pixels, the last flush with the border.

    A length below `size` gives the single offset 0; the caller pads. The flush offset takes the place of a last one that
    lies less than `min_step` before it.
    """
    last = max(length - size, 0)
    return np.append(np.arange(0, last - min_step + 1, stride), last)


def integral(values: Any) -> Any:
    """Return the sums of `values` (H, W) above and left of each pixel's corner: (H + 1, W + 1) float64."""
    xp = backend_of(values).xp
    return xp.pad(xp.cumsum(xp.cumsum(values, axis=0, dtype=xp.float64), axis=1), ((1, 0), (1, 0)))


def box_means(sums: Any, top: Any, left: Any, height: float, width: float) -> Any:
    """Return the mean of an image over boxes, exact for fractional corners.

    Parameters
    ----------
    sums
        The image's :func:`integral`.
    top, left
        (N,) corners in pixels of the image, may be fractional; parts beyond the image count as its edge is reached.
    height, width
        Size of every box in pixels, may be fractional.

    Returns
    -------
    Any
        (N,) float64.
    """
    backend = backend_of(sums)
    xp = backend.xp
    top, left = xp.asarray(top, dtype=xp.float64), xp.asarray(left, dtype=xp.float64)
    bottom = xp.minimum(top + height, sums.shape[0] - 1)
    right = xp.minimum(left + width, sums.shape[1] - 1)

    def at(rows: Any, columns: Any) -> Any:
        # Linear interpolation of an integral image is exact: it is linear within every pixel's row and column.
        return backend.ndimage.map_coordinates(sums, xp.stack([rows, columns]), order=1, mode="nearest")

    total = at(bottom, right) - at(top, right) - at(bottom, left) + at(top, left)
    return total / xp.maximum((bottom - top) * (right - left), 1e-9)


def select_tiles(
    shape: tuple[int, int],
    maps: ScoreMaps,
    config: SelectionConfig,
    clusters: np.ndarray | None = None,
    min_step: int = 1,
    inside: tuple[slice, slice] = (slice(None), slice(None)),
) -> TileSelection:
    """Score every tile of the grid, keep those that pass the gates and the rules, and add rescue tiles.

    Parameters
    ----------
    shape
        Height and width of the image in pixels, at least one tile each (pad before).
    maps
        What tiles are scored by.
    config
        Tile size, stride, thresholds.
    clusters
        (K, 4) xmin, ymin, xmax, ymax of speck clusters in pixels of the image. Those that no kept tile holds get a rescue
        tile, unless the frequency rule has no say (``--select breast``).
    min_step
        Minimum distance of tiles in pixels: that of a native pixel, so that no two share a native corner.
    inside
        Rows and columns of the image that the grid covers, so that no tile lies on a film's border; an axis that is shorter
        than a tile within its borders is covered whole.
    """
    size = config.tile_size
    rows, columns = (_grid_axis(n, part, config, min_step) for n, part in zip(shape, inside, strict=True))
    y, x = (grid.ravel() for grid in np.meshgrid(rows, columns, indexing="ij"))
    scores = maps.measure(x, y, size)
    bright, full = _gates(scores, config)
    gated = bright & full
    threshold = config.min_freq_energy
    if config.freq_percentile is not None:
        threshold = np.percentile(scores.freq_energy[gated], config.freq_percentile) if gated.any() else math.inf
        # Where nothing stands out in most tiles, the percentile is 0 and would keep them all.
        threshold = max(threshold, np.nextafter(0, 1))
    by_breast = scores.breast_ratio >= config.min_breast_ratio
    by_frequency = scores.freq_energy >= threshold
    chosen = {
        "either": by_breast | by_frequency,
        "both": by_breast & by_frequency,
        "breast": by_breast,
        "frequency": by_frequency,
    }[config.select]
    muscle = scores.pectoral_ratio > config.max_pectoral_ratio
    fate = np.select([~bright, ~full, ~chosen, muscle], REJECTIONS[:4], "kept").astype(object)
    rule = np.select([by_breast & by_frequency, by_breast], ["both", "breast"], "frequency").astype(object)

    on_grid = np.flatnonzero(fate == "kept")
    tiles, rule = scores.take(on_grid), rule[on_grid]
    clusters = np.zeros((0, 4)) if clusters is None or config.select == "breast" else clusters
    for box in clusters:
        if not _holds(tiles, size, box).any():
            rescue = _rescue_tile(shape, maps, config, box, tiles, min_step)
            if rescue is not None:
                tiles, rule = tiles.append(rescue), np.append(rule, "rescue")
    limit = config.max_tiles_per_image
    if limit and len(rule) > limit:
        # Stable sort: equal energies keep their order.
        best = np.sort(np.argsort(-tiles.freq_energy, kind="stable")[:limit])
        fate[np.setdiff1d(on_grid, on_grid[best[best < len(on_grid)]])] = "limit"
        tiles, rule = tiles.take(best), rule[best]
    unheld = sum(not _holds(tiles, size, box).any() for box in clusters)
    return TileSelection(tiles, rule, scores, fate, clusters, unheld, float(threshold))


def _grid_axis(length: int, part: slice, config: SelectionConfig, min_step: int) -> np.ndarray:
    start, stop, _ = part.indices(length)
    if stop - start < config.tile_size:
        start, stop = 0, length
    return start + grid_positions(stop - start, config.tile_size, config.stride, min_step)


def _gates(scores: Scores, config: SelectionConfig) -> tuple[np.ndarray, np.ndarray]:
    return scores.mean_intensity >= config.intensity_gate, scores.nonzero_ratio >= config.min_nonzero


def _holds(tiles: Scores, size: int, box: Sequence[float] | np.ndarray) -> np.ndarray:
    """Tell for each tile whether a box lies in it."""
    xmin, ymin, xmax, ymax = box
    return (tiles.x <= xmin) & (tiles.y <= ymin) & (tiles.x + size >= xmax) & (tiles.y + size >= ymax)


def _rescue_tile(
    shape: tuple[int, int], maps: ScoreMaps, config: SelectionConfig, box: np.ndarray, kept: Scores, min_step: int
) -> Scores | None:
    """Return the tile that holds a box and passes the gates with the box nearest to its middle, or None."""
    size = config.tile_size
    step = max(min_step, size // RESCUE_POSITIONS)
    axes = []
    for low, high, length in ((box[1], box[3], shape[0]), (box[0], box[2], shape[1])):
        first, last = max(math.ceil(high) - size, 0), min(math.floor(low), length - size)
        axes.append(np.unique(np.append(np.arange(first, last, step), last)) if first <= last else np.zeros(0, int))
    y, x = (grid.ravel() for grid in np.meshgrid(*axes, indexing="ij"))
    if not len(x):
        return None
    # No two tiles may share a native corner.
    apart = np.abs(x[:, None] - kept.x) >= min_step
    apart |= np.abs(y[:, None] - kept.y) >= min_step
    scores = maps.measure(x, y, size)
    bright, full = _gates(scores, config)
    fits = bright & full & apart.all(axis=1) & (scores.pectoral_ratio <= config.max_pectoral_ratio)
    if config.select == "both":
        fits &= scores.breast_ratio >= config.min_breast_ratio
    if not fits.any():
        return None
    off_centre = np.hypot(x + size / 2 - (box[0] + box[2]) / 2, y + size / 2 - (box[1] + box[3]) / 2)
    return scores.take(np.array([np.where(fits, off_centre, np.inf).argmin()]))
