"""A long prediction in parts: each is written when done, processes share them, a killed run resumes, the end merges them.

A part is two files below ``parts``: ``<name>.images.parquet`` and ``<name>.parquet``, the latter renamed last. Whatever is
merged is a function of the parts, and a part of its tiles alone: who predicted which part, and when, changes no byte.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from mammostream.common.errors import BadInput
from mammostream.common.files import make_folder, whole_file, write_json, write_parquet
from mammostream.common.progress import progress
from mammostream.train.levels.aggregation import MAX, Groups
from mammostream.train.levels.calibration import IMAGE
from mammostream.train.predict.breasts import Breasts
from mammostream.train.predict.config import InferConfig
from mammostream.train.predict.network import Predictor
from mammostream.train.predict.raw_scores import RawScores
from mammostream.train.predict.stream import Part
from mammostream.train.predict.tables import JsonWriter, TableWriter, as_table, breast_schema, image_schema, tile_schema
from mammostream.train.run.runtime import Runtime

RECORD = "run.json"
_POLL_SECONDS = 0.2


@dataclass
class Totals:
    """What a run came to: tiles and images, those that failed included, and the first reason."""

    tiles: int = 0
    failed_tiles: int = 0
    images: int = 0
    failed_images: int = 0
    first_reason: str = ""
    without_breast: int = 0  # images in no breast, where a table of breasts was written
    warning: str = ""  # what the scores of images do not mean

    def add(self, tiles: pd.DataFrame, images: pd.DataFrame | None) -> None:
        """Count the rows of a part."""
        for name, frame in (("images", images), ("tiles", tiles)):
            if frame is None:
                continue
            failed = frame.loc[frame["reason"] != "", "reason"]
            setattr(self, name, getattr(self, name) + len(frame))
            setattr(self, f"failed_{name}", getattr(self, f"failed_{name}") + len(failed))
            self.first_reason = self.first_reason or next(iter(failed), "")


def check_record(folder: Path, record: Mapping[str, Any], flags: Mapping[str, str]) -> None:
    """Check that parts that are there already were made as this run makes them, and note how they are made.

    Parameters
    ----------
    folder
        Of the parts.
    record
        What decides a part's rows.
    flags
        Name in the record -> the option behind it.

    Raises
    ------
    BadInput
        They were made otherwise; the option is named.
    """
    path = folder / RECORD
    if path.is_file():
        made = json.loads(path.read_text(encoding="utf-8"))
        for name, value in record.items():
            if made.get(name) != value:
                raise BadInput(
                    f"{folder} holds parts that were made with another {flags[name]}; go on with that one, delete the folder, "
                    "or choose another place for the output"
                )
    make_folder(folder)
    write_json(path, dict(record))


def predict_parts(predictor: Predictor, parts: Sequence[Part], folder: Path, unit: str, runtime: Runtime) -> None:
    """Predict the parts that are not there yet, this process its share; the main one returns when all are there.

    Parameters
    ----------
    predictor
        The network.
    parts
        All parts.
    folder
        Where their files go.
    unit
        What a part's size counts, for the progress bar.
    runtime
        The processes.
    """
    pending = runtime.from_main([part.name for part in parts if not _path(folder, part).is_file()])
    todo = [part for part in parts if part.name in set(pending)]
    total = sum(part.size for part in parts)
    before = total - sum(part.size for part in todo)
    schema = tile_schema(predictor.class_names, predictor.feature_dim)
    with progress(None, f"predicting ({runtime})", unit, total, before, not runtime.is_main) as bar:
        bar.update(before)
        for part, ready in _opened_ahead(_share(todo, runtime)):
            tiles, images = part.predict(ready)
            write_parquet(_images_path(folder, part), as_table(images, _image_facts(images.columns)))
            write_parquet(_path(folder, part), as_table(tiles, schema))
            bar.update(part.size)
        others = [part for part in todo if not _path(folder, part).is_file()] if runtime.is_main else []
        while others:  # of other processes: were one of them killed, its launcher would end this one
            time.sleep(_POLL_SECONDS)
            waiting = [part for part in others if not _path(folder, part).is_file()]
            bar.update(sum(part.size for part in others) - sum(part.size for part in waiting))
            others = waiting


def _share(parts: Sequence[Part], runtime: Runtime) -> list[Part]:
    """Return this process's parts: the largest first to whoever has the least so far, the same on all processes."""
    loads = [0] * runtime.world_size
    mine = set()
    for part in sorted(parts, key=lambda part: -part.size):
        rank = loads.index(min(loads))
        loads[rank] += part.size + 1
        if rank == runtime.rank:
            mine.add(part.name)
    return [part for part in parts if part.name in mine]


def _opened_ahead(parts: Iterable[Part]) -> Iterator[tuple[Part, Any]]:
    """Yield parts and what they opened; the next one opens while this one is predicted."""
    with ThreadPoolExecutor(1) as pool:
        opening = None
        for part in parts:
            following = part, pool.submit(part.open)
            if opening is not None:
                yield opening[0], opening[1].result()
            opening = following
        if opening is not None:
            yield opening[0], opening[1].result()


def _image_facts(columns: Iterable[str]) -> pa.Schema:
    """Return the schema of what is known of a part's images."""
    schema = image_schema(())
    return pa.schema([schema.field(name) for name in columns])


def read_part(folder: Path, part: Part) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return a finished part's tiles and images."""
    tiles, images = (pq.read_table(path(folder, part)).to_pandas() for path in (_path, _images_path))
    return tiles, images


def merge_parts(
    parts: Sequence[Part],
    folder: Path,
    predictor: Predictor,
    facts: Mapping[str, Any],
    output_dir: Path | None,
    table_format: str,
    output_json: Path | None = None,
    *,
    before: Sequence[Mapping[str, str]] = (),
    single: bool = False,
    on_images: Callable[[pd.DataFrame], None] | None = None,
) -> Totals:
    """Merge finished parts into the tables of tiles, images and breasts, part by part.

    Parameters
    ----------
    parts, folder
        All parts, in the order of the tables' rows, and where their files are.
    predictor
        The network, for its classes and thresholds.
    facts
        What is written next to the rows.
    output_dir
        Where the tables go; None writes none.
    table_format
        Their ending, one of :data:`mammostream.train.predict.tables.FORMATS`.
    output_json
        A JSON of the images alone; None writes none.
    before
        ``image_id`` and ``reason`` of images that failed before they came into a part.
    single
        There is one image, and its reason is the run's.
    on_images
        Called with each part's image table.

    Raises
    ------
    BadInput
        No image has an answer; then nothing is written.
    """
    assert isinstance(predictor.config, InferConfig)
    names, top = predictor.class_names, predictor.config.top_tiles
    breasts, raw_scores = Breasts(predictor), RawScores(predictor)
    totals = Totals()
    with ExitStack() as stack:
        tables = _open_tables(stack, predictor, facts, output_dir, table_format) if output_dir is not None else ()
        answers = stack.enter_context(ImagesJson(output_json, facts)) if output_json is not None else None
        for tiles, its_images in _all_parts(parts, folder, before, names):
            images = _image_rows(tiles, its_images, predictor, top)
            totals.add(tiles, images)
            breasts.add(tiles, images)
            raw_scores.add(images)
            for table, rows in zip(tables, (tiles, images), strict=False):
                table.write(rows)
            if answers is not None:
                answers.write(images, predictor)
            if on_images is not None:
                on_images(images)
        if totals.failed_images == totals.images:
            if single:
                raise BadInput(totals.first_reason)
            raise BadInput(f"none of the {totals.images} images could be predicted; the first: {totals.first_reason}")
    totals.warning = raw_scores.warning()
    its_breasts = breasts.table()
    if output_dir is not None and len(its_breasts):
        path = output_dir / f"breast_predictions.{table_format}"
        with TableWriter(path, breast_schema(names, top), facts, "breasts") as writer:
            writer.write(its_breasts)
        totals.without_breast = breasts.unknown
    return totals


def _open_tables(
    stack: ExitStack, predictor: Predictor, facts: Mapping[str, Any], output_dir: Path, table_format: str
) -> tuple[TableWriter, TableWriter]:
    """Open the tables of tiles and images."""
    assert isinstance(predictor.config, InferConfig)
    tiles = tile_schema(predictor.class_names, predictor.feature_dim)
    images = image_schema(predictor.class_names, predictor.config.top_tiles)
    return (
        stack.enter_context(TableWriter(output_dir / f"predictions.{table_format}", tiles, facts, "tiles")),
        stack.enter_context(TableWriter(output_dir / f"image_predictions.{table_format}", images, facts, "images")),
    )


def merge_tiles(parts: Sequence[Part], folder: Path, predictor: Predictor, facts: Mapping[str, Any], path: Path) -> Totals:
    """Merge the tiles of finished parts into one table, part by part."""
    totals = Totals()
    with TableWriter(path, tile_schema(predictor.class_names, predictor.feature_dim), facts, "tiles") as writer:
        for part in parts:
            table = pq.read_table(_path(folder, part))
            writer.write(table)
            totals.add(table.select(["reason"]).to_pandas(), None)
    return totals


def _all_parts(
    parts: Sequence[Part], folder: Path, before: Sequence[Mapping[str, str]], names: Sequence[str]
) -> Iterator[tuple[pd.DataFrame, pd.DataFrame]]:
    """Yield the tiles and images of each part, and last the images that came into none."""
    for part in parts:
        yield read_part(folder, part)
    if before:
        yield tile_schema(names).empty_table().to_pandas(), pd.DataFrame(before).assign(patient_id="", split="")


def _image_rows(tiles: pd.DataFrame, images: pd.DataFrame, predictor: Predictor, top: int) -> pd.DataFrame:
    """Return the image table of a part: scores where tiles could be read, else the first tile's reason."""
    groups = Groups(["image_id"], predictor.class_names, top)
    groups.add(tiles)
    failed = tiles[tiles["reason"] != ""].groupby("image_id", sort=False)["reason"].agg(["size", "first"])
    scores = groups.table(predictor.calibrations.get(IMAGE))
    rows = images.merge(scores, on="image_id", how="left").join(failed, on="image_id")
    rows["tiles"], rows["failed_tiles"] = (rows[name].fillna(0).astype(int) for name in ("tiles", "size"))
    lost = (rows["tiles"] == 0) & (rows["reason"] == "") & rows["first"].notna()
    rows.loc[lost, "reason"] = rows.loc[lost, "first"]
    if "seen" not in rows:
        rows["seen"] = predictor.seen(rows["patient_id"], rows["image_id"])
    return rows.drop(columns=["size", "first"])


class ImagesJson:
    """The JSON of the images alone: probabilities by class, the highest class, and those that count as found."""

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        self._path, self._facts = path, facts

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            temporary = stack.enter_context(whole_file(self._path))
            self._writer = stack.enter_context(JsonWriter(temporary, self._facts, "images"))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def write(self, images: pd.DataFrame, predictor: Predictor) -> None:
        """Add the images of a part."""
        for row in images.to_dict("records"):
            self._writer.write_row(image_answer(row, predictor))


def image_answer(row: Mapping[str, Any], predictor: Predictor) -> dict[str, Any]:
    """Return an image's row of the table as JSON has it."""
    if row["reason"]:
        return {"image": row["image_id"], "error": row["reason"]}
    scores = {name: float(row[f"{MAX}:{name}"]) for name in predictor.class_names}
    thresholds = predictor.level_thresholds(IMAGE, MAX)
    answer = {
        "image": row["image_id"],
        "tiles": int(row["tiles"]),
        "probabilities": scores,
        "top_prediction": max(scores, key=lambda name: scores[name]),
        "positive": [name for name, score in scores.items() if score >= thresholds[name]],
    }
    return answer | ({"seen": row["seen"]} if row["seen"] else {})


def _path(folder: Path, part: Part) -> Path:
    return folder / f"{part.name}.parquet"


def _images_path(folder: Path, part: Part) -> Path:
    return folder / f"{part.name}.images.parquet"
