"""The highest tiles of each class as a contact sheet: tile, probability, film and position, and where Grad-CAM points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from common.files import whole_file
from preprocess.overview import fitted

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


def highest(tiles: pd.DataFrame, column: str, count: int) -> pd.DataFrame:
    """Return the `count` rows with the highest values of a column, highest first; of equal ones the earlier row first."""
    known = tiles[tiles[column].notna()]
    return known.sort_values(column, ascending=False, kind="stable").head(count)


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
