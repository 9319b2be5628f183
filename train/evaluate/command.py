"""``mammostream evaluate``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from mammostream.common.errors import BadInput
from mammostream.common.files import write_yaml
from mammostream.common.options import Command, ListOption, config_file_option, resolved, split_commas

FILE = click.Path(path_type=Path)


def _score(ctx: click.Context, param: click.Parameter, value: str) -> str:
    if not re.fullmatch(r"max|noisy_or|top[1-9]\d*", value):
        raise BadInput(f"--score {value} is none of max, noisy_or and top3 (or another number)")
    return value


@click.command(cls=Command)
@click.option("--predictions", "predictions_path", type=FILE, required=True, help="Parquet, CSV or JSON that 'infer' wrote.")
@click.option(
    "--labels",
    "labels_path",
    type=FILE,
    required=True,
    help="CSV or Parquet of tile_path, image_id, or patient_id and laterality, and one 0/1 column a class; empty = no label.",
)
@click.option("--output-dir", type=FILE, help="Folder for metrics.json and the plots.")
@click.option("--model-path", type=FILE, help="The classifier that predicted, for its thresholds and calibrations.")
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1),
    help="Probability from which each class counts as found; default: the model's, else those in the predictions, else 0.5.",
)
@click.option(
    "--score",
    default="max",
    callback=_score,
    help="An image's or breast's probability: max, its highest tile's; top3 (or another number), the mean of its three "
    "highest; or noisy_or.",
)
@click.option("--patient-column", default="patient_id", help="Column of --labels, where the predictions name no patient.")
@click.option(
    "--bootstrap", type=click.IntRange(min=0), default=1000, help="Resamples of patients for the 95 % intervals; 0 = none."
)
@click.option(
    "--compare-with",
    type=FILE,
    help="Another model's predictions of the same cases: differences, intervals and p-values (DeLong's test of AUCs, paired "
    "bootstrap over patients).",
)
@click.option(
    "--findings",
    type=FILE,
    help="findings.parquet: FROC against its boxes, sensitivity at 0.25, 0.5, 1 and 2 false positives per image.",
)
@click.option(
    "--froc-marks",
    type=click.Choice(["tiles", "peaks"]),
    help="What marks a place for --findings: tiles (default), or the peaks of the heat map that the tiles blend to.",
)
@click.option(
    "--by",
    cls=ListOption,
    callback=split_commas,
    help="Columns to divide the cases by, as density view age; numbers in bands, for which age:40/50/60 gives the edges.",
)
@click.option(
    "--by-table",
    type=FILE,
    help="CSV or Parquet by image_id, patient_id (and laterality) or tile_path with the columns of --by; default: --labels.",
)
@click.option(
    "--at",
    cls=ListOption,
    callback=split_commas,
    help="Operating points, as sensitivity=0.9 specificity=0.95; their thresholds are chosen with --choose-on, else on the "
    "rows of split val, else on the judged rows, with a warning.",
)
@click.option("--choose-on", type=FILE, help="Predictions of validation patients, on which --at chooses its thresholds.")
@click.option("--choose-labels", type=FILE, help="Labels of --choose-on; default: --labels.")
@click.option(
    "--partial-auc",
    cls=ListOption,
    callback=split_commas,
    help="Standardised areas under a part of the ROC curve, as specificity=0.9 (from there to 1) or sensitivity=0.8.",
)
@click.option("--pf1/--no-pf1", default=False, help="Probabilistic F1 score, the metric of the RSNA 2022 challenge.")
@config_file_option
@click.pass_context
def evaluate(
    ctx: click.Context,
    /,
    predictions_path: Path,
    labels_path: Path,
    output_dir: Path | None,
    model_path: Path | None,
    threshold: float | None,
    score: str,
    patient_column: str,
    bootstrap: int,
    **asked: Any,
) -> None:
    """Compare predictions with labels: AUC, AP, balanced accuracy, sensitivity at 90 % specificity, Brier score, ECE.

    Tiles, images or breasts, as both files name them; 95 % intervals over patients. A breast or image with several rows of
    labels is positive if one is. What is not judged is counted by class and reason; more than 5 % of a class, and patients that
    the model was fitted on, are warned of first. Writes metrics.json, roc.png, precision_recall.png and reliability.png; and
    comparison.png, froc.png and subgroups.png where they are asked for.
    """
    from mammostream.train.evaluate.doubts import warnings
    from mammostream.train.evaluate.evaluate import choose_thresholds, table_lines
    from mammostream.train.evaluate.evaluate import evaluate as run
    from mammostream.train.evaluate.further import Asked, look_further
    from mammostream.train.evaluate.matching import match_labels
    from mammostream.train.evaluate.reading import read_predictions, with_model

    wishes = Asked.read(predictions_path, labels_path, patient_column, score, threshold, bootstrap, model_path, **asked)
    predictions = read_predictions(predictions_path, score)
    if model_path is not None:
        predictions = with_model(predictions, model_path)
    matched = match_labels(predictions, labels_path, patient_column, score)
    thresholds, source = choose_thresholds(predictions, matched.class_names, matched.level, threshold)
    for warning in warnings(matched):
        click.echo(warning)
    for note in matched.notes:
        click.echo(note, err=True)
    further = look_further(wishes, predictions, matched, thresholds)
    metrics = run(matched, thresholds, bootstrap, output_dir, further)
    for line in table_lines(metrics, further.extra):
        click.echo(line)
    click.echo(f"{metrics['rows']} {metrics['level']}s of {metrics['patients']} patients; thresholds: {source}")
    for line in further.lines:
        click.echo(line)
    if output_dir is not None:
        asked_for = {name: value for name, value in resolved(ctx).items() if value or name not in asked}
        write_yaml(output_dir / "config.yaml", asked_for)
        click.echo(f"metrics.json and plots -> {output_dir}")
