"""Changing the pixel spacing of an image."""

from __future__ import annotations

from typing import Any

from preprocess.backend import backend_of


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
        (ceil(H / factor), ceil(W / factor)) float32.
    """
    xp = backend_of(image).xp
    if factor == 1:
        return image.astype(xp.float32)
    height, width = image.shape
    pad = ((0, -height % factor), (0, -width % factor))
    padded = xp.pad(image, pad, mode="edge") if any(p[1] for p in pad) else image
    blocks = padded.reshape(padded.shape[0] // factor, factor, padded.shape[1] // factor, factor)
    # The short axis first: the long one then runs over contiguous rows.
    return blocks.mean(axis=1, dtype=xp.float32).mean(axis=2, dtype=xp.float32)


def resample(image: Any, ratio: float) -> Any:
    """Resample an image to pixels `ratio` times as large, with antialiasing.

    Whole ratios average blocks (exact and fast); others interpolate linearly after a Gaussian.
    """
    backend = backend_of(image)
    if abs(ratio - round(ratio)) < 1e-3 and ratio >= 1:
        return block_mean(image, round(ratio))
    shape = tuple(max(1, round(n / ratio)) for n in image.shape)
    resized = backend.transform.resize(image, shape, order=1, anti_aliasing=ratio > 1, preserve_range=True)
    return resized.astype(backend.xp.float32)
