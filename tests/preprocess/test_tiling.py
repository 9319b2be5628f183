"""From a decoded film to its tiles: padding, spacing, boxes in native pixels, cutting."""

from __future__ import annotations

import numpy as np
import pytest

from common.errors import BadInput
from preprocess.intensity import map_to_unit, to_stored
from preprocess.reading import Header, Mammogram
from preprocess.resampling import block_mean, resample
from preprocess.tiling import TilingConfig, check_spacings, preprocessing_record, tile_film

SMALL = TilingConfig(tile_size=64, stride=32)


def mammogram_of(film, spacing=0.2, cut=slice(None)):
    pixels = film.pixels[cut]
    return Mammogram(pixels, Header(*pixels.shape, bits=16, spacing_mm=spacing))


@pytest.fixture(scope="module")
def tiled(films):
    mammogram = mammogram_of(films[1])
    return mammogram, tile_film(mammogram, SMALL)


def test_tiles_are_pieces_of_the_mapped_film(tiled):
    mammogram, film = tiled
    assert film.scale == 1
    assert film.flags == ()
    assert film.mapping.startswith("percentile ")
    assert 100 < len(film.tiles.x) < 1000
    expected = np.rint(film.image * 65535).astype(np.uint16)
    for i in range(0, len(film.tiles.x), 17):
        x, y = film.tiles.x[i], film.tiles.y[i]
        np.testing.assert_array_equal(film.cut(i, 64, 16), expected[y : y + 64, x : x + 64])
        eight = film.cut(i, 64, 8)
        assert eight.dtype == np.uint8
        assert np.abs(eight / 255.0 - film.cut(i, 64, 16) / 65535.0).max() < 0.5 / 255 + 1e-4
    # One mapping a film, and it keeps the order of grey values.
    order = np.argsort(mammogram.pixels.ravel()[::101])
    assert (np.diff(film.image.ravel()[::101][order]) >= 0).all()
    assert film.image.min() == 0
    assert film.image.max() <= 1


def test_native_boxes_are_the_tiles_own_pixels(tiled):
    mammogram, film = tiled
    height, width = mammogram.pixels.shape
    for i in range(len(film.tiles.x)):
        x, y, size = film.native_box(i, 64)
        assert (x, y, size) == (film.tiles.x[i], film.tiles.y[i], 64)
        assert 0 <= x <= width - size
        assert 0 <= y <= height - size


@pytest.mark.parametrize("spacing", [0.1, 0.27, 0.4])
def test_native_boxes_of_a_resampled_film(films, spacing):
    mammogram = mammogram_of(films[1])
    film = tile_film(mammogram, TilingConfig(tile_size=64, stride=64, pixel_spacing=spacing, min_freq_energy=99))
    scale = spacing / 0.2
    assert film.scale == pytest.approx(scale)
    assert len(film.tiles.x) >= 8
    shown, native = [], []
    height, width = mammogram.pixels.shape
    slack = np.ceil(scale)  # the last pixel of a resampled film may stand for a part of one
    for i in range(len(film.tiles.x)):
        x, y, size = film.native_box(i, 64)
        assert size == round(64 * scale)
        assert 0 <= x <= width - size + slack
        assert 0 <= y <= height - size + slack
        shown.append(_cells(film.cut(i, 64, 16), 4))
        native.append(_cells(mammogram.pixels[y : y + size, x : x + size], 4))
    # The tiles show what their native boxes show (the mapping is linear within its range).
    assert np.corrcoef(np.ravel(shown), np.ravel(native))[0, 1] > 0.999


def _cells(image, cells):
    rows = np.array_split(image, cells, axis=0)
    return np.array([[part.mean() for part in np.array_split(row, cells, axis=1)] for row in rows])


def test_small_film_is_padded_and_flagged(films):
    # 60 x 200 pixels from the inside of the breast.
    film = tile_film(mammogram_of(films[1], cut=np.s_[500:560, 20:220]), TilingConfig(tile_size=64, stride=64, min_nonzero=0.5))
    assert "padded" in film.flags
    assert film.image.shape == (64, 200)
    assert (film.image[60:] == 0).all()
    assert film.tiles.counts["candidates"] == 4
    for i in range(len(film.tiles.x)):
        assert film.cut(i, 64, 16).shape == (64, 64)


@pytest.mark.parametrize("shape", [(1, 1), (3, 500), (500, 3)])
@pytest.mark.parametrize("value", [0, 30000])
def test_no_film_gives_no_tiles_and_a_flag(shape, value):
    pixels = np.full(shape, value, np.uint16)
    film = tile_film(Mammogram(pixels, Header(*shape, bits=16, spacing_mm=0.1)), SMALL)
    assert {"no_breast", "padded"} <= set(film.flags)
    assert film.tiles.counts["kept"] == 0


def test_common_spacing_needs_the_films_own(films):
    with pytest.raises(BadInput, match="--pixel-spacing needs each film's own spacing.*--assume-spacing"):
        tile_film(mammogram_of(films[0], spacing=None), TilingConfig(tile_size=64, stride=64, pixel_spacing=0.1))


def test_display_of_the_file_wins(films):
    mammogram = mammogram_of(films[1])
    voi = np.clip(np.arange(65536, dtype=np.float32) / 40000, 0, 1)
    film = tile_film(Mammogram(mammogram.pixels, mammogram.header, voi), SMALL)
    assert film.mapping == "voi"
    np.testing.assert_array_equal(film.image, voi[mammogram.pixels])


def test_depth_does_not_matter(films):
    mammogram = mammogram_of(films[3])
    eight = Mammogram((mammogram.pixels >> 8).astype(np.uint8), Header(*mammogram.pixels.shape, bits=8, spacing_mm=0.2))
    a, b = tile_film(mammogram, SMALL), tile_film(eight, SMALL)
    places = [set(zip(f.tiles.x.tolist(), f.tiles.y.tolist(), strict=True)) for f in (a, b)]
    assert len(places[0] & places[1]) > 0.95 * len(places[0] | places[1])
    assert a.guide_8bit_kept == pytest.approx(b.guide_8bit_kept, rel=0.05)
    assert 0 < a.guide_8bit_kept <= len(a.tiles.x)


@pytest.mark.parametrize(
    ("spacings", "message"),
    [
        ([0.05, 0.0626], "differ by more than 1.25x"),
        ([0.1, 0.1, 0.05], r"from 0\.05 to 0\.1 mm"),
    ],
)
def test_different_spacings_are_refused(spacings, message):
    with pytest.raises(BadInput, match=message):
        check_spacings(np.array(spacings), SMALL)
    check_spacings(np.array(spacings), TilingConfig(pixel_spacing=0.1))


@pytest.mark.parametrize("spacings", [[0.05, 0.0625], [0.07], [np.nan, np.nan], [np.nan, 0.07, 0.08], []])
def test_like_spacings_pass(spacings):
    check_spacings(np.array(spacings, dtype=float), SMALL)


def test_unknown_spacing_and_a_common_one_are_refused():
    with pytest.raises(BadInput, match="1 of 2 films have no pixel spacing"):
        check_spacings(np.array([0.1, np.nan]), TilingConfig(pixel_spacing=0.1))
    with pytest.raises(BadInput, match="--pixel-spacing 3"):
        TilingConfig(pixel_spacing=3.0)


def test_record_says_how_tiles_were_made():
    record = preprocessing_record(TilingConfig(tile_size=128, stride=64), np.array([0.05, np.nan, 0.06]), 16)
    assert record["tile_size"] == 128
    assert record["native_spacing_mm"] == [0.05, 0.06]
    assert preprocessing_record(SMALL, np.array([np.nan]), 8)["native_spacing_mm"] is None


def test_block_mean_and_resample():
    image = np.random.default_rng(0).random((7, 10)).astype(np.float32)
    blocks = block_mean(image, 3)
    padded = np.pad(image, ((0, 2), (0, 2)), mode="edge")
    expected = [[padded[r : r + 3, c : c + 3].mean() for c in (0, 3, 6, 9)] for r in (0, 3, 6)]
    np.testing.assert_allclose(blocks, expected, rtol=1e-6)
    np.testing.assert_array_equal(resample(image, 3), blocks)
    np.testing.assert_array_equal(resample(image, 1), image)
    assert resample(image, 1.4).shape == (5, 7)
    np.testing.assert_allclose(resample(np.full((9, 9), 0.3), 1.7), 0.3, rtol=1e-6)


def test_mapping_keeps_room_above_the_brightest():
    values = np.linspace(1000, 2000, 100_000)
    pixels = np.array([[0, 1000, 1500, 2000, 2200, 65535]], np.uint16)
    image, mapping = map_to_unit(pixels, None, values)
    assert mapping == "percentile 1001.0..2248.5"
    assert image.dtype == np.float32
    assert (np.diff(image[0]) >= 0).all()
    assert image[0, 4] < 1 == image[0, 5]
    assert to_stored(np.array([0, 0.5, 1]), 8).tolist() == [0, 128, 255]
    assert to_stored(np.array([0, 1]), 16).tolist() == [0, 65535]


def test_padding_adds_no_energy_at_the_chest_wall():
    # A smooth right breast: its chest wall is the image's right edge, where padding would put a bright step.
    rows, columns = np.mgrid[-700:700, -900:0]
    pixels = (np.clip(1 - (rows / 600) ** 2 - (columns / 700) ** 2, 0, 1) * 30000).astype(np.uint16)
    film = Mammogram(pixels, Header(*pixels.shape, bits=16, spacing_mm=0.1))
    padded = tile_film(film, TilingConfig(tile_size=1024, stride=64, min_intensity=0, min_nonzero=0))
    assert "padded" in padded.flags
    assert len(padded.tiles.x)
    assert padded.tiles.freq_energy.max() < 0.1


@pytest.mark.parametrize("target", [0.08, 0.13, 0.19])
def test_no_two_tiles_share_a_native_corner_when_upsampled(films, target):
    film = tile_film(
        mammogram_of(films[1]), TilingConfig(tile_size=64, stride=31, pixel_spacing=target, min_intensity=0, min_nonzero=0)
    )
    corners = [film.native_box(i, 64)[:2] for i in range(len(film.tiles.x))]
    assert len(set(corners)) == len(corners)
