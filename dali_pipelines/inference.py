"""Turn one tile in memory into a model's input without DALI, with the same values as the evaluation pipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mammostream.common.errors import BadInput
from mammostream.common.normalisation import MEAN, STD
from mammostream.dali_pipelines.intensity import FULL_SCALE, scale_and_shift

if TYPE_CHECKING:
    from PIL import Image

_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601, with which DALI converts colours to grey


def create_inference_transform(
    tile_size: int | None = None, mean: float = MEAN, std: float = STD
) -> Callable[[Image.Image | np.ndarray], torch.Tensor]:
    """Return the transform from an image to a model's input; it equals the evaluation pipeline.

    Parameters
    ----------
    tile_size
        Edge in pixels that images are resized to, with an antialiasing filter; None keeps their size.
    mean, std
        Normalisation in units of full scale, as the model was trained with.

    Returns
    -------
    callable
        Maps a PIL image (grey of 8 or 16 bits, or colour), or a uint8 or uint16 array (H, W), (H, W, 1), (H, W, 3) or
        (H, W, 4), to a float32 tensor (1, H, W) on the CPU. Full scale is 255 or 65535, depending on the type; an alpha channel
        is dropped. Raises BadInput for anything else.

    Examples
    --------
    >>> import numpy as np
    >>> transform = create_inference_transform(tile_size=32, mean=0.5, std=0.25)
    >>> tile = transform(np.zeros((64, 64), dtype=np.uint8))
    >>> tile.shape, tile.min().item()
    (torch.Size([1, 32, 32]), -2.0)
    """
    scale, shift = scale_and_shift(mean, std)

    def transform(image: Image.Image | np.ndarray) -> torch.Tensor:
        tile = torch.from_numpy(_grey(_to_array(image)))[None]
        if tile_size is not None:
            tile = resize(tile[None], tile_size)[0]
        return tile * scale + shift

    return transform


def resize(tiles: torch.Tensor, size: int) -> torch.Tensor:
    """Return tiles (N, 1, H, W) as (N, 1, size, size), by a bilinear filter with antialiasing; of that size, as they are."""
    if tiles.shape[2:] == (size, size):
        return tiles
    return torch.nn.functional.interpolate(tiles, size=(size, size), mode="bilinear", antialias=True, align_corners=False)


def _to_array(image: Any) -> np.ndarray:
    """Return a PIL image's or an array's pixels as they are: uint8 or uint16, (H, W) or (H, W, C)."""
    if isinstance(image, np.ndarray):
        return image
    mode = getattr(image, "mode", None)
    if mode is None:
        raise BadInput(f"cannot make a tile of a {type(image).__name__}; give a PIL image or a uint8 or uint16 array")
    if mode.startswith("I;16"):
        return np.asarray(image).astype(np.uint16)
    if mode == "I":  # 32 bits, as some versions of Pillow open 16-bit files
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > FULL_SCALE:
            raise BadInput("the image has pixels beyond 16 bits; map it to 8 or 16 bits first")
        return pixels.astype(np.uint16)
    return np.asarray(image.convert("L" if mode in ("1", "L", "LA") else "RGB"))


def _grey(pixels: np.ndarray) -> np.ndarray:
    """Reduce pixels to one channel and full scale 65535: float32 (H, W)."""
    shape_ok = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (1, 3, 4))
    if pixels.dtype not in (np.uint8, np.uint16) or not shape_ok or not pixels.size:
        raise BadInput(
            f"cannot make a tile of a {pixels.dtype} array of shape {pixels.shape}; give uint8 or uint16 pixels of shape "
            "(H, W), (H, W, 1), (H, W, 3) or (H, W, 4)"
        )
    factor = np.float32(257 if pixels.dtype == np.uint8 else 1)
    if pixels.ndim == 3 and pixels.shape[2] > 1:
        # Decoders return whole grey levels; rounding gives the same here.
        return np.rint(pixels[..., :3].astype(np.float32) @ _LUMA) * factor
    return pixels.reshape(pixels.shape[:2]).astype(np.float32) * factor
