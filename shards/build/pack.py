"""Tile images that are cut already -> shards, and back: the guide's CSV and folder of tiles."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pandas as pd

from mammostream.common.buckets import BucketPath, naming
from mammostream.common.errors import BadInput, first_line
from mammostream.common.files import make_folder, read_csv, whole_file, write_json, write_text
from mammostream.common.progress import progress
from mammostream.preprocess.reading import Mammogram, read_mammogram
from mammostream.preprocess.tiling import TilingConfig, preprocessing_record, whole_record
from mammostream.shards.archive import check_index, read_index, sample_key, short_name
from mammostream.shards.build.build import ShardSummary, write_shard
from mammostream.shards.build.film_tiles import FilmTiles, image_row
from mammostream.shards.build.launch import ALONE, Launcher
from mammostream.shards.build.plan import BuildPlan, PackConfig, ShardPlan, assemble_plan, plain_records
from mammostream.shards.codecs import decode, pixel_crc32
from mammostream.shards.identity import (
    clean_ids,
    clean_patients,
    film_of_tile,
    key_of_path,
    refuse_split_lookalikes,
)
from mammostream.shards.manifest import SPLITS
from mammostream.shards.reading import Shard, ShardSet
from mammostream.shards.tables import read_shard_table

# Next to unpacked tiles: how they were made, which packing them again needs to know.
PREPROCESSING_JSON = "preprocessing.json"
TILES_CSV = "tiles.csv"
_PLACE = re.compile(r".+_y(\d+)_x(\d+)")


def read_tile_csvs(csvs: Sequence[Path], splits: Sequence[str], tiles_dir: Path) -> pd.DataFrame:
    """Read which tiles to pack.

    Parameters
    ----------
    csvs
        CSVs with a column ``tile_path`` and any of ``split``, ``image_id``, ``patient_id``.
    splits
        The split of each CSV; empty where their columns tell.
    tiles_dir
        What ``tile_path`` is relative to.

    Returns
    -------
    pandas.DataFrame
        ``tile_path, path, key, image_id, patient_id, split, y, x``, one row per tile. The key is the file's name, or the whole
        ``tile_path`` where names repeat, escaped where it needs be; the film is the CSV's, or the one that the name tells (see
        :func:`mammostream.shards.identity.film_of_tile`), or unknown: then a tile stands for itself. The position is that of
        names like ``<film>_y<y>_x<x>``.

    Raises
    ------
    BadInput
        A CSV or the folder is missing, a tile has no split or is named twice, or a film or patient is in two splits.
    """
    if not tiles_dir.is_dir():
        raise BadInput(f"tiles folder {tiles_dir} does not exist; check --tiles-dir")
    if splits and len(splits) != len(csvs):
        raise BadInput(f"--split has {len(splits)} values for {len(csvs)} CSVs; give one for each, in their order")
    if len({path.name for path in csvs}) < len(csvs):
        raise BadInput("two CSVs have the same name; each is written again into the shard directory, so rename one")
    frames = []
    for path, split in zip(csvs, splits or [""] * len(csvs), strict=True):
        frame = read_csv(path, "tiles CSV", ["tile_path"] if split else ["tile_path", "split"])
        if frame["tile_path"].isna().any():
            line = int(frame["tile_path"].isna().to_numpy().argmax()) + 2
            raise BadInput(f"tiles CSV {path} line {line}: tile_path is empty; name the tile or drop the line")
        frame["split"] = split or frame["split"]
        if not frame["split"].isin(SPLITS).all():
            raise BadInput(f"tiles CSV {path}: a split is none of {', '.join(SPLITS)}; correct it, or give --split")
        frames.append(frame.assign(tile_path=frame["tile_path"].astype(str)))
    tiles = pd.concat(frames, ignore_index=True)
    twice = tiles["tile_path"].duplicated()
    if twice.any():
        raise BadInput(f"tile '{tiles['tile_path'][twice].iloc[0]}' occurs twice in {', '.join(map(str, csvs))}")
    paths = tiles["tile_path"]
    repeat = len({key_of_path(Path(p).name) for p in paths}) < len(paths)  # then names say little: their folders count too
    keys = [key_of_path(p if repeat else Path(p).name) for p in paths]
    places = [_PLACE.fullmatch(key) for key in keys]
    named = [film_of_tile(p) for p in paths]
    if repeat:
        named = [film and (Path(p).parent / film).as_posix() for film, p in zip(named, paths, strict=True)]
    films = clean_ids(tiles["image_id"]) if "image_id" in tiles else pd.Series("", tiles.index)
    films = films.where(films != "", [film or key for film, key in zip(named, keys, strict=True)])
    columns = {
        "tile_path": tiles["tile_path"],
        "path": [str((tiles_dir / p).absolute()) for p in tiles["tile_path"]],
        "key": keys,
        "image_id": films,
        "patient_id": clean_patients(tiles["patient_id"]) if "patient_id" in tiles else "",
        "split": tiles["split"],
        "y": [int(match[1]) if match else None for match in places],
        "x": [int(match[2]) if match else None for match in places],
    }
    chosen = pd.DataFrame(columns).astype({"y": "Int64", "x": "Int64"})
    for column in ("key", "patient_id", "image_id"):
        counts = chosen[chosen[column] != ""].groupby(column)["split"].nunique()
        if (counts > 1).any():
            raise BadInput(f"{column} '{counts[counts > 1].index[0]}' is in two splits; put all its tiles into one")
    refuse_split_lookalikes(chosen["patient_id"], chosen["split"])
    if chosen["key"].duplicated().any():
        raise BadInput(f"two tiles have the name '{chosen['key'][chosen['key'].duplicated()].iloc[0]}'; rename one")
    return chosen


def make_pack_plan(tiles: pd.DataFrame, tiles_dir: Path, output_dir: Path, config: PackConfig) -> BuildPlan:
    """Deal tiles to shards, film by film.

    The size and depth are those of the first tile that can be read; tiles of another size are not packed.

    Parameters
    ----------
    tiles
        As :func:`read_tile_csvs` returns them.
    tiles_dir
        Their folder; ``preprocessing.json`` there tells how they were made.
    output_dir, config
        Where and how to store them.

    Raises
    ------
    BadInput
        No tile can be read, or the first is not square.
    """
    first = _first_readable(tiles["path"])
    height, width = first.pixels.shape
    if height != width:
        raise BadInput(f"tiles are square, but the first in {tiles_dir} has {height}×{width} pixels; cut them again")
    bits = 8 * first.pixels.itemsize
    record = _preprocessing(tiles_dir, height, bits)
    rng = np.random.default_rng(config.seed)
    dealt = []
    for split in [s for s in SPLITS if (tiles["split"] == s).any()]:
        its_tiles = tiles[tiles["split"] == split]
        films = [rows.to_dict("records") for _, rows in its_tiles.groupby("image_id", sort=True)]
        shard: list[dict[str, Any]] = []
        count = 0
        for index in rng.permutation(len(films)):
            if shard and count + len(films[index]) > config.tiles_per_shard:
                dealt.append((split, shard))
                shard, count = [], 0
            shard.append(_film_row(films[index]))
            count += len(films[index])
        dealt.append((split, shard))
    source = [record, plain_records(tiles.drop(columns=["tile_path", "path"]))]
    return assemble_plan(output_dir, config, bits, record, source, dealt)


def _first_readable(paths: Sequence[str]) -> Mammogram:
    error = None
    for path in paths:
        try:
            return read_mammogram(path)
        except BadInput as this:
            error = error or this
    raise BadInput(f"none of the {len(paths)} tiles can be read; the first: {error}")


def _preprocessing(tiles_dir: Path, tile_size: int, bits: int) -> dict[str, Any]:
    """Return how tiles were made, as their folder tells; the mapping is None where it does not: nobody knows."""
    path = tiles_dir / PREPROCESSING_JSON
    unknown = preprocessing_record(TilingConfig(tile_size=tile_size), np.array([np.nan]), bits) | {"mapping": None}
    if not path.is_file():
        return unknown
    try:
        record = whole_record(json.loads(path.read_text(encoding="utf-8")))
        if set(record) != set(unknown) or (record["tile_size"], record["bits"]) != (tile_size, bits):
            raise ValueError("it is of other tiles")
    except (ValueError, TypeError) as error:
        raise BadInput(f"{path} does not describe these tiles ({error}); delete it, or unpack the tiles again") from error
    return record


def _film_row(tiles: list[dict[str, Any]]) -> dict[str, Any]:
    film = {name: tiles[0][name] for name in ("image_id", "patient_id", "split")}
    return film | {"laterality": "", "view": "", "spacing_source": "", "pixel_spacing_mm": None, "tiles": tiles}


def pack_shard(plan: BuildPlan, ordinal: int, *, threads: int = 1, check_every: int = 1) -> ShardSummary:
    """Pack one shard of tile images; as :func:`mammostream.shards.build.build.build_shard` builds one of films."""
    return write_shard(plan, ordinal, _read_tiles, _take_tiles, threads=threads, check_every=check_every)


def _read_tiles(film: dict[str, Any]) -> list[Mammogram | BadInput]:
    found: list[Mammogram | BadInput] = []
    for tile in film["tiles"]:
        try:
            found.append(read_mammogram(tile["path"]))
        except BadInput as error:
            found.append(error)
    return found


def _take_tiles(plan: BuildPlan, shard: ShardPlan, film: dict[str, Any], images: list[Mammogram | BadInput]) -> FilmTiles:
    size, dtype = plan.preprocessing["tile_size"], np.dtype(f"u{plan.bits // 8}")
    taken, reasons = [], []
    for tile, image in zip(film["tiles"], images, strict=True):
        if isinstance(image, BadInput):
            reasons.append(str(image).replace(tile["path"], tile["key"]))
            continue
        pixels = image.pixels
        if pixels.shape != (size, size) or pixels.dtype != dtype:
            shape = "×".join(map(str, pixels.shape))
            reasons.append(
                f"tile {tile['key']} has {shape} pixels of {8 * pixels.itemsize} bits, not {size}×{size} of {plan.bits}"
            )
            continue
        record = {name: tile[name] for name in ("key", "image_id", "patient_id")}
        place = {name: None if pd.isna(tile[name]) else int(tile[name]) for name in ("x", "y")}
        taken.append((record | place | {"shard": shard.name, "split": shard.split, "size": size, "rule": ""}, pixels))
    facts: dict[str, Any] = {"bits": plan.bits, "kept": len(taken), "candidates": len(film["tiles"])}
    if reasons:
        facts["reason"] = reasons[0] if len(reasons) == 1 else f"{reasons[0]} (and {len(reasons) - 1} more tiles)"
    return image_row(film, shard) | facts, taken


def write_packed_csvs(csvs: Sequence[Path], tiles: pd.DataFrame, packed: pd.DataFrame, output_dir: Path) -> list[Path]:
    """Write each CSV again as ``<output_dir>/<name>``: a tile's key for its path, no rows of tiles that were not packed."""
    keys = dict(zip(tiles["tile_path"], tiles["key"], strict=True))
    written = []
    for path in csvs:
        # As text: every other cell stays as it was written.
        frame = pd.read_csv(path, encoding="utf-8-sig", dtype=str, keep_default_na=False, index_col=False)
        frame["tile_path"] = frame["tile_path"].map(keys)
        written.append(output_dir / path.name)
        write_text(written[-1], frame[frame["tile_path"].isin(packed["key"])].to_csv(index=False))
    return written


def unpack_shards(
    shards: ShardSet, output_dir: Path, split: str | None = None, launcher: Launcher = ALONE, bits: int | None = None
) -> int:
    """Write the tiles of a shard directory as ``<key>.png``, a CSV that names them, and how they were made.

    Parameters
    ----------
    shards
        The directory.
    output_dir
        Where the files go.
    split
        This split's tiles only.
    launcher
        Who unpacks; a shard at a time.
    bits
        8 writes 16-bit tiles with 8 bits, for programs that cannot read more: 65535 becomes 255, with rounding. None keeps the
        stored depth.

    Returns
    -------
    int
        Number of tiles.

    Raises
    ------
    BadInput
        A tile is damaged, the folder cannot be written, or 8-bit tiles are asked for with 16 bits.
    """
    stored = shards.meta["bits"]
    bits = stored if bits is None else bits
    if bits > stored:
        raise BadInput(f"{shards.directory} holds tiles of {stored} bits, which have no more to give; leave out --bits {bits}")
    unpack = partial(_unpack_shard, folder=shards.tables, codec=shards.codec, output_dir=output_dir, bits=bits)
    tiles = shards.tiles(split)
    its_shards = shards.shards(split)
    make_folder(output_dir)
    with progress(None, "unpacking", "tile", total=len(tiles)) as bar:
        for count in launcher.run(unpack, its_shards):
            bar.update(count)
    table = tiles[["key", "image_id", "patient_id", "split", "x", "y", "size"]].rename(columns={"key": "tile_path"})
    table["tile_path"] = table["tile_path"].map(short_name) + ".png"
    record = {k: v for k, v in shards.preprocessing.items() if k != "shard_config_hash"}
    write_json(output_dir / PREPROCESSING_JSON, record | {"bits": bits})
    write_text(output_dir / TILES_CSV, table.to_csv(index=False))
    return len(tiles)


def _unpack_shard(shard: Shard, folder: Path, codec: str, output_dir: Path, bits: int) -> int:
    index = read_index(shard.index)
    check_index(shard.tar, index)
    table = folder / f"{shard.name}.parquet"
    with naming(folder, shard.tar.parent):
        if isinstance(shard.tar, BucketPath):
            (shard.tar.parent / table.name).fetch(table)
        tiles, _, _ = read_shard_table(table)
    checksums = dict(zip(tiles["key"].to_pylist(), tiles["crc32"].to_pylist(), strict=True))
    # Of a bucket the whole tar is fetched at once: a request a tile takes far longer.
    at_hand = shard.tar.at_hand(folder) if isinstance(shard.tar, BucketPath) else nullcontext(shard.tar)
    with at_hand as tar, tar.open("rb") as file:
        for sample in index:
            (member,) = (m for m in sample if m.extension == codec)
            file.seek(member.offset)
            try:
                pixels = decode(file.read(member.size), codec)
                fault = "" if pixel_crc32(pixels) == checksums.get(sample_key(sample)) else "its pixels changed"
            except Exception as error:  # whatever the decoder raises, the tile is damaged
                fault = first_line(error)
            if fault:
                mend = f"see 'mammostream shards verify {shard.tar.parent} --quarantine'"
                raise BadInput(f"tile {sample_key(sample)} of {shard.tar} is damaged ({fault}); {mend}")
            if bits < 8 * pixels.itemsize:
                pixels = np.rint(pixels / 257).astype(np.uint8)
            with whole_file(output_dir / f"{short_name(sample_key(sample))}.png", sync=False) as temporary:
                temporary.write_bytes(imagecodecs.png_encode(pixels, level=1))
    return len(index)
