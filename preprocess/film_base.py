"""What a film has around the breast: the scanner's canvas, bright borders, the film base, fog along the chest wall."""

from __future__ import annotations

from typing import Any

from mammostream.preprocess.backend import Backend
from mammostream.preprocess.morphology import STEP, grown, side_of

CANVAS_FILLED = 0.05  # of a canvas line may be something else: scratches, a scanner's marks
# The film base is measured this far from tissue, in bands of rows.
BASE_DISTANCE_MM, BASE_BAND_MM = 8.0, 8.0
BASE_ROUNDS, MIN_BASE_PIXELS = 4, 20
MAX_BORDER_STRIP_SHARE = 0.1
STRIP_EDGE_MM = 1.0  # a strip fades out over this width
MIN_STRIP_STEP = 0.1  # of the brightest value
# Fog along the chest wall: a strip of even width above or below the breast.
MAX_FOG_WIDTH_MM, MIN_FOG_LENGTH_MM = 20.0, 5.0
MAX_FOG_BRIGHTNESS = 0.35  # of the breast's


def inside_canvas(xp: Any, coarse: Any) -> tuple[slice, slice]:
    """Return the part of an image within the canvas that a scanned film was laid on, where the film's edge shows.

    There, a line that mostly has other values follows the blank ones. (A digital background that was set to one value ends at
    the breast's outline instead, and stays.)
    """
    inside = []
    for lines, margins in zip((coarse, coarse.T), _blank_margins(xp, coarse), strict=True):
        widths = []
        for seen, width in zip((lines, lines[::-1]), margins, strict=True):
            beyond = seen[width : width + 3] != xp.median(seen[0])
            widths.append(width if beyond.size and float(beyond.mean()) > 0.5 else 0)
        start, stop = widths[0], len(lines) - widths[1]
        inside.append(slice(start, stop) if start < stop else slice(0, len(lines)))
    return inside[0], inside[1]


def _blank_margins(xp: Any, image: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return how many lines at the top and bottom, and at the left and right, have one exact value."""
    margins = []
    for lines in (image, image.T):
        for seen in (lines, lines[::-1]):
            filled = (seen != xp.median(seen[0])).mean(axis=1)
            margins.append(int(xp.cumprod(filled < CANVAS_FILLED, axis=0, dtype=int).sum()))
    return (margins[0], margins[1]), (margins[2], margins[3])


def inside_border_strips(xp: Any, coarse: Any, spacing: float) -> tuple[slice, slice]:
    """Return the part of an image within the bright strips that scanned films have along their edges.

    A strip is a run of lines from the edge that are as bright as the image gets, or, above and below the breast, bright where
    the film further in is dark. (At the chest wall, that would be the fog next to the breast.)
    """
    top = float(coarse.max())
    soft = round(STRIP_EDGE_MM / spacing)
    inside = []
    for axis, lines in ((0, coarse), (1, coarse.T)):
        limit = int(MAX_BORDER_STRIP_SHARE * len(lines))
        widths = []
        for seen in (lines, lines[::-1]):
            bright = seen[:limit] > 0.9 * top
            if axis == 0:
                bright |= (seen[:limit] - seen[limit] > MIN_STRIP_STEP * top) & (seen[limit] < MIN_STRIP_STEP * top)
            # CuPy takes no empty array without an axis.
            width = int(xp.cumprod(bright.mean(axis=1) > 0.5, axis=0, dtype=int).sum())
            # What goes on further in is no strip but, perhaps, an implant.
            widths.append(width + soft if 0 < width < limit else 0)
        start, stop = widths[0], len(lines) - widths[1]
        inside.append(slice(start, max(stop, start + 1)))
    return inside[0], inside[1]


def film_base(backend: Backend, image: Any, tissue: Any, spacing: float) -> tuple[Any, float]:
    """Return the level of the film base at each pixel (or row) of a compressed image, and its noise.

    A plane through what is far from tissue, fitted without labels and the faint falloff of the skin line; then a shift per band
    of rows, since films are often developed unevenly at their ends.
    """
    xp = backend.xp
    height, width = image.shape
    rows, columns = xp.linspace(-1, 1, height, dtype=xp.float32), xp.linspace(-1, 1, width, dtype=xp.float32)
    few = image[::STEP, ::STEP]  # the base is smooth: every other pixel of every other row tells as much
    far = _far_from(backend, few, tissue[::STEP, ::STEP], BASE_DISTANCE_MM / (STEP * spacing))
    if far is None:
        return xp.zeros_like(image), 0.0
    row, column = xp.nonzero(far)
    values = few[row, column]
    terms = xp.stack([xp.ones_like(values), columns[::STEP][column], rows[::STEP][row]], axis=1)
    level = xp.array([float(xp.median(values)), 0, 0], dtype=xp.float32)
    for _ in range(BASE_ROUNDS):
        rest = xp.abs(values - terms @ level)
        near = rest <= max(2.5 * 1.4826 * float(xp.median(rest)), 1e-3)
        if int(near.sum()) < MIN_BASE_PIXELS:
            break
        its = terms[near]
        level = xp.linalg.solve(its.T @ its + 1e-4 * len(its) * xp.eye(3, dtype=xp.float32), its.T @ values[near])
    base = level[0] + level[1] * columns[None] + level[2] * rows[:, None]
    base = xp.clip(base, float(xp.percentile(values, 1)), float(xp.percentile(values, 99)))
    rest = few - base[::STEP, ::STEP]
    shift = _by_band(xp, rest, far, max(1, round(BASE_BAND_MM / (STEP * spacing))), height)
    noise = float(1.4826 * xp.median(xp.abs((rest - shift[::STEP, None])[far])))
    return base + shift[:, None], noise


def _far_from(backend: Backend, image: Any, tissue: Any, distance: float) -> Any | None:
    """Return pixels away from tissue, within what is drawn on where they suffice; None where there are too few of any."""
    height, width = image.shape
    far = ~grown(backend, tissue, distance)
    drawn = backend.xp.zeros_like(tissue)
    (top, bottom), (left, right) = _blank_margins(backend.xp, image)
    drawn[top : height - bottom, left : width - right] = True
    return next((pixels for pixels in (far & drawn, far, ~tissue) if int(pixels.sum()) >= MIN_BASE_PIXELS), None)


def _by_band(xp: Any, rest: Any, far: Any, band: int, height: int) -> Any:
    """Return the median of the pixels of each band of rows, interpolated between the bands that have enough of them."""
    centres, medians = [], []
    for start in range(0, len(rest), band):
        values = rest[start : start + band][far[start : start + band]]
        if values.size >= MIN_BASE_PIXELS:
            centres.append(STEP * (start + band / 2))
            medians.append(float(xp.median(values)))
    if not centres:
        return xp.zeros(height, dtype=xp.float32)
    return xp.interp(xp.arange(height), xp.asarray(centres), xp.asarray(medians)).astype(xp.float32)


def without_fog(xp: Any, image: Any, mask: Any, spacing: float) -> Any:
    """Cut off the strip of film fog that runs along the chest wall above and below the breast.

    Seen from each end of the image, fog is a run of lines whose width from the wall stays about the same; the breast widens.
    Fog is far darker than the breast: what is not, such as an axillary tail of even width, stays.
    """
    if not bool(mask.any()):
        return mask
    flipped = side_of(xp, mask) != "L"
    from_wall = mask[:, ::-1] if flipped else mask
    strip = xp.cumprod(from_wall, axis=1, dtype=int).astype(bool)  # rows of the breast that hang away from the wall have none
    width = strip.sum(axis=1) * spacing
    lines = max(1, round(MIN_FOG_LENGTH_MM / spacing))
    fog = xp.zeros(mask.shape[0], dtype=bool)
    for seen, cut in ((width, fog), (width[::-1], fog[::-1])):
        even = float(xp.median(seen[:lines]))
        if 0 < even <= MAX_FOG_WIDTH_MM:
            run = xp.cumprod(seen <= 1.25 * even + 1, dtype=int).astype(bool)
            rows = run if seen is width else run[::-1]
            if int(run.sum()) >= lines and not bool(run.all()) and _is_fog(xp, image, mask, rows):
                cut |= run
    strip &= fog[:, None]
    return mask & ~(strip[:, ::-1] if flipped else strip)


def _is_fog(xp: Any, image: Any, mask: Any, run: Any) -> bool:
    """Return whether a mask's rows are dark enough for fog, compared with its other rows and the darkest of the image."""
    floor = float(xp.percentile(image, 5))
    strip, rest = image[mask & run[:, None]], image[mask & ~run[:, None]]
    return float(xp.median(strip)) - floor <= MAX_FOG_BRIGHTNESS * (float(xp.median(rest)) - floor)
