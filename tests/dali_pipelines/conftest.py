"""Shards of small tiles cut from real films."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fresh_process import Tiles, call

from mammostream.shards import archive, codecs
from mammostream.shards.reading import Shard

TILE = 48


@pytest.fixture(scope="session")
def film() -> np.ndarray:
    """The inside of the breast on a 16-bit film: uint16 (1400, 800)."""
    import pydicom

    from mammostream.common.real_films import film_cases

    path = film_cases()[0]["rcc"]
    return pydicom.dcmread(path).pixel_array[1700:3100, 2000:2800].astype(np.uint16)


@pytest.fixture(scope="session")
def make_shards(film: np.ndarray) -> Callable[..., Tiles]:
    """Return a function that makes shards with the given numbers of tiles; their ordinals have a gap, as in a split."""

    def make(
        directory: Path, counts: tuple[int, ...], codec: str = "tif", dtype: type = np.uint16, seed: int | None = None
    ) -> Tiles:
        rng = np.random.default_rng(len(counts) if seed is None else seed)
        directory.mkdir(exist_ok=True)
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
        return Tiles(shards, pixels, TILE)

    return make


@pytest.fixture(scope="session")
def tiles(make_shards: Callable[..., Tiles], tmp_path_factory: pytest.TempPathFactory) -> Tiles:
    """Three uneven shards with 23 tiles of 16 bits."""
    return make_shards(tmp_path_factory.mktemp("shards"), (5, 11, 7))


@dataclass(frozen=True)
class Ended:
    """How a process ended: exit code (negative: the signal), what its function returned, or its error's type and text."""

    code: int
    value: Any = None
    error: str = ""


@pytest.fixture(scope="session")
def in_process() -> Callable[..., Callable[[], Ended]]:
    """Return a function that starts a test module's function in a fresh process and returns a wait of at most a minute.

    The process is forked from one that has imported the loaders and done nothing else.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mammostream.dali_pipelines.loaders"])

    def start(function: Callable[..., Any], *args: Any) -> Callable[[], Ended]:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=call, args=(theirs, function, args))
        process.start()
        theirs.close()

        def wait() -> Ended:
            if not ours.poll(60):
                process.kill()
                pytest.fail(f"{function.__name__}{args} hangs")
            try:
                value, error = ours.recv()
            except EOFError:  # it died without an answer
                value, error = None, ""
            process.join(60)
            return Ended(process.exitcode, value, error)

        return wait

    return start
