"""Bags: the tiles of an image, a breast or a patient, with its labels from the manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from mammostream.common.errors import BadInput, nearest
from mammostream.shards.identity import SEEN, clean_ids, clean_patients, clean_sides, known_breast, seen_by, subject_hashes
from mammostream.shards.manifest import LABEL_PREFIX
from mammostream.train.aggregate.features import Features
from mammostream.train.levels.calibration import BREAST, IMAGE, PATIENT
from mammostream.train.levels.labels import labels_of_units

_NAMES = {IMAGE: ["image_id", "patient_id"], BREAST: ["patient_id", "laterality"], PATIENT: ["patient_id"]}
_WITHOUT_UNIT = {BREAST: "its patient or side is unknown: it is of no breast", PATIENT: "its patient is unknown"}
_MM = 100.0  # what makes millimetres of a film numbers of order 1
POSITIONS = ("known", "x", "y", "CC", "MLO", "L", "R")
"""What a tile's position is: 1 and its centre in units of 100 mm (0, 0, 0 if unknown); 1 for its film's view and side."""
_WITHOUT_TILES = "no tile in the features: none passed the build's rules, or 'embed' read other shards or another --split"


@dataclass(frozen=True)
class Bags:
    """B bags of one split.

    Attributes
    ----------
    features
        Where their tiles are.
    names
        (B) rows: what names a bag (``image_id``, or ``patient_id`` and ``laterality``), its ``patient_id`` and ``split``.
    order, starts
        (N,) rows of the features, bag by bag; bag b has ``order[starts[b]:starts[b + 1]]``.
    labels
        (B, C) float32: 1, 0, or NaN where the label is missing.
    disagreeing
        Number of bags with films that say 1 and films that say 0 of a class: they are positive.
    positions
        (T, P) float32 of all tiles of the features, :data:`POSITIONS`; None where the heads are not to know them.
    """

    features: Features
    names: pd.DataFrame
    order: np.ndarray
    starts: np.ndarray
    labels: np.ndarray
    disagreeing: int
    positions: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.names)

    @property
    def dim(self) -> int:
        """Number of inputs of a tile: its features, and what says its position."""
        return self.features.dim + (0 if self.positions is None else self.positions.shape[1])

    @property
    def sizes(self) -> np.ndarray:
        """(B,) number of tiles of each bag."""
        return np.diff(self.starts)

    @property
    def subjects(self) -> list[str]:
        """Hashes of the patients, and of the films of unknown patients, sorted."""
        patients = self.names["patient_id"]
        return np.unique(subject_hashes(patients, self.names.get("image_id", patients))).tolist()

    def take(self, chosen: np.ndarray) -> Bags:
        """Return some of the bags, by their numbers or a mask."""
        numbers = np.arange(len(self))[chosen]
        rows = [self.order[self.starts[n] : self.starts[n + 1]] for n in numbers]
        order = np.concatenate([self.order[:0], *rows])
        starts = np.concatenate([[0], np.cumsum([len(r) for r in rows], dtype=np.int64)])
        names = self.names.iloc[numbers].reset_index(drop=True)
        return replace(self, names=names, order=order, starts=starts, labels=self.labels[numbers])

    def inputs(self, rows: np.ndarray) -> Tensor:
        """Return the inputs of tiles: float16 (R, D) features, or float32 with their positions behind them."""
        features = torch.from_numpy(self.features.values[rows])
        if self.positions is None:
            return features
        return torch.cat([features.float(), torch.from_numpy(self.positions[rows])], 1)

    def batch(self, numbers: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return inputs (R, D) float32 of the tiles of some bags, the bag (R,) of each, counted from 0, and labels (n, C)."""
        rows = [self.order[self.starts[n] : self.starts[n + 1]] for n in numbers]
        inputs = self.inputs(np.concatenate(rows))
        bag = torch.from_numpy(np.repeat(np.arange(len(rows)), [len(r) for r in rows]))
        labels = torch.from_numpy(self.labels[numbers])
        return inputs.to(device).float(), bag.to(device), labels.to(device)


def make_bags(
    features: Features, manifest: pd.DataFrame, level: str, class_names: Sequence[str], split: str, position: bool = False
) -> tuple[Bags, pd.DataFrame]:
    """Gather the tiles of a split by bag and join the labels.

    A breast or patient is positive where one of its films is, negative where all are, and missing otherwise
    (:func:`mammostream.train.levels.labels.labels_of_units`); films without tiles count for the label too.

    Parameters
    ----------
    features
        Of the tiles; their films join by ``image_id``.
    manifest
        What :func:`mammostream.shards.manifest.read_manifest` gave. It decides patients, sides and splits.
    level
        One of :data:`mammostream.train.aggregate.config.LEVELS`.
    class_names
        Its columns ``label:<class>``; none gives bags without labels.
    split
        ``train``, ``val`` or ``test``.
    position
        Whether the inputs of a tile are to say where it lies.

    Returns
    -------
    bags, problems
        `problems` has a row (``image_id``, ``split``, ``reason``) for each film of the split that is in no bag.

    Raises
    ------
    BadInput
        The manifest has no such label.
    """
    films = manifest[manifest["split"] == split].reset_index(drop=True)
    films = films.assign(patient_id=clean_patients(films["patient_id"]), laterality=clean_sides(films["laterality"]))
    units = _units(films, level)
    reasons = np.where(units == "", _WITHOUT_UNIT.get(level, ""), "").astype(object)
    lost = features.unread.drop_duplicates("image_id").set_index("image_id")["reason"]
    empty = ~films["image_id"].isin(features.tiles["image_id"]).to_numpy() & (units != "")
    reasons[empty] = [lost.get(image_id, _WITHOUT_TILES) for image_id in films["image_id"][empty]]
    problems = films[["image_id", "split"]].assign(reason=reasons)[reasons != ""]

    distinct, of_film = np.unique(units[units != ""], return_inverse=True)
    named = films[units != ""].reset_index(drop=True)
    of_films = _labels(named, class_names)
    labels = labels_of_units(of_films, of_film).reshape(len(distinct), len(class_names))
    torn = [np.bincount(of_film[(of_films == value).any(1)], minlength=len(distinct)) > 0 for value in (0, 1)]

    place = pd.Series(of_film, named["image_id"])
    bag = features.tiles["image_id"].map(place).to_numpy(np.float64)
    rows = np.flatnonzero(~np.isnan(bag))
    bag = bag[rows].astype(np.int64)
    order = rows[np.argsort(bag, kind="stable")]
    starts = np.concatenate([[0], np.cumsum(np.bincount(bag, minlength=len(distinct)))]).astype(np.int64)
    names = named.assign(_bag=of_film).drop_duplicates("_bag").sort_values("_bag")[[*_NAMES[level], "split"]]
    everything = Bags(
        features,
        names.reset_index(drop=True),
        order,
        starts,
        labels.astype(np.float32),
        int((torn[0] & torn[1]).sum()),
        _positions(features.tiles, films) if position else None,
    )
    return everything.take(everything.sizes > 0), problems


def _units(films: pd.DataFrame, level: str) -> np.ndarray:
    """Return the (F,) name of each film's bag, "" where it has none."""
    patients = films["patient_id"].to_numpy(str)
    if level == IMAGE:
        return films["image_id"].to_numpy(str)
    return patients if level == PATIENT else known_breast(patients, films["laterality"].to_numpy(str))


def _positions(tiles: pd.DataFrame, films: pd.DataFrame) -> np.ndarray:
    """Return the (T, P) float32 :data:`POSITIONS` of tiles; those of other films are 0."""
    numbers = pd.Series(np.arange(len(films)), films["image_id"])
    film = tiles["image_id"].map(numbers).to_numpy(np.float64)
    mine = np.flatnonzero(~np.isnan(film))
    film = film[mine].astype(np.int64)
    pixels = tiles[["x", "y"]].to_numpy(np.float64)[mine] + tiles[["size"]].to_numpy(np.float64)[mine] / 2
    centre = pixels * films["pixel_spacing_mm"].to_numpy(np.float64)[film, None] / _MM
    known = np.isfinite(centre).all(1)
    columns = [known, *np.where(known[:, None], centre, 0).T]
    views, sides = clean_ids(films["view"]).to_numpy(str)[film], films["laterality"].to_numpy(str)[film]
    columns += [views == "CC", views == "MLO", sides == "L", sides == "R"]
    found = np.zeros((len(tiles), len(POSITIONS)), np.float32)
    found[mine] = np.stack(columns, 1)
    return found


def _labels(films: pd.DataFrame, class_names: Sequence[str]) -> np.ndarray:
    """Return the labels (F, C) of films, float64."""
    known = [c.removeprefix(LABEL_PREFIX) for c in films.columns if c.startswith(LABEL_PREFIX)]
    for name in class_names:
        if name not in known:
            have = f"it has: {', '.join(known)}" if known else "it has none"
            raise BadInput(f"the manifest has no label '{name}'{nearest(name, known)}; {have}")
    columns = [pd.to_numeric(films[LABEL_PREFIX + name], errors="coerce").astype("float64") for name in class_names]
    return np.stack(columns, 1) if columns else np.zeros((len(films), 0))


def joined_subjects(*each: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return by purpose all on whom the heads or their backbone were fitted, as :func:`mammostream.shards.identity.seen_by`
    takes them.
    """
    return {purpose: sorted({name for one in each for name in one.get(purpose, ())}) for purpose in SEEN}


def describe_seen(bags: Bags, fitted_on: Mapping[str, Sequence[str]], split: str) -> str:
    """Return a line on bags of patients whose labels the backbone was fitted on, "" without any."""
    patients = bags.names["patient_id"]
    seen = np.isin(seen_by(fitted_on, patients, bags.names.get("image_id", patients)), ("trained", "validated"))
    if not seen.any():
        return ""
    return (
        f"the backbone was fitted on labels of the patients of {seen.sum()} of {len(bags)} bags of split '{split}': their "
        "figures are flattered; use a backbone that was not"
    )


def check_labels(train: Bags, val: Bags, class_names: Sequence[str]) -> list[str]:
    """Return a line for each thing about the labels that a user should know.

    Raises
    ------
    BadInput
        There are no bags, or a class has positives or negatives only among those to train on.
    """
    lines = []
    for bags, split in ((train, "train"), (val, "val")):
        if not len(bags):
            raise BadInput(f"no bag of split '{split}' has tiles; problems.csv says why, film by film")
        if bags.disagreeing:
            lines.append(
                f"{bags.disagreeing} bags of split '{split}' have films with different labels: positive where one film is"
            )
    for c, name in enumerate(class_names):
        positives, negatives = ((train.labels[:, c] == value).sum() for value in (1, 0))
        if not positives or not negatives:
            raise BadInput(
                f"class '{name}' has {positives} positive and {negatives} negative bags of split 'train': nothing to tell "
                "apart; leave it out of --class-names or change the split"
            )
        positives, negatives = ((val.labels[:, c] == value).sum() for value in (1, 0))
        if not positives and not negatives:
            raise BadInput(f"no bag of split 'val' has a label of class '{name}': nothing says which epoch is the best")
        if not positives or not negatives:
            lines.append(
                f"class '{name}' has {positives} positive, {negatives} negative bags of split 'val': its AUC is undefined"
            )
    return lines
