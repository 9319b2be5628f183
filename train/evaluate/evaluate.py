"""Metrics and plots of predictions that are joined to their labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mammostream.common.errors import BadInput
from mammostream.common.files import sha256_file, write_json
from mammostream.train.evaluate.matching import Matched, Predictions
from mammostream.train.evaluate.metrics import evaluate_predictions
from mammostream.train.evaluate.pictures import draw_precision_recall, draw_reliability, draw_roc


def choose_thresholds(
    predictions: Predictions, class_names: Sequence[str], threshold: float | None, model_path: Path | None
) -> tuple[list[float | None], str]:
    """Return one threshold per class (None where none was fitted) and where they come from, in words.

    The one that is given wins, then those of the model's checkpoint, then those that the predictions record, else 0.5.

    Raises
    ------
    BadInput
        The model is not the one that predicted, or is not a classifier.
    """
    if threshold is not None:
        return [threshold] * len(class_names), "--threshold"
    if model_path is not None:
        if predictions.model_sha256 not in (None, sha256_file(model_path)):
            raise BadInput(f"the predictions are not of {model_path}: its hash is another; give the model that predicted")
        from mammostream.models.checkpoints import load_checkpoint  # needs torch, which nothing else here does

        checkpoint = load_checkpoint(model_path, "classifier")
        fitted = dict(zip(checkpoint["class_names"], checkpoint.get("thresholds") or (), strict=False))
        return [fitted.get(name) for name in class_names], str(model_path)
    if predictions.thresholds:
        return [predictions.thresholds.get(name) for name in class_names], "the predictions"
    return [None] * len(class_names), "none fitted: 0.5"


def evaluate(
    matched: Matched, thresholds: Sequence[float | None], bootstrap: int = 1000, output_dir: Path | None = None
) -> dict[str, Any]:
    """Return the figures of matched predictions; write them and their pictures where a folder is given.

    The folder gets ``metrics.json``, ``roc.png``, ``precision_recall.png`` and ``reliability.png``.

    Returns
    -------
    dict
        See :func:`mammostream.train.evaluate.metrics.evaluate_predictions`; with ``level`` and ``counts`` of `matched`.
    """
    data = matched.labels, matched.probabilities, matched.class_names
    metrics = evaluate_predictions(*data, matched.patients, thresholds, bootstrap)
    metrics |= {"level": matched.level, "counts": matched.counts}
    if output_dir is not None:
        write_json(output_dir / "metrics.json", metrics)
        draw_roc(*data, output_dir / "roc.png")
        draw_precision_recall(*data, output_dir / "precision_recall.png")
        draw_reliability(*data, output_dir / "reliability.png")
    return metrics


def table_lines(metrics: Mapping[str, Any]) -> list[str]:
    """Return the figures as a table for the console."""
    columns = {
        "AUC": ("auc", "mean_auc"),
        "AP": ("ap", "mean_ap"),
        "bal. acc.": ("balanced_accuracy", None),
        "sens. at 90 % spec.": ("sensitivity_at_90_specificity", None),
        "Brier": ("brier", "brier"),
        "ECE": ("ece", "ece"),
    }
    rows = [["class", *columns, "threshold", "positive"]]
    for name, figures in metrics["per_class"].items():
        cells = [_cell(figures, figure) for figure, _ in columns.values()]
        known = figures["positives"] + figures["negatives"]
        rows.append([name, *cells, f"{figures['threshold']:.3f}", f"{figures['positives']} of {known}"])
    rows.append(["mean", *(_cell(metrics, mean) if mean else "" for _, mean in columns.values()), "", ""])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [*lines, f"exact match {_cell(metrics, 'exact_match')}"]


def _cell(figures: Mapping[str, Any], name: str) -> str:
    if figures[name] is None:
        return "undefined"
    interval = figures["intervals"].get(name)
    return f"{figures[name]:.3f}" + (f" ({interval[0]:.3f}-{interval[1]:.3f})" if interval else "")
