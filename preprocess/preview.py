"""The picture of one film: its mask, what became of its tiles, its response to specks, and its tiles' energies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mammostream.common.files import whole_file
from mammostream.preprocess.backend import backend_of
from mammostream.preprocess.energy import EXCESS_ABOVE, EXCESS_LIMIT
from mammostream.preprocess.resampling import block_mean
from mammostream.preprocess.segmentation import LARGE_FOG_MM2
from mammostream.preprocess.selection import TileSelection
from mammostream.preprocess.tiling import Film

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure
    from PIL import Image as PILImage

Box = tuple[float, float, float, float]

RULE_COLOURS = {"breast": "#3fa7ff", "frequency": "#ff5d5d", "both": "#ffc83d", "rescue": "#ff3dff"}
FATE_COLOURS = {"intensity": "#7d8fa3", "nonzero": "#c79bff", "rules": "#ff9966", "pectoral": "#ff8fc7", "limit": "#e8e8e8"}
CONTOUR_COLOUR, PECTORAL_COLOUR, CLUSTER_COLOUR, BOX_COLOUR = "#5dff8f", "#ff7ab0", "#00f0ff", "#ffffff"
BAD_COLOUR, GOOD_COLOUR = "#c02020", "#207020"
RESPONSE_COLOURS, RESPONSE_LIMIT = "plasma", 8.0
PEAK_MM = 0.8

# Bins of energy per cm² that all films share: everything below 0.1, then 20 a decade.
ENERGY_EDGES = np.concatenate([[0.0], np.geomspace(0.1, 20_000, 107)])
_FLAT_ENERGY = 0.07  # where the first bin starts on a logarithmic axis

SIZE_INCHES, _DPI = (10.0, 6.3), 120
# Left, bottom, width, height, as shares of the picture.
FILM_PANEL, _RESPONSE_PANEL = (0.005, 0.01, 0.345, 0.875), (0.355, 0.01, 0.345, 0.875)
_BAR_PANEL, _ENERGY_PANEL, _LEGEND_CORNER = (0.706, 0.02, 0.011, 0.42), (0.755, 0.6, 0.235, 0.25), (0.765, 0.48)
_KEPT = {
    "breast": ("kept_breast_only", "breast rule alone"),
    "frequency": ("kept_frequency_only", "frequency rule alone"),
    "both": ("kept_both_rules", "both rules"),
    "rescue": ("kept_rescue", "rescue tile"),
}
_REJECTED = {"intensity": "too dark", "nonzero": "too much black", "rules": "no rule met"}
_REJECTED |= {"pectoral": "too much muscle", "limit": "over the limit"}
_DASHES = (0, (2, 1))


def draw_film(
    film: Film,
    tile_size: int,
    path: Path,
    title: str,
    boxes: Sequence[Box] = (),
    flags: Sequence[str] | None = None,
    facts: dict[str, str] | None = None,
) -> None:
    """Write a PNG (1200 x 756) with :func:`draw_tiles`, :func:`draw_response`, :func:`draw_energies` and all counts.

    Parameters
    ----------
    film
        The tiled film.
    tile_size
        Edge length of its tiles in pixels of ``film.image``.
    path
        The PNG to write.
    title
        First line above the pictures.
    boxes
        Annotated boxes (xmin, ymin, xmax, ymax) in native pixels.
    flags
        What is doubtful; default: the film's own flags.
    facts
        Texts by name that the PNG carries.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    figure = Figure(figsize=SIZE_INCHES, dpi=_DPI)
    canvas = FigureCanvasAgg(figure)
    _draw_titles(figure, film, title, film.flags if flags is None else flags)
    for left, bottom, width, height in (FILM_PANEL, _RESPONSE_PANEL):  # a film's shape leaves a part of its panel free
        figure.add_artist(Rectangle((left, bottom), width, height, transform=figure.transFigure, color="black", zorder=-1))
    draw_tiles(figure.add_axes(FILM_PANEL), film, tile_size, boxes)
    shown = draw_response(figure.add_axes(_RESPONSE_PANEL), film, tile_size)
    bar = figure.colorbar(shown, cax=figure.add_axes(_BAR_PANEL), extend="max")
    bar.ax.tick_params(labelsize=6.5, length=2)
    bar.set_label(f"speck response (noise deviations), highest of {PEAK_MM} mm", fontsize=7)
    draw_energies(figure.add_axes(_ENERGY_PANEL), energy_counts(film.selection), film.selection.threshold)
    _draw_legend(figure, film, len(boxes))
    canvas.draw()
    info = PngInfo()
    for name, text in (facts or {}).items():
        info.add_text(name, text, zip=True)
    with whole_file(path) as temporary:
        few_colours(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])).save(temporary, "png", pnginfo=info)


def draw_tiles(axes: Axes, film: Film, tile_size: int, boxes: Sequence[Box] = ()) -> None:
    """Draw a film with the contours of breast and pectoral muscle, its tiles, clusters of specks, and boxes.

    The film is brightened by a square root, so that the skin line shows. A kept tile is a square with a mark in its middle, in
    the colour of its rule; another candidate is a dot in its middle, in the colour of what rejected it.

    Parameters
    ----------
    axes
        Matplotlib axes; their limits become pixels of ``film.image``.
    film, tile_size, boxes
        As in :func:`draw_film`.
    """
    _show_film(axes, film)
    _draw_contour(axes, film, 1.2)
    selection, tiles = film.selection, film.tiles
    for fate, colour in FATE_COLOURS.items():
        lost = selection.candidates.take(selection.fate == fate)
        # Most are background that nobody doubts: small dots.
        _squares(axes, lost, tile_size, 0.05 if fate == "intensity" else 0.09, facecolor=colour, edgecolor="none")
    for rule, width, alpha in (("breast", 0.5, 0.6), ("frequency", 1.0, 0.95), ("both", 1.0, 0.95)):
        colour, chosen = RULE_COLOURS[rule], tiles.take(selection.rule == rule)
        # A little smaller than they are, so that neighbours' edges do not hide each other.
        _squares(axes, chosen, tile_size, 0.94, facecolor="none", edgecolor=colour, linewidth=width, alpha=alpha)
        _squares(axes, chosen, tile_size, 0.1, facecolor=colour, edgecolor="none")
    _draw_rescues(axes, film, tile_size)
    _outline(axes, np.reshape(boxes, (-1, 4)) / film.scale, BOX_COLOUR, "solid")
    _outline(axes, selection.clusters, CLUSTER_COLOUR, _DASHES)


def draw_response(axes: Axes, film: Film, tile_size: int) -> ScalarMappable:
    """Draw a film dimly and on it the strongest speck response of every 0.8 mm, as opaque as it counts towards the energy.

    Returns the colours and their scale in noise deviations, for a colour bar.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    response = backend_of(film.response).to_host(film.response)
    spacing = film.segmentation.spacing_mm / film.segmentation.factor * film.scale * film.response_scale
    block = max(1, round(PEAK_MM / spacing))
    response = np.pad(response, [(0, -n % block) for n in response.shape])
    rows, columns = (n // block for n in response.shape)
    # The maximum, not the mean: one speck is what there is to see.
    peaks = response.reshape(rows, block, columns, block).max(axis=(1, 3))
    colours = ScalarMappable(Normalize(EXCESS_ABOVE, RESPONSE_LIMIT), RESPONSE_COLOURS)
    shown = colours.to_rgba(peaks)
    shown[..., 3] = np.clip((peaks - EXCESS_ABOVE) / EXCESS_LIMIT, 0, 1)
    edge = block * film.response_scale
    axes.imshow(shown, extent=(0, columns * edge, rows * edge, 0), interpolation="nearest", zorder=0.5)
    _show_film(axes, film, white=3.0)
    _draw_contour(axes, film, 0.7)
    _draw_rescues(axes, film, tile_size)
    _outline(axes, film.selection.clusters, CLUSTER_COLOUR, _DASHES)
    return colours


def energy_counts(selection: TileSelection) -> np.ndarray:
    """Return how many candidates that passed the gates have an energy in each bin of `ENERGY_EDGES`."""
    gated = ~np.isin(selection.fate, ("intensity", "nonzero"))
    return np.histogram(selection.candidates.freq_energy[gated], ENERGY_EDGES)[0]


def draw_energies(axes: Axes, counts: np.ndarray, threshold: float = math.inf) -> None:
    """Draw how many candidates have an energy in each bin of `ENERGY_EDGES`, and the frequency rule's threshold."""
    edges = np.concatenate([[_FLAT_ENERGY], ENERGY_EDGES[1:]])
    axes.set_xscale("log")
    axes.stairs(counts, edges, fill=True, color="#5b7f9f")
    highest = edges[np.flatnonzero(counts)[-1] + 1] if counts.any() else 10
    if math.isfinite(threshold):
        highest = max(highest, threshold)
        axes.axvline(threshold, color=BAD_COLOUR, linewidth=1.2)
        above: dict[str, Any] = {"color": BAD_COLOUR, "fontsize": 7, "va": "top", "transform": axes.get_xaxis_transform()}
        axes.text(threshold, 0.97, f" {threshold:.3g}", **above)
    axes.set_xlim(_FLAT_ENERGY, 2 * highest)
    axes.set_title(f"{counts.sum()} candidates past the gates", fontsize=7.5)
    axes.set_xlabel("energy of bright specks per cm²", fontsize=7)
    axes.set_ylabel("tiles", fontsize=7)
    axes.yaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.tick_params(labelsize=6.5, length=2)


def few_colours(picture: PILImage.Image) -> PILImage.Image:
    """Reduce a picture to 256 colours, which shrinks its file to a third: greys, the response's colours, the marks on greys.

    A palette made from the picture itself would merge the colours of rare marks, such as rescue tiles.
    """
    import matplotlib as mpl
    from matplotlib.colors import to_rgba_array
    from PIL import Image

    outlines = (CONTOUR_COLOUR, PECTORAL_COLOUR, CLUSTER_COLOUR, BAD_COLOUR, GOOD_COLOUR)
    named = (*RULE_COLOURS.values(), *FATE_COLOURS.values(), *outlines)
    marks = to_rgba_array(named)[:, :3]
    # Pillow looks colours up in steps of 4: a grey near white would take white's place.
    greys = np.append(np.linspace(0, 0.96, 99), 1.0)[:, None] * np.ones(3)
    response = mpl.colormaps[RESPONSE_COLOURS](np.linspace(0, 1, 56))[:, :3]
    faded = [marks * share + grey * (1 - share) for share in (0.85, 0.6, 0.3) for grey in (0.05, 0.6)]
    palette = Image.new("P", (1, 1))
    palette.putpalette(np.rint(np.concatenate([greys, response, marks, *faded]) * 255).astype(np.uint8).tobytes())
    return picture.quantize(palette=palette, dither=Image.Dither.NONE)


def _draw_titles(figure: Figure, film: Film, title: str, flags: Sequence[str]) -> None:
    segmentation = film.segmentation
    line = f"side {segmentation.side or '?'}   mask: {segmentation.method}   mapping: {film.mapping}"
    if segmentation.fog_mm2 > LARGE_FOG_MM2:
        line += f"   fog cut: {segmentation.fog_mm2 / 100:.1f} cm²"
    # A $ in a name is no formula.
    figure.text(0.008, 0.955, title, fontsize=9, fontweight="bold", parse_math=False)
    figure.text(0.008, 0.91, line, fontsize=7.5)
    verdict, colour = (f"flags: {', '.join(flags)}", BAD_COLOUR) if flags else ("no flags", GOOD_COLOUR)
    figure.text(0.99, 0.91, verdict, fontsize=8, ha="right", color=colour)


def _draw_legend(figure: Figure, film: Film, boxes: int) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    def outline(colour: str, label: str, dashes: Any = "solid") -> Patch:
        return Patch(facecolor="none", edgecolor=colour, label=label, linewidth=1.5, linestyle=dashes)

    def line(label: str, **style: Any) -> Line2D:
        return Line2D([], [], label=label, **style)

    counts = film.selection.counts
    handles: list[Any] = [line(f"kept {counts['kept']} of {counts['candidates']} candidates", linestyle="none")]
    handles += [outline(RULE_COLOURS[rule], f"{counts[name]}  {label}") for rule, (name, label) in _KEPT.items()]
    handles += [line("rejected", linestyle="none")]
    dot: dict[str, Any] = {"linestyle": "none", "marker": "s", "markersize": 4}
    handles += [line(f"{counts[f'rejected_{why}']}  {_REJECTED[why]}", color=c, **dot) for why, c in FATE_COLOURS.items()]
    clusters = f"{counts['clusters']}  clusters of specks, {counts['clusters_unheld']} in no tile"
    handles += [line("breast", color=CONTOUR_COLOUR)]
    handles += [line("pectoral muscle", color=PECTORAL_COLOUR)] if bool(film.pectoral.any()) else []
    handles += [outline(CLUSTER_COLOUR, clusters, _DASHES)]
    handles += [outline(BOX_COLOUR, f"{boxes}  annotated boxes")] if boxes else []
    style = {"fontsize": 7, "facecolor": "#303030", "labelcolor": "white", "framealpha": 1, "labelspacing": 0.55}
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=_LEGEND_CORNER, borderpad=0.8, **style)


def _show_film(axes: Axes, film: Film, white: float = 1.0) -> None:
    height, width = film.image.shape
    step = max(1, max(height, width) // 900)
    thumbnail = np.sqrt(backend_of(film.image).to_host(block_mean(film.image, step)))
    extent = (0, thumbnail.shape[1] * step, thumbnail.shape[0] * step, 0)
    axes.imshow(thumbnail, cmap="gray", vmin=0, vmax=white, extent=extent, zorder=0)
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[], facecolor="black", aspect="equal")


def _draw_contour(axes: Axes, film: Film, width: float) -> None:
    edge = film.segmentation.factor / film.scale
    for found, colour in ((film.pectoral, PECTORAL_COLOUR), (film.segmentation.mask, CONTOUR_COLOUR)):
        mask = backend_of(film.image).to_host(found)
        if min(mask.shape) > 1 and mask.any() and not mask.all():
            rows, columns = ((np.arange(n) + 0.5) * edge for n in mask.shape)
            axes.contour(columns, rows, mask, levels=[0.5], colors=colour, linewidths=width)


def _draw_rescues(axes: Axes, film: Film, tile_size: int) -> None:
    rescues = film.tiles.take(film.selection.rule == "rescue")
    _squares(axes, rescues, tile_size, 1.0, facecolor="none", edgecolor=RULE_COLOURS["rescue"], linewidth=2)


def _squares(axes: Axes, tiles: Any, tile_size: int, share: float, **style: Any) -> None:
    """Draw the middle of tiles, `share` of their edge wide."""
    from matplotlib.collections import PolyCollection

    corners = tile_size * (0.5 + share * (np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) - 0.5))
    squares: Any = np.stack([tiles.x, tiles.y], axis=1)[:, None, :] + corners
    axes.add_collection(PolyCollection(squares, **style), autolim=False)


def _outline(axes: Axes, boxes: np.ndarray, colour: str, dashes: Any) -> None:
    """Outline (N, 4) boxes in pixels of the film's image."""
    from matplotlib.collections import PolyCollection

    corners: Any = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2)
    style: Any = {"facecolor": "none", "edgecolor": colour, "linewidth": 1.1, "linestyle": dashes}
    axes.add_collection(PolyCollection(corners, **style), autolim=False)
