"""Segmentation on the real films, and on images that are no film."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocess.segmentation import segment_breast

SPACING = 0.2  # of the `films` fixture
# Film letters as a person sees them, (top, bottom, left, right) in pixels of 0.4 mm.
LETTERS = {
    "P0_lcc": (50, 115, 240, 300),
    "P0_lmlo": (55, 145, 255, 330),
    "P0_rmlo": (20, 100, 0, 85),
    "P1_lcc": (35, 90, 280, 325),
}


def overlap(a, b):
    return (a & b).sum() / (a | b).sum()


@pytest.fixture(scope="module")
def segmented(films):
    return {film.name: (film, segment_breast(film.pixels, SPACING)) for film in films}


def test_side_is_the_one_dicom_gives(segmented):
    import pydicom

    for film, found in segmented.values():
        laterality = pydicom.dcmread(film.path, stop_before_pixels=True).Laterality
        assert (found.side, found.flags) == (laterality, ()), film.name


def test_mask_holds_the_tissue_and_leaves_the_background(segmented):
    for film, found in segmented.values():
        assert (found.factor, found.spacing_mm) == (2, pytest.approx(0.4))
        assert found.mask.shape == tuple(-(-n // 2) for n in film.pixels.shape)
        mask = found.mask if film.side == "L" else found.mask[:, ::-1]
        pixels = film.pixels[::2, ::2] if film.side == "L" else film.pixels[::2, ::-2]
        pixels = pixels[: mask.shape[0], : mask.shape[1]]
        middle = mask.shape[0] // 2
        assert mask[middle, 30:130].all(), film.name  # tissue from the chest wall on
        assert not mask[:, 240:].any(), film.name  # nothing beyond the nipple
        assert 0.15 < mask.mean() < 0.5, film.name
        # Bright pixels are tissue, but for letters, borders and the strip at the chest wall.
        bright = pixels[30:-30, 20:200] > 20000
        assert (mask[30:-30, 20:200] & bright).sum() > 0.98 * bright.sum(), film.name
        assert found.area_mm2 == pytest.approx(found.mask.sum() * 0.16)


@pytest.mark.parametrize("name", LETTERS)
def test_letters_are_outside(segmented, name):
    film, found = segmented[name]
    top, bottom, left, right = LETTERS[name]
    letters = film.pixels[2 * top : 2 * bottom, 2 * left : 2 * right]
    assert (letters > 15000).mean() > 0.05  # the letters are there
    assert not found.mask[top:bottom, left:right].any()


def test_flipped_film_gives_the_flipped_mask(segmented):
    for film, found in segmented.values():
        flipped = segment_breast(film.pixels[:, ::-1], SPACING)
        assert flipped.side == {"L": "R", "R": "L"}[found.side]
        assert overlap(flipped.mask[:, ::-1], found.mask) > 0.995, film.name


@pytest.mark.parametrize("scale", [1 / 256, 0.1, 0.5, 100.0])
def test_exposure_scale_changes_nothing(segmented, scale):
    for film, found in list(segmented.values())[::3]:
        scaled = segment_breast(film.pixels * np.float32(scale), SPACING)
        assert overlap(scaled.mask, found.mask) > 0.995, film.name


def test_eight_bits_give_nearly_the_same_mask(segmented):
    for film, found in list(segmented.values())[::3]:
        assert overlap(segment_breast((film.pixels >> 8).astype(np.uint8), SPACING).mask, found.mask) > 0.97, film.name


def test_resolution_changes_little(segmented):
    from preprocess.resampling import block_mean

    for film, found in list(segmented.values())[::3]:
        coarse = segment_breast(block_mean(film.pixels, 2), 2 * SPACING)
        assert coarse.factor == 1
        np.testing.assert_array_equal(coarse.mask, found.mask)


def test_without_a_spacing_the_height_is_assumed_and_said(segmented):
    film, found = segmented["P0_lcc"]
    guessed = segment_breast(film.pixels)
    assert guessed.flags == ("no_spacing",)
    assert guessed.spacing_mm == pytest.approx(240 / film.pixels.shape[0] * guessed.factor)
    assert overlap(guessed.mask, found.mask) > 0.95


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
