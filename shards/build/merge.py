"""The tables of a whole shard directory: merges of its finished shards' own, in their order, and nothing else.

What can be known only here, which films are copies of others, is written into the shards' own tables first.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from mammostream.common.errors import BadInput
from mammostream.common.files import whole_file, write_json, write_parquet
from mammostream.shards.build.duplicates import leave_out_copies, mark_duplicates, refuse_shared_films
from mammostream.shards.build.plan import shard_name
from mammostream.shards.lock import TABLES, lock_shards
from mammostream.shards.manifest import SPLITS
from mammostream.shards.reading import FORMAT_VERSION, SHARDS_JSON
from mammostream.shards.tables import IMAGE_SCHEMA, TILE_SCHEMA, read_shard_images, read_shard_metadata, read_shard_table

MERGED = ("tiles.parquet", "images.parquet", SHARDS_JSON)


def finish(directory: Path, split: str | None = None, allow_leakage: bool = False) -> dict[str, Any]:
    """Merge the shards' tables into ``tiles.parquet``, ``images.parquet`` and ``shards.json``; return the latter.

    Parameters
    ----------
    directory
        The shard directory.
    split
        Demand only this split's shards; those of other splits are merged where they are finished. None demands all.
    allow_leakage
        Go on where a film is there under two patients.

    Raises
    ------
    BadInput
        A shard is not finished, or was built with other options than the first, or two patients share a film.
    """
    if not directory.is_dir():
        raise BadInput(f"{directory} does not exist; make one with 'mammostream shards build --output-dir {directory}'")
    with lock_shards(directory, TABLES, wait=True):
        return merge_tables(directory, SPLITS if split is None else (split,), allow_leakage)


def merge_tables(directory: Path, demanded: Container[str], allow_leakage: bool = True) -> dict[str, Any]:
    """Do what :func:`finish` does, for a caller that holds the lock already; `demanded` are the splits that must be whole."""
    for name in MERGED:  # what a killed merge left
        for path in directory.glob(f".{name}.*.tmp"):
            path.unlink(missing_ok=True)
    paths = finished_tables(directory, demanded)
    first = read_shard_metadata(paths[0])
    for path in paths:
        if read_shard_metadata(path)["config_hash"] != first["config_hash"]:
            raise BadInput(f"{path} and {paths[0]} were built with different options; build one of them again")
    films = _without_copies(paths, directory, allow_leakage)
    shards = []
    # A row group a shard: a million tiles pass through little memory, and each shard's rows can be read alone.
    with (
        whole_file(directory / "tiles.parquet") as temporary,
        pq.ParquetWriter(temporary, TILE_SCHEMA, compression="zstd") as writer,
    ):
        for path in paths:
            tiles, _, metadata = read_shard_table(path)
            if len(tiles):
                writer.write_table(tiles, row_group_size=len(tiles))
            shards.append(describe_shard(path.stem, metadata))
    write_parquet(directory / "images.parquet", films)
    meta = describe_directory(first) | {"shards": shards}
    write_json(directory / SHARDS_JSON, meta)
    return meta


def _without_copies(paths: list[Path], directory: Path, allow_leakage: bool) -> pa.Table:
    """Take the tiles of films that are copies out of their shards; return all films, marked."""
    images = [read_shard_images(path) for path in paths]
    films = mark_duplicates(pa.concat_tables(images))
    if not allow_leakage:
        refuse_shared_films(films.to_pandas(), directory)
    start = 0
    for path, as_built in zip(paths, images, strict=True):
        marked = films.slice(start, len(as_built))
        start += len(as_built)
        if not marked["flags"].equals(as_built["flags"]):
            leave_out_copies(path, marked)
    return films


def describe_directory(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return what ``shards.json`` says of all shards, from the metadata of one."""
    return {
        "format_version": FORMAT_VERSION,
        "codec": metadata["codec"],
        "bits": metadata["bits"],
        "preprocessing": metadata["preprocessing"] | {"shard_config_hash": metadata["config_hash"]},
        "recipe": metadata["recipe"],
    }


def describe_shard(name: str, metadata: dict[str, Any]) -> dict[str, Any]:
    """Return what ``shards.json`` says of a shard."""
    names = ("split", "tiles", "images", "tar_sha256", "idx_sha256", "tar_bytes")
    facts = {"name": name} | {key: metadata.get(key) for key in names}
    return facts | {"quarantined": len(metadata.get("quarantined", ()))}


def finished_tables(directory: Path, demanded: Container[str]) -> list[Path]:
    """Return the tables of a directory's finished shards, in the order of their ordinals.

    Raises
    ------
    BadInput
        A shard of the splits demanded is not finished.
    """
    some = next(iter(sorted(directory.glob("*-[0-9][0-9][0-9][0-9][0-9][0-9].parquet"))), None)
    if some is None:
        raise BadInput(f"{directory} has no finished shard; make some with 'mammostream shards build --output-dir {directory}'")
    paths, missing = [], []
    for ordinal, (name, its_split) in enumerate(_planned(read_shard_metadata(some)["counts"])):
        path = directory / f"{name}.parquet"
        if path.is_file():
            paths.append(path)
        elif its_split in demanded:
            missing.append(f"{ordinal} ({name})")
    if missing:
        few = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        raise BadInput(
            f"{len(missing)} shards of {directory} are not finished: {few}; run the same 'mammostream shards build' again"
        )
    return paths


def _planned(counts: list[tuple[str, int]]) -> Iterator[tuple[str, str]]:
    for split, count in counts:
        for number in range(count):
            yield shard_name(split, number), split


def read_images(directory: Path, names: list[str]) -> pd.DataFrame:
    """Return the image rows (columns: :data:`mammostream.shards.tables.IMAGE_SCHEMA`) of some finished shards."""
    tables = [read_shard_images(directory / f"{name}.parquet") for name in names]
    return mark_duplicates(pa.concat_tables([IMAGE_SCHEMA.empty_table(), *tables])).to_pandas()
