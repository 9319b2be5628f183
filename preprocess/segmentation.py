"""Breast segmentation at a fixed physical scale.

Thresholds with hysteresis on log-compressed intensity find the tissue down to the faint skin line; an opening detaches
labels and tape; the component is chosen by area and contact with the chest-wall side. The pectoral muscle stays in.
Methods are tried in order until one passes the sanity checks; an image that none suits is flagged, never dropped silently.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from preprocess.backend import Backend, backend_of
from preprocess.resampling import block_mean

TARGET_SPACING_MM = 0.4
ASSUMED_HEIGHT_MM = 240.0
OPENING_RADIUS_MM = 2.0
CLOSING_RADIUS_MM = 4.0
MIN_AREA_SHARE, MAX_AREA_SHARE = 0.03, 0.92
MAX_BORDER_STRIP_SHARE = 0.1


@dataclass(frozen=True)
class Segmentation:
    """A breast mask on a coarse grid.

    Attributes
    ----------
    mask
        (h, w) bool, one pixel for `factor` x `factor` native pixels.
    factor
        Native pixels an edge of a mask pixel.
    spacing_mm
        Size of a mask pixel in mm.
    side
        ``L`` where the chest wall is at the image's left edge (a left breast in the usual display), ``R`` at the right,
        empty where there is no breast.
    method
        Name of the method that gave the mask: ``otsu``, ``triangle``, ``nonzero``.
    flags
        What is doubtful: ``no_breast``, ``doubtful_mask``, ``no_spacing``.
    """

    mask: Any
    factor: int
    spacing_mm: float
    side: str
    method: str
    flags: tuple[str, ...]

    @property
    def area_mm2(self) -> float:
        """Area of the breast in mm²."""
        return float(self.mask.sum()) * self.spacing_mm**2


def segment_breast(pixels: Any, spacing_mm: float | None = None) -> Segmentation:
    """Find the breast in a mammogram.

    Parameters
    ----------
    pixels
        (H, W) array of any real type, brighter = denser.
    spacing_mm
        Size of a pixel in mm; None assumes an image 240 mm high and flags ``no_spacing``.

    Returns
    -------
    Segmentation
        Always; an image without a breast has an empty mask and the flag ``no_breast``.
    """
    backend = backend_of(pixels)
    xp = backend.xp
    flags = () if spacing_mm else ("no_spacing",)
    spacing = spacing_mm or ASSUMED_HEIGHT_MM / pixels.shape[0]
    factor = max(1, round(TARGET_SPACING_MM / spacing))
    coarse = xp.nan_to_num(block_mean(pixels, factor), posinf=0, neginf=0)
    spacing *= factor
    valid = _inside_border_strips(xp, coarse)
    compressed = _compress(xp, coarse, valid)

    best: tuple[float, Any, str] | None = None
    for method, threshold in _METHODS.items():
        mask = _mask_from(backend, compressed, valid, threshold, spacing)
        score = _plausibility(xp, mask)
        if best is None or score > best[0]:
            best = (score, mask, method)
        if score >= 1:
            break
    score, mask, method = best
    if not bool(mask.any()):
        return Segmentation(mask, factor, spacing, "", method, (*flags, "no_breast"))
    if score < 1:
        flags = (*flags, "doubtful_mask")
    return Segmentation(mask, factor, spacing, _side(xp, mask), method, flags)


def _inside_border_strips(xp: Any, coarse: Any) -> Any:
    """Return a mask without the bright strips that scanned films have along their edges."""
    valid = xp.ones(coarse.shape, dtype=bool)
    bright = coarse > 0.9 * coarse.max()
    for axis in (0, 1):
        share = bright.mean(axis=1 - axis)
        limit = int(MAX_BORDER_STRIP_SHARE * coarse.shape[axis])
        # A strip is a run of bright lines that starts at the edge.
        leading = int(xp.cumprod(share[:limit] > 0.5).sum())
        trailing = int(xp.cumprod(share[::-1][:limit] > 0.5).sum())
        lines = xp.arange(coarse.shape[axis])
        keep = (lines >= leading) & (lines < coarse.shape[axis] - trailing)
        valid &= keep[:, None] if axis == 0 else keep[None, :]
    return valid


def _compress(xp: Any, coarse: Any, valid: Any) -> Any:
    """Scale the image to [0, 1] from its background to its 99.5th percentile and compress it by a logarithm."""
    values = coarse[valid] if bool(valid.any()) else coarse.ravel()
    low, high = (float(v) for v in xp.percentile(values, xp.asarray([1.0, 99.5])))
    scaled = xp.clip((coarse - low) / max(high - low, 1e-6), 0, 1)
    return xp.where(valid, xp.log1p(20 * scaled) / xp.log1p(xp.asarray(20.0)), 0).astype(xp.float32)


def _otsu(backend: Backend, image: Any) -> float:
    return float(backend.filters.threshold_otsu(image))


def _triangle(backend: Backend, image: Any) -> float:
    return float(backend.filters.threshold_triangle(image))


def _nonzero(backend: Backend, image: Any) -> float:
    return 0.05


_METHODS: dict[str, Callable[[Backend, Any], float]] = {"otsu": _otsu, "triangle": _triangle, "nonzero": _nonzero}


def _mask_from(backend: Backend, image: Any, valid: Any, threshold: Callable, spacing: float) -> Any:
    xp, ndimage = backend.xp, backend.ndimage
    if float(image.max()) - float(image.min()) < 1e-6:
        return xp.zeros(image.shape, dtype=bool)
    high = threshold(backend, image)
    background = image[valid & (image < high)]
    if background.size == 0:
        return xp.zeros(image.shape, dtype=bool)
    centre = xp.median(background)
    sigma = 1.4826 * xp.median(xp.abs(background - centre))
    low = min(max(float(centre + 4 * sigma), 0.05), high)
    tissue = backend.filters.apply_hysteresis_threshold(image, low, high) & valid
    tissue = ndimage.binary_opening(tissue, structure=_disk(xp, OPENING_RADIUS_MM / spacing))
    labels, count = ndimage.label(tissue)
    if count == 0:
        return tissue
    area = xp.bincount(labels.ravel(), minlength=count + 1)[1:]
    edges = xp.concatenate([labels[:, :3].ravel(), labels[:, -3:].ravel()])
    contact = xp.bincount(edges, minlength=count + 1)[1:] / (3 * image.shape[0])
    chosen = int(xp.argmax(area * (0.2 + contact))) + 1
    return _close(backend, labels == chosen, CLOSING_RADIUS_MM / spacing)


def _close(backend: Backend, mask: Any, radius: float) -> Any:
    """Close gaps and fill holes; the edge is repeated outwards, so that the mask keeps its contact with it."""
    xp, ndimage = backend.xp, backend.ndimage
    margin = int(radius) + 1
    padded = xp.pad(mask, margin, mode="edge")
    closed = ndimage.binary_closing(padded, structure=_disk(xp, radius))
    inner = closed[margin:-margin, margin:-margin]
    return ndimage.binary_fill_holes(inner)


def _disk(xp: Any, radius: float) -> Any:
    reach = max(1, int(radius))
    offsets = xp.arange(-reach, reach + 1)
    return offsets[:, None] ** 2 + offsets[None, :] ** 2 <= max(radius, 1.0) ** 2


def _plausibility(xp: Any, mask: Any) -> float:
    """Return the share of sanity checks that a mask passes: area, contact with one side, and a free other side."""
    if not bool(mask.any()):
        return 0.0
    share = float(mask.mean())
    left, right = float(mask[:, :3].mean()), float(mask[:, -3:].mean())
    checks = (MIN_AREA_SHARE <= share <= MAX_AREA_SHARE, max(left, right) > 0.15, min(left, right) < 0.5)
    return sum(checks) / len(checks)


def _side(xp: Any, mask: Any) -> str:
    columns = mask.sum(axis=0)
    half = mask.shape[1] // 2
    return "L" if float(columns[:half].sum()) >= float(columns[-half:].sum()) else "R"
