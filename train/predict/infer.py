"""Prediction over shards, raw films and tile images, with the decoding and normalisation that training used."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch
from scipy.special import expit, logit
from torch import Tensor, nn

from mammostream.common.errors import BadInput
from mammostream.common.files import sha256_file
from mammostream.dali_pipelines import create_inference_transform
from mammostream.models.backbones import encode
from mammostream.models.byol import MammogramBYOL
from mammostream.models.checkpoints import load_checkpoint, restore_byol, restore_classifier
from mammostream.models.classifier import MammogramClassifier
from mammostream.models.folding import fold_batch_norms
from mammostream.preprocess.backend import backend_of
from mammostream.preprocess.preview import Box
from mammostream.preprocess.reading import read_mammogram
from mammostream.preprocess.tiling import RECORDED, SPACING_TOLERANCE, Film, TilingConfig, tile_film
from mammostream.shards.archive import escape_id, tile_key
from mammostream.shards.reading import Shard, ShardSet, check_same_pixels
from mammostream.train.predict.aggregation import PROBABILITY
from mammostream.train.predict.config import EmbedConfig, InferConfig
from mammostream.train.predict.heat_maps import draw_heat_map, heat_map
from mammostream.train.predict.readable_tiles import FileTiles, ShardTiles
from mammostream.train.predict.tables import FEATURES
from mammostream.train.run.runtime import Runtime, resolve_runtime

_IMAGES_A_PART, _FILMS_A_PART = 4096, 32
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_TILE_COLUMNS = ["tile", "key", "image_id", "patient_id", "split", "x", "y", "size"]
_IMAGE_COLUMNS = ["image_id", "patient_id", "split", "laterality", "view", "reason"]


class Answer(NamedTuple):
    """What the network says of N tiles: float32, on its device."""

    logits: Tensor  # (N, C)
    features: Tensor | None  # (N, D), None where they are not wanted

    def take(self, rows: np.ndarray) -> Answer:
        """Return some of the rows, chosen by a mask."""
        if rows.all():
            return self
        kept = torch.from_numpy(np.flatnonzero(rows)).to(self.logits.device)
        return Answer(self.logits[kept], None if self.features is None else self.features[kept])


class Predicted(NamedTuple):
    """Rows of the tile table, and what is known of their images (`image_id`, ``laterality``, …, `reason` where one failed)."""

    tiles: pd.DataFrame
    images: pd.DataFrame


class Network(nn.Module):
    """A backbone and its head as inference runs them: batch norms folded, the backbone in the precision asked for.

    The head stays in float32: it costs nothing, and half precision has three digits.
    """

    def __init__(self, model: MammogramClassifier | MammogramBYOL, dtype: torch.dtype, with_head: bool) -> None:
        super().__init__()
        self.backbone = fold_batch_norms(model.backbone).to(dtype=dtype, memory_format=torch.channels_last)
        self.head = copy.deepcopy(model.classification_head) if with_head else None
        self._dtype = dtype

    def forward(self, tiles: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return logits (N, C), None without a head, and features (N, D), both float32, of tiles (N, 1, H, W)."""
        features = encode(self.backbone, tiles.to(self._dtype)).float()
        return None if self.head is None else self.head(features), features


@dataclass(frozen=True)
class Predictor:
    """A network ready to predict.

    Attributes
    ----------
    model
        As it was trained, in evaluation mode, on the device; ``network`` is its faster form.
    network
        Maps tiles (N, 1, H, W) to (logits, features), see :class:`Network`.
    class_names
        C names; none where only features are wanted.
    preprocessing
        How its tiles were made.
    runtime, config
        Device and precision; the options.
    temperature
        What logits are divided by, see :func:`mammostream.train.evaluate.metrics.fit_temperature`.
    thresholds
        Class -> the probability from which it counts as found.
    sha256
        Of the checkpoint's file.
    wants_features
        Whether answers hold them.
    """

    model: MammogramClassifier | MammogramBYOL
    network: Callable[[Tensor], tuple[Tensor | None, Tensor]]
    class_names: list[str]
    preprocessing: dict[str, Any]
    runtime: Runtime
    config: EmbedConfig
    temperature: float
    thresholds: dict[str, float]
    sha256: str
    wants_features: bool

    @property
    def feature_dim(self) -> int:
        """Length of the features of an answer; 0 where it holds none."""
        return self.model.backbone.num_features if self.wants_features else 0

    @torch.inference_mode()
    def answer(self, tiles: Tensor) -> Answer:
        """Return what the network says of normalised tiles (N, 1, H, W), N at most the batch size; it stays on the device."""
        count = len(tiles)
        tiles = tiles.to(self.runtime.device)
        if self.config.compiles(self.runtime.device.type) and count < self.config.batch_size:
            # A compiled network is compiled for one size.
            tiles = torch.cat([tiles, tiles.new_zeros(self.config.batch_size - count, *tiles.shape[1:])])
        logits, features = self.network(tiles)
        if logits is None:
            logits = features.new_zeros(count, 0)
        return Answer(logits[:count], features[:count] if self.wants_features else None)

    def probabilities(self, tiles: Tensor) -> np.ndarray:
        """Return (N, C) probabilities of normalised tiles (N, 1, H, W)."""
        return self.calibrated(self.answer(tiles).logits)

    def calibrated(self, logits: Tensor) -> np.ndarray:
        """Return the probabilities of logits (N, C)."""
        return torch.sigmoid(logits.float().cpu() / self.temperature).numpy()

    def frame(
        self,
        tiles: pd.DataFrame,
        answers: Sequence[Answer],
        reasons: Sequence[str] | str = "",
        rows: Sequence[int] | None = None,
    ) -> pd.DataFrame:
        """Return the tile table with one probability column a class, and features where they are wanted.

        Parameters
        ----------
        tiles
            The rows.
        answers
            What :meth:`answer` gave.
        reasons
            Why a tile has no answer, empty where it has.
        rows
            The row of each answer; None: the first is of the first row, and so on.
        """
        rows = np.arange(len(tiles)) if rows is None else np.asarray(rows, int)
        scores = np.full((len(tiles), len(self.class_names)), np.nan, np.float32)
        features = np.full(len(tiles), None, object)
        if answers:
            scores[rows] = self.calibrated(torch.cat([answer.logits for answer in answers]))
        if answers and self.wants_features:
            found = torch.cat([answer.features for answer in answers]).cpu().numpy()
            for row, values in zip(rows, found, strict=True):
                features[row] = values
        columns = {PROBABILITY + name: scores[:, c] for c, name in enumerate(self.class_names)} | {"reason": reasons}
        columns |= {FEATURES: features} if self.wants_features else {}
        return pd.concat([tiles.reset_index(drop=True), pd.DataFrame(columns, index=range(len(tiles)))], axis=1)


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


def load_predictor(
    path: Path, config: EmbedConfig, runtime: Runtime | None = None, *, features_only: bool = False
) -> Predictor:
    """Load a checkpoint for prediction.

    Parameters
    ----------
    path
        A classifier's; for features, a BYOL model's will do as well.
    config
        The options: an :class:`InferConfig` unless only features are wanted.
    runtime
        Device, precision and processes; None resolves them from `config` for one process.
    features_only
        Leave the classes out.

    Raises
    ------
    BadInput
        The file is no such checkpoint.
    """
    runtime = runtime or resolve_runtime(config)
    checkpoint = load_checkpoint(path, None if features_only else "classifier")
    restore = restore_classifier if checkpoint["kind"] == "classifier" else restore_byol
    model = restore(checkpoint, path).to(runtime.device, memory_format=torch.channels_last).eval()
    network: Any = Network(model, _DTYPES[runtime.precision], with_head=not features_only).eval()
    if config.compiles(runtime.device.type):
        if runtime.device.type == "cpu":
            from torch._inductor import config as inductor

            # Frozen weights are laid out once, and what follows a convolution becomes part of it. As an option of
            # torch.compile it comes too late to do anything.
            inductor.freezing = True
        network = torch.compile(network)
    names: list[str] = []
    temperature, thresholds, wants_features = 1.0, {}, features_only
    if isinstance(config, InferConfig):
        names = list(checkpoint["class_names"])
        fitted = float(checkpoint.get("temperature") or 1.0)
        temperature = fitted if config.temperature is None else config.temperature
        thresholds = _thresholds(checkpoint, names, config.threshold, fitted / temperature)
        wants_features = config.embeddings
    record, sha256 = checkpoint["preprocessing"], sha256_file(path)
    return Predictor(model, network, names, record, runtime, config, temperature, thresholds, sha256, wants_features)


def _thresholds(checkpoint: dict[str, Any], names: Sequence[str], threshold: float | None, stretch: float) -> dict[str, float]:
    """Return the threshold of each class: the one that is given, else the checkpoint's, else 0.5.

    The checkpoint's belong to probabilities of its own temperature; those of another have their logits stretched.
    """
    if threshold is not None:
        return dict.fromkeys(names, threshold)
    fitted = dict(zip(names, checkpoint.get("thresholds") or (), strict=False))
    moved = {name: float(expit(logit(t) * stretch)) for name, t in fitted.items() if t is not None}
    return {name: moved.get(name, 0.5) for name in names}


@dataclass(frozen=True)
class Part:
    """A part of the work that is done as a whole: a shard, some tile images, some films.

    Attributes
    ----------
    name
        What its files are called.
    size
        Tiles or films.
    open
        Begins to read it, perhaps in another thread while the part before is predicted.
    predict
        Predicts what `open` gave.
    """

    name: str
    size: int
    open: Callable[[], Any]
    predict: Callable[[Any], Predicted]


def shard_parts(predictor: Predictor, shards: ShardSet, split: str | None) -> list[Part]:
    """Return a part a shard of a split (None: all), in the order of tile numbers; shards without tiles are parts as well.

    Raises
    ------
    BadInput
        The shards' tiles were made otherwise than those the model learnt from, or there are none of that split.
    """
    check_same_pixels(predictor.preprocessing, shards.preprocessing, str(shards.directory))
    found = {shard.name: shard for shard in shards.shards(split)}
    return [
        Part(
            entry["name"],
            entry["tiles"],
            partial(_open_shard, predictor, found.get(entry["name"])),
            partial(_predict_shard, predictor, shards, entry["name"]),
        )
        for entry in shards.meta["shards"]
        if split in (None, entry["split"])
    ]


def image_parts(predictor: Predictor, paths: Sequence[Path]) -> list[Part]:
    """Return parts of tile images; those of another size are resized to the model's tile size."""

    def part(start: int) -> Part:
        mine = paths[start : start + _IMAGES_A_PART]
        # Made where it is read: a loader of files reads nothing ahead of its first batch.
        return Part(_part_name(start), len(mine), list, lambda _: _predict_images(predictor, mine))

    return [part(start) for start in range(0, len(paths), _IMAGES_A_PART)]


def film_parts(
    predictor: Predictor, films: Sequence[FilmInput], on_film: Callable[[FilmInput, Film, pd.DataFrame], None] | None = None
) -> list[Part]:
    """Return parts of raw films; `on_film` gets each film that was predicted, with its tile table."""

    def part(start: int) -> Part:
        mine = films[start : start + _FILMS_A_PART]
        return Part(
            _part_name(start),
            len(mine),
            lambda: PreparedFilms(predictor, mine),
            lambda prepared: _predict_films(predictor, prepared, on_film),
        )

    return [part(start) for start in range(0, len(films), _FILMS_A_PART)]


def _part_name(start: int) -> str:
    return f"part-{start:08d}"


def _open_shard(predictor: Predictor, shard: Shard | None) -> ShardTiles | None:
    if shard is None:
        return None
    if predictor.runtime.device.type == "cuda":
        torch.cuda.set_device(predictor.runtime.device)  # each thread has its own
    return ShardTiles(shard, **loader_options(predictor))


def loader_options(predictor: Predictor) -> dict[str, Any]:
    """Return how the loader makes tiles as the model knows them."""
    record, runtime = predictor.preprocessing, predictor.runtime
    return {
        "batch_size": predictor.config.batch_size,
        "tile_size": record["tile_size"],
        "mean": record["mean"],
        "std": record["std"],
        "dtype": "float16" if runtime.precision == "fp16" else "float32",
        "device": "gpu" if runtime.device.type == "cuda" else "cpu",
        "num_threads": predictor.config.num_workers,
        "keep_memory": False,  # a loader a shard, for hours
    }


def _predict_shard(predictor: Predictor, shards: ShardSet, name: str, ready: ShardTiles | None) -> Predicted:
    """Return a row a tile of a shard, in tile order, and a row an image; those that cannot be read have their reason."""
    tiles, images = read_rows(shards, name)
    place = {key: row for row, key in enumerate(tiles["key"])}
    numbers_of = tiles["tile"].to_numpy()
    reasons = np.full(len(tiles), (ready.fault if ready else "") or "the index of its shard does not name it", object)
    rows: list[int] = []
    answers: list[Answer] = []
    for keys, batch, numbers in ready or ():
        mine = np.array([place.get(key, -1) for key in keys])
        right = (mine >= 0) & (numbers_of[mine] == numbers.numpy())
        answers.append(predictor.answer(batch).take(right))
        rows += mine[right].tolist()
        reasons[mine[~right & (mine >= 0)]] = f"its number in shard {name} is not that of the table"
    for key, reason in ready.faults.items() if ready else ():
        if key in place:
            reasons[place[key]] = reason
    reasons[rows] = ""
    return Predicted(predictor.frame(tiles.drop(columns="tile"), answers, reasons, rows), images)


def read_rows(shards: ShardSet, name: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the rows of a shard's tiles, in tile order, and of its images, without the rest of the tables.

    An image without tiles has the reason for it.
    """
    table = pq.ParquetFile(shards.table("tiles"))
    with_tiles = [entry["name"] for entry in shards.meta["shards"] if entry["tiles"]]  # a row group each
    if name in with_tiles:
        tiles = table.read_row_group(with_tiles.index(name), _TILE_COLUMNS)
    else:
        tiles = table.schema_arrow.empty_table().select(_TILE_COLUMNS)
    columns = [*_IMAGE_COLUMNS, "flags", "kept"]
    images = pq.read_table(shards.table("images"), columns=columns, filters=[("shard", "=", name)]).to_pandas()
    empty = (images["reason"] == "") & (images["kept"] == 0)
    images.loc[empty, "reason"] = [_without_tiles(flags) for flags in images.loc[empty, "flags"]]
    return tiles.to_pandas().sort_values("tile", ignore_index=True), images[_IMAGE_COLUMNS]


def _without_tiles(flags: str) -> str:
    return "no tile passed the gates and rules" + (f" ({flags})" if flags else "")


def _predict_images(predictor: Predictor, paths: Sequence[Path]) -> Predicted:
    """Return a row a tile image, and the same as its image; bad ones have their reason."""
    names = [str(path) for path in paths]
    place = {name: row for row, name in enumerate(names)}
    tiles = FileTiles(paths, **loader_options(predictor))
    rows: list[int] = []
    answers: list[Answer] = []
    for keys, batch, _ in tiles:
        answers.append(predictor.answer(batch))
        rows += [place[key] for key in keys]
    reasons = [tiles.faults.get(name, "") for name in names]
    table = pd.DataFrame({"key": [path.stem for path in paths], "image_id": names, "patient_id": "", "split": ""})
    frame = predictor.frame(table, answers, reasons, rows)
    return Predicted(frame, frame[["image_id", "patient_id", "split", "reason"]])


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
    mammogram = read_mammogram(film_input.path, config)
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
    transform = create_inference_transform(mean=record["mean"], std=record["std"])
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
    step = max(1, size // 32)
    boxes = [tuple(edge / film.scale for edge in box) for box in film_input.boxes]
    paths = {}
    for name in predictor.class_names:
        probabilities = tiles[PROBABILITY + name].to_numpy()
        heat = heat_map(image.shape, film.tiles.x, film.tiles.y, size, probabilities, step)
        path = output_dir / f"heatmap_{escape_id(film_input.image_id)}_{escape_id(name)}.png"
        facts = f"probability of {name}, highest tile {probabilities.max():.2f}" + (", boxes as annotated" if boxes else "")
        draw_heat_map(image, heat, step, boxes, path, f"{film_input.image_id}\n{facts}")
        paths[name] = path
    return paths


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
