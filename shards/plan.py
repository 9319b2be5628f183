"""The build plan: which film goes into which shard, and the hash of everything that decides a shard's bytes."""

from __future__ import annotations

import importlib.metadata
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from common.errors import BadInput
from common.files import sha256_json
from common.options import option
from preprocess.tiling import TilingConfig, check_spacings, preprocessing_record
from shards.codecs import CODECS
from shards.manifest import SPLITS
from shards.reading import FORMAT_VERSION

TILES_PER_SHARD_LIMIT = 2**20
# Whose versions can change a tile's pixels or a tar's bytes.
_LIBRARIES = ("imagecodecs", "numpy", "pydicom", "scikit-image", "scipy", "tifffile")


@dataclass(frozen=True)
class BuildConfig(TilingConfig):
    """How films become shards: what decides the tiles, and how they are stored."""

    codec: str = option(
        "tif",
        "Tile codec: tif (zstd), png, jhc (HTJ2K) and raw are lossless, jpg is not and holds 8 bits.",
        choices=("tif", "png", "jhc", "raw", "jpg"),
    )
    bit_depth: str = option("auto", "Stored bits a pixel; auto = 16 if any film has more than 8.", choices=("auto", "8", "16"))
    images_per_shard: int = option(32, "Films dealt to each shard.")
    device: str = option("auto", "Where films are segmented and scored.", choices=("auto", "cpu", "cuda"))
    seed: int = option(0, "Seed of the dealing and of the order of tiles in a shard.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images_per_shard < 1:
            raise BadInput(f"--images-per-shard {self.images_per_shard} is not positive")


@dataclass(frozen=True)
class ShardPlan:
    """One shard to build: its ordinal over all splits, its name, its split and its films (rows of the manifest)."""

    ordinal: int
    name: str
    split: str
    rows: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class BuildPlan:
    """A whole build. Pure data: any process that holds it builds any shard, with the same bytes."""

    output_dir: Path
    config: BuildConfig
    bits: int
    preprocessing: dict[str, Any]
    recipe: dict[str, Any]  # what config_hash is the hash of
    config_hash: str
    shards: tuple[ShardPlan, ...]


def make_plan(manifest: pd.DataFrame, output_dir: Path, config: BuildConfig) -> BuildPlan:
    """Deal a manifest's films to shards.

    Parameters
    ----------
    manifest
        As :func:`shards.manifest.read_manifest` returns it.
    output_dir
        Where the shards will lie.
    config
        The options.

    Raises
    ------
    BadInput
        Films of too different pixel spacing without ``--pixel-spacing``.
    """
    spacings = manifest["pixel_spacing_mm"].to_numpy(dtype=float)
    check_spacings(spacings, config)
    bits = int(config.bit_depth) if config.bit_depth != "auto" else (16 if manifest["bits"].max() > 8 else 8)
    if bits > CODECS[config.codec].bits:
        raise BadInput(f"--codec {config.codec} holds {CODECS[config.codec].bits} bits; give --bit-depth 8 or another --codec")
    device = resolve_device(config.device)
    preprocessing = preprocessing_record(config, spacings, bits)
    # Where the images lie is not part of a shard: a moved data set continues its build.
    described = manifest.drop(columns="path").astype(object).where(manifest.drop(columns="path").notna(), None)
    recipe = {
        "format_version": FORMAT_VERSION,
        "options": asdict(config) | {"device": device, "bit_depth": str(bits)},
        "manifest": sha256_json(described.to_dict("records")),
        "versions": {name: importlib.metadata.version(name) for name in _LIBRARIES} | _gpu_versions(device),
    }
    shards: list[ShardPlan] = []
    for split in SPLITS:
        rows = manifest[manifest["split"] == split].to_dict("records")
        order = np.random.default_rng((config.seed, SPLITS.index(split))).permutation(len(rows))
        for start in range(0, len(rows), config.images_per_shard):
            chosen = tuple(rows[i] for i in order[start : start + config.images_per_shard])
            ordinal = len(shards)
            shards.append(ShardPlan(ordinal, f"{split}-{start // config.images_per_shard:06d}", split, chosen))
    return BuildPlan(output_dir, config, bits, preprocessing, recipe, sha256_json(recipe), tuple(shards))


def _gpu_versions(device: str) -> dict[str, str]:
    """Return the versions of what makes the pixels on a GPU; their distributions' names vary with CUDA's version."""
    if device == "cpu":
        return {}
    import cucim
    import cupy

    return {"cupy": cupy.__version__, "cucim": cucim.__version__}


def resolve_device(device: str) -> str:
    """Return ``cpu`` or ``cuda`` for ``auto``, and check that ``cuda`` is there.

    Raises
    ------
    BadInput
        ``cuda`` is asked for and CuPy sees no GPU.
    """
    if device == "cpu":
        return device
    try:
        import cupy

        count = cupy.cuda.runtime.getDeviceCount()
    except Exception:  # CuPy is missing, or raises its own error where there is no driver
        count = 0
    if device == "cuda" and not count:
        raise BadInput("--device cuda: CuPy sees no GPU; use --device cpu, or see 'mammostream doctor'")
    return "cuda" if count else "cpu"
