"""Breast segmentation at a fixed physical scale.

The canvas around a scanned film and the film's borders are trimmed. Thresholds with hysteresis on log-compressed intensity find
the tissue down to the faint skin line: the lower one lies just above the film base, which is measured where there is no tissue.
An opening detaches labels, letters, scratches and dust; the component is chosen by area, contact with the chest-wall side and
shape, and the strip of film fog along the chest wall is cut off. The pectoral muscle stays in. Methods are tried in order
until one gives a sane mask; an image that none suits is flagged, never dropped silently.
A mask around which there is something else than film base is flagged too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mammostream.preprocess.artefacts import THIN_MM, cliffs_of, without_attachments, without_objects
from mammostream.preprocess.backend import Backend, backend_of
from mammostream.preprocess.film_base import film_base, inside_border_strips, inside_canvas, without_fog
from mammostream.preprocess.morphology import STEP, closed, grown, hysteresis, likeliest, opened, side_of
from mammostream.preprocess.resampling import block_mean

TARGET_SPACING_MM = 0.4
FINE_SPACING_MM = 0.1
ASSUMED_HEIGHT_MM = 240.0
CLOSING_RADIUS_MM = 4.0
# Tissue is brighter than the film base by so many times its noise, and by at least this much of the compressed range.
BASE_SIGMAS, MIN_CONTRAST = 6.0, 0.06
MIN_AREA_SHARE, MAX_AREA_SHARE = 0.03, 0.92
# Within the outline of a good mask there is clear tissue, around it there is film base.
WITHIN_MM, AROUND_MM = (2.0, 4.0), (3.0, 6.0)
CLEAR_CONTRAST = 1.5
PLAUSIBLE = 0.8
LARGE_FOG_MM2, BRIGHT_FOG = 100.0, 0.25


@dataclass(frozen=True)
class Segmentation:
    """A breast mask on a coarse grid.

    Attributes
    ----------
    mask
        (h, w) bool, one pixel for `factor` x `factor` native pixels.
    thumbnail
        (h, w) float32, the mean of each of those blocks, in the image's own values.
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
        What is doubtful: ``no_breast``, ``doubtful_mask``, ``bright_fog``, ``no_spacing``.
    inside
        Rows and columns of the mask's grid within the film's bright borders; all of them where it has none.
    fog_mm2
        Area in mm² that was cut off the mask as film fog.
    fog_brightness
        Its median brightness as a share of the breast's, both above the darkest of the image; 0 where nothing was cut. Above
        `BRIGHT_FOG`, an area of more than `LARGE_FOG_MM2` is flagged ``bright_fog``: it may be tissue.
    plausibility
        How plausible the mask is, 0-1; below `PLAUSIBLE` it is flagged ``doubtful_mask``.
    """

    mask: Any
    thumbnail: Any
    factor: int
    spacing_mm: float
    side: str
    method: str
    flags: tuple[str, ...]
    inside: tuple[slice, slice]
    fog_mm2: float
    fog_brightness: float
    plausibility: float

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

    best: tuple[float, Any, tuple[float, float], str] | None = None
    for method, threshold in _METHODS.items():
        mask, plausible, fog = _mask_from(backend, inner, threshold, spacing)
        if best is None or plausible > best[0]:
            best = (plausible, mask, fog, method)
        if _is_sane(xp, mask):
            break
    assert best is not None
    plausible, found, fog, method = best
    mask = xp.zeros(coarse.shape, dtype=bool)
    mask[inside] = found
    if not bool(mask.any()):
        return Segmentation(mask, coarse, factor, spacing, "", method, (*flags, "no_breast"), inside, *fog, 0.0)
    if plausible < PLAUSIBLE:
        flags = (*flags, "doubtful_mask")
    if fog[0] > LARGE_FOG_MM2 and fog[1] > BRIGHT_FOG:
        flags = (*flags, "bright_fog")
    return Segmentation(mask, coarse, factor, spacing, side_of(xp, found), method, flags, inside, *fog, plausible)


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


def _mask_from(backend: Backend, image: Any, threshold: Callable, spacing: float) -> tuple[Any, float, tuple[float, float]]:
    """Return the breast by one method, or an empty mask; how plausible it is; area and brightness of what was cut as fog."""
    xp = backend.xp
    found = xp.zeros(image.shape, dtype=bool), 0.0, (0.0, 0.0)
    if float(image.max()) - float(image.min()) < 1e-6:
        return found
    few = image[::STEP, ::STEP]
    tissue, _ = _largest_tissue(backend, _compress(xp, few, few), threshold, STEP * spacing)
    if not bool(tissue.any()):
        return found
    # Once more on the scale of the tissue alone, which labels and borders have no part in.
    compressed = _compress(xp, image, few[tissue])
    cliffs = cliffs_of(backend, image, few[tissue])
    away_from = None
    for _ in range(2):
        tissue, contrast = _largest_tissue(backend, compressed, threshold, spacing, cliffs, away_from)
        clear = without_fog(xp, image, tissue, spacing)
        mask = closed(backend, without_attachments(backend, clear, spacing), CLOSING_RADIUS_MM / spacing)
        plausible = _plausibility(backend, mask, contrast, spacing)
        if plausible > found[1]:
            found = mask, plausible, _fog(xp, image, tissue & ~clear, mask, spacing)
        if plausible >= PLAUSIBLE:
            break
        # A wide falloff of the skin line may have counted as film base: measure that further away.
        away_from = mask
    return found


def _fog(xp: Any, image: Any, cut: Any, mask: Any, spacing: float) -> tuple[float, float]:
    """Return the area in mm² of what was cut off a mask, and its brightness as a share of the mask's."""
    if not bool(cut.any()):
        return 0.0, 0.0
    floor, fog, breast = (float(v) for v in (xp.percentile(image, 5), xp.median(image[cut]), xp.median(image[mask])))
    return float(cut.sum()) * spacing**2, (fog - floor) / max(breast - floor, 1e-6)


def _largest_tissue(
    backend: Backend, image: Any, threshold: Callable, spacing: float, cliffs: Any = None, away_from: Any = None
) -> tuple[Any, Any]:
    """Return the component of a compressed image that is most likely the breast, without objects where cliffs are given.

    Beside it, how far each pixel is above the film base, in units of what counts as tissue.
    """
    xp, ndimage = backend.xp, backend.ndimage
    high = threshold(backend, image)
    bright = image >= high
    if bool(bright.all()):
        return xp.zeros(image.shape, dtype=bool), xp.zeros_like(image)
    base, noise = film_base(backend, image, bright if away_from is None else bright | away_from, spacing)
    limit = max(BASE_SIGMAS * noise, MIN_CONTRAST)
    tissue = hysteresis(backend, image >= xp.minimum(base + limit, high), bright)
    if cliffs is not None:
        tissue = without_objects(backend, tissue, cliffs, spacing)
    # Tissue continues beyond the sides of the image, not beyond its ends, where borders leave thin lines.
    tissue = opened(backend, tissue, THIN_MM / spacing, "edge") & tissue
    labels, count = ndimage.label(tissue)
    return labels == likeliest(backend, labels, count) if count else tissue, (image - base) / limit


def _plausibility(backend: Backend, mask: Any, contrast: Any, spacing: float) -> float:
    """Return how plausible a mask is, 0-1.

    The share of a band within its outline that is clearly tissue times the share of a band around it that is film base; half of
    that where the mask is not sane.

    Parameters
    ----------
    mask
        (h, w) bool.
    contrast
        (h, w) height above the film base; 1 is the least that counts as tissue.
    spacing
        Size of a pixel in mm.
    """
    if not bool(mask.any()):
        return 0.0
    xp = backend.xp
    plausible = 1.0 if _is_sane(xp, mask) else 0.5
    few, contrast, spacing = mask[::STEP, ::STEP], contrast[::STEP, ::STEP], STEP * spacing
    padded = xp.pad(few, 1, mode="edge")
    for side, (nearest, farthest), expected in (
        (padded, WITHIN_MM, contrast > CLEAR_CONTRAST),
        (~padded, AROUND_MM, contrast < 1),
    ):
        near, far = (grown(backend, ~side, distance, spacing)[1:-1, 1:-1] for distance in (nearest, farthest))
        band = far & ~near
        plausible *= float(expected[band].mean()) if bool(band.any()) else 0.0
    return plausible


def _is_sane(xp: Any, mask: Any) -> bool:
    """Return whether a mask's area is a breast's, it touches one side of the image, and leaves the other side free."""
    share = float(mask.mean())
    left, right = float(mask[:, :3].mean()), float(mask[:, -3:].mean())
    return MIN_AREA_SHARE <= share <= MAX_AREA_SHARE and max(left, right) > 0.15 and min(left, right) < 0.5
