"""VinDr-Mammo in the form that it is published in, with invented rows: its columns, its oddities."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from mammostream.common.errors import BadInput
from mammostream.shards.prepare.films import prepare_films

BREAST_HEADER = (
    "study_id,series_id,image_id,laterality,view_position,height,width,breast_birads,breast_density,split\n"  # as published
)
FINDING_HEADER = (
    "study_id,series_id,image_id,laterality,view_position,height,width,breast_birads,breast_density,"
    "finding_categories,finding_birads,xmin,ymin,xmax,ymax,split\n"
)
# study, image, side, view, BI-RADS, split; 4 studies, with two L-CC and no L-MLO in the last.
FILMS = [
    ("a57a57a5", "1dc41dc4", "L", "CC", 5, "training"),
    ("a57a57a5", "204c204c", "L", "MLO", 5, "training"),
    ("b48b48b4", "34e334e3", "R", "CC", 2, "training"),
    ("c66c66c6", "4de24de2", "L", "CC", 4, "test"),
    ("d57d57d5", "55fe55fe", "L", "CC", 1, "training"),
    ("d57d57d5", "67a667a6", "L", "CC", 1, "training"),
]
HEIGHT, WIDTH = 352, 280
FINDINGS = [
    (
        "1dc41dc4",
        "['Architectural Distortion']",
        "BI-RADS 5",
        "41.25",
        "160.5",
        "59.875",
        "187.125",
    ),
    ("1dc41dc4", "['Mass']", "BI-RADS 4", "-6.125", "181.5", "17.75", "200.25"),
    ("204c204c", "['Suspicious Calcification', 'Mass']", "", "16", "350.5", "31.4", "355.25"),
    ("34e334e3", "['No Finding']", "", "", "", "", ""),
    ("4de24de2", "['Skin Thickening']", "", "61.9", "124.4", "72.7", "178.3"),
    ("55fe55fe", "['No Finding']", "", "", "", "", ""),
    ("67a667a6", "['No Finding']", "", "", "", "", ""),
]


@pytest.fixture
def vindr(tmp_path, write_dicom):
    """VinDr-Mammo's files: DICOM films with the spacing that only the detector gives."""
    rows, of_image = [], {}
    for study, image, side, view, birads, split in FILMS:
        pixels = np.arange(HEIGHT * WIDTH, dtype=np.uint16).reshape(HEIGHT, WIDTH)
        write_dicom(tmp_path / f"images/{study}/{image}.dicom", pixels, ImagerPixelSpacing=[0.085, 0.085])
        of_image[image] = f"{study},s{image},{image},{side},{view},{HEIGHT},{WIDTH},BI-RADS {birads},DENSITY C", split
        rows.append(f"{of_image[image][0]},{split}\n")
    (tmp_path / "breast-level_annotations.csv").write_text(BREAST_HEADER + "".join(rows))
    with (tmp_path / "finding_annotations.csv").open("w") as file:
        file.write(FINDING_HEADER)
        for image, categories, *rest in FINDINGS:
            quoted = f'"{categories}"' if "," in categories else categories
            file.write(f"{of_image[image][0]},{quoted},{','.join(rest)},{of_image[image][1]}\n")
    return tmp_path


def prepare(root, findings=True, **options):
    csvs = (root / "breast-level_annotations.csv",)
    return prepare_films("vindr", root / "images", csvs, root / "finding_annotations.csv" if findings else None, **options)


def edit(path, old, new):
    text = path.read_text()
    assert text.count(old) >= 1
    path.write_text(text.replace(old, new, 1))


def test_films_and_splits(vindr):
    made = prepare(vindr, findings=False, val_fraction=0.34, seed=1)
    frame = made.manifest.set_index("image_id")
    assert made.problems == []
    assert made.findings is None
    assert frame.index.tolist() == [film[1] for film in FILMS]
    assert (frame["patient_id"] == frame["study_id"]).all()
    assert frame.loc["204c204c", ["laterality", "view"]].tolist() == ["L", "MLO"]
    assert (frame["pixel_spacing_mm"] == 0.085).all()
    assert set(frame["spacing_source"]) == {"dicom:ImagerPixelSpacing"}
    # The official test study stays; one of three training studies validates, with all of its films.
    assert frame.loc["4de24de2", "split"] == "test"
    assert (frame["split"] == "test").sum() == 1
    assert frame.groupby("study_id")["split"].nunique().eq(1).all()
    assert frame.loc[frame["split"] == "val", "study_id"].nunique() == 1
    birads = frame[[f"label:birads_{n}" for n in range(1, 6)]]
    assert birads.sum(axis=1).eq(1).all()
    assert birads.loc["1dc41dc4"].tolist() == [0, 0, 0, 0, 1]
    assert frame[[f"label:density_{d}" for d in "abcd"]].to_numpy().tolist() == [[0, 0, 1, 0]] * len(frame)
    assert not any("mass" in column for column in frame)


def test_findings_are_clipped_boxes_and_labels(vindr):
    made = prepare(vindr)
    assert made.problems == []
    boxes = made.findings
    assert boxes["label"].tolist() == [
        "architectural_distortion",
        "mass",
        "suspicious_calcification",
        "mass",
        "skin_thickening",
    ]
    np.testing.assert_allclose(
        boxes.loc[[0, 1, 3], ["xmin", "ymin", "xmax", "ymax"]].to_numpy(float),
        [[41.25, 160.5, 59.875, 187.125], [0, 181.5, 17.75, 200.25]] + [[16, 350.5, 31.4, HEIGHT]],
    )
    assert "3 boxes reach out of their film and are clipped to it" in made.notes

    frame = made.manifest.set_index("image_id")
    assert sorted(c for c in frame if c.startswith("label:") and "birads" not in c and "density" not in c) == [
        f"label:{n}" for n in ("architectural_distortion", "mass", "skin_thickening", "suspicious_calcification")
    ]
    assert frame["label:mass"].fillna(-1).tolist() == [1, 1, -1, 0, 0, 0]
    # The BI-RADS 2 breast has benign findings that nobody boxed: not 0 but unknown.
    assert frame.loc["34e334e3", ["label:mass", "label:suspicious_calcification"]].isna().all()
    assert frame.loc["34e334e3", "label:birads_2"] == 1


def test_png_conversions_flat_or_in_folders_are_found(vindr):
    for path in sorted(vindr.glob("images/*/*.dicom")):
        study, image = path.parent.name, path.stem
        path.unlink()
        target = vindr / (f"images/{study}_{image}.png" if study == "a57a57a5" else f"images/{study}/{image}.png")
        Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint8)).save(target)
    made = prepare(vindr, assume_spacing=0.085)
    frame = made.manifest
    assert made.problems == []
    assert len(frame) == len(FILMS)
    assert frame["path"].str.endswith(".png").all()
    assert set(frame["spacing_source"]) == {"assumed"}
    assert set(frame["bits"]) == {8}


def test_boxes_of_resized_films_are_refused(vindr):
    path = vindr / "images/c66c66c6/4de24de2.dicom"
    path.unlink()
    Image.fromarray(np.zeros((HEIGHT // 2, WIDTH // 2), np.uint8)).save(path.with_suffix(".png"))
    with pytest.raises(BadInput, match=r"4de24de2.png is 140 x 176 pixels, but its boxes are for 280 x 352 \(1 such images\)"):
        prepare(vindr)
    assert len(prepare(vindr, findings=False).manifest) == len(FILMS)


def test_missing_and_unreadable_films_are_listed(vindr, write_dicom):
    (vindr / "images/a57a57a5/1dc41dc4.dicom").unlink()
    (vindr / "images/d57d57d5/55fe55fe.dicom").write_bytes(b"")
    write_dicom(vindr / "images/d57d57d5/67a667a6.dicom", None)
    made = prepare(vindr)
    assert [(p.kind, p.message.split(" ")[0]) for p in made.problems] == [("missing", "CSV")] + [("unreadable", "image")] * 2
    assert "line 2: no file for the image '1dc41dc4'" in made.problems[0].message
    assert len(made.manifest) == len(FILMS) - 1
    assert made.manifest.set_index("image_id").loc[["55fe55fe", "67a667a6"], "bits"].tolist() == [0, 0]
    # Its boxes went with it.
    assert "1dc41dc4" not in set(made.findings["image_id"])


def test_no_film_at_all_is_refused(vindr):
    (vindr / "other").mkdir()
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(vindr / "other/x.png")
    csvs = (vindr / "breast-level_annotations.csv",)
    with pytest.raises(BadInput, match=r"none of the 6 images .* is below .*other, such as '1dc41dc4' \(CSV .* line 2\)"):
        prepare_films("vindr", vindr / "other", csvs)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("breast-level", "breast_birads", "breast_birad", r"no column 'breast_birads' \(did you mean 'breast_birad'\?\)"),
        ("breast-level", "BI-RADS 2", "BI-RADS 7", r"line 4, column 'breast_birads': 'BI-RADS 7' is none of BI-RADS 1"),
        ("breast-level", "test\n", "tset\n", r"line 5, column 'split': 'tset' is none of training, validation, test"),
        ("breast-level", "204c204c,L", "1dc41dc4,L", r"line 3: the image_id '1dc41dc4' stands in .*line 2 already"),
        ("breast-level", "b48b48b4", "../../etc", r"line 4: the path '\.\./\.\./etc/34e334e3' leads outside --images-root"),
        ("breast-level", "b48b48b4,", ",", r"line 4, column 'study_id': '' is empty"),
        ("breast-level", ",R,", ",right,", r"line 4, column 'laterality': 'right' is none of L, R"),
        ("finding", "['Mass']", "Mass", r"line 3, column 'finding_categories': 'Mass' is no list like \['Mass'\]"),
        ("finding", "-6.125", "left", r"line 3, column 'xmin': 'left' is not a number"),
        ("finding", "xmin", "x_min", r"no column 'xmin' \(did you mean 'x_min'\?\)"),
    ],
)
def test_faults_name_the_line(vindr, file, old, new, message):
    edit(next(vindr.glob(f"{file}*.csv")), old, new)
    with pytest.raises(BadInput, match=message):
        prepare(vindr)


def test_findings_without_a_box_or_a_film_are_listed(vindr):
    edit(vindr / "finding_annotations.csv", "61.9,", ",")
    with (vindr / "finding_annotations.csv").open("a") as file:
        file.write("x,y,unknown,L,CC,352,280,BI-RADS 4,DENSITY C,['Mass'],BI-RADS 4,1,2,3,4,training\n")
    made = prepare(vindr)
    assert [p.kind for p in made.problems] == ["unknown", "no box"]
    assert "line 9: the image 'unknown'" in made.problems[0].message
    assert "line 6: 'skin_thickening' of image '4de24de2' has no box" in made.problems[1].message
    assert made.manifest.set_index("image_id").loc["4de24de2", "label:skin_thickening"] == 1


def test_the_finding_csv_in_the_wrong_place_is_told(vindr):
    with pytest.raises(BadInput, match="has a row a finding; give it as --findings-csv"):
        prepare_films("vindr", vindr / "images", (vindr / "finding_annotations.csv",))


def test_films_without_a_row_in_the_finding_csv_have_no_finding_labels(vindr):
    edit(vindr / "finding_annotations.csv", ",55fe55fe", ",elsewhere")
    frame = prepare(vindr).manifest.set_index("image_id")
    assert pd.isna(frame.loc["55fe55fe", "label:mass"])
    assert frame.loc["67a667a6", "label:mass"] == 0
