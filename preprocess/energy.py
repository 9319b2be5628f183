"""High-frequency energy: how much of a tile stands out in the band where micro-calcifications live.

Micro-calcifications are bright specks of 0.2-0.5 mm, so the band is about 1-4 cycles/mm. The image is filtered once, at
0.1 mm a pixel, by a difference of Gaussians; its bright response is divided by the film's own noise (the median absolute
deviation inside the breast), which makes films of different exposure and depth comparable. A pixel's energy is the squared
excess of that response over 3 noise deviations, and a tile's energy is the root of its mean: 0 where nothing stands out.
"""

from __future__ import annotations

from typing import Any

from preprocess.backend import backend_of
from preprocess.resampling import resample

ENERGY_SPACING_MM = 0.1
# The inner Gaussian matches specks of about 0.3 mm, the outer one takes their surroundings away.
INNER_SIGMA_MM, OUTER_SIGMA_MM = 0.1, 0.25
SKIN_MARGIN_MM = 2.0
NOISE_DEVIATIONS = 3.0


def bright_response(image: Any, mask: Any, spacing_mm: float, mask_spacing_mm: float) -> tuple[Any, float]:
    """Filter an image for bright specks and express the response in deviations of its own noise.

    Parameters
    ----------
    image
        (H, W) float, brighter = denser.
    mask
        (h, w) bool breast mask on its own coarser grid, both grids starting at the same corner.
    spacing_mm, mask_spacing_mm
        Size of a pixel of `image` and of `mask` in mm.

    Returns
    -------
    response, response_spacing_mm
        (h', w') float32, 0 outside the breast and within 2 mm of its edge (the skin line is no speck); its pixel size
        in mm: 0.1, or that of `image` where it is coarser.
    """
    backend = backend_of(image)
    xp, ndimage = backend.xp, backend.ndimage
    spacing = max(ENERGY_SPACING_MM, spacing_mm)
    fine = resample(image, spacing / spacing_mm)
    band = ndimage.gaussian_filter(fine, INNER_SIGMA_MM / spacing) - ndimage.gaussian_filter(fine, OUTER_SIGMA_MM / spacing)
    depth = ndimage.distance_transform_edt(xp.pad(mask, 1, mode="edge"))[1:-1, 1:-1]
    inner = depth * mask_spacing_mm > SKIN_MARGIN_MM
    rows = xp.minimum((xp.arange(fine.shape[0]) * (spacing / mask_spacing_mm)).astype(int), mask.shape[0] - 1)
    columns = xp.minimum((xp.arange(fine.shape[1]) * (spacing / mask_spacing_mm)).astype(int), mask.shape[1] - 1)
    inside = inner[rows[:, None], columns[None, :]]
    if not bool(inside.any()):
        return xp.zeros_like(band), spacing
    values = band[inside]
    centre = xp.median(values)
    noise = xp.maximum(1.4826 * xp.median(xp.abs(values - centre)), 1e-6)
    return xp.where(inside, xp.maximum(band - centre, 0) / noise, 0).astype(xp.float32), spacing


def excess_energy(response: Any) -> Any:
    """Return the squared excess of a response over 3 noise deviations, pixel by pixel."""
    return backend_of(response).xp.maximum(response - NOISE_DEVIATIONS, 0) ** 2
