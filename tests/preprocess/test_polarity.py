"""Inverted films: found on real films, turned over to the same tiles, and none found where there is none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dicom_files import write_dicom
from PIL import Image
from pydicom.dataset import Dataset

from mammostream.preprocess.mammogram import Header, Mammogram
from mammostream.preprocess.polarity import looks_inverted, upright
from mammostream.preprocess.reading import read_mammogram
from mammostream.preprocess.tiling import TilingConfig, tile_film

MIAS = sorted((Path(__file__).parents[2] / "../shared/films/mini-mias").glob("*.png"))
CONFIG = TilingConfig(tile_size=256, stride=128)


def over(pixels):
    return pixels.max() - pixels


def test_no_real_film_is_taken_for_inverted_and_each_is_found(films):
    for film in films:
        assert not looks_inverted(film.pixels), film.name
        assert looks_inverted(over(film.pixels)), film.name


@pytest.mark.skipif(not MIAS, reason="the films of mini-MIAS are not here")
def test_films_of_mini_mias():
    for path in MIAS:
        with Image.open(path) as image:
            pixels = np.asarray(image)
        assert not looks_inverted(pixels), path.name
        assert looks_inverted(over(pixels)), path.name


def framed(pixels):
    return np.pad(pixels, 60, constant_values=pixels.max())


def compressed(pixels):
    return np.rint(255 * np.sqrt(pixels / pixels.max())).astype(np.uint8)


def cropped(pixels):
    rows, columns = pixels.shape
    return pixels[rows // 4 : 3 * rows // 4, columns // 4 : 3 * columns // 4]


@pytest.mark.parametrize("change", [framed, compressed, cropped, np.transpose, np.flipud, lambda p: p[::4, ::4]])
def test_white_frames_other_greys_and_crops_are_not_taken_for_inverted(films, change):
    assert not any(looks_inverted(change(film.pixels)) for film in films)


@pytest.mark.parametrize("shape", [(1, 1), (8, 300), (40, 40), (300, 300)])
def test_blank_and_tiny_images_are_left_alone(shape):
    for value in (0, 255):
        pixels = np.full(shape, value, np.uint8)
        mammogram = Mammogram(pixels, Header(*shape, 8))
        assert upright(mammogram, "auto") == replace(mammogram, pixels=pixels, voi=None)


@pytest.fixture(scope="module")
def film(films):
    return films[1].pixels  # a left breast


@pytest.fixture(scope="module")
def expected(film):
    return tile_film(Mammogram(film, Header(*film.shape, 12, 0.2)), CONFIG)


def check_same_tiles(made, expected):
    assert made.segmentation.side == expected.segmentation.side == "L"
    np.testing.assert_array_equal(made.segmentation.mask, expected.segmentation.mask)
    np.testing.assert_array_equal(made.tiles.x, expected.tiles.x)
    np.testing.assert_allclose(made.image, expected.image, atol=1e-6)


def test_an_inverted_png_gives_the_tiles_of_the_film(tmp_path, film, expected):
    Image.fromarray(over(film)).save(tmp_path / "f.png")
    mammogram = read_mammogram(tmp_path / "f.png").with_spacing(0.2, "given")
    np.testing.assert_array_equal(mammogram.pixels, over(film))  # reading does not turn it
    made = tile_film(mammogram, CONFIG)
    assert "inverted" in made.flags
    assert "inverted" not in expected.flags
    check_same_tiles(made, expected)


def test_as_is_flags_and_leaves_it(film, expected):
    made = tile_film(Mammogram(over(film), Header(*film.shape, 12, 0.2)), replace(CONFIG, polarity="as-is"))
    assert "inverted" in made.flags
    assert made.segmentation.side != expected.segmentation.side


@pytest.mark.parametrize("window", [{}, {"WindowCenter": -30000, "WindowWidth": 60000}])
def test_a_falling_rescale_is_applied_before_the_breast_is_looked_for(tmp_path, film, expected, window):
    said = {"RescaleSlope": -1, "RescaleIntercept": 0, "PixelSpacing": [0.2, 0.2], **window}
    stored = over(film)
    path = write_dicom(tmp_path / "f.dcm", stored, bits=16, **said)
    mammogram = read_mammogram(path)
    np.testing.assert_array_equal(mammogram.pixels, stored.max() - stored)
    made = tile_film(mammogram, CONFIG)
    assert "inverted" not in made.flags  # the file says itself how it is meant
    np.testing.assert_array_equal(made.segmentation.mask, expected.segmentation.mask)
    if window:  # the display that PS3.3 C.11.2.1.2.1 defines
        shown = np.clip(((-stored.astype(float) + 30000.5) / 59999) + 0.5, 0, 1)
        np.testing.assert_allclose(made.image, shown, atol=1e-6)
    else:
        check_same_tiles(made, expected)


@pytest.mark.parametrize("kind", ["US", "OW"])
def test_a_falling_modality_lut_counts_too(tmp_path, film, kind):
    lut = Dataset()
    entries = np.arange(4095, -1, -1).astype("<u2")
    lut.LUTDescriptor, lut.ModalityLUTType = [4096, 0, 16], "US"
    lut.add_new("LUTData", kind, entries.tolist() if kind == "US" else entries.tobytes())
    stored = np.minimum(over(film), 4095).astype(np.uint16)
    path = write_dicom(tmp_path / "f.dcm", stored, ModalityLUTSequence=[lut])
    np.testing.assert_array_equal(read_mammogram(path).pixels, stored.max() - stored)


def test_monochrome1_that_calls_itself_monochrome2_is_turned_with_its_window(tmp_path, film, expected):
    high = int(film.max())
    said = {"PixelSpacing": [0.2, 0.2], "WindowCenter": high / 2, "WindowWidth": high}
    right = write_dicom(tmp_path / "right.dcm", over(film), bits=16, photometric="MONOCHROME1", **said)
    wrong = write_dicom(tmp_path / "wrong.dcm", over(film), bits=16, **said)
    meant, made = (tile_film(read_mammogram(path), CONFIG) for path in (right, wrong))
    assert "inverted" not in meant.flags
    assert "inverted" in made.flags
    assert made.mapping == meant.mapping == "voi"
    np.testing.assert_array_equal(made.segmentation.mask, expected.segmentation.mask)
    np.testing.assert_array_equal(made.image, meant.image)


def test_a_display_that_turns_stored_values_over_is_kept(film, expected):
    """The VOI table makes tissue bright already: only the mask needs values turned over."""
    high = int(film.max())
    voi = np.linspace(1, 0, high + 1).astype(np.float32)
    made = tile_film(Mammogram(over(film), Header(*film.shape, 12, 0.2), voi), CONFIG)
    assert "inverted" not in made.flags
    np.testing.assert_array_equal(made.segmentation.mask, expected.segmentation.mask)
    np.testing.assert_allclose(made.image, film / np.float32(high), atol=1e-6)
