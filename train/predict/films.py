"""Prediction of raw films through the model's own preprocessing, and their heat maps."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from mammostream.common.errors import BadInput
from mammostream.dali_pipelines import create_inference_transform
from mammostream.preprocess.backend import backend_of
from mammostream.preprocess.intensity import mapping_option
from mammostream.preprocess.preview import Box
from mammostream.preprocess.reading import read_mammogram
from mammostream.preprocess.tiling import RECORDED, SPACING_TOLERANCE, Film, TilingConfig, tile_film, whole_record
from mammostream.shards.archive import escape_id, short_name, tile_key
from mammostream.train.levels.aggregation import MAX, PROBABILITY, aggregate
from mammostream.train.levels.calibration import IMAGE
from mammostream.train.predict.heat_maps import draw_heat_map, heat_map, heat_step
from mammostream.train.predict.network import Predictor
from mammostream.train.predict.stream import _FILMS_A_PART, Part, Predicted, _without_tiles, part_name


@dataclass(frozen=True)
class FilmInput:
    """An image to predict: file, id, (height, width) in pixels, patient, side, view, spacing in mm if known, boxes to draw."""

    path: Path
    image_id: str
    shape: tuple[int, int]
    patient_id: str = ""
    laterality: str = ""
    view: str = ""
    spacing_mm: float | None = None
    boxes: tuple[Box, ...] = ()


def film_parts(
    predictor: Predictor, films: Sequence[FilmInput], on_film: Callable[[FilmInput, Film, pd.DataFrame], None] | None = None
) -> list[Part]:
    """Return parts of raw films; `on_film` gets each film that was predicted, with its tile table."""

    def part(start: int) -> Part:
        mine = films[start : start + _FILMS_A_PART]
        return Part(
            part_name(start),
            len(mine),
            lambda: PreparedFilms(predictor, mine),
            lambda prepared: _predict_films(predictor, prepared, on_film),
        )

    return [part(start) for start in range(0, len(films), _FILMS_A_PART)]


class PreparedFilms:
    """Yields ``(film input, tiled film or the error)`` in order; the next films are read while one is predicted."""

    def __init__(self, predictor: Predictor, films: Sequence[FilmInput]) -> None:
        threads = min(len(films), max(1, predictor.config.num_workers // 2))
        self._pool = ThreadPoolExecutor(threads)
        self._prepare = partial(prepare_film, predictor.preprocessing)
        self._waiting: deque[tuple[FilmInput, Future]] = deque()
        self._films = iter(films)
        for _ in range(threads + 1):  # a film takes some hundred MB
            self._submit()

    def _submit(self) -> None:
        for film in self._films:
            self._waiting.append((film, self._pool.submit(self._prepare, film)))
            return

    def __iter__(self) -> Iterator[tuple[FilmInput, Film | BadInput]]:
        with self._pool:
            while self._waiting:
                film, future = self._waiting.popleft()
                error = future.exception()
                if error is not None and not isinstance(error, BadInput):
                    self._pool.shutdown(cancel_futures=True)
                    raise error
                made = error or future.result()
                del future
                yield film, made
                del made
                self._submit()


def prepare_film(record: dict[str, Any], film_input: FilmInput) -> Film:
    """Take a raw film through a model's own preprocessing.

    Parameters
    ----------
    record
        How the model's tiles were made.
    film_input
        The film.

    Raises
    ------
    BadInput
        The film cannot be read, has no tile to predict, or pixels of a size the model does not know.
    """
    config = _tiling_config(record)
    mammogram = read_mammogram(film_input.path, config).with_view(film_input.view)
    if film_input.spacing_mm is not None:
        mammogram = mammogram.with_spacing(film_input.spacing_mm, "given")
    _check_spacing(mammogram.header.spacing_mm, record, film_input.path)
    film = tile_film(mammogram, config)
    if not len(film.tiles.x):
        why = _without_tiles(" ".join(film.flags))
        raise BadInput(f"image {film_input.path}: {why}; look at it with 'mammostream preview'")
    return film


def predict_film(predictor: Predictor, film_input: FilmInput, film: Film | None = None) -> tuple[Film, pd.DataFrame]:
    """Predict a raw film's tiles.

    Parameters
    ----------
    predictor
        The network.
    film_input
        The film.
    film
        What :func:`prepare_film` made of it; None makes it here.

    Returns
    -------
    film, tiles
        The tiled film and its tile table with probabilities.

    Raises
    ------
    BadInput
        See :func:`prepare_film`.
    """
    record = predictor.preprocessing
    film = film or prepare_film(record, film_input)
    transform = create_inference_transform(record.get("view_size"), record["mean"], record["std"])
    size, batch, count = record["tile_size"], predictor.config.batch_size, len(film.tiles.x)
    answers = []
    for start in range(0, count, batch):
        tiles = [transform(film.cut(i, size, record["bits"])) for i in range(start, min(start + batch, count))]
        answers.append(predictor.answer(torch.stack(tiles).contiguous(memory_format=torch.channels_last)))
    return film, predictor.frame(film_tiles(film_input, film, record), answers)


def film_tiles(film_input: FilmInput, film: Film, record: dict[str, Any]) -> pd.DataFrame:
    """Return the tile table of a film without its probabilities."""
    boxes = np.array([film.native_box(i, record["tile_size"]) for i in range(len(film.tiles.x))])
    return pd.DataFrame(
        {
            "key": [tile_key(film_input.image_id, y, x) for x, y, _ in boxes],
            "image_id": film_input.image_id,
            "patient_id": film_input.patient_id,
            "split": "",
            "x": boxes[:, 0],
            "y": boxes[:, 1],
            "size": boxes[:, 2],
        }
    )


def _predict_films(
    predictor: Predictor, films: PreparedFilms, on_film: Callable[[FilmInput, Film, pd.DataFrame], None] | None
) -> Predicted:
    tables, images = [], []
    for film_input, film in films:
        image = {
            "image_id": film_input.image_id,
            "patient_id": film_input.patient_id,
            "split": "",
            "laterality": film_input.laterality,
            "view": film_input.view,
            "reason": str(film) if isinstance(film, BadInput) else "",
        }
        images.append(image)
        if not isinstance(film, BadInput):
            _, tiles = predict_film(predictor, film_input, film)
            tables.append(tiles)
            if on_film is not None:
                on_film(film_input, film, tiles)
    nothing = pd.DataFrame({"key": [], "image_id": []}, dtype=str)
    return Predicted(pd.concat(tables, ignore_index=True) if tables else nothing, pd.DataFrame(images))


def draw_film_heat_maps(
    predictor: Predictor, film_input: FilmInput, film: Film, tiles: pd.DataFrame, output_dir: Path
) -> dict[str, Path]:
    """Draw one heat map a class over a film and return the pictures' paths by class."""
    image = backend_of(film.image).to_host(film.image)
    size = predictor.preprocessing["tile_size"]
    step = heat_step(size)
    boxes: list[Any] = [tuple(edge / film.scale for edge in box) for box in film_input.boxes]
    paths = {}
    scores = aggregate(tiles, ["image_id"], calibration=predictor.calibrations.get(IMAGE)).iloc[0]
    thresholds = predictor.level_thresholds(IMAGE, MAX)
    for name in predictor.class_names:
        probabilities = tiles[PROBABILITY + name].to_numpy()
        heat = heat_map(image.shape, film.tiles.x, film.tiles.y, size, probabilities, step)
        path = output_dir / (short_name(f"heatmap_{escape_id(film_input.image_id)}_{escape_id(name)}") + ".png")
        score = scores[f"{MAX}:{name}"]
        found = "found" if score >= thresholds[name] else "not found"
        facts = f"probability of {name} {score:.2f} ({found}: threshold {thresholds[name]:.2f}), highest tile "
        facts += f"{probabilities.max():.2f}" + (", boxes as annotated" if boxes else "")
        draw_heat_map(image, heat, step, boxes, path, f"{film_input.image_id}\n{facts}")
        paths[name] = path
    return paths


def _tiling_config(record: dict[str, Any]) -> TilingConfig:
    record = whole_record(record)
    if not {*RECORDED, "pixel_spacing_mm"} <= record.keys():
        raise BadInput(
            "the model does not say how its tiles were made: another program wrote it; cut tiles as that one did and give them "
            "with --images-are tiles, or fine-tune it on shards"
        )
    recorded = {name: record[name] for name in RECORDED}
    return TilingConfig(**recorded, pixel_spacing=record["pixel_spacing_mm"], mapping=mapping_option(record.get("mapping")))


def _check_spacing(spacing: float | None, record: dict[str, Any], path: Path) -> None:
    """Refuse a film whose native pixels differ from those the model learnt from, where it learnt from native pixels."""
    if spacing is None and (record["pixel_spacing_mm"] or record["native_spacing_mm"]):
        raise BadInput(f"image {path} has no pixel spacing, and the model needs it; give --assume-spacing MM")
    if record["pixel_spacing_mm"] or not record["native_spacing_mm"] or spacing is None:
        return
    low, high = record["native_spacing_mm"]
    if not high / SPACING_TOLERANCE <= spacing <= low * SPACING_TOLERANCE:
        raise BadInput(
            f"image {path} has pixels of {spacing:g} mm, the model learnt from {low:g} to {high:g} mm; train on shards built "
            "with --pixel-spacing to use one model for both"
        )
