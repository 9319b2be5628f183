"""Real tiles for the benchmarks to measure with."""

from __future__ import annotations

import numpy as np

TILE = 512


def real_tiles(count: int) -> np.ndarray:
    """Return (count, 512, 512) uint16 tiles of the 8 films, as a build cuts them."""
    from mammostream.common.real_films import film_cases
    from mammostream.preprocess.reading import read_mammogram
    from mammostream.preprocess.tiling import TilingConfig, tile_film

    config = TilingConfig(tile_size=TILE, stride=256)
    films = [path for case in film_cases() for path in case.values()]
    tiles = []
    for path in films:
        film = tile_film(read_mammogram(path).with_spacing(0.05, "assumed"), config)
        chosen = np.linspace(0, len(film.tiles.x) - 1, -(-count // len(films))).astype(int)
        tiles += [film.cut(int(i), TILE, 16) for i in chosen]
    return np.stack(tiles[:count])
