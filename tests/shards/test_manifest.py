"""The manifest: no patient in two splits, unique ids, paths that survive a move, splits by patient."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mammostream.common.errors import BadInput
from mammostream.shards.manifest import (
    MANIFEST_COLUMNS,
    OPTIONAL_COLUMNS,
    check_manifest,
    read_findings,
    read_manifest,
    split_by_patient,
    write_findings,
    write_manifest,
)


def frame_of(*rows, **columns):
    """Return a manifest of (image_id, patient_id, split) rows."""
    frame = pd.DataFrame(rows, columns=["image_id", "patient_id", "split"])
    plain = {"path": "f.png", "study_id": "", "laterality": "L", "view": "CC", "pixel_spacing_mm": None, "spacing_source": ""}
    return frame.assign(**plain, bits=8).assign(**columns)


GOOD = [("a", "P1", "train"), ("b", "P1", "train"), ("c", "P2", "val")]


def write_unchecked(frame, path):
    """Write a manifest as another program would: without our checks."""
    pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), path)


def test_round_trip(tmp_path):
    frame = frame_of(*GOOD, **{"label:mass": [1, 0, None], "pixel_spacing_mm": [0.05, None, 0.07]})
    frame["path"] = [str(tmp_path / "images" / f"{i}.png") for i in "abc"]
    path = tmp_path / "manifest.parquet"
    write_manifest(frame, path)
    stored = pd.read_parquet(path)
    assert stored["path"].tolist() == ["images/a.png", "images/b.png", "images/c.png"]
    assert list(stored.columns) == [*MANIFEST_COLUMNS, *OPTIONAL_COLUMNS, "label:mass"]
    got = read_manifest(path)
    assert got["path"].tolist() == frame["path"].tolist()
    assert got["label:mass"].tolist()[:2] == [1, 0]
    assert got["label:mass"].isna().tolist() == [False, False, True]
    assert got["pixel_spacing_mm"].isna().tolist() == [False, True, False]
    assert read_manifest(path, "val")["image_id"].tolist() == ["c"]


def test_same_manifest_same_bytes(tmp_path):
    for name in ("1", "2"):
        write_manifest(frame_of(*GOOD), tmp_path / name)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_relative_paths_survive_a_move(tmp_path):
    old, new = tmp_path / "old", tmp_path / "somewhere" / "new"
    (old / "images").mkdir(parents=True)
    (old / "images" / "a.png").write_bytes(b"film")
    frame = frame_of(("a", "P1", "train"), path=str(old / "images" / "a.png"))
    write_manifest(frame, old / "out" / "manifest.parquet")
    new.parent.mkdir()
    shutil.move(old, new)
    (path,) = read_manifest(new / "out" / "manifest.parquet")["path"]
    assert Path(path).read_bytes() == b"film"


BAD = [
    ([("a", "P1", "train"), ("b", "P1", "val")], "patient 'P1' is in the splits train and val"),
    ([("a", None, "train"), ("b", None, "val")], "image 'a' has no patient_id"),
    ([("a", "P1", "train"), ("a", "P1", "train")], "image_id 'a' more than once"),
    ([("a", "P1", "training")], "image 'a' has the split 'training'"),
    ([("a", "P1", "")], "image 'a' has the split ''"),
    ([], "has no rows"),
]


@pytest.mark.parametrize(("rows", "message"), BAD)
def test_bad_manifest_is_refused_on_write_and_on_read(tmp_path, rows, message):
    path = tmp_path / "manifest.parquet"
    frame = frame_of(*rows)
    with pytest.raises(BadInput, match=message):
        write_manifest(frame, path)
    assert not path.exists()
    write_unchecked(frame, path)
    with pytest.raises(BadInput, match=message) as caught:
        read_manifest(path)
    assert str(path) in str(caught.value)


def test_columns_that_old_manifests_lack_read_as_empty(tmp_path):
    write_manifest(frame_of(*GOOD, implant=["YES", None, ""]), tmp_path / "new.parquet")
    assert read_manifest(tmp_path / "new.parquet")["implant"].tolist() == ["YES", "", ""]
    old = pd.read_parquet(tmp_path / "new.parquet").drop(columns=list(OPTIONAL_COLUMNS))
    write_unchecked(old, tmp_path / "old.parquet")
    assert (read_manifest(tmp_path / "old.parquet")[list(OPTIONAL_COLUMNS)] == "").all(axis=None)


def test_what_a_manifest_does_not_know_reads_as_unknown(tmp_path):
    frame = frame_of(*GOOD)
    frame[["laterality", "view", "study_id", "spacing_source"]] = None
    frame[["bits", "pixel_spacing_mm"]] = np.nan
    write_unchecked(frame, tmp_path / "m")
    read = read_manifest(tmp_path / "m")
    assert (read[["laterality", "view", "study_id", "spacing_source"]] == "").all(axis=None)
    assert read["bits"].tolist() == [0] * len(read)
    assert read["pixel_spacing_mm"].isna().all()


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("pixel_spacing_mm", "wide", "pixel_spacing_mm 'wide'"),
        ("pixel_spacing_mm", np.inf, "pixel_spacing_mm"),
        ("bits", 1e30, "bits"),
        ("path", None, "row 2 has no path"),
        ("image_id", None, "row 2 has no image_id"),
        ("image_id", [1], "column 'image_id' holds lists"),
        ("manufacturer", [1], "column 'manufacturer' holds lists"),
    ],
)
def test_a_value_of_another_type_is_named(tmp_path, column, value, message):
    frame = frame_of(*GOOD, manufacturer=["", "", ""])
    values = [value] * 3 if isinstance(value, list) else [*frame[column][:1], value, *frame[column][2:]]
    frame[column] = pd.Series([[1]] * 3 if isinstance(value, list) else values, dtype=object)
    if isinstance(value, str):
        frame[column] = frame[column].astype(str)
    write_unchecked(frame, tmp_path / "m")
    with pytest.raises(BadInput, match=message):
        read_manifest(tmp_path / "m")


@pytest.mark.parametrize("column", MANIFEST_COLUMNS)
def test_missing_column_is_named(tmp_path, column):
    write_unchecked(frame_of(*GOOD).drop(columns=column), tmp_path / "m")
    with pytest.raises(BadInput, match=f"no column '{column}'"):
        read_manifest(tmp_path / "m")


def test_missing_split_names_those_there(tmp_path):
    write_manifest(frame_of(*GOOD), tmp_path / "m")
    with pytest.raises(BadInput, match=r"no rows of split 'test'.*it has: train, val"):
        read_manifest(tmp_path / "m", "test")


def test_missing_manifest_says_how_to_make_one(tmp_path):
    with pytest.raises(BadInput, match="mammostream prepare"):
        read_manifest(tmp_path / "m")


def test_findings_round_trip(tmp_path):
    frame = pd.DataFrame({"image_id": ["a"], "label": ["mass"], "xmin": [1], "ymin": [2.5], "xmax": [3], "ymax": [4]})
    write_findings(frame, tmp_path / "f")
    assert read_findings(tmp_path / "f").to_dict("records") == frame.astype({"xmin": float}).to_dict("records")
    write_findings(frame[:0], tmp_path / "none")
    assert read_findings(tmp_path / "none").empty
    for column, value in (("label", None), ("image_id", None), ("xmin", np.inf), ("ymax", "low")):
        write_unchecked(frame.assign(**{column: [value]}), tmp_path / "h")
        with pytest.raises(BadInput, match="findings .*h: "):
            read_findings(tmp_path / "h")
    write_unchecked(frame.drop(columns="image_id"), tmp_path / "g")
    with pytest.raises(BadInput, match="no column 'image_id'"):
        read_findings(tmp_path / "g")


patients = st.lists(st.text(alphabet="PQ123456789_ é", max_size=4).map("P".__add__), min_size=1, max_size=40)


@given(patients, st.floats(0, 1), st.integers(0, 1000))
def test_split_by_patient(ids, fraction, seed):
    found = split_by_patient(ids, fraction, seed)
    assert set(found) == set(ids)
    assert set(found.values()) <= {"train", "val"}
    # Neither order nor repeats matter.
    assert split_by_patient([*reversed(ids), *ids], fraction, seed) == found
    held_out = sum(split == "val" for split in found.values())
    if fraction == 0 or len(found) == 1:
        assert held_out == 0
    else:
        assert 1 <= held_out <= len(found) - 1
        assert abs(held_out - fraction * len(found)) <= 1


@given(patients, st.integers(0, 1000))
def test_spellings_of_one_id_are_dealt_together(ids, seed):
    spelled = {name for patient in ids for name in (patient, patient.lower(), patient.replace("1", "01"))}
    splits = split_by_patient(spelled, 0.5, seed)
    check_manifest(frame_of(*[(f"i{n}", name, splits[name]) for n, name in enumerate(sorted(spelled))]), "manifest")


def test_patients_of_two_splits_that_differ_in_spelling_are_refused():
    rows = [("a", "P1", "train"), ("b", "p01", "val"), ("c", "P2", "val")]
    with pytest.raises(BadInput, match=r"differ only in case or leading zeros: 'P1' and 'p01'; if they are the same, spell"):
        check_manifest(frame_of(*rows), "manifest")


def test_ids_are_read_in_one_spelling(tmp_path):
    rows = [("a", "10006.0", "train"), ("b", " 10006", "train"), ("c", "removed", "train")]
    write_unchecked(frame_of(*rows), tmp_path / "m.parquet")
    assert read_manifest(tmp_path / "m.parquet")["patient_id"].tolist() == ["10006", "10006", ""]
    write_unchecked(frame_of(*rows, ("d", "P4", "val")), tmp_path / "m.parquet")
    with pytest.raises(BadInput, match=r"image 'c' has no patient_id \(1 such images\)"):
        read_manifest(tmp_path / "m.parquet")


@given(patients, st.floats(0, 1), st.integers(0, 1000))
def test_a_split_frame_passes_the_check(ids, fraction, seed):
    splits = split_by_patient(ids, fraction, seed)
    check_manifest(frame_of(*[(f"i{n}", patient, splits[patient]) for n, patient in enumerate(ids)]), "manifest")


def test_seeds_differ():
    ids = [f"P{n}" for n in range(30)]
    assert len({tuple(split_by_patient(ids, 0.5, seed).values()) for seed in range(5)}) == 5
