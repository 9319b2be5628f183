"""A network that predicts batches of tiles, with the calibrations and thresholds of its checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.special import expit, logit
from torch import Tensor, nn

from mammostream.common.files import sha256_file
from mammostream.models.backbones import encode, feature_dim
from mammostream.models.byol import MammogramBYOL
from mammostream.models.checkpoints import entries_of, load_checkpoint, restore_byol, restore_classifier
from mammostream.models.classifier import MammogramClassifier
from mammostream.models.folding import fold_batch_norms
from mammostream.models.tensors import place
from mammostream.shards.identity import fitted_subjects, seen_by
from mammostream.train.levels.aggregation import MAX, NOISY_OR, PROBABILITY, TOP
from mammostream.train.levels.calibration import GIVEN, IMAGE, PROB, TILE, Calibration, Calibrations, stored_calibrations
from mammostream.train.predict.config import EmbedConfig, InferConfig
from mammostream.train.predict.tables import FEATURES
from mammostream.train.run.runtime import Runtime, resolve_runtime

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Answer(NamedTuple):
    """What the network says of N tiles: float32, on its device."""

    logits: Tensor  # (N, C)
    features: Tensor | None  # (N, D), None where they are not wanted

    def take(self, rows: np.ndarray) -> Answer:
        """Return some of the rows, chosen by a mask."""
        if rows.all():
            return self
        kept = torch.from_numpy(np.flatnonzero(rows)).to(self.logits.device)
        return Answer(self.logits[kept], None if self.features is None else self.features[kept])


class Network(nn.Module):
    """A backbone and its head as inference runs them: batch norms folded, the backbone in the precision asked for.

    The head stays in float32: it costs nothing, and half precision has three digits.
    """

    def __init__(self, model: MammogramClassifier | MammogramBYOL, dtype: torch.dtype, with_head: bool) -> None:
        super().__init__()
        self.backbone = fold_batch_norms(model.backbone).to(dtype=dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.head = copy.deepcopy(model.classification_head) if with_head else None
        self._dtype = dtype

    def forward(self, tiles: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return logits (N, C), None without a head, and features (N, D), both float32, of tiles (N, 1, H, W)."""
        features = encode(self.backbone, tiles.to(self._dtype)).float()
        return None if self.head is None else self.head(features), features


@dataclass(frozen=True)
class Predictor:
    """A network ready to predict.

    Attributes
    ----------
    model
        As it was trained, in evaluation mode, on the device; ``network`` is its faster form.
    network
        Maps tiles (N, 1, H, W) to (logits, features), see :class:`Network`.
    class_names
        C names; none where only features are wanted.
    preprocessing
        How its tiles were made.
    runtime, config
        Device and precision; the options.
    calibrations
        What turns logits into probabilities, and scores of images and breasts into theirs, with thresholds.
    fitted_on
        ``trained``, ``validated``, ``pre-trained`` -> hashes of the patients, see
        :func:`mammostream.shards.identity.subject_hashes`.
    sha256
        Of the checkpoint's file.
    wants_features
        Whether answers hold them.
    """

    model: MammogramClassifier | MammogramBYOL
    network: Callable[[Tensor], tuple[Tensor | None, Tensor]]
    class_names: list[str]
    preprocessing: dict[str, Any]
    runtime: Runtime
    config: EmbedConfig
    calibrations: Calibrations
    fitted_on: Mapping[str, Sequence[str]]
    sha256: str
    wants_features: bool

    @property
    def feature_dim(self) -> int:
        """Length of the features of an answer; 0 where it holds none."""
        return feature_dim(self.model.backbone) if self.wants_features else 0

    @property
    def thresholds(self) -> dict[str, float]:
        """Class -> the probability from which it counts as found in a tile."""
        return self.level_thresholds(TILE, PROB) if self.class_names else {}

    @property
    def temperature(self) -> float | None:
        """What all logits are divided by; None if slope and intercept were fitted for each class instead."""
        tile = self.calibrations[TILE][PROB] if self.class_names else None
        return 1.0 if tile is None else float(1 / tile.slope[0]) if tile.fits[0] == GIVEN else None

    def level_thresholds(self, level: str, score: str) -> dict[str, float]:
        """Return for each class the probability from which it counts as found; that of tiles if the level has none."""
        calibration = self.calibrations.get(level, {}).get(score) or self.calibrations[TILE][PROB]
        return {name: 0.5 if t is None else t for name, t in zip(self.class_names, calibration.thresholds, strict=True)}

    def seen(self, patients: Iterable[str], films: Iterable[str]) -> np.ndarray:
        """Return for each row what the model was fitted on its patient for: a key of ``fitted_on``, or "" if for nothing."""
        return seen_by(self.fitted_on, patients, films)

    @torch.inference_mode()
    def answer(self, tiles: Tensor) -> Answer:
        """Return what the network says of normalised tiles (N, 1, H, W), N at most the batch size; it stays on the device."""
        count = len(tiles)
        tiles = tiles.to(self.runtime.device)
        if self.config.compiles(self.runtime.device.type) and count < self.config.batch_size:
            # A compiled network is compiled for one size.
            tiles = torch.cat([tiles, tiles.new_zeros(self.config.batch_size - count, *tiles.shape[1:])])
        logits, features = self.network(tiles)
        if logits is None:
            logits = features.new_zeros(count, 0)
        return Answer(logits[:count], features[:count] if self.wants_features else None)

    def probabilities(self, tiles: Tensor) -> np.ndarray:
        """Return (N, C) probabilities of normalised tiles (N, 1, H, W)."""
        return self.calibrated(self.answer(tiles).logits)

    def calibrated(self, logits: Tensor) -> np.ndarray:
        """Return the probabilities of logits (N, C), float32."""
        if not self.class_names:
            return np.zeros((len(logits), 0), np.float32)
        return self.calibrations[TILE][PROB](logits.float().cpu().numpy()).astype(np.float32)

    def frame(
        self,
        tiles: pd.DataFrame,
        answers: Sequence[Answer],
        reasons: Sequence[str] | np.ndarray | str = "",
        rows: Sequence[int] | None = None,
    ) -> pd.DataFrame:
        """Return the tile table with one probability column a class, and features where they are wanted.

        Parameters
        ----------
        tiles
            The rows, with ``patient_id``, ``image_id`` and, if that is not the film's id, ``film``.
        answers
            What :meth:`answer` gave.
        reasons
            Why a tile has no answer, empty where it has.
        rows
            The row of each answer; None: the first is of the first row, and so on.
        """
        where = np.arange(len(tiles)) if rows is None else np.asarray(rows, int)
        scores = np.full((len(tiles), len(self.class_names)), np.nan, np.float32)
        features = np.full(len(tiles), None, object)
        if answers:
            scores[where] = self.calibrated(torch.cat([answer.logits for answer in answers]))
        if answers and self.wants_features:
            found = torch.cat([answer.features for answer in answers if answer.features is not None]).cpu().numpy()
            for row, values in zip(where, found, strict=True):
                features[row] = values
        columns: dict[str, Any] = {PROBABILITY + name: scores[:, c] for c, name in enumerate(self.class_names)}
        if self.class_names:
            columns["seen"] = self.seen(tiles["patient_id"], tiles["film"] if "film" in tiles else tiles["image_id"])
        columns["reason"] = reasons
        columns |= {FEATURES: features} if self.wants_features else {}
        return pd.concat([tiles.reset_index(drop=True), pd.DataFrame(columns, index=range(len(tiles)))], axis=1)


def load_predictor(
    path: Path, config: EmbedConfig, runtime: Runtime | None = None, *, features_only: bool = False
) -> Predictor:
    """Load a checkpoint for prediction.

    Parameters
    ----------
    path
        A classifier's; for features, a BYOL model's will do as well.
    config
        The options: an :class:`InferConfig` unless only features are wanted.
    runtime
        Device, precision and processes; None resolves them from `config` for one process.
    features_only
        Leave the classes out.

    Raises
    ------
    BadInput
        The file is no such checkpoint.
    """
    runtime = runtime or resolve_runtime(config)
    kind = None if features_only else "classifier"
    checkpoint = load_checkpoint(path, kind)
    names: list[str] = []
    calibrations: Calibrations = {}
    wants_features = features_only
    with entries_of(path, kind):
        restore = restore_classifier if checkpoint["kind"] == "classifier" else restore_byol
        model = place(restore(checkpoint, path), runtime.device).eval()
        if isinstance(config, InferConfig):
            names = list(checkpoint["class_names"])
            calibrations = _with_options(stored_calibrations(checkpoint), config)
            wants_features = config.embeddings
        record, fitted_on = checkpoint["preprocessing"], fitted_subjects(checkpoint)
    network: Any = Network(model, _DTYPES[runtime.precision], with_head=not features_only).eval()
    if config.compiles(runtime.device.type):
        if runtime.device.type == "cpu":
            from torch._inductor import config as inductor

            # Frozen weights are laid out once, and what follows a convolution becomes part of it. As an option of
            # torch.compile it comes too late to do anything.
            inductor.freezing = True
        network = torch.compile(network)
    sha256 = sha256_file(path)
    return Predictor(model, network, names, record, runtime, config, calibrations, fitted_on, sha256, wants_features)


def _with_options(calibrations: Calibrations, config: InferConfig) -> Calibrations:
    """Return calibrations with ``--temperature`` and ``--threshold`` applied.

    A temperature moves the thresholds of tiles along, so that the same tiles are found. The scores of images and breasts were
    calibrated on other probabilities of tiles, so those calibrations no longer apply.
    """
    if config.temperature is not None:
        tile = calibrations[TILE][PROB]
        at = [None if t is None else (logit(t) - tile.intercept[c]) / tile.slope[c] for c, t in enumerate(tile.thresholds)]
        moved = [None if z is None else float(expit(z / config.temperature)) for z in at]
        calibrations = {TILE: {PROB: Calibration.of_temperature(config.temperature, moved)}}
    if config.threshold is not None:
        calibrations = {
            level: {score: replace(c, thresholds=(config.threshold,) * len(c.thresholds)) for score, c in scores.items()}
            for level, scores in calibrations.items()
        }
    return calibrations


def with_tiles_as_images(predictor: Predictor) -> Predictor:
    """Return the predictor for tiles that come as image files: each is an image of one tile, with the tiles' thresholds."""
    tile = predictor.calibrations[TILE][PROB]
    identity = replace(tile, slope=np.ones_like(tile.slope), intercept=np.zeros_like(tile.intercept))
    assert isinstance(predictor.config, InferConfig)
    scores = dict.fromkeys((MAX, TOP.format(predictor.config.top_tiles), NOISY_OR), identity)
    return replace(predictor, calibrations={TILE: predictor.calibrations[TILE], IMAGE: scores})


def loader_options(predictor: Predictor) -> dict[str, Any]:
    """Return how the loader makes tiles as the model knows them."""
    record, runtime = predictor.preprocessing, predictor.runtime
    return {
        "batch_size": predictor.config.batch_size,
        "tile_size": record["tile_size"],
        "mean": record["mean"],
        "std": record["std"],
        "view_size": record.get("view_size"),
        "dtype": "float16" if runtime.precision == "fp16" else "float32",
        "device": "gpu" if runtime.device.type == "cuda" else "cpu",
        "num_threads": predictor.config.num_workers,
        "keep_memory": False,  # a loader a shard, for hours
    }
