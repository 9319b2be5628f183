"""Breast segmentation at a fixed physical scale.

The canvas around a scanned film and the film's borders are trimmed. Thresholds with hysteresis on log-compressed intensity find
the tissue down to the faint skin line: the lower one lies just above the film base, which is measured where there is no tissue.
An opening detaches labels, letters, scratches and dust; the component is chosen by area, contact with the chest-wall side and
shape, and the strip of film fog along the chest wall is cut off. The pectoral muscle stays in. Methods are tried in order
until one passes the sanity checks; an image that none suits is flagged, never dropped silently.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mammostream.preprocess.backend import Backend, backend_of
from mammostream.preprocess.film_base import film_base, inside_border_strips, inside_canvas, without_fog
from mammostream.preprocess.morphology import closed, hysteresis, likeliest, opened, side_of
from mammostream.preprocess.objects import THIN_MM, cliffs_of, without_attachments, without_objects
from mammostream.preprocess.resampling import block_mean

TARGET_SPACING_MM = 0.4
FINE_SPACING_MM = 0.1
ASSUMED_HEIGHT_MM = 240.0
CLOSING_RADIUS_MM = 4.0
# Tissue is brighter than the film base by so many times its noise, and by at least this much of the compressed range.
BASE_SIGMAS, MIN_CONTRAST = 6.0, 0.06
MIN_AREA_SHARE, MAX_AREA_SHARE = 0.03, 0.92


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
    inside
        Rows and columns of the mask's grid within the film's bright borders; all of them where it has none.
    fog_mm2
        Area in mm² that was cut off the mask as film fog.
    """

    mask: Any
    factor: int
    spacing_mm: float
    side: str
    method: str
    flags: tuple[str, ...]
    inside: tuple[slice, slice]
    fog_mm2: float

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
    factor = coarse_factor(spacing)
    coarse = xp.nan_to_num(block_mean(pixels, factor), posinf=0, neginf=0)
    spacing *= factor
    film = inside_canvas(xp, coarse)
    strips = inside_border_strips(xp, coarse[film], spacing)
    rows, columns = (slice(f.start + s.start, f.start + s.stop) for f, s in zip(film, strips, strict=True))
    inside = rows, columns
    inner = coarse[inside]

    best: tuple[float, Any, float, str] | None = None
    for method, threshold in _METHODS.items():
        mask, fog_mm2 = _mask_from(backend, inner, threshold, spacing)
        score = _plausibility(xp, mask)
        if best is None or score > best[0]:
            best = (score, mask, fog_mm2, method)
        if score >= 1:
            break
    assert best is not None
    score, found, fog_mm2, method = best
    mask = xp.zeros(coarse.shape, dtype=bool)
    mask[inside] = found
    if not bool(mask.any()):
        return Segmentation(mask, factor, spacing, "", method, (*flags, "no_breast"), inside, fog_mm2)
    if score < 1:
        flags = (*flags, "doubtful_mask")
    return Segmentation(mask, factor, spacing, side_of(xp, found), method, flags, inside, fog_mm2)


def coarse_factor(spacing_mm: float) -> int:
    """Return how many pixels make an edge of a mask pixel: about 0.4 mm, and a multiple of what makes about 0.1 mm."""
    fine = fine_factor(spacing_mm)
    return fine * max(1, round(TARGET_SPACING_MM / (fine * spacing_mm)))


def fine_factor(spacing_mm: float) -> int:
    """Return how many pixels make an edge of about 0.1 mm, the scale at which specks are looked for."""
    return max(1, round(FINE_SPACING_MM / spacing_mm))


def _compress(xp: Any, image: Any, tissue: Any) -> Any:
    """Scale an image to [0, 1] from its background to the 99.5th percentile of tissue and compress it by a logarithm."""
    low = float(xp.percentile(image, 1.0))
    high = float(xp.percentile(tissue, 99.5))
    scaled = xp.clip((image - low) / max(high - low, 1e-6), 0, 1)
    return (xp.log1p(20 * scaled) / xp.log1p(xp.asarray(20.0))).astype(xp.float32)


def _otsu(backend: Backend, image: Any) -> float:
    return float(backend.filters.threshold_otsu(image))


def _triangle(backend: Backend, image: Any) -> float:
    return float(backend.filters.threshold_triangle(image))


def _nonzero(backend: Backend, image: Any) -> float:
    return 0.05


_METHODS: dict[str, Callable[[Backend, Any], float]] = {"otsu": _otsu, "triangle": _triangle, "nonzero": _nonzero}


def _mask_from(backend: Backend, image: Any, threshold: Callable, spacing: float) -> tuple[Any, float]:
    """Return the breast by one method, or an empty mask, and the area in mm² that was cut off it as fog."""
    xp = backend.xp
    if float(image.max()) - float(image.min()) < 1e-6:
        return xp.zeros(image.shape, dtype=bool), 0.0
    tissue = _largest_tissue(backend, _compress(xp, image, image), threshold, spacing)
    # Once more on the scale of the tissue alone, which labels and borders have no part in.
    if bool(tissue.any()):
        compressed = _compress(xp, image, image[tissue])
        tissue = _largest_tissue(backend, compressed, threshold, spacing, cliffs_of(backend, image, tissue))
    clear = without_fog(xp, image, tissue, spacing)
    fog_mm2 = float((tissue & ~clear).sum()) * spacing**2
    return closed(backend, without_attachments(backend, clear, spacing), CLOSING_RADIUS_MM / spacing), fog_mm2


def _largest_tissue(backend: Backend, image: Any, threshold: Callable, spacing: float, cliffs: Any = None) -> Any:
    """Return the component of a compressed image that is most likely the breast, without objects where cliffs are given."""
    xp, ndimage = backend.xp, backend.ndimage
    high = threshold(backend, image)
    bright = image >= high
    if bool(bright.all()):
        return xp.zeros(image.shape, dtype=bool)
    base, noise = film_base(backend, image, bright, spacing)
    low = xp.minimum(base + max(BASE_SIGMAS * noise, MIN_CONTRAST), high)
    tissue = hysteresis(backend, image >= low, bright)
    if cliffs is not None:
        tissue = without_objects(backend, tissue, cliffs, spacing)
    # Tissue continues beyond the sides of the image, not beyond its ends, where borders leave thin lines.
    tissue = opened(backend, tissue, THIN_MM / spacing, "edge") & tissue
    labels, count = ndimage.label(tissue)
    return labels == likeliest(backend, labels, count) if count else tissue


def _plausibility(xp: Any, mask: Any) -> float:
    """Return the share of sanity checks that a mask passes: area, contact with one side, and a free other side."""
    if not bool(mask.any()):
        return 0.0
    share = float(mask.mean())
    left, right = float(mask[:, :3].mean()), float(mask[:, -3:].mean())
    checks = (MIN_AREA_SHARE <= share <= MAX_AREA_SHARE, max(left, right) > 0.15, min(left, right) < 0.5)
    return sum(checks) / len(checks)
