"""High-frequency energy: how much of a tile stands out in the band where micro-calcifications live.

Micro-calcifications are bright specks of 0.2-0.5 mm, so the band is about 1-4 cycles/mm. At about 0.1 mm a pixel the film is
smoothed by a Gaussian once, and each place gets the weaker of its two principal curvatures: high for a bright speck, which
falls off in every direction, and low for ducts, vessels, folds and scratches, which fall off in one. The response is divided
by the noise around (its mean absolute value within 10 mm), since film grain, dose and tissue vary within a film; the quotient
is the same for any exposure and depth. A pixel's energy is what exceeds 2 noise deviations, at most 2: bounded, so that many
specks count and not one bright one. A tile's energy is its sum per cm²; 0 where nothing stands out.
`benchmarks/frequency_energy.py` compares the measure with others.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mammostream.preprocess.backend import Backend, backend_of, by_strips
from mammostream.preprocess.morphology import grown

SIGMA_MM = 0.1  # matches specks of about 0.3 mm
# The skin line and the film's edge are no specks.
EDGE_MARGIN_MM = 1.2
NOISE_WINDOW_MM = 10.0
# Bright specks must not raise the noise that they are measured by, nor a flat patch make noise of nothing.
NOISE_CAP, NOISE_FLOOR = 4.0, 0.5
EXCESS_ABOVE, EXCESS_LIMIT = 2.0, 2.0
PIXELS_PER_CM2 = 100.0**2  # of 0.1 mm
# Mean absolute value of a normal distribution to its standard deviation.
_MEAN_TO_DEVIATION = 1.2533


def speck_response(image: Any, mask: Any, spacing_mm: float) -> Any:
    """Filter an image for bright specks and express the response in deviations of the noise around.

    Parameters
    ----------
    image
        (H, W) float, brighter = denser, best at about 0.1 mm a pixel; coarser pixels blur specks.
    mask
        (h, w) bool breast mask that covers the same area with coarser pixels.
    spacing_mm
        Size of a pixel of `image` in mm.

    Returns
    -------
    Any
        (H, W) float32, 0 outside the breast and within 1.2 mm of its edge and the film's.
    """
    backend = backend_of(image)
    xp = backend.xp
    response = xp.zeros(image.shape, dtype=xp.float32)
    inside = _inside(backend, mask, image.shape, spacing_mm)
    # The filters see the breast only: most of a film is background.
    box = tuple(_extent(backend.to_host(inside.any(axis=axis))) for axis in (1, 0))
    inside = inside[box]
    if inside.size:
        # A margin as wide as the Gaussian reaches, so that the crop changes nothing.
        reach = int(4 * SIGMA_MM / spacing_mm) + 2
        wide = tuple(slice(max(part.start - reach, 0), part.stop + reach) for part in box)
        within = tuple(slice(p.start - w.start, p.stop - w.start) for p, w in zip(box, wide, strict=True))
        sigma = SIGMA_MM / spacing_mm
        curvature = by_strips(lambda strip: _weaker_curvature(backend, strip, sigma), image[wide], reach=reach)[within]
        noise = _noise_around(backend, curvature, inside, max(3, round(NOISE_WINDOW_MM / spacing_mm)))
        response[box] = xp.where(inside, curvature / noise, xp.float32(0))
    return response


def _extent(marks: np.ndarray) -> slice:
    """Return the part of an axis from its first mark to its last."""
    places = np.flatnonzero(marks)
    return slice(int(places[0]), int(places[-1]) + 1) if len(places) else slice(0, 0)


def _noise_around(backend: Backend, curvature: Any, inside: Any, window: int) -> Any:
    """Return the deviation of a filter's response in a window about each pixel, from its mean absolute value."""
    xp, ndimage = backend.xp, backend.ndimage
    absolute = xp.abs(curvature)
    typical = xp.float32(_MEAN_TO_DEVIATION) * xp.mean(absolute[inside])
    capped = xp.where(inside, xp.minimum(absolute, NOISE_CAP * typical), xp.float32(0))
    weight = ndimage.uniform_filter(inside.astype(xp.float32), window, mode="constant")
    local = ndimage.uniform_filter(capped, window, mode="constant") / xp.maximum(weight, xp.float32(1e-3))
    return xp.maximum(xp.maximum(xp.float32(_MEAN_TO_DEVIATION) * local, NOISE_FLOOR * typical), xp.float32(1e-9))


def _weaker_curvature(backend: Backend, image: Any, sigma: float) -> Any:
    """Return minus the larger eigenvalue of the Hessian at a scale of `sigma` pixels: positive on bright blobs only."""
    xp, ndimage = backend.xp, backend.ndimage
    # Curvatures are small differences of large numbers: float32 would be off by up to 1e-3 of the noise.
    smooth = ndimage.gaussian_filter(image.astype(xp.float64), sigma)
    second, first = xp.asarray([1.0, -2.0, 1.0]), xp.asarray([-0.5, 0.0, 0.5])
    across = ndimage.correlate1d(smooth, second, axis=1, output=xp.float32)
    down = ndimage.correlate1d(smooth, second, axis=0, output=xp.float32)
    mixed = ndimage.correlate1d(ndimage.correlate1d(smooth, first, axis=0, output=xp.float32), first, axis=1)
    return -((across + down) / 2 + xp.sqrt(((across - down) / 2) ** 2 + mixed**2))


def pixel_energy(response: Any) -> Any:
    """Return each pixel's share of a tile's energy, whose mean over a tile is the energy per cm²: float32, 0 to 20,000."""
    xp = backend_of(response).xp
    return xp.clip(response - EXCESS_ABOVE, 0, EXCESS_LIMIT) * xp.float32(PIXELS_PER_CM2)


def _inside(backend: Backend, mask: Any, shape: tuple[int, int], spacing_mm: float) -> Any:
    """Return where specks count, on a grid of `shape`."""
    xp = backend.xp
    # Beyond the film's edge there is no breast.
    outside = ~xp.pad(mask, 1)
    inner = ~grown(backend, outside, EDGE_MARGIN_MM, shape[0] / mask.shape[0] * spacing_mm)[1:-1, 1:-1]
    rows, columns = (xp.minimum((xp.arange(n) * (m / n)).astype(int), m - 1) for n, m in zip(shape, mask.shape, strict=True))
    return inner[:, columns][rows]
