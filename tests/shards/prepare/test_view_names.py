"""Side and view from file names, and patients from folders."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mammostream.common.errors import BadInput
from mammostream.shards.prepare.films import prepare_films
from mammostream.shards.prepare.view_names import named_view


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("P1_R_CC", ("R", "CC")),
        ("L-MLO", ("L", "MLO")),
        ("RIGHT_MLO", ("R", "MLO")),
        ("lcc", ("L", "CC")),
        ("rmlo", ("R", "MLO")),
        ("2018_BC005421_CC_R", ("R", "CC")),
        ("20586908_6c613a14b80a8591_MG_R_ML_ANON", ("R", "ML")),
        ("Mass-Training_P_00001_LEFT_CC_1", ("L", "CC")),
        ("Left CC 2", ("L", "CC")),
        ("L_XCCL", ("L", "XCCL")),
        ("R_CC_R_CC", ("R", "CC")),
        # Not unmistakable.
        ("R_CC_L_MLO", None),
        ("P1RCC", None),
        ("img_r", None),
        ("mlo", None),
        ("CC", None),
        ("MLCC", None),
        ("cell", None),
        ("soccer", None),
        ("1.2.840.10008", None),
        ("L_2_CC", None),
    ],
)
def test_what_a_name_tells(name, told):
    assert named_view(name) == told


def write(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((6, 5), 700, np.uint16)).save(path)


def test_names_fill_in_what_nothing_else_tells(tmp_path, write_dicom):
    root = tmp_path / "L_MLO"  # its own name tells nothing
    write(root, "P1/P1_R_CC.png", "P1/LEFT_MLO/1.png", "P1/2.png", "P2/l-cc.png")
    write_dicom(root / "P2/R_CC.dcm", np.eye(8, dtype=np.uint16), PatientID="P2", ImageLaterality="L", ViewPosition="MLO")
    write_dicom(root / "P2/R_ML.dcm", np.eye(8, dtype=np.uint16), PatientID="P2", ImageLaterality="R")
    write_dicom(root / "P2/x_L_ML.dcm", np.eye(8, dtype=np.uint16), PatientID="P2", ImageLaterality="R")
    (tmp_path / "a.csv").write_text("image_id,view\nl-cc,XCC\n")
    made = prepare_films("folder", root, (tmp_path / "a.csv",), patient_regex=r"P\d", val_fraction=0)
    told = {str(row.path).removeprefix(f"{root}/"): row.laterality + row.view for row in made.manifest.itertuples()}
    assert told == {
        "P1/P1_R_CC.png": "RCC",
        "P1/LEFT_MLO/1.png": "LMLO",
        "P1/2.png": "",
        "P2/l-cc.png": "XCC",  # contradicts the table: tells nothing
        "P2/R_CC.dcm": "LMLO",  # as its header says
        "P2/R_ML.dcm": "RML",
        "P2/x_L_ML.dcm": "R",
    }
    assert any(
        note.startswith("side and view of 3 films are told by the names of their files, such as ") for note in made.notes
    )


def test_patients_from_folders(tmp_path, write_dicom):
    write(tmp_path, "0012/a/L_CC.png", "0012/b/R_CC.png", "0013/L_CC2.png")
    write_dicom(tmp_path / "0014/1/x.dcm", np.eye(8, dtype=np.uint16), PatientID="somebody else")
    made = prepare_films("folder", tmp_path, patient_from="folder", val_fraction=0)
    assert made.manifest["patient_id"].tolist() == ["0012", "0012", "0013", "0014"]
    write(tmp_path, "loose.png")
    with pytest.raises(BadInput, match=r"--patient-from folder: .*loose.png lies in no folder below .*; move it, or give"):
        prepare_films("folder", tmp_path, patient_from="folder")
    with pytest.raises(BadInput, match="--patient-regex and --patient-from both say where the patient stands"):
        prepare_films("folder", tmp_path, patient_from="folder", patient_regex="x")
    with pytest.raises(BadInput, match="--patient-from is for plain folders; mias names its patients itself"):
        prepare_films("mias", tmp_path, (tmp_path / "Info.txt",), patient_from="folder")
