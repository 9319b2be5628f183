"""Breast segmentation at a fixed physical scale.

The canvas around a scanned film and the film's borders are trimmed. Thresholds with hysteresis on log-compressed intensity find
the tissue down to the faint skin line: the lower one lies just above the film base, which is measured where there is no tissue.
An opening detaches labels, letters, scratches and dust; the component is chosen by area, contact with the chest-wall side and
shape, and the strip of film fog along the chest wall is cut off. The pectoral muscle stays in. Methods are tried in order
until one passes the sanity checks; an image that none suits is flagged, never dropped silently.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mammostream.preprocess.backend import Backend, backend_of
from mammostream.preprocess.resampling import block_mean

TARGET_SPACING_MM = 0.4
FINE_SPACING_MM = 0.1
ASSUMED_HEIGHT_MM = 240.0
OPENING_RADIUS_MM = 2.0  # letters, scratches, dust are thinner
DETACHING_RADIUS_MM = 8.0  # labels, tape and most fog are thinner
REGROWTH_MM = 8.0
CLOSING_RADIUS_MM = 4.0
CANVAS_FILLED = 0.05  # of a canvas line may be something else: scratches, a scanner's marks
# The film base is measured this far from tissue, in bands of rows; tissue is brighter than it by so many times its noise.
BASE_DISTANCE_MM, BASE_BAND_MM, BASE_SIGMAS, MIN_CONTRAST = 8.0, 8.0, 6.0, 0.05
BASE_ROUNDS, MIN_BASE_PIXELS = 4, 50
MIN_AREA_SHARE, MAX_AREA_SHARE = 0.03, 0.92
MAX_BORDER_STRIP_SHARE = 0.1
STRIP_EDGE_MM = 1.0  # a strip fades out over this width
MIN_STRIP_STEP = 0.1  # of the brightest value
# Fog along the chest wall: a strip of even width above or below the breast.
MAX_FOG_WIDTH_MM, MIN_FOG_LENGTH_MM = 20.0, 5.0
MAX_FOG_BRIGHTNESS = 0.35  # of the breast's
# A breast fills about three quarters of the box around it; labels and tape fill theirs.
MAX_BREAST_EXTENT = 0.92


@dataclass(frozen=True)
class Segmentation:
    """A breast mask on a coarse grid.

    Attributes
    ----------
    mask
        (h, w) bool, one pixel for `factor` x `factor` native pixels.
    factor
        Native pixels an edge of a mask pixel.
    spacing_mm
        Size of a mask pixel in mm.
    side
        ``L`` where the chest wall is at the image's left edge (a left breast in the usual display), ``R`` at the right,
        empty where there is no breast.
    method
        Name of the method that gave the mask: ``otsu``, ``triangle``, ``nonzero``.
    flags
        What is doubtful: ``no_breast``, ``doubtful_mask``, ``no_spacing``.
    inside
        Rows and columns of the mask's grid within the film's bright borders; all of them where it has none.
    fog_mm2
        Area in mm² that was cut off the mask as film fog.
    """

    mask: Any
    factor: int
    spacing_mm: float
    side: str
    method: str
    flags: tuple[str, ...]
    inside: tuple[slice, slice]
    fog_mm2: float

    @property
    def area_mm2(self) -> float:
        """Area of the breast in mm²."""
        return float(self.mask.sum()) * self.spacing_mm**2


def segment_breast(pixels: Any, spacing_mm: float | None = None) -> Segmentation:
    """Find the breast in a mammogram.

    Parameters
    ----------
    pixels
        (H, W) array of any real type, brighter = denser.
    spacing_mm
        Size of a pixel in mm; None assumes an image 240 mm high and flags ``no_spacing``.

    Returns
    -------
    Segmentation
        Always; an image without a breast has an empty mask and the flag ``no_breast``.
    """
    backend = backend_of(pixels)
    xp = backend.xp
    flags = () if spacing_mm else ("no_spacing",)
    spacing = spacing_mm or ASSUMED_HEIGHT_MM / pixels.shape[0]
    factor = coarse_factor(spacing)
    coarse = xp.nan_to_num(block_mean(pixels, factor), posinf=0, neginf=0)
    spacing *= factor
    film = _inside_canvas(xp, coarse)
    strips = _inside_border_strips(xp, coarse[film], spacing)
    rows, columns = (slice(f.start + s.start, f.start + s.stop) for f, s in zip(film, strips, strict=True))
    inside = rows, columns
    inner = coarse[inside]

    best: tuple[float, Any, float, str] | None = None
    for method, threshold in _METHODS.items():
        mask, fog_mm2 = _mask_from(backend, inner, threshold, spacing)
        score = _plausibility(xp, mask)
        if best is None or score > best[0]:
            best = (score, mask, fog_mm2, method)
        if score >= 1:
            break
    assert best is not None
    score, found, fog_mm2, method = best
    mask = xp.zeros(coarse.shape, dtype=bool)
    mask[inside] = found
    if not bool(mask.any()):
        return Segmentation(mask, factor, spacing, "", method, (*flags, "no_breast"), inside, fog_mm2)
    if score < 1:
        flags = (*flags, "doubtful_mask")
    return Segmentation(mask, factor, spacing, _side(xp, found), method, flags, inside, fog_mm2)


def coarse_factor(spacing_mm: float) -> int:
    """Return how many pixels make an edge of a mask pixel: about 0.4 mm, and a multiple of what makes about 0.1 mm."""
    fine = fine_factor(spacing_mm)
    return fine * max(1, round(TARGET_SPACING_MM / (fine * spacing_mm)))


def fine_factor(spacing_mm: float) -> int:
    """Return how many pixels make an edge of about 0.1 mm, the scale at which specks are looked for."""
    return max(1, round(FINE_SPACING_MM / spacing_mm))


def _inside_canvas(xp: Any, coarse: Any) -> tuple[slice, slice]:
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


def _inside_border_strips(xp: Any, coarse: Any, spacing: float) -> tuple[slice, slice]:
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
            widths.append(width + soft if width else 0)
        start, stop = widths[0], len(lines) - widths[1]
        inside.append(slice(start, max(stop, start + 1)))
    return inside[0], inside[1]


def _compress(xp: Any, image: Any, tissue: Any) -> Any:
    """Scale an image to [0, 1] from its background to the 99.5th percentile of tissue and compress it by a logarithm."""
    low = float(xp.percentile(image, 1.0))
    high = float(xp.percentile(tissue, 99.5))
    scaled = xp.clip((image - low) / max(high - low, 1e-6), 0, 1)
    return (xp.log1p(20 * scaled) / xp.log1p(xp.asarray(20.0))).astype(xp.float32)


def _otsu(backend: Backend, image: Any) -> float:
    return float(backend.filters.threshold_otsu(image))


def _triangle(backend: Backend, image: Any) -> float:
    return float(backend.filters.threshold_triangle(image))


def _nonzero(backend: Backend, image: Any) -> float:
    return 0.05


_METHODS: dict[str, Callable[[Backend, Any], float]] = {"otsu": _otsu, "triangle": _triangle, "nonzero": _nonzero}


def _mask_from(backend: Backend, image: Any, threshold: Callable, spacing: float) -> tuple[Any, float]:
    """Return the breast by one method, or an empty mask, and the area in mm² that was cut off it as fog."""
    xp = backend.xp
    if float(image.max()) - float(image.min()) < 1e-6:
        return xp.zeros(image.shape, dtype=bool), 0.0
    tissue = _largest_tissue(backend, _compress(xp, image, image), threshold, spacing)
    # Once more on the scale of the tissue alone, which labels and borders have no part in.
    if bool(tissue.any()):
        tissue = _largest_tissue(backend, _compress(xp, image, image[tissue]), threshold, spacing)
    clear = _without_fog(xp, image, tissue, spacing)
    fog_mm2 = float((tissue & ~clear).sum()) * spacing**2
    return _close(backend, _without_attachments(backend, clear, spacing), CLOSING_RADIUS_MM / spacing), fog_mm2


def _largest_tissue(backend: Backend, image: Any, threshold: Callable, spacing: float) -> Any:
    """Return the component of a compressed image that is most likely the breast."""
    xp, ndimage = backend.xp, backend.ndimage
    high = threshold(backend, image)
    bright = image >= high
    if bool(bright.all()):
        return xp.zeros(image.shape, dtype=bool)
    base, noise = _film_base(backend, image, bright, spacing)
    low = xp.minimum(base + max(BASE_SIGMAS * noise, MIN_CONTRAST), high)
    tissue = _hysteresis(backend, image >= low, bright)
    # Tissue continues beyond the sides of the image, not beyond its ends, where borders leave thin lines.
    tissue = _opened(backend, tissue, OPENING_RADIUS_MM / spacing, "edge") & tissue
    labels, count = ndimage.label(tissue)
    return labels == _likeliest(backend, labels, count) if count else tissue


def _hysteresis(backend: Backend, low: Any, high: Any) -> Any:
    """Return the components of `low` that hold a pixel of `high`, which lies within it."""
    labels, count = backend.ndimage.label(low)
    kept = backend.xp.zeros(count + 1, dtype=bool)
    kept[labels[high]] = True
    return kept[labels] & low


def _film_base(backend: Backend, image: Any, tissue: Any, spacing: float) -> tuple[Any, float]:
    """Return the level of the film base at each pixel (or row) of a compressed image, and its noise.

    A plane through what is far from tissue, fitted without labels and the faint falloff of the skin line; then a shift per band
    of rows, since films are often developed unevenly at their ends.
    """
    xp = backend.xp
    height, width = image.shape
    far = backend.ndimage.distance_transform_edt(~tissue) > BASE_DISTANCE_MM / spacing
    drawn = xp.zeros_like(tissue)
    (top, bottom), (left, right) = _blank_margins(xp, image)
    drawn[top : height - bottom, left : width - right] = True
    for chosen in (far & drawn, far, ~tissue):
        if int(chosen.sum()) >= MIN_BASE_PIXELS:
            far = chosen
            break
    else:
        return xp.zeros_like(image), 0.0
    rows, columns = xp.linspace(-1, 1, height, dtype=xp.float32), xp.linspace(-1, 1, width, dtype=xp.float32)
    row, column = xp.nonzero(far)
    values = image[row, column]
    terms = xp.stack([xp.ones_like(values), columns[column], rows[row]], axis=1)
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
    base = base + _by_band(xp, image - base, far, max(1, round(BASE_BAND_MM / spacing)))[:, None]
    return base, float(1.4826 * xp.median(xp.abs((image - base)[far])))


def _by_band(xp: Any, rest: Any, far: Any, band: int) -> Any:
    """Return the median of the pixels of each band of rows, interpolated between the bands that have enough of them."""
    centres, medians = [], []
    for start in range(0, len(rest), band):
        values = rest[start : start + band][far[start : start + band]]
        if values.size >= MIN_BASE_PIXELS:
            centres.append(start + band / 2)
            medians.append(float(xp.median(values)))
    if not centres:
        return xp.zeros(len(rest), dtype=xp.float32)
    return xp.interp(xp.arange(len(rest)), xp.asarray(centres), xp.asarray(medians)).astype(xp.float32)


def _without_attachments(backend: Backend, tissue: Any, spacing: float) -> Any:
    """Cut off labels and tape that touch the breast: what is narrow, and too long to be the nipple."""
    core = _opened(backend, tissue, DETACHING_RADIUS_MM / spacing, "constant")
    if not bool(core.any()):
        return tissue
    labels, count = backend.ndimage.label(core)
    core = labels == _likeliest(backend, labels, count)
    labels, _ = backend.ndimage.label(_grown(backend, core, REGROWTH_MM / spacing) & tissue)
    return labels == labels[core].max()


def _likeliest(backend: Backend, labels: Any, count: int) -> int:
    """Return the label of the component that is most likely the breast: large, at a side of the image, no rectangle."""
    xp = backend.xp
    area = backend.to_host(xp.bincount(labels.ravel(), minlength=count + 1))[1:]
    edges = xp.concatenate([labels[:, :3].ravel(), labels[:, -3:].ravel()])
    contact = backend.to_host(xp.bincount(edges, minlength=count + 1))[1:] / (3 * labels.shape[0])
    boxes = backend.ndimage.find_objects(labels)
    extent = area / [(rows.stop - rows.start) * (columns.stop - columns.start) for rows, columns in boxes]
    return int((area * (0.2 + contact) * (1.0 - 0.8 * (extent > MAX_BREAST_EXTENT))).argmax()) + 1


def _opened(backend: Backend, mask: Any, radius: float, beyond: str) -> Any:
    """Remove what no disc of a radius (pixels) fits into; `beyond` its sides the mask continues or ends (modes of ``pad``)."""
    margin = int(radius) + 2
    padded = backend.xp.pad(backend.xp.pad(mask, ((0, 0), (margin, margin)), mode=beyond), ((margin, margin), (0, 0)))
    core = backend.ndimage.distance_transform_edt(padded) > radius
    return _grown(backend, core, radius)[margin:-margin, margin:-margin]


def _close(backend: Backend, mask: Any, radius: float) -> Any:
    """Close gaps and fill holes; the edge is repeated outwards, so that the mask keeps its contact with it."""
    margin = int(radius) + 2
    grown = _grown(backend, backend.xp.pad(mask, margin, mode="edge"), radius)
    closed = ~_grown(backend, ~grown, radius)
    # A margin that the closing ate away from outside was never image.
    inner = closed[margin:-margin, margin:-margin] | mask
    return backend.ndimage.binary_fill_holes(inner)


def _grown(backend: Backend, mask: Any, radius: float) -> Any:
    # Without a pixel to measure from, scipy's distances mean nothing and CuPy's are NaN.
    if not bool(mask.any()):
        return mask
    return backend.ndimage.distance_transform_edt(~mask) <= radius


def _without_fog(xp: Any, image: Any, mask: Any, spacing: float) -> Any:
    """Cut off the strip of film fog that runs along the chest wall above and below the breast.

    Seen from each end of the image, fog is a run of lines whose width from the wall stays about the same; the breast widens.
    Fog is far darker than the breast: what is not, such as an axillary tail of even width, stays.
    """
    if not bool(mask.any()):
        return mask
    flipped = _side(xp, mask) != "L"
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


def _plausibility(xp: Any, mask: Any) -> float:
    """Return the share of sanity checks that a mask passes: area, contact with one side, and a free other side."""
    if not bool(mask.any()):
        return 0.0
    share = float(mask.mean())
    left, right = float(mask[:, :3].mean()), float(mask[:, -3:].mean())
    checks = (MIN_AREA_SHARE <= share <= MAX_AREA_SHARE, max(left, right) > 0.15, min(left, right) < 0.5)
    return sum(checks) / len(checks)


def _side(xp: Any, mask: Any) -> str:
    columns = mask.sum(axis=0)
    half = mask.shape[1] // 2
    return "L" if float(columns[:half].sum()) >= float(columns[-half:].sum()) else "R"
