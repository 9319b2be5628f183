"""What films carry beside the breast, painted onto real ones: labels, tape, wedges, clips, paddles, implants and more.

Each function paints onto a film of 0.2 mm whose chest wall is at the left, (H, W) uint16; `mask` is the breast of the clean
film on a grid of 0.4 mm. None of them covers so much of the breast's rim that its mask could not be told.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from skimage.draw import ellipse, polygon
from skimage.transform import resize

MM = 5  # pixels
WHITE = 60000

Paint = Callable[[np.ndarray, np.ndarray, np.random.Generator], None]
ARTEFACTS: dict[str, Paint] = {}


def artefact(function: Paint) -> Paint:
    ARTEFACTS[function.__name__] = function
    return function


def skin(mask: np.ndarray, share: float) -> tuple[int, int]:
    """Return row and column (pixels) of the skin line, a share of the way down the breast's rows."""
    rows = np.flatnonzero(mask.any(axis=1))
    row = rows[int(share * (len(rows) - 1))]
    return 2 * row, 2 * np.flatnonzero(mask[row]).max()


def box(pixels: np.ndarray, top: float, left: float, height: float, width: float, angle: float = 0) -> tuple[np.ndarray, ...]:
    """Return the pixels of a rectangle (pixels, degrees) inside the film."""
    corners = np.array([[-height, -width], [-height, width], [height, width], [height, -width]]) / 2
    turn = np.deg2rad(angle)
    corners = corners @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    return polygon(*(corners + [top + height / 2, left + width / 2]).T, pixels.shape)


def label(pixels: np.ndarray, top: float, left: float, height: float, width: float, level: int, angle: float = 0) -> None:
    """A plate with two dark letters."""
    pixels[box(pixels, top, left, height, width, angle)] = level
    for place in (0.2, 0.6):
        pixels[box(pixels, top + 0.25 * height, left + place * width, 0.5 * height, 0.08 * width, angle)] = 1500


# Plates at the skin line: share of the way down, mm over the breast, height and width in mm, grey, degrees.
PLATES = {
    "plate_that_touches": (0.3, 3, 20, 28, WHITE, 0),
    "grey_plate_that_touches": (0.75, 2, 16, 20, WHITE // 2, 0),
    "slanted_plate_that_touches": (0.4, 2, 24, 34, WHITE, 20),
    "large_plate_that_touches": (0.25, 4, 30, 50, WHITE, 0),
    "plate_close_to_the_skin": (0.35, -4, 20, 28, WHITE, 0),
}


def plate(pixels, mask, rng, share, over, height, width, grey, angle):
    row, column = skin(mask, share)
    label(pixels, row - height * MM // 2, column - over * MM, height * MM, width * MM, grey, angle)


for name, place in PLATES.items():
    ARTEFACTS[name] = partial(plate, **dict(zip(("share", "over", "height", "width", "grey", "angle"), place, strict=True)))


@artefact
def plate_in_the_far_corner(pixels, mask, rng):
    label(pixels, 3 * MM, pixels.shape[1] - 25 * MM, 15 * MM, 22 * MM, WHITE)


@artefact
def tape_down_the_far_side(pixels, mask, rng):
    left = pixels.shape[1] - 14 * MM
    np.maximum(pixels[:, left : left + 10 * MM], 45000, out=pixels[:, left : left + 10 * MM])


@artefact
def tape_that_touches_the_nipple_side(pixels, mask, rng):
    left = 2 * np.flatnonzero(mask.any(axis=0)).max() - MM
    np.maximum(pixels[:, left : left + 12 * MM], 45000, out=pixels[:, left : left + 12 * MM])


@artefact
def slanted_tape(pixels, mask, rng):
    row, column = skin(mask, 0.8)
    rows, columns = box(pixels, row - 30 * MM, column + MM, 60 * MM, 8 * MM, 35)
    pixels[rows, columns] = np.maximum(pixels[rows, columns], 40000)


@artefact
def step_wedge(pixels, mask, rng):
    """Ten steps from bright to dark at the far side."""
    for step in range(10):
        pixels[(40 + 6 * step) * MM : (46 + 6 * step) * MM, -13 * MM : -2 * MM] = WHITE - 5500 * step


@artefact
def step_wedge_that_touches(pixels, mask, rng):
    row, column = skin(mask, 0.25)
    for step in range(8):
        top = row + (5 * step - 20) * MM
        pixels[max(0, top) : max(0, top + 5 * MM), column - 2 * MM : column + 10 * MM] = WHITE - 3500 * step


@artefact
def clips(pixels, mask, rng):
    """Surgical clips and skin markers, in the breast and on its rim."""
    rows, columns = np.nonzero(mask)
    for at in rng.integers(0, len(rows), 12):
        top, left = 2 * rows[at], 2 * columns[at]
        pixels[box(pixels, top, left, 0.8 * MM, 4 * MM, rng.uniform(0, 180))] = 65535
    for share in (0.3, 0.5, 0.7):
        row, column = skin(mask, share)
        pixels[ellipse(row, column, 1.2 * MM, 1.2 * MM, shape=pixels.shape)] = 65535


@artefact
def wire_on_the_skin(pixels, mask, rng):
    """A scar marker: a bright wire along a stretch of the skin line, as it is taped there."""
    for share in np.linspace(0.35, 0.6, 400):
        row, column = skin(mask, share)
        pixels[row - 2 : row + 3, column - 2 : column + 3] = 62000


@artefact
def paddle(pixels, mask, rng):
    """The edge of a spot compression paddle: a bright frame of 1.5 mm."""
    row, column = skin(mask, 0.5)
    top, left, height, width = row - 45 * MM, column - 60 * MM, 90 * MM, 80 * MM
    frame = np.zeros(pixels.shape, bool)
    frame[box(pixels, top, left, height, width)] = True
    frame[box(pixels, top + 1.5 * MM, left + 1.5 * MM, height - 3 * MM, width - 3 * MM)] = False
    pixels[frame] = np.minimum(pixels[frame].astype(int) + 12000, 65535)


@artefact
def implant(pixels, mask, rng):
    """A homogeneous half ellipse at the chest wall, two thirds as deep as the breast."""
    rows = np.flatnonzero(mask[:, :3].any(axis=1))
    middle = len(mask) if not len(rows) else 2 * int(rows.mean())
    depth = 2 * np.flatnonzero(mask[middle // 2]).max()
    shape = ellipse(middle, 0, 0.6 * depth, 0.6 * depth, shape=pixels.shape)
    inside = mask[np.minimum(shape[0] // 2, mask.shape[0] - 1), np.minimum(shape[1] // 2, mask.shape[1] - 1)]
    pixels[shape[0][inside], shape[1][inside]] = 58000


@artefact
def pacemaker(pixels, mask, rng):
    """A box of 40 x 35 mm inside the upper breast, and its lead."""
    rows = np.flatnonzero(mask.any(axis=1))
    top = 2 * int(rows[0] + 0.1 * len(rows))
    part = box(pixels, top, 2 * MM, 40 * MM, 35 * MM, 10)
    inside = mask[np.minimum(part[0] // 2, mask.shape[0] - 1), np.minimum(part[1] // 2, mask.shape[1] - 1)]
    pixels[part[0][inside], part[1][inside]] = 65535
    pixels[top + 20 * MM : top + 70 * MM, 15 * MM : 16 * MM] = 65535


@artefact
def collimation_at_the_far_side(pixels, mask, rng):
    pixels[:, -8 * MM :] = 52000


@artefact
def collimation_with_round_corners(pixels, mask, rng):
    height, width = pixels.shape
    rows, columns = np.mgrid[:height, :width]
    corner = 30 * MM
    for top in (True, False):
        down = rows if top else height - 1 - rows
        across = width - 1 - columns
        outside = (down < corner) & (across < corner) & (np.hypot(corner - down, corner - across) > corner)
        pixels[outside] = 52000


@artefact
def second_exposure(pixels, mask, rng):
    """A second, smaller breast from the far side, where there is room."""
    height, width = pixels.shape
    room = width - 2 * np.flatnonzero(mask.any(axis=0)).max() - 6 * MM
    breast = pixels[:, : 2 * np.flatnonzero(mask.any(axis=0)).max()]
    if room < 10 * MM:
        return
    small = resize(breast[::4, ::4], (height // 3, room), preserve_range=True)[:, ::-1].astype(pixels.dtype)
    part = pixels[height // 3 : height // 3 + small.shape[0], width - room :]
    np.maximum(part, small, out=part)
