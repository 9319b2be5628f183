"""``mammostream infer`` and ``mammostream embed``."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import click

from mammostream.common.errors import BadInput
from mammostream.common.options import Command, bad_limit, config_file_option, config_options, resolved
from mammostream.train.predict.config import EmbedConfig, InferConfig
from mammostream.train.predict.work import (
    FLAGS,
    Printing,
    check_bad,
    draw_sheets,
    facts_of,
    read_films,
    record_of,
    run_work,
    summary,
    work_on_images,
    work_on_shards,
)

FILE = click.Path(path_type=Path)
max_bad_option = click.option(
    "--max-bad",
    default="5%",
    help="Maximum number of tiles (of shards and tile images) or films that may fail, a number or a percentage; more than "
    "that ends with exit code 3.",
)


@click.command(cls=Command)
@click.option("--model-path", type=FILE, required=True, help="Classifier checkpoint that 'finetune' wrote.")
@click.option("--shards", "shards_dir", type=FILE, help="Predict the tiles of a shard directory, or of s3://bucket/prefix.")
@click.option("--split", type=click.Choice(["train", "val", "test"]), help="With --shards: this split only.")
@click.option("--image-path", type=FILE, help="Predict one film (DICOM or an image format) or one tile image.")
@click.option("--images-dir", type=FILE, help="Predict each film or tile image below a folder.")
@click.option("--follow-links", is_flag=True, help="With --images-dir: also search folders that are symbolic links.")
@click.option("--manifest", type=FILE, help="Predict each film of a manifest.")
@click.option(
    "--images-are",
    type=click.Choice(["auto", "films", "tiles"]),
    default="auto",
    help="What --image-path and --images-dir name; auto = tiles where no edge is longer than the model's tile.",
)
@click.option("--assume-spacing", type=click.FloatRange(0.01, 2), help="Pixel size in mm of films whose own is unknown.")
@click.option("--findings", type=FILE, help="findings.parquet, whose boxes are drawn on the heat maps.")
@click.option("--output-dir", type=FILE, help="Folder for the tables, contact sheets, and heat maps of films.")
@click.option("--output-json", type=FILE, help="JSON with the probabilities of each image.")
@click.option(
    "--format",
    "table_format",
    type=click.Choice(["parquet", "csv", "json"]),
    default="parquet",
    help="Of the tables in --output-dir; a CSV has no place for thresholds, hashes and versions.",
)
@click.option(
    "--sheet-tiles",
    type=click.IntRange(min=0),
    default=24,
    help="Draw this many of each class's highest tiles as a contact sheet in --output-dir; 0 = none.",
)
@click.option("--grad-cam/--no-grad-cam", default=False, help="Show on the contact sheets where in each tile the answer lies.")
@click.option(
    "--secondary-capture/--no-secondary-capture",
    default=False,
    help="Write each heat map also as DICOM Secondary Capture in its film's study. Films must be DICOM. THE CAPTURE NAMES THE "
    "PATIENT as its film does; the tables take only patient id, side and view from a DICOM header. Not for diagnostic use. "
    "Needs the extra 'dicom-out'.",
)
@max_bad_option
@config_options(InferConfig)
@config_file_option
@click.pass_context
def infer(
    ctx: click.Context,
    /,
    model_path: Path,
    shards_dir: Path | None,
    split: str | None,
    image_path: Path | None,
    images_dir: Path | None,
    follow_links: bool,
    manifest: Path | None,
    images_are: str,
    assume_spacing: float | None,
    findings: Path | None,
    output_dir: Path | None,
    output_json: Path | None,
    table_format: str,
    sheet_tiles: int,
    grad_cam: bool,
    secondary_capture: bool,
    max_bad: str,
    **options: Any,
) -> None:
    """Predict the tiles of shards, or raw films through the model's own preprocessing.

    Writes tables of tiles (predictions), images and breasts. An image's probability of a class comes from its highest tile
    (max), the mean of its highest few (top3), or noisy_or (1 - the product of 1 - p over its tiles), each calibrated on
    validation images. A tile or film that cannot be read becomes a row with its reason, and the rest continues. The column seen
    says whether the model was fitted on a row's patient.

    A stopped run resumes with the same command: finished parts lie in --output-dir/parts until the end. Several
    processes: torchrun --standalone --nproc-per-node N -m mammostream infer ...

    Exit codes: 0 done, 2 bad input, 3 done but more failed than --max-bad.
    """
    sources = {"--shards": shards_dir, "--image-path": image_path, "--images-dir": images_dir, "--manifest": manifest}
    given = [flag for flag, value in sources.items() if value is not None]
    if len(given) != 1:
        raise BadInput(f"give one of {', '.join(sources)}")
    if output_dir is None and output_json is None and image_path is None:
        raise BadInput("give --output-dir or --output-json: the predictions need a place")
    bad_limit(max_bad, 1)
    config = InferConfig(**options)
    if config.embeddings and (table_format == "csv" or output_dir is None):
        raise BadInput("--embeddings needs --output-dir and --format parquet or json: a CSV has no place for lists")
    if grad_cam and (output_dir is None or not sheet_tiles):
        raise BadInput("--grad-cam draws on contact sheets: give --output-dir and --sheet-tiles of at least 1")
    if secondary_capture and (output_dir is None or shards_dir is not None):
        raise BadInput("--secondary-capture writes heat maps of DICOM films: give films and --output-dir")
    from mammostream.shards.reading import open_shards

    shards = open_shards(shards_dir) if shards_dir else None
    from mammostream.train.predict.network import load_predictor
    from mammostream.train.run.runtime import PREDICTION_LOCK, join_processes, only_run

    with ExitStack() as stack:
        runtime = stack.enter_context(join_processes(config))
        if output_dir is not None:
            stack.enter_context(only_run(output_dir / PREDICTION_LOCK, runtime))
        predictor = load_predictor(model_path, config, runtime)
        if shards is not None:
            work = work_on_shards(predictor, shards, split, runtime)
        else:
            bad: list[dict[str, str]] = []  # image_id and reason of each image whose header cannot be read
            films = read_films(image_path, images_dir, manifest, assume_spacing, findings, bad, follow_links)
            work = work_on_images(predictor, films, images_are, sheet_tiles, output_dir, secondary_capture, given[0], runtime)
            work.bad.extend(bad)
        tables = {"format": table_format, "top_tiles": config.top_tiles, "thresholds": predictor.thresholds}
        draw = partial(draw_sheets, work, output_dir, sheet_tiles, grad_cam) if output_dir is not None and sheet_tiles else None
        printing = Printing(each_image=shards is None, single=image_path is not None)
        totals = run_work(work, output_dir, tables, output_json, printing, resolved(ctx), draw)
        if totals is None:
            return
        click.echo(summary(totals, work.unit, [path for path in (output_dir, output_json) if path]))
        if totals.warning:
            click.echo(totals.warning, err=True)
        check_bad(totals, work.unit, max_bad)


@click.command(cls=Command)
@click.option("--checkpoint", type=FILE, required=True, help="A checkpoint of 'pretrain' or 'finetune'.")
@click.option("--shards", "shards_dir", type=FILE, required=True, help="Shard directory, or s3://bucket/prefix.")
@click.option("--split", type=click.Choice(["train", "val", "test"]), help="This split only.")
@click.option("--output", type=FILE, required=True, help="Parquet file: one row per tile with its list of features.")
@max_bad_option
@config_options(EmbedConfig)
@config_file_option
def embed(checkpoint: Path, shards_dir: Path, split: str | None, output: Path, max_bad: str, **options: Any) -> None:
    """Write the features of a backbone, one row per tile, in the order of tile numbers.

    A stopped run resumes with the same command: finished parts lie in OUTPUT.parts until the end. Several processes:
    torchrun --standalone --nproc-per-node N -m mammostream embed ...

    Exit codes: 0 done, 2 bad input, 3 done but more tiles failed than --max-bad.
    """
    if output.suffix != ".parquet":
        raise BadInput(f"--output {output} is not a Parquet file; give a name that ends in .parquet")
    bad_limit(max_bad, 1)
    config = EmbedConfig(**options)
    from mammostream.shards.reading import open_shards

    shards = open_shards(shards_dir)
    from mammostream.train.predict.network import load_predictor
    from mammostream.train.predict.parts import check_record, merge_tiles, predict_parts
    from mammostream.train.predict.stream import shard_parts
    from mammostream.train.run.runtime import join_processes, only_run

    with join_processes(config) as runtime, only_run(output.with_name(f".{output.name}.lock"), runtime):
        predictor = load_predictor(checkpoint, config, runtime, features_only=True)
        parts = shard_parts(predictor, shards, split)
        record = record_of(predictor, [shards.sha256, split])
        folder = output.with_name(output.name + ".parts")
        if runtime.is_main:
            check_record(folder, record, FLAGS | {"model_sha256": "--checkpoint", "inputs_sha256": "--shards or --split"})
        predict_parts(predictor, parts, folder, "tile", runtime)
        if not runtime.is_main:
            return
        seen = {"fitted_on": dict(predictor.fitted_on)}  # for what learns from these features
        totals = merge_tiles(parts, folder, predictor, facts_of(predictor, record) | seen, output)
        shutil.rmtree(folder)
        failed = f", {totals.failed_tiles} tiles failed" if totals.failed_tiles else ""
        click.echo(f"{totals.tiles} tiles{failed}, {predictor.feature_dim} features each -> {output}")
        check_bad(totals, "tile", max_bad)
