"""The pectoral muscle on the real films, as they are and changed: where it lies, and that none is drawn where there is none."""

from __future__ import annotations

import numpy as np
import pytest
from film_outlines import PECTORAL_OUTLINES
from skimage.draw import polygon2mask

from mammostream.preprocess.pectoral import pectoral_muscle, view_of
from mammostream.preprocess.resampling import block_mean
from mammostream.preprocess.segmentation import segment_breast

SPACING = 0.2  # of the `films` fixture; two pixels make one of the mask


def muscle_of(pixels: np.ndarray, view: str, spacing: float | None = SPACING) -> np.ndarray:
    segmentation = segment_breast(pixels, spacing)
    muscle = pectoral_muscle(block_mean(pixels, segmentation.factor), segmentation, view)
    assert muscle.shape == segmentation.mask.shape
    assert not (muscle & ~segmentation.mask).any()
    return muscle


def overlap(a, b):
    return (a & b).sum() / (a | b).sum()


@pytest.fixture(scope="module")
def oblique(films):
    return [film for film in films if film.view.endswith("mlo")]


@pytest.fixture(scope="module")
def drawn(oblique):
    """The muscle found on each MLO film."""
    return {film.name: muscle_of(film.pixels, "MLO") for film in oblique}


def test_the_muscle_is_where_a_person_draws_it(drawn):
    assert drawn.keys() == PECTORAL_OUTLINES.keys()
    for name, muscle in drawn.items():
        assert overlap(muscle, polygon2mask(muscle.shape, PECTORAL_OUTLINES[name])) > 0.88, name


def test_an_unknown_view_shows_its_muscle_by_its_shape(oblique, drawn):
    for film in oblique:
        np.testing.assert_array_equal(muscle_of(film.pixels, ""), drawn[film.name], film.name)


def test_films_seen_from_above_have_none(films):
    for film in films:
        if film.view.endswith("cc"):
            # Neither as they are nor cut through the breast, which then comes from the film's upper end.
            rows = np.flatnonzero(segment_breast(film.pixels, SPACING).mask.any(axis=1))
            for start in (0, 2 * rows[0] + 50, rows[0] + rows[-1]):
                for pixels in (film.pixels[start:], film.pixels[::-1][start:]):
                    segmentation = segment_breast(pixels, SPACING)
                    for view in ("", "CC", "R-CC", "XCCL", "ML", "spot"):
                        muscle = pectoral_muscle(block_mean(pixels, segmentation.factor), segmentation, view)
                        assert not muscle.any(), (film.name, start, view)


def test_no_muscle_on_a_film_that_is_said_to_be_cc(oblique):
    for film in oblique:
        assert not muscle_of(film.pixels, "CC").any(), film.name


def test_a_breast_below_the_muscle_shows_none(oblique, drawn):
    for film in oblique:
        below = 2 * np.flatnonzero(drawn[film.name].any(axis=1))[-1] + 20
        assert not muscle_of(film.pixels[below:], "").any(), film.name


def test_a_mirrored_film_has_the_mirrored_muscle(oblique, drawn):
    for film in oblique:
        even = film.pixels[:, : film.pixels.shape[1] // 2 * 2]
        muscle = muscle_of(even, "MLO")
        assert overlap(muscle, drawn[film.name][:, : muscle.shape[1]]) > 0.98, film.name
        np.testing.assert_array_equal(muscle_of(even[:, ::-1], "MLO")[:, ::-1], muscle, film.name)


@pytest.mark.parametrize(
    "change",
    [
        lambda pixels: (pixels * 0.8).astype(np.uint16),
        lambda pixels: (pixels >> 8).astype(np.uint8),
        lambda pixels: pixels / np.float32(300),
        lambda pixels: np.where(pixels < 0.9 * pixels.max(), pixels, pixels.max()),  # saturated
    ],
    ids=["darker", "8 bits", "another scale", "saturated"],
)
def test_values_on_another_scale_change_little(oblique, drawn, change):
    for film in oblique:
        assert overlap(muscle_of(change(film.pixels), "MLO"), drawn[film.name]) > 0.95, film.name


def test_pixels_of_another_size(oblique, drawn):
    for film in oblique:
        fine = film.pixels.repeat(2, axis=0).repeat(2, axis=1)
        assert overlap(muscle_of(fine, "MLO", SPACING / 2), drawn[film.name]) > 0.98, film.name
        assert overlap(muscle_of(film.pixels, "MLO", None), drawn[film.name]) > 0.9, film.name


@pytest.mark.parametrize("shape", [(1, 1), (3, 400), (400, 3), (64, 64), (700, 500)])
def test_images_that_are_no_film(shape):
    noise = np.random.default_rng(0).integers(0, 4096, shape).astype(np.uint16)
    for pixels in (noise, np.zeros(shape, np.uint16), np.full(shape, 4000, np.uint16), noise.astype(np.float32) * np.nan):
        assert not muscle_of(pixels, "").any()
        muscle_of(pixels, "MLO")


@pytest.mark.parametrize(
    ("text", "view"),
    [
        ("MLO", "MLO"),
        (" l-mlo ", "MLO"),
        ("RMLO", "MLO"),
        ("medio-lateral oblique", "MLO"),
        ("CC", "CC"),
        ("RCC", "CC"),
        ("XCCL", "CC"),
        ("cranio-caudal", "CC"),
        ("CV", "CC"),
        ("FB", "CC"),
        ("caudo-cranial (from below)", "CC"),
        ("M-CC", "CC"),
        ("some CC view", "CC"),
        ("MLO-ID", "MLO"),
        ("M-MLO", ""),
        ("MLO spot", ""),
        ("MLO magnification spot", ""),
        ("ML", ""),
        ("LM", ""),
        ("", ""),
        ("None", ""),
        ("<NA>", ""),
    ],
)
def test_names_of_views(text, view):
    assert view_of(text) == view
