"""Heat maps: a weighted mean of the tiles that hold a point, smooth where they overlap, and drawn where they lie."""

from __future__ import annotations

import math

import imagecodecs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mammostream.train.predict.heat_maps import draw_heat_map, heat_map


def read(path):
    return imagecodecs.png_decode(path.read_bytes())[..., :3].astype(int)


def near(picture, colour, tolerance=30):
    return (np.abs(picture - np.array(colour)).max(-1) <= tolerance).sum()


@settings(max_examples=60)
@given(st.data())
def test_each_point_is_the_weighted_mean_of_the_tiles_that_hold_its_centre(data):
    step, size = data.draw(st.integers(1, 5)), data.draw(st.integers(2, 20))
    height, width = (data.draw(st.integers(size, 40)) for _ in range(2))
    count = data.draw(st.integers(0, 6))
    x, y = (np.array([data.draw(st.integers(0, n - size)) for _ in range(count)], int) for n in (width, height))
    p = np.array([data.draw(st.floats(0, 1)) for _ in range(count)])
    heat = heat_map((height, width), x, y, size, p, step)
    assert heat.shape == (math.ceil(height / step), math.ceil(width / step))
    assert heat.dtype == np.float32

    for row in range(heat.shape[0]):
        for column in range(heat.shape[1]):
            above, weights = 0.0, 0.0
            for i in range(count):
                down, across = (row + 0.5) * step - y[i], (column + 0.5) * step - x[i]
                if 0 <= down < size and 0 <= across < size:
                    # A Hann window: half of 1 - cos, and a thousandth so that edges count at all.
                    weight = math.prod(0.001 + (1 - math.cos(2 * math.pi * d / size)) / 2 for d in (down, across))
                    above, weights = above + weight * p[i], weights + weight
            if weights:
                assert heat[row, column] == pytest.approx(above / weights, abs=1e-6)
            else:
                assert math.isnan(heat[row, column])


def test_a_tile_alone_keeps_its_probability_to_its_edges():
    heat = heat_map((20, 20), np.array([4]), np.array([8]), 8, np.array([0.7]), step=1)
    assert np.argwhere(np.isfinite(heat)).min(0).tolist() == [8, 4]
    assert np.argwhere(np.isfinite(heat)).max(0).tolist() == [15, 11]
    np.testing.assert_allclose(heat[np.isfinite(heat)], 0.7, atol=1e-6)


def test_overlapping_tiles_pass_smoothly_into_each_other():
    """From a cold tile through a hot one to a cold one: no step, while a plain mean jumps by half."""
    line = heat_map((64, 128), np.array([0, 32, 64]), np.zeros(3, int), 64, np.array([0.0, 1.0, 0.0]), step=1)[32]
    assert np.abs(np.diff(line)).max() < 0.06
    assert line[:28].max() == pytest.approx(0, abs=1e-6)
    assert line.argmax() == pytest.approx(63.5, abs=1)
    assert line[64] > 0.99


def test_the_picture_shows_where_and_how_much(tmp_path):
    image = np.full((120, 80), 0.2, np.float32)
    cold, hot = (heat_map(image.shape, np.array([0]), np.array([0]), 60, np.array([p]), step=4) for p in (0.02, 0.98))
    pictures = {}
    for name, heat, boxes in (("cold", cold, ()), ("hot", hot, ()), ("boxed", hot, [(10, 20, 40, 50)])):
        draw_heat_map(image, heat, 4, boxes, tmp_path / f"{name}.png", "title")
        pictures[name] = read(tmp_path / f"{name}.png")
    cyan = (0x39, 0xD0, 0xFF)
    assert near(pictures["boxed"], cyan) > 100 > near(pictures["hot"], cyan)
    grey = np.abs(pictures["cold"] - 51).max(-1) <= 2
    rows = np.flatnonzero(grey.sum(1) > 100)  # of the film; the title's letters have less grey
    top, height, left = rows.min(), np.ptp(rows) + 1, np.flatnonzero(grey[rows].sum(0) > 100).min()
    changed = np.argwhere(np.abs(pictures["hot"] - pictures["cold"]).max(-1) > 60)
    assert changed[:, 1].min() > left + height * 80 / 120  # nothing on the film alone
    # The tile: the upper left 60 x 60 of 120 x 80 pixels.
    assert changed[:, 0].min() == pytest.approx(top, abs=4)
    assert np.ptp(changed, axis=0) == pytest.approx([height / 2, height / 2], rel=0.1)


def test_a_map_whose_points_reach_over_the_films_edge_is_not_squeezed(tmp_path):
    """16 points of 4 pixels over 61 pixels: the tile's edge lies where its pixels end, at 32 of 61."""
    image = np.zeros((61, 61), np.float32)
    cold, hot = (heat_map(image.shape, np.array([0]), np.array([0]), 32, np.array([p]), step=4) for p in (0.0, 1.0))
    pictures = []
    for heat in (cold, hot):
        draw_heat_map(image, heat, 4, (), tmp_path / "map.png", "title")
        pictures.append(read(tmp_path / "map.png"))
    black = np.flatnonzero((pictures[0].max(-1) < 10).sum(1) > 1000)
    changed = np.argwhere(np.abs(pictures[1] - pictures[0]).max(-1) > 60)
    assert np.ptp(changed[:, 0]) + 1 == pytest.approx((np.ptp(black) + 1) * 32 / 61, abs=4)


def test_a_long_name_with_a_dollar_is_drawn_as_it_is(tmp_path):
    image, heat = np.zeros((40, 20), np.float32), np.full((10, 5), 0.5, np.float32)
    draw_heat_map(image, heat, 4, (), tmp_path / "map.png", "a_very_long_name$_of_an_image$" * 8)
    assert (tmp_path / "map.png").is_file()
