"""Simulated micro-calcification clusters with known boxes, planted into real films.

They are phantoms for testing a pipeline, not a model of disease: everything made from them says *simulated*.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from mammostream.common.errors import BadInput
from mammostream.common.options import option
from mammostream.preprocess.segmentation import segment_breast


@dataclass(frozen=True)
class ClusterConfig:
    """What a simulated cluster looks like. Sizes in mm; contrast in standard deviations of the local noise."""

    clusters_per_image: int = option(4, "Simulated clusters planted into each copy.")
    contrast: float = option(10.0, "Peak brightness of a speck above its surroundings, in deviations of the local noise.")
    min_specks: int = option(8, "Minimum number of specks per cluster.")
    max_specks: int = option(20, "Maximum number of specks per cluster.")
    min_speck_mm: float = option(0.2, "Smallest speck diameter in mm.")
    max_speck_mm: float = option(0.5, "Largest speck diameter in mm.")
    min_cluster_mm: float = option(5.0, "Smallest cluster diameter in mm.")
    max_cluster_mm: float = option(10.0, "Largest cluster diameter in mm.")
    skin_distance_mm: float = option(8.0, "Minimum distance of a cluster's centre from the skin line in mm.")
    max_skin_distance_mm: float | None = option(
        None, "Maximum distance of a cluster's centre from the skin line in mm; default: anywhere in the breast."
    )

    def __post_init__(self) -> None:
        for low, high in (
            ("min_specks", "max_specks"),
            ("min_speck_mm", "max_speck_mm"),
            ("min_cluster_mm", "max_cluster_mm"),
        ):
            if not 0 < getattr(self, low) <= getattr(self, high):
                raise BadInput(f"--{low.replace('_', '-')} must be above 0 and at most --{high.replace('_', '-')}")
        if self.clusters_per_image < 0 or self.contrast <= 0:
            raise BadInput("--clusters-per-image must not be negative and --contrast must be above 0")


def plant_clusters(
    pixels: np.ndarray, spacing_mm: float, config: ClusterConfig, seed: int | tuple[int, ...]
) -> tuple[np.ndarray, list[tuple[int, int, int, int]]]:
    """Plant simulated clusters into a copy of a film.

    Parameters
    ----------
    pixels
        (H, W) uint8 or uint16, brighter = denser.
    spacing_mm
        Size of a pixel in mm.
    config
        Number, size and contrast of the clusters.
    seed
        The same seed gives the same copy.

    Returns
    -------
    planted, boxes
        The copy, and for each cluster (xmin, ymin, xmax, ymax) in pixels, the far edges exclusive. Fewer clusters than
        asked for where the breast is too small to hold them apart.
    """
    rng = np.random.default_rng(seed)
    segmentation = segment_breast(pixels, spacing_mm)
    coarse = segmentation.spacing_mm
    # The image's edge counts as outside here: a cluster must lie in the film whole.
    depth = ndimage.distance_transform_edt(np.pad(segmentation.mask, 1))[1:-1, 1:-1] * coarse
    free = depth >= max(config.skin_distance_mm, config.max_cluster_mm / 2 + config.max_speck_mm)
    if config.max_skin_distance_mm is not None:
        free &= ndimage.distance_transform_edt(np.pad(segmentation.mask, 1, mode="edge"))[1:-1, 1:-1] * coarse <= (
            config.max_skin_distance_mm
        )
    planted = pixels.astype(np.float32)
    boxes = []
    for _ in range(config.clusters_per_image):
        places = np.argwhere(free)
        if not len(places):
            break
        row, column = places[rng.integers(len(places))]
        centre = (np.array([row, column]) + 0.5) * segmentation.factor
        boxes.append(_plant_one(planted, centre, spacing_mm, config, rng))
        # Keep clusters a cluster's width apart, so that each box is one cluster.
        rows, columns = np.ogrid[: free.shape[0], : free.shape[1]]
        distance = np.hypot(rows - row, columns - column) * coarse
        free &= distance > 2 * config.max_cluster_mm
    limit = np.iinfo(pixels.dtype).max
    return np.rint(np.clip(planted, 0, limit)).astype(pixels.dtype), boxes


def _plant_one(
    image: np.ndarray, centre: np.ndarray, spacing: float, config: ClusterConfig, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    radius = rng.uniform(config.min_cluster_mm, config.max_cluster_mm) / 2 / spacing
    reach = int(np.ceil(radius + config.max_speck_mm / spacing)) + 2
    top, left = (max(int(c) - reach, 0) for c in centre)
    patch = image[top : int(centre[0]) + reach, left : int(centre[1]) + reach]
    amplitude = config.contrast * _local_noise(patch, spacing)
    extent = []
    added = np.zeros_like(patch)
    for _ in range(rng.integers(config.min_specks, config.max_specks + 1)):
        angle, distance = rng.uniform(0, 2 * np.pi), radius * np.sqrt(rng.uniform())
        y, x = centre + distance * np.array([np.sin(angle), np.cos(angle)])
        size = rng.uniform(config.min_speck_mm, config.max_speck_mm) / 2 / spacing
        rows, columns = np.ogrid[: patch.shape[0], : patch.shape[1]]
        away = np.hypot(rows + top + 0.5 - y, columns + left + 0.5 - x)
        # A disc with an edge one pixel soft; overlapping specks do not add up.
        np.maximum(added, amplitude * np.clip(size - away + 0.5, 0, 1), out=added)
        extent.append((x - size, y - size, x + size, y + size))
    patch += added
    low, high = np.min(extent, axis=0), np.max(extent, axis=0)
    height, width = image.shape
    xmin, ymin = (max(0, int(np.floor(v))) for v in low[:2])
    return xmin, ymin, min(width, int(np.ceil(high[2]))), min(height, int(np.ceil(high[3])))


def _local_noise(patch: np.ndarray, spacing: float) -> float:
    """Return the robust standard deviation of what is finer than 0.5 mm in a patch, at least one grey level."""
    fine = patch - ndimage.gaussian_filter(patch, 0.25 / spacing)
    return max(1.0, 1.4826 * float(np.median(np.abs(fine - np.median(fine)))))
