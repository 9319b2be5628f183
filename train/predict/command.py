"""``mammostream infer`` and ``mammostream embed``."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from mammostream.common.errors import BadInput, TooManyBad
from mammostream.common.files import write_json, write_yaml
from mammostream.common.options import Command, config_file_option, config_options, resolved
from mammostream.train.predict.config import EmbedConfig, InferConfig

if TYPE_CHECKING:
    import pandas as pd

    from mammostream.preprocess.tiling import Film
    from mammostream.train.predict.films import FilmInput
    from mammostream.train.predict.network import Predictor
    from mammostream.train.predict.parts import Totals
    from mammostream.train.predict.stream import Part
    from mammostream.train.run.runtime import Runtime

FILE = click.Path(path_type=Path)
PARTS, DONE = "parts", "infer.json"
_PACKAGES = ("mammostream", "torch", "numpy", "scikit-image", "nvidia-dali-cuda120", "nvidia-dali-cuda130")
max_bad_option = click.option(
    "--max-bad",
    default="5%",
    help="Most tiles (of shards and tile images) or films that may fail, a number or a percentage; more end with exit code 3.",
)


@click.command(cls=Command)
@click.option("--model-path", type=FILE, required=True, help="Classifier checkpoint that 'finetune' wrote.")
@click.option("--shards", "shards_dir", type=FILE, help="Predict the tiles of a shard directory, or of s3://bucket/prefix.")
@click.option("--split", type=click.Choice(["train", "val", "test"]), help="With --shards: this split only.")
@click.option("--image-path", type=FILE, help="Predict one film (DICOM, PNG, TIFF, PGM) or one tile image.")
@click.option("--images-dir", type=FILE, help="Predict each film or tile image below a folder.")
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
    help="Draw so many of each class's highest tiles as a contact sheet in --output-dir; 0 = none.",
)
@click.option("--grad-cam/--no-grad-cam", default=False, help="Show on the contact sheets where in each tile the answer lies.")
@click.option(
    "--secondary-capture/--no-secondary-capture",
    default=False,
    help="Write each heat map also as DICOM Secondary Capture in its film's study. Films must be DICOM. THE CAPTURE NAMES THE "
    "PATIENT as its film does; nothing else takes identity from a DICOM header. Not for diagnostic use. Needs the "
    "extra 'dicom-out'.",
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

    Writes tables of tiles (predictions), images and breasts. An image's probability of a class is that of its highest tile
    (max), the mean of its highest few (top3), or noisy_or: 1 - the product of 1 - p over its tiles. A tile or film that cannot
    be read becomes a row with its reason, and the rest goes on.

    A run that was stopped goes on with the same command: finished parts lie in --output-dir/parts until the end. Several
    processes: torchrun --nproc-per-node N -m mammostream infer ...

    Exit codes: 0 done, 2 bad input, 3 done but more failed than --max-bad.
    """
    sources = {"--shards": shards_dir, "--image-path": image_path, "--images-dir": images_dir, "--manifest": manifest}
    if sum(value is not None for value in sources.values()) != 1:
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
    from mammostream.train.predict.films import draw_film_heat_maps, film_parts
    from mammostream.train.predict.network import load_predictor
    from mammostream.train.predict.secondary_capture import check_sources, write_secondary_captures
    from mammostream.train.predict.stream import image_parts, shard_parts
    from mammostream.train.predict.top_tiles import FilmTiles, draw_top_tiles, gather_top_tiles, image_reader, shard_reader
    from mammostream.train.run.runtime import join_processes

    with join_processes(config) as runtime:
        predictor = load_predictor(model_path, config, runtime)
        bad: list[dict[str, str]] = []  # image_id and reason of each image whose header cannot be read
        if shards is not None:
            parts, unit, read = shard_parts(predictor, shards, split), "tile", shard_reader(predictor, shards)
            inputs: Any = [shards.sha256, split]
        else:
            films = _films(image_path, images_dir, manifest, assume_spacing, findings, bad)
            inputs = [_stamp(film) for film in films]
            if secondary_capture:
                check_sources([film.path for film in films])
            if _are_tiles(images_are, films, predictor):
                parts, unit, read = image_parts(predictor, [film.path for film in films]), "tile", image_reader(predictor)
            else:
                read = FilmTiles(predictor, films, sheet_tiles)

                def draw(film_input: FilmInput, film: Film, tiles: pd.DataFrame) -> None:
                    read.keep(film, tiles)
                    pictures = draw_film_heat_maps(predictor, film_input, film, tiles, output_dir)
                    if not secondary_capture:
                        return
                    try:
                        write_secondary_captures(film_input.path, pictures, predictor.sha256)
                    except BadInput as error:
                        click.echo(f"no secondary capture: {error}", err=True)

                parts, unit = film_parts(predictor, films, draw if output_dir else None), "film"

        def draw_sheets(folder: Path) -> None:
            top = gather_top_tiles(parts, folder, predictor.class_names, sheet_tiles)
            try:
                draw_top_tiles(predictor, top, read, output_dir, grad_cam)
            except BadInput as error:  # a file that was there when its tiles were predicted: the tables are whole without
                click.echo(f"no contact sheets: {error}", err=True)

        flag = next(name for name, value in sources.items() if value is not None)
        work = _Work(predictor, parts, unit, bad, inputs, flag, runtime)
        tables = {"format": table_format, "top_tiles": config.top_tiles, "thresholds": predictor.thresholds}
        then = draw_sheets if output_dir is not None and sheet_tiles else None
        totals = _run(work, output_dir, tables, output_json, shards is None, image_path is not None, resolved(ctx), then)
        if totals is None:
            return
        where = " and ".join(str(p) for p in (output_dir, output_json) if p)
        failed = [
            f"{count} {name}s failed"
            for name, count in (("image", totals.failed_images), ("tile", totals.failed_tiles if unit == "tile" else 0))
            if count
        ]
        click.echo(
            ", ".join([f"{totals.tiles} tiles of {totals.images - totals.failed_images} images", *failed])
            + (f" -> {where}" if where else "")
        )
        _check_bad(totals, unit, max_bad)


@click.command(cls=Command)
@click.option("--checkpoint", type=FILE, required=True, help="A checkpoint of 'pretrain' or 'finetune'.")
@click.option("--shards", "shards_dir", type=FILE, required=True, help="Shard directory, or s3://bucket/prefix.")
@click.option("--split", type=click.Choice(["train", "val", "test"]), help="This split only.")
@click.option("--output", type=FILE, required=True, help="Parquet file: a row a tile with its list of features.")
@max_bad_option
@config_options(EmbedConfig)
@config_file_option
def embed(checkpoint: Path, shards_dir: Path, split: str | None, output: Path, max_bad: str, **options: Any) -> None:
    """Write the features of a backbone, a row a tile, in the order of tile numbers.

    A run that was stopped goes on with the same command: finished parts lie in OUTPUT.parts until the end. Several processes:
    torchrun --nproc-per-node N -m mammostream embed ...

    Exit codes: 0 done, 2 bad input, 3 done but more tiles failed than --max-bad.
    """
    if output.suffix != ".parquet":
        raise BadInput(f"--output {output} is no Parquet file; give a name that ends in .parquet")
    bad_limit(max_bad, 1)
    config = EmbedConfig(**options)
    from mammostream.shards.reading import open_shards

    shards = open_shards(shards_dir)
    from mammostream.train.predict.network import load_predictor
    from mammostream.train.predict.parts import check_record, merge_tiles, predict_parts
    from mammostream.train.predict.stream import shard_parts
    from mammostream.train.run.runtime import join_processes

    with join_processes(config) as runtime:
        predictor = load_predictor(checkpoint, config, runtime, features_only=True)
        parts = shard_parts(predictor, shards, split)
        record = _record(predictor, [shards.sha256, split])
        folder = output.with_name(output.name + ".parts")
        if runtime.is_main:
            check_record(folder, record, _FLAGS | {"model_sha256": "--checkpoint", "inputs_sha256": "--shards or --split"})
        predict_parts(predictor, parts, folder, "tile", runtime)
        if not runtime.is_main:
            return
        totals = merge_tiles(parts, folder, predictor, _facts(predictor, record), output)
        shutil.rmtree(folder)
        failed = f", {totals.failed_tiles} tiles failed" if totals.failed_tiles else ""
        click.echo(f"{totals.tiles} tiles{failed}, {predictor.feature_dim} features each -> {output}")
        _check_bad(totals, "tile", max_bad)


@dataclass(frozen=True)
class _Work:
    """What is to be predicted, by what, and from what it came."""

    predictor: Predictor
    parts: list[Part]
    unit: str
    bad: list[dict[str, str]]
    inputs: Any
    flag: str
    runtime: Runtime


_FLAGS = {
    "model_sha256": "--model-path",
    "temperature": "--temperature",
    "precision": "--precision or --device",
    "embeddings": "--embeddings",
    "format": "--format",
    "top_tiles": "--top-tiles",
    "thresholds": "--threshold",
}


def _run(
    work: _Work,
    output_dir: Path | None,
    tables: dict[str, Any],
    output_json: Path | None,
    talking: bool,
    single: bool,
    command: dict[str, Any],
    then: Callable[[Path], None] | None = None,
) -> Totals | None:
    """Predict and merge; return what it came to in the main process, and None in others or where all was there already.

    `then` gets the folder of the parts before it goes.
    """
    from mammostream.train.predict.parts import check_record, merge_parts, predict_parts

    predictor, runtime = work.predictor, work.runtime
    record = _record(predictor, work.inputs)
    flags = _FLAGS | {"inputs_sha256": work.flag}
    if output_dir is None and runtime.world_size > 1:
        raise BadInput("several processes need --output-dir: they share its folder of parts")
    if runtime.from_main(_is_done(output_dir, record | tables, flags) if runtime.is_main else None):
        if runtime.is_main:
            click.echo(f"{output_dir} holds these predictions already; delete {output_dir / DONE} to make them again")
        return None
    with _parts_folder(output_dir) as folder:
        if runtime.is_main:
            check_record(folder, record, flags)
        runtime.from_main(None)
        predict_parts(predictor, work.parts, folder, work.unit, runtime)
        if not runtime.is_main:
            return None
        facts = _facts(predictor, record) | {"top_tiles": predictor.config.top_tiles}
        printer = _Printer(predictor) if talking else None
        totals = merge_parts(
            work.parts,
            folder,
            predictor,
            facts,
            output_dir,
            tables["format"],
            output_json,
            before=work.bad,
            single=single,
            on_images=printer.show if printer else None,
        )
        if then is not None:
            then(folder)
    if output_dir is not None:
        shutil.rmtree(output_dir / PARTS)
        write_yaml(output_dir / "config.yaml", command)
        write_json(output_dir / DONE, facts | record | tables)
    return totals


def _record(predictor: Predictor, inputs: Any) -> dict[str, Any]:
    """Return what decides the rows of a part."""
    from mammostream.common.files import sha256_json

    return {
        "model_sha256": predictor.sha256,
        "inputs_sha256": sha256_json(inputs),
        "temperature": predictor.temperature,
        "precision": predictor.runtime.precision,
        "embeddings": predictor.wants_features,
    }


def _facts(predictor: Predictor, record: dict[str, Any]) -> dict[str, Any]:
    """Return what is written beside the rows: by what they were made, and what turns them into decisions."""
    from mammostream.common.machine import versions

    decisions = {"class_names": predictor.class_names, "thresholds": predictor.thresholds}
    return record | decisions | {"preprocessing": predictor.preprocessing, "versions": versions(_PACKAGES)}


def _is_done(output_dir: Path | None, record: dict[str, Any], flags: dict[str, str]) -> bool:
    """Whether a finished run of these options lies in the folder; BadInput where another one does."""
    import json

    if output_dir is None or not (output_dir / DONE).is_file():
        return False
    done = json.loads((output_dir / DONE).read_text(encoding="utf-8"))
    for name, value in record.items():
        if done.get(name) != value:
            raise BadInput(
                f"{output_dir} holds the predictions of another {flags[name]}; choose another --output-dir, or delete "
                f"{output_dir / DONE} to replace them"
            )
    return True


@contextmanager
def _parts_folder(output_dir: Path | None) -> Iterator[Path]:
    if output_dir is not None:
        yield output_dir / PARTS
        return
    with TemporaryDirectory(prefix="mammostream-infer-") as folder:
        yield Path(folder)


def bad_limit(max_bad: str, count: int) -> float:
    """Return how many of `count` may fail.

    Raises
    ------
    BadInput
        `max_bad` is neither a number nor a percentage.
    """
    try:
        return float(max_bad.rstrip("%")) / 100 * count if max_bad.endswith("%") else int(max_bad)
    except ValueError:
        raise BadInput(f"--max-bad {max_bad!r} is neither a number nor a percentage like 5%") from None


def _check_bad(totals: Totals, unit: str, max_bad: str) -> None:
    bad, count = (totals.failed_tiles, totals.tiles) if unit == "tile" else (totals.failed_images, totals.images)
    if bad > bad_limit(max_bad, count):
        raise TooManyBad(
            f"{bad} of {count} {unit}s failed, more than --max-bad {max_bad}; their rows say why, the first: "
            f"{totals.first_reason}"
        )


def _films(
    image_path: Path | None,
    images_dir: Path | None,
    manifest: Path | None,
    assume_spacing: float | None,
    findings: Path | None,
    bad: list[dict[str, str]],
) -> list[FilmInput]:
    """Return the images that were named, films or tiles; those that cannot be read go to `bad`."""
    from mammostream.preprocess.reading import read_header
    from mammostream.shards.annotations.folder import find_images
    from mammostream.shards.manifest import read_findings, read_manifest
    from mammostream.train.predict.films import FilmInput

    boxes: dict[str, tuple] = {}
    if findings is not None:
        for image_id, rows in read_findings(findings).groupby("image_id"):
            boxes[image_id] = tuple(map(tuple, rows[["xmin", "ymin", "xmax", "ymax"]].to_numpy()))
    if manifest is not None:
        rows = read_manifest(manifest).to_dict("records")
    else:
        # Named by their files alone: no identity is read from a DICOM header into the tables.
        named = find_images(images_dir) if images_dir else {image_path.stem: image_path}
        rows = [{"image_id": image_id, "path": path, "patient_id": ""} for image_id, path in named.items()]
    films = []
    for row in rows:
        try:
            header = read_header(Path(row["path"]))
        except BadInput as error:
            if image_path is not None:
                raise
            bad.append({"image_id": row["image_id"], "reason": str(error)})
            continue
        given = row.get("pixel_spacing_mm", math.nan)
        films.append(
            FilmInput(
                path=Path(row["path"]),
                image_id=row["image_id"],
                shape=(header.height, header.width),
                patient_id=row["patient_id"],
                laterality=row.get("laterality", header.laterality),
                spacing_mm=(header.spacing_mm or assume_spacing) if math.isnan(given) else given,
                boxes=boxes.get(row["image_id"], ()),
            )
        )
    if not films:
        raise BadInput(f"none of the {len(bad)} images can be read; the first: {bad[0]['reason']}")
    return films


def _are_tiles(images_are: str, films: list[FilmInput], predictor: Predictor) -> bool:
    """Tell tile images from films: by ``--images-are``, else by whether an edge is longer than the model's tile."""
    if images_are != "auto":
        return images_are == "tiles"
    tiles = all(max(film.shape) <= predictor.preprocessing["tile_size"] for film in films)
    click.echo(f"taken for {'tiles' if tiles else 'films'}; --images-are says otherwise", err=True)
    return tiles


def _stamp(film: FilmInput) -> list[Any]:
    """Return what changes when a film, or what is known of it, does."""
    state = film.path.stat()
    return [str(film.path), film.image_id, film.patient_id, film.laterality, film.spacing_mm, state.st_size, state.st_mtime_ns]


class _Printer:
    """Prints images as the guide shows them, and on stderr those that failed."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor, self._number = predictor, 0

    def show(self, images: pd.DataFrame) -> None:
        """Print the images of a part."""
        thresholds = self._predictor.thresholds
        for row in images.to_dict("records"):
            if row["reason"]:
                click.echo(f"failed: {row['image_id']}: {row['reason']}", err=True)
                continue
            self._number += 1
            scores = sorted(((row[f"max:{name}"], name) for name in self._predictor.class_names), reverse=True)
            click.echo(f"📸 Image {self._number}: {row['image_id']}")
            click.echo(f"🏆 Top prediction: {scores[0][1]} ({scores[0][0]:.3f})")
            click.echo("📊 All probabilities:")
            for score, name in scores:
                click.echo(f"   {'✅' if score >= thresholds[name] else '❌'} {name:<18}: {score:.3f}")
