"""Labels, tape, wedges and other objects beside the breast, which a mask is to leave out."""

from __future__ import annotations

from typing import Any

from mammostream.preprocess.backend import Backend
from mammostream.preprocess.morphology import STEP, closed, grown, likeliest, opened, side_of

THIN_MM = 2.0  # letters, scratches, dust are thinner than twice this
DETACHING_RADIUS_MM = 8.0  # labels, tape and most fog are thinner
REGROWTH_MM = 8.0
CLIFF = 0.15  # of tissue's range, from a pixel to the next
RIM = 3  # pixels around an object that are looked at
MIN_OPEN_SHARE = 0.3  # of an object's rim
HOLLOW_RADIUS_MM = 40.0


def cliffs_of(backend: Backend, image: Any, tissue: Any) -> Any:
    """Return where an image's values change, from one pixel to the next, by a large part of the tissue's range (its values)."""
    low, high = float(backend.xp.percentile(image, 1.0)), float(backend.xp.percentile(tissue, 99.5))
    steps = backend.ndimage.maximum_filter(image, 3) - backend.ndimage.minimum_filter(image, 3)
    return steps > CLIFF * (high - low)


def without_objects(backend: Backend, tissue: Any, cliffs: Any, spacing: float) -> Any:
    """Remove labels, tape and other objects: what cliffs separate from the breast, and what lies in the open for the most part.

    (An implant is separated from the breast by a cliff too, but lies within it.) What an object covers of the breast stays.
    """
    objects = _objects(backend, tissue, cliffs)
    if not bool(objects.any()):
        return tissue
    few, objects, spacing = tissue[::STEP, ::STEP], objects[::STEP, ::STEP], STEP * spacing
    # What is thin may cross the breast, as the edge of a paddle does; an opening cuts it off outside later.
    objects = opened(backend, objects, THIN_MM / spacing, "constant")
    objects = backend.ndimage.binary_fill_holes(objects) & few  # with its letters
    clear = opened(backend, few & ~objects, THIN_MM / spacing, "edge")
    # Pieces between which tape lies are one; what an object covers of the rim shows as a hollow of the outline.
    clear |= closed(backend, clear, DETACHING_RADIUS_MM / spacing) & objects
    labels, count = backend.ndimage.label(clear)
    breast = labels == likeliest(backend, labels, count) if count else clear
    objects &= ~(clear | closed(backend, breast, HOLLOW_RADIUS_MM / spacing))
    return tissue & ~objects.repeat(STEP, axis=0).repeat(STEP, axis=1)[: tissue.shape[0], : tissue.shape[1]]


def _objects(backend: Backend, tissue: Any, cliffs: Any) -> Any:
    """Return what cliffs surround, where most of the rim is neither tissue nor the chest wall's edge of the image."""
    xp, ndimage = backend.xp, backend.ndimage
    labels, count = ndimage.label(tissue & ~cliffs)
    if count < 2:
        return xp.zeros_like(tissue)
    labels[labels == int(xp.bincount(labels.ravel())[1:].argmax()) + 1] = 0
    # The far side of the image counts as open, the chest wall does not.
    pad = (0, 0), ((0, RIM) if side_of(xp, tissue) == "L" else (RIM, 0))
    labels, steep, covered = xp.pad(labels, pad), xp.pad(cliffs.astype(xp.uint8), pad, constant_values=1), xp.pad(tissue, pad)
    around = ndimage.maximum_filter(labels, 2 * RIM + 1)
    rim = (around > 0) & (labels == 0)
    length = xp.maximum(xp.bincount(around[rim], minlength=count + 1), 1)
    # The breast's own rim in the open, the skin line, is no cliff.
    near = ndimage.maximum_filter(steep, 2 * RIM - 1) > 0
    in_the_open = xp.bincount(around[rim & near & ~covered], minlength=count + 1)
    objects = (in_the_open > MIN_OPEN_SHARE * length)[around]
    return objects[:, pad[1][0] : objects.shape[1] - pad[1][1]] & tissue


def without_attachments(backend: Backend, tissue: Any, spacing: float) -> Any:
    """Cut off labels and tape that touch the breast: what is narrow, and too long to be the nipple."""
    core = opened(backend, tissue, DETACHING_RADIUS_MM / spacing, "constant")
    if not bool(core.any()):
        return tissue
    labels, count = backend.ndimage.label(core)
    core = labels == likeliest(backend, labels, count)
    labels, _ = backend.ndimage.label(grown(backend, core, REGROWTH_MM / spacing) & tissue)
    return labels == labels[core].max()
