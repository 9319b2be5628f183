"""What a training or a prediction of heads comes to: calibrated probabilities, figures, tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from mammostream.common.files import write_parquet
from mammostream.models.checkpoints import entries_of, load_checkpoint
from mammostream.models.tensors import load_state
from mammostream.shards.identity import fitted_subjects, seen_by
from mammostream.train.aggregate.bags import Bags
from mammostream.train.aggregate.config import AggregateConfig
from mammostream.train.aggregate.training import bag_logits, build_heads, named_heads
from mammostream.train.evaluate.metrics import evaluate_predictions
from mammostream.train.levels.aggregation import PROBABILITY
from mammostream.train.levels.calibration import PROB, Calibration


class Aggregator:
    """The trained heads of a checkpoint.

    Parameters
    ----------
    path
        A ``final_aggregator.pth``.
    device
        Where they compute.

    Raises
    ------
    BadInput
        The file is no such checkpoint, or one of an unfinished training.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        checkpoint = load_checkpoint(path, "aggregator")
        with entries_of(path, "aggregator"):
            self.config = AggregateConfig(**checkpoint["config"])
            self.class_names: list[str] = list(checkpoint["class_names"])
            self.checkpoint: Mapping[str, Any] = checkpoint
            self.fitted_on = fitted_subjects(checkpoint)
            self.calibrations = {name: Calibration.of_dict(c) for name, c in checkpoint["calibration"].items()}
            heads = build_heads(checkpoint["feature_dim"], len(self.class_names), self.config)
            load_state(heads, checkpoint["model_state_dict"], f"checkpoint {path}")
        self._heads, self._device = named_heads(heads.to(device)), device

    @property
    def poolings(self) -> list[str]:
        """The names of the heads."""
        return list(self._heads)

    def predict(self, bags: Bags, pooling: str) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the calibrated probabilities (B, C) of bags, and the attention (N, A) of their tiles in ``bags.order``."""
        logits, weights = bag_logits(self._heads[pooling], bags, self.config.batch_size, self._device)
        return self.calibrations[pooling](logits), weights

    def facts(self, pooling: str) -> dict[str, Any]:
        """Return what a table of predictions records: by what they were made, and the thresholds that ``evaluate`` takes."""
        return {
            "pooling": pooling,
            "model_sha256": self.checkpoint["features"]["model_sha256"],
            "class_names": self.class_names,
            "calibration": {self.config.level: {PROB: self.calibrations[pooling].as_dict()}},
        }


def judge_heads(bags: Bags, probabilities: Mapping[str, np.ndarray], class_names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the metrics of each pooling, with intervals over patients; bags of unknown patients stand for themselves."""
    patients = bags.names["patient_id"].to_numpy(str)
    alone = np.array([f"bag {n}" for n in range(len(bags))])
    groups = np.where(patients == "", alone, patients)
    return {name: evaluate_predictions(bags.labels, p, class_names, groups) for name, p in probabilities.items()}


def auc_table(figures: Mapping[str, Mapping[str, Any]], class_names: Sequence[str]) -> list[str]:
    """Return lines of a table: the AUC of each pooling and class, with its 95 % interval over patients."""

    def cell(found: Mapping[str, Any]) -> str:
        if found["auc"] is None:
            return "undefined"
        low_high = found["intervals"]["auc"]
        return f"{found['auc']:.3f}" + (f" ({low_high[0]:.3f}-{low_high[1]:.3f})" if low_high else "")

    rows = [["pooling", *class_names]]
    rows += [[name, *(cell(found["per_class"][c]) for c in class_names)] for name, found in figures.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(value.ljust(width) for value, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def write_predictions(
    path: Path,
    bags: Bags,
    probabilities: np.ndarray,
    aggregator: Aggregator,
    pooling: str,
) -> None:
    """Write a table of bags that ``evaluate`` reads: what names them, ``tiles``, ``prob:<class>``, ``seen``.

    Parameters
    ----------
    path
        The Parquet file.
    bags, probabilities
        B bags and their (B, C).
    aggregator, pooling
        What predicted.
    """
    names = bags.names
    films = names.get("image_id", names["patient_id"])
    columns: dict[str, Any] = {PROBABILITY + name: probabilities[:, c] for c, name in enumerate(aggregator.class_names)}
    frame = names.assign(tiles=bags.sizes, **columns, seen=seen_by(aggregator.fitted_on, names["patient_id"], films))
    table = pa.Table.from_pandas(pd.DataFrame(frame), preserve_index=False)
    write_parquet(path, table, aggregator.facts(pooling))


def write_attention(path: Path, bags: Bags, weights: np.ndarray, class_names: Sequence[str]) -> None:
    """Write the weight of each tile in its bag: one column ``attention``, or one per class where each has its own."""
    tiles = bags.features.tiles.iloc[bags.order][["key", "image_id", "x", "y"]].reset_index(drop=True)
    names = ["attention"] if weights.shape[1] == 1 else [f"attention:{name}" for name in class_names]
    frame = tiles.assign(**{name: weights[:, a] for a, name in enumerate(names)})
    write_parquet(path, pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata())
