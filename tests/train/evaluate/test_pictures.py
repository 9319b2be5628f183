"""Charts: each shows what it was given."""

from __future__ import annotations

import json

import imagecodecs
import numpy as np
import pytest

from mammostream.train.byol.pictures import draw_views
from mammostream.train.evaluate.pictures import draw_precision_recall, draw_reliability, draw_roc
from mammostream.train.run.charts import draw_curves, read_metrics


def read(path):
    return imagecodecs.png_decode(path.read_bytes())[..., :3].astype(int)


def near(picture, colour, tolerance=30):
    return (np.abs(picture - np.array(colour)).max(-1) <= tolerance).sum()


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
