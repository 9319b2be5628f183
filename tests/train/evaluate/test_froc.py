"""FROC: marks, hits and false positives against a count one by one."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mammostream.train.evaluate.froc import RATES, breasts_of, curve, mark, sensitivities, suppressed

SIZE = 100.0


def share(tile, box):
    """The larger of the share of the box in the tile and of the tile in the box."""
    x, y, size = tile
    xmin, ymin, xmax, ymax = box
    width, height = min(x + size, xmax) - max(x, xmin), min(y + size, ymax) - max(y, ymin)
    overlap = max(width, 0) * max(height, 0)
    return max(overlap / ((xmax - xmin) * (ymax - ymin)), overlap / size**2)


def marks_of(tiles):
    """Greedy: the highest tile left is a mark, and takes those with it whose centre it holds."""
    left, marks = sorted(tiles, key=lambda tile: -tile[3]), []
    while left:
        best = left.pop(0)
        marks.append(best)
        left = [t for t in left if abs(t[0] - best[0]) > SIZE / 2 or abs(t[1] - best[1]) > SIZE / 2]
    return marks


def counted(tiles, boxes, patients):
    """(patient, breast, best score or None) of each box, (patient, score) of each false positive."""
    lesions, false = [], []
    for image, (patient, breast) in patients.items():
        marks = marks_of([t for t in tiles.get(image, []) if not np.isnan(t[3])])
        for box in boxes.get(image, []):
            hits = [m[3] for m in marks if share(m[:3], box) >= 0.5]
            lesions.append((patient, breast, max(hits, default=-np.inf)))
        false += [(patient, m[3]) for m in marks if all(share(m[:3], box) == 0 for box in boxes.get(image, []))]
    return lesions, false


def sensitivity(scores, false, images, rate):
    """The highest of all thresholds with at most so many false positives per image."""
    cuts = [*{s for s in (*scores, *false) if s > -np.inf}, np.inf]
    allowed = [t for t in cuts if sum(f >= t for f in false) <= rate * images]
    return max(sum(s >= t for s in scores) for t in allowed) / len(scores)


def cases(seed):
    """Tiles, boxes and images of 3 patients; scores of few levels, so that many tie."""
    rng = np.random.default_rng(seed)
    patients = {f"i{i}": (f"P{i // 2}", f"P{i // 2} L" if i % 3 else "") for i in range(6)}
    tiles = {
        i: [(*rng.integers(0, 7, 2) * 25.0, SIZE, rng.integers(1, 9) / 8) for _ in range(rng.integers(0, 8))] for i in patients
    }
    tiles["i0"].append((0.0, 0.0, SIZE, np.nan))  # could not be read
    boxes = {
        i: [
            (x, y, x + rng.integers(5, 160), y + rng.integers(5, 160)) for x, y in rng.integers(0, 200, (rng.integers(0, 3), 2))
        ]
        for i in ("i0", "i1", "i3", "i4")
    }
    boxes["i1"].append((10, 10, 60, 60))
    return tiles, boxes, patients


def frames(tiles, boxes, patients):
    tile_rows = [(i, *t) for i, rows in tiles.items() for t in rows]
    box_rows = [(i, *b) for i, rows in boxes.items() for b in rows]
    return (
        pd.DataFrame(tile_rows, columns=["image", "_x", "_y", "_size", "score"]),
        pd.DataFrame(box_rows, columns=["image", "xmin", "ymin", "xmax", "ymax"]),
        pd.DataFrame([(i, *about) for i, about in patients.items()], columns=["image", "patient", "breast"]),
    )


@given(st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_counts_are_those_of_a_count_one_by_one(seed):
    data = cases(seed)
    lesions, false = counted(*data)
    marked = mark(*frames(*data))
    assert sorted(marked.lesions["score"]) == sorted(s for _, _, s in lesions)
    assert sorted(marked.false.itertuples(index=False, name=None)) == sorted(false)
    scores, wrong = [s for *_, s in lesions], [s for _, s in false]
    values, drawn = sensitivities(marked.lesions, marked, 3, seed)
    assert values == pytest.approx([sensitivity(scores, wrong, 6, rate) for rate in RATES])
    breasts = {}
    for _, breast, score in lesions:
        if breast:
            breasts[breast] = max(score, breasts.get(breast, -np.inf))
    assert dict(breasts_of(marked.lesions)[["breast", "score"]].itertuples(index=False)) == breasts
    names = ["P0", "P1", "P2"]
    for r, patients in enumerate(np.random.default_rng(seed).integers(3, size=(3, 3))):
        people = [names[patient] for patient in patients]
        mine = [s for person in people for p, _, s in lesions if p == person]
        theirs = [s for person in people for p, s in false if p == person]
        wanted = [sensitivity(mine, theirs, 6, rate) for rate in RATES] if mine else [np.nan] * 4
        assert drawn[:, r] == pytest.approx(wanted, nan_ok=True)
    rates, found = curve(np.array(scores), np.array(wrong), 6)
    for rate, at in zip(RATES, values, strict=True):
        assert found[rates <= rate].max() == pytest.approx(at)


def test_of_overlapping_tiles_the_highest_is_the_mark():
    x, y = np.array([0.0, 50, 51, 0]), np.array([0.0, 0, 0, 200])
    kept = suppressed(x, y, np.full(4, SIZE), np.array([0.9, 0.8, 0.7, 0.9]))
    assert kept.tolist() == [True, False, True, True]


@pytest.fixture
def files(tmp_path):
    """Six films of three patients with tiles, a manifest and findings: 'i0' has two lesions, 'i5' is positive without a box,
    'i9' has no prediction, 'i7' is of a split that nobody asked for, and 'i8' is predicted but not labelled."""
    tiles = pd.DataFrame(
        [
            ("i0", 0, 0, 0.9),  # hits the first lesion of i0
            ("i0", 300, 0, 0.2),  # and this the second
            ("i1", 0, 0, 0.6),  # the same breast, without a lesion: a false positive
            ("i2", 0, 0, 0.3),
            ("i2", 300, 300, 0.1),
            ("i3", 0, 0, np.nan),  # the tile could not be read: the lesion is missed
            ("i4", 0, 0, 0.5),  # touches a lesion by less than half: neither
            ("i5", 0, 0, 0.99),
            ("i8", 0, 0, 0.98),
        ],
        columns=["image_id", "x", "y", "prob:mass"],
    )
    tiles["key"] = [f"{i}_y{y}_x{x}" for i, x, y, _ in tiles.itertuples(index=False)]
    tiles["patient_id"] = [f"P{int(i[1]) // 2}" for i in tiles["image_id"]]
    tiles["size"] = 100
    manifest = pd.DataFrame(
        {
            "image_id": [*(f"i{i}" for i in range(6)), "i9", "i7"],
            "patient_id": [*(f"P{i // 2}" for i in range(6)), "P9", "P7"],
            "laterality": list("LLLRRRLL"),
            "label:mass": [1, 0, 0, 1, 1, 1, 1, 1],
            "split": [*["test"] * 7, "train"],
        }
    )
    boxes = [
        ("i0", 20, 20, 60, 60),
        ("i0", 310, 10, 350, 50),
        ("i3", 10, 10, 50, 50),
        ("i4", 80, 80, 200, 200),
        ("i9", 0, 0, 9, 9),
        ("i7", 0, 0, 9, 9),
        ("i8", 0, 0, 60, 60),
    ]
    findings = pd.DataFrame(boxes, columns=["image_id", "xmin", "ymin", "xmax", "ymax"]).assign(label="mass")

    def write(tiles=tiles, manifest=manifest, findings=findings):
        for name, frame in (("tiles", tiles), ("labels", manifest), ("findings", findings)):
            frame.to_parquet(tmp_path / f"{name}.parquet")
        return (
            f"evaluate --predictions {tmp_path}/tiles.parquet --labels {tmp_path}/labels.parquet "
            f"--findings {tmp_path}/findings.parquet --bootstrap 20"
        )

    return write, tiles, manifest, findings


def test_the_command_judges_lesions_and_breasts(files, mammostream, tmp_path):
    outcome = mammostream(files[0]() + f" --output-dir {tmp_path}/out")
    assert outcome.code == 0, outcome.err
    found = json.loads((tmp_path / "out/metrics.json").read_text())["froc"]["mass"]
    # Judged are i0 to i4, with the false positives 0.6, 0.3 and 0.1; lesions 0.9, 0.2 and two that are missed.
    assert (found["images"], found["marks_without_lesion"], found["false_positives_per_image"]) == (5, 3, 0.6)
    assert found["lesion_wise"]["count"] == 4
    assert found["lesion_wise"]["sensitivity"] == {"0.25": 0.25, "0.5": 0.5, "1": 0.5, "2": 0.5}
    assert found["breast_wise"]["count"] == 3
    assert found["breast_wise"]["sensitivity"] == {rate: pytest.approx(1 / 3) for rate in ("0.25", "0.5", "1", "2")}
    low, high = found["lesion_wise"]["intervals"]["1"]
    assert 0 <= low <= 0.5 <= high <= 1
    assert found["left_out"] == {
        "boxes_on_images_without_prediction": 1,
        "positive_images_without_box": 1,
        "images_without_label": 1,
    }
    assert "mass, 4 lesions on 5 images: 0.250" in outcome.out
    assert "1 predicted images are positive but have no box: not judged" in outcome.out
    assert (tmp_path / "out/froc.png").stat().st_size > 1000


def test_without_sides_there_are_no_breasts(files, mammostream):
    write, _, manifest, _ = files
    outcome = mammostream(write(manifest=manifest.drop(columns="laterality")))
    assert outcome.code == 0, outcome.err
    assert "mass, breasts: undefined, no box on a breast of known patient and side" in outcome.out


BAD = {
    "images": (lambda t, m, f: (t.drop(columns=["key", "x"]).drop_duplicates("image_id"), m, f), "needs predictions of tiles"),
    "tile images": (lambda t, m, f: (t.assign(x=None), m, f), "9 of 9 predictions have none (the first: 'i0_y0_x0')"),
    "other labels": (
        lambda t, m, f: (t, m, f.assign(label="cyst")),
        "no box has the label of a judged class (mass); its labels are: cyst",
    ),
    "other images": (
        lambda t, m, f: (t, m, f.assign(image_id="j")),
        "has no box of a judged class on an image that is predicted and labelled (the first of each: 'j' and 'i0')",
    ),
    "no box": (
        lambda t, m, f: (t, m, f.assign(xmax=f["xmin"])),
        "row 1, image 'i0': xmin 20, ymin 20, xmax 20, ymax 60 is no box",
    ),
    "a column less": (lambda t, m, f: (t, m, f.drop(columns="ymin")), "ymin"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_has_no_boxes_or_positions_is_one_line(what, files, mammostream):
    write, *frames = files
    change, message = BAD[what]
    outcome = mammostream(write(*change(*frames)))
    assert outcome.code == 2, outcome.err
    assert message in outcome.error


def test_labels_of_tiles_name_the_films(files, mammostream):
    write, tiles, *_ = files
    some = tiles[tiles["image_id"].isin(["i0", "i1", "i2"])]
    labels = pd.DataFrame({"tile_path": some["key"] + ".png", "mass": [1, 1, 0, 0, 0]})
    outcome = mammostream(write(manifest=labels))
    assert outcome.code == 0, outcome.err
    assert "mass, 2 lesions on 3 images: 0.500" in outcome.out  # i4 has a box but is not in the labels
