"""Changing the pixel spacing of an image."""

from __future__ import annotations

from typing import Any

from mammostream.preprocess.backend import backend_of, by_strips


def block_mean(image: Any, factor: int) -> Any:
    """Average blocks of factor x factor pixels; edge pixels are repeated to fill the last block.

    Parameters
    ----------
    image
        (H, W) array.
    factor
        Edge length of a block in pixels, at least 1.

    Returns
    -------
    Any
        (ceil(H / factor), ceil(W / factor)) float32; integers of up to 16 bits are summed exactly.
    """
    if factor == 1:
        return image.astype(backend_of(image).xp.float32)
    return by_strips(lambda strip: _block_mean(strip, factor), image, factor)


def _block_mean(image: Any, factor: int) -> Any:
    xp = backend_of(image).xp
    pad = [(0, -n % factor) for n in image.shape]
    if any(after for _, after in pad):
        image = xp.pad(image, pad, mode="edge")
    exact = image.dtype.kind in "bu" and image.dtype.itemsize <= 2
    # Whole lines are added to each other: several times faster than a reduction over short axes.
    rows = image[0::factor].astype(xp.uint32 if exact else xp.float32)
    for offset in range(1, factor):
        rows += image[offset::factor]
    total = rows[:, 0::factor].copy()
    for offset in range(1, factor):
        total += rows[:, offset::factor]
    return total.astype(xp.float32) / xp.float32(factor**2)


def resample(image: Any, ratio: float) -> Any:
    """Resample an image to pixels `ratio` times as large, with antialiasing.

    Whole ratios average blocks (exact and fast); others interpolate linearly after a Gaussian.
    """
    backend = backend_of(image)
    if abs(ratio - round(ratio)) < 1e-3 and ratio >= 1:
        return block_mean(image, round(ratio))
    shape = tuple(max(1, round(n / ratio)) for n in image.shape)
    if backend.name == "cupy":
        # CuPy computes coordinates in the image's own type: in float32, rows far down would be off by up to 1e-3 pixels.
        image = image.astype(backend.xp.float64)
    resized = backend.transform.resize(image, shape, order=1, anti_aliasing=ratio > 1, preserve_range=True)
    return resized.astype(backend.xp.float32)
