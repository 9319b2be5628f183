"""EMBED in the form that it is published in: a row a file, a row a finding, sides of one exam, regions as text."""

from __future__ import annotations

import pandas as pd
import pytest

from mammostream.common.errors import BadInput
from mammostream.shards.annotations.datasets import tell_dataset
from mammostream.shards.prepare.films import prepare_films

# Patient, exam, side, view, type, special view, regions.
FILES = [
    ("28145471", "8099128854014801", "L", "CC", "2D", "", "[[188, 58, 213, 83]]"),
    ("28145471", "8099128854014801", "L", "MLO", "2D", "", "((10, 20, 30, 40), (1, 2, 3, 4))"),
    ("28145471", "8099128854014801", "L", "MLO", "cview", "", "[]"),
    ("28145471", "8099128854014801", "R", "CC", "2D", "", ""),
    ("28145471", "5504000000000002", "L", "ML", "2D", "1.0", ""),
    ("33000001", "6600000000000001", "L", "CC", "2D", "", ""),
    ("33000001", "6600000000000001", "R", "CC", "C-view", "", ""),
    ("44000001", "7700000000000001", "R", "CC", "2D", "", ""),
    ("55000001", "8800000000000001", "R", "CC", "2D", "", ""),
    ("66000001", "9900000000000001", "L", "CC", "2D", "", ""),
    ("66000001", "9900000000000001", "L", "CC", "ROI_SSC", "", "[[1, 1, 2, 2]]"),
    ("77000001", "1100000000000001", "L", "CC", "3D", "", ""),
]
# Exam, side, assessment, density, shape, calcification, severity, side of the specimen.
FINDINGS = [
    ("8099128854014801", "L", "S", "2.0", "O", "", "1.0", "L"),
    ("8099128854014801", "L", "S", "2.0", "", "A", "", ""),
    ("8099128854014801", "R", "N", "2.0", "", "", "", ""),
    ("6600000000000001", "B", "B", "4", "F", "", "4", "R"),
    ("7700000000000001", "", "A", "5", "Q", "", "2", ""),
    ("8800000000000001", "R", "X", "", "?", "", "", ""),
]


def uid(number):
    return f"1.2.826.0.1.3680043.8.498.{number + 1:012d}"


@pytest.fixture
def embed(tmp_path, write_dicom, breast):
    root = tmp_path / "embed"
    (root / "tables").mkdir(parents=True)
    rows = []
    for number, (patient, exam, side, view, kind, special, regions) in enumerate(FILES):
        path = f"cohort_1/{patient}/{exam}/{uid(number)}.dcm"
        rows.append(
            (number, patient, exam, "HOLOGIC", f"/mnt/NAS2/mammo/anon_dicom/{path}", kind, side, view, special, regions)
        )
        if kind in ("2D", "cview", "C-view"):
            write_dicom(root / "images" / path, breast(number, side, bool(regions)), PixelSpacing=[0.4, 0.4])
    names = (
        ",empi_anon,acc_anon,Manufacturer,anon_dicom_path,FinalImageType,ImageLateralityFinal,ViewPosition,spot_mag,ROI_coords"
    )
    pd.DataFrame(rows, columns=names.split(",")).to_csv(root / "tables/EMBED_OpenData_metadata.csv", index=False)
    patients = {exam: patient for patient, exam, *_ in FILES}
    names = "empi_anon,acc_anon,numfind,side,asses,tissueden,massshape,calcfind,path_severity,bside,RACE_DESC"
    rows = [(patients[exam], exam, 1, *rest, "x") for exam, *rest in FINDINGS]
    pd.DataFrame(rows, columns=names.split(",")).to_csv(root / "tables/EMBED_OpenData_clinical.csv", index=False)
    return root


def tables(root, *names):
    return tuple(root / f"tables/EMBED_OpenData_{name}.csv" for name in names or ("metadata", "clinical"))


def prepare(root, *names):
    return prepare_films("embed", root / "images", tables(root, *names), val_fraction=0)


def values(frame, label):
    return frame[f"label:{label}"].fillna(-1).tolist()


def test_films_labels_and_patients(embed):
    assert tell_dataset(tables(embed))[0] == "embed"
    made = prepare(embed)
    frame = made.manifest
    described = [row for row in FILES if row[4] not in ("3D", "ROI_SSC")]
    assert frame["image_id"].tolist() == [uid(number) for number, row in enumerate(FILES) if row in described]
    assert frame[["patient_id", "study_id", "laterality", "view"]].to_numpy().tolist() == [list(row[:4]) for row in described]
    assert values(frame, "synthetic") == [0, 0, 1, 0, 0, 0, 1, 0, 0, 0]
    assert values(frame, "special_view") == [0, 0, 0, 0, 1, 0, 0, 0, 0, 0]
    # Two findings of the left breast of the first exam, none of the second exam's and of the last patient's.
    assert values(frame, "mass") == [1, 1, 1, 0, -1, 0, 0, 0, 0, -1]
    assert values(frame, "calcification") == [1, 1, 1, 0, -1, 0, 0, 0, 0, -1]
    assert values(frame, "focal_asymmetry") == [0, 0, 0, 0, -1, 1, 1, 0, 0, -1]  # of both sides
    assert values(frame, "birads_4") == [1, 1, 1, 0, -1, 0, 0, 0, -1, -1]
    assert values(frame, "birads_0") == [0, 0, 0, 0, -1, 0, 0, 1, -1, -1]
    assert values(frame, "density_b") == [1, 1, 1, 1, -1, 0, 0, -1, -1, -1]
    assert values(frame, "density_d") == [0, 0, 0, 0, -1, 1, 1, -1, -1, -1]
    # Of what was biopsied, on the specimen's side.
    assert values(frame, "malignant") == [1, 1, 1, -1, -1, -1, 0, 0, -1, -1]
    assert values(frame, "benign") == [0, 0, 0, -1, -1, -1, 1, 0, -1, -1]
    assert values(frame, "high_risk") == [0, 0, 0, -1, -1, -1, 0, 1, -1, -1]
    told = {(p.kind, p.message.split(",")[0]) for p in made.problems}
    assert ("left out", "1 files of the type '3D'") in told
    assert ("left out", "1 files of the type 'ROI_SSC'") in told
    (unknown,) = [p.message for p in made.problems if p.kind == "unknown value"]
    assert "1 cells of the column 'massshape' hold no documented value, such as '?'" in unknown


def test_regions_become_boxes(embed):
    made = prepare(embed)
    boxes = made.findings
    assert boxes.iloc[:, 1:].to_numpy().tolist() == [["roi", 58, 188, 83, 213], ["roi", 20, 10, 40, 30], ["roi", 2, 1, 4, 3]]
    assert boxes["image_id"].tolist() == [uid(0), uid(1), uid(1)]
    assert values(made.manifest, "roi") == [1, 1, -1, -1, -1, -1, -1, -1, -1, -1]


def test_the_regions_of_dicom_files_are_taken_where_both_are_told(embed):
    path = tables(embed)[0]
    frame = pd.read_csv(path, dtype=str)
    frame["DCM_ROI_coords"] = ["[[[5, 6, 7, 8]]]", *[None] * (len(frame) - 1)]
    frame.rename(columns={"ROI_coords": "PNG_ROI_coords"}).to_csv(path, index=False)
    made = prepare(embed)
    assert made.findings.iloc[:, 1:].to_numpy().tolist() == [["roi", 6, 5, 8, 7]]


def test_a_part_of_the_films_and_of_the_tables_will_do(embed):
    (next((embed / "images").rglob(f"{uid(3)}.dcm"))).unlink()
    made = prepare(embed, "metadata")
    assert len(made.manifest) == 9
    assert [p.kind for p in made.problems].count("missing") == 1
    assert not any("mass" in name or "malignant" in name for name in made.manifest)
    with pytest.raises(BadInput, match="EMBED's films stand in EMBED_OpenData_metadata.csv; give it"):
        prepare(embed, "clinical")


def test_a_torn_region_is_listed(embed):
    path = tables(embed)[0]
    path.write_text(path.read_text().replace("[[188, 58, 213, 83]]", "[[188, 58, 213"))
    (problem,) = [p.message for p in prepare(embed).problems if p.kind == "no box"]
    assert "line 2, column 'ROI_coords': '[[188, 58, 213' is no list of [ymin, xmin, ymax, xmax]" in problem


def test_the_pages_steps_lead_to_labels_of_tiles(embed, run_page):
    both = pd.concat(run_page("EMBED", embed.parent).values())
    assert {"mass", "calcification", "malignant"} <= set(both)
    assert set(both["mass"].dropna()) == {0, 1}
    assert both["malignant"].isna().any()
