"""One film from its decoded pixels to its tiles: segment, map, resample, score, select, cut."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.errors import BadInput
from common.options import option
from preprocess.backend import Backend, backend_of
from preprocess.energy import bright_response, excess_energy
from preprocess.intensity import MAPPING, map_to_unit, to_stored
from preprocess.reading import Mammogram
from preprocess.resampling import block_mean, resample
from preprocess.segmentation import Segmentation, segment_breast
from preprocess.selection import NONZERO_ABOVE, SelectionConfig, TileSelection, box_means, grid_positions, select_tiles

SPACING_TOLERANCE = 1.25


@dataclass(frozen=True)
class TilingConfig(SelectionConfig):
    """Everything that decides which tiles a film gives and what their pixels are."""

    pixel_spacing: float | None = option(
        None, "Resample films to this pixel size in mm (0.05-0.2 is usual); default: keep each film's own."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pixel_spacing is not None and not 0.01 <= self.pixel_spacing <= 2:
            raise BadInput(f"--pixel-spacing {self.pixel_spacing} is not between 0.01 and 2 mm")


@dataclass(frozen=True)
class Film:
    """A film ready to be cut.

    Attributes
    ----------
    image
        (H, W) float32 in [0, 1] at the stored pixel spacing, padded to one tile where it was smaller.
    scale
        Native pixels an edge of a pixel of `image`.
    segmentation, tiles
        The breast, and the kept tiles in pixels of `image`.
    mapping
        How stored values became [0, 1].
    flags
        The segmentation's and ``padded``.
    guide_8bit_kept
        Tiles that the same gates and the breast rule keep on the plain 8-bit scale (no mapping), measured at ~0.4 mm.
    """

    image: Any
    scale: float
    segmentation: Segmentation
    tiles: TileSelection
    mapping: str
    flags: tuple[str, ...]
    guide_8bit_kept: int

    def cut(self, index: int, size: int, bits: int) -> np.ndarray:
        """Return kept tile `index` as (size, size) uint8 or uint16."""
        x, y = int(self.tiles.x[index]), int(self.tiles.y[index])
        return backend_of(self.image).to_host(to_stored(self.image[y : y + size, x : x + size], bits))

    def native_box(self, index: int, size: int) -> tuple[int, int, int]:
        """Return x, y and edge length of kept tile `index` in native pixels."""
        return (
            round(int(self.tiles.x[index]) * self.scale),
            round(int(self.tiles.y[index]) * self.scale),
            round(size * self.scale),
        )


def tile_film(mammogram: Mammogram, config: TilingConfig) -> Film:
    """Take a decoded mammogram to its scored and selected tiles.

    Raises
    ------
    BadInput
        ``--pixel-spacing`` is asked for and the film's own spacing is unknown.
    """
    header = mammogram.header
    backend = backend_of(mammogram.pixels)
    segmentation = segment_breast(mammogram.pixels, header.spacing_mm)
    breast_values = _values_inside(backend, mammogram.pixels, segmentation)
    image, mapping = map_to_unit(mammogram.pixels, mammogram.voi, breast_values)
    scale = 1.0
    if config.pixel_spacing is not None:
        if header.spacing_mm is None:
            raise BadInput("--pixel-spacing needs each film's own spacing, which is unknown; give --assume-spacing MM")
        scale = config.pixel_spacing / header.spacing_mm
        image = resample(image, scale) if abs(scale - 1) > 1e-3 else image
    # Millimetres matter to the filter; without a spacing the segmentation's assumption (240 mm high) serves here too.
    spacing = segmentation.spacing_mm / segmentation.factor * scale
    # Before padding, whose edge would be a bright step.
    response, response_spacing = bright_response(image, segmentation.mask, spacing, segmentation.spacing_mm)
    flags = segmentation.flags
    if min(image.shape) < config.tile_size:
        image = backend.xp.pad(image, [(0, max(0, config.tile_size - n)) for n in image.shape])
        flags = (*flags, "padded")
    tiles = select_tiles(
        image,
        segmentation.mask,
        excess_energy(response),
        config,
        mask_scale=segmentation.factor / scale,
        energy_scale=response_spacing / spacing,
        min_step=math.ceil(1 / scale),
    )
    guide = _guide_8bit_kept(mammogram, segmentation, config, scale)
    return Film(image, scale, segmentation, tiles, mapping, flags, guide)


def _values_inside(backend: Backend, pixels: Any, segmentation: Segmentation) -> Any:
    """Return stored values inside the breast, every fourth pixel in each direction: enough for percentiles."""
    step, factor = 4, segmentation.factor
    sample = pixels[::step, ::step]
    rows, columns = (backend.xp.arange(n) * step // factor for n in sample.shape)
    return sample[segmentation.mask[rows[:, None], columns[None, :]]]


def _guide_8bit_kept(mammogram: Mammogram, segmentation: Segmentation, config: TilingConfig, scale: float) -> int:
    full_range = 2**mammogram.header.bits - 1
    coarse = block_mean(mammogram.pixels, segmentation.factor) / full_range
    size, stride = config.tile_size * scale, max(1, round(config.stride * scale))
    rows, columns = (grid_positions(n, round(size), stride) for n in mammogram.pixels.shape)
    y, x = (grid.ravel() / segmentation.factor for grid in np.meshgrid(rows, columns, indexing="ij"))
    edge = size / segmentation.factor
    bright = box_means(coarse, y, x, edge, edge) >= config.intensity_gate
    full = box_means(coarse > NONZERO_ABOVE, y, x, edge, edge) >= config.min_nonzero
    breast = box_means(segmentation.mask, y, x, edge, edge) >= config.min_breast_ratio
    return int((bright & full & breast).sum())


def check_spacings(spacings: np.ndarray, config: TilingConfig) -> None:
    """Refuse films whose native pixels differ by more than 1.25x in one set, unless a common spacing is asked for.

    Parameters
    ----------
    spacings
        (N,) native pixel sizes in mm, NaN where unknown.

    Raises
    ------
    BadInput
        They differ too much, or ``--pixel-spacing`` is asked for and one is unknown.
    """
    unknown = int(np.isnan(spacings).sum())
    if config.pixel_spacing is not None:
        if unknown:
            raise BadInput(
                f"{unknown} of {len(spacings)} films have no pixel spacing, which --pixel-spacing needs; "
                "run 'mammostream prepare' with --assume-spacing MM"
            )
        return
    known = spacings[~np.isnan(spacings)]
    if known.size and known.max() > SPACING_TOLERANCE * known.min():
        raise BadInput(
            f"pixel spacings from {known.min():g} to {known.max():g} mm in one set differ by more than {SPACING_TOLERANCE}x; "
            "resample them with --pixel-spacing MM, or build one set a spacing"
        )


def preprocessing_record(config: TilingConfig, spacings: np.ndarray, bits: int) -> dict[str, Any]:
    """Return how tiles were made, as plain types, for ``shards.json`` and checkpoints."""
    known = spacings[~np.isnan(spacings)]
    return {
        "tile_size": config.tile_size,
        "stride": config.stride,
        "pixel_spacing_mm": config.pixel_spacing,
        "native_spacing_mm": [float(known.min()), float(known.max())] if known.size else None,
        "mapping": MAPPING,
        "bits": bits,
        "min_breast_ratio": config.min_breast_ratio,
        "min_freq_energy": config.min_freq_energy,
        "min_intensity": config.min_intensity,
        "min_nonzero": config.min_nonzero,
        "select": config.select,
        "freq_percentile": config.freq_percentile,
        "max_tiles_per_image": config.max_tiles_per_image,
    }
