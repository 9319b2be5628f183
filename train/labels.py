"""Labels by tile: the guide's CSV, joined to the tiles of shards or of a folder by number."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from common.errors import BadInput, nearest
from common.files import read_csv
from shards.reading import Shard, ShardSet

_POSITION = re.compile(r"_y\d+_x\d+$")
TileSource = Sequence[Shard] | Sequence[Path]


@dataclass(frozen=True)
class LabelledTiles:
    """Tiles with labels, and where to read them.

    Attributes
    ----------
    source
        The shards, or the tile images' paths, as ``LabelledLoader`` takes them.
    numbers
        (N,) int64 tile numbers, ascending: of the shards, or positions in the list of paths.
    labels
        (N, C) float32 in the order of `numbers`: 1, 0, or NaN where the label is missing.
    keys, groups, patients
        (N,) each tile's key, its film (for intervals over films), and its patient (empty for a folder of tiles).
    """

    source: TileSource
    numbers: np.ndarray
    labels: np.ndarray
    keys: np.ndarray
    groups: np.ndarray
    patients: np.ndarray

    def rows(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return the row of each tile number, on the numbers' device."""
        return torch.searchsorted(torch.as_tensor(self.numbers, device=numbers.device), numbers)


def read_labels(path: Path, class_names: Sequence[str], max_samples: int | None = None) -> pd.DataFrame:
    """Read a CSV of ``tile_path`` and one column a class.

    Parameters
    ----------
    path
        The CSV.
    class_names
        The columns to use.
    max_samples
        Keep only the first so many rows.

    Returns
    -------
    pandas.DataFrame
        ``tile_path`` and the classes as float32: 1, 0, NaN. Rows without any label are dropped.

    Raises
    ------
    BadInput
        No such file or column, a cell that is not 0, 1 or empty, a tile or a class named twice, a row without a tile, or no
        labelled row.
    """
    frame = read_csv(path, "labels CSV", ["tile_path"])
    nameless = frame[frame["tile_path"].isna()]
    if len(nameless):
        raise BadInput(f"labels CSV {path} line {nameless.index[0] + 2}: tile_path is empty; name the tile or drop the line")
    frame["tile_path"] = frame["tile_path"].astype(str)
    known = [c for c in frame.columns if c != "tile_path"]
    for name in class_names:
        if list(class_names).count(name) > 1:
            raise BadInput(f"the class '{name}' is named twice; name each class once")
    for name in class_names:
        if name not in known:
            raise BadInput(
                f"labels CSV {path} has no class '{name}'{nearest(name, known)}; its classes are: {', '.join(known)}"
            )
        # One word in a column makes its numbers text too.
        wrong = frame[~(pd.to_numeric(frame[name], errors="coerce").isin([0, 1]) | frame[name].isna())]
        if len(wrong):
            line, cell = wrong.index[0] + 2, wrong[name].iloc[0]
            raise BadInput(f"labels CSV {path} line {line}, column '{name}': {str(cell)!r} is not 0, 1 or empty; correct it")
    twice = frame[frame["tile_path"].duplicated()]
    if len(twice):
        raise BadInput(f"labels CSV {path} line {twice.index[0] + 2}: tile '{twice['tile_path'].iloc[0]}' stands there twice")
    frame = frame[["tile_path", *class_names]].astype(dict.fromkeys(class_names, np.float32))
    frame = frame[frame[list(class_names)].notna().any(axis=1)].head(max_samples).reset_index(drop=True)
    if frame.empty:
        raise BadInput(f"labels CSV {path} has no row with a label of: {', '.join(class_names)}")
    return frame


def join_shards(frame: pd.DataFrame, shards: ShardSet, what: str) -> LabelledTiles:
    """Join labels to the tiles of a shard directory: the stem of ``tile_path`` is the tile's key.

    Raises
    ------
    BadInput
        A tile of the CSV is not in the shards, or is named by two paths.
    """
    tiles = shards.tiles()
    keyed = frame.assign(key=[_stem(p) for p in frame["tile_path"]])
    twice = keyed["key"].duplicated()
    if twice.any():
        raise BadInput(f"{what}: tile '{keyed['key'][twice].iloc[0]}' stands there twice, by different paths; keep one")
    missing = ~keyed["key"].isin(tiles["key"])
    if missing.any():
        raise BadInput(f"{what}: tile '{keyed['key'][missing].iloc[0]}' ({missing.sum()} such) is not in {shards.directory}")
    columns = ["key", "tile", "image_id", "patient_id", "split"]
    joined = keyed.merge(tiles[columns], on="key").sort_values("tile")
    source = [shard for split in joined["split"].unique() for shard in shards.shards(split)]
    return LabelledTiles(
        source,
        joined["tile"].to_numpy(np.int64, copy=True),
        joined[list(frame.columns[1:])].to_numpy(np.float32, copy=True),
        *(joined[name].to_numpy(str) for name in ("key", "image_id", "patient_id")),
    )


def join_folder(frame: pd.DataFrame, tiles_dir: Path, what: str) -> LabelledTiles:
    """Join labels to tile images below a folder. Their patients are unknown.

    The film of a tile is its name without ``_y<y>_x<x>``; tiles named otherwise stand for themselves.

    Raises
    ------
    BadInput
        The folder or a tile is missing.
    """
    if not tiles_dir.is_dir():
        raise BadInput(f"tiles folder {tiles_dir} does not exist; check --tiles-dir")
    paths = [tiles_dir / p for p in frame["tile_path"]]
    for path in paths:
        if not path.is_file():
            raise BadInput(f"{what}: tile {path} does not exist; correct tile_path or --tiles-dir")
    names = frame["tile_path"].to_numpy(str)
    films = np.array([_POSITION.sub("", _stem(name)) for name in names])
    labels = frame.iloc[:, 1:].to_numpy(np.float32, copy=True)
    return LabelledTiles(paths, np.arange(len(paths)), labels, names, films, np.full(len(paths), ""))


def refuse_leakage(train: LabelledTiles, val: LabelledTiles) -> None:
    """Refuse patients, films or tiles that are in both training and validation.

    Raises
    ------
    BadInput
        Naming the first of them.
    """
    for name, kind in (("patients", "patient"), ("keys", "tile"), ("groups", "film")):
        both = sorted((set(getattr(train, name)) & set(getattr(val, name))) - {""})
        if both:
            raise BadInput(
                f"{kind} '{both[0]}' is in both --train-csv and --val-csv ({len(both)} such): the validation would be of seen "
                f"{kind}s; keep each {kind} in one of them"
            )


def _stem(tile_path: str) -> str:
    """Return the key a ``tile_path`` names: its file name without an image's ending."""
    name = str(tile_path).rpartition("/")[2]
    return name.partition(".")[0]
