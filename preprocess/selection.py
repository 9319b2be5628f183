"""Which tiles of a film are kept: background gates, then the breast and the frequency rule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.errors import BadInput
from common.options import option
from preprocess.backend import backend_of

NONZERO_ABOVE = 15 / 255


@dataclass(frozen=True)
class SelectionConfig:
    """Tile size and the thresholds of the gates and rules. Intensities above 1 are read on the 8-bit scale."""

    tile_size: int = option(512, "Edge length of a tile in stored pixels.")
    stride: int = option(256, "Distance between tiles in stored pixels; the last tile is flush with the border.")
    min_breast_ratio: float = option(0.15, "Breast rule: least share of breast in a tile, 0-1.")
    min_freq_energy: float = option(0.5, "Frequency rule: least energy of bright specks, in noise deviations.")
    min_intensity: float = option(40.0, "Gate: least mean intensity; above 1 on the 8-bit scale, else on 0-1.")
    min_nonzero: float = option(0.7, "Gate: least share of pixels brighter than 15/255, 0-1.")
    select: str = option(
        "either", "Rules that keep a tile that passed the gates.", choices=("either", "both", "breast", "frequency")
    )
    freq_percentile: float | None = option(
        None, "Frequency threshold as a percentile (0-100) of each film's candidates, instead of --min-freq-energy."
    )
    max_tiles_per_image: int | None = option(None, "Keep at most this many tiles a film, those of highest energy.")

    def __post_init__(self) -> None:
        for name in ("tile_size", "stride"):
            if getattr(self, name) < 1:
                raise BadInput(f"--{name.replace('_', '-')} {getattr(self, name)} is not a positive number of pixels")
        for name in ("min_breast_ratio", "min_nonzero"):
            if not 0 <= getattr(self, name) <= 1:
                raise BadInput(f"--{name.replace('_', '-')} {getattr(self, name)} is not a share between 0 and 1")
        if not 0 <= self.min_intensity <= 255:
            raise BadInput(f"--min-intensity {self.min_intensity} is not between 0 and 255")
        if self.freq_percentile is not None and not 0 <= self.freq_percentile <= 100:
            raise BadInput(f"--freq-percentile {self.freq_percentile} is not between 0 and 100")
        if self.max_tiles_per_image is not None and self.max_tiles_per_image < 1:
            raise BadInput(f"--max-tiles-per-image {self.max_tiles_per_image} is not positive")

    @property
    def intensity_gate(self) -> float:
        """The intensity gate on the [0, 1] scale."""
        return self.min_intensity / 255 if self.min_intensity > 1 else self.min_intensity


@dataclass(frozen=True)
class TileSelection:
    """The kept tiles of a film as columns of equal length (NumPy), and why the others went.

    Attributes
    ----------
    x, y
        Left and top edge in pixels of the image that was given.
    breast_ratio, freq_energy, mean_intensity, nonzero_ratio
        Scores, float32.
    rule
        ``breast``, ``frequency`` or ``both``: the rules that each tile meets.
    counts
        candidates, rejected_intensity, rejected_nonzero, rejected_rules, rejected_limit (each candidate is counted
        once, at the first thing that rejects it), kept, kept_breast_only, kept_frequency_only, kept_both_rules.
    """

    x: np.ndarray
    y: np.ndarray
    breast_ratio: np.ndarray
    freq_energy: np.ndarray
    mean_intensity: np.ndarray
    nonzero_ratio: np.ndarray
    rule: np.ndarray
    counts: dict[str, int]


def grid_positions(length: int, size: int, stride: int, min_step: int = 1) -> np.ndarray:
    """Return the tile offsets along one axis: every `stride` pixels, the last flush with the border.

    A length below `size` gives the single offset 0; the caller pads. The flush offset takes the place of a last one that
    lies less than `min_step` before it.
    """
    last = max(length - size, 0)
    return np.append(np.arange(0, last - min_step + 1, stride), last)


def box_means(values: Any, top: Any, left: Any, height: float, width: float) -> Any:
    """Return the mean of `values` over boxes, exact for fractional corners.

    Parameters
    ----------
    values
        (H, W) array.
    top, left
        (N,) corners in pixels of `values`, may be fractional; parts beyond the array count as its edge is reached.
    height, width
        Size of every box in pixels, may be fractional.

    Returns
    -------
    Any
        (N,) float64.
    """
    backend = backend_of(values)
    xp = backend.xp
    integral = xp.zeros((values.shape[0] + 1, values.shape[1] + 1), dtype=xp.float64)
    xp.cumsum(values, axis=0, dtype=xp.float64, out=integral[1:, 1:])
    xp.cumsum(integral[1:, 1:], axis=1, out=integral[1:, 1:])
    top, left = xp.asarray(top, dtype=xp.float64), xp.asarray(left, dtype=xp.float64)
    bottom = xp.minimum(top + height, values.shape[0])
    right = xp.minimum(left + width, values.shape[1])

    def at(rows: Any, columns: Any) -> Any:
        # Linear interpolation of an integral image is exact: it is linear within every pixel's row and column.
        return backend.ndimage.map_coordinates(integral, xp.stack([rows, columns]), order=1, mode="nearest")

    total = at(bottom, right) - at(top, right) - at(bottom, left) + at(top, left)
    return total / xp.maximum((bottom - top) * (right - left), 1e-9)


def select_tiles(
    image: Any, mask: Any, energy: Any, config: SelectionConfig, mask_scale: float, energy_scale: float, min_step: int = 1
) -> TileSelection:
    """Score every tile of the grid and keep those that pass the gates and the rules.

    Parameters
    ----------
    image
        (H, W) float in [0, 1], at least one tile large (pad before).
    mask
        (h, w) bool breast mask; one of its pixels is `mask_scale` pixels of `image` wide.
    energy
        (h', w') pixel energy of :func:`preprocess.energy.excess_energy`; a pixel is `energy_scale` pixels wide.
    config
        Tile size, stride, thresholds.
    min_step
        Least distance of tiles in pixels of `image`: that of a native pixel, so that no two share a native corner.

    Returns
    -------
    TileSelection
        Tiles in row order.
    """
    backend = backend_of(image)
    size = config.tile_size
    rows, columns = (grid_positions(n, size, config.stride, min_step) for n in image.shape)
    y, x = (grid.ravel() for grid in np.meshgrid(rows, columns, indexing="ij"))

    def means(values: Any, scale: float) -> np.ndarray:
        return backend.to_host(box_means(values, y / scale, x / scale, size / scale, size / scale))

    mean_intensity = means(image, 1)
    nonzero_ratio = means(image > NONZERO_ABOVE, 1)
    breast_ratio = np.clip(means(mask, mask_scale), 0, 1)
    freq_energy = np.sqrt(np.maximum(means(energy, energy_scale), 0))

    bright = mean_intensity >= config.intensity_gate
    full = nonzero_ratio >= config.min_nonzero
    gated = bright & full
    frequency_threshold = config.min_freq_energy
    if config.freq_percentile is not None:
        frequency_threshold = np.percentile(freq_energy[gated], config.freq_percentile) if gated.any() else math.inf
    by_breast = breast_ratio >= config.min_breast_ratio
    by_frequency = freq_energy >= frequency_threshold
    chosen = {
        "either": by_breast | by_frequency,
        "both": by_breast & by_frequency,
        "breast": by_breast,
        "frequency": by_frequency,
    }[config.select]
    kept = np.flatnonzero(gated & chosen)
    limit = config.max_tiles_per_image
    over_limit = max(0, len(kept) - limit) if limit else 0
    if over_limit:
        # Stable sort: equal energies keep their row order.
        kept = np.sort(kept[np.argsort(-freq_energy[kept], kind="stable")[:limit]])
    rule = np.where(by_breast & by_frequency, "both", np.where(by_breast, "breast", "frequency"))[kept]
    counts = {
        "candidates": len(x),
        "rejected_intensity": int((~bright).sum()),
        "rejected_nonzero": int((bright & ~full).sum()),
        "rejected_rules": int((gated & ~chosen).sum()),
        "rejected_limit": over_limit,
        "kept": len(kept),
        "kept_breast_only": int((rule == "breast").sum()),
        "kept_frequency_only": int((rule == "frequency").sum()),
        "kept_both_rules": int((rule == "both").sum()),
    }
    scores = (breast_ratio, freq_energy, mean_intensity, nonzero_ratio)
    return TileSelection(x[kept], y[kept], *(s[kept].astype(np.float32) for s in scores), rule, counts)
