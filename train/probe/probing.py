"""What frozen features are worth on labels: linear and nearest-neighbour probes, no patient ever on both sides."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from mammostream.common.errors import BadInput
from mammostream.common.files import read_csv, sha256_file, sha256_json, whole_file
from mammostream.common.normalisation import MEAN, STD
from mammostream.common.progress import progress
from mammostream.dali_pipelines import LabelledLoader
from mammostream.models.backbones import build_backbone, encode
from mammostream.models.checkpoints import load_checkpoint, restore_byol, restore_classifier
from mammostream.shards.reading import SHARDS_JSON, ShardSet, check_same_pixels
from mammostream.train.probe.config import ProbeConfig
from mammostream.train.run.labels import LabelledTiles, join_shards, read_labels
from mammostream.train.run.runtime import Runtime

SHARES = (0.01, 0.1, 1.0)
"""Shares of the labels to learn from."""
LEVELS = ("tile", "image", "breast")
FOLDS = 5
NEIGHBOURS, TEMPERATURE = 20, 0.07
"""Neighbours and temperature of the vote; the temperature is that of Wu et al. 2018 (arXiv:1805.01978)."""
FEW_PATIENTS = 10  # fewer make intervals that say little
_IDENTITY = ("tile_path", "image_id", "patient_id")
_ROWS = 1024  # of similarities in memory at a time
_TOP = {"max": 1, "top3": 3}


@dataclass(frozen=True)
class ProbeSet:
    """Labelled tiles of a shard directory, and who they belong to.

    Attributes
    ----------
    shards, tiles
        The shards, and N tiles of them with (N, C) labels.
    class_names
        C names.
    units
        Level -> (N,) what each tile belongs to on that level; "" where unknown.
    patients
        (N,) number of each tile's patient; a film stands for its patient where that is unknown.
    splits
        (N,) split of each tile.
    notes
        What a reader of the figures must know, a line each.
    """

    shards: ShardSet
    tiles: LabelledTiles
    class_names: list[str]
    units: dict[str, np.ndarray]
    patients: np.ndarray
    splits: np.ndarray
    notes: list[str]


@dataclass(frozen=True)
class Fold:
    """Rows to learn from and rows to score: no patient is in both."""

    fit: np.ndarray
    score: np.ndarray


@dataclass(frozen=True)
class Network:
    """A backbone to probe.

    Attributes
    ----------
    name
        For tables.
    build
        Seed -> the backbone on the CPU.
    identity
        Seed -> what decides its weights, for the cache.
    mean, std
        The normalisation that it takes.
    """

    name: str
    build: Callable[[int], nn.Module]
    identity: Callable[[int], str]
    mean: float = MEAN
    std: float = STD


# ---------------------------------------------------------------- labels and folds


def read_probe_set(path: Path, class_names: Sequence[str], shards: ShardSet, max_tiles: int | None = None) -> ProbeSet:
    """Read a labels CSV and join it to the tiles of shards.

    Parameters
    ----------
    path
        CSV of ``tile_path`` (its stem is the tile's key) and one 0/1 column a class; an empty cell is a missing label.
    class_names
        The columns to use; none: all that hold nothing but 0, 1 and empty cells.
    shards
        The tiles.
    max_tiles
        Use only so many tiles, the same ones each time.

    Raises
    ------
    BadInput
        As :func:`mammostream.train.run.labels.read_labels` and :func:`mammostream.train.run.labels.join_shards`; no 0/1 column;
        fewer than two patients; a patient in two splits.
    """
    frame = read_labels(path, class_names or _label_columns(path))
    if max_tiles is not None and len(frame) > max_tiles:
        frame = frame.iloc[np.sort(np.random.default_rng(0).permutation(len(frame))[:max_tiles])].reset_index(drop=True)
    names = [name for name in frame.columns if name not in _IDENTITY]
    tiles = join_shards(frame, shards, f"labels CSV {path}")
    rows = shards.tiles().set_index("tile").loc[tiles.numbers]
    sides = shards.images().drop_duplicates("image_id").set_index("image_id")["laterality"]
    sides = sides.reindex(tiles.groups).fillna("").to_numpy(str)
    notes = []
    unknown = tiles.patients == ""
    patients = np.where(unknown, np.char.add("film ", tiles.groups.astype(str)), tiles.patients)
    if unknown.any():
        notes.append(f"the patients of {unknown.sum()} tiles are unknown: each of their films counts as a patient of its own")
    breasts = np.where(sides == "", "", np.char.add(np.char.add(patients.astype(str), " "), sides))
    unique, numbers = np.unique(patients, return_inverse=True)
    if len(unique) < 2:
        raise BadInput(f"labels CSV {path} names tiles of {len(unique)} patient; a probe needs two: one to learn, one to score")
    if len(unique) < FEW_PATIENTS:
        notes.append(f"{len(unique)} patients only: intervals over so few say little")
    units = {"tile": tiles.keys, "image": tiles.groups, "breast": breasts}
    found = ProbeSet(shards, tiles, names, units, numbers, rows["split"].to_numpy(str), notes)
    _check_splits(found, path)
    return found


def _label_columns(path: Path) -> list[str]:
    frame = read_csv(path, "labels CSV", ["tile_path"])
    values = {name: pd.to_numeric(frame[name], errors="coerce") for name in frame.columns if name not in _IDENTITY}
    names = [name for name, v in values.items() if v.notna().any() and (v.isin([0, 1]) | frame[name].isna()).all()]
    if not names:
        raise BadInput(f"labels CSV {path} has no column of 0 and 1 beside tile_path; add one a class")
    return names


def _check_splits(probe_set: ProbeSet, path: Path) -> None:
    """Refuse a patient whose tiles are in two splits: it would be learnt from and scored."""
    pairs = np.unique(np.stack([probe_set.patients.astype(str), probe_set.splits]), axis=1)
    numbers, counts = np.unique(pairs[0], return_counts=True)
    for number in numbers[counts > 1]:
        patient = probe_set.tiles.patients[probe_set.patients.astype(str) == number][0]
        raise BadInput(
            f"labels CSV {path}: patient '{patient}' is in two splits of {probe_set.shards.directory}; build it again"
        )


def make_folds(probe_set: ProbeSet, seed: int) -> list[Fold]:
    """Return what to learn from and what to score.

    Tiles of the splits ``train`` and ``val`` (or ``test`` where ``val`` has none): learn from the one, score the other.
    Otherwise cross-validation over up to :data:`FOLDS` groups of patients, dealt by `seed`.
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


def draw_share(
    rows: np.ndarray, labels: np.ndarray, patients: np.ndarray, share: float, rng: np.random.Generator
) -> tuple[np.ndarray, str]:
    """Return a share of the labelled rows to learn from, by patient where there are enough, else by tile.

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
        Decides the draw.

    Returns
    -------
    rows, unit
        Ascending rows; ``patients``, or ``tiles`` where the share is less than one patient: then that share of each label's
        tiles, at least one.
    """
    rows = rows[~np.isnan(labels[rows])]
    known = np.unique(patients[rows])
    if share * len(known) >= 1:
        drawn = rng.permutation(known)[: round(share * len(known))]
        return rows[np.isin(patients[rows], drawn)], "patients"
    parts = [rows[labels[rows] == value] for value in (0, 1)]
    return np.sort(np.concatenate([rng.permutation(part)[: math.ceil(share * len(part))] for part in parts])), "tiles"


# ---------------------------------------------------------------- features


@torch.no_grad()
def extract_features(
    backbone: nn.Module, probe_set: ProbeSet, runtime: Runtime, config: Any, mean: float = MEAN, std: float = STD
) -> np.ndarray:
    """Return the features (N, D) float32 of the labelled tiles, through the pipeline that inference uses.

    The backbone is used in evaluation mode and comes back as it was; no random number is drawn from torch's generators.

    Parameters
    ----------
    config
        ``batch_size`` and ``num_workers``.
    """
    tiles, was_training = probe_set.tiles, backbone.training
    loader = LabelledLoader(
        tiles.source,
        batch_size=config.batch_size,
        tile_size=probe_set.shards.preprocessing["tile_size"],
        mean=mean,
        std=std,
        device="gpu" if runtime.device.type == "cuda" else "cpu",
        num_threads=config.num_workers,
        tiles=tiles.numbers.tolist(),
        rank=0,
        world_size=1,
    )
    features: np.ndarray | None = None
    backbone.eval()
    try:
        for batch, numbers in loader:
            with runtime.autocast():
                found = encode(backbone, batch).float().cpu().numpy()
            if features is None:
                features = np.empty((len(tiles.numbers), found.shape[1]), np.float32)
            features[tiles.rows(numbers).numpy()] = found
    finally:
        backbone.train(was_training)
    return features


def cached_features(
    network: Network, seed: int, probe_set: ProbeSet, runtime: Runtime, config: ProbeConfig, folder: Path
) -> np.ndarray:
    """Return :func:`extract_features` of a network, from `folder` where the same was asked before.

    The file's name is a hash of the weights, the shards' bytes, the tiles, the normalisation and the precision.
    """
    what = {
        "network": network.identity(seed),
        "shards": sha256_file(probe_set.shards.directory / SHARDS_JSON),  # it holds the hash of each tar
        "tiles": sha256_json(probe_set.tiles.numbers.tolist()),
        "normalisation": [network.mean, network.std],
        "runtime": str(runtime),
    }
    path = folder / f"features_{sha256_json(what)[:16]}.npy"
    if path.is_file():
        return np.load(path)
    backbone = network.build(seed).to(runtime.device, memory_format=torch.channels_last)
    features = extract_features(backbone, probe_set, runtime, config, network.mean, network.std)
    with whole_file(path) as temporary, temporary.open("wb") as file:
        np.save(file, features)
    return features


def checkpoint_network(path: Path, name: str, shards: ShardSet) -> tuple[Network, str]:
    """Return the backbone of a BYOL or classifier checkpoint, and its architecture.

    Raises
    ------
    BadInput
        It is no checkpoint, or learnt from tiles of another size, mapping or spacing than the shards'.
    """
    checkpoint = load_checkpoint(path, None)
    record = checkpoint["preprocessing"]
    check_same_pixels(record, shards.preprocessing, str(shards.directory))
    restore = restore_byol if checkpoint["kind"] == "byol" else restore_classifier
    backbone = restore(checkpoint, path).backbone
    digest = sha256_file(path)
    return Network(name, lambda _: backbone, lambda _: digest, record["mean"], record["std"]), checkpoint["arch"]


def random_network(arch: str) -> Network:
    """Return a backbone with random weights, others for each seed."""

    def build(seed: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return build_backbone(arch)

    return Network(f"random {arch}", build, lambda seed: f"random {arch} {seed} torch {torch.__version__}")


def imagenet_network(arch: str, weights: str | Path = "imagenet") -> Network:
    """Return a backbone with ImageNet's weights: torchvision's, or those of a file.

    Raises
    ------
    BadInput
        They cannot be had.
    """
    backbone = build_backbone(arch, weights)
    identity = f"imagenet {arch}" if str(weights) == "imagenet" else sha256_file(Path(weights))
    return Network(f"ImageNet {arch}", lambda _: backbone, lambda _: identity)


# ---------------------------------------------------------------- probes


def linear_scores(fit: np.ndarray, labels: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Return the probabilities (M,) of a logistic regression on standardised features.

    With scikit-learn's penalty (L2, C = 1), the same for every network.

    Parameters
    ----------
    fit, labels
        (N, D) features and (N,) labels, 0 and 1, both there.
    score
        (M, D) features.
    """
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(fit, labels)
    return model.predict_proba(score)[:, 1]


def knn_scores(fit: np.ndarray, labels: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Return the weighted share (M,) of positives among the nearest neighbours by cosine (Wu et al. 2018).

    Each of :data:`NEIGHBOURS` votes with ``exp(cosine / TEMPERATURE)``. Parameters are those of :func:`linear_scores`.
    """
    fit, score = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (fit, score))
    k = min(NEIGHBOURS, len(fit))
    votes = []
    for start in range(0, len(score), _ROWS):
        similarity = score[start : start + _ROWS] @ fit.T
        nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        weight = np.exp(np.take_along_axis(similarity, nearest, 1).astype(np.float64) / TEMPERATURE)
        votes.append((weight * labels[nearest]).sum(1) / weight.sum(1))
    return np.concatenate(votes)


PROBES = {"linear": linear_scores, "kNN": knn_scores}


def score_tiles(
    features: np.ndarray, probe_set: ProbeSet, folds: Sequence[Fold], probe: str, share: float = 1.0, seed: int = 0
) -> tuple[np.ndarray, str]:
    """Return out-of-patient scores of the tiles.

    Parameters
    ----------
    features
        (N, D).
    folds
        See :func:`make_folds`.
    probe
        ``linear`` or ``kNN``.
    share
        Of the labels to learn from, see :func:`draw_share`.
    seed
        Decides the draw.

    Returns
    -------
    scores, unit
        (N, C), NaN where a tile is not scored: it was learnt from, or the labels to learn from have one value only, or a
        feature is not finite. By what the share was drawn.
    """
    labels = probe_set.tiles.labels
    scores, units = np.full(labels.shape, np.nan), set()
    for c in range(labels.shape[1]):
        for number, fold in enumerate(folds):
            rng = np.random.default_rng([seed, number])
            rows, unit = draw_share(fold.fit, labels[:, c], probe_set.patients, share, rng)
            units.add(unit)
            y = labels[rows, c]
            if 0 < y.sum() < len(y) and np.isfinite(features).all():
                scores[fold.score, c] = PROBES[probe](features[rows], y, features[fold.score])
    return scores, "tiles" if "tiles" in units else "patients"


def gather(labels: np.ndarray, scores: np.ndarray, units: np.ndarray, patients: np.ndarray, folds: np.ndarray, top: int):
    """Gather tiles by image or breast: the mean of its `top` highest scores; positive where one of its tiles is.

    Tiles without a unit, a label or a score are left out. Returns labels, scores, patients and folds of the units.
    """
    kept = (units != "") & ~np.isnan(labels) & ~np.isnan(scores)
    frame = pd.DataFrame({"unit": units, "label": labels, "score": scores, "patient": patients, "fold": folds})[kept]
    groups = frame.groupby("unit")
    highest = frame.sort_values("score", ascending=False, kind="stable").groupby("unit").head(top)
    table = groups[["label", "patient", "fold"]].max().assign(score=highest.groupby("unit")["score"].mean())
    return tuple(table[name].to_numpy() for name in ("label", "score", "patient", "fold"))


@dataclass(frozen=True)
class PairCounts:
    """Within one fold, by patients a and b: pairs of a positive of a and a negative of b, and those in the right order."""

    patients: np.ndarray
    pairs: np.ndarray
    ordered: np.ndarray


def count_pairs(labels: np.ndarray, scores: np.ndarray, patients: np.ndarray, folds: np.ndarray) -> list[PairCounts]:
    """Count the pairs behind an AUC, fold by fold.

    Scores of two folds come from two models and are never compared (Forman and Scholz 2010, doi:10.1145/1882471.1882479).
    """
    found = []
    for fold in np.unique(folds):
        here = folds == fold
        unique, number = np.unique(patients[here], return_inverse=True)
        y, s = labels[here] == 1, scores[here]
        ordered = np.zeros((len(unique), len(unique)))
        for b in range(len(unique)):
            negatives = np.sort(s[~y & (number == b)])
            below, up_to = (np.searchsorted(negatives, s[y], side) for side in ("left", "right"))
            ordered[:, b] = np.bincount(number[y], (below + up_to) / 2, minlength=len(unique))
        positives, negatives = (np.bincount(number[which], minlength=len(unique)) for which in (y, ~y))
        found.append(PairCounts(unique, np.outer(positives, negatives).astype(float), ordered))
    return found


def auc_of(counts: Sequence[PairCounts], draws: np.ndarray) -> np.ndarray:
    """Return the AUC (R,) for (R, patients) numbers of times that each patient counts; NaN where there is no pair."""
    ordered, pairs = (
        sum((((draws[:, c.patients] @ getattr(c, name)) * draws[:, c.patients]).sum(1) for c in counts), np.zeros(len(draws)))
        for name in ("ordered", "pairs")
    )
    return np.divide(ordered, pairs, out=np.full(len(draws), np.nan), where=pairs > 0)


# ---------------------------------------------------------------- online, and side by side


class OnlineProbe:
    """Probes a network while it trains: linear and kNN AUC of the tiles, every class and their mean.

    The folds and the tiles are the same each time, so that the figures of two epochs can be compared.
    """

    def __init__(self, probe_set: ProbeSet, runtime: Runtime, config: Any) -> None:
        self._probe_set, self._runtime, self._config = probe_set, runtime, config
        self._folds = make_folds(probe_set, seed=0)

    def __call__(self, backbone: nn.Module) -> dict[str, dict[str, float | None]]:
        """Return probe -> class or ``mean`` -> AUC; None where undefined."""
        probe_set = self._probe_set
        features = extract_features(backbone, probe_set, self._runtime, self._config)
        found = {}
        for probe in PROBES:
            scores, _ = score_tiles(features, probe_set, self._folds, probe)
            aucs = {
                name: _point(_pairs(probe_set, self._folds, scores, c, "tile", "max"))
                for c, name in enumerate(probe_set.class_names)
            }
            known = [auc for auc in aucs.values() if auc is not None]
            found[probe] = aucs | {"mean": float(np.mean(known)) if known else None}
        return found


def compare(
    networks: Sequence[Network], probe_set: ProbeSet, runtime: Runtime, config: ProbeConfig, cache: Path
) -> dict[str, Any]:
    """Probe networks side by side: each share of the labels, class and level, over several seeds.

    Parameters
    ----------
    networks
        What to compare.
    config
        Seeds, bootstrap, how tiles are gathered.
    cache
        Folder for the features.

    Returns
    -------
    dict
        ``rows``: a dict a figure with ``network, probe, level, class, share, drawn_by, auc`` (mean over seeds), ``sd`` over
        seeds, ``low`` and ``high`` (95 % interval over patients of that mean), ``aucs`` (by seed), ``patients, positives,
        negatives`` that are scored; None where undefined. ``folds``, ``notes``: what a reader must know.
    """
    rows = []
    folds = {seed: make_folds(probe_set, seed) for seed in config.seed_numbers}
    for network in networks:
        features = {seed: cached_features(network, seed, probe_set, runtime, config, cache) for seed in config.seed_numbers}
        combinations = [(probe, share, seed) for probe in PROBES for share in SHARES for seed in config.seed_numbers]
        scored = {
            (probe, share, seed): score_tiles(features[seed], probe_set, folds[seed], probe, share, seed)
            for probe, share, seed in progress(combinations, f"probing {network.name}", "probe")
        }
        for probe in PROBES:
            for share in SHARES:
                by_seed = {seed: scored[probe, share, seed] for seed in config.seed_numbers}
                unit = "tiles" if any(u == "tiles" for _, u in by_seed.values()) else "patients"
                about = {"network": network.name, "probe": probe, "share": share, "drawn_by": unit}
                for level in LEVELS:
                    for c, name in enumerate(probe_set.class_names):
                        pairs = [_pairs(probe_set, folds[s], t, c, level, config.score) for s, (t, _) in by_seed.items()]
                        rows.append(about | {"level": level, "class": name} | _summary(pairs, config.bootstrap))
    if len(folds[config.seed_numbers[0]]) > 1:
        how = f"{len(folds[config.seed_numbers[0]])}-fold cross-validation by patient"
    else:
        how = "learnt from the split train, scored on another"
    return {"rows": rows, "folds": how, "notes": probe_set.notes, "seeds": list(config.seed_numbers)}


def markdown(result: dict[str, Any]) -> Iterator[str]:
    """Yield :func:`compare`'s figures as Markdown: a table a class and level, a column a share of the labels."""
    rows = pd.DataFrame(result["rows"])
    for (name, level), table in rows.groupby(["class", "level"], sort=False):
        first = table.iloc[-1]
        counts = f"{first['positives']} positive, {first['negatives']} negative, {first['patients']} patients"
        yield f"**{name}**, by {level}: {counts}"
        yield ""
        heads = [f"{share:.0%} of the labels ({by})" for share, by in table[["share", "drawn_by"]].drop_duplicates().to_numpy()]
        yield "| network | probe | " + " | ".join(heads) + " |"
        yield "|---" * (2 + len(heads)) + "|"
        for (network, probe), cells in table.groupby(["network", "probe"], sort=False):
            yield f"| {network} | {probe} | " + " | ".join(_cell(row) for row in cells.to_dict("records")) + " |"
        yield ""
    yield f"AUC over {len(result['seeds'])} seeds: mean ± standard deviation (95 % interval over patients); {result['folds']}."
    yield from (f"Note: {note}." for note in result["notes"])


def _cell(row: dict[str, Any]) -> str:
    if row["auc"] is None or np.isnan(row["auc"]):
        return "undefined"
    spread = f" ± {row['sd']:.3f}" if row["sd"] is not None and not np.isnan(row["sd"]) else ""
    interval = f" ({row['low']:.3f}-{row['high']:.3f})" if row["low"] is not None and not np.isnan(row["low"]) else ""
    return f"{row['auc']:.3f}{spread}{interval}"


def _pairs(
    probe_set: ProbeSet, folds: Sequence[Fold], scores: np.ndarray, c: int, level: str, score: str
) -> tuple[list[PairCounts], int, int]:
    """Return the pairs of a class's scores on a level, and how many positives and negatives are scored."""
    of_row = np.full(len(scores), -1)
    for number, fold in enumerate(folds):
        of_row[fold.score] = number
    gathered = gather(
        probe_set.tiles.labels[:, c], scores[:, c], probe_set.units[level], probe_set.patients, of_row, _TOP[score]
    )
    labels, *_ = gathered
    return count_pairs(*gathered), int((labels == 1).sum()), int((labels == 0).sum())


def _point(found: tuple[list[PairCounts], int, int]) -> float | None:
    counts, *_ = found
    patients = max((c.patients.max() + 1 for c in counts), default=0)
    auc = auc_of(counts, np.ones((1, patients)))[0]
    return None if np.isnan(auc) else float(auc)


def _summary(found: Sequence[tuple[list[PairCounts], int, int]], bootstrap: int) -> dict[str, Any]:
    """Return the mean AUC over seeds with its spread and its interval over patients."""
    aucs = [_point(one) for one in found]
    known = [auc for auc in aucs if auc is not None]
    patients = np.unique(np.concatenate([np.concatenate([c.patients for c in counts] or [[]]) for counts, *_ in found]))
    patients = patients.astype(int)
    interval = None
    if known and bootstrap and len(patients) > 1:
        # The same draws for each network: differences between them are not differences of the draw.
        rng = np.random.default_rng(0)
        draws = np.zeros((bootstrap, patients.max() + 1))
        draws[:, patients] = rng.multinomial(len(patients), np.full(len(patients), 1 / len(patients)), size=bootstrap)
        drawn = np.stack([auc_of(counts, draws) for counts, *_ in found])
        defined = (~np.isnan(drawn)).sum(0)
        means = np.nansum(drawn, 0)[defined > 0] / defined[defined > 0]
        interval = np.percentile(means, (2.5, 97.5)) if len(means) else None
    low, high = (None, None) if interval is None else map(float, interval)
    return {
        "auc": float(np.mean(known)) if known else None,
        "sd": float(np.std(known, ddof=1)) if len(known) > 1 else None,
        "low": low,
        "high": high,
        "aucs": aucs,
        "patients": len(patients),
        "positives": max(positives for _, positives, _ in found),
        "negatives": max(negatives for *_, negatives in found),
    }
