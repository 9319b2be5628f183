"""Augmented views of a tile: what may vary (:class:`View`), the recipes, and the DALI graph that draws one.

A view resamples its tile **once**. Rotation, scale, flips, translation, area crop and perspective are composed to one
homography that maps destination to source coordinates; each resample more would blur the fine detail that matters here.
The border is mirrored, so that no black corner tells a view apart. Intensities are changed in float and never clipped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from nvidia.dali import fn, math, types

from common.errors import BadInput
from dali_pipelines.intensity import scale_and_shift


@dataclass(frozen=True)
class View:
    """What may vary in a view; every field's default changes nothing.

    All draws are uniform and independent of each other, of other tiles and of the tile's other view.

    Parameters
    ----------
    rotation_deg
        Largest rotation either way, in degrees.
    scale
        Smallest and largest magnification; 2 shows details twice as large.
    horizontal_flip, vertical_flip
        Probability of mirroring left-right, top-bottom.
    translation
        Largest shift along each axis either way, as a share of the tile's edge.
    crop_area
        Smallest and largest share of the tile's area, in (0, 1], that a square crop anywhere in the tile keeps before it
        is magnified to the tile's size. None: no crop.
    perspective
        Largest tilt about each axis either way, below 0.5: at most, lines along one edge become ``1 + perspective`` times as
        long as at the centre, and ``1 - perspective`` times along the edge across.
    brightness
        Largest relative change: pixels are multiplied by a factor in ``1 ± brightness``.
    contrast
        Largest relative change: differences from the tile's mean are multiplied by a factor in ``1 ± contrast``.
    blur_probability, blur_sigma
        Probability of a Gaussian blur, and the smallest and largest standard deviation of its kernel in pixels.
    noise
        Largest standard deviation of added Gaussian noise, in units of full scale.

    Raises
    ------
    BadInput
        A field is outside its range.
    """

    rotation_deg: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    horizontal_flip: float = 0.0
    vertical_flip: float = 0.0
    translation: float = 0.0
    crop_area: tuple[float, float] | None = None
    perspective: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    blur_probability: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    noise: float = 0.0

    def __post_init__(self) -> None:
        ranges = {
            "rotation_deg": 0 <= self.rotation_deg <= 180,
            "scale": 0 < self.scale[0] <= self.scale[1],
            "horizontal_flip": 0 <= self.horizontal_flip <= 1,
            "vertical_flip": 0 <= self.vertical_flip <= 1,
            "translation": 0 <= self.translation <= 1,
            "crop_area": self.crop_area is None or 0 < self.crop_area[0] <= self.crop_area[1] <= 1,
            "perspective": 0 <= self.perspective < 0.5,
            "brightness": 0 <= self.brightness <= 1,
            "contrast": 0 <= self.contrast <= 1,
            "blur_probability": 0 <= self.blur_probability <= 1,
            "blur_sigma": 0 < self.blur_sigma[0] <= self.blur_sigma[1],
            "noise": 0 <= self.noise <= 1,
        }
        for name, inside in ranges.items():
            if not inside:
                raise BadInput(f"View: {name}={getattr(self, name)} is out of range; see the documentation of View")

    @property
    def moves_pixels(self) -> bool:
        """Whether the view changes geometry at all; where it does not, the tile is not resampled."""
        geometry = ("rotation_deg", "scale", "horizontal_flip", "vertical_flip", "translation", "crop_area", "perspective")
        return any(getattr(self, name) != getattr(_IDENTITY, name) for name in geometry)


_IDENTITY = View()

# The guide's list ends with "grayscale": on tiles of one channel it is the identity, so there is nothing to apply.
_GUIDE = (
    View(
        rotation_deg=15,
        scale=(0.85, 1.15),
        horizontal_flip=0.5,
        vertical_flip=0.5,
        brightness=0.3,
        contrast=0.3,
    ),
    View(rotation_deg=25, brightness=0.4, contrast=0.4, perspective=0.1, blur_probability=0.5, blur_sigma=(0.1, 2.0)),
)

# For mammograms: crops make the views differ in content and size, as BYOL wants it. Pixels are 0.05 to 0.1 mm, so one
# pixel of blur is at most 0.1 mm: a wider kernel would wipe out micro-calcifications.
_MAMMO = tuple(
    replace(view, translation=0.05, crop_area=(0.3, 1.0), horizontal_flip=0.5, blur_sigma=(0.1, 1.0)) for view in _GUIDE
)

RECIPES: dict[str, tuple[View, View]] = {"guide": _GUIDE, "mammo": _MAMMO}
"""The two views of pre-training by recipe name."""

TRAIN_VIEW = View(rotation_deg=10, scale=(0.9, 1.1), horizontal_flip=0.5, vertical_flip=0.5, brightness=0.3, contrast=0.3)
"""Augmentation for training with labels: little geometry, since it keeps what a radiologist would see; as much change of
brightness and contrast as films of different scanners and exposures show."""


def _uniform(low: float, high: float) -> Any:
    """Draw from [low, high); DALI itself refuses low = high, which here gives `low`."""
    return fn.random.uniform(range=[0.0, 1.0]) * float(high - low) + float(low)


def _sign(flip_probability: float) -> Any:
    """Draw -1 with a probability, else 1."""
    return 1.0 - 2.0 * fn.random.coin_flip(probability=flip_probability)


def draw_homography(view: View, tile_size: int) -> Any:
    """Draw the homographies of a batch.

    With coordinates from the tile's centre, destination ``(u, v)`` comes from source
    ``M (u, v) / (1 + p u + q v) + offset``, where ``M`` flips, magnifies and rotates and ``p, q`` tilt. The tilt acts on
    destination coordinates, which no other draw enlarges, so that the denominator stays above ``1 - 2 * perspective > 0``.

    Returns
    -------
    DataNode
        (3, 3) float32 on the CPU, destination to source; (0, 0) is the top-left **corner** of the top-left pixel.
    """
    half = tile_size / 2
    zoom = 1.0 / _uniform(*view.scale)
    slack = 0.0
    if view.crop_area is not None:
        kept = math.sqrt(_uniform(*view.crop_area))
        zoom = zoom * kept
        slack = (1.0 - kept) * half  # how far the crop's centre may lie from the tile's
    reach = slack + view.translation * tile_size
    offset_x = _uniform(-1, 1) * reach + half
    offset_y = _uniform(-1, 1) * reach + half

    affine = fn.transforms.translation(offset=[-half, -half])
    affine = fn.transforms.scale(affine, scale=fn.stack(zoom * _sign(view.horizontal_flip), zoom * _sign(view.vertical_flip)))
    affine = fn.transforms.rotation(affine, angle=_uniform(-view.rotation_deg, view.rotation_deg))

    tilt = view.perspective / half
    p, q = _uniform(-tilt, tilt), _uniform(-tilt, tilt)
    weight = fn.stack(p, q, 1.0 - (p + q) * half)
    return fn.stack(affine[0] + offset_x * weight, affine[1] + offset_y * weight, weight)


def normalise(tile: Any, mean: float, std: float) -> Any:
    """Normalise a uint16 (H, W, 1) tile to float32: ``(tile / 65535 - mean) / std``."""
    scale, shift = scale_and_shift(mean, std)
    return tile * scale + shift


def apply_view(tile: Any, view: View, *, tile_size: int, mean: float, std: float) -> Any:
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
    mean, std
        Normalisation in units of full scale.

    Returns
    -------
    DataNode
        float32 (tile_size, tile_size, 1) where the tile was; with the default view, exactly :func:`normalise`.
    """
    if view.moves_pixels:
        tile = fn.experimental.warp_perspective(
            tile,
            matrix=draw_homography(view, tile_size),
            size=[tile_size, tile_size],
            border_mode="reflect_101",
            interp_type=types.INTERP_LINEAR,
        )
    if view.blur_probability > 0:
        # DALI splits the batch here: only the samples drawn pay for the blur, the dearest step on the CPU.
        chosen = fn.random.coin_flip(probability=view.blur_probability, dtype=types.BOOL)
        if chosen:
            tile = fn.gaussian_blur(tile, sigma=_uniform(*view.blur_sigma))

    # Brightness b and contrast c about the tile's mean m, ((x b - m b) c + m b), and the normalisation are all linear:
    # one gain and one offset a tile, so the pixels are walked through once.
    gain, offset = scale_and_shift(mean, std)
    if view.brightness > 0:
        gain = _uniform(1 - view.brightness, 1 + view.brightness) * gain
    if view.contrast > 0:
        contrast = _uniform(1 - view.contrast, 1 + view.contrast)
        offset = fn.reductions.mean(tile) * (gain * (1.0 - contrast)) + offset
        gain = gain * contrast
    out = tile * gain + offset
    if view.noise > 0:
        out = out + fn.random.normal(out, stddev=_uniform(0, view.noise / std))
    return out
