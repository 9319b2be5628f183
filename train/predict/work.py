"""A prediction from its inputs to its tables: what is predicted by what, its parts on disk, and what it prints."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mammostream.common.errors import BadInput, TooManyBad
from mammostream.common.files import write_json, write_yaml
from mammostream.common.options import bad_limit
from mammostream.common.temporaries import scratch_folder

if TYPE_CHECKING:
    import pandas as pd

    from mammostream.preprocess.mammogram import Header
    from mammostream.preprocess.tiling import Film
    from mammostream.shards.reading import ShardSet
    from mammostream.train.predict.films import FilmInput
    from mammostream.train.predict.network import Predictor
    from mammostream.train.predict.parts import Totals
    from mammostream.train.predict.stream import Part
    from mammostream.train.predict.top_tiles import ReadTiles
    from mammostream.train.run.runtime import Runtime

PARTS, DONE = "parts", "infer.json"
_PACKAGES = ("mammostream", "torch", "numpy", "scikit-image", "nvidia-dali-cuda120", "nvidia-dali-cuda130")


@dataclass(frozen=True)
class Work:
    """What is to be predicted, by what, and from what it came."""

    predictor: Predictor
    parts: list[Part]
    unit: str
    inputs: Any
    flag: str
    runtime: Runtime
    read: ReadTiles  # what reads tiles again, for the contact sheets
    bad: list[dict[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Printing:
    """What a prediction prints besides its summary: each image, and whether there is one only, whose failure is the run's."""

    each_image: bool
    single: bool


def work_on_shards(predictor: Predictor, shards: ShardSet, split: str | None, runtime: Runtime) -> Work:
    """Return the prediction of the tiles of shards."""
    from mammostream.train.predict.stream import shard_parts
    from mammostream.train.predict.top_tiles import shard_reader

    parts, read = shard_parts(predictor, shards, split), shard_reader(predictor, shards)
    return Work(predictor, parts, "tile", [shards.sha256, split], "--shards", runtime, read)


def work_on_images(
    predictor: Predictor,
    films: list[FilmInput],
    images_are: str,
    sheet_tiles: int,
    output_dir: Path | None,
    secondary_capture: bool,
    flag: str,
    runtime: Runtime,
) -> Work:
    """Return the prediction of films, with their heat maps, or of tile images."""
    from mammostream.train.predict.films import draw_film_heat_maps, film_parts
    from mammostream.train.predict.network import with_tiles_as_images
    from mammostream.train.predict.secondary_capture import check_sources, write_secondary_captures
    from mammostream.train.predict.stream import image_parts
    from mammostream.train.predict.top_tiles import FilmTiles, image_reader

    inputs = [_stamp(film) for film in films]
    if secondary_capture:
        check_sources([film.path for film in films])
    if _are_tiles(images_are, films, predictor):
        predictor = with_tiles_as_images(predictor)
        parts = image_parts(predictor, [film.path for film in films])
        return Work(predictor, parts, "tile", inputs, flag, runtime, image_reader(predictor))
    read = FilmTiles(predictor, films, sheet_tiles)
    if output_dir is None:
        return Work(predictor, film_parts(predictor, films, None), "film", inputs, flag, runtime, read)

    def draw(film_input: FilmInput, film: Film, tiles: pd.DataFrame) -> None:
        read.keep(film, tiles)
        pictures = draw_film_heat_maps(predictor, film_input, film, tiles, output_dir)
        if not secondary_capture:
            return
        try:
            write_secondary_captures(film_input.path, pictures, predictor.sha256)
        except BadInput as error:
            click.echo(f"no secondary capture: {error}", err=True)

    return Work(predictor, film_parts(predictor, films, draw), "film", inputs, flag, runtime, read)


def draw_sheets(work: Work, output_dir: Path, count: int, grad_cam: bool, parts_folder: Path) -> None:
    """Draw the contact sheets of finished parts."""
    from mammostream.train.predict.top_tiles import draw_top_tiles, gather_top_tiles

    top = gather_top_tiles(work.parts, parts_folder, work.predictor.class_names, count)
    try:
        draw_top_tiles(work.predictor, top, work.read, output_dir, grad_cam)
    except BadInput as error:  # a file that was there when its tiles were predicted: the tables are complete without it
        click.echo(f"no contact sheets: {error}", err=True)


def summary(totals: Totals, unit: str, places: list[Path]) -> str:
    """Return one line on what was predicted, what failed, and where it lies."""
    failed = {"image": totals.failed_images, "tile": totals.failed_tiles if unit == "tile" else 0}
    said = [f"{totals.tiles} tiles of {totals.images - totals.failed_images} images"]
    said += [f"{count} {name}s failed" for name, count in failed.items() if count]
    said += [f"{totals.without_breast} images of unknown patient or side in no breast"] if totals.without_breast else []
    return ", ".join(said) + (f" -> {' and '.join(map(str, places))}" if places else "")


FLAGS = {
    "model_sha256": "--model-path",
    "temperature": "--temperature",
    "precision": "--precision or --device",
    "embeddings": "--embeddings",
    "format": "--format",
    "top_tiles": "--top-tiles",
    "thresholds": "--threshold",
}


def run_work(
    work: Work,
    output_dir: Path | None,
    tables: dict[str, Any],
    output_json: Path | None,
    printing: Printing,
    command: dict[str, Any],
    then: Callable[[Path], None] | None = None,
) -> Totals | None:
    """Predict and merge; return what it came to in the main process, and None in others or where all was there already.

    `then` gets the folder of the parts before it goes.
    """
    from mammostream.train.predict.parts import check_record, merge_parts, predict_parts

    predictor, runtime = work.predictor, work.runtime
    record = record_of(predictor, work.inputs)
    flags = FLAGS | {"inputs_sha256": work.flag}
    if output_dir is None and runtime.world_size > 1:
        raise BadInput("several processes need --output-dir: they share its folder of parts")
    if runtime.from_main(_is_done(output_dir, record | tables, flags) if runtime.is_main else None):
        if runtime.is_main and output_dir is not None:
            click.echo(f"{output_dir} holds these predictions already; delete {output_dir / DONE} to make them again")
        return None
    with _parts_folder(output_dir) as folder:
        if runtime.is_main:
            check_record(folder, record, flags)
        runtime.from_main(None)
        predict_parts(predictor, work.parts, folder, work.unit, runtime)
        if not runtime.is_main:
            return None
        facts = facts_of(predictor, record) | {"top_tiles": tables["top_tiles"]}
        printer = _Printer(predictor) if printing.each_image else None
        totals = merge_parts(
            work.parts,
            folder,
            predictor,
            facts,
            output_dir,
            tables["format"],
            output_json,
            before=work.bad,
            single=printing.single,
            on_images=printer.show if printer else None,
        )
        if then is not None:
            then(folder)
    if output_dir is not None:
        shutil.rmtree(output_dir / PARTS)
        write_yaml(output_dir / "config.yaml", command)
        write_json(output_dir / DONE, facts | record | tables)
    return totals


def record_of(predictor: Predictor, inputs: Any) -> dict[str, Any]:
    """Return what decides the rows of a part."""
    from mammostream.common.files import sha256_json

    return {
        "model_sha256": predictor.sha256,
        "inputs_sha256": sha256_json(inputs),
        "temperature": predictor.temperature,
        "precision": predictor.runtime.precision,
        "embeddings": predictor.wants_features,
    }


def facts_of(predictor: Predictor, record: dict[str, Any]) -> dict[str, Any]:
    """Return what is written next to the rows: by what they were made, and what turns them into decisions."""
    from mammostream.common.machine import versions
    from mammostream.train.levels.calibration import plain

    decisions = {"class_names": predictor.class_names, "thresholds": predictor.thresholds}
    decisions |= {"calibration": plain(predictor.calibrations)}
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
    with scratch_folder() as folder:
        yield Path(folder)


def check_bad(totals: Totals, unit: str, max_bad: str) -> None:
    bad, count = (totals.failed_tiles, totals.tiles) if unit == "tile" else (totals.failed_images, totals.images)
    if bad > bad_limit(max_bad, count):
        raise TooManyBad(
            f"{bad} of {count} {unit}s failed, more than --max-bad {max_bad}; their rows say why, the first: "
            f"{totals.first_reason}"
        )


def read_films(
    image_path: Path | None,
    images_dir: Path | None,
    manifest: Path | None,
    assume_spacing: float | None,
    findings: Path | None,
    bad: list[dict[str, str]],
    follow_links: bool = False,
) -> list[FilmInput]:
    """Return the images that were named, films or tiles; those that cannot be read go to `bad`.

    A folder's DICOM objects that are no mammograms are left out, as 'prepare' leaves them out, and counted.
    """
    from mammostream.preprocess.objects import OtherObject
    from mammostream.preprocess.reading import read_header
    from mammostream.shards.annotations.folder import find_images
    from mammostream.shards.annotations.tree import name_without_ending
    from mammostream.shards.identity import clean_patients, clean_sides, without_views
    from mammostream.shards.manifest import read_findings, read_manifest
    from mammostream.train.predict.films import FilmInput

    boxes: dict[str, tuple] = {}
    if findings is not None:
        for image_id, rows in read_findings(findings).groupby("image_id"):
            boxes[image_id] = tuple(map(tuple, rows[["xmin", "ymin", "xmax", "ymax"]].to_numpy()))
    if manifest is not None:
        rows = read_manifest(manifest).to_dict("records")
    else:
        named = {name_without_ending(path): path for path in (image_path,) if path}
        if images_dir:
            named = find_images(images_dir, follow_links)
        rows = [{"image_id": image_id, "path": path} for image_id, path in named.items()]
    others: Counter[str] = Counter()
    found: list[tuple[dict[str, Any], Header]] = []
    for row in rows:
        try:
            found.append((row, read_header(Path(row["path"]))))
        except BadInput as error:
            if image_path is not None:
                raise
            if isinstance(error, OtherObject) and images_dir is not None:
                others[error.kind] += 1
                continue
            bad.append({"image_id": row["image_id"], "reason": str(error)})
    if others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common())
        click.echo(f"{others.total()} DICOM files are no mammograms and are left out: {kinds}", err=True)
    if not found:
        first = f"; the first: {bad[0]['reason']}" if bad else ""
        raise BadInput(f"none of the {len(rows)} images is a mammogram that can be read{first}")
    patients = clean_patients([row.get("patient_id", header.patient_id) for row, header in found])
    if manifest is None:  # then those that 'prepare' would take from the files
        patients = without_views(patients)
    sides = clean_sides([row.get("laterality", header.laterality) for row, header in found])
    films = []
    for (row, header), patient, side in zip(found, patients, sides, strict=True):
        given = row.get("pixel_spacing_mm", math.nan)
        films.append(
            FilmInput(
                path=Path(row["path"]),
                image_id=row["image_id"],
                shape=(header.height, header.width),
                patient_id=patient,
                laterality=side,
                view=row.get("view", header.view),
                spacing_mm=(header.spacing_mm or assume_spacing) if math.isnan(given) else given,
                boxes=boxes.get(row["image_id"], ()),
            )
        )
    return films


def _are_tiles(images_are: str, films: list[FilmInput], predictor: Predictor) -> bool:
    """Tell tile images from films: by ``--images-are``, else by whether an edge is longer than the model's tile."""
    if images_are != "auto":
        return images_are == "tiles"
    tiles = all(max(film.shape) <= predictor.preprocessing["tile_size"] for film in films)
    click.echo(f"treated as {'tiles' if tiles else 'films'}; use --images-are to override", err=True)
    return tiles


def _stamp(film: FilmInput) -> list[Any]:
    """Return what changes when a film, or what is known of it, does."""
    state = film.path.stat()
    known = [film.image_id, film.patient_id, film.laterality, film.view, film.spacing_mm]
    return [str(film.path), *known, state.st_size, state.st_mtime_ns]


class _Printer:
    """Prints images as the guide shows them, and on stderr those that failed."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor, self._number = predictor, 0

    def show(self, images: pd.DataFrame) -> None:
        """Print the images of a part."""
        from mammostream.train.levels.aggregation import MAX
        from mammostream.train.levels.calibration import IMAGE

        thresholds = self._predictor.level_thresholds(IMAGE, MAX)
        for row in images.to_dict("records"):
            if row["reason"]:
                click.echo(f"failed: {row['image_id']}: {row['reason']}", err=True)
                continue
            self._number += 1
            scores = sorted(((row[f"{MAX}:{name}"], name) for name in self._predictor.class_names), reverse=True)
            click.echo(f"📸 Image {self._number}: {row['image_id']}")
            click.echo(f"🏆 Top prediction: {scores[0][1]} ({scores[0][0]:.3f})")
            click.echo("📊 All probabilities:")
            for score, name in scores:
                click.echo(f"   {'✅' if score >= thresholds[name] else '❌'} {name:<18}: {score:.3f}")
