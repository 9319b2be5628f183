"""What an evaluation gives on request: a comparison, FROC, subgroups, operating points and further figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

from mammostream.common.errors import BadInput
from mammostream.train.evaluate.compare import compare, comparison_lines
from mammostream.train.evaluate.doubts import warnings
from mammostream.train.evaluate.evaluate import Further, choose_thresholds
from mammostream.train.evaluate.figures import PartialAUC, Point, ProbabilisticF1, read_points
from mammostream.train.evaluate.froc import froc, froc_lines, tile_marks
from mammostream.train.evaluate.matching import Matched, match_labels
from mammostream.train.evaluate.metrics import ExtraFigure
from mammostream.train.evaluate.operating import choose_on, operating_lines, operating_points
from mammostream.train.evaluate.peaks import peak_marks
from mammostream.train.evaluate.pictures import draw_comparison, draw_froc, draw_subgroups
from mammostream.train.evaluate.reading import Predictions, read_predictions, with_model
from mammostream.train.evaluate.subgroups import Wanted, groups_of, judge_subgroups, read_columns, subgroup_lines


@dataclass(frozen=True)
class Asked:
    """What is asked for on the command line; the options are explained there."""

    predictions_path: Path
    labels_path: Path
    patient_column: str
    score: str
    threshold: float | None
    bootstrap: int
    model_path: Path | None
    compare_with: Path | None
    findings: Path | None
    froc_marks: str | None
    by: Sequence[Wanted]
    by_table: Path | None
    at: Sequence[Point]
    choose_on: Path | None
    choose_labels: Path | None
    extra: Sequence[ExtraFigure]

    @classmethod
    def read(
        cls,
        predictions_path: Path,
        labels_path: Path,
        patient_column: str = "patient_id",
        score: str = "max",
        threshold: float | None = None,
        bootstrap: int = 1000,
        model_path: Path | None = None,
        *,
        compare_with: Path | None = None,
        findings: Path | None = None,
        froc_marks: str | None = None,
        by: Sequence[str] = (),
        by_table: Path | None = None,
        at: Sequence[str] = (),
        choose_on: Path | None = None,
        choose_labels: Path | None = None,
        partial_auc: Sequence[str] = (),
        pf1: bool = False,
    ) -> Self:
        """Read and check the options.

        Raises
        ------
        BadInput
            An option that cannot be read, or that needs another one.
        """
        for flag, value, needed, there in (
            ("--froc-marks", froc_marks, "--findings", findings),
            ("--by-table", by_table, "--by", by),
            ("--choose-on", choose_on, "--at", at),
            ("--choose-labels", choose_labels, "--choose-on", choose_on),
        ):
            if value and not there:
                raise BadInput(f"{flag} {value} serves {needed}; give that, too, or leave it out")
        parts = [PartialAUC(point) for point in read_points(partial_auc, "--partial-auc", with_one=False)]
        return cls(
            predictions_path,
            labels_path,
            patient_column,
            score,
            threshold,
            bootstrap,
            model_path,
            compare_with,
            findings,
            froc_marks,
            read_columns(by),
            by_table,
            read_points(at, "--at", with_one=True),
            choose_on,
            choose_labels,
            [*([ProbabilisticF1()] if pf1 else []), *parts],
        )


def look_further(asked: Asked, predictions: Predictions, matched: Matched, thresholds: Sequence[float | None]) -> Further:
    """Return what is asked for besides the figures of every evaluation.

    Parameters
    ----------
    asked
        See there.
    predictions, matched, thresholds
        What is evaluated.

    Raises
    ------
    BadInput
        A file that cannot be read or does not fit.
    """
    further = Further(asked.extra)
    if asked.at:
        validation = None if asked.choose_on is None else _matched(asked, asked.choose_on, "--choose-on")[1]
        choice = choose_on(matched, validation, str(asked.choose_on))
        found = operating_points(matched, choice, asked.at, asked.bootstrap)
        further.sections["operating_points"] = found
        further.lines.extend(operating_lines(found))
    if asked.compare_with is not None:
        _compare(asked, asked.compare_with, matched, thresholds, further)
    if asked.by:
        groups = groups_of(matched, asked.by_table or asked.labels_path, asked.by)
        subgroups = judge_subgroups(matched, groups, thresholds, asked.bootstrap, asked.extra)
        further.sections["subgroups"] = subgroups
        further.lines.extend(subgroup_lines(subgroups))
        further.pictures["subgroups.png"] = partial(draw_subgroups, subgroups)
    if asked.findings is not None:
        peaks = asked.froc_marks == "peaks"
        files = asked.labels_path, asked.findings, asked.patient_column
        metrics, curves = froc(predictions, *files, asked.bootstrap, peak_marks if peaks else tile_marks)
        further.sections["froc"] = metrics
        further.lines.extend(froc_lines(metrics, "FROC of the heat maps' peaks" if peaks else "FROC"))
        further.pictures["froc.png"] = partial(draw_froc, curves)
    return further


def _compare(asked: Asked, path: Path, matched: Matched, thresholds: Sequence[float | None], further: Further) -> None:
    predictions, other = _matched(asked, path, "--compare-with")
    its_thresholds, source = choose_thresholds(predictions, other.class_names, other.level, asked.threshold)
    limits, names = (thresholds, its_thresholds), (asked.predictions_path, path)
    comparison, data = compare(matched, other, limits, names, asked.bootstrap, asked.extra)
    doubts = warnings(other)
    further.sections["comparison"] = comparison | {"warnings": doubts}
    further.lines.extend(f"{path}: {doubt}" for doubt in doubts)
    further.lines.extend(comparison_lines(comparison))
    further.lines.append(f"  thresholds of the second: {source}")
    further.pictures["comparison.png"] = partial(draw_comparison, *data)


def _matched(asked: Asked, path: Path, flag: str) -> tuple[Predictions, Matched]:
    """Return other predictions and their labels; those of --choose-on are of the model that is evaluated."""
    same_model = flag == "--choose-on"
    labels = asked.choose_labels if same_model and asked.choose_labels else asked.labels_path
    try:
        predictions = read_predictions(path, asked.score)
        if same_model and asked.model_path is not None:
            predictions = with_model(predictions, asked.model_path)
        return predictions, match_labels(predictions, labels, asked.patient_column, asked.score)
    except BadInput as error:
        raise BadInput(f"{flag}: {error}") from error
