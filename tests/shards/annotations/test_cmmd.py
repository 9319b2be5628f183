"""CMMD in the form that it is published in: a workbook of labelled breasts, and sides that only the headers tell."""

from __future__ import annotations

import pandas as pd
import pytest

from mammostream.common.errors import BadInput
from mammostream.shards.annotations.datasets import tell_dataset
from mammostream.shards.prepare.films import prepare_films

SHEET = [
    ("D1-0001", "R", 44, 2, "calcification", "Benign", None),
    ("D1-0002", "L", 40, 2, "mass", "Benign", None),
    ("D1-0003", "L", 39, 4, "both", "Malignant", None),
    ("D1-0003", "R", 39, 4, "mass", "Benign", None),
    ("D2-0001", "L", 41, 4, "mass", "Malignant", "Luminal A"),
    ("D2-0002", "R", 50, 4, "calcification", "Malignant", "triple negative"),
    ("D2-0003", "R", 50, 4, "mass", "Malignant", "HER2-enriched"),
]
SIDES = {"D1-0001": "R", "D1-0002": "L", "D1-0003": "LR", "D2-0001": "LR", "D2-0002": "LR", "D2-0003": "R", "D2-0009": "L"}


@pytest.fixture
def cmmd(tmp_path, write_dicom, breast):
    root = tmp_path / "cmmd"
    for seed, (patient, sides) in enumerate(SIDES.items()):
        folder = root / f"CMMD/{patient}/07-18-2010-NA-NA-79377/1.000000-NA-70244"
        for number, (side, view) in enumerate(((side, view) for side in sides for view in ("CC", "MLO")), start=1):
            elements = {"PatientID": patient, "ImageLaterality": side, "ViewPosition": view, "StudyInstanceUID": "1.2.3"}
            # A breast's lesion is bright in both views.
            write_dicom(folder / f"1-{number}.dcm", breast(10 * seed + number, side, True), **elements)
    names = ["ID1", "LeftRight", "Age", "number", "abnormality", "classification", "subtype"]
    pd.DataFrame(SHEET, columns=names).to_excel(root / "CMMD_clinicaldata_revision.xlsx", index=False)
    return root


def prepare(root, name="CMMD_clinicaldata_revision.xlsx"):
    return prepare_films("cmmd", root / "CMMD", (root / name,), val_fraction=0)


def of_breasts(frame, label):
    return frame.groupby(["patient_id", "laterality"])[f"label:{label}"].agg(lambda cells: sorted(set(cells.fillna(-1))))


def test_labels_are_of_the_breast(cmmd):
    assert tell_dataset((cmmd / "CMMD_clinicaldata_revision.xlsx",))[0] == "cmmd"
    made = prepare(cmmd)
    frame = made.manifest
    assert len(frame) == 2 * sum(map(len, SIDES.values()))
    assert frame["image_id"].is_unique
    assert set(frame["view"]) == {"CC", "MLO"}
    assert of_breasts(frame, "malignant").to_dict() == {
        ("D1-0001", "R"): [0],
        ("D1-0002", "L"): [0],
        ("D1-0003", "L"): [1],
        ("D1-0003", "R"): [0],
        ("D2-0001", "L"): [1],
        ("D2-0001", "R"): [-1],  # no row: not known
        ("D2-0002", "L"): [-1],
        ("D2-0002", "R"): [1],
        ("D2-0003", "R"): [1],
        ("D2-0009", "L"): [-1],
    }
    assert of_breasts(frame, "mass").to_list() == [[0], [1], [1], [1], [1], [-1], [-1], [0], [1], [-1]]
    assert of_breasts(frame, "calcification").to_list() == [[1], [0], [1], [0], [0], [-1], [-1], [1], [0], [-1]]
    assert of_breasts(frame, "subtype_luminal_a").to_list() == [[-1], [-1], [-1], [-1], [1], [-1], [-1], [0], [0], [-1]]
    assert made.problems == []


def test_as_csv_and_without_folders_of_patients(cmmd, write_dicom):
    before = prepare(cmmd).manifest
    pd.read_excel(cmmd / "CMMD_clinicaldata_revision.xlsx").to_csv(cmmd / "clinical.csv", index=False)
    assert tell_dataset((cmmd / "clinical.csv",))[0] == "cmmd"
    assert prepare(cmmd, "clinical.csv").manifest.equals(before)
    for number, folder in enumerate(sorted((cmmd / "CMMD").iterdir())):
        folder.rename(folder.with_name(f"1.3.6.1.4.1.{number}"))
    after = prepare(cmmd).manifest  # the patient stands in the header
    assert of_breasts(after, "malignant").equals(of_breasts(before, "malignant"))


def test_missing_patients_and_unknown_words_are_listed(cmmd):
    frame = pd.read_excel(cmmd / "CMMD_clinicaldata_revision.xlsx")
    frame.loc[0, "ID1"], frame.loc[1, "abnormality"] = "D1-0777", "cyst"
    frame.to_excel(cmmd / "CMMD_clinicaldata_revision.xlsx", index=False)
    made = prepare(cmmd)
    assert [p.kind for p in made.problems] == ["missing", "unknown value"]
    assert "sheet 'Sheet1' row 2: no film of patient 'D1-0777'" in made.problems[0].message
    assert "such as 'cyst'" in made.problems[1].message
    assert of_breasts(made.manifest, "mass")["D1-0002", "L"] == [-1]
    assert of_breasts(made.manifest, "malignant")["D1-0002", "L"] == [0]


def test_faults_name_the_row(cmmd):
    frame = pd.read_excel(cmmd / "CMMD_clinicaldata_revision.xlsx")
    frame.loc[2, "LeftRight"] = "left"
    frame.to_excel(cmmd / "CMMD_clinicaldata_revision.xlsx", index=False)
    with pytest.raises(BadInput, match=r"revision.xlsx sheet 'Sheet1' row 4, column 'LeftRight': 'left' is none of L, R"):
        prepare(cmmd)


def test_the_pages_steps_lead_to_labels_of_tiles(cmmd, run_page):
    both = pd.concat(run_page("CMMD", cmmd.parent).values())
    assert set(both["malignant"].dropna()) == {0, 1}
    assert both["malignant"].isna().any()
