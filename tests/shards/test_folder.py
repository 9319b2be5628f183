"""The adapter of a plain folder: ids, CSVs as spreadsheets write them, patients."""

from __future__ import annotations

import os

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from common.errors import BadInput
from shards.annotations.folder import find_images, folder_rows


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "images"
    for name in ("P1/P1_left", "P1/P1_right", "P2/P2_left"):
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((6, 5), 700, np.uint16)).save(path)
    return folder


@pytest.fixture
def describe(root, tmp_path):
    """Return a function that reads the folder with a CSV of the given content."""

    def run(content, regex=r"P\d"):
        path = tmp_path / "c.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        frame, unreadable = folder_rows(root, (path,), regex)
        assert unreadable == []
        return frame.set_index("image_id")

    return run


def test_without_a_csv(root):
    frame, unreadable = folder_rows(root, (), r"P(\d)")
    assert unreadable == []
    assert frame["image_id"].tolist() == ["P1_left", "P1_right", "P2_left"]
    assert frame["patient_id"].tolist() == ["1", "1", "2"]  # the group
    assert frame["bits"].tolist() == [16] * 3
    assert frame["pixel_spacing_mm"].isna().all()
    assert (frame["split"] == "").all()


def test_real_films(films):
    frame, unreadable = folder_rows(films[0].path.parent.parent, (), r"P_\d+")
    assert unreadable == []
    assert len(frame) == 8
    assert frame["patient_id"].value_counts().to_dict() == {"P_00173": 4, "P_00820": 4}
    found = {os.path.realpath(row.path): row.laterality + row.view for row in frame.itertuples()}
    assert found == {os.path.realpath(film.path): film.view.upper() for film in films}


def test_csv_as_spreadsheets_write_it(describe):
    text = "image_id,patient_id,laterality,split,pixel_spacing_mm,mass\r\nP1_left,007,L,val,0.07,1\r\nP2_left,,R,train,,0\r\n"
    frame = describe(b"\xef\xbb\xbf" + text.encode(), regex=".+")
    first, second, third = (frame.loc[name] for name in ("P1_left", "P2_left", "P1_right"))
    assert (first.patient_id, first.laterality, first.split, first["label:mass"]) == ("007", "L", "val", 1)
    assert (first.pixel_spacing_mm, first.spacing_source) == (0.07, "csv")
    assert (second.laterality, second["label:mass"], second.spacing_source) == ("R", 0, "")
    assert second.patient_id == "P2/P2_left.png"  # empty cell: the path, which the regex takes whole
    assert pd.isna(third["label:mass"])


def test_several_csvs_describe_together(root, tmp_path):
    (tmp_path / "a.csv").write_text("image_id,mass\nP1_left,1\n")
    (tmp_path / "b.csv").write_text("image_id,calc\nP1_left,0\nP2_left,1\n")
    frame, _ = folder_rows(root, (tmp_path / "a.csv", tmp_path / "b.csv"), r"P\d")
    frame = frame.set_index("image_id")
    assert frame.loc["P1_left", ["label:mass", "label:calc"]].tolist() == [1, 0]
    assert pd.isna(frame.loc["P2_left", "label:mass"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("imageid,mass\nP1_left,1\n", r"no column 'image_id' \(did you mean 'imageid'\?\)"),
        ("image_id,mass\nP1_left,1\nP1_lefft,0\n", r"line 3: no image 'P1_lefft' \(did you mean 'P1_left'\?\)"),
        ("image_id,mass\nP1_left,1\nP1_right,2\n", "line 3, column 'mass': '2' is not 0, 1 or empty"),
        ("image_id,note\nP1_left,\nP1_right,looks fine\n", "line 3, column 'note': 'looks fine' is not 0, 1 or empty"),
        ("image_id,pixel_spacing_mm\nP1_left,0.07\nP1_right,thin\n", "line 3, column 'pixel_spacing_mm': 'thin' is no size"),
        ("image_id,pixel_spacing_mm\nP1_left,-0.07\n", "line 2, column 'pixel_spacing_mm': '-0.07' is no size"),
        ("image_id,pixel_spacing_mm\nP1_left,0\n", "line 2, column 'pixel_spacing_mm': '0' is no size"),
        ("image_id\n", "has no rows"),
    ],
)
def test_bad_csv_names_the_line(describe, tmp_path, content, message):
    with pytest.raises(BadInput, match=message) as caught:
        describe(content)
    assert str(tmp_path / "c.csv") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("regex", "message"),
    [
        (r"X\d", r"'X\\\\d' does not match 'P1/P1_left.png'"),
        ("(", "is no regular expression"),
        (None, "P1/P1_left.png names no patient; give --patient-regex"),
    ],
)
def test_unknown_patients_are_refused(root, regex, message):
    with pytest.raises(BadInput, match=message):
        folder_rows(root, (), regex)


def test_unreadable_file_is_listed_and_stays(root):
    (root / "P2" / "broken.png").write_bytes(b"no image")
    frame, unreadable = folder_rows(root, (), r"P\d")
    assert len(frame) == 4
    assert frame.set_index("image_id").loc["broken", "bits"] == 0
    assert len(unreadable) == 1
    assert "broken.png" in unreadable[0]


def test_ids_are_paths_where_names_repeat(root):
    (root / "P2" / "P1_left.png").write_bytes((root / "P1" / "P1_left.png").read_bytes())
    (root / "P2" / "notes.txt").write_text("not an image")
    assert list(find_images(root)) == ["P1/P1_left", "P1/P1_right", "P2/P1_left", "P2/P2_left"]


def test_namesakes_with_other_endings_are_refused(root):
    (root / "P1" / "P1_left.tif").write_bytes(b"")
    with pytest.raises(BadInput, match=r"P1_left\.(png|tif) has a namesake"):
        find_images(root)


def test_missing_and_empty_folder(tmp_path):
    with pytest.raises(BadInput, match="does not exist"):
        find_images(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(BadInput, match="holds no images"):
        find_images(tmp_path)


def test_file_name_that_is_no_text_is_refused(root):
    with open(os.path.join(os.fsencode(root), b"film\xff.png"), "wb"):  # noqa: PTH118, PTH123
        pass
    with pytest.raises(BadInput, match=r"film\\udcff\.png' is not UTF-8"):
        find_images(root)


def test_dicom_without_an_ending_is_found_and_hidden_files_are_not(root):
    (root / "P1" / "IM0001").write_bytes(bytes(128) + b"DICM")
    (root / "P1" / "._P1_left.png").write_bytes(b"x")
    (root / "P1" / "notes").write_bytes(b"x")
    assert sorted(find_images(root)) == ["IM0001", "P1_left", "P1_right", "P2_left"]


def test_an_unreadable_file_stays_where_its_patient_is_known_and_is_only_listed_where_not(root, tmp_path):
    (root / "P1" / "P1_bad.png").write_bytes(b"x")
    frame, unreadable = folder_rows(root, (), r"P\d")
    assert len(frame) == 4
    assert "P1_bad.png cannot be read" in unreadable[0]
    known = tmp_path / "known.csv"
    known.write_text("image_id,patient_id\nP1_left,P1\nP1_right,P1\nP2_left,P2\n")
    frame, unreadable = folder_rows(root, (known,), None)
    assert sorted(frame["image_id"]) == ["P1_left", "P1_right", "P2_left"]
    assert len(unreadable) == 1
