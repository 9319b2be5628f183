"""Prediction over shards, raw films and tile images, with the decoding and normalisation that training used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from common.errors import BadInput
from common.progress import progress
from dali_pipelines import LabelledLoader, create_inference_transform
from models.checkpoints import load_checkpoint, restore_classifier
from models.classifier import MammogramClassifier
from preprocess.backend import backend_of
from preprocess.preview import Box
from preprocess.reading import read_mammogram
from preprocess.tiling import RECORDED, SPACING_TOLERANCE, Film, TilingConfig, tile_film
from shards.archive import escape_id, tile_key
from shards.reading import ShardSet, check_same_pixels
from train.config import InferConfig
from train.pictures import draw_heat_map, heat_map
from train.runtime import Runtime, resolve_runtime

PROBABILITY = "prob:"  # column prefix of the tile table
TOP_TILES = 3
_TILE_COLUMNS = ["key", "image_id", "patient_id", "split", "x", "y", "size"]


@dataclass(frozen=True)
class Predictor:
    """A classifier ready to predict.

    Attributes
    ----------
    model
        In evaluation mode, on the device.
    class_names
        C names.
    preprocessing
        How its tiles were made.
    runtime, config
        Device and precision; the options.
    temperature
        What the logits are divided by, see :func:`train.metrics.fit_temperature`.
    """

    model: MammogramClassifier
    class_names: list[str]
    preprocessing: dict[str, Any]
    runtime: Runtime
    config: InferConfig
    temperature: float = 1.0

    @torch.no_grad()
    def probabilities(self, tiles: torch.Tensor) -> np.ndarray:
        """Return (N, C) probabilities of normalised tiles (N, 1, H, W)."""
        with self.runtime.autocast():
            logits = self.model.classify(tiles.to(self.runtime.device))
        return torch.sigmoid(logits.float() / self.temperature).cpu().numpy()

    def frame(self, tiles: pd.DataFrame, probabilities: np.ndarray) -> pd.DataFrame:
        """Return the tile table with one probability column a class."""
        scores = pd.DataFrame(probabilities, columns=[PROBABILITY + name for name in self.class_names])
        return pd.concat([tiles.reset_index(drop=True), scores], axis=1)


@dataclass(frozen=True)
class FilmInput:
    """An image to predict: its file, id, (height, width) in pixels, spacing in mm where it is known, and boxes to draw."""

    path: Path
    image_id: str
    shape: tuple[int, int]
    patient_id: str = ""
    laterality: str = ""
    spacing_mm: float | None = None
    boxes: tuple[Box, ...] = ()


def load_predictor(path: Path, config: InferConfig) -> Predictor:
    """Load a classifier's checkpoint for prediction.

    Raises
    ------
    BadInput
        The file is no classifier checkpoint.
    """
    runtime = resolve_runtime(config)
    checkpoint = load_checkpoint(path, "classifier")
    model = restore_classifier(checkpoint, path).to(runtime.device, memory_format=torch.channels_last)
    names, temperature = list(checkpoint["class_names"]), checkpoint.get("temperature", 1.0)
    return Predictor(model.eval(), names, checkpoint["preprocessing"], runtime, config, temperature)


def predict_shards(predictor: Predictor, shards: ShardSet, split: str | None) -> pd.DataFrame:
    """Return the tile table of a split (None: all) with probabilities, in tile order.

    Raises
    ------
    BadInput
        The shards' tiles were made otherwise than those the model learnt from.
    """
    check_same_pixels(predictor.preprocessing, shards.preprocessing, str(shards.directory))
    tiles = shards.tiles(split).sort_values("tile", ignore_index=True)
    numbers = tiles["tile"].to_numpy()
    loader = _loader(predictor, shards.shards(split))
    probabilities = np.empty((len(tiles), len(predictor.class_names)), np.float32)
    with progress(None, f"predicting ({predictor.runtime})", "tile", total=len(tiles)) as bar:
        for batch, batch_numbers in loader:
            probabilities[np.searchsorted(numbers, batch_numbers.numpy())] = predictor.probabilities(batch)
            bar.update(len(batch))
    return predictor.frame(tiles[_TILE_COLUMNS], probabilities)


def predict_tile_images(predictor: Predictor, paths: Sequence[Path]) -> pd.DataFrame:
    """Return a row a tile image with probabilities; images of another size are resized to the model's tile size."""
    probabilities = np.empty((len(paths), len(predictor.class_names)), np.float32)
    with progress(None, f"predicting ({predictor.runtime})", "tile", total=len(paths)) as bar:
        for batch, numbers in _loader(predictor, paths):
            probabilities[numbers.numpy()] = predictor.probabilities(batch)
            bar.update(len(batch))
    names = [str(p) for p in paths]
    return predictor.frame(pd.DataFrame({"key": [p.stem for p in paths], "image_id": names}), probabilities)


def predict_film(predictor: Predictor, film_input: FilmInput) -> tuple[Film, pd.DataFrame]:
    """Take a raw film through the model's own preprocessing and predict its tiles.

    Returns
    -------
    film, tiles
        The tiled film and its tile table with probabilities.

    Raises
    ------
    BadInput
        The film cannot be read, has no tile to predict, or pixels of a size the model does not know.
    """
    record = predictor.preprocessing
    config = _tiling_config(record)
    mammogram = read_mammogram(film_input.path, config)
    if film_input.spacing_mm is not None:
        mammogram = mammogram.with_spacing(film_input.spacing_mm, "given")
    _check_spacing(mammogram.header.spacing_mm, record, film_input.path)
    film = tile_film(mammogram, config)
    count = len(film.tiles.x)
    if not count:
        flags = f" ({' '.join(film.flags)})" if film.flags else ""
        raise BadInput(
            f"image {film_input.path}: no tile passed the gates and rules{flags}; look at it with 'mammostream preview'"
        )
    transform = create_inference_transform(mean=record["mean"], std=record["std"])
    size, batch = config.tile_size, predictor.config.batch_size
    probabilities = []
    for start in range(0, count, batch):
        tiles = [transform(film.cut(i, size, record["bits"])) for i in range(start, min(start + batch, count))]
        probabilities.append(predictor.probabilities(torch.stack(tiles)))
    boxes = np.array([film.native_box(i, size) for i in range(count)])
    tiles = pd.DataFrame(
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
    return film, predictor.frame(tiles, np.concatenate(probabilities))


def draw_film_heat_maps(
    predictor: Predictor, film_input: FilmInput, film: Film, tiles: pd.DataFrame, output_dir: Path
) -> list[Path]:
    """Draw one heat map a class over a film and return the pictures' paths."""
    image = backend_of(film.image).to_host(film.image)
    size = predictor.preprocessing["tile_size"]
    boxes = [tuple(edge / film.scale for edge in box) for box in film_input.boxes]
    paths = []
    for name in predictor.class_names:
        probabilities = tiles[PROBABILITY + name].to_numpy()
        heat = heat_map(image.shape, film.tiles.x, film.tiles.y, size, probabilities, step=max(1, size // 16))
        path = output_dir / f"heatmap_{escape_id(film_input.image_id)}_{escape_id(name)}.png"
        title = f"{film_input.image_id}: probability of {name}, highest {probabilities.max():.2f}"
        draw_heat_map(image, heat, boxes, path, title + (", boxes as annotated" if boxes else ""))
        paths.append(path)
    return paths


def aggregate(tiles: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Aggregate tile probabilities to images or breasts.

    Parameters
    ----------
    tiles
        A tile table with probability columns.
    by
        The columns that name a group.

    Returns
    -------
    pandas.DataFrame
        `by`, the number of ``tiles``, and for each class ``max:<class>`` and ``top3:<class>`` (the mean of its three
        highest tiles). Never the mean over all tiles: one lesion would drown in a breast of normal ones.
    """
    groups = tiles.groupby(list(by), sort=False, dropna=False)
    columns = {"tiles": groups.size()}
    for column in (c for c in tiles.columns if c.startswith(PROBABILITY)):
        name = column.removeprefix(PROBABILITY)
        columns[f"max:{name}"] = groups[column].max()
        columns[f"top{TOP_TILES}:{name}"] = groups[column].apply(lambda p: p.nlargest(TOP_TILES).mean())
    return pd.DataFrame(columns).reset_index()


def _loader(predictor: Predictor, source: Sequence) -> LabelledLoader:
    record = predictor.preprocessing
    return LabelledLoader(
        source,
        batch_size=predictor.config.batch_size,
        tile_size=record["tile_size"],
        mean=record["mean"],
        std=record["std"],
        device="gpu" if predictor.runtime.device.type == "cuda" else "cpu",
        num_threads=predictor.config.num_workers,
    )


def _tiling_config(record: dict[str, Any]) -> TilingConfig:
    if not {*RECORDED, "pixel_spacing_mm"} <= record.keys():
        raise BadInput(
            "the model does not say how its tiles were made: another program wrote it; cut tiles as that one did and give them "
            "with --images-are tiles, or fine-tune it on shards"
        )
    return TilingConfig(**{name: record[name] for name in RECORDED}, pixel_spacing=record["pixel_spacing_mm"])


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
