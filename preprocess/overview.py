"""Pictures of many films: one each, contact sheets put together from them, and the energies of all tiles.

A film's picture carries its own facts (counts, flags, energies, and what it was drawn from) as PNG text. So contact sheets are
made of pictures that are there already, and a picture is drawn again only where its film or an option has changed.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mammostream.common.errors import BadInput
from mammostream.common.files import sha256_json, whole_file
from mammostream.preprocess.preview import (
    BAD_COLOUR,
    BOX_COLOUR,
    CLUSTER_COLOUR,
    CONTOUR_COLOUR,
    ENERGY_EDGES,
    FILM_PANEL,
    RULE_COLOURS,
    SIZE_INCHES,
    Box,
    draw_energies,
    draw_film,
    energy_counts,
    few_colours,
)
from mammostream.preprocess.reading import read_mammogram
from mammostream.preprocess.tiling import TilingConfig, tile_film

if TYPE_CHECKING:
    from PIL import Image as PILImage
    from PIL import ImageDraw, ImageFont

FILMS_PER_SHEET = 24
ENERGIES_PICTURE = "energies.png"
SIDE_DISAGREES = "side_disagrees"
_SHEET = "contact_sheet"
_RULES = ("breast rule", "frequency rule", "both rules", "rescue tile")  # as RULE_COLOURS
_PERCENTILES = (50, 75, 90, 95, 99)
_FACTS = "mammostream"  # the PNG text's name
_DRAWING = 3  # raise it when pictures are drawn otherwise: old ones are drawn again then

_CELL_WIDTH, _CAPTION, _GAP, _HEADING = 300, 54, 8, 54  # pixels
_CELL = (_CELL_WIDTH, round(_CELL_WIDTH * FILM_PANEL[3] * SIZE_INCHES[1] / (FILM_PANEL[2] * SIZE_INCHES[0])))


@dataclass(frozen=True)
class PictureJob:
    """One film to be drawn.

    Attributes
    ----------
    image_id
        Its name in pictures.
    image, picture
        The film, and the PNG to write.
    spacing_mm, spacing_source
        Size of a native pixel in mm and where it is from; None leaves it to the file.
    laterality, view
        As the metadata have them (L or R; CC, MLO and others), or empty.
    boxes
        Annotated boxes (xmin, ymin, xmax, ymax) in native pixels.
    """

    image_id: str
    image: Path
    picture: Path
    spacing_mm: float | None = None
    spacing_source: str = ""
    laterality: str = ""
    view: str = ""
    boxes: tuple[Box, ...] = ()


@dataclass(frozen=True)
class FilmPicture:
    """What became of one film.

    Attributes
    ----------
    image_id, path
        Its name, and its picture.
    reason
        Why there is no picture; empty where there is one.
    counts
        As :attr:`mammostream.preprocess.selection.TileSelection.counts`.
    flags
        What is doubtful: the film's flags, and ``side_disagrees`` where the breast is not at the side that the metadata say.
    energies
        As :func:`mammostream.preprocess.preview.energy_counts`.
    plausibility
        Of the breast mask, 0-1; 0 where there is no picture.
    """

    image_id: str
    path: Path
    reason: str = ""
    counts: dict[str, int] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    energies: tuple[int, ...] = ()
    plausibility: float = 0.0


def draw_pictures(
    jobs: Sequence[PictureJob], config: TilingConfig, workers: int = 1, overwrite: bool = False
) -> Iterator[FilmPicture]:
    """Run :func:`draw_picture` for each film, in several processes where asked for, and yield the results in order.

    Raises
    ------
    BadInput
        A worker was killed, or a film's picture would have the name of an overview.
    """
    import joblib
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    for job in jobs:
        if _is_overview(job.picture):
            raise BadInput(f"image '{job.image_id}' has the name of an overview of films; give it another image_id")
    run = joblib.Parallel(n_jobs=min(workers, len(jobs)), return_as="generator")
    try:
        yield from run(joblib.delayed(draw_picture)(job, config, overwrite) for job in jobs)
    except TerminatedWorkerError:
        raise BadInput(
            "a worker process was killed, perhaps for want of memory; run the same command again, with fewer --workers: "
            "finished pictures are kept"
        ) from None


def draw_picture(job: PictureJob, config: TilingConfig, overwrite: bool = False) -> FilmPicture:
    """Read, tile and draw one film, unless its picture is there, drawn from the same file with the same options.

    A film that cannot be read gives a reason instead, and an earlier picture of it is removed.
    """
    source = _source(job, config)
    facts = None if overwrite else _read_facts(job.picture)
    if facts is None or facts["source"] != source:
        try:
            facts = _draw(job, config, source)
        except BadInput as error:
            job.picture.unlink(missing_ok=True)
            return FilmPicture(job.image_id, job.picture, reason=str(error))
    return FilmPicture(
        job.image_id,
        job.picture,
        "",
        facts["counts"],
        flags=tuple(facts["flags"]),
        energies=tuple(facts["energies"]),
        plausibility=facts["plausibility"],
    )


def _draw(job: PictureJob, config: TilingConfig, source: str) -> dict[str, Any]:
    mammogram = read_mammogram(job.image, config).with_view(job.view)
    if job.spacing_mm is not None:
        mammogram = mammogram.with_spacing(job.spacing_mm, job.spacing_source)
    film = tile_film(mammogram, config)
    header, side, flags = mammogram.header, film.segmentation.side, list(film.flags)
    flags += [SIDE_DISAGREES] if job.laterality and side and job.laterality != side else []
    facts = {
        "source": source,
        "counts": film.selection.counts,
        "flags": flags,
        "plausibility": film.segmentation.plausibility,
        "energies": energy_counts(film.selection).tolist(),
    }
    spacing = f"{header.spacing_mm:g} mm a pixel ({header.spacing_source})" if header.spacing_mm else "pixel size unknown"
    title = f"{job.image_id}   {spacing}"
    draw_film(film, config.tile_size, job.picture, title, job.boxes, flags, {_FACTS: json.dumps(facts)})
    return facts


def _source(job: PictureJob, config: TilingConfig) -> str:
    """Return a hash of all that decides what a picture shows."""
    state = job.image.stat() if job.image.is_file() else None
    file = [str(job.image.absolute()), state.st_size, state.st_mtime_ns] if state else []
    shown = [job.image_id, job.spacing_mm, job.spacing_source, job.laterality, job.view, job.boxes]
    return sha256_json({"film": shown, "file": file, "options": asdict(config), "drawing": _DRAWING})


def _read_facts(picture: Path) -> dict[str, Any] | None:
    from PIL import Image

    try:
        with Image.open(picture) as image:
            return json.loads(image.info[_FACTS])
    except (OSError, KeyError):  # there is none, or it is some other picture
        return None


def _is_overview(picture: Path) -> bool:
    return picture.name == ENERGIES_PICTURE or picture.stem == _SHEET or picture.stem.removeprefix(f"{_SHEET}_").isdecimal()


def write_contact_sheets(pictures: Sequence[FilmPicture], folder: Path) -> list[Path]:
    """Write pages of up to 24 films: each one's left panel, counts and flags, or the reason why there is none.

    The pages are ``contact_sheet.png``, or ``contact_sheet_001.png`` and so on. Those of an earlier run are removed.
    """
    pages = [pictures[start : start + FILMS_PER_SHEET] for start in range(0, len(pictures), FILMS_PER_SHEET)]
    names = [f"{_SHEET}_{number:03}.png" for number in range(1, len(pages) + 1)] if len(pages) > 1 else [f"{_SHEET}.png"]
    paths = [folder / name for name in names]
    for number, (page, path) in enumerate(zip(pages, paths, strict=True), start=1):
        sheet = _contact_sheet(page, f"page {number} of {len(pages)}")
        with whole_file(path) as temporary:
            sheet.save(temporary, "png")
    for old in folder.glob(f"{_SHEET}*.png"):
        if _is_overview(old) and old not in paths:
            old.unlink()
    return paths


def _contact_sheet(pictures: Sequence[FilmPicture], title: str) -> PILImage.Image:
    from matplotlib.font_manager import findfont
    from PIL import Image, ImageDraw, ImageFont

    font, small = (ImageFont.truetype(findfont("DejaVu Sans"), size) for size in (14, 12))
    across = min(6, math.ceil(math.sqrt(1.5 * len(pictures))))
    down = math.ceil(len(pictures) / across)
    width, height = _CELL[0] + _GAP, _CELL[1] + _CAPTION
    sheet = Image.new("RGB", (max(across, 2) * width + _GAP, down * height + _HEADING), "white")
    draw = ImageDraw.Draw(sheet)
    bad = sum(bool(picture.reason) for picture in pictures)
    heading = f"{title}: {len(pictures)} films, {_total_counts(pictures)['kept']} tiles"
    draw.text((_GAP, 6), heading + (f", {bad} films without a picture" if bad else ""), "black", font)
    _draw_key(draw, small)
    for index, picture in enumerate(pictures):
        left, top = _GAP + index % across * width, _HEADING + index // across * height
        if picture.reason:
            sheet.paste("#5a1f1f", (left, top, left + _CELL[0], top + _CELL[1]))
            reason = "\n".join(textwrap.wrap(picture.reason, 40))
            draw.multiline_text((left + 8, top + 8), reason, "white", small)
        else:
            sheet.paste(_film_panel(picture.path), (left, top))
        lines = (
            (picture.image_id, "black", font),
            (_count_line(picture), "black", small),
            (" ".join(picture.flags), BAD_COLOUR, small),
        )
        for row, (text, colour, its_font) in enumerate(lines):
            draw.text((left, top + _CELL[1] + 17 * row), fitted(text, its_font, _CELL[0]), colour, its_font)
    return few_colours(sheet)


def _draw_key(draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont) -> None:
    left = _GAP
    marks = {"cluster of specks": CLUSTER_COLOUR, "annotated box": BOX_COLOUR, "breast": CONTOUR_COLOUR}
    for name, colour in zip((*_RULES, *marks), (*RULE_COLOURS.values(), *marks.values()), strict=True):
        draw.rectangle((left, 31, left + 12, 43), fill=colour, outline="black")
        draw.text((left + 17, 29), name, "black", font)
        left += 32 + round(font.getlength(name))


def _film_panel(picture: Path) -> PILImage.Image:
    """Return the left panel of a film's picture at the size of a cell."""
    from PIL import Image

    left, bottom, width, height = FILM_PANEL
    with Image.open(picture) as image:
        shares = (left, 1 - bottom - height, left + width, 1 - bottom)
        x0, y0, x1, y1 = (share * length for share, length in zip(shares, image.size * 2, strict=True))
        return image.convert("RGB").resize(_CELL, Image.Resampling.LANCZOS, box=(x0, y0, x1, y1))


def _count_line(picture: FilmPicture) -> str:
    if picture.reason:
        return "no picture"
    rules = {"frequency": "kept_frequency_only", "both": "kept_both_rules", "rescue": "kept_rescue"}
    parts = ", ".join(f"{picture.counts[name]} {rule}" for rule, name in rules.items() if picture.counts[name])
    return f"{picture.counts['kept']} of {picture.counts['candidates']} tiles" + (f": {parts}" if parts else "")


def fitted(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Shorten a text in its middle until it is no wider than `width` pixels."""
    half = len(text)
    shortened = text
    while half and font.getlength(shortened) > width:
        half = min(half - 1, len(text) // 2)
        shortened = f"{text[:half]}…{text[-half:]}" if half else "…"
    return shortened


def write_energies(pictures: Sequence[FilmPicture], config: TilingConfig, folder: Path) -> None:
    """Draw ``energies.png``: the energies of all films' candidates past the gates, percentiles, and a common threshold."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    draw_energies(axes, _all_energies(pictures), config.min_freq_energy if config.freq_percentile is None else math.inf)
    for percentile, energy in _energy_percentiles(pictures).items():
        axes.axvline(energy, color="#404040", linewidth=0.8, linestyle=":")
        style: dict[str, Any] = {
            "fontsize": 7,
            "va": "top",
            "ha": "right",
            "rotation": 90,
            "transform": axes.get_xaxis_transform(),
        }
        axes.text(energy, 0.98, f"{percentile} % ", **style)
    with whole_file(folder / ENERGIES_PICTURE) as temporary:
        figure.savefig(temporary, format="png")


def summary_lines(pictures: Sequence[FilmPicture]) -> list[str]:
    """Say what became of all films' candidates, how many films have which flag, and how the energies are spread."""
    lines = [f"{name:<20} {count:>8}" for name, count in _total_counts(pictures).items()]
    flags = Counter(flag for picture in pictures for flag in picture.flags)
    lines += [f"{flag:<20} {count:>8} films" for flag, count in flags.most_common()]
    energies = ", ".join(f"{energy:.2g} ({percentile} %)" for percentile, energy in _energy_percentiles(pictures).items())
    return [*lines, f"energy of candidates past the gates, percentiles: {energies or 'none'}"]


def _total_counts(pictures: Iterable[FilmPicture]) -> Counter[str]:
    totals: Counter[str] = Counter()
    for picture in pictures:
        totals.update(picture.counts)
    return totals


def _all_energies(pictures: Iterable[FilmPicture]) -> np.ndarray:
    return sum((np.array(p.energies) for p in pictures if p.energies), np.zeros(len(ENERGY_EDGES) - 1, dtype=int))


def _energy_percentiles(pictures: Iterable[FilmPicture]) -> dict[int, float]:
    """Return percentiles of the energies of all candidates past the gates, true to a bin's width (12 %); none without any."""
    counts = _all_energies(pictures)
    if not counts.any():
        return {}
    share = np.concatenate([[0], np.cumsum(counts)]) / counts.sum()
    return {p: float(np.interp(p / 100, share, ENERGY_EDGES)) for p in _PERCENTILES}
