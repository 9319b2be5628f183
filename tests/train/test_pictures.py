"""Pictures: a heat map is a mean of tiles, and each picture shows what it was given."""

from __future__ import annotations

import json

import imagecodecs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.pictures import (
    draw_curves,
    draw_heat_map,
    draw_precision_recall,
    draw_reliability,
    draw_roc,
    draw_views,
    heat_map,
    read_metrics,
)


def read(path):
    return imagecodecs.png_decode(path.read_bytes())[..., :3].astype(int)


def near(picture, colour, tolerance=30):
    return (np.abs(picture - np.array(colour)).max(-1) <= tolerance).sum()


@settings(max_examples=60)
@given(st.data())
def test_heat_map_is_the_mean_of_the_tiles_that_cover_a_point(data):
    step = data.draw(st.integers(1, 5))
    size = step * data.draw(st.integers(1, 4))
    height, width = (data.draw(st.integers(size, 40)) for _ in range(2))
    count = data.draw(st.integers(0, 6))
    # Corners on the map's grid: then every point lies in a tile whole or not at all.
    x, y = (
        np.array([step * data.draw(st.integers(0, (n - size) // step)) for _ in range(count)], int) for n in (width, height)
    )
    p = np.array([data.draw(st.floats(0, 1)) for _ in range(count)])
    heat = heat_map((height, width), x, y, size, p, step)

    pixels = np.full((height, width), np.nan)
    for row in range(height):
        for column in range(width):
            covering = [p[i] for i in range(count) if y[i] <= row < y[i] + size and x[i] <= column < x[i] + size]
            if covering:
                pixels[row, column] = np.mean(covering)
    assert heat.shape == (-(-height // step), -(-width // step))
    assert heat.dtype == np.float32
    np.testing.assert_allclose(heat, pixels[::step, ::step], atol=1e-6)


def test_heat_map_of_tiles_off_the_grid_covers_every_pixel_of_them():
    heat = heat_map((20, 20), np.array([3]), np.array([5]), 8, np.array([0.7]), step=4)
    covered = np.argwhere(np.isfinite(heat))
    assert covered.min(0).tolist() == [1, 0]  # rows from 5, columns from 3
    assert covered.max(0).tolist() == [3, 2]  # rows to 12, columns to 10
    assert np.unique(heat[np.isfinite(heat)]).tolist() == [pytest.approx(0.7)]


def test_heat_map_shows_where_and_how_much(tmp_path):
    image = np.full((120, 80), 0.2, np.float32)
    cold, hot = (heat_map(image.shape, np.array([0]), np.array([0]), 60, np.array([p]), step=4) for p in (0.02, 0.98))
    pictures = {}
    for name, heat, boxes in (("cold", cold, ()), ("hot", hot, ()), ("boxed", hot, [(10, 20, 40, 50)])):
        draw_heat_map(image, heat, boxes, tmp_path / f"{name}.png", "title")
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


def test_curves_show_what_was_logged(tmp_path):
    lines = [
        {"step": 1, "loss": 0.9},
        {"step": 2, "loss": None, "epoch_mean/z_std": 0.1},
        {"step": 4, "loss": 0.1, "epoch_mean/z_std": 0.2},
    ]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    widths = {}
    for name, wanted in (("one", ["loss"]), ("two", ["loss", "z_std"]), ("missing", ["loss", "never_logged"])):
        draw_curves(metrics, wanted, tmp_path / f"{name}.png", "Title")
        picture = read(tmp_path / f"{name}.png")
        widths[name] = picture.shape[1]
        assert near(picture, (0x17, 0x69, 0xAA)) > 20  # a drawn line
    assert widths["two"] > 1.8 * widths["one"]
    assert widths["missing"] == widths["one"]
    draw_curves(metrics, ["never_logged"], tmp_path / "none.png", "Title")
    assert not (tmp_path / "none.png").exists()


def test_metrics_of_a_killed_run_are_read_up_to_its_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 0.5}]


def test_views_are_drawn_in_rows_on_one_grey_scale(tmp_path):
    rng = np.random.default_rng(0)
    tiles = rng.uniform(0.3, 0.7, (3, 16, 16))
    tiles[:, 0, :2] = 0, 1
    draw_views({"tile": tiles}, tmp_path / "one.png")
    draw_views({"tile": tiles, "view 1": np.clip(tiles * 0.5, 0, 1)}, tmp_path / "two.png")
    one, two = read(tmp_path / "one.png"), read(tmp_path / "two.png")
    assert two.shape[0] == pytest.approx(2 * one.shape[0], rel=0.05)
    inside = slice(two.shape[1] // 4, -two.shape[1] // 4)
    upper, lower = np.array_split(two[:, inside], 2)

    def middle_grey(part):  # the median of what is neither white paper nor black frame
        return np.median(part[(part > 5) & (part < 250)])

    # A view at half the brightness looks darker than its tile, rather than being stretched to look alike.
    assert middle_grey(lower) < 0.7 * middle_grey(upper)


FIRST, SECOND = (0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E)  # the first two classes' colours


def middle(picture, colour):
    """Mean row and column of a colour, as shares of the picture."""
    rows, columns = np.nonzero(np.abs(picture - np.array(colour)).max(-1) <= 30)
    return rows.mean() / picture.shape[0], columns.mean() / picture.shape[1]


@pytest.mark.parametrize("draw", [draw_roc, draw_precision_recall])
def test_a_good_classifiers_curve_lies_above_a_bad_ones(draw, tmp_path):
    y = np.array([[0.0], [1.0]] * 10)
    draw(y, 0.1 + 0.8 * y, ["good"], tmp_path / "good.png")
    draw(y, 0.9 - 0.8 * y, ["bad"], tmp_path / "bad.png")
    good, bad = (middle(read(tmp_path / f"{name}.png"), FIRST) for name in ("good", "bad"))
    assert good[0] < bad[0] - 0.1


def test_the_reliability_curve_leaves_the_diagonal_to_the_side_of_the_error(tmp_path):
    rng = np.random.default_rng(0)
    p = rng.random((2000, 1))
    for name, truth in (("too low", p**0.4), ("too high", p**2.5)):
        draw_reliability((rng.random((2000, 1)) < truth).astype(float), p, ["a"], tmp_path / f"{name}.png")
    low, high = (middle(read(tmp_path / f"{name}.png"), FIRST) for name in ("too low", "too high"))
    assert low[0] < high[0] - 0.1


@pytest.mark.parametrize("draw", [draw_roc, draw_precision_recall, draw_reliability])
def test_every_class_has_its_colour_and_missing_labels_count_nowhere(draw, tmp_path):
    rng = np.random.default_rng(0)
    y, p = rng.integers(0, 2, (60, 2)).astype(float), rng.random((60, 2))
    draw(y, p, ["a", "b"], tmp_path / "both.png")
    assert min(near(read(tmp_path / "both.png"), colour) for colour in (FIRST, SECOND)) > 50
    one = y.copy()
    one[:, 1] = np.nan
    draw(one, p, ["a", "b"], tmp_path / "one.png")
    assert near(read(tmp_path / "one.png"), FIRST) > 50
    assert near(read(tmp_path / "one.png"), SECOND) == 0
    masked = np.concatenate([one, np.full((5, 2), np.nan)]), np.concatenate([p, np.ones((5, 2))])
    draw(*masked, ["a", "b"], tmp_path / "masked.png")
    assert (tmp_path / "masked.png").read_bytes() == (tmp_path / "one.png").read_bytes()
    draw(np.full((3, 1), np.nan), np.zeros((3, 1)), ["none"], tmp_path / "none.png")
    assert near(read(tmp_path / "none.png"), FIRST) == 0
