"""Operations on breast masks: components, discs, holes."""

from __future__ import annotations

import math
from typing import Any

from mammostream.preprocess.backend import Backend

STEP = 2  # pixels of a mask for one where half its resolution does
# A breast fills about three quarters of the box around it; labels and tape fill theirs.
MAX_BREAST_EXTENT = 0.92


def hysteresis(backend: Backend, low: Any, high: Any) -> Any:
    """Return the components of `low` that hold a pixel of `high`, which lies within it."""
    labels, count = backend.ndimage.label(low)
    kept = backend.xp.zeros(count + 1, dtype=bool)
    kept[labels[high]] = True
    return kept[labels] & low


def likeliest(backend: Backend, labels: Any, count: int) -> int:
    """Return the label of the component that is most likely the breast: large, at a side of the image, no rectangle."""
    xp = backend.xp
    area = backend.to_host(xp.bincount(labels.ravel(), minlength=count + 1))[1:]
    edges = xp.concatenate([labels[:, :3].ravel(), labels[:, -3:].ravel()])
    contact = backend.to_host(xp.bincount(edges, minlength=count + 1))[1:] / (3 * labels.shape[0])
    boxes = backend.ndimage.find_objects(labels)
    extent = area / [(rows.stop - rows.start) * (columns.stop - columns.start) for rows, columns in boxes]
    return int((area * (0.2 + contact) * (1.0 - 0.8 * (extent > MAX_BREAST_EXTENT))).argmax()) + 1


def opened(backend: Backend, mask: Any, radius: float, beyond: str) -> Any:
    """Remove what no disc of a radius (pixels) fits into; `beyond` its sides the mask continues or ends (modes of ``pad``)."""
    margin = int(radius) + 2
    padded = backend.xp.pad(backend.xp.pad(mask, ((0, 0), (margin, margin)), mode=beyond), ((margin, margin), (0, 0)))
    core = ~grown(backend, ~padded, radius)
    return grown(backend, core, radius)[margin:-margin, margin:-margin]


def closed(backend: Backend, mask: Any, radius: float) -> Any:
    """Close gaps and fill holes; the edge is repeated outwards, so that the mask keeps its contact with it."""
    margin = int(radius) + 2
    outer = grown(backend, backend.xp.pad(mask, margin, mode="edge"), radius)
    outer = ~grown(backend, ~outer, radius)
    # A margin that the closing ate away from outside was never image.
    inner = outer[margin:-margin, margin:-margin] | mask
    return backend.ndimage.binary_fill_holes(inner)


def grown(backend: Backend, mask: Any, radius: float, spacing: float = 1.0) -> Any:
    """Return what lies within a radius of a mask: the dilation by a disc.

    Parameters
    ----------
    backend
        The mask's.
    mask
        (h, w) bool.
    radius
        Of the disc, at least 0.
    spacing
        Size of a pixel in the unit of `radius`.
    """
    if backend.name == "cupy":
        # Without a pixel to measure from, CuPy's distances are NaN.
        return backend.ndimage.distance_transform_edt(~mask) * spacing <= radius if bool(mask.any()) else mask
    # Shifted copies take a fraction of the time of distances. A disc is a row of vertical lines, the shortest at its rim.
    within, lines, height, width = mask.copy(), mask, 0, mask.shape[1]
    for across in range(min(int(radius / spacing) + 1, width - 1), -1, -1):
        if across * spacing > radius:
            continue
        while math.hypot(across, height + 1) * spacing <= radius:
            taller = lines.copy()
            taller[1:] |= lines[:-1]
            taller[:-1] |= lines[1:]
            lines, height = taller, height + 1
        within[:, across:] |= lines[:, : width - across]
        within[:, : width - across] |= lines[:, across:]
    return within


def side_of(xp: Any, mask: Any) -> str:
    """Return the side of the image, ``L`` or ``R``, whose half holds more of a mask."""
    columns = mask.sum(axis=0)
    half = mask.shape[1] // 2
    return "L" if float(columns[:half].sum()) >= float(columns[-half:].sum()) else "R"
