"""The highest tiles of each class as a contact sheet: tile, probability, film and position, and where Grad-CAM points."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from mammostream.common.errors import BadInput
from mammostream.common.files import whole_file
from mammostream.dali_pipelines import LabelledLoader, create_inference_transform
from mammostream.models.classifier import MammogramClassifier
from mammostream.preprocess.overview import fitted
from mammostream.preprocess.tiling import Film
from mammostream.shards.archive import escape_id
from mammostream.shards.reading import ShardSet
from mammostream.train.levels.aggregation import PROBABILITY
from mammostream.train.predict.films import FilmInput, PreparedFilms, film_tiles
from mammostream.train.predict.gradcam import grad_cam
from mammostream.train.predict.heat_maps import CAUTION
from mammostream.train.predict.network import Predictor, loader_options
from mammostream.train.predict.parts import read_part
from mammostream.train.predict.stream import Part, read_rows
from mammostream.train.predict.tables import FEATURES

if TYPE_CHECKING:
    from PIL import Image as PILImage

SHEET_NAME = "top_tiles_{}.png"
_ACROSS, _CELL, _GAP, _CAPTION, _HEADING = 6, 256, 10, 56, 64  # tiles a row; pixels


class Cell(NamedTuple):
    """A tile of a contact sheet."""

    picture: np.ndarray
    """(H, W) float; 0 is black and 1 white."""
    lines: Sequence[str]
    """What stands below it: up to three lines, the first one bold."""
    evidence: np.ndarray | None = None
    """(H, W) float in [0, 1], drawn over a second picture of the tile below the first; None for no second one."""


class TopTiles:
    """The highest tiles of each class; what is kept does not grow with the tiles.

    Parameters
    ----------
    class_names
        C classes; tiles have a column ``prob:<class>`` each.
    count
        Tiles to keep of each class.
    """

    def __init__(self, class_names: Sequence[str], count: int) -> None:
        self.class_names, self._count = list(class_names), count
        self.rows = pd.DataFrame()
        """All that are kept, of any class."""
        self.seen = 0
        """Tiles with a probability so far."""

    def add(self, tiles: pd.DataFrame) -> None:
        """Take in tiles, in the order of the tile table; those without a probability count for nothing."""
        columns = [PROBABILITY + name for name in self.class_names]
        tiles = tiles[tiles[columns].notna().all(axis=1)]
        self.seen += len(tiles)
        self.rows = pd.concat([self.rows, tiles], ignore_index=True)
        kept = [self.of(name).index for name in self.class_names]
        self.rows = self.rows.loc[sorted(set().union(*kept))].reset_index(drop=True)

    def of(self, class_name: str) -> pd.DataFrame:
        """Return a class's tiles, highest first; of equal ones the earlier first."""
        column = PROBABILITY + class_name
        if not len(self.rows):
            return self.rows
        return self.rows.sort_values(column, ascending=False, kind="stable").head(self._count)


def gather_top_tiles(parts: Sequence[Part], folder: Path, class_names: Sequence[str], count: int) -> TopTiles:
    """Return the highest tiles of finished parts; ``part`` says which one a tile is of."""
    top = TopTiles(class_names, count)
    for part in parts:
        tiles, _ = read_part(folder, part)
        top.add(tiles.drop(columns=FEATURES, errors="ignore").assign(part=part.name))
    return top


# What reads tiles again: rows of the tile table -> (N, 1, H, W), normalised, in the rows' order.
ReadTiles = Callable[[pd.DataFrame], Tensor]


def shard_reader(predictor: Predictor, shards: ShardSet) -> ReadTiles:
    """Return what reads tiles from shards; rows have their shard in ``part``."""

    def read(rows: pd.DataFrame) -> Tensor:
        found = {shard.name: shard for shard in shards.shards()}
        tiles: dict[str, Tensor] = {}
        for name, mine in rows.groupby("part", sort=False):
            known, _ = read_rows(shards, name)
            keys = dict(known.loc[known["key"].isin(mine["key"]), ["tile", "key"]].itertuples(index=False))
            options = loader_options(predictor) | {"device": "cpu", "dtype": "float32", "batch_size": len(keys)}
            for batch, numbers in LabelledLoader([found[name]], tiles=list(keys), rank=0, world_size=1, **options):
                tiles |= {keys[number]: tile.clone() for number, tile in zip(numbers.tolist(), batch, strict=True)}
        return torch.stack([tiles[key] for key in rows["key"]])

    return read


def image_reader(predictor: Predictor) -> ReadTiles:
    """Return what reads tile images, whose paths are the rows' ``image_id``."""
    options = loader_options(predictor) | {"device": "cpu", "dtype": "float32"}

    def read(rows: pd.DataFrame) -> Tensor:
        loader = LabelledLoader([Path(name) for name in rows["image_id"]], rank=0, world_size=1, **options)
        return torch.cat([batch.clone() for batch, _ in loader])

    return read


class FilmTiles:
    """Reads tiles of films: from memory those that were the highest when their film was predicted, else the film again.

    Parameters
    ----------
    predictor
        The network.
    films
        All films.
    count
        Tiles to keep of each class.
    """

    def __init__(self, predictor: Predictor, films: Sequence[FilmInput], count: int) -> None:
        self._predictor, self._films = predictor, {film.image_id: film for film in films}
        self._top = TopTiles(predictor.class_names, count)
        self._pixels: dict[str, np.ndarray] = {}  # by key

    def keep(self, film: Film, tiles: pd.DataFrame) -> None:
        """Keep the pixels of a film's tiles that are among the highest so far."""
        self._top.add(tiles)
        wanted = set(self._top.rows["key"])
        self._pixels = {key: pixels for key, pixels in self._pixels.items() if key in wanted}
        self._cut(film, tiles, wanted)

    def __call__(self, rows: pd.DataFrame) -> Tensor:
        """Read tiles, see :data:`ReadTiles`."""
        missing = rows[~rows["key"].isin(self._pixels)]
        films = [self._films[image_id] for image_id in missing["image_id"].unique()]
        for film_input, film in PreparedFilms(self._predictor, films) if films else ():
            if isinstance(film, BadInput):
                raise film
            self._cut(film, film_tiles(film_input, film, self._predictor.preprocessing), set(missing["key"]))
        record = self._predictor.preprocessing
        transform = create_inference_transform(record.get("view_size"), record["mean"], record["std"])
        return torch.stack([transform(self._pixels[key]) for key in rows["key"]])

    def _cut(self, film: Film, tiles: pd.DataFrame, wanted: Set[str]) -> None:
        record = self._predictor.preprocessing
        for index in np.flatnonzero(tiles["key"].isin(wanted)):
            self._pixels[tiles["key"].iloc[index]] = film.cut(int(index), record["tile_size"], record["bits"])


def draw_top_tiles(
    predictor: Predictor, top: TopTiles, read: ReadTiles, output_dir: Path, with_grad_cam: bool = False
) -> list[Path]:
    """Draw a contact sheet a class, ``top_tiles_<class>.png``: its highest tiles with probability, film and position.

    Parameters
    ----------
    predictor
        The network.
    top
        The tiles.
    read
        Reads their pixels.
    output_dir
        Where the pictures go.
    with_grad_cam
        Draw each tile once more below itself, with what speaks for the class over it, see
        :func:`mammostream.train.predict.gradcam.grad_cam`.
    """
    record, paths = predictor.preprocessing, []
    for number, name in enumerate(top.class_names):
        rows = top.of(name)
        if not len(rows):
            continue
        tiles = read(rows)
        maps: Any = [None] * len(rows)
        if with_grad_cam:
            batches = tiles.to(predictor.runtime.device).split(predictor.config.batch_size)
            maps = (
                torch.cat([grad_cam(cast(MammogramClassifier, predictor.model), batch, number) for batch in batches])
                .cpu()
                .numpy()
            )
        pictures = (tiles[:, 0] * record["std"] + record["mean"]).numpy()
        cells = [
            Cell(picture, _lines(row, row[PROBABILITY + name]), evidence)
            for picture, evidence, row in zip(pictures, maps, rows.to_dict("records"), strict=True)
        ]
        path = output_dir / SHEET_NAME.format(escape_id(name))
        title = f"{name}: the {len(rows)} highest of {top.seen:,} tiles"
        note = "Probability, film, upper left corner and edge in the film's pixels."
        note += " Below each: what speaks for the class (Grad-CAM)." if with_grad_cam else ""
        draw_contact_sheet(cells, path, title, f"{note} {CAUTION}")
        paths.append(path)
    return paths


def _lines(row: Mapping[str, Any], probability: float) -> list[str]:
    """Return what stands below a tile."""
    if pd.isna(row.get("x")):  # a tile image
        return [f"{probability:.3f}", Path(row["image_id"]).name]
    return [f"{probability:.3f}", row["image_id"], f"x {row['x']:.0f}, y {row['y']:.0f}, {row['size']:.0f} px"]


def draw_contact_sheet(cells: Sequence[Cell], path: Path, title: str, note: str = "") -> None:
    """Draw tiles in rows of six, each with its lines below it.

    Parameters
    ----------
    cells
        At least one.
    path
        The PNG.
    title, note
        Two lines above the tiles.
    """
    from matplotlib.font_manager import findfont
    from PIL import Image, ImageDraw, ImageFont

    font, bold = (ImageFont.truetype(findfont("DejaVu Sans:bold" if is_bold else "DejaVu Sans"), 14) for is_bold in (0, 1))
    with_evidence = any(cell.evidence is not None for cell in cells)
    across, down = min(_ACROSS, max(len(cells), 3)), math.ceil(len(cells) / _ACROSS)
    width, height = _CELL + _GAP, _CELL * (1 + with_evidence) + _CAPTION + _GAP
    sheet = Image.new("RGB", (across * width + _GAP, down * height + _HEADING), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (text, its_font, colour) in enumerate(((title, bold, "black"), (note, font, "#404040"))):
        draw.text((_GAP, 10 + 22 * row), fitted(text, its_font, sheet.width - 2 * _GAP), colour, its_font)
    for index, cell in enumerate(cells):
        left, top = _GAP + index % _ACROSS * width, _HEADING + index // _ACROSS * height
        sheet.paste(_grey(cell.picture), (left, top))
        if cell.evidence is not None:
            sheet.paste(_overlaid(cell.picture, cell.evidence), (left, top + _CELL))
        for row, line in enumerate(cell.lines):
            its_font = font if row else bold
            where = left, top + _CELL * (1 + with_evidence) + 2 + 18 * row
            draw.text(where, fitted(line, its_font, _CELL), "black", its_font)
    with whole_file(path) as temporary:
        sheet.save(temporary, "png")


def _grey(picture: np.ndarray) -> PILImage.Image:
    from PIL import Image

    grey = Image.fromarray(np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8))
    smaller = picture.shape[0] < _CELL
    # Small tiles show their pixels; large ones are averaged.
    return grey.resize((_CELL, _CELL), Image.Resampling.NEAREST if smaller else Image.Resampling.LANCZOS)


def _overlaid(picture: np.ndarray, evidence: np.ndarray) -> PILImage.Image:
    import matplotlib as mpl
    from PIL import Image

    colours = mpl.colormaps["inferno"](np.clip(evidence, 0, 1))
    colours[..., 3] = 0.6 * np.clip(evidence, 0, 1)
    layer = Image.fromarray(np.rint(colours * 255).astype(np.uint8)).resize((_CELL, _CELL), Image.Resampling.BILINEAR)
    below = _grey(picture).convert("RGBA")
    return Image.alpha_composite(below, layer).convert("RGB")
