"""The labelled tiles of a probe, their patients, and the split into folds: no patient is ever on both sides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from mammostream.common.errors import BadInput
from mammostream.common.files import read_csv
from mammostream.shards.identity import known_breast, spelling
from mammostream.shards.manifest import SPLITS
from mammostream.shards.reading import ShardSet
from mammostream.train.run.labels import LabelledTiles, join_shards, read_labels

FEW_PATIENTS = 10  # with fewer, intervals say little
FOLDS = 5
CHOOSING = ("train", "val")
"""Splits whose labels may decide which checkpoint is the best."""

_IDENTITY = ("tile_path", "image_id", "patient_id")


@dataclass(frozen=True)
class ProbeSet:
    """Labelled tiles of a shard directory, with their patients.

    Attributes
    ----------
    shards, tiles
        The shards, and N tiles of them with (N, C) labels.
    class_names
        C names.
    units
        Maps a level to the unit (N,) that each tile belongs to on that level; "" if unknown.
    patients
        (N,) number of each tile's patient; if the patient is unknown, the film counts as one.
    splits
        (N,) split of each tile.
    notes
        What a reader of the figures must know, one line each.
    """

    shards: ShardSet
    tiles: LabelledTiles
    class_names: list[str]
    units: dict[str, np.ndarray]
    patients: np.ndarray
    splits: np.ndarray
    notes: list[str]

    def subset(self, rows: np.ndarray) -> ProbeSet:
        """Return the probe set of some of its rows, ascending; the patients are numbered anew."""
        splits = self.splits[rows]
        tiles = replace(
            self.tiles.take(rows), source=[shard for split in pd.unique(splits) for shard in self.shards.shards(split)]
        )
        units = {level: unit[rows] for level, unit in self.units.items()}
        patients = np.unique(self.patients[rows], return_inverse=True)[1]
        return replace(self, tiles=tiles, units=units, patients=patients, splits=splits)


@dataclass(frozen=True)
class Fold:
    """Rows to fit on and rows to score: no patient is in both."""

    fit: np.ndarray
    score: np.ndarray


def read_probe_set(path: Path, class_names: Sequence[str], shards: ShardSet) -> ProbeSet:
    """Read a labels CSV and join it to the tiles of shards.

    Parameters
    ----------
    path
        CSV of ``tile_path`` (its stem is the tile's key) and one 0/1 column per class; an empty cell is a missing label.
    class_names
        The columns to use; if empty, all that hold only 0, 1 and empty cells.
    shards
        The tiles.

    Raises
    ------
    BadInput
        As :func:`mammostream.train.run.labels.read_labels` and :func:`mammostream.train.run.labels.join_shards`; no 0/1 column;
        fewer than two patients; a patient in two splits.
    """
    # Tiles without a label decide whether an image's or breast's label is missing.
    frame = read_labels(path, class_names or _label_columns(path), keep_unlabelled=True)
    names = [name for name in frame.columns if name not in _IDENTITY]
    tiles = join_shards(frame, shards, f"labels CSV {path}").of_labelled_units()
    rows = shards.tiles().set_index("tile").loc[tiles.numbers]
    sides = shards.images().drop_duplicates("image_id").set_index("image_id")["laterality"]
    sides = sides.reindex(tiles.groups).fillna("").to_numpy(str)
    notes = []
    unknown = tiles.patients == ""
    if unknown.any():
        notes.append(f"the patients of {unknown.sum()} tiles are unknown: each of their films counts as its own patient")
    # Ids that differ only in case or leading zeros may be one patient: they are never on both sides.
    unique, numbers = np.unique([spelling(person) for person in tiles.people], return_inverse=True)
    if len(unique) < 2:
        raise BadInput(f"labels CSV {path} names tiles of {len(unique)} patient; a probe needs two: one to fit, one to score")
    if len(unique) < FEW_PATIENTS:
        notes.append(f"{len(unique)} patients only: intervals over so few say little")
    units = {"tile": tiles.keys, "image": tiles.groups, "breast": known_breast(tiles.people, sides)}
    found = ProbeSet(shards, tiles, names, units, numbers, rows["split"].to_numpy(str), notes)
    _check_splits(found, path)
    return found


def _label_columns(path: Path) -> list[str]:
    frame = read_csv(path, "labels CSV", ["tile_path"])
    values = {name: pd.to_numeric(frame[name], errors="coerce") for name in frame.columns if name not in _IDENTITY}
    names = [name for name, v in values.items() if v.notna().any() and (v.isin([0, 1]) | frame[name].isna()).all()]
    if not names:
        raise BadInput(f"labels CSV {path} has no column of 0 and 1 in addition to tile_path; add one per class")
    return names


def _check_splits(probe_set: ProbeSet, path: Path) -> None:
    """Refuse a patient whose tiles are in two splits: they would be both fitted on and scored."""
    pairs = np.unique(np.stack([probe_set.patients.astype(str), probe_set.splits]), axis=1)
    numbers, counts = np.unique(pairs[0], return_counts=True)
    for number in numbers[counts > 1]:
        patient = probe_set.tiles.patients[probe_set.patients.astype(str) == number][0]
        raise BadInput(
            f"labels CSV {path}: patient '{patient}' is in two splits of {probe_set.shards.directory}; build it again"
        )


def for_choosing(probe_set: ProbeSet, max_tiles: int | None = None) -> ProbeSet:
    """Return the part of a probe set that may decide which checkpoint is the best: no tile of the split ``test``.

    Whoever chooses a checkpoint by the test split can no longer report its figures on that split: they are the best of several.

    Parameters
    ----------
    max_tiles
        Use only this many of the tiles that are left, the same ones each time.

    Raises
    ------
    BadInput
        All labelled tiles are of the split ``test``, or the others are all of one patient.
    """
    labelled = ~np.isnan(probe_set.tiles.labels).all(1)
    rows = np.flatnonzero(labelled & np.isin(probe_set.splits, CHOOSING))
    others = labelled.sum() - len(rows)
    if not len(rows):
        raise BadInput(
            f"--probe-csv: all {others} labelled tiles are of the split 'test', which must not decide which epoch is best; "
            "label tiles of 'train' or 'val', or leave out --probe-csv"
        )
    if max_tiles is not None and len(rows) > max_tiles:
        rows = np.sort(np.random.default_rng(0).permutation(rows)[:max_tiles])
    found = probe_set.subset(rows)
    if found.patients.max() == 0:
        raise BadInput(
            f"--probe-csv: the {len(rows)} labelled tiles of {_enumerated(found.splits)} are of one patient; the probe needs "
            "two patients, one to fit on and one to score (tiles of the split 'test' do not count)"
        )
    return found


def make_folds(probe_set: ProbeSet, seed: int) -> list[Fold]:
    """Return the folds: rows to fit on and rows to score.

    If ``train`` and ``val`` (or ``test`` if ``val`` has none) both have tiles: fit on ``train``, score the other.
    Otherwise cross-validation over up to :data:`FOLDS` groups of patients, assigned at random by `seed`. What chooses a
    checkpoint gives it the set that :func:`for_choosing` returns: there, ``test`` has no tiles.
    """
    train = probe_set.splits == "train"
    for split in ("val", "test"):
        held_out = probe_set.splits == split
        if train.any() and held_out.any():
            return [Fold(np.flatnonzero(train), np.flatnonzero(held_out))]
    count = probe_set.patients.max() + 1
    group = np.random.default_rng(seed).permutation(count) % min(FOLDS, count)
    of_row = group[probe_set.patients]
    return [Fold(np.flatnonzero(of_row != g), np.flatnonzero(of_row == g)) for g in range(group.max() + 1)]


def describe_folds(probe_set: ProbeSet, folds: Sequence[Fold]) -> str:
    """Return in words on which splits the probe is fitted and scored."""
    if len(folds) == 1:
        fit, score = (_enumerated(probe_set.splits[rows]) for rows in (folds[0].fit, folds[0].score))
        return f"fitted on {fit}, scored on {score}"
    return f"{len(folds)}-fold cross-validation by patient over the labelled tiles of {_enumerated(probe_set.splits)}"


def _enumerated(splits: np.ndarray) -> str:
    """Return the names of the splits that occur, in the order train, val, test."""
    return " and ".join(split for split in SPLITS if split in splits)


def draw_share(
    rows: np.ndarray, labels: np.ndarray, patients: np.ndarray, share: float, rng: np.random.Generator
) -> tuple[np.ndarray, str]:
    """Return a share of the labelled rows to fit on, drawn by patient if there are enough, else by tile.

    Parameters
    ----------
    rows
        Rows to draw from.
    labels
        (N,) of 0, 1 and NaN, which is never drawn.
    patients
        (N,) patient numbers.
    share
        In (0, 1].
    rng
        Source of the random draw.

    Returns
    -------
    rows, unit
        Ascending rows; ``patients``, or ``tiles`` if the share is less than one patient: then that share of each label's
        tiles, at least one.
    """
    rows = rows[~np.isnan(labels[rows])]
    known = np.unique(patients[rows])
    if share * len(known) >= 1:
        drawn = rng.permutation(known)[: round(share * len(known))]
        return rows[np.isin(patients[rows], drawn)], "patients"
    parts = [rows[labels[rows] == value] for value in (0, 1)]
    return np.sort(np.concatenate([rng.permutation(part)[: math.ceil(share * len(part))] for part in parts])), "tiles"
