"""CBIS-DDSM in the form that it is published in: line ends within paths, masks among crops, patients in both splits."""

from __future__ import annotations

import csv
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
from PIL import Image

from mammostream.common.errors import BadInput
from mammostream.shards.annotations.datasets import tell_dataset
from mammostream.shards.prepare.films import prepare_films

MASS_HEADER = (
    "patient_id,breast_density,left or right breast,image view,abnormality id,abnormality type,mass shape,mass margins,"
    "assessment,pathology,subtlety,image file path,cropped image file path,ROI mask file path"
)
CALC_HEADER = (
    "patient_id,breast density,left or right breast,image view,abnormality id,abnormality type,calc type,calc distribution,"
    "assessment,pathology,subtlety,image file path,cropped image file path,ROI mask file path"
)
SHAPE = (90, 60)


@dataclass(frozen=True)
class Lesion:
    kind: str  # Mass | Calc
    official: str  # Training | Test
    patient: str
    side: str
    view: str
    number: int
    pathology: str
    assessment: int
    box: tuple[int, int, int, int]  # as its mask is drawn
    detail: str = "OVAL"

    @property
    def case(self):
        return f"{self.kind}-{self.official}_{self.patient}_{self.side}_{self.view}"

    @property
    def csv(self):
        return f"{self.kind.lower()}_case_description_{'train' if self.official == 'Training' else 'test'}_set.csv"

    @property
    def uids(self):
        """Study and series of the film, and of crop and mask."""
        film, lesion = (zlib.crc32(name.encode()) for name in (self.case, f"{self.case}_{self.number}"))
        root = "1.3.6.1.4.1.9590.100.1.2."
        return f"{root}{film}1", f"{root}{film}2", f"{root}{lesion}3", f"{root}{lesion}4"


LESIONS = [
    Lesion(
        "Mass", "Training", "P_00001", "LEFT", "CC", 1, "MALIGNANT", 4, (5, 7, 20, 30), "IRREGULAR-ARCHITECTURAL_DISTORTION"
    ),
    Lesion("Mass", "Training", "P_00001", "LEFT", "CC", 2, "BENIGN", 3, (40, 50, 41, 51)),
    Lesion("Mass", "Training", "P_00001", "LEFT", "MLO", 1, "MALIGNANT", 4, (0, 0, 60, 9)),
    Lesion("Mass", "Training", "P_00092", "RIGHT", "CC", 1, "BENIGN", 2, (3, 3, 9, 9)),
    Lesion("Mass", "Test", "P_00016", "LEFT", "CC", 1, "BENIGN_WITHOUT_CALLBACK", 2, (1, 2, 3, 4)),
    Lesion("Calc", "Training", "P_00092", "RIGHT", "CC", 1, "MALIGNANT", 5, (30, 40, 50, 80), "PLEOMORPHIC"),
    Lesion("Calc", "Training", "P_00016", "LEFT", "MLO", 1, "BENIGN", 0, (10, 20, 30, 40), "AMORPHOUS"),
    Lesion("Calc", "Test", "P_00038", "LEFT", "CC", 1, "BENIGN", 2, (11, 21, 31, 41), "N/A"),
]


def write_csvs(folder, lesions):
    """Write the CSVs as they come: a line end ends the last path of a mass and the crop's path of a calcification."""
    files = {}
    for lesion in lesions:
        study, series, roi_study, roi_series = lesion.uids
        film = f"{lesion.case}/{study}/{series}/000000.dcm"
        first, second = (f"{lesion.case}_{lesion.number}/{roi_study}/{roi_series}/00000{n}.dcm" for n in (0, 1))
        mass = lesion.kind == "Mass"
        crop, mask = (first, second) if mass else (second, first)
        paths = f'{film},{crop},"{mask}\n"' if mass else f'{film},"{crop}\n",{mask}'
        kind = "mass" if mass else "calcification"
        row = f"{lesion.patient},3,{lesion.side},{lesion.view},{lesion.number},{kind},{lesion.detail},SPICULATED,"
        row += f"{lesion.assessment},{lesion.pathology},4,{paths}\n"
        files.setdefault(lesion.csv, [(MASS_HEADER if mass else CALC_HEADER) + "\n"]).append(row)
    for name, rows in files.items():
        (folder / name).write_text("".join(rows))
    return tuple(sorted(folder.glob("*_case_description_*.csv")))


@pytest.fixture(params=["as in the CSVs", "as the archive's program names them"])
def cbis(tmp_path, write_dicom, request):
    """CBIS-DDSM's files, with folders named as in the CSVs, or as the archive's download program names them."""
    rng = np.random.default_rng(0)
    for lesion in LESIONS:
        study, series, roi_study, roi_series = lesion.uids
        if request.param == "as in the CSVs":
            film_folder, roi_folder = (
                f"{lesion.case}/{study}/{series}",
                f"{lesion.case}_{lesion.number}/{roi_study}/{roi_series}",
            )
            film_name, names = "000000.dcm", ("000000.dcm", "000001.dcm")
        else:
            film_folder = f"CBIS-DDSM/{lesion.case}/07-20-2016-DDSM-NA-30678/1.000000-full mammogram images-24515"
            roi_folder = f"CBIS-DDSM/{lesion.case}_{lesion.number}/07-21-2016-DDSM-NA-64331/1.000000-ROI mask images-68512"
            film_name, names = "1-1.dcm", ("1-1.dcm", "1-2.dcm")
        write_dicom(tmp_path / "images" / film_folder / film_name, rng.integers(0, 65536, SHAPE).astype(np.uint16), rle=True)
        mask = np.zeros(SHAPE, np.uint8)
        xmin, ymin, xmax, ymax = lesion.box
        mask[ymin:ymax, xmin:xmax] = 255
        crop = rng.integers(0, 65536, (ymax - ymin, xmax - xmin)).astype(np.uint16)
        # The second row's file order is reversed: which one is the mask, only the content says.
        for name, pixels in zip(names, (mask, crop) if lesion.number == 2 else (crop, mask), strict=True):
            write_dicom(tmp_path / "images" / roi_folder / name, pixels)
    return tmp_path / "images", write_csvs(tmp_path, LESIONS)


def boxes_of(made):
    return {(row.image_id, row.label): (row.xmin, row.ymin, row.xmax, row.ymax) for row in made.findings.itertuples()}


def test_the_csvs_are_as_published(tmp_path):
    paths = write_csvs(tmp_path, LESIONS)
    assert len(paths) == 4
    with paths[-1].open(newline="") as file:
        assert all(row["ROI mask file path"].endswith("\n") for row in csv.DictReader(file))
    assert tell_dataset(paths)[0] == "cbis-ddsm"


def test_films_labels_and_boxes(cbis):
    root, csvs = cbis
    made = prepare_films("cbis-ddsm", root, csvs, val_fraction=0)
    assert made.problems == []
    frame = made.manifest.set_index("image_id")
    assert sorted(frame.index) == sorted({lesion.case for lesion in LESIONS})
    film = frame.loc["Mass-Training_P_00001_LEFT_CC"]
    assert film[["patient_id", "laterality", "view", "split", "bits"]].tolist() == ["P_00001", "L", "CC", "train", 16]
    assert pydicom.dcmread(film["path"]).BitsStored == 16
    labels = {name.removeprefix("label:") for name in frame if name.startswith("label:") and film[name] == 1}
    assert labels == {"mass", "malignant", "benign", "architectural_distortion", "birads_4", "birads_3", "density_c"}
    assert film["label:calcification"] == 0

    found = boxes_of(made)
    for lesion in LESIONS:
        kind = "mass" if lesion.kind == "Mass" else "calcification"
        if lesion.case != "Mass-Training_P_00001_LEFT_CC":  # two masses: below
            assert found[lesion.case, kind] == lesion.box
    both = made.findings[made.findings["image_id"] == "Mass-Training_P_00001_LEFT_CC"]
    assert [tuple(row) for row in both.iloc[:, 1:].to_numpy()] == [
        ("mass", 5, 7, 20, 30),
        ("malignant", 5, 7, 20, 30),
        ("architectural_distortion", 5, 7, 20, 30),
        ("mass", 40, 50, 41, 51),
        ("benign", 40, 50, 41, 51),
    ]
    assert found["Mass-Training_P_00001_LEFT_MLO", "malignant"] == (0, 0, 60, 9)
    assert found["Mass-Test_P_00016_LEFT_CC", "benign"] == (1, 2, 3, 4)


def test_a_film_in_both_sets_has_the_lesions_of_both(cbis):
    root, csvs = cbis
    made = prepare_films("cbis-ddsm", root, csvs)
    frame = made.manifest.set_index("image_id")
    found = boxes_of(made)
    for case in ("Mass-Training_P_00092_RIGHT_CC", "Calc-Training_P_00092_RIGHT_CC"):
        assert frame.loc[case, ["label:mass", "label:calcification", "label:malignant", "label:benign"]].tolist() == [1] * 4
        assert (found[case, "mass"], found[case, "calcification"]) == ((3, 3, 9, 9), (30, 40, 50, 80))


def test_a_copy_of_another_size_gets_no_boxes_of_the_other(cbis, write_dicom):
    root, csvs = cbis
    (film,) = next(root.rglob("Calc-Training_P_00092_RIGHT_CC")).rglob("*.dcm")
    write_dicom(film, np.zeros((80, 55), np.uint16))
    made = prepare_films("cbis-ddsm", root, csvs)
    found = boxes_of(made)
    assert found["Mass-Training_P_00092_RIGHT_CC", "mass"] == (3, 3, 9, 9)
    assert not any(image_id == "Calc-Training_P_00092_RIGHT_CC" for image_id, _ in found)
    assert ("Mass-Training_P_00092_RIGHT_CC", "calcification") not in found
    (problem,) = made.problems
    assert "no mask of the film's size, 55 x 80" in problem.message


def test_a_patient_of_both_official_splits_is_moved_and_named(cbis):
    root, csvs = cbis
    made = prepare_films("cbis-ddsm", root, csvs, val_fraction=0.5)
    frame = made.manifest.set_index("image_id")
    assert frame.groupby("patient_id")["split"].nunique().eq(1).all()
    # A calcification of training, a mass of testing.
    assert frame.loc[["Calc-Training_P_00016_LEFT_MLO", "Mass-Test_P_00016_LEFT_CC"], "split"].tolist() == ["test", "test"]
    assert frame["split"].value_counts().to_dict() == {"test": 3, "train": 2, "val": 2}
    (note,) = made.notes
    assert note.startswith("1 patients are in the official training set of one kind and the test set of the other; their 1 ")
    assert note.endswith("P_00016")


def test_masks_that_are_missing_or_of_another_size_are_listed(cbis, write_dicom):
    root, csvs = cbis

    def files(case):
        return sorted(path for folder in root.rglob(case) for path in folder.rglob("*.dcm"))

    shutil.rmtree(next(root.rglob("Calc-Test_P_00038_LEFT_CC_1")))
    crop, mask = files("Mass-Training_P_00001_LEFT_MLO_1")
    write_dicom(mask, np.repeat([[0], [255]], 35, axis=0).astype(np.uint8) * np.ones((1, 50), np.uint8))
    crop, mask = files("Mass-Test_P_00016_LEFT_CC_1")
    grey = np.zeros(SHAPE, np.uint8)
    grey[:3] = [[1], [2], [255]]
    write_dicom(mask, grey)
    crop, mask = files("Calc-Training_P_00016_LEFT_MLO_1")
    write_dicom(mask, np.zeros(SHAPE, np.uint8))
    crop.write_bytes(b"")
    made = prepare_films("cbis-ddsm", root, csvs)
    assert {p.kind for p in made.problems} == {"no box"}
    said = {p.message.split(": ", 1)[0].rsplit("/", 1)[1]: p.message for p in made.problems}
    assert "no mask file" in said["calc_case_description_test_set.csv line 2"]
    assert "is 50 x 70" in said["mass_case_description_train_set.csv line 6"]
    assert "no mask of the film's size, 60 x 90" in said["mass_case_description_train_set.csv line 6"]
    assert "more or fewer than two values" in said["mass_case_description_test_set.csv line 2"]
    assert "more or fewer than two values" in said["calc_case_description_train_set.csv line 4"]
    assert "cannot be read" in said["calc_case_description_train_set.csv line 4"]
    assert len(said) == 4
    assert len(made.manifest) == 7
    assert ("Calc-Test_P_00038_LEFT_CC", "calcification") not in boxes_of(made)


def test_the_mass_set_alone_says_nothing_of_calcifications(cbis):
    root, csvs = cbis
    made = prepare_films("cbis-ddsm", root, tuple(path for path in csvs if path.name.startswith("mass")))
    assert not any("calcification" in name for name in made.manifest)
    assert "label:mass" in made.manifest


@pytest.mark.parametrize("cbis", ["as in the CSVs"], indirect=True)
def test_workers_give_the_same(cbis):
    root, csvs = cbis
    one, two = (prepare_films("cbis-ddsm", root, csvs, workers=n) for n in (1, 2))
    assert one.manifest.equals(two.manifest)
    assert one.findings.equals(two.findings)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("abnormality type", "abnormality tpye", r"no column 'abnormality type' \(did you mean 'abnormality tpye'\?\)"),
        ("3,BENIGN,", "3,BENING,", r"line 4, column 'pathology': 'BENING' is none of MALIGNANT.*\(did you mean 'BENIGN'\?\)"),
        (",3,BENIGN,4", ",unsure,BENIGN,4", r"line 4, column 'assessment': 'unsure' is none of 0, 0.0"),
        (",2,mass,OVAL,", ",2,mess,OVAL,", r"line 4, column 'abnormality type': 'mess' is none of mass, calcification"),
        ("2,BENIGN,4,Mass-", "2,BENIGN,4,/Mass-", r"line 8: the path '/Mass-Training_P_00092.*' leads outside --images-root"),
        ("2,BENIGN,4,Mass-", "2,BENIGN,4,../../Mass-", r"line 8: the path '\.\./\.\./Mass-Training.*' leads outside"),
        ("2,BENIGN,4,Mass-", "2,BENIGN,4,Mess/Mass-", r"line 8, column 'image file path': .* is no path like 'Mass-Training_P"),
    ],
)
def test_faults_name_the_line(cbis, old, new, message):
    root, csvs = cbis
    path = next(path for path in csvs if path.name == "mass_case_description_train_set.csv")
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    with pytest.raises(BadInput, match=message) as caught:
        prepare_films("cbis-ddsm", root, csvs)
    assert str(path) in str(caught.value)


def test_a_real_film_and_its_mask(films, tmp_path, write_dicom):
    film = next(film for film in films if pydicom.dcmread(film.path).PatientID == "Mass-Test_P_00173_RIGHT_CC")
    shape = pydicom.dcmread(film.path, stop_before_pixels=True)
    lesion = Lesion("Mass", "Test", "P_00173", "RIGHT", "CC", 1, "MALIGNANT", 4, (1000, 2000, 1300, 2222))
    study, series, roi_study, roi_series = lesion.uids
    folder = tmp_path / "images" / lesion.case / study / series
    folder.mkdir(parents=True)
    shutil.copy(film.path, folder / "000000.dcm")
    mask = np.zeros((shape.Rows, shape.Columns), np.uint8)
    mask[2000:2222, 1000:1300] = 255
    write_dicom(tmp_path / "images" / f"{lesion.case}_1" / roi_study / roi_series / "000001.dcm", mask)
    made = prepare_films("cbis-ddsm", tmp_path / "images", write_csvs(tmp_path, [lesion]), assume_spacing=0.05)
    assert made.problems == []
    row = made.manifest.iloc[0]
    assert row[["image_id", "patient_id", "laterality", "view", "split"]].tolist() == [
        *["Mass-Test_P_00173_RIGHT_CC", "P_00173", "R", "CC", "test"]
    ]
    assert boxes_of(made) == {(row["image_id"], label): lesion.box for label in ("mass", "malignant")}


# --- by series alone, masks of other sizes, as JPEG -------------------------------------------------------------------------


def test_films_and_masks_in_folders_of_their_series_alone(tmp_path, write_dicom):
    """As download programs lay them out: <series>/1-1.dcm, without case and study."""
    rng = np.random.default_rng(0)
    for lesion in LESIONS:
        _, series, _, roi_series = lesion.uids
        mask = np.zeros(SHAPE, np.uint8)
        xmin, ymin, xmax, ymax = lesion.box
        mask[ymin:ymax, xmin:xmax] = 255
        crop = rng.integers(0, 65536, (ymax - ymin, xmax - xmin)).astype(np.uint16)
        write_dicom(tmp_path / f"images/{series}/1-1.dcm", rng.integers(0, 65536, SHAPE).astype(np.uint16))
        write_dicom(tmp_path / f"images/{roi_series}/1-1.dcm", crop)
        write_dicom(tmp_path / f"images/{roi_series}/1-2.dcm", mask)
    made = prepare_films("cbis-ddsm", tmp_path / "images", write_csvs(tmp_path, LESIONS))
    assert made.problems == []
    found = boxes_of(made)
    for lesion in LESIONS:
        kind = "mass" if lesion.kind == "Mass" else "calcification"
        if lesion.case != "Mass-Training_P_00001_LEFT_CC":  # two masses
            assert found[lesion.case, kind] == lesion.box


@pytest.mark.parametrize("cbis", ["as in the CSVs"], indirect=True)
def test_a_mask_of_another_size_but_the_films_shape_is_scaled(cbis, write_dicom):
    root, csvs = cbis
    crop, path = sorted(next(root.rglob("Mass-Training_P_00001_LEFT_MLO_1")).rglob("*.dcm"))
    mask = np.zeros((93, 62), np.uint8)  # of 90 x 60
    mask[31:62, 6:60] = 255
    write_dicom(path, mask)
    made = prepare_films("cbis-ddsm", root, csvs)
    (problem,) = made.problems
    assert problem.kind == "scaled box"
    assert problem.message.endswith("train_set.csv line 6: mask 000001.dcm is 62 x 93, its film 60 x 90: the box is scaled")
    box = boxes_of(made)["Mass-Training_P_00001_LEFT_MLO", "mass"]
    np.testing.assert_allclose(box, (6 * 60 / 62, 30, 60 * 60 / 62, 60))


KINDS = {"film": "full mammogram images", "crop": "cropped images", "mask": "ROI mask images"}


@pytest.fixture
def jpeg(tmp_path, breast):
    """The copy as JPEG: folders of series, files numbered in the order of conversion, dicom_info.csv that says what is what."""
    rows = []

    def save(series, kind, pixels, case):
        path = tmp_path / f"cbis/jpeg/{series}/{len(rows) % 2 + 1}-{len(rows):03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=90)
        names = (f"CBIS-DDSM/dicom/{series}/1-1.dcm", f"CBIS-DDSM/jpeg/{series}/{path.name}", case, KINDS[kind])
        rows.append((*names, len(rows)))

    shape = (400, 300)
    lesions = []
    for number in range(12):
        official = "Test" if number >= 9 else "Training"
        side = ("LEFT", "RIGHT")[number % 2]
        x = 70 if side == "LEFT" else 230
        box = (x - 13, 185, x + 14, 216)
        lesion = Lesion("Mass", official, f"P_{number:05d}", side, "CC", 1, ("BENIGN", "MALIGNANT")[number // 2 % 2], 4, box)
        lesions.append(lesion)
        _, series, _, roi_series = lesion.uids
        film = (breast(number, side[0], lesion=True) // 16).astype(np.uint8)
        mask = np.zeros(shape, np.uint8)
        mask[box[1] : box[3], box[0] : box[2]] = 255
        save(series, "film", film, lesion.case)
        for kind, pixels in (("crop", film[box[1] : box[3], box[0] : box[2]]), ("mask", mask)):
            save(roi_series, kind, np.ascontiguousarray(pixels), f"{lesion.case}_1")
    (tmp_path / "cbis/csv").mkdir()
    write_csvs(tmp_path / "cbis/csv", lesions)
    for name, header in (("mass", MASS_HEADER), ("calc", CALC_HEADER)):
        for split in ("train", "test"):
            path = tmp_path / f"cbis/csv/{name}_case_description_{split}_set.csv"
            if not path.exists():  # the page's line names all four; one calcification each
                case = f"Calc-{'Training' if split == 'train' else 'Test'}_P_09999_LEFT_CC"
                row = "P_09999,0,LEFT,CC,1,calcification,PUNCTATE,CLUSTERED,2,BENIGN,4"
                paths = f"{case}/1/2/000000.dcm,{case}_1/1/3/000000.dcm,{case}_1/1/3/000001.dcm"
                path.write_text(f"{header}\n{row},{paths}\n")
    names = ["file_path", "image_path", "PatientID", "SeriesDescription", "Rows"]
    pd.DataFrame(rows, columns=names).to_csv(tmp_path / "cbis/csv/dicom_info.csv", index=False)
    return tmp_path / "cbis", lesions


def jpeg_csvs(root):
    return tuple(sorted((root / "csv").glob("*.csv")))


def test_the_copy_as_jpeg(jpeg):
    root, lesions = jpeg
    assert tell_dataset(jpeg_csvs(root))[0] == "cbis-ddsm"
    made = prepare_films("cbis-ddsm", root / "jpeg", jpeg_csvs(root), val_fraction=0)
    frame = made.manifest.set_index("image_id")
    assert sorted(frame.index) == sorted(lesion.case for lesion in lesions)
    assert set(frame["bits"]) == {8}
    info = pd.read_csv(root / "csv/dicom_info.csv")
    films = set(info.loc[info["SeriesDescription"] == KINDS["film"], "image_path"].str.rsplit("/", n=1).str[1])
    assert {Path(path).name for path in frame["path"]} == films
    assert {p.kind for p in made.problems} == {"missing"}  # the calcifications
    # A lossy mask's edges are where they were drawn.
    for lesion in lesions:
        np.testing.assert_allclose(boxes_of(made)[lesion.case, "mass"], lesion.box, atol=1)


def test_the_copy_as_jpeg_without_its_table_and_with_holes_in_it(jpeg):
    root, _ = jpeg
    whole = prepare_films("cbis-ddsm", root / "jpeg", jpeg_csvs(root))
    cases = tuple(path for path in jpeg_csvs(root) if path.name != "dicom_info.csv")
    without = prepare_films("cbis-ddsm", root / "jpeg", cases)
    assert without.manifest.equals(whole.manifest)
    assert without.findings.equals(whole.findings)  # a mask has two values, a crop has not
    info = root / "csv/dicom_info.csv"
    info.write_text(info.read_text().replace(KINDS["mask"], "").replace(KINDS["film"], ""))
    assert prepare_films("cbis-ddsm", root / "jpeg", jpeg_csvs(root)).findings.equals(whole.findings)
    with pytest.raises(BadInput, match="dicom_info.csv says which JPEG file is what; give the four case description CSVs"):
        prepare_films("cbis-ddsm", root / "jpeg", (info,))


def test_the_pages_steps_lead_to_labels_of_tiles_as_jpeg(jpeg, run_page):
    root, _ = jpeg
    both = pd.concat(run_page("CBIS-DDSM as JPEG", root.parent, rest="CBIS-DDSM").values())
    assert set(both["mass"].dropna()) == {0, 1}
    assert set(both["malignant"].dropna()) == {0, 1}
