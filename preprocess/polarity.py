"""Films whose greys are turned over: a white background around a dark breast, whatever the file says of itself.

Three kinds of evidence count, since none is right of every film: what the lines along the border are compared with the rest,
at several depths; the same within a scanner's canvas; and whether the bright or the dark part of the film has texture, which
tissue has and the background has not.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from mammostream.preprocess.backend import backend_of
from mammostream.preprocess.mammogram import Mammogram

SAMPLE = 256  # pixels of the longer edge that are looked at
DEPTHS = (0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.12)  # of the rings, as shares of the edges
CLEAR = 0.1  # grey levels further apart than this share of the range differ
MIN_RING_SHARE = 0.25  # of a ring that its most frequent grey must have to be a background
MIN_BRIGHTNESS = 0.7  # of an inverted film's background
CANVAS_TOLERANCE, CANVAS_FILLED = 0.05, 0.1
TEXTURE_WEIGHT, TEXTURE_LIMIT = 1.5, 3.0  # of the logarithm to base 2 of a ratio
MAX_TEXTURE = 0.5  # of an inverted film: a view that tissue fills to its borders has a bright border too
MIN_EVIDENCE = 2.5  # of 14 rings and texture; see benchmarks/results


def upright(mammogram: Mammogram, polarity: str) -> Mammogram:
    """Return a film with bright tissue on a dark background.

    Parameters
    ----------
    mammogram
        The film; its VOI table may say otherwise than its stored values, which decide about the mask.
    polarity
        ``auto`` turns a film over that looks inverted; ``as-is`` leaves it. Both flag it ``inverted``.
    """
    pixels, voi = mammogram.pixels, mammogram.voi
    stored_inverted = looks_inverted(pixels)
    falls = voi is not None and float(voi[-1]) < float(voi[0])
    shown_inverted = stored_inverted != falls
    if shown_inverted:
        header = mammogram.header
        mammogram = replace(mammogram, header=replace(header, flags={**header.flags, "inverted": ""}))
    if polarity == "as-is":
        return mammogram
    if stored_inverted:
        high = int(pixels.max())
        pixels = pixels.dtype.type(high) - pixels
        voi = None if voi is None else voi[high::-1]
    if shown_inverted and voi is not None:
        voi = 1 - voi
    return replace(mammogram, pixels=pixels, voi=voi)


def looks_inverted(pixels: Any) -> bool:
    """Tell whether a film's background is white, from a sample of its pixels.

    Parameters
    ----------
    pixels
        (H, W) NumPy or CuPy array of any real type.
    """
    step = max(1, max(pixels.shape) // SAMPLE)
    sample = backend_of(pixels).to_host(pixels[::step, ::step]).astype(np.float32)
    if min(sample.shape) < 32:
        return False
    low, high = np.percentile(sample, (0.5, 99.5))
    film = np.clip((sample - low) / max(high - low, 1e-6), 0, 1)
    inside = _inside_canvas(film)
    rings = sum(_ring(part, depth) for part in (film, inside) for depth in DEPTHS)
    texture = _texture(inside)
    return texture < MAX_TEXTURE and rings - TEXTURE_WEIGHT * texture > MIN_EVIDENCE


def _ring(film: np.ndarray, depth: float) -> int:
    """Compare the most frequent grey of a ring with what lies within: 1 says inverted, -1 not, 0 nothing."""
    rows, columns = (int(n * depth) for n in film.shape)
    film = film[rows : len(film) - rows, columns : film.shape[1] - columns]
    ring = np.concatenate([film[0], film[-1], film[:, 0], film[:, -1]])
    counts = np.histogram(ring, 20, (0, 1))[0]
    counts = counts[:-1] + counts[1:]
    most = int(counts.argmax())
    if counts[most] < MIN_RING_SHARE * ring.size:
        return 0
    background = (most + 1) / 20
    brighter, darker = float((film > background + CLEAR).mean()), float((film < background - CLEAR).mean())
    if brighter > max(4 * darker, CLEAR):
        return -1
    return int(darker > max(4 * brighter, CLEAR) and background >= MIN_BRIGHTNESS)


def _inside_canvas(film: np.ndarray) -> np.ndarray:
    """Return the part within even margins that end at a straight edge, as a scanner's canvas does."""
    inside = []
    for lines in (film, film.T):
        widths = []
        for seen in (lines, lines[::-1]):
            other = (np.abs(seen - np.median(seen[0])) > CANVAS_TOLERANCE).mean(axis=1)
            width = int(np.cumprod(other < CANVAS_FILLED).sum())
            beyond = other[width : width + 3]
            widths.append(width if beyond.size and beyond.mean() > 0.5 else 0)
        start, stop = widths[0], len(lines) - widths[1]
        inside.append(slice(start, stop) if stop - start > 16 else slice(None))
    return film[inside[0], inside[1]]


def _texture(film: np.ndarray) -> float:
    """Return the logarithm to base 2 of the bright part's texture to the dark part's, within limits; 0 where one is missing."""
    from scipy import ndimage
    from skimage.filters import threshold_otsu

    bright = film > threshold_otsu(film)
    rest = np.abs(film - ndimage.uniform_filter(film, 7))
    parts = (rest[ndimage.binary_erosion(part, iterations=3)] for part in (bright, ~bright))
    texture = [float(np.median(part)) for part in parts if part.size > 200]
    if len(texture) < 2:
        return 0.0
    ratio = np.log2((texture[0] + 1e-3) / (texture[1] + 1e-3))
    return float(np.clip(ratio, -TEXTURE_LIMIT, TEXTURE_LIMIT))
