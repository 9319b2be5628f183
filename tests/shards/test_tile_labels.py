"""Tile labels against a brute-force reference that counts pixels."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mammostream.shards.labels import tile_labels

SIDE = 40


def tiles_of(*rows):
    """Return a tile table of (image_id, x, y, size) rows."""
    frame = pd.DataFrame(rows, columns=["image_id", "x", "y", "size"])
    return frame.assign(key=[f"{r.image_id}_y{r.y}_x{r.x}_{n}" for n, r in enumerate(frame.itertuples())])


def findings_of(*rows):
    return pd.DataFrame(rows, columns=["image_id", "label", "xmin", "ymin", "xmax", "ymax"])


def mask_of(xmin, ymin, xmax, ymax):
    mask = np.zeros((SIDE, SIDE), bool)
    mask[ymin:ymax, xmin:xmax] = True
    return mask


boxes = st.tuples(st.integers(0, 25), st.integers(0, 25), st.integers(1, 14), st.integers(1, 14))


@given(
    tiles=st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 25), st.integers(0, 25), st.integers(1, 14)), min_size=1),
    findings=st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["mass", "calc"]), boxes), min_size=1, max_size=6),
    min_fraction=st.sampled_from([0.1, 0.25, 0.5, 1.0]),
)
def test_against_counting_pixels(tiles, findings, min_fraction):
    table = tiles_of(*tiles)
    rows = [(image, label, x, y, x + w, y + h) for image, label, (x, y, w, h) in findings]
    got = tile_labels(table, findings_of(*rows), min_fraction)
    assert got["tile_path"].tolist() == table["key"].tolist()
    assert list(got.columns[1:]) == sorted({label for _, label, _ in findings})
    for label in got.columns[1:]:
        for tile, value in zip(table.itertuples(), got[label], strict=True):
            inside = mask_of(tile.x, tile.y, tile.x + tile.size, tile.y + tile.size)
            shares = [0.0]
            for image, name, *corners in rows:
                if image == tile.image_id and name == label:
                    box = mask_of(*corners)
                    shares.append((inside & box).sum() / min(inside.sum(), box.sum()))
            expected = 1 if max(shares) >= min_fraction else 0 if max(shares) == 0 else None
            assert (None if pd.isna(value) else value) == expected


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((2, 2, 6, 6), 1),  # lesion in tile
        ((-50, -50, 90, 90), 1),  # tile in lesion
        ((0, 0, 10, 10), 1),
        ((5, 0, 15, 10), 1),  # half of it
        ((6, 0, 16, 10), None),  # a sliver less
        ((9, 9, 30, 30), None),
        ((10, 0, 20, 10), 0),  # touches
        ((30, 30, 40, 40), 0),
    ],
)
def test_positive_empty_negative(box, expected):
    got = tile_labels(tiles_of(("a", 0, 0, 10)), findings_of(("a", "mass", *box)), 0.5)["mass"]
    assert (None if pd.isna(got[0]) else got[0]) == expected


def test_boxes_of_other_films_and_labels_do_not_count():
    got = tile_labels(
        tiles_of(("a", 0, 0, 10), ("b", 0, 0, 10)), findings_of(("a", "mass", 0, 0, 10, 10), ("c", "calc", 0, 0, 10, 10)), 0.5
    )
    assert got["mass"].tolist() == [1, 0]
    assert got["calc"].tolist() == [0, 0]


def test_csv_has_empty_cells(tmp_path):
    got = tile_labels(tiles_of(("a", 0, 0, 10), ("a", 9, 9, 10)), findings_of(("a", "mass", 0, 0, 10, 10)), 0.5)
    assert got.to_csv(index=False) == "tile_path,mass\na_y0_x0_0,1\na_y9_x9_1,\n"


def test_no_findings():
    assert tile_labels(tiles_of(("a", 0, 0, 10)), findings_of(), 0.5).columns.tolist() == ["tile_path"]


def test_a_film_whose_lesion_has_no_box_has_no_negative_tiles():
    """VinDr's BI-RADS 2 films (label missing) and mini-MIAS's rows without coordinates (label 1, no box)."""
    table = tiles_of(*[(film, x, 0, 10) for film in ("boxed", "clean", "unboxed", "unknown", "elsewhere") for x in (0, 20)])
    findings = findings_of(("boxed", "mass", 0, 0, 10, 10), ("unboxed", "calc", 0, 0, 10, 10))
    manifest = pd.DataFrame(
        {
            "image_id": ["boxed", "clean", "unboxed", "unknown"],
            "label:mass": pd.array([1, 0, 1, None], "Int8"),
        }
    )
    got = tile_labels(table, findings, 0.5, manifest)
    assert [None if pd.isna(v) else v for v in got["mass"]] == [1, 0, 0, 0, None, None, None, None, 0, 0]
    assert got["calc"].tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0, 0]  # the manifest says nothing of it: boxes are all there is
    assert tile_labels(table, findings, 0.5)["mass"].tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 0, 0]
