"""Metrics and plots of predictions that are joined to their labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mammostream.common.files import write_json
from mammostream.train.evaluate.doubts import seen_counts, warnings
from mammostream.train.evaluate.matching import Matched
from mammostream.train.evaluate.metrics import ExtraFigure, evaluate_predictions
from mammostream.train.evaluate.pictures import draw_precision_recall, draw_reliability, draw_roc
from mammostream.train.evaluate.reading import Predictions
from mammostream.train.levels.calibration import PROB, TILE


@dataclass(frozen=True)
class Further:
    """What is asked for besides the figures that every evaluation has.

    Attributes
    ----------
    extra
        Further figures of each class.
    sections
        Further parts of ``metrics.json``, by their keys.
    lines
        The same for the console.
    pictures
        File name -> what draws it to a path.
    """

    extra: Sequence[ExtraFigure] = ()
    sections: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    pictures: dict[str, Callable[[Path], None]] = field(default_factory=dict)


def choose_thresholds(
    predictions: Predictions, class_names: Sequence[str], level: str, threshold: float | None = None
) -> tuple[list[float | None], str]:
    """Return one threshold per class (None where none was fitted) and where they come from, in words.

    The one that is given wins, then those of the level and score that the model or the predictions record, else 0.5. Thresholds
    of tiles do not hold for images and breasts: of many tiles, the highest is above them in almost any image.

    Parameters
    ----------
    predictions
        See :func:`mammostream.train.evaluate.reading.read_predictions` and
        :func:`mammostream.train.evaluate.reading.with_model`.
    class_names
        The classes that are judged.
    level
        What is judged: ``tile``, ``image``, ``breast`` or ``patient``.
    threshold
        One for all classes.
    """
    if threshold is not None:
        return [threshold] * len(class_names), "--threshold"
    found = predictions.calibration(level, PROB if level == TILE else predictions.score, class_names)
    found = found or predictions.calibration(level, PROB, class_names)  # of a level that has one score only
    if found is not None:
        return list(found.thresholds), predictions.source
    if predictions.threshold is not None:
        return [predictions.threshold] * len(class_names), predictions.source
    if predictions.tile_thresholds and level == TILE:
        return [predictions.tile_thresholds.get(name) for name in class_names], predictions.source
    recorded = predictions.calibrations or predictions.tile_thresholds
    why = f"; {predictions.source} has thresholds of tiles only, which do not hold for {level}s" if recorded else ""
    return [None] * len(class_names), f"none fitted: 0.5{why}"


def evaluate(
    matched: Matched,
    thresholds: Sequence[float | None],
    bootstrap: int = 1000,
    output_dir: Path | None = None,
    further: Further | None = None,
) -> dict[str, Any]:
    """Return the figures of matched predictions; write them and their pictures where a folder is given.

    The folder gets ``metrics.json``, ``roc.png``, ``precision_recall.png`` and ``reliability.png``, and the pictures of what
    `further` asks for.

    Returns
    -------
    dict
        See :func:`mammostream.train.evaluate.metrics.evaluate_predictions`; with ``level``, ``counts`` and ``warnings`` of
        `matched`, ``left_out`` in each class, and ``seen``, the rows and patients that the model was fitted on.
    """
    data = matched.labels, matched.probabilities, matched.class_names
    further = further or Further()
    metrics = evaluate_predictions(*data, matched.patients, thresholds, bootstrap, extra=further.extra)
    for name, figures in metrics["per_class"].items():
        figures["left_out"] = matched.left_out[name]
    metrics |= {"level": matched.level, "counts": matched.counts, "warnings": warnings(matched), "seen": seen_counts(matched)}
    metrics |= further.sections
    if output_dir is not None:
        write_json(output_dir / "metrics.json", metrics)
        draw_roc(*data, output_dir / "roc.png")
        draw_precision_recall(*data, output_dir / "precision_recall.png")
        draw_reliability(*data, output_dir / "reliability.png")
        for name, draw in further.pictures.items():
            draw(output_dir / name)
    return metrics


def table_lines(metrics: Mapping[str, Any], extra: Sequence[ExtraFigure] = ()) -> list[str]:
    """Return the figures, with the extra ones, as a table for the console."""
    columns: dict[str, tuple[str, str | None]] = {
        "AUC": ("auc", "mean_auc"),
        "AP": ("ap", "mean_ap"),
        "bal. acc.": ("balanced_accuracy", None),
        "sens. at 90 % spec.": ("sensitivity_at_90_specificity", None),
        "Brier": ("brier", "brier"),
        "ECE": ("ece", "ece"),
    }
    columns |= {figure.title: (figure.name, None) for figure in extra}
    rows = [["class", *columns, "threshold", "positive", "left out"]]
    for name, figures in metrics["per_class"].items():
        cells = [_cell(figures, figure) for figure, _ in columns.values()]
        known = figures["positives"] + figures["negatives"]
        rows.append([name, *cells, f"{figures['threshold']:.3f}", f"{figures['positives']} of {known}", _left_out(figures)])
    rows.append(["mean", *(_cell(metrics, mean) if mean else "" for _, mean in columns.values()), "", "", ""])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [*lines, f"exact match {_cell(metrics, 'exact_match')}"]


def _left_out(figures: Mapping[str, Any]) -> str:
    positives, negatives = (sum(figures["left_out"][kind].values()) for kind in ("positives", "negatives"))
    return f"{positives} pos., {negatives} neg." if positives or negatives else "0"


def _cell(figures: Mapping[str, Any], name: str) -> str:
    if figures[name] is None:
        return "undefined"
    interval = figures["intervals"].get(name)
    return f"{figures[name]:.3f}" + (f" ({interval[0]:.3f}-{interval[1]:.3f})" if interval else "")
