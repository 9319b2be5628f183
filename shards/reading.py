"""Opening a finished shard directory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mammostream.common.buckets import BucketPath, as_bucket, cache_folder
from mammostream.common.errors import BadInput, first_line, nearest
from mammostream.common.files import sha256_file
from mammostream.preprocess.tiling import SPACING_TOLERANCE
from mammostream.shards.codecs import CODECS
from mammostream.shards.tables import IMAGE_SCHEMA, TILE_SCHEMA, read_merged

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

FORMAT_VERSION = 2
SHARDS_JSON = "shards.json"
# Options that decide what a tile's pixels mean: a model made for one set does not fit another.
_PIXEL_CONTRACT = ("tile_size", "pixel_spacing_mm", "mapping")


@dataclass(frozen=True)
class Shard:
    """One tar with at least one tile, its index, its split and its number of tiles. A tar may lie in a bucket."""

    tar: Path | BucketPath
    index: Path
    split: str
    tiles: int

    @property
    def name(self) -> str:
        """What its files are called, without an ending."""
        return self.tar.name.removesuffix(".tar")


@dataclass(frozen=True)
class ShardSet:
    """A finished shard directory: its ``shards.json`` and, when asked for, its tables.

    Attributes
    ----------
    directory
        Where the tars lie, on a disk or in a bucket.
    meta
        ``shards.json``.
    tables
        Where indexes and tables lie: the directory itself, or of a bucket the folder that they are fetched into.
    sha256
        Of ``shards.json``, which holds the hash of every tar and index.
    """

    directory: Path | BucketPath
    meta: dict[str, Any]
    tables: Path
    sha256: str

    @property
    def codec(self) -> str:
        """Extension of the tile members, without a dot."""
        return self.meta["codec"]

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How the tiles were made: goes into every checkpoint, and inference applies it to raw films."""
        return self.meta["preprocessing"]

    @property
    def splits(self) -> list[str]:
        """The splits that hold tiles, in the order of their shards."""
        return list(dict.fromkeys(s["split"] for s in self.meta["shards"] if s["tiles"]))

    def shards(self, split: str | None = None) -> list[Shard]:
        """Return the shards of a split (all splits: None) that hold tiles, in order.

        Raises
        ------
        BadInput
            No shard of that split holds a tile.
        """
        found = [
            Shard(
                tar=self.directory / f"{s['name']}.tar",
                index=self.tables / f"{s['name']}.idx",
                split=s["split"],
                tiles=s["tiles"],
            )
            for s in self.meta["shards"]
            if s["tiles"] and split in (None, s["split"])
        ]
        if not found:
            if not self.splits:
                raise BadInput(f"{self.directory} has no tiles at all; images.parquet there says why, film by film")
            have = ", ".join(self.splits)
            raise BadInput(
                f"{self.directory} has no tiles of split '{split}'{nearest(str(split), self.splits)}; it has: {have}"
            )
        self._fetch_indexes([shard.index for shard in found])
        return found

    @property
    def folder(self) -> Path:
        """The directory, which must lie on a disk.

        Raises
        ------
        BadInput
            It lies in a bucket.
        """
        if isinstance(self.directory, BucketPath):
            raise BadInput(
                f"{self.directory} lies in a bucket, which is only read; copy it to a disk, give that directory, and upload it "
                "again"
            )
        return self.directory

    def _fetch_indexes(self, paths: list[Path]) -> None:
        """Have the indexes of a bucket's shards here; one that is not in the bucket stays missing, as on a disk."""
        if not isinstance(self.directory, BucketPath):
            return
        hashes = {f"{s['name']}.idx": s["idx_sha256"] for s in self.meta["shards"]}
        wanted = [path for path in paths if not path.is_file() or sha256_file(path) != hashes[path.name]]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda path: (self.directory / path.name).fetch(path), wanted))

    @cached_property
    def _tiles(self) -> pd.DataFrame:
        return self._read("tiles", TILE_SCHEMA).to_pandas()

    def _read(self, name: str, schema: pa.Schema, columns: Sequence[str] = (), shard: str | None = None) -> pa.Table:
        path = self.tables / f"{name}.parquet"
        mend = f"make it again with 'mammostream shards finish {self.directory}'"
        if isinstance(self.directory, BucketPath):
            mend = f"delete it to have it fetched from {self.directory} again"
            if not path.is_file():
                (self.directory / path.name).fetch(path)
        return read_merged(path, schema, mend, columns, shard)

    def rows_of(self, shard: str, tiles: Sequence[str], images: Sequence[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Read columns `tiles` of a shard's tiles, in tile order, and columns `images` of its images, and nothing else."""
        its_tiles, its_images = (
            self._read(name, schema, columns, shard).to_pandas()
            for name, schema, columns in (("tiles", TILE_SCHEMA, tiles), ("images", IMAGE_SCHEMA, images))
        )
        return its_tiles.sort_values("tile", ignore_index=True), its_images

    def tiles(self, split: str | None = None) -> pd.DataFrame:
        """Return the tile table (columns: :data:`mammostream.shards.tables.TILE_SCHEMA`) of a split, or of all."""
        return self._tiles if split is None else self._tiles[self._tiles["split"] == split].reset_index(drop=True)

    def images(self) -> pd.DataFrame:
        """Return the image table (columns: :data:`mammostream.shards.tables.IMAGE_SCHEMA`)."""
        return self._read("images", IMAGE_SCHEMA).to_pandas()


def _check_meta(meta: dict[str, Any]) -> None:
    """Raise KeyError, TypeError or ValueError where ``shards.json`` lacks an entry or has one of another type."""
    if not isinstance(meta["shards"], list):
        raise TypeError(f"'shards' is {meta['shards']!r:.40}")
    for entry in meta["shards"]:
        for name in ("name", "split"):
            if not isinstance(entry[name], str):
                raise TypeError(f"'{name}' of a shard is {entry[name]!r:.40}")
        for name in ("tiles", "images"):
            if type(entry[name]) is not int or entry[name] < 0:
                raise TypeError(f"'{name}' of a shard is {entry[name]!r:.40}")
        if entry["tiles"] and (type(entry["tar_bytes"]) is not int or not isinstance(entry["idx_sha256"], str)):
            raise TypeError(f"'tar_bytes' or 'idx_sha256' of shard {entry['name']} is damaged")
    if meta["codec"] not in CODECS:
        raise ValueError(f"there is no codec {meta['codec']!r:.40}")
    record = meta["preprocessing"]
    for name in (*_PIXEL_CONTRACT, "native_spacing_mm", "shard_config_hash"):
        record[name]
    if type(record["tile_size"]) is not int or record["tile_size"] < 1:
        raise TypeError(f"'tile_size' is {record['tile_size']!r:.40}")
    spacings = [record["pixel_spacing_mm"], *(record["native_spacing_mm"] or ())]
    if not all(spacing is None or 0 < float(spacing) < 100 for spacing in spacings):
        raise ValueError(f"pixel spacings are {spacings!r:.80}")


def check_same_pixels(learnt: dict[str, Any], given: dict[str, Any], what: str, any_tile_size: bool = False) -> None:
    """Check that tiles mean what a model learnt from: their size, mapping and pixel spacing.

    Parameters
    ----------
    learnt, given
        The ``preprocessing`` records of the model's shards and of those to use it on.
    what
        What `given` belongs to, for the error.
    any_tile_size
        Leave the tiles' size aside: a network that averages over its features learns on from tiles of any size. How large
        a pixel is and how bright must stay.

    Raises
    ------
    BadInput
        They differ; native spacings may do so by up to 1.25x.
    """
    if "mapping" not in learnt:  # another program's checkpoint, which does not say how its tiles were made
        return
    mend = "build shards with the options that the model's were built with"
    # Of tiles that came as image files nobody knows more than their size.
    known = learnt["mapping"] and given["mapping"]
    for name in (_PIXEL_CONTRACT if known else ("tile_size",))[any_tile_size:]:
        if given[name] != learnt[name]:
            raise BadInput(f"the model learnt from tiles with {name} {learnt[name]}, {what} has {given[name]}; {mend}")
    native = [record["native_spacing_mm"] for record in (learnt, given) if record["native_spacing_mm"]]
    sizes = [size for pair in native for size in pair]
    if learnt["pixel_spacing_mm"] is None and len(native) == 2 and max(sizes) > SPACING_TOLERANCE * min(sizes):
        raise BadInput(f"the model learnt from pixels of {native[0]} mm, {what} has pixels of {native[1]} mm; {mend}")


def view_size_of(learnt: Mapping[str, Any], tile_size: int) -> int | None:
    """Return the size that a network's tiles are resized to before it sees them, or None if it sees them in their own size.

    Parameters
    ----------
    learnt
        The network's ``preprocessing`` record: it may have a ``view_size`` for its own ``tile_size``.
    tile_size
        Edge of the tiles to resize, in pixels; the scale stays that of the network.
    """
    size = learnt.get("view_size")
    return round(size * tile_size / learnt["tile_size"]) if size else None


def open_shards(directory: str | Path) -> ShardSet:
    """Open a finished shard directory, on a disk or in a bucket (``s3://bucket/prefix``).

    Of a bucket, ``shards.json`` is read each time; indexes and tables are fetched once into
    :func:`mammostream.common.buckets.cache_folder`; tars are read where they are. The server is $AWS_ENDPOINT_URL, else AWS;
    keys come from the environment.

    Raises
    ------
    BadInput
        The directory is missing, holds no ``shards.json``, or one of a newer format; a bucket does not answer.
    """
    place = as_bucket(directory) or Path(directory)
    path = place / SHARDS_JSON
    if isinstance(place, BucketPath):
        place.reach()
    if not path.is_file():
        there = isinstance(place, Path) and place.is_dir()
        state = "has no shards.json: it is not a finished shard directory" if there else "does not exist"
        if isinstance(place, BucketPath):
            raise BadInput(f"{path} does not exist; give the place that 'mammostream shards build' filled: s3://bucket/prefix")
        raise BadInput(f"{directory} {state}; make one with 'mammostream shards build --output-dir {directory}'")
    try:
        data = path.read_bytes()
        meta = json.loads(data)
        version = meta["format_version"]
        if version != FORMAT_VERSION:
            raise BadInput(f"{path} has format {version}, this version reads {FORMAT_VERSION}; build the shards again")
        _check_meta(meta)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        mend = f"make it again with 'mammostream shards finish {directory}'"
        raise BadInput(f"{path} is damaged ({what:.200}); {mend}") from error
    sha256 = hashlib.sha256(data).hexdigest()
    if isinstance(place, BucketPath):
        # Of its own name for each content: what was fetched of an older one is never treated as the new one's.
        tables = cache_folder() / "shards" / hashlib.sha256(f"{directory} {sha256}".encode()).hexdigest()[:16]
    else:
        tables = place
    return ShardSet(place, meta, tables, sha256)
