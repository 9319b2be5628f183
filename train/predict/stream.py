"""Parts of a prediction: tiles of shards and tile images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from mammostream.shards.identity import film_of_tile, tile_stem
from mammostream.shards.reading import Shard, ShardSet, check_same_pixels
from mammostream.train.predict.network import Answer, Predictor, loader_options
from mammostream.train.predict.readable_tiles import FileTiles, ShardTiles

_IMAGES_A_PART, _FILMS_A_PART = 4096, 32

_TILE_COLUMNS = ["tile", "key", "image_id", "patient_id", "split", "x", "y", "size", "payload_crc32"]

_IMAGE_COLUMNS = ["image_id", "patient_id", "split", "laterality", "view", "reason"]


class _OpenShard(NamedTuple):
    """The rows of a shard's tiles and images, and its tiles being read; None where it holds none."""

    tiles: pd.DataFrame
    images: pd.DataFrame
    reading: ShardTiles | None


class Predicted(NamedTuple):
    """Rows of the tile table, and what is known of their images (`image_id`, ``laterality``, …, `reason` where one failed)."""

    tiles: pd.DataFrame
    images: pd.DataFrame


@dataclass(frozen=True)
class Part:
    """A part of the work that is done as a whole: a shard, some tile images, some films.

    Attributes
    ----------
    name
        What its files are called.
    size
        Tiles or films.
    open
        Begins to read it, perhaps in another thread while the part before is predicted.
    predict
        Predicts what `open` gave.
    """

    name: str
    size: int
    open: Callable[[], Any]
    predict: Callable[[Any], Predicted]


def shard_parts(predictor: Predictor, shards: ShardSet, split: str | None) -> list[Part]:
    """Return a part a shard of a split (None: all), in the order of tile numbers; shards without tiles are parts as well.

    Raises
    ------
    BadInput
        The shards' tiles were made otherwise than those the model learnt from, or there are none of that split.
    """
    check_same_pixels(predictor.preprocessing, shards.preprocessing, str(shards.directory))
    found = {shard.name: shard for shard in shards.shards(split)}
    return [
        Part(
            entry["name"],
            entry["tiles"],
            partial(_open_shard, predictor, shards, entry["name"], found.get(entry["name"])),
            partial(_predict_shard, predictor, entry["name"]),
        )
        for entry in shards.meta["shards"]
        if split in (None, entry["split"])
    ]


def image_parts(predictor: Predictor, paths: Sequence[Path]) -> list[Part]:
    """Return parts of tile images; those of another size are resized to the model's tile size."""

    def part(start: int) -> Part:
        mine = paths[start : start + _IMAGES_A_PART]
        # Made where it is read: a loader of files reads nothing ahead of its first batch.
        return Part(part_name(start), len(mine), list, lambda _: _predict_images(predictor, mine))

    return [part(start) for start in range(0, len(paths), _IMAGES_A_PART)]


def part_name(start: int) -> str:
    return f"part-{start:08d}"


def _open_shard(predictor: Predictor, shards: ShardSet, name: str, shard: Shard | None) -> _OpenShard:
    tiles, images = read_rows(shards, name)
    if shard is None:
        return _OpenShard(tiles, images, None)
    if predictor.runtime.device.type == "cuda":
        torch.cuda.set_device(predictor.runtime.device)  # each thread has its own
    checksums = dict(zip(tiles["key"], tiles["payload_crc32"], strict=True))
    return _OpenShard(tiles, images, ShardTiles(shard, checksums, **loader_options(predictor)))


def _predict_shard(predictor: Predictor, name: str, opened: _OpenShard) -> Predicted:
    """Return one row per tile of a shard, in tile order, and one row per image; those that cannot be read have their reason."""
    tiles, images, ready = opened
    place = {key: row for row, key in enumerate(tiles["key"])}
    numbers_of = tiles["tile"].to_numpy()
    reasons = np.full(len(tiles), (ready.fault if ready else "") or "the index of its shard does not name it", object)
    rows: list[int] = []
    answers: list[Answer] = []
    for keys, batch, numbers in ready or ():
        mine = np.array([place.get(key, -1) for key in keys])
        right = (mine >= 0) & (numbers_of[mine] == numbers.numpy())
        answers.append(predictor.answer(batch).take(right))
        rows += mine[right].tolist()
        reasons[mine[~right & (mine >= 0)]] = f"its number in shard {name} is not that of the table"
    for key, reason in ready.faults.items() if ready else ():
        if key in place:
            reasons[place[key]] = reason
    reasons[rows] = ""
    return Predicted(predictor.frame(tiles.drop(columns=["tile", "payload_crc32"]), answers, reasons, rows), images)


def read_rows(shards: ShardSet, name: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the rows of a shard's tiles, in tile order, and of its images, without the rest of the tables.

    An image without tiles has the reason for it.
    """
    tiles, images = shards.rows_of(name, _TILE_COLUMNS, [*_IMAGE_COLUMNS, "flags", "kept"])
    empty = (images["reason"] == "") & (images["kept"] == 0)
    images.loc[empty, "reason"] = [_without_tiles(flags) for flags in images.loc[empty, "flags"]]
    return tiles, images[_IMAGE_COLUMNS]


def _without_tiles(flags: str) -> str:
    if "duplicate" in flags.split():
        return "has the pixels of another film"
    return "no tile passed the gates and rules" + (f" ({flags})" if flags else "")


def _predict_images(predictor: Predictor, paths: Sequence[Path]) -> Predicted:
    """Return one row per tile image, and the same as its image; bad ones have their reason."""
    names = [str(path) for path in paths]
    place = {name: row for row, name in enumerate(names)}
    tiles = FileTiles(paths, **loader_options(predictor))
    rows: list[int] = []
    answers: list[Answer] = []
    for keys, batch, _ in tiles:
        answers.append(predictor.answer(batch))
        rows += [place[key] for key in keys]
    reasons = [tiles.faults.get(name, "") for name in names]
    table = pd.DataFrame({"key": [tile_stem(name) for name in names], "image_id": names, "patient_id": "", "split": ""})
    frame = predictor.frame(table.assign(film=[film_of_tile(name) or name for name in names]), answers, reasons, rows)
    return Predicted(frame, frame[["image_id", "patient_id", "split", "seen", "reason"]])
