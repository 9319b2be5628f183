"""Reading a mammogram, its display mapping, breast segmentation, frequency energy, tile selection, pictures, simulation.

Pure functions on 2-D arrays: NumPy in gives NumPy out through scikit-image and scipy, CuPy in gives CuPy out through
cuCIM and cupyx.

Examples
--------
>>> from mammostream.preprocess import TilingConfig, read_mammogram, tile_film     # doctest: +SKIP
>>> film = tile_film(read_mammogram("film.dcm"), TilingConfig())       # doctest: +SKIP
>>> film.segmentation.side, len(film.tiles.x)                          # doctest: +SKIP
('L', 74)
"""

import lazy_loader

# Names are imported when first asked for, so that `mammostream --help` stays fast.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
