"""A network that predicts batches of tiles, with the thresholds and the temperature of its checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from mammostream.models.checkpoints import load_checkpoint, restore_byol, restore_classifier
from mammostream.models.classifier import MammogramClassifier
from mammostream.models.folding import fold_batch_norms
from mammostream.models.tensors import place
from mammostream.train.predict.aggregation import PROBABILITY
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
    temperature
        What logits are divided by, see :func:`mammostream.train.evaluate.metrics.fit_temperature`.
    thresholds
        Class -> the probability from which it counts as found.
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
    temperature: float
    thresholds: dict[str, float]
    sha256: str
    wants_features: bool

    @property
    def feature_dim(self) -> int:
        """Length of the features of an answer; 0 where it holds none."""
        return feature_dim(self.model.backbone) if self.wants_features else 0

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
        """Return the probabilities of logits (N, C)."""
        return torch.sigmoid(logits.float().cpu() / self.temperature).numpy()

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
            The rows.
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
        columns = {PROBABILITY + name: scores[:, c] for c, name in enumerate(self.class_names)} | {"reason": reasons}
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
    checkpoint = load_checkpoint(path, None if features_only else "classifier")
    restore = restore_classifier if checkpoint["kind"] == "classifier" else restore_byol
    model = place(restore(checkpoint, path), runtime.device).eval()
    network: Any = Network(model, _DTYPES[runtime.precision], with_head=not features_only).eval()
    if config.compiles(runtime.device.type):
        if runtime.device.type == "cpu":
            from torch._inductor import config as inductor

            # Frozen weights are laid out once, and what follows a convolution becomes part of it. As an option of
            # torch.compile it comes too late to do anything.
            inductor.freezing = True
        network = torch.compile(network)
    names: list[str] = []
    temperature, thresholds, wants_features = 1.0, {}, features_only
    if isinstance(config, InferConfig):
        names = list(checkpoint["class_names"])
        fitted = float(checkpoint.get("temperature") or 1.0)
        temperature = fitted if config.temperature is None else config.temperature
        thresholds = _thresholds(checkpoint, names, config.threshold, fitted / temperature)
        wants_features = config.embeddings
    record, sha256 = checkpoint["preprocessing"], sha256_file(path)
    return Predictor(model, network, names, record, runtime, config, temperature, thresholds, sha256, wants_features)


def _thresholds(checkpoint: dict[str, Any], names: Sequence[str], threshold: float | None, stretch: float) -> dict[str, float]:
    """Return the threshold of each class: the one that is given, else the checkpoint's, else 0.5.

    The checkpoint's belong to probabilities of its own temperature; those of another have their logits stretched.
    """
    if threshold is not None:
        return dict.fromkeys(names, threshold)
    fitted = dict(zip(names, checkpoint.get("thresholds") or (), strict=False))
    moved = {name: float(expit(logit(t) * stretch)) for name, t in fitted.items() if t is not None}
    return {name: moved.get(name, 0.5) for name in names}


def loader_options(predictor: Predictor) -> dict[str, Any]:
    """Return how the loader makes tiles as the model knows them."""
    record, runtime = predictor.preprocessing, predictor.runtime
    return {
        "batch_size": predictor.config.batch_size,
        "tile_size": record["tile_size"],
        "mean": record["mean"],
        "std": record["std"],
        "dtype": "float16" if runtime.precision == "fp16" else "float32",
        "device": "gpu" if runtime.device.type == "cuda" else "cpu",
        "num_threads": predictor.config.num_workers,
        "keep_memory": False,  # a loader a shard, for hours
    }
