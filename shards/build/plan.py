"""The build plan: which film goes into which shard, and the hash of everything that decides a shard's bytes."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mammostream.common.errors import BadInput
from mammostream.common.files import sha256_json
from mammostream.common.options import option
from mammostream.preprocess.backend import gpu_library_versions
from mammostream.preprocess.tiling import TilingConfig, check_spacings, preprocessing_record
from mammostream.shards.codecs import CODECS
from mammostream.shards.manifest import SPLITS
from mammostream.shards.reading import FORMAT_VERSION

TILES_PER_SHARD_LIMIT = 2**20
# Whose versions can change a tile's pixels or a tar's bytes.
_LIBRARIES = ("imagecodecs", "numpy", "pydicom", "scikit-image", "scipy", "tifffile")
# The columns of the manifest that a shard's files depend on.
_DESCRIBING = ("image_id", "patient_id", "laterality", "view", "split", "pixel_spacing_mm", "spacing_source", "bits")


@dataclass(frozen=True)
class StoreConfig:
    """How tiles are stored."""

    codec: str = option(
        "tif",
        "Tile codec: tif (zstd), png, jhc (HTJ2K) and raw are lossless, jpg is not and holds 8 bits.",
        choices=("tif", "png", "jhc", "raw", "jpg"),
    )
    seed: int = option(0, "Seed of the dealing and of the order of tiles in a shard.")


@dataclass(frozen=True)
class BuildConfig(StoreConfig, TilingConfig):
    """How films become shards: what decides the tiles, and how they are stored."""

    bit_depth: str = option(
        "auto", "Stored bits per pixel; auto = 16 if any film has more than 8.", choices=("auto", "8", "16")
    )
    images_per_shard: int = option(32, "Films dealt to each shard.")
    device: str = option("auto", "Where films are segmented and scored.", choices=("auto", "cpu", "cuda"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images_per_shard < 1:
            raise BadInput(f"--images-per-shard {self.images_per_shard} is not positive")


@dataclass(frozen=True)
class PackConfig(StoreConfig):
    """How tile images are packed."""

    tiles_per_shard: int = option(2048, "Tiles of a shard; those of one film stay together.")

    def __post_init__(self) -> None:
        if self.tiles_per_shard < 1:
            raise BadInput(f"--tiles-per-shard {self.tiles_per_shard} is not positive")


@dataclass(frozen=True)
class ShardPlan:
    """One shard to build: its ordinal over all splits, its name, its split and its films."""

    ordinal: int
    name: str
    split: str
    rows: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class BuildPlan:
    """A whole build, or a part of it. Pure data: any process that holds it builds its shards, with the same bytes.

    Attributes
    ----------
    output_dir
        Where the shards lie.
    config
        The options.
    bits, preprocessing
        Depth of the stored pixels, and how they are made.
    recipe, config_hash
        Everything that decides the shards' bytes, and its hash.
    counts
        Number of shards of each split, in the order of their ordinals.
    shards
        The shards to build.
    """

    output_dir: Path
    config: StoreConfig
    bits: int
    preprocessing: dict[str, Any]
    recipe: dict[str, Any]
    config_hash: str
    counts: dict[str, int]
    shards: tuple[ShardPlan, ...]

    @property
    def film_config(self) -> BuildConfig:
        """The options of a build of films, as against one of tiles that exist already."""
        assert isinstance(self.config, BuildConfig)
        return self.config

    def select(self, split: str | None = None, ordinals: range | None = None) -> BuildPlan:
        """Return the part of the plan that builds only one split's shards, or only those with some ordinals."""
        chosen = [s for s in self.shards if split in (None, s.split) and (ordinals is None or s.ordinal in ordinals)]
        return replace(self, shards=tuple(chosen))


def make_plan(manifest: pd.DataFrame, output_dir: Path, config: BuildConfig) -> BuildPlan:
    """Deal a manifest's films to shards.

    Parameters
    ----------
    manifest
        As :func:`mammostream.shards.manifest.read_manifest` returns it.
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
    preprocessing = preprocessing_record(config, spacings, bits)
    # Where the images lie and what their labels are is not part of a shard: a moved or relabelled data set continues.
    described = plain_records(manifest[list(_DESCRIBING)])
    dealt = []
    for split in SPLITS:
        rows = manifest.loc[manifest["split"] == split, [*_DESCRIBING, "path"]].to_dict("records")
        order = np.random.default_rng((config.seed, SPLITS.index(split))).permutation(len(rows))
        for start in range(0, len(rows), config.images_per_shard):
            dealt.append((split, [rows[i] for i in order[start : start + config.images_per_shard]]))
    device = resolve_device(config.device)
    return assemble_plan(output_dir, config, bits, preprocessing, described, dealt, device)


def plain_records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return a table's rows as plain JSON-able values, None where one is missing."""
    return frame.astype(object).where(frame.notna(), None).to_dict("records")


def assemble_plan(
    output_dir: Path,
    config: StoreConfig,
    bits: int,
    preprocessing: dict[str, Any],
    source: Any,
    dealt: Iterable[tuple[str, list[dict[str, Any]]]],
    device: str = "cpu",
) -> BuildPlan:
    """Make a plan of films that are dealt already.

    Parameters
    ----------
    output_dir, config, bits, preprocessing
        As in :class:`BuildPlan`.
    source
        What the films are, JSON-able: part of what decides the shards' bytes.
    dealt
        The split and the films of each shard, split by split.
    device
        ``cpu`` or ``cuda``.

    Raises
    ------
    BadInput
        The codec does not hold as many bits.
    """
    if bits > CODECS[config.codec].bits:
        raise BadInput(
            f"--codec {config.codec} holds {CODECS[config.codec].bits} bits, the tiles have {bits}; choose another --codec, "
            "or, where films are cut, --bit-depth 8"
        )
    recipe = {
        "format_version": FORMAT_VERSION,
        "options": asdict(config) | {"device": device, "bit_depth": str(bits)},
        "manifest": sha256_json(source),
        "versions": library_versions(device),
    }
    counts: dict[str, int] = {}
    shards = []
    for ordinal, (split, rows) in enumerate(dealt):
        shards.append(ShardPlan(ordinal, shard_name(split, counts.setdefault(split, 0)), split, tuple(rows)))
        counts[split] += 1
    return BuildPlan(output_dir.absolute(), config, bits, preprocessing, recipe, sha256_json(recipe), counts, tuple(shards))


def shard_name(split: str, number: int) -> str:
    """Return the name of a split's shard, by its number within the split."""
    return f"{split}-{number:06d}"


@cache
def library_versions(device: str) -> dict[str, str]:
    """Return the versions, in this process, of the libraries that decide a shard's bytes on ``cpu`` or ``cuda``."""
    found = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    return found if device == "cpu" else found | gpu_library_versions()


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
    except ModuleNotFoundError:
        if device == "cuda":
            raise
        count = 0
    except Exception:  # CuPy raises its own error where there is no driver
        count = 0
    if device == "cuda" and not count:
        raise BadInput("--device cuda: CuPy sees no GPU; use --device cpu, or see 'mammostream doctor'")
    return "cuda" if count else "cpu"
