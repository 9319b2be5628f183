"""Peaks of heat maps as marks: against a search point by point, and the figures of the command."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_froc import files, frames, sensitivity  # noqa: F401

from mammostream.train.evaluate.froc import RATES, breasts_of, mark, sensitivities
from mammostream.train.evaluate.peaks import find_peaks, peak_marks
from mammostream.train.predict.heat_maps import heat_map

SIZE = 8  # a point of the map is a pixel


def peaks_one_by_one(tiles):
    """Every flat area by filling it, its surroundings one by one, and of near peaks the highest."""
    x, y, scores = (np.array([t[i] for t in tiles], float) for i in (0, 1, 3))
    heat = np.round(heat_map((40, 40), x, y, SIZE, scores, 1).astype(np.float64), 5)
    done, found = set(), []
    for row, column in zip(*np.nonzero(~np.isnan(heat)), strict=True):
        if (row, column) in done:
            continue
        area, edge, value, highest = [], [(row, column)], heat[row, column], True
        done.add((row, column))
        while edge:
            r, c = edge.pop()
            area.append((r, c))
            for near in [(r + i, c + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]:
                other = heat[near] if min(near) >= 0 and max(near) < 40 else np.nan
                highest &= not other > value
                if other == value and near not in done:
                    done.add(near)
                    edge.append(near)
        if highest:
            found.append((*np.mean(area, 0), value))
    kept = []
    for r, c, value in sorted(found, key=lambda peak: (-peak[2], peak[0], peak[1])):
        if all(np.hypot(r + 0.5 - b, c + 0.5 - a) > SIZE / 2 for a, b, _ in kept):
            kept.append((c + 0.5, r + 0.5, value))
    return kept


def cases(seed):
    """Tiles on a grid of a quarter of their edge, so that some overlap and others lie alone; boxes; images of 3 patients."""
    rng = np.random.default_rng(seed)
    patients = {f"i{i}": (f"P{i // 2}", f"P{i // 2} L" if i % 3 else "") for i in range(6)}
    tiles = {
        i: [(*rng.integers(0, 15, 2) * 2, SIZE, rng.integers(1, 9) / 8) for _ in range(rng.integers(0, 7))] for i in patients
    }
    boxes = {
        i: [(x, y, x + rng.integers(1, 14), y + rng.integers(1, 14)) for x, y in rng.integers(0, 30, (rng.integers(0, 3), 2))]
        for i in ("i0", "i1", "i3", "i4")
    }
    boxes["i1"].append((4, 4, 9, 9))
    return tiles, boxes, patients


@given(st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_counts_are_those_of_a_search_point_by_point(seed):
    tiles, boxes, patients = data = cases(seed)
    lesions, false = [], []
    for image, (patient, breast) in patients.items():
        peaks = peaks_one_by_one(tiles[image]) if tiles[image] else []
        near = {}
        for k, (x, y, _) in enumerate(peaks):
            for b, (xmin, ymin, xmax, ymax) in enumerate(boxes.get(image, [])):
                dx, dy = max(xmin - x, 0, x - xmax), max(ymin - y, 0, y - ymax)
                near[k, b] = dx**2 + dy**2 <= (SIZE / 4) ** 2
        for b in range(len(boxes.get(image, []))):
            lesions.append((patient, breast, max((v for k, (_, _, v) in enumerate(peaks) if near[k, b]), default=-np.inf)))
        count = len(boxes.get(image, []))
        false += [(patient, v) for k, (_, _, v) in enumerate(peaks) if not any(near[k, b] for b in range(count))]
    marked = mark(*frames(*data), peak_marks)
    assert sorted(marked.lesions["score"]) == pytest.approx(sorted(s for *_, s in lesions))
    assert sorted(marked.false.itertuples(index=False, name=None)) == [(p, pytest.approx(s)) for p, s in sorted(false)]
    wrong = [s for _, s in false]
    for units, scores in (
        (marked.lesions, [s for *_, s in lesions]),
        (breasts_of(marked.lesions), pd.DataFrame(lesions).query("`1` != ''").groupby(1)[2].max().tolist()),
    ):
        if scores:
            values, _ = sensitivities(units, marked, 0)
            assert values == pytest.approx([sensitivity(scores, wrong, 6, rate) for rate in RATES])


def test_the_peak_of_overlapping_tiles_is_the_middle_of_the_highest():
    """Tiles at half a tile's stride: between their middles the map is blended. The outer half of the last one is flat."""
    x = np.arange(5) * 256.0
    points, scores = find_peaks(x, np.zeros(5), 512, np.array([0.2, 0.9, 0.3, 0.1, 0.6]))
    np.testing.assert_allclose(points[:, 0], [512, 1536 - 128], atol=16)
    np.testing.assert_allclose(points[:, 1], 256, atol=16)
    np.testing.assert_allclose(scores, [0.9, 0.6], atol=0.01)


def test_a_tile_alone_is_a_peak_in_its_middle_wherever_it_lies():
    points, scores = find_peaks(np.array([1000.0]), np.array([3000.0]), 512, np.array([0.25]))
    np.testing.assert_allclose(points, [[1256, 3256]])
    assert scores == pytest.approx([0.25])


def test_the_command_judges_peaks(files, mammostream, tmp_path):  # noqa: F811
    """All tiles lie alone: peaks are their middles, so that a tile that only touches a box is a false positive."""
    outcome = mammostream(f"{files[0]()} --output-dir {tmp_path}/out --froc-marks peaks")
    assert outcome.code == 0, outcome.err
    found = json.loads((tmp_path / "out/metrics.json").read_text())["froc"]["mass"]
    # Lesions: (20, 20, 60, 60) holds the peak (50, 50) of 0.9, (310, 10, 350, 50) that of 0.2 at (350, 50); i3 has no tile that
    # could be read; (80, 80, 200, 200) is more than 25 away from (50, 50) of 0.5, a false positive besides 0.6, 0.3 and 0.1.
    assert (found["images"], found["marks_without_lesion"]) == (5, 4)
    assert found["lesion_wise"]["sensitivity"] == {"0.25": 0.25, "0.5": 0.25, "1": 0.5, "2": 0.5}
    assert "FROC of the heat maps' peaks: sensitivity at 0.25, 0.5, 1, 2 false positives per image" in outcome.out
    assert (tmp_path / "out/froc.png").stat().st_size > 1000
    alone = mammostream(f"{files[0]().replace('--findings', '--by-table')} --froc-marks peaks")
    assert "--froc-marks peaks serves --findings" in alone.error
