"""Labels by tile: the guide's CSV, joined to the tiles of shards or of a folder by number."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import lazy_loader
import numpy as np
import pandas as pd
import torch

from mammostream.common.errors import BadInput, nearest
from mammostream.common.files import read_csv
from mammostream.common.progress import progress
from mammostream.shards.identity import (
    clean_ids,
    clean_patients,
    clean_sides,
    film_of_tile,
    key_of_path,
    known_breast,
    lookalikes,
    subject_hashes,
)
from mammostream.shards.reading import Shard, ShardSet

imagecodecs = lazy_loader.load("imagecodecs")  # labels of shards need it not
_IDENTITY = ("image_id", "patient_id")
_LISTED = 3  # of what leaked, in the error itself
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
        (N, C) float32 in the order of `numbers`: 1, 0, or NaN where the label is missing; validation keeps tiles without any
        label, since they decide whether an image's label is missing.
    keys, groups, patients
        (N,) each tile's key, its film (for intervals over films), and its patient (empty where nobody tells).
    contents
        (N,) a hash of each tile's pixels.
    breasts
        (N,) patient and side of each tile; "" if one is unknown.
    """

    source: TileSource
    numbers: np.ndarray
    labels: np.ndarray
    keys: np.ndarray
    groups: np.ndarray
    patients: np.ndarray
    contents: np.ndarray
    breasts: np.ndarray

    def of_labelled_units(self) -> LabelledTiles:
        """Return the tiles with a label, and those without one whose film or breast has tiles with one."""
        labelled = ~np.isnan(self.labels).all(1)
        kept = labelled | np.isin(self.groups, self.groups[labelled])
        kept |= (self.breasts != "") & np.isin(self.breasts, self.breasts[labelled])
        return self.take(np.flatnonzero(kept))

    def take(self, rows: np.ndarray) -> LabelledTiles:
        """Return some of the tiles, by their ascending row numbers."""
        columns = {f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name not in ("source", "numbers")}
        if self.source and isinstance(self.source[0], Path):  # then a number is a position in the list
            paths = [self.source[row] for row in rows]
            return LabelledTiles(paths, np.arange(len(rows)), **columns)
        return LabelledTiles(self.source, self.numbers[rows], **columns)

    @cached_property
    def people(self) -> np.ndarray:
        """(N,) patient of each tile, or ``film <film>`` if the patient is unknown: the film then counts as its own patient."""
        return np.where(self.patients == "", np.char.add("film ", self.groups.astype(str)), self.patients)

    @cached_property
    def subjects(self) -> list[str]:
        """Hashes of all patients, and of the films of unknown patients, sorted."""
        return np.unique(subject_hashes(self.patients, self.groups)).tolist()

    def rows(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return the row of each tile number, on the numbers' device."""
        return torch.searchsorted(torch.as_tensor(self.numbers, device=numbers.device), numbers)


def read_labels(
    path: Path, class_names: Sequence[str], max_samples: int | None = None, keep_unlabelled: bool = False
) -> pd.DataFrame:
    """Read a CSV of ``tile_path`` and one column a class.

    Parameters
    ----------
    path
        The CSV.
    class_names
        The columns to use.
    max_samples
        Keep only the first so many rows.
    keep_unlabelled
        Keep rows without any label, unless `max_samples` is given.

    Returns
    -------
    pandas.DataFrame
        ``tile_path``, the classes as float32 (1, 0, NaN), and ``image_id`` and ``patient_id`` where the CSV has them.

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
        raise BadInput(f"labels CSV {path} line {twice.index[0] + 2}: tile '{twice['tile_path'].iloc[0]}' occurs twice")
    described = [name for name in _IDENTITY if name in frame.columns and name not in class_names]
    frame = frame[["tile_path", *class_names, *described]].astype(dict.fromkeys(class_names, np.float32))
    labelled = frame[list(class_names)].notna().any(axis=1)
    if not (keep_unlabelled and max_samples is None):
        frame = frame[labelled].head(max_samples).reset_index(drop=True)
    if not labelled.any():
        raise BadInput(f"labels CSV {path} has no row with a label of: {', '.join(class_names)}")
    return frame


def join_shards(frame: pd.DataFrame, shards: ShardSet, what: str) -> LabelledTiles:
    """Join labels to the tiles of a shard directory: the file name of ``tile_path`` without its ending is the tile's key.

    Raises
    ------
    BadInput
        A tile of the CSV is not in the shards, or is named by two paths.
    """
    tiles = shards.tiles()
    known = set(tiles["key"])
    keyed = frame.assign(key=[_key(p, known) for p in frame["tile_path"]])
    twice = keyed["key"].duplicated()
    if twice.any():
        raise BadInput(f"{what}: tile '{keyed['key'][twice].iloc[0]}' occurs twice, by different paths; keep one")
    missing = ~keyed["key"].isin(known)
    if missing.any():
        raise BadInput(f"{what}: tile '{keyed['key'][missing].iloc[0]}' ({missing.sum()} such) is not in {shards.directory}")
    columns = ["key", "tile", "image_id", "patient_id", "split", "crc32", "payload_crc32"]
    # Where the CSV names films and patients too, the shards know better.
    joined = keyed.drop(columns=list(_IDENTITY), errors="ignore").merge(tiles[columns], on="key").sort_values("tile")
    source = [shard for split in joined["split"].unique() for shard in shards.shards(split)]
    patients = clean_patients(joined["patient_id"]).to_numpy(str)
    sides = shards.images().drop_duplicates("image_id").set_index("image_id")["laterality"].reindex(joined["image_id"])
    return LabelledTiles(
        source,
        joined["tile"].to_numpy(np.int64, copy=True),
        joined[_classes(frame)].to_numpy(np.float32, copy=True),
        joined["key"].to_numpy(str),
        joined["image_id"].to_numpy(str),
        patients,
        # 32 bits alone would meet by chance among many tiles; of the encoded bytes there are 32 more.
        contents=np.array([f"{a:08x}{b:08x}" for a, b in zip(joined["crc32"], joined["payload_crc32"], strict=True)]),
        breasts=known_breast(patients, clean_sides(sides).to_numpy(str)),
    )


def join_folder(frame: pd.DataFrame, tiles_dir: Path, what: str, patient_regex: str | None = None) -> LabelledTiles:
    """Join labels to tile images below a folder.

    The film of a tile is its ``image_id`` in the CSV, else the one that its name tells
    (:func:`mammostream.shards.identity.film_of_tile`); tiles named otherwise stand for themselves. Its patient is the CSV's
    ``patient_id``, else what `patient_regex` finds in ``tile_path``
    (the first group, else the whole match), else unknown.

    Raises
    ------
    BadInput
        The folder or a tile is missing; `patient_regex` is none, or does not match.
    """
    if not tiles_dir.is_dir():
        raise BadInput(f"tiles folder {tiles_dir} does not exist; check --tiles-dir")
    paths = [tiles_dir / p for p in frame["tile_path"]]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise BadInput(f"{what}: tile {missing[0]} ({len(missing)} such) does not exist; correct tile_path or --tiles-dir")
    names = frame["tile_path"].to_numpy(str)
    films = pd.Series([film_of_tile(name) or name for name in names], frame.index)
    if "image_id" in frame:
        given = clean_ids(frame["image_id"])
        films = given.where(given != "", films)
    patients = clean_patients(pd.Series(_patients(names, patient_regex, what), frame.index))
    if "patient_id" in frame:
        given = clean_patients(frame["patient_id"])
        patients = given.where(given != "", patients)
    with ThreadPoolExecutor() as threads:  # decoders release Python's lock
        contents = list(progress(threads.map(_content, paths), "comparing tiles", "tile", len(paths)))
    labels = frame[_classes(frame)].to_numpy(np.float32, copy=True)
    identity = films.to_numpy(str), patients.to_numpy(str)
    unknown = np.full(len(paths), "")
    return LabelledTiles(paths, np.arange(len(paths)), labels, names, *identity, np.array(contents), unknown)


def find_leakage(train: LabelledTiles, val: LabelledTiles) -> dict[str, list[str]]:
    """Return what is in both training and validation, by kind: ``patients``, ``images``, ``tiles`` with the same pixels.

    Kinds of which nothing leaks are left out. A tile is named by its key in the validation and, where it differs, in the
    training: ``b.png (= a.png)``. So are patients whose ids differ only in case or leading zeros: ``p1 (= P01)``.
    """
    found = {}
    for kind, attribute in (("patients", "patients"), ("images", "groups")):
        found[kind] = sorted((set(getattr(train, attribute)) & set(getattr(val, attribute))) - {""})
    found["patients"] += [f"{val_id} (= {train_id})" for train_id, val_id in lookalikes(train.patients, val.patients)]
    known = dict(zip(train.contents, train.keys, strict=True))
    twins = ((key, known.get(content)) for key, content in zip(val.keys, val.contents, strict=True))
    found["tiles"] = sorted(str(key) if key == twin else f"{key} (= {twin})" for key, twin in twins if twin is not None)
    return {kind: [str(name) for name in names] for kind, names in found.items() if names}


def describe_leakage(leakage: Mapping[str, Sequence[str]]) -> str:
    """Return one line that counts what :func:`find_leakage` found and names the first few of each kind."""
    parts = []
    for kind, names in leakage.items():
        more = f", … and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        parts.append(f"{len(names)} {kind if len(names) > 1 else kind[:-1]} ({', '.join(names[:_LISTED])}{more})")
    return f"in both --train-csv and --val-csv: {', '.join(parts)}"


def _classes(frame: pd.DataFrame) -> list[str]:
    return [name for name in frame.columns if name not in ("tile_path", *_IDENTITY)]


def _key(tile_path: str, known: Set[str]) -> str:
    """Return the key that a ``tile_path`` names: its file name without any ending, or as :func:`key_of_path` escapes it."""
    name = tile_path.rpartition("/")[2]
    plain = name.partition(".")[0]
    return plain if plain in known else key_of_path(name)


def _patients(names: Sequence[str], patient_regex: str | None, what: str) -> list[str]:
    if patient_regex is None:
        return [""] * len(names)
    try:
        pattern = re.compile(patient_regex)
    except re.error as error:
        raise BadInput(f"--patient-regex {patient_regex!r} is not a regular expression: {error}") from error
    found = [pattern.search(name) for name in names]
    if None in found:
        raise BadInput(f"{what}: --patient-regex {patient_regex!r} does not match '{names[found.index(None)]}'; correct it")
    return [match.group(1) if pattern.groups else match.group(0) for match in found if match]


def _content(path: Path) -> str:
    """Return a hash of an image's pixels, or of its bytes where it cannot be decoded: the loader will name it."""
    try:
        pixels = imagecodecs.imread(path)
        facts, data = f"{pixels.shape} {pixels.dtype} ", np.ascontiguousarray(pixels).tobytes()
    except Exception:  # every codec has its own exceptions
        facts, data = "file ", path.read_bytes()
    digest = hashlib.sha256(facts.encode())
    digest.update(data)
    return digest.hexdigest()
