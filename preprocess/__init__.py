"""Reading a mammogram, its display mapping, breast segmentation, frequency energy, tile selection, pictures, simulation.

Pure functions on 2-D arrays: NumPy in gives NumPy out through scikit-image and scipy, CuPy in gives CuPy out through
cuCIM and cupyx.

Examples
--------
>>> from preprocess import TilingConfig, read_mammogram, tile_film     # doctest: +SKIP
>>> film = tile_film(read_mammogram("film.dcm"), TilingConfig())       # doctest: +SKIP
>>> film.segmentation.side, len(film.tiles.x)                          # doctest: +SKIP
('L', 74)
"""

from __future__ import annotations

from typing import Any

_EXPORTS = {
    "TilingConfig": "preprocess.tiling",
    "plant_clusters": "preprocess.simulation",
    "read_header": "preprocess.reading",
    "read_mammogram": "preprocess.reading",
    "segment_breast": "preprocess.segmentation",
    "select_tiles": "preprocess.selection",
    "tile_film": "preprocess.tiling",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, so that ``mammostream --help`` stays fast."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'preprocess' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_EXPORTS[name]), name)
