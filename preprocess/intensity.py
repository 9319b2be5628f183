"""From stored pixels to [0, 1]: one mapping an image, recorded, never one per tile."""

from __future__ import annotations

from typing import Any

from mammostream.preprocess.backend import backend_of, by_strips

# What ``--mapping`` takes, and how records name what it does.
MAPPINGS = {"voi": "voi-or-percentile-v1", "percentile": "percentile-v1", "full": "full-range-v1"}
LOW_PERCENTILE, HIGH_PERCENTILE = 0.1, 99.9
# Calcifications are rarer than 0.1 % of the breast and brighter than the rest: room above the percentile keeps them unclipped.
HEADROOM = 0.25
# A VOI LUT or window is of no use where fewer of the breast's values than this lie between black and white, or where all but
# 1 in 100 at either end span less of the display.
MIN_BETWEEN, MIN_SPAN = 0.1, 0.1


def map_to_unit(pixels: Any, voi: Any | None, breast_values: Any, mapping: str = "voi", bits: int = 16) -> tuple[Any, str]:
    """Map stored pixels to float32 in [0, 1].

    Parameters
    ----------
    pixels
        (H, W) stored values, brighter = denser.
    voi
        (N,) float32 in [0, 1]: the display of each stored value by the file's VOI LUT or window, or None.
    breast_values
        (N,) stored values inside the breast, from which the percentiles are taken; empty falls back to all pixels.
    mapping
        ``voi``: `voi` where there is one, else percentiles. ``percentile``: always percentiles. ``full``: the whole range of
        stored values, linearly.
    bits
        Stored bits per pixel, for ``full``.

    Returns
    -------
    image, mapping
        (H, W) float32 in [0, 1], and the mapping in words, as ``images.parquet`` records it.
    """
    xp = backend_of(pixels).xp
    if mapping == "full":
        return _stretched(pixels, 0, 2**bits - 1), f"full 0..{2**bits - 1}"
    if mapping == "voi" and voi is not None:
        display = xp.asarray(voi)
        return by_strips(lambda strip: display[strip], pixels), "voi"
    values = breast_values if breast_values.size else pixels.ravel()
    low, high = (float(v) for v in xp.percentile(values.astype(xp.float32), xp.asarray([LOW_PERCENTILE, HIGH_PERCENTILE])))
    high = max(high + HEADROOM * (high - low), low + 1)
    return _stretched(pixels, low, high), f"percentile {low:.1f}..{high:.1f}"


def _stretched(pixels: Any, low: float, high: float) -> Any:
    """Return float32, 0 at `low` and below, 1 at `high` and above."""
    xp = backend_of(pixels).xp

    def stretch(strip: Any) -> Any:
        image = strip.astype(xp.float32)
        image -= xp.float32(low)
        image /= xp.float32(high - low)
        return xp.clip(image, 0, 1, out=image)

    return by_strips(stretch, pixels)


def mapping_option(recorded: str | None) -> str:
    """Return the ``--mapping`` of a record; ``voi`` where it does not say."""
    return next((name for name, version in MAPPINGS.items() if version == recorded), "voi")


def useless(voi: Any, breast_values: Any) -> str:
    """Return in words why a VOI LUT or window leaves too little of the breast to see; "" where it does not, or none was found.

    Parameters
    ----------
    voi, breast_values
        As for :func:`map_to_unit`; `breast_values` may be empty.
    """
    xp = backend_of(breast_values).xp
    if not breast_values.size:
        return ""
    shown = xp.asarray(voi)[breast_values]
    between = float(((shown > 1 / 255) & (shown < 254 / 255)).mean())
    low, high = (float(v) for v in xp.percentile(shown, xp.asarray([1.0, 99.0])))
    if between >= MIN_BETWEEN and high - low >= MIN_SPAN:
        return ""
    return f"{between:.1%} of the breast between black and white, shown as {low:.2f}..{high:.2f}"


def to_stored(image: Any, bits: int) -> Any:
    """Quantise [0, 1] to the full range of `bits` (8 or 16) unsigned bits, rounding to nearest."""
    xp = backend_of(image).xp
    return xp.rint(image * (2**bits - 1)).astype(xp.uint8 if bits == 8 else xp.uint16)
