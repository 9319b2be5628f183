"""The adapter of a plain folder: ids, CSVs as spreadsheets write them, patients, boxes."""

from __future__ import annotations

import os

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from mammostream.common.errors import BadInput
from mammostream.shards.annotations.folder import find_images
from mammostream.shards.prepare.films import prepare_films


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "images"
    for name in ("P1/P1_left", "P1/P1_right", "P2/P2_left"):
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((6, 5), 700, np.uint16)).save(path)
    return folder


def folder_films(root, csv_paths=(), regex=r"P\d", **options):
    """Return what prepare makes of a folder; no patient goes to validation."""
    return prepare_films("folder", root, csv_paths, patient_regex=regex, val_fraction=0, **options)


@pytest.fixture
def describe(root, tmp_path):
    """Return a function that reads the folder with a CSV of the given content."""

    def run(content, regex=r"P\d"):
        path = tmp_path / "c.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        made = folder_films(root, (path,), regex)
        assert made.problems == []
        return made.manifest.set_index("image_id")

    return run


def test_without_a_csv(root):
    made = folder_films(root, regex=r"P(\d)")
    assert made.problems == []
    assert made.notes == []
    assert made.findings is None
    frame = made.manifest
    assert frame["image_id"].tolist() == ["P1_left", "P1_right", "P2_left"]
    assert frame["patient_id"].tolist() == ["1", "1", "2"]  # the group
    assert frame["bits"].tolist() == [16] * 3
    assert frame["pixel_spacing_mm"].isna().all()
    assert (frame["split"] == "train").all()


def test_real_films(films):
    made = folder_films(films[0].path.parent.parent, regex=r"P_\d+")
    assert made.problems == []
    frame = made.manifest
    assert len(frame) == 8
    assert frame["patient_id"].value_counts().to_dict() == {"P_00173": 4, "P_00820": 4}
    found = {os.path.realpath(row.path): row.laterality + row.view for row in frame.itertuples()}
    assert found == {os.path.realpath(film.path): film.view.upper() for film in films}


def test_csv_as_spreadsheets_write_it(describe):
    text = "image_id,patient_id,laterality,split,pixel_spacing_mm,mass\r\nP1_left,007,L,val,0.07,1\r\nP2_left,,R,train,,0\r\n"
    text += "P1_right,007,right ,val,,NA\r\n\r\n"
    frame = describe(b"\xef\xbb\xbf" + text.encode(), regex=".+")
    first, second, third = (frame.loc[name] for name in ("P1_left", "P2_left", "P1_right"))
    assert (first.patient_id, first.laterality, first.split, first["label:mass"]) == ("007", "L", "val", 1)
    assert (first.pixel_spacing_mm, first.spacing_source) == (0.07, "csv")
    assert (second.laterality, second["label:mass"], second.spacing_source) == ("R", 0, "")
    assert second.patient_id == "P2/P2_left.png"  # empty cell: the path, which the regex takes whole
    assert third.laterality == "R"
    assert pd.isna(third["label:mass"])


def test_several_csvs_describe_together(root, tmp_path):
    (tmp_path / "a.csv").write_text("image_id,mass\nP1_left,1\n")
    (tmp_path / "b.csv").write_text("image_id,mass,calc\nP1/P1_left,,0\nP2_left,0,1\n")
    frame = folder_films(root, (tmp_path / "a.csv", tmp_path / "b.csv")).manifest.set_index("image_id")
    assert frame.loc["P1_left", ["label:mass", "label:calc"]].tolist() == [1, 0]
    assert frame.loc["P2_left", ["label:mass", "label:calc"]].tolist() == [0, 1]
    assert frame.loc["P1_right", ["label:mass", "label:calc"]].isna().all()


def test_csvs_that_contradict_each_other_are_refused(root, tmp_path):
    (tmp_path / "a.csv").write_text("image_id,mass\nP1_left,1\n")
    (tmp_path / "b.csv").write_text("image_id,mass\nP2_left,1\nP1_left,0\n")
    with pytest.raises(BadInput, match=r"b.csv line 3, column 'mass': '0' of image 'P1_left' contradicts '1'"):
        folder_films(root, (tmp_path / "a.csv", tmp_path / "b.csv"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("imageid,mass\nP1_left,1\n", r"no column 'image_id' \(did you mean 'imageid'\?\)"),
        ("image_id,mass\nP1_lefft,1\nP1_lefft,0\n", r"line 2: no image 'P1_lefft' \(did you mean 'P1_left'\?\)"),
        ("image_id,mass\nP1_left,1\nP1_right,2\n", "line 3, column 'mass': '2' is not 0, 1 or empty"),
        ("image_id,pixel_spacing_mm\nP1_left,0.07\nP1_right,thin\n", "line 3, column 'pixel_spacing_mm': 'thin' is no size"),
        ("image_id,pixel_spacing_mm\nP1_left,-0.07\n", "line 2, column 'pixel_spacing_mm': '-0.07' is no size"),
        ("image_id,pixel_spacing_mm\nP1_left,0\n", "line 2, column 'pixel_spacing_mm': '0' is no size"),
        ("image_id\n", "has no rows"),
        ("image_id,mass\nP1_left,1\nP2_left,0\nP1_left,1\n", "line 4: the image_id 'P1_left' stands in .*line 2 already"),
        ("image_id,mass\nP1_left,1\n,0\n", "line 3, column 'image_id': '' is empty"),
        ("image_id,mass\n../images/P1/P1_left,1\n", r"line 2: the path '\.\./images/P1/P1_left' leads outside --images-root"),
        ("image_id,mass\nP1_left,1\nP1/../../P2_left,1\n", r"line 3: the path 'P1/\.\./\.\./P2_left' leads outside"),
        ("image_id,mass\n/etc/passwd,1\n", "line 2: the path '/etc/passwd' leads outside"),
        ("image_id,split\nP1_left,train\nP1_right,val\nP2_left,val\n", "patient 'P1' is in the splits train and val"),
        ("image_id,split\nP1_left,train\nP1_right,extra\nP2_left,val\n", "image 'P1_right' has the split 'extra'"),
    ],
)
def test_bad_csv_names_the_line(describe, tmp_path, content, message):
    with pytest.raises(BadInput, match=message) as caught:
        describe(content)
    assert str(tmp_path / "c.csv") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_path_that_stays_inside_is_taken(describe):
    frame = describe("image_id,mass\nP2/../P1/P1_left,1\n")
    assert frame["label:mass"].dropna().to_dict() == {"P1_left": 1}


def test_rows_without_a_file_are_listed(root, tmp_path):
    (tmp_path / "c.csv").write_text("image_id,mass\nP1_left,1\nP9_left,1\n")
    made = folder_films(root, (tmp_path / "c.csv",))
    assert len(made.manifest) == 3
    ((kind, message),) = [(p.kind, p.message) for p in made.problems]
    assert kind == "missing"
    assert message == f"CSV {tmp_path}/c.csv line 3: no image 'P9_left' below {root}"


def test_a_link_out_of_the_folder_is_refused_where_a_csv_names_it(root, tmp_path):
    outside = tmp_path / "elsewhere" / "film.png"
    outside.parent.mkdir()
    (root / "P2" / "P2_left.png").rename(outside)
    (root / "P2" / "P2_left.png").symlink_to(outside)
    (root / "P2" / "P2_right.png").symlink_to(root / "P1" / "P1_right.png")
    (tmp_path / "c.csv").write_text("image_id,mass\nP2_right,1\n\nP2_left,1\n")
    with pytest.raises(BadInput, match=r"c.csv line 4: .*P2_left.png is a link to .*film.png, outside --images-root"):
        folder_films(root, (tmp_path / "c.csv",))
    # A user's own links are as good as files where no CSV leads there.
    assert len(folder_films(root).manifest) == 4


@pytest.mark.parametrize(
    ("regex", "message"),
    [
        (r"X\d", r"'X\\\\d' does not match 'P1/P1_left.png'"),
        ("(", "is not a regular expression"),
        (None, "P1/P1_left.png names no patient; give --patient-regex"),
    ],
)
def test_unknown_patients_are_refused(root, regex, message):
    with pytest.raises(BadInput, match=message):
        folder_films(root, regex=regex)


def test_unreadable_file_is_listed_and_stays(root):
    (root / "P2" / "broken.png").write_bytes(b"no image")
    made = folder_films(root)
    assert len(made.manifest) == 4
    assert made.manifest.set_index("image_id").loc["broken", "bits"] == 0
    ((kind, message),) = [(p.kind, p.message) for p in made.problems]
    assert kind == "unreadable"
    assert "broken.png" in message


def test_nothing_readable_is_refused(root):
    for path in root.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(BadInput, match="none of the 3 images can be read; the first: image .*P1_left.png"):
        folder_films(root)


def test_ids_are_paths_where_names_repeat(root):
    (root / "P2" / "P1_left.png").write_bytes((root / "P1" / "P1_left.png").read_bytes())
    (root / "P2" / "notes.txt").write_text("not an image")
    assert list(find_images(root)) == ["P1/P1_left", "P1/P1_right", "P2/P1_left", "P2/P2_left"]


def test_a_name_that_fits_two_files_is_refused(root, tmp_path):
    (root / "P2" / "P1_left.png").write_bytes((root / "P1" / "P1_left.png").read_bytes())
    (tmp_path / "c.csv").write_text("image_id,mass\nP1/P1_left,1\nP1_left,1\n")
    with pytest.raises(BadInput, match=r"line 3: 'P1_left' fits 2 files below"):
        folder_films(root, (tmp_path / "c.csv",))


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
    mark = bytes(128) + b"DICM"
    for name in ("IM0001", "1.2.840.10008.7", "DICOMDIR", "archive.db"):
        (root / "P1" / name).write_bytes(mark)
    (root / ".trash").mkdir()
    for name in ("P1/._P1_left.png", "P1/notes", ".trash/old.png"):
        (root / name).write_bytes(b"x")
    assert sorted(find_images(root)) == ["1.2.840.10008.7", "IM0001", "P1_left", "P1_right", "P2_left"]


def test_an_unreadable_file_stays_where_its_patient_is_known_and_is_only_listed_where_not(root, tmp_path):
    (root / "P1" / "P1_bad.png").write_bytes(b"x")
    made = folder_films(root)
    assert len(made.manifest) == 4
    assert "P1_bad.png cannot be read" in made.problems[0].message
    known = tmp_path / "known.csv"
    known.write_text("image_id,patient_id\nP1_left,P1\nP1_right,P1\nP2_left,P2\n")
    made = folder_films(root, (known,), regex=None)
    assert sorted(made.manifest["image_id"]) == ["P1_left", "P1_right", "P2_left"]
    assert len(made.problems) == 1


def test_boxes_of_a_csv_are_clipped_and_the_empty_ones_listed(root, tmp_path):
    (tmp_path / "boxes.csv").write_text(
        "image_id,label,xmin,ymin,xmax,ymax\nP1_left,mass,1,2,3,4\nP1_left,mass,-2,3.5,9,9\nP2_left,calc,5,0,9,9\nP9,mass,1,1,2,2\n"
    )
    made = folder_films(root, findings_csv=tmp_path / "boxes.csv")
    assert made.findings.drop(columns="label").to_numpy().tolist() == [["P1_left", 1, 2, 3, 4], ["P1_left", 0, 3.5, 5, 6]]
    assert made.notes == ["1 boxes reach out of their film and are clipped to it"]
    assert [p.kind for p in made.problems] == ["missing", "no box"]
    assert "'calc' in image 'P2_left' is empty or outside it: 5, 0, 9, 9" in made.problems[1].message
    (tmp_path / "boxes.csv").write_text("image_id,label,xmin,ymin,xmax,ymax\nP1_left,mass,1,2,3,four\n")
    with pytest.raises(BadInput, match=r"boxes.csv line 2, column 'ymax': 'four' is not a number"):
        folder_films(root, findings_csv=tmp_path / "boxes.csv")


def test_no_validation_patients_where_the_csv_has_some(root, tmp_path):
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(root / "P3_left.png")
    (tmp_path / "c.csv").write_text("image_id,split\nP1_left,train\nP1_right,train\nP2_left,val\nP3_left,train\n")
    made = prepare_films("folder", root, (tmp_path / "c.csv",), patient_regex=r"P\d", val_fraction=0.9)
    assert made.manifest["split"].tolist() == ["train", "train", "val", "train"]


def test_validation_patients_are_taken_from_training_alone(root, tmp_path):
    for name in ("P3_left", "P4_left", "P4_right"):
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(root / f"{name}.png")
    (tmp_path / "c.csv").write_text(
        "image_id,split\nP1_left,train\nP1_right,train\nP2_left,test\nP3_left,train\nP4_left,train\nP4_right,train\n"
    )
    made = prepare_films("folder", root, (tmp_path / "c.csv",), patient_regex=r"P\d", val_fraction=0.34, seed=3)
    splits = made.manifest.groupby("patient_id")["split"].unique().map(list).to_dict()
    assert splits["P2"] == ["test"]
    assert sorted(splits[p][0] for p in ("P1", "P3", "P4")) == ["train", "train", "val"]
    assert all(len(found) == 1 for found in splits.values())
