"""Validation: logits of the validation tiles, the calibrations and thresholds fitted on them, and the metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from mammostream.dali_pipelines import LabelledLoader
from mammostream.models.classifier import MammogramClassifier
from mammostream.train.classify.step import TrainingState
from mammostream.train.evaluate.metrics import classification_metrics, evaluate_predictions
from mammostream.train.levels.aggregation import MAX
from mammostream.train.levels.calibration import BREAST, IMAGE, PROB, TILE, Calibrations, doubts
from mammostream.train.levels.fitting import Judged, TileLogits, cross_fitted, fit_levels, judge
from mammostream.train.run.labels import LabelledTiles
from mammostream.train.run.runtime import Runtime


@dataclass(frozen=True)
class Validation:
    """The result of a validation."""

    metrics: dict[str, Any]
    """By name, in all processes."""
    tiles: TileLogits | None = None
    """Logits and labels, in the main process."""
    calibrations: Calibrations = field(default_factory=dict)
    """What turns logits into probabilities and decisions, fitted on these tiles; in the main process."""

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
    """Predict the validation tiles, fit calibrations and thresholds on them, and compute the metrics of tiles."""
    runtime.share_buffers(state.evaluated)
    logits = predict(state.evaluated, loader, tiles, runtime)
    if logits is None:
        return Validation(runtime.from_main({}))
    labels = torch.from_numpy(tiles.labels).to(runtime.device)
    losses = state.loss(torch.from_numpy(logits).to(runtime.device), labels)
    rows = TileLogits(tiles.labels.astype(np.float64), logits, tiles.groups, tiles.breasts, tiles.people)
    calibrations = fit_levels(rows)
    calibration = calibrations[TILE][PROB]
    metrics = {"val_loss": float(losses.sum() / (~labels.isnan()).sum())}
    metrics |= classification_metrics(tiles.labels, calibration(logits), class_names, calibration.thresholds)
    return Validation(runtime.from_main(metrics), rows, calibrations)


def with_intervals(found: Validation, tiles: LabelledTiles, class_names: Sequence[str]) -> dict[str, Any]:
    """Return the metrics of tiles with intervals over patients, or over films, and those of images and breasts.

    Each level has ``cross_fitted``: the figures that depend on calibration and thresholds, from fits on other patients.
    In the main process only.
    """
    assert found.tiles is not None
    known = set(tiles.patients) - {""}
    by_patient = len(known) > 1 and (tiles.patients != "").all()
    of_tiles = tiles.patients if by_patient else tiles.groups
    judged = judge(found.tiles, found.calibrations)
    crossed, folds = cross_fitted(found.tiles)
    levels: dict[str, Any] = {}
    for (level, score), rows in judged.items():
        calibration = found.calibrations[level][score]
        groups = of_tiles if level == TILE else rows.groups
        figures = evaluate_predictions(rows.labels, rows.probabilities, class_names, groups, calibration.thresholds)
        for name, fit in zip(class_names, calibration.fits, strict=True):
            figures["per_class"][name]["calibration"] = fit
        if folds:
            figures["cross_fitted"] = _cross_fitted_figures(crossed[level, score], class_names) | {"folds": folds}
        levels.setdefault(level, {})[score] = figures
    metrics = levels.pop(TILE)[PROB]
    weak = {TILE: PROB, IMAGE: MAX, BREAST: MAX}
    metrics["weak_calibrations"] = [
        line
        for level, score in weak.items()
        if level in found.calibrations
        for line in doubts(found.calibrations[level][score], class_names, level)
    ]
    counts = {"films": len(np.unique(tiles.groups)), "patients": len(known), "levels": levels}
    return metrics | counts | {"intervals_over": "patients" if by_patient else "films"}


def _cross_fitted_figures(rows: Judged, class_names: Sequence[str]) -> dict[str, Any]:
    """Return the figures that a fit on the same data flatters, by class and over all, from fits on other patients."""
    # Their thresholds differ between folds, so decisions are judged as probabilities of 0 and 1.
    calibrated = classification_metrics(rows.labels, rows.probabilities, class_names)
    decided = classification_metrics(rows.labels, rows.found.astype(np.float64), class_names)
    per_class = {
        name: {figure: calibrated["per_class"][name][figure] for figure in ("brier", "ece")}
        | {figure: decided["per_class"][name][figure] for figure in ("accuracy", "balanced_accuracy")}
        for name in class_names
    }
    return {
        "per_class": per_class,
        "brier": calibrated["brier"],
        "ece": calibrated["ece"],
        "exact_match": decided["exact_match"],
    }
