"""RSNA's training CSV in the form that it is published in, with invented rows: empty cells, True and False, many views."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mammostream.common.errors import BadInput
from mammostream.shards.annotations.datasets import tell_dataset
from mammostream.shards.prepare.films import prepare_films

TRAIN = """\
site_id,patient_id,image_id,laterality,view,age,cancer,biopsy,invasive,BIRADS,implant,density,machine_id,difficult_negative_case
2,90006,700000001,L,CC,61.0,0,0,0,,0,,29,False
2,90006,1700000002,L,MLO,61.0,0,0,0,,0,,29,False
1,90042,700000003,R,AT,,1,1,1,0.0,0,B,49,False
1,90042,1700000004,R,LMO,,1,1,0,0.0,0,B,49,False
1,90050,700000005,L,ML,55.0,0,1,0,2.0,1,A,49,True
"""


@pytest.fixture
def rsna(tmp_path, write_dicom):
    for line in TRAIN.splitlines()[1:]:
        _, patient, image = line.split(",")[:3]
        write_dicom(tmp_path / f"train_images/{patient}/{image}.dcm", np.eye(8, dtype=np.uint16), PixelSpacing=[0.1, 0.1])
    (tmp_path / "train.csv").write_text(TRAIN)
    return tmp_path


def prepare(root, **options):
    return prepare_films("rsna", root / "train_images", (root / "train.csv",), **options)


def test_films_labels_and_splits(rsna):
    made = prepare(rsna, val_fraction=0.34)
    assert (made.problems, made.findings) == ([], None)
    frame = made.manifest.set_index("image_id")
    assert frame.index.tolist() == ["700000001", "1700000002", "700000003", "1700000004", "700000005"]
    assert frame["view"].tolist() == ["CC", "MLO", "AT", "LMO", "ML"]
    assert frame["laterality"].tolist() == ["L", "L", "R", "R", "L"]
    assert frame["patient_id"].tolist() == ["90006", "90006", "90042", "90042", "90050"]
    assert frame.groupby("patient_id")["split"].nunique().eq(1).all()
    assert sorted(frame.groupby("patient_id")["split"].first()) == ["train", "train", "val"]
    labels = {name.removeprefix("label:"): frame[name].fillna(-1).tolist() for name in frame if name.startswith("label:")}
    assert labels == {
        "cancer": [0, 0, 1, 1, 0],
        "biopsy": [0, 0, 1, 1, 1],
        "invasive": [0, 0, 1, 0, 0],
        "implant": [0, 0, 0, 0, 1],
        "difficult_negative": [0, 0, 0, 0, 1],
        "birads_0": [-1, -1, 1, 1, 0],
        "birads_1": [-1, -1, 0, 0, 0],
        "birads_2": [-1, -1, 0, 0, 1],
        "density_a": [-1, -1, 0, 0, 1],
        "density_b": [-1, -1, 1, 1, 0],
        "density_c": [-1, -1, 0, 0, 0],
        "density_d": [-1, -1, 0, 0, 0],
    }


def test_png_conversions_are_found(rsna):
    for path in rsna.rglob("*.dcm"):
        path.unlink()
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(rsna / "train_images" / f"{path.parent.name}_{path.stem}.png")
    made = prepare(rsna)
    assert made.problems == []
    assert made.manifest["path"].str.endswith(".png").tolist() == [True] * 5


def test_missing_films_are_listed(rsna):
    (rsna / "train_images/90042/700000003.dcm").unlink()
    made = prepare(rsna)
    assert [(p.kind, p.message) for p in made.problems] == [
        ("missing", f"CSV {rsna}/train.csv line 4: no file for the image '700000003' below {rsna}/train_images")
    ]
    assert len(made.manifest) == 4


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("1,90050,700000005,L", "1,90050,700000005,B", "line 6, column 'laterality': 'B' is none of L, R"),
        ("ML,55.0,0,1", "ML,55.0,perhaps,1", "line 6, column 'cancer': 'perhaps' is not 0, 1 or empty"),
        ("2.0,1,A", "2.5,1,A", "line 6, column 'BIRADS': '2.5' is none of"),
        ("90050,700000005", "90050,700000003", "line 6: the image_id '700000003' stands in .*line 4 already"),
        ("90050,700000005", "../90050,700000005", r"line 6: the path '\.\./90050/700000005' leads outside --images-root"),
        ("cancer", "cancr", r"no column 'cancer' \(did you mean 'cancr'\?\)"),
        ("2.0,1,A", "2.0,1,E", "line 6, column 'density': 'E' is none of A, B, C, D"),
    ],
)
def test_faults_name_the_line(rsna, old, new, message):
    assert TRAIN.count(old) == 1
    (rsna / "train.csv").write_text(TRAIN.replace(old, new))
    with pytest.raises(BadInput, match=message):
        prepare(rsna)


def test_a_patient_cannot_be_told_by_a_regex(rsna):
    with pytest.raises(BadInput, match="--patient-regex is for plain folders"):
        prepare(rsna, patient_regex="x")


TEST = """\
Site_ID,patient_id,image_id,laterality,view,age,implant,machine_id,prediction_id
2,10008,736471439,L,MLO,81,0,21,10008_L
2,10008,1591370361,R,CC,81,1,21,10008_R
"""


def test_the_films_of_test_csv_are_the_test_split_without_labels(rsna, write_dicom):
    for line in TEST.splitlines()[1:]:
        _, patient, image = line.split(",")[:3]
        write_dicom(rsna / f"test_images/{patient}/{image}.dcm", np.eye(8, dtype=np.uint16), PixelSpacing=[0.1, 0.1])
    (rsna / "test.csv").write_text(TEST)
    assert tell_dataset((rsna / "test.csv",))[0] == "rsna"
    made = prepare_films("rsna", rsna / "test_images", (rsna / "test.csv",))
    assert (made.problems, made.findings) == ([], None)
    assert made.manifest["split"].tolist() == ["test", "test"]
    assert made.manifest["laterality"].tolist() == ["L", "R"]
    assert not any(name.startswith("label:") for name in made.manifest)
    # With the training films, whose labels stay as they are.
    both = prepare_films("rsna", rsna, (rsna / "train.csv", rsna / "test.csv"), val_fraction=0)
    frame = both.manifest
    assert frame["split"].tolist() == ["train"] * 5 + ["test"] * 2
    assert frame["label:cancer"].fillna(-1).tolist() == [0, 0, 1, 1, 0, -1, -1]
    assert frame["label:implant"].fillna(-1).tolist() == [0, 0, 0, 0, 1, -1, -1]


def test_header_names_count_in_any_case(rsna):
    head, rest = TRAIN.split("\n", 1)
    before = prepare(rsna).manifest
    (rsna / "train.csv").write_text(head.upper().replace("_", " ") + "\n" + rest)
    assert tell_dataset((rsna / "train.csv",))[0] == "rsna"
    assert prepare(rsna).manifest.equals(before)
