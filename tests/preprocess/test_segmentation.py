"""Segmentation on the real films, as they are, changed, and with what films carry added; and on images that are no film."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from film_artefacts import ARTEFACTS
from film_outlines import BORDERS, BREASTS, BRIGHT_FOG, FOG, LETTERS, NIPPLES, PECTORAL_MUSCLE
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from skimage.draw import polygon2mask

from mammostream.preprocess.resampling import block_mean
from mammostream.preprocess.segmentation import Segmentation, segment_breast

SPACING = 0.2  # of the `films` fixture; two pixels make one of the mask


def overlap(a, b):
    return (a & b).sum() / (a | b).sum()


class Segmented(NamedTuple):
    """A film as uint16 with its chest wall at the left, and its segmentation."""

    name: str
    pixels: np.ndarray
    found: Segmentation
    path: Any
    side: str

    def facing(self, image: np.ndarray) -> np.ndarray:
        """Return a view of an image of this film with the chest wall at the left, or back."""
        return image if self.side == "L" else image[:, ::-1]


@pytest.fixture(scope="module")
def segmented(films) -> list[Segmented]:
    found = []
    for film in films:
        segmentation = segment_breast(film.pixels, SPACING)
        found.append(Segmented(film.name, film.pixels, segmentation, film.path, film.side))
    return found


def test_side_is_the_one_dicom_gives(segmented):
    import pydicom

    for film in segmented:
        laterality = pydicom.dcmread(film.path, stop_before_pixels=True).Laterality
        flags = ("bright_fog",) if film.name in BRIGHT_FOG else ()
        assert (film.found.side, film.found.flags, film.found.method) == (laterality, flags, "otsu"), film.name


def test_mask_is_the_breast_as_a_person_draws_it(segmented):
    for film in segmented:
        found = film.found
        assert (found.factor, found.spacing_mm) == (2, pytest.approx(0.4))
        assert found.mask.shape == tuple(-(-n // 2) for n in film.pixels.shape)
        assert overlap(found.mask, polygon2mask(found.mask.shape, BREASTS[film.name])) > 0.95, film.name
        assert found.area_mm2 == pytest.approx(found.mask.sum() * 0.16)
        assert ndimage.label(found.mask)[1] == 1, film.name
        np.testing.assert_array_equal(ndimage.binary_fill_holes(found.mask), found.mask)


def test_nipple_and_pectoral_muscle_stay(segmented):
    for film in segmented:
        for row, column in [NIPPLES[film.name], *PECTORAL_MUSCLE.get(film.name, [])]:
            assert film.found.mask[row, column], (film.name, row, column)


def test_letters_borders_and_fog_are_outside(segmented):
    for film in segmented:
        mask = film.found.mask
        for top, bottom, left, right in LETTERS[film.name]:
            letters = film.pixels[2 * top : 2 * bottom, 2 * left : 2 * right]
            assert (letters > 15000).mean() > 0.05, film.name  # the letters are there
            assert not mask[top:bottom, left:right].any(), film.name
        if film.name in BORDERS:
            above, below = BORDERS[film.name]
            assert not mask[: above - 1].any(), film.name  # the last row is half border
            assert not mask[-below:].any(), film.name
        for row, column in FOG[film.name]:
            assert film.pixels[2 * row, 2 * column] > 1500, film.name  # brighter than the background by far
            # Nothing far above or below the breast, from the chest wall to the other side.
            assert not mask[row - 15 : row + 15].any(), (film.name, row)


Change = Callable[[Segmented], tuple[np.ndarray, np.ndarray]]
CHANGES: dict[str, tuple[float, Change]] = {}


def change(bound: float) -> Callable[[Change], Change]:
    """Note a change of a film: it returns the mask found on the changed film, and the one to find."""

    def note(function: Change) -> Change:
        CHANGES[function.__name__] = (bound, function)
        return function

    return note


def mask_of(pixels: np.ndarray, spacing: float = SPACING) -> np.ndarray:
    return segment_breast(pixels, spacing).mask


@change(0.999)
def flipped(film):
    segmentation = segment_breast(film.pixels[:, ::-1], SPACING)
    assert segmentation.side == {"L": "R", "R": "L"}[film.side]
    return segmentation.mask[:, ::-1], film.found.mask


@change(0.995)
def darker_by_a_fifth(film):
    return mask_of((film.pixels * 0.8).astype(np.uint16)), film.found.mask


@change(0.97)
def brighter_by_a_fifth_and_clipped(film):
    return mask_of(np.minimum(film.pixels * 1.2, 65535).astype(np.uint16)), film.found.mask


@change(0.995)
def on_another_scale(film):
    return mask_of(film.pixels * np.float32(1 / 300)), film.found.mask


@change(0.98)
def with_8_bits(film):
    return mask_of((film.pixels >> 8).astype(np.uint8)), film.found.mask


@change(0.99)
def cropped_by_a_tenth_at_the_far_side(film):
    width = film.pixels.shape[1] // 20 * 2
    mask = film.facing(film.found.mask)
    assert not mask[:, -width // 2 :].any()  # background
    return mask_of(film.facing(film.pixels)[:, :-width]), mask[:, : -width // 2]


@change(0.99)
def cropped_by_a_tenth_at_the_bottom(film):
    height = film.pixels.shape[0] // 20 * 2
    assert film.found.mask[-height // 2 :].mean() < 0.01  # background, but for the last rows of one breast
    return mask_of(film.pixels[:-height]), film.found.mask[: -height // 2]


def _with_strip(film, axis, before):
    """Add a strip of 4 mm at an edge."""
    width = [(0, 0), (0, 0)]
    width[axis] = (20, 0) if before else (0, 20)
    mask = mask_of(np.pad(film.pixels, width, constant_values=60000))
    inner = [slice(None), slice(None)]
    inner[axis] = slice(10, None) if before else slice(None, -10)
    return mask[tuple(inner)], film.found.mask


@change(0.99)
def strip_at_the_top(film):
    return _with_strip(film, 0, True)


@change(0.99)
def strip_at_the_bottom(film):
    return _with_strip(film, 0, False)


@change(0.97)
def strip_at_the_left(film):
    return _with_strip(film, 1, True)


@change(0.97)
def strip_at_the_right(film):
    return _with_strip(film, 1, False)


@change(0.999)
def at_half_the_resolution(film):
    segmentation = segment_breast(block_mean(film.pixels, 2), 2 * SPACING)
    assert segmentation.factor == 1
    return segmentation.mask, film.found.mask


def _painted(film, paint):
    """Paint onto a copy of a film whose chest wall is at the left."""
    copy = film.pixels.copy()
    paint(film.facing(copy), film.facing(film.found.mask))
    return mask_of(copy), film.found.mask


@change(0.99)
def label_beside_the_breast(film):
    def paint(pixels, mask):
        assert not mask[75:125, -80:-20].any()
        pixels[150:250, -160:-40] = 60000

    return _painted(film, paint)


@change(0.97)
def label_that_touches_the_breast(film):
    """A solid label of 20 x 16 mm that covers 4 mm of the skin line."""

    def paint(pixels, mask):
        row = int(0.35 * len(mask))
        skin = 2 * np.flatnonzero(mask[row]).max()
        pixels[2 * row - 40 : 2 * row + 40, skin - 20 : skin + 80] = 60000

    return _painted(film, paint)


@change(0.97)
def letters_that_touch_the_breast(film):
    """Strokes of 2 mm that stand on the skin line."""

    def paint(pixels, mask):
        row = int(0.4 * len(mask))
        for number in range(4):
            skin = 2 * np.flatnonzero(mask[row + 10 * number]).max()
            pixels[2 * row + 20 * number : 2 * row + 20 * number + 10, skin - 10 : skin + 60] = 60000
        pixels[2 * row : 2 * row + 70, skin + 60 : skin + 70] = 60000

    return _painted(film, paint)


@change(0.97)
def tape_from_top_to_bottom(film):
    def paint(pixels, mask):
        left = int(0.75 * pixels.shape[1])
        np.maximum(pixels[:, left : left + 50], 50000, out=pixels[:, left : left + 50])

    return _painted(film, paint)


def _tape_across(film, place):
    def paint(pixels, mask):
        top = int(place * len(pixels))
        np.maximum(pixels[top : top + 40], 50000, out=pixels[top : top + 40])

    return _painted(film, paint)


@change(0.94)
def tape_across_below_the_breast(film):
    return _tape_across(film, 0.93)


@change(0.95)
def tape_across_above_the_breast(film):
    return _tape_across(film, 0.03)


@change(0.97)
def tape_across_the_breast(film):
    return _tape_across(film, 0.5)


@change(0.97)
def scratches(film):
    rng = np.random.default_rng(0)

    def paint(pixels, mask):
        for _ in range(6):
            start, end = rng.random((2, 2)) * (np.array(pixels.shape) - 2)
            rows, columns = (start + (end - start) * np.linspace(0, 1, 3000)[:, None]).astype(int).T
            pixels[rows, columns] = pixels[rows + 1, columns] = 65535

    return _painted(film, paint)


@change(0.97)
def dust(film):
    rng = np.random.default_rng(0)

    def paint(pixels, mask):
        for row, column in rng.integers(0, np.array(pixels.shape) - 6, (300, 2)):
            height, width = rng.integers(1, 5, 2)
            pixels[row : row + height, column : column + width] = 65535

    return _painted(film, paint)


@change(0.97)
def hole_in_the_breast(film):
    """Nothing where a fatty lump of 20 mm lies: holes are filled."""

    def paint(pixels, mask):
        depth = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
        row, column = 2 * np.array(np.unravel_index(depth.argmax(), depth.shape))
        rows, columns = np.ogrid[: pixels.shape[0], : pixels.shape[1]]
        pixels[np.hypot(rows - row, columns - column) < 50] = 0

    return _painted(film, paint)


@change(0.97)
def background_of_zeros(film):
    near = np.kron(ndimage.binary_dilation(film.found.mask, iterations=3), np.ones((2, 2), bool))
    return mask_of(film.pixels * near[: film.pixels.shape[0], : film.pixels.shape[1]]), film.found.mask


def _on_canvas(film, fog, uneven=0.0):
    """The film on a black canvas, its base brightened by a share of full scale that grows from top to bottom."""
    height, width = film.pixels.shape
    level = (fog + uneven * np.linspace(-0.5, 0.5, height)[:, None] * fog) * 65535
    foggy = np.clip(film.pixels * (1 - fog) + level, 1, 65535).astype(np.uint16)
    margins = (40, 60), (250, 350)
    found = mask_of(np.pad(foggy, margins))
    step = film.found.factor
    return found[20 : 20 + -(-height // step), 125 : 125 + -(-width // step)], film.found.mask


@change(0.96)
def film_on_a_black_canvas(film):
    return _on_canvas(film, 0.0001)


@change(0.9)
def foggy_film_on_a_canvas(film):
    return _on_canvas(film, 0.25)


@change(0.88)
def unevenly_foggy_film_on_a_canvas(film):
    return _on_canvas(film, 0.25, 0.2)


@change(0.95)
def noise(film):
    """Noise of 300 of 65,535 a pixel, many times the films' own in the background."""
    added = film.pixels + np.random.default_rng(0).normal(0, 300, film.pixels.shape)
    return mask_of(np.clip(added, 0, 65535).astype(np.uint16)), film.found.mask


def every_second(films: list[Segmented], name: str, names: dict[str, Any]) -> list[Segmented]:
    """The even films for every other name, the odd ones for the rest: all would take a minute more."""
    return films[list(names).index(name) % 2 :: 2]


@pytest.mark.parametrize("name", CHANGES)
def test_changes_leave_the_mask(segmented, name):
    bound, function = CHANGES[name]
    for film in every_second(segmented, name, CHANGES):
        found, expected = function(film)
        assert overlap(found, expected) > bound, film.name


@pytest.mark.parametrize("name", ARTEFACTS)
def test_objects_are_outside_and_what_they_cover_is_inside(segmented, name):
    for film in every_second(segmented, name, ARTEFACTS):
        pixels, clean = film.facing(film.pixels).copy(), film.facing(film.found.mask)
        ARTEFACTS[name](pixels, clean, np.random.default_rng(0))
        assert overlap(mask_of(pixels), clean) > 0.97, film.name


def test_plausibility_tells_wrong_masks_from_right_ones(segmented, monkeypatch):
    """Masks too small by 8 mm, too large by 10 mm, or that lack their upper third."""
    from mammostream.preprocess import segmentation

    def upper_third_lost(mask):
        rows = np.flatnonzero(mask.any(axis=1))
        return mask & (np.arange(len(mask)) > rows[0] + len(rows) // 3)[:, None]

    wrong = {
        "small": lambda mask: ndimage.binary_erosion(mask, iterations=20),
        "large": lambda mask: ndimage.binary_dilation(mask, iterations=25),
        "cut": upper_third_lost,
    }
    close = segmentation.closed
    for name, change_mask in wrong.items():
        monkeypatch.setattr(segmentation, "closed", lambda *args, change=change_mask: change(close(*args)))
        for film in every_second(segmented, name, wrong):
            found = segment_breast(film.pixels, SPACING)
            assert overlap(found.mask, film.found.mask) < 0.85
            assert "doubtful_mask" in found.flags, (name, film.name, found.plausibility)
            assert "doubtful_mask" not in film.found.flags, film.name
            assert found.plausibility < film.found.plausibility, (name, film.name)


def test_borders_darker_than_the_films_maximum_are_trimmed():
    """A smooth breast that reaches the top, a border of half its brightness above it and the background."""
    rows, columns = np.mgrid[:560, :360]
    film = np.clip(1.2 - ((rows - 200) / 300) ** 2 - (columns / 150) ** 2, 0, 1) * 40000
    bare = segment_breast(film, 0.4).mask
    assert bare[0].any()
    for before, after in ((6, 0), (0, 6), (6, 6)):
        bordered = segment_breast(np.pad(film, ((before, after), (0, 0)), constant_values=20000), 0.4).mask
        assert not bordered[:before].any()
        assert not bordered[560 + before :].any()
        assert overlap(bordered[before : before + 560], bare) > 0.98
    # The same light over the top of the breast alone, as its own tissue may be, is no border.
    lit = film.copy()
    lit[:6, :110] = 40000
    np.testing.assert_array_equal(segment_breast(lit, 0.4).mask[0], bare[0])


def test_without_a_spacing_the_height_is_assumed_and_said(segmented):
    for film in segmented[::3]:
        guessed = segment_breast(film.pixels)
        assert guessed.flags == ("no_spacing", *film.found.flags)
        assert guessed.spacing_mm == pytest.approx(240 / film.pixels.shape[0] * guessed.factor)
        assert guessed.mask.shape == film.found.mask.shape
        assert overlap(guessed.mask, film.found.mask) > 0.95


CONSTANT = [0, 1, 255, 65535]


@pytest.mark.parametrize("value", CONSTANT)
@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (7, 5), (400, 300)])
def test_constant_image_has_no_breast(shape, value):
    found = segment_breast(np.full(shape, value, np.uint16), SPACING)
    assert found.flags == ("no_breast",)
    assert not found.mask.any()
    assert found.side == ""
    assert found.area_mm2 == 0


@pytest.mark.parametrize(
    "image",
    [
        np.random.default_rng(0).normal(1000, 100, (500, 400)),
        np.random.default_rng(0).integers(0, 65536, (500, 400)).astype(np.uint16),
        np.full((500, 400), np.nan),
        np.where(np.random.default_rng(0).random((500, 400)) < 0.5, np.nan, 1.0),
        np.full((500, 400), np.inf),
        np.eye(400),
    ],
    ids=["normal noise", "white noise", "nan", "half nan", "inf", "a line"],
)
def test_image_that_is_no_film_is_flagged(image):
    found = segment_breast(image, SPACING)
    assert {"no_breast", "doubtful_mask"} & set(found.flags)


@settings(max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    spacing=st.none() | st.floats(0.02, 1),
    kind=st.sampled_from(["noise", "half", "speck", "nan", "gradient"]),
    seed=st.integers(0, 99),
)
def test_any_shape_gives_a_mask_of_its_grid(shape, spacing, kind, seed):
    rng = np.random.default_rng(seed)
    image = np.zeros(shape)
    if kind == "noise":
        image = rng.random(shape)
    elif kind == "half":
        image[:, : max(1, shape[1] // 2)] = 1000
    elif kind == "speck":
        image[rng.integers(shape[0]), rng.integers(shape[1])] = 65535
    elif kind == "nan":
        image[rng.random(shape) < 0.3] = np.nan
    else:
        image = np.linspace(0, 65535, shape[0] * shape[1]).reshape(shape)
    found = segment_breast(image, spacing)
    assert found.mask.dtype == bool
    assert found.mask.shape == tuple(-(-n // found.factor) for n in shape)
    assert ("no_breast" in found.flags) == (not found.mask.any())
    assert ("no_spacing" in found.flags) == (spacing is None)
    assert found.side in ("L", "R") if found.mask.any() else found.side == ""


def test_an_axillary_tail_of_even_width_is_no_fog():
    """As bright as the breast, it stays; a strip of a tenth of its brightness goes, and the film says how much was cut.

    A strip of nearly a third of the breast's brightness goes too, but may be tissue: that is flagged.
    """
    rows, columns = np.mgrid[:560, :360]
    breast = 500 + 30000 * np.clip(1.2 - ((rows - 340) / 180) ** 2 - (columns / 220) ** 2, 0, 1)
    for brightness, kept in ((16000, True), (6500, False), (3500, False)):
        film = np.where((rows < 200) & (columns < 47), np.maximum(breast, brightness), breast).astype(float)
        film += 30 * np.random.default_rng(0).standard_normal(film.shape)
        found = segment_breast(film, 0.4)
        assert (found.mask[20:120, 2:38].mean() > 0.95) == kept
        strip_mm2 = 0.4**2 * 47 * 150  # at least; from row 150 on the breast itself is wider
        assert found.fog_mm2 == 0 if kept else 0.8 * strip_mm2 < found.fog_mm2 < 1.5 * strip_mm2
        breast_brightness = np.median(film[found.mask])
        assert found.fog_brightness == pytest.approx(0 if kept else brightness / breast_brightness, abs=0.05)
        assert ("bright_fog" in found.flags) == (brightness == 6500)
