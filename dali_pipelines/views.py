"""The DALI graph that draws an augmented view of a tile.

A view resamples its tile **once**. Rotation, scale, flips, translation, area crop, perspective and the change to the view's
size are composed into one homography that maps destination to source coordinates; every further resample would blur the fine
detail that matters here. The border is mirrored, so that no black corner identifies a view. Intensities are changed in float
and never clipped.
"""

from __future__ import annotations

from math import ceil
from typing import Any

import numpy as np
from nvidia.dali import fn, math, types
from nvidia.dali.pipeline import do_not_convert

from mammostream.dali_pipelines.intensity import ImageFormat, scale_and_shift
from mammostream.dali_pipelines.recipes import View


@do_not_convert
def _uniform(low: float, high: float) -> Any:
    """Draw from [low, high); if they are equal, return the number: DALI rejects an empty range, and this saves a node."""
    return fn.random.uniform(range=[float(low), float(high)]) if low < high else float(low)


def _sign(flip_probability: float) -> Any:
    """Draw -1 with a probability, else 1."""
    return 1.0 - 2.0 * fn.random.coin_flip(probability=flip_probability) if flip_probability else 1.0


@do_not_convert
def draw_homography(view: View, tile_size: int, size: int) -> Any:
    """Draw the homographies of a batch.

    With coordinates relative to the centres, destination ``(u, v)`` comes from source ``M (u, v) / (1 + p u + q v) + offset``,
    where ``M`` flips, magnifies and rotates, and ``p, q`` tilt. The tilt acts on destination coordinates, which no other draw
    enlarges, so the denominator stays above ``1 - 2 * perspective > 0``.

    Parameters
    ----------
    view
        What may vary.
    tile_size, size
        Edge of the tile and of the view in pixels; a view without random changes shows the whole tile.

    Returns
    -------
    DataNode
        (3, 3) float32 on the CPU, destination to source; (0, 0) is the top-left **corner** of the top-left pixel.
    """
    half = size / 2
    zoom = tile_size / size / _uniform(*view.scale)
    slack = 0.0
    if view.crop_area is not None:
        kept = _uniform(*view.crop_area) ** 0.5
        zoom = zoom * kept
        slack = (1.0 - kept) * (tile_size / 2)  # how far the crop's centre may lie from the tile's
    reach = slack + view.translation * tile_size
    # Where nothing moves the centre, the reach is 0 and nothing is drawn.
    moves = view.crop_area is not None or view.translation > 0
    offset_x, offset_y = ((_uniform(-1, 1) * reach if moves else 0.0) + tile_size / 2 for _ in range(2))

    affine = fn.transforms.translation(offset=[-half, -half])
    affine = fn.transforms.scale(affine, scale=fn.stack(zoom * _sign(view.horizontal_flip), zoom * _sign(view.vertical_flip)))
    affine = fn.transforms.rotation(affine, angle=_uniform(-view.rotation_deg, view.rotation_deg))

    tilt = view.perspective / half
    p, q = _uniform(-tilt, tilt), _uniform(-tilt, tilt)
    weight = fn.stack(p, q, 1.0 - (p + q) * half)
    return fn.stack(affine[0] + offset_x * weight, affine[1] + offset_y * weight, weight)


@do_not_convert
def _to_float(tile: Any) -> Any:
    # On the CPU the normalisation is twice as fast as the cast.
    return fn.cast(tile, dtype=types.FLOAT) if tile.device == "gpu" else _times_plus(tile, 1.0, 0.0)


@do_not_convert
def _gaussian_blur(tile: Any, sigma: Any, radius: int) -> Any:
    """Blur with a Gaussian kernel of edge ``2 * radius + 1`` pixels, mirrored at the border; returns float32 (H, W, 1)."""
    if tile.device == "gpu":
        return fn.gaussian_blur(tile, sigma=sigma, window_size=2 * radius + 1, dtype=types.FLOAT)
    # On the CPU, two one-dimensional filters in float are 3 times as fast as DALI's own Gaussian.
    offsets = np.arange(-radius, radius + 1, dtype=np.float32)
    kernel = math.exp(types.Constant(-(offsets**2) / 2) / (sigma * sigma))
    kernel = kernel / fn.reductions.sum(kernel)
    tile = _to_float(tile)
    for shape in ([1, 2 * radius + 1], [2 * radius + 1, 1]):
        tile = fn.filter(tile, fn.reshape(kernel, shape=shape), border="reflect_101")
    return tile


@do_not_convert
def _times_plus(tile: Any, gain: Any, offset: Any) -> Any:
    """Return ``tile * gain + offset`` as float32; `gain` must not be 0."""
    if tile.device == "gpu":
        return tile * gain + offset
    # Two arithmetic nodes would pass over the pixels twice, with a buffer for a whole batch in between.
    mean, stddev = (
        value if isinstance(value, float) else fn.reshape(value, shape=[1, 1, 1]) for value in (-offset / gain, 1.0 / gain)
    )
    return fn.normalize(tile, mean=mean, stddev=stddev, dtype=types.FLOAT)


@do_not_convert
def _finish(tile: Any, dtype: str) -> Any:
    return tile if dtype == "float32" else fn.cast(tile, dtype=types.FLOAT16)


def normalise(tile: Any, form: ImageFormat) -> Any:
    """Normalise a uint16 (H, W, 1) tile: ``(tile / 65535 - mean) / std`` in the format's type."""
    return _finish(_times_plus(tile, *scale_and_shift(form.mean, form.std)), form.dtype)


# Only the functions that lead to the ``if`` on a node are left for DALI to convert: that takes as long as all else at a start.
def apply_view(tile: Any, view: View, tile_size: int, form: ImageFormat) -> Any:
    """Draw a view of a tile, normalised.

    Call it inside a pipeline definition with ``enable_conditionals=True``.

    Parameters
    ----------
    tile
        uint16 (tile_size, tile_size, 1) DataNode on the CPU or the GPU.
    view
        What may vary.
    tile_size
        Edge of the tile in pixels.
    form
        Size, normalisation and type of the view.

    Returns
    -------
    DataNode
        (form.size, form.size, 1) on the tile's device; with the default view and the tile's size, exactly :func:`normalise`.
    """
    original = tile
    if view.moves_pixels or form.size != tile_size:
        tile = fn.experimental.warp_perspective(
            tile,
            matrix=draw_homography(view, tile_size, form.size),
            size=[form.size, form.size],
            border_mode="reflect_101",
            interp_type=types.INTERP_LINEAR,
        )
    if view.blur_probability > 0:
        # DALI splits the batch here, so only the chosen samples are blurred.
        chosen = fn.random.coin_flip(probability=view.blur_probability, dtype=types.BOOL)
        if chosen:
            tile = _gaussian_blur(tile, _uniform(*view.blur_sigma), ceil(3 * view.blur_sigma[1]))
        else:
            tile = _to_float(tile)

    # Brightness b and contrast c about the tile's mean m, ((x b - m b) c + m b), and the normalisation are all linear:
    # one gain and one offset per tile, so one pass over the pixels.
    gain, offset = scale_and_shift(form.mean, form.std)
    if view.brightness > 0:
        gain = _uniform(1 - view.brightness, 1 + view.brightness) * gain
    if view.contrast > 0:
        contrast = _uniform(1 - view.contrast, 1 + view.contrast)
        # Of the tile, not of the view: DALI recognises that both views need the same sum and computes it once.
        mean = fn.cast(fn.reductions.sum(original, dtype=types.UINT64), dtype=types.FLOAT) * (1 / tile_size**2)
        offset = mean * (gain * (1.0 - contrast)) + offset
        gain = gain * contrast
    out = _times_plus(tile, gain, offset)
    if view.noise > 0:
        out = out + fn.random.normal(out, stddev=_uniform(0, view.noise / form.std))
    return _finish(out, form.dtype)
