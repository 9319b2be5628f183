"""Validation: logits of the validation tiles, the thresholds and temperature fitted on them, and the metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from mammostream.dali_pipelines import LabelledLoader
from mammostream.models.classifier import MammogramClassifier
from mammostream.train.classify.step import TrainingState
from mammostream.train.evaluate.metrics import (
    calibrate,
    classification_metrics,
    evaluate_predictions,
    fit_temperature,
    fit_thresholds,
)
from mammostream.train.run.labels import LabelledTiles
from mammostream.train.run.runtime import Runtime


@dataclass(frozen=True)
class Validation:
    """The result of a validation."""

    metrics: dict[str, Any]
    """By name, in all processes."""
    logits: np.ndarray | None = None
    """(N, C), in the main process."""
    decisions: dict[str, Any] = field(default_factory=dict)
    """``temperature`` and ``thresholds``, which turn logits into decisions; in the main process."""

    @property
    def score(self) -> float:
        """Selects the best epoch, higher is better: the mean AUC, or the negative loss if no class has an AUC."""
        mean_auc = self.metrics["mean_auc"]
        return float(-self.metrics["val_loss"] if mean_auc is None else mean_auc)


@torch.no_grad()
def predict(model: MammogramClassifier, loader: LabelledLoader, tiles: LabelledTiles, runtime: Runtime) -> np.ndarray | None:
    """Return (N, C) logits in the order of ``tiles.numbers``, from all processes; None outside the main one."""
    model.eval()
    rows: list[np.ndarray] = []
    values: list[np.ndarray] = []
    for batch, numbers in loader:
        with runtime.autocast():
            logits = model.classify(batch)
        rows.append(tiles.rows(numbers).numpy())
        values.append(logits.float().cpu().numpy())
    gathered = runtime.gather((np.concatenate(rows), np.concatenate(values)))
    if not runtime.is_main:
        return None
    found = np.full(tiles.labels.shape, np.nan, np.float32)
    for its_rows, its_values in gathered:
        found[its_rows] = its_values
    return found


def validate(
    state: TrainingState, loader: LabelledLoader, tiles: LabelledTiles, class_names: Sequence[str], runtime: Runtime
) -> Validation:
    """Predict the validation tiles, fit temperature and thresholds on them, and compute the metrics."""
    runtime.share_buffers(state.evaluated)
    logits = predict(state.evaluated, loader, tiles, runtime)
    if logits is None:
        return Validation(runtime.from_main({}))
    labels = torch.from_numpy(tiles.labels).to(runtime.device)
    losses = state.loss(torch.from_numpy(logits).to(runtime.device), labels)
    temperature = fit_temperature(tiles.labels, logits)
    probabilities = calibrate(logits, temperature)
    decisions: dict[str, Any] = {"temperature": temperature, "thresholds": fit_thresholds(tiles.labels, probabilities)}
    metrics = {"val_loss": float(losses.sum() / (~labels.isnan()).sum())}
    metrics |= classification_metrics(tiles.labels, probabilities, class_names, decisions["thresholds"])
    return Validation(runtime.from_main(metrics), logits, decisions)


def with_intervals(found: Validation, tiles: LabelledTiles, class_names: Sequence[str]) -> dict[str, Any]:
    """Return the metrics with intervals over patients, or over films, and the number of both (main process only)."""
    assert found.logits is not None
    known = set(tiles.patients) - {""}
    by_patient = len(known) > 1 and (tiles.patients != "").all()
    metrics = evaluate_predictions(
        tiles.labels,
        calibrate(found.logits, found.decisions["temperature"]),
        class_names,
        tiles.patients if by_patient else tiles.groups,
        found.decisions["thresholds"],
    )
    counts = {"films": len(np.unique(tiles.groups)), "patients": len(known)}
    return metrics | counts | {"intervals_over": "patients" if by_patient else "films"}


def summarise(runs: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Return mean, standard deviation (of the sample, n - 1) and values over seeds of each metric, undefined ones as None.

    Parameters
    ----------
    runs
        Seed -> metrics as :func:`finetune` returns them.
    """

    def spread(values: list[float | None]) -> dict[str, Any]:
        known = [value for value in values if value is not None]
        defined = len(known) == len(values)
        return {
            "mean": float(np.mean(known)) if defined else None,
            "sd": float(np.std(known, ddof=1)) if defined and len(known) > 1 else None,
            "values": values,
        }

    metrics = list(runs.values())
    return {
        "seeds": list(runs),
        **{name: spread([m[name] for m in metrics]) for name in ("mean_auc", "mean_ap", "exact_match", "val_loss")},
        "per_class": {
            name: {figure: spread([m["per_class"][name][figure] for m in metrics]) for figure in ("auc", "ap")}
            for name in metrics[0]["per_class"]
        },
    }
