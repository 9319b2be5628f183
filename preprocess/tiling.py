"""One film from its decoded pixels to its tiles: segment, map, resample, score, select, cut."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from mammostream.common.errors import BadInput
from mammostream.common.options import option
from mammostream.preprocess.backend import Backend, backend_of
from mammostream.preprocess.energy import pixel_energy, speck_response
from mammostream.preprocess.intensity import MAPPINGS, map_to_unit, to_stored, useless
from mammostream.preprocess.mammogram import Mammogram, ReadingConfig
from mammostream.preprocess.pectoral import pectoral_muscle, view_of
from mammostream.preprocess.polarity import upright
from mammostream.preprocess.resampling import block_mean, resample
from mammostream.preprocess.segmentation import Segmentation, coarse_factor, fine_factor, segment_breast
from mammostream.preprocess.selection import (
    NONZERO_ABOVE,
    ScoreMaps,
    Scores,
    SelectionConfig,
    TileSelection,
    box_means,
    grid_positions,
    integral,
    select_tiles,
)
from mammostream.preprocess.specks import find_clusters, find_specks

SPACING_TOLERANCE = 1.25
CLUSTER_MARGIN_MM = 1.0
DETECTOR_MM = (300, 400)  # no detector and no film is larger, margins included


@dataclass(frozen=True)
class TilingConfig(SelectionConfig, ReadingConfig):
    """Everything that decides which tiles a film gives and what their pixels are."""

    mapping: str = option(
        "voi",
        "From stored values to grey: voi = the file's own VOI LUT or window, percentiles of the breast where it has none or a "
        "useless one; percentile = always percentiles; full = the whole stored range.",
        choices=tuple(MAPPINGS),
    )
    pixel_spacing: float | None = option(
        None, "Resample films to this pixel size in mm (0.05-0.2 is usual); default: keep each film's own."
    )
    polarity: str = option(
        "auto",
        "Films with a white background are flagged 'inverted'; auto also turns them over, as-is takes them as they are.",
        choices=("auto", "as-is"),
    )

    def __post_init__(self) -> None:
        SelectionConfig.__post_init__(self)
        ReadingConfig.__post_init__(self)
        if self.pixel_spacing is not None and not 0.01 <= self.pixel_spacing <= 2:
            raise BadInput(f"--pixel-spacing {self.pixel_spacing} is not between 0.01 and 2 mm")


# Recorded with the tiles by their own names; the spacing is recorded as ``pixel_spacing_mm``, the mapping by its version.
RECORDED = tuple(f.name for f in fields(TilingConfig) if f.name not in ("pixel_spacing", "mapping"))
# Options since version 0.1.0, whose records lack them, and what that version did.
_ADDED = {"polarity": "as-is", "max_pectoral_ratio": 1.0}


@dataclass(frozen=True)
class Film:
    """A film ready to be cut.

    Attributes
    ----------
    image
        (H, W) float32 in [0, 1] at the stored pixel spacing, padded to one tile where it was smaller.
    scale
        Native pixels an edge of a pixel of `image`.
    segmentation, selection
        The breast, and the selection of tiles in pixels of `image`.
    pectoral
        (h, w) bool, the pectoral muscle on the grid of the breast's mask, which it is part of.
    response, response_scale
        Speck response in noise deviations, and how many pixels of `image` make an edge of its pixels.
    mapping
        How stored values became [0, 1].
    flags
        The header's, ``inverted`` (see :func:`mammostream.preprocess.polarity.upright`), the segmentation's, ``no_pectoral``
        (an MLO view on which no pectoral muscle was found), ``padded`` (the film is smaller than a tile),
        ``cluster_not_held`` (a cluster of specks lies where no tile passes the gates).
    remarks
        The particulars of flags that have any.
    guide_8bit_kept
        Tiles that the same gates and the breast rule keep on the plain 8-bit scale (no mapping), measured at ~0.4 mm.
    """

    image: Any
    scale: float
    segmentation: Segmentation
    pectoral: Any
    selection: TileSelection
    response: Any
    response_scale: int
    mapping: str
    flags: tuple[str, ...]
    guide_8bit_kept: int
    remarks: dict[str, str] = field(default_factory=dict)

    @property
    def pectoral_area_mm2(self) -> float:
        """Area of the pectoral muscle in mm², 0 where none was found."""
        return float(self.pectoral.sum()) * self.segmentation.spacing_mm**2

    @property
    def tiles(self) -> Scores:
        """The kept tiles."""
        return self.selection.tiles

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
    mammogram = upright(mammogram, config.polarity)
    header = mammogram.header
    backend = backend_of(mammogram.pixels)
    segmentation = segment_breast(mammogram.pixels, header.spacing_mm)
    breast_values = _values_inside(backend, mammogram.pixels, segmentation)
    voi, remarks = _display(mammogram, config, breast_values)
    if "bright_fog" in segmentation.flags:
        area, brightness = segmentation.fog_mm2 / 100, segmentation.fog_brightness
        remarks["bright_fog"] = f"{area:.1f} cm² were cut off, {brightness:.0%} as bright as the breast"
    image, mapping = map_to_unit(mammogram.pixels, voi, breast_values, config.mapping, header.bits)
    scale = 1.0
    if config.pixel_spacing is not None:
        if header.spacing_mm is None:
            raise BadInput("--pixel-spacing needs each film's own spacing, which is unknown; give --assume-spacing MM")
        scale = config.pixel_spacing / header.spacing_mm
        image = resample(image, scale) if abs(scale - 1) > 1e-3 else image
    # Millimetres matter to the filter; without a spacing the segmentation's assumption (240 mm high) serves here too.
    spacing = segmentation.spacing_mm / segmentation.factor * scale
    fine, coarse = fine_factor(spacing), coarse_factor(spacing)
    # Before padding, whose edge would be a bright step.
    small = block_mean(image, fine)
    response = speck_response(small, segmentation.mask, spacing * fine)
    flags = tuple(dict.fromkeys((*header.flags, *remarks, *segmentation.flags)))
    view = f"{header.view} {header.view_modifiers}".strip()
    pectoral = pectoral_muscle(segmentation.thumbnail, segmentation, view)
    if view_of(view) == "MLO" and segmentation.side and not bool(pectoral.any()):
        flags = (*flags, "no_pectoral")
    masks = [segmentation.mask, pectoral]
    if min(image.shape) < config.tile_size:
        flags = (*flags, "padded")
        image = _padded(image, [max(n, config.tile_size) for n in image.shape])
        small, energies = (_padded(a, [-(-n // fine) for n in image.shape]) for a in (small, pixel_energy(response)))
        masks = [_padded(mask, [math.ceil(n * scale / segmentation.factor) for n in image.shape]) for mask in masks]
    else:
        energies = pixel_energy(response)
    maps = ScoreMaps(
        intensity=block_mean(small, coarse // fine),
        nonzero=block_mean(small > NONZERO_ABOVE, coarse // fine),
        energy=block_mean(energies, coarse // fine),
        mask=masks[0],
        scale=coarse,
        mask_scale=segmentation.factor / scale,
        pectoral=masks[1],
    )
    clusters = None
    if config.cluster_specks and config.select != "breast":
        specks = find_specks(response, spacing * fine, config.min_speck) * fine
        clusters = find_clusters(specks, config.cluster_mm / spacing, config.cluster_specks)
        # Specks have a size, and the faintest of a cluster may have been missed at its rim.
        margin = CLUSTER_MARGIN_MM / spacing * np.array([-1, -1, 1, 1])
        clusters = np.clip(clusters + margin, 0, [*image.shape[::-1]] * 2)
    edge = segmentation.factor / scale
    rows, columns = (slice(math.ceil(part.start * edge), int(part.stop * edge)) for part in segmentation.inside)
    selection = select_tiles(image.shape, maps, config, clusters, min_step=math.ceil(1 / scale), inside=(rows, columns))
    if selection.unheld:
        flags = (*flags, "cluster_not_held")
    guide = _guide_8bit_kept(mammogram.pixels.shape, 2**header.bits - 1, segmentation, config, scale)
    return Film(image, scale, segmentation, pectoral, selection, response, fine, mapping, flags, guide, remarks)


def _display(mammogram: Mammogram, config: TilingConfig, breast_values: Any) -> tuple[Any | None, dict[str, str]]:
    """Return the film's own display, None where it is useless, and the particulars of flags, its size's doubts among them."""
    header, voi = mammogram.header, mammogram.voi
    remarks = {name: particulars for name, particulars in header.flags.items() if particulars}
    if voi is not None and config.mapping == "voi" and (why := useless(voi, breast_values)):
        voi, remarks["window_ignored"] = None, f"{mammogram.voi_name or 'VOI table'}: {why}"
    if header.spacing_mm:
        short, long = sorted(n * header.spacing_mm for n in (header.height, header.width))
        if short > DETECTOR_MM[0] or long > DETECTOR_MM[1]:
            remarks["spacing_doubtful"] = f"the film would measure {short / 10:.0f} x {long / 10:.0f} cm"
    return voi, remarks


def _padded(values: Any, shape: Sequence[int]) -> Any:
    """Fill up with zeros, right and below, to at least a shape."""
    return backend_of(values).xp.pad(values, [(0, max(0, n - m)) for n, m in zip(shape, values.shape, strict=True)])


def _values_inside(backend: Backend, pixels: Any, segmentation: Segmentation) -> Any:
    """Return stored values inside the breast, every fourth pixel in each direction: enough for percentiles."""
    step, factor = 4, segmentation.factor
    sample = pixels[::step, ::step]
    rows, columns = (backend.xp.arange(n) * step // factor for n in sample.shape)
    return sample[segmentation.mask[:, columns][rows]]


def _guide_8bit_kept(shape: tuple[int, int], white: int, segmentation: Segmentation, config: TilingConfig, scale: float) -> int:
    coarse = segmentation.thumbnail / white
    size, stride = config.tile_size * scale, max(1, round(config.stride * scale))
    rows, columns = (grid_positions(n, round(size), stride) for n in shape)
    y, x = (grid.ravel() / segmentation.factor for grid in np.meshgrid(rows, columns, indexing="ij"))
    edge = size / segmentation.factor
    bright = box_means(integral(coarse), y, x, edge, edge) >= config.intensity_gate
    full = box_means(integral(coarse > NONZERO_ABOVE), y, x, edge, edge) >= config.min_nonzero
    breast = box_means(integral(segmentation.mask), y, x, edge, edge) >= config.min_breast_ratio
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


def whole_record(record: dict[str, Any]) -> dict[str, Any]:
    """Return a :func:`preprocessing_record` with the options that the version that wrote it did not have."""
    return _ADDED | record


def preprocessing_record(config: TilingConfig, spacings: np.ndarray, bits: int) -> dict[str, Any]:
    """Return how tiles were made, as plain types, for ``shards.json`` and checkpoints."""
    known = spacings[~np.isnan(spacings)]
    return {
        "pixel_spacing_mm": config.pixel_spacing,
        "native_spacing_mm": [float(known.min()), float(known.max())] if known.size else None,
        "mapping": MAPPINGS[config.mapping],
        "bits": bits,
        **{name: getattr(config, name) for name in RECORDED},
    }
