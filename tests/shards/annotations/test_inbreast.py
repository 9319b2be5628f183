"""INbreast in the form that it is published in: a CSV of semicolons, patients in file names, contours of OsiriX."""

from __future__ import annotations

import plistlib
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from mammostream.common.errors import BadInput
from mammostream.shards.annotations.datasets import tell_dataset
from mammostream.shards.prepare.films import prepare_films

HEADER = "Patient ID;Patient age;Laterality;View;Acquisition date;File Name;ACR;Bi-Rads"
# File, patient, side, view, density, BI-RADS.
FILMS = [
    ("22678622", "61b13c59bcba149d", "L", "CC", "2", "4a"),
    ("22678646", "61b13c59bcba149d", "L", "MLO", "2", "6"),
    ("20586908", "6c613a14b80a8591", "R", "CC", "3", "1"),
    ("20586934", "6c613a14b80a8591", "L", "CC", "     ", "2"),
    ("20586960", "6c613a14b80a8591", "R", "MLO", "1", "3"),
    ("22580192", "a4d5e5b4a9d4c4c2", "L", "CC", "4", "5"),
    ("22580244", "b4d5e5b4a9d4c4c2", "L", "MLO", "4", "1"),
    ("22580245", "c4d5e5b4a9d4c4c2", "R", "MLO", "4", "1"),
]
HEIGHT, WIDTH, RADIUS, X, Y = 400, 300, 12, 70, 200  # of the films, and the lesion in those of left breasts
MASS = [(X - RADIUS + 0.5, Y), (X, Y - RADIUS), (X + RADIUS - 0.5, Y + 0.25), (X, Y + RADIUS)]
REGIONS = {
    "22678622": [("Mass", MASS), ("Calcification", [(100.7, 200.2)]), ("Unnamed", [(1.0, 1.0)])],
    "22678646": [
        ("Espiculated Region", MASS),
        ("Assymetry", [(10.0, 12.0), (14.0, 20.0)]),
        ("Cluster", [(50.0, 60.0), (58, 71.9)]),
    ],
    "20586934": [("Calcifications", [(30.0, 40.0)]), ("Distortion", [])],
    "22580192": [("mass", [(WIDTH - 3.0, HEIGHT - 3.0), (WIDTH + 9.0, HEIGHT + 9.0)])],
}


def contours(regions):
    rois = [
        {
            "Area": 1.5,
            "IndexInImage": number,
            "Name": name,
            "NumberOfPoints": len(points),
            "Point_mm": [f"({x * 0.07:f}, {y * 0.07:f}, 0.000000)" for x, y in points],
            "Point_px": [f"({x:f}, {y:f})" for x, y in points],
        }
        for number, (name, points) in enumerate(regions)
    ]
    return plistlib.dumps({"Images": [{"ImageIndex": 0, "NumberOfROIs": len(rois), "ROIs": rois}]})


@pytest.fixture
def inbreast(tmp_path, write_dicom, breast):
    root = tmp_path / "inbreast"
    (root / "AllXML").mkdir(parents=True)
    lines = [HEADER]
    for number, (file, patient, side, view, density, birads) in enumerate(FILMS):
        # The names call an MLO view ML.
        name = f"{file}_{patient}_MG_{side}_{view.replace('MLO', 'ML')}_ANON.dcm"
        write_dicom(root / "AllDICOMs" / name, breast(number, side, file in REGIONS), BitsStored=14, HighBit=13)
        lines.append(f"removed;removed;{side};{view};201001;{file};{density};{birads}")
    for file, regions in REGIONS.items():
        (root / f"AllXML/{file}.xml").write_bytes(contours(regions))
    (root / "INbreast.csv").write_text("\r\n".join(lines) + "\r\n")
    return root


def prepare(root, table="INbreast.csv", **options):
    return prepare_films("inbreast", root, (root / table,), val_fraction=0, **options)


def values(frame, label):
    return frame[f"label:{label}"].fillna(-1).tolist()


def test_films_labels_and_patients(inbreast):
    assert tell_dataset((inbreast / "INbreast.csv",))[0] == "inbreast"
    frame = prepare(inbreast).manifest
    assert frame["image_id"].tolist() == [row[0] for row in FILMS]
    assert frame["patient_id"].tolist() == [row[1] for row in FILMS]
    assert (frame["laterality"] + frame["view"]).tolist() == [row[2] + row[3] for row in FILMS]
    assert set(frame["split"]) == {"train"}
    assert set(zip(frame["pixel_spacing_mm"], frame["spacing_source"], strict=True)) == {(0.07, "dataset")}
    assert values(frame, "birads_4") == [1, 0, 0, 0, 0, 0, 0, 0]  # 4a
    assert values(frame, "birads_6") == [0, 1, 0, 0, 0, 0, 0, 0]
    assert values(frame, "density_b") == [1, 1, 0, -1, 0, 0, 0, 0]
    # No contours: BI-RADS 1 has no finding, of BI-RADS 3 it is not known.
    assert values(frame, "mass") == [1, 0, 0, 0, -1, 1, 0, 0]
    assert values(frame, "calcification") == [1, 1, 0, 1, -1, 0, 0, 0]
    assert values(frame, "calcification_cluster") == [0, 1, 0, 0, -1, 0, 0, 0]
    assert values(frame, "asymmetry") == values(frame, "spiculated_region") == [0, 1, 0, 0, -1, 0, 0, 0]
    assert not any("malignant" in name for name in frame)


def test_contours_become_boxes(inbreast):
    made = prepare(inbreast)
    boxes = {(row.image_id, row.label): (row.xmin, row.ymin, row.xmax, row.ymax) for row in made.findings.itertuples()}
    assert boxes["22678622", "mass"] == (X - RADIUS, Y - RADIUS, X + RADIUS, Y + RADIUS + 1)
    assert boxes["22678622", "calcification"] == (100, 200, 101, 201)  # a point
    assert boxes["22678646", "spiculated_region"] == boxes["22678622", "mass"]
    assert boxes["22678646", "calcification_cluster"] == boxes["22678646", "calcification"] == (50, 60, 59, 72)
    assert boxes["22580192", "mass"] == (WIDTH - 3, HEIGHT - 3, WIDTH, HEIGHT)  # clipped
    assert len(boxes) == 8
    assert sorted(p.message.split(": ", 1)[1] for p in made.problems) == [
        "a region 'Distortion' has no points",
        "a region 'Unnamed' is of no known kind",
    ]
    assert all(str(inbreast / "AllXML") in p.message for p in made.problems)


def test_the_workbook_says_more(inbreast):
    frame = pd.read_csv(inbreast / "INbreast.csv", sep=";", dtype=str)
    marks = {"20586960": "Mass ", "22678622": "Asymmetry"}
    for column in ("Mass ", "Micros", "Distortion", "Asymmetry"):
        frame[column] = ["X" if marks.get(file) == column else None for file in frame["File Name"]]
    frame["File Name"] = frame["File Name"].astype(float)
    frame.loc[len(frame)] = [None] * 6 + ["2.5", None] + [None] * 4  # an average below the table
    frame.to_excel(inbreast / "INbreast.xlsx", index=False)
    assert tell_dataset((inbreast / "INbreast.xlsx",))[0] == "inbreast"
    made = prepare(inbreast, "INbreast.xlsx")
    assert made.manifest["image_id"].tolist() == [row[0] for row in FILMS]
    # Marked, though nothing is outlined.
    assert values(made.manifest, "mass") == [1, 0, 0, 0, 1, 1, 0, 0]
    assert values(made.manifest, "asymmetry") == [1, 1, 0, 0, -1, 0, 0, 0]
    assert any("1 rows of" in note and "name no film" in note for note in made.notes)


def test_without_contours_and_with_torn_ones(inbreast):
    (inbreast / "AllXML/22678622.xml").write_text("<plist>not really")
    made = prepare(inbreast)
    assert [p.message for p in made.problems if "cannot be read as contours" in p.message]
    assert values(made.manifest, "mass") == [-1, 0, 0, 0, -1, 1, 0, 0]
    shutil.rmtree(inbreast / "AllXML")
    made = prepare(inbreast)
    assert made.manifest["label:mass"].isna().all()
    assert len(made.findings) == 0
    assert any("no folder AllXML next to" in note for note in made.notes)


def test_names_without_a_patient_and_two_copies_are_refused(inbreast):
    film = next((inbreast / "AllDICOMs").glob("22678622_*"))
    copy = film.with_name("22678622.png")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(copy)
    with pytest.raises(BadInput, match=r"are both film 22678622; give the folder of one of them"):
        prepare(inbreast)
    film.rename(inbreast / "AllDICOMs/22678622.dcm")
    copy.unlink()
    with pytest.raises(BadInput, match=r"22678622.dcm names no patient; keep the names of the data set"):
        prepare(inbreast)


def test_the_pages_steps_lead_to_labels_of_tiles(inbreast, run_page):
    labels = run_page("INbreast", inbreast.parent, build="--pixel-spacing 0.07")
    both = pd.concat(labels.values())
    assert {"mass", "calcification"} <= set(both)
    assert (both["mass"] == 1).any()
    assert (both["mass"] == 0).any()
