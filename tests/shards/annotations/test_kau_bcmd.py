"""KAU-BCMD in the form that it is published in: a workbook of several sheets, JPEG films in folders, names with blanks."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from mammostream.common.errors import BadInput
from mammostream.shards.annotations.datasets import tell_dataset
from mammostream.shards.prepare.films import prepare_films

DENSITY = "Percentage of\n grandular tissue(density)"
# Folder, file, path in the sheet, assessment, density.
FILMS = [
    ("BIRAD1/b1", "2018_BC005401_CC_L.jpg", "/BIRAD1/b1/2018_BC005401_CC_L.dcm", "Birad 1", "0%-25%"),
    ("BIRAD1/b1", "2018_ BC005401 _MLO_R.jpg", "/BIRAD1/b1/2018_BC005401_MLO_R.dcm", "Birad 1", "26%-50%"),
    ("Birad4/b4", "2018_BC005421_CC_R.jpg", "/Birad4/b4/2018_BC005421_CC_R.dcm", "Birad 4", ">75%"),
    ("Birad5/Birad5", "2018_BC005421_CC_R.jpg", "/Birad5/2018_BC005421_CC_R.dcm", "BIRADS 5", ">75%"),
    ("Birad3/b3", "2019_BC0022482_CC_L.jpg", "\\Birad3\\2019_BC0022482_CC_L.dcm", "Birad 3", None),
    ("Birad4/b4", "2017_BC0022482_MLO_L.jpg", "/Birad4/2017_BC0022482_MLO_L.dcm", None, "dense"),
    ("Birad4/b4", "2018_BC0033333_MLO_L.jpg", "/Birad4/2018_BC0033333_MLO_L.dcm", "Birad 4", "51%-75%"),
    ("Birad4/b4", "2018_BC0044444_MLO_L.jpg", "/Birad4/2018_BC0044444_MLO_L.dcm", "Birad 4", "51%-75%"),
]


@pytest.fixture
def kau(tmp_path, breast):
    root = tmp_path / "kau"
    rows = []
    for number, (folder, name, path, assessment, density) in enumerate(FILMS):
        (root / folder).mkdir(parents=True, exist_ok=True)
        pixels = (breast(number, name[-5], lesion="4" in folder) // 16).astype(np.uint8)
        Image.fromarray(pixels).convert("RGB" if number % 2 else "L").save(root / folder / name, quality=95)
        rows.append((density, "BC", "55 Y", "L", "CC", assessment, path))
    rows += [
        (None, "BC0055555", "50 Y", "R", "CC", "Birad 1", None),
        (None, "BC1", "1", "R", "CC", "Birad 1", "/BIRAD1/scan7.dcm"),
    ]
    names = [DENSITY, "PatientID", "Patient age ", "Breast  type", "Breast view", "Assesment", "Image path"]
    with pd.ExcelWriter(root / "correctSheetlast.xlsx") as book:
        pd.DataFrame({"BI-RADS": [1, 3], "cases": [10, 20]}).to_excel(book, sheet_name="tabel ", index=False)
        pd.DataFrame(rows, columns=names).to_excel(book, sheet_name="correctSheet", index=False)
    return root


def prepare(root):
    return prepare_films("kau-bcmd", root, (root / "correctSheetlast.xlsx",), val_fraction=0)


def test_films_labels_and_patients(kau):
    assert tell_dataset((kau / "correctSheetlast.xlsx",))[0] == "kau-bcmd"
    made = prepare(kau)
    frame = made.manifest.set_index("image_id")
    assert frame.index.tolist() == [
        "2018_BC005401_CC_L",
        "2018_BC005401_MLO_R",
        "2018_BC005421_CC_R",
        "2019_BC0022482_CC_L",
        "2017_BC0022482_MLO_L",
        "2018_BC0033333_MLO_L",
        "2018_BC0044444_MLO_L",
    ]
    assert frame["patient_id"].nunique() == 5
    assert frame.loc["2019_BC0022482_CC_L", "patient_id"] == frame.loc["2017_BC0022482_MLO_L", "patient_id"]
    assert (frame["laterality"] + frame["view"]).tolist() == ["LCC", "RMLO", "RCC", "LCC", "LMLO", "LMLO", "LMLO"]
    labels = {name.removeprefix("label:"): frame[name].fillna(-1).tolist() for name in frame if name.startswith("label:")}
    assert labels["birads_1"] == [1, 1, 0, 0, -1, 0, 0]
    assert labels["birads_4"] == [0, 0, 0, 0, -1, 1, 1]
    assert labels["birads_5"] == [0, 0, 1, 0, -1, 0, 0]  # it is in the folders of 4 and 5
    assert labels["density_a"] == [1, 0, 0, -1, -1, 0, 0]
    assert labels["density_d"] == [0, 0, 1, -1, -1, 0, 0]
    assert frame.loc["2018_BC005421_CC_R", "path"].endswith("Birad5/Birad5/2018_BC005421_CC_R.jpg")
    assert set(frame["bits"]) == {8}
    kinds = sorted(p.kind for p in made.problems)
    assert kinds == ["no name", "no name", "twice", "twice", "unknown value"]
    assert any("Birad4/b4/2018_BC005421_CC_R.jpg is another file of the film" in p.message for p in made.problems)
    assert any(
        "sheet 'correctSheet' row 11: the image path '/BIRAD1/scan7.dcm' ends in no name" in p.message for p in made.problems
    )
    assert any("such as 'dense'" in p.message for p in made.problems)


def test_a_sheet_of_other_names_is_refused(kau):
    pd.DataFrame({"PatientID": ["a"], "Breast view": ["CC"], "Assesment": ["Birad 1"], "Image path": ["a.dcm"]}).to_excel(
        kau / "correctSheetlast.xlsx", index=False
    )
    with pytest.raises(BadInput, match="no cell of the column 'Image path' ends in a name like '2018_BC005421_CC_R'"):
        prepare(kau)


def test_the_pages_steps_lead_to_labels_of_tiles(kau, run_page):
    both = pd.concat(run_page("KAU-BCMD", kau.parent).values())
    assert set(both["birads_4"].dropna()) == {0, 1}
