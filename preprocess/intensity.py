"""From stored pixels to [0, 1]: one mapping an image, recorded, never one per tile."""

from __future__ import annotations

from typing import Any

from mammostream.preprocess.backend import backend_of

MAPPING = "voi-or-percentile-v1"
LOW_PERCENTILE, HIGH_PERCENTILE = 0.1, 99.9
# Calcifications are rarer than 0.1 % of the breast and brighter than the rest: room above the percentile keeps them unclipped.
HEADROOM = 0.25


def map_to_unit(pixels: Any, voi: Any | None, breast_values: Any) -> tuple[Any, str]:
    """Map stored pixels to float32 in [0, 1].

    Parameters
    ----------
    pixels
        (H, W) stored values, brighter = denser.
    voi
        (N,) float32 in [0, 1]: the display of each stored value by the file's VOI LUT or window, or None.
    breast_values
        (N,) stored values inside the breast, from which the percentiles are taken; empty falls back to all pixels.

    Returns
    -------
    image, mapping
        (H, W) float32 in [0, 1], and the mapping in words, as ``images.parquet`` records it.
    """
    xp = backend_of(pixels).xp
    if voi is not None:
        return xp.asarray(voi)[pixels], "voi"
    values = breast_values if breast_values.size else pixels.ravel()
    low, high = (float(v) for v in xp.percentile(values.astype(xp.float32), xp.asarray([LOW_PERCENTILE, HIGH_PERCENTILE])))
    high = max(high + HEADROOM * (high - low), low + 1)
    image = xp.clip((pixels.astype(xp.float32) - xp.float32(low)) / xp.float32(high - low), 0, 1)
    return image, f"percentile {low:.1f}..{high:.1f}"


def to_stored(image: Any, bits: int) -> Any:
    """Quantise [0, 1] to the full range of `bits` (8 or 16) unsigned bits, rounding to nearest."""
    xp = backend_of(image).xp
    return xp.rint(image * (2**bits - 1)).astype(xp.uint8 if bits == 8 else xp.uint16)
