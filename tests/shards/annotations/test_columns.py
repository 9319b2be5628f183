"""--columns, --labels and the names of files in tables that nobody wrote for this program."""

from __future__ import annotations

import re
import shlex
import unicodedata
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from mammostream.common.errors import BadInput
from mammostream.shards.annotations.columns import ColumnMap, LabelSource, parse_columns
from mammostream.shards.manifest import read_manifest
from mammostream.shards.prepare.films import prepare_films

PAGE = (Path(__file__).parents[3] / "docs/own_data.md").read_text()


def write_films(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((6, 5), 700, np.uint16)).save(path)
    return folder


@pytest.fixture
def root(tmp_path):
    return write_films(tmp_path / "films", "0012/left_cc.png", "0012/left_mlo.png", "0013/right_cc.png")


@pytest.fixture
def describe(root, tmp_path):
    """Return a function that describes the films with a table, and gives what prepare made."""

    def run(content, columns=(), labels=(), **options):
        paths = [tmp_path / f"{number}.csv" for number in range(len(content) if isinstance(content, list) else 1)]
        for path, text in zip(paths, content if isinstance(content, list) else [content], strict=True):
            path.write_text(text)
        mapped = parse_columns(columns, labels) if columns or labels else None
        options = {"patient_regex": r"^\d+", "val_fraction": 0} | options
        return prepare_films("folder", root, tuple(paths), columns=mapped, **options)

    return run


def labels_of(made):
    return {name.removeprefix("label:"): made.manifest[name].fillna(-1).tolist() for name in made.manifest if "label:" in name}


# --- what is said -----------------------------------------------------------------------------------------------------------


def test_items_with_commas_within_and_between_them():
    told = parse_columns(
        ["image_id=png_filename,patient_id = empi_anon", "Label:cancer=Size, mm==1|2 ,label:birads_*=Bi-Rads"],
        ["mass,calc", "x"],
    )
    assert told.sources == {"image_id": "png_filename", "patient_id": "empi_anon"}
    assert told.labels == (
        LabelSource("cancer", "Size, mm", ("1", "2")),
        LabelSource("birads_*", "Bi-Rads"),
        *(LabelSource(name, name) for name in ("mass", "calc", "x")),
    )
    assert ColumnMap().columns == []


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("image_id", "'image_id' is no TARGET=COLUMN"),
        ("image_id=", "'image_id=' is no TARGET=COLUMN"),
        ("imageid=a", r"'imageid' is none of image_id, .*\(did you mean 'image_id'\?\)"),
        ("view=a,view=b", "'view' has two columns, 'a' and 'b'"),
        ("label:=a", "a label's name is letters"),
        ("label:a b=a", "a label's name is letters"),
        ("label:x=a==", "names no value behind '=='"),
        ("label:x_*=a==1", r"give label:x_\*=COLUMN, without a value"),
    ],
)
def test_bad_items_are_named(item, message):
    with pytest.raises(BadInput, match=f"--columns: .*{message}"):
        parse_columns([item])


# --- what comes of it -------------------------------------------------------------------------------------------------------


def test_the_page_leads_from_a_strange_table_to_a_manifest(tmp_path, call, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_films(Path("films"), "0012/left_cc.png", "0012/left_mlo.png", "0013/right_cc.png", "0014/right_cc.png")
    (text,) = re.findall(r"`cases.csv` is\n\n```text\n(.*?)```", PAGE, re.DOTALL)
    Path("cases.csv").write_text(text)
    alone, strange = re.findall(r"^mammostream (prepare .*)$", PAGE.replace("\\\n", " "), re.MULTILINE)
    code, out, err = call(*shlex.split(strange), "--val-fraction", "0.3")
    assert code == 0, err
    assert "data set: folder (--columns or --labels is given)" in out
    frame = read_manifest(Path("work/manifest.parquet"))
    assert frame["patient_id"].tolist() == ["12", "12", "13", "14"]
    assert (frame["laterality"] + frame["view"].str.upper()).tolist() == ["LCC", "LMLO", "RCC", "RCC"]
    assert frame["split"].tolist() == ["train", "train", "val", "test"]
    assert frame["label:malignant"].fillna(-1).tolist() == [1, 1, 0, -1]
    assert frame["label:birads_5"].tolist() == [1, 1, 0, 0]
    assert sorted(name for name in frame if name.startswith("label:birads")) == [f"label:birads_{n}" for n in (1, 2, 5)]
    # The same as a file, and the folder without a table.
    (config,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    Path("own.yaml").write_text(config)
    code, _, err = call("prepare", "--config", "own.yaml", "--output-dir", "again", "--assume-spacing", "0.4")
    assert code == 0, err
    assert read_manifest(Path("again/manifest.parquet"))["label:malignant"].fillna(-1).tolist() == [1, 1, 0, -1]
    code, _, err = call(*shlex.split(alone.replace("work", "alone")))
    assert code == 0, err
    frame = read_manifest(Path("alone/manifest.parquet"))
    assert frame["patient_id"].tolist() == ["0012", "0012", "0013", "0014"]
    assert (frame["laterality"] + frame["view"]).tolist() == ["LCC", "LMLO", "RCC", "RCC"]
    assert "side and view of 4 films are told by the names of their files, such as 0012/left_cc.png" in err


def test_names_count_in_any_case_and_own_names_need_no_map(describe):
    text = "FILE;Patient-ID;LATERALITY;Split;MASS\nleft_cc;a;L;TRAINING;Yes\nleft_mlo;a;L;train;NO\nright_cc;b;R;Validation;\n"
    made = describe(text, ["image_id=file"], patient_regex=None)
    assert made.manifest["patient_id"].tolist() == ["a", "a", "b"]
    assert made.manifest["split"].tolist() == ["train", "train", "val"]
    assert labels_of(made) == {"MASS": [1, 0, -1]}


def test_a_label_of_several_columns_is_there_if_one_says_so(describe):
    text = "image_id,cancer,pathology\nleft_cc,0,malignant\nleft_mlo,0,Benign\nright_cc,,\n"
    made = describe(text, ["label:cancer=cancer,label:cancer=pathology==MALIGNANT"])
    assert labels_of(made) == {"cancer": [1, 0, -1]}
    made = describe(text, ["label:known=pathology==malignant|BENIGN", "label:late=cancer"])
    assert labels_of(made) == {"known": [1, 1, -1], "late": [0, 0, -1]}


def test_paths_and_ids_of_ones_own(describe, root, tmp_path):
    rows = [("F1", "0012\\left_cc.png"), ("F2", f"{root}/0012/left_mlo"), ("F3", "D:\\scans\\0013\\right_cc.tif")]
    text = "id,where it is,mass\n" + "".join(f"{name},{path},1\n" for name, path in rows)
    (tmp_path / "boxes.csv").write_text("image_id,label,xmin,ymin,xmax,ymax\nF1,mass,1,1,2,2\n0013/right_cc.png,mass,0,0,5,5\n")
    mapped = ["image_id=id", "path=where it is"]
    made = describe([text, "id,calc\nF1,0\nF3,1\n"], mapped, findings_csv=tmp_path / "boxes.csv")
    assert made.manifest["image_id"].tolist() == ["F1", "F2", "F3"]
    assert labels_of(made) == {"mass": [1, 1, 1], "calc": [0, -1, 1]}
    assert made.findings["image_id"].tolist() == ["F1", "F3"]


def test_columns_that_are_not_there_and_values_that_are_nowhere_are_named(describe):
    text = "image_id,cancer,pathology\nleft_cc,0,malignant\n"
    for columns, message in [
        (["view=position"], r"no table has a column 'position'; the columns of .*0.csv are: image_id, cancer, pathology"),
        (["label:x=patholgy==a"], r"no table has a column 'patholgy' \(did you mean 'pathology'\?\)"),
        (["label:x=pathology==MALIGNNT"], r"no cell of the column 'pathology' is MALIGNNT.*label:x would be 0 everywhere"),
        (["label:x=pathology"], r"line 2, column 'pathology': 'malignant' is not 0, 1 or empty"),
    ]:
        with pytest.raises(BadInput, match=message):
            describe(text, columns)
    with pytest.raises(BadInput, match="no column 'image_id'.*say which of them names the file with --columns image_id=COLUMN"):
        describe("file,mass\nleft_cc,1\n")
    with pytest.raises(BadInput, match="no table has a column 'mas' .did you mean 'mass'.."):
        describe("image_id,mass\nleft_cc,1\n", labels=["mas"])


def test_a_known_data_set_takes_no_columns(call, root, tmp_path):
    code, _, err = call("prepare", "--dataset", "vindr", "--csv-path", tmp_path / "a.csv", "--columns", "view=a",
                        "--images-root", root, "--output-dir", tmp_path / "out")  # fmt: skip
    assert code == 2
    assert err.splitlines()[-1].startswith("error: --columns and --labels are for --dataset folder")


# --- which columns are labels -----------------------------------------------------------------------------------------------


def test_what_is_surely_a_label_is_taken_and_the_rest_is_said(describe):
    names = "image_id,mass,calc_2,fold,kfold,is_train,age,birads,patient_age,note,site_id,nothing,has_clip,quality"
    text = f"{names}\nleft_cc,1,TRUE,0,1,1,61,4,1,fine,0,,yes,1\nleft_mlo,0,FALSE,1,0,0,0,2,0,,1,,no,0\n"
    text += "right_cc,,1.0,0,0,0,1,0,1,,0,,,1\n"
    made = describe(text)
    assert labels_of(made) == {"mass": [1, 0, -1], "calc_2": [1, 0, 1], "has_clip": [1, 0, -1]}
    (note,) = [note for note in made.notes if note.startswith("labels of ")]
    assert (
        ": mass, calc_2, has_clip; columns that are none: fold (by its name), kfold (by its name), is_train (by its name)"
        in note
    )
    for told in (
        "age ('61')",
        "birads ('4')",
        "patient_age (by its name)",
        "note ('fine')",
        "site_id (by its name)",
        "nothing (empty)",
    ):
        assert told in note
    assert "--labels chooses columns of 0 and 1" in note


def test_a_slip_in_a_label_is_an_error_and_not_another_kind_of_column(describe):
    with pytest.raises(BadInput, match="line 3, column 'Cancer': '2' is not 0, 1 or empty"):
        describe("image_id,Cancer\nleft_cc,1\nleft_mlo,2\n")
    assert labels_of(describe("image_id,mass\nleft_cc,OVAL\nleft_mlo,ROUND\n")) == {}


def test_labels_chooses(describe):
    text = "image_id,mass,calc,Fold\nleft_cc,1,0,1\nleft_mlo,0,1,0\n"
    assert labels_of(describe(text, labels=["fold", "calc"])) == {"fold": [1, 0, -1], "calc": [0, 1, -1]}
    with pytest.raises(BadInput, match="line 2, column 'mass': '1.5' is not 0, 1 or empty"):
        describe(text.replace("left_cc,1", "left_cc,1.5"), labels=["mass"])


# --- names of files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("left_cc", "0012/left_cc.png"),
        ("left_cc.png", "0012/left_cc.png"),
        ("left_cc.DCM", "0012/left_cc.png"),
        ("LEFT_CC", "0012/left_cc.png"),
        ("0012/left_cc", "0012/left_cc.png"),
        ("films/0012/left_cc.png", "0012/left_cc.png"),
        ("data\\films\\0012\\left_cc.png", "0012/left_cc.png"),
        ("C:\\data\\films\\0012\\left_cc.png", "0012/left_cc.png"),
        ("./0012/../0012/left_cc", "0012/left_cc.png"),
        ("7", "0007.png"),
        ("7.0", "0007.png"),
        ("007.png", "0007.png"),
        ("M\u00fcller 1", "Mu\u0308ller 1.png"),
        ("Mu\u0308ller 2", "M\u00fcller 2.png"),
        ("m\u00fcller 2.PNG", "M\u00fcller 2.png"),
        ("a.b", "a.b.png"),
        ("1.2.840.7", "1.2.840.7.png"),
    ],
)
def test_a_name_is_understood(describe, root, name, file):
    write_films(root, "0007.png", "Mu\u0308ller 1.png", "M\u00fcller 2.png", "a.b.png", "1.2.840.7.png", "x/right_cc.png")
    made = describe(f'image_id,mass\n"{name}",1\n', patient_regex=".+")
    row = made.manifest[made.manifest["label:mass"] == 1].iloc[0]
    assert str(Path(row["path"]).relative_to(root)) == file
    assert made.problems == []
    said = [note for note in made.notes if "spelled otherwise" in note]
    assert bool(said) == (name in ("LEFT_CC", "7", "7.0", "007.png", "m\u00fcller 2.PNG"))


@pytest.mark.parametrize("name", ["left", "0013/left_cc", "other/left_cc", "12", "0012", "right_cc", "a"])
def test_a_name_of_no_file_or_of_several_is_not(describe, root, name):
    write_films(root, "x/right_cc.png", "A.png", "x/a.png", "y/a1.png", "y/A1.png")
    text = f"image_id,mass\nleft_mlo,1\n{name},1\n"
    if name in ("right_cc",):
        with pytest.raises(BadInput, match="line 3: 'right_cc' fits 2 files below"):
            describe(text, patient_regex=".+")
        return
    made = describe(text, patient_regex=".+")
    assert made.manifest["label:mass"].sum() == 1 + (name == "a")
    assert [p.kind for p in made.problems] == ["missing"] * (name != "a")


def test_the_cause_stands_before_the_symptom(describe, root):
    """Where a table's names fit no file, films have no patient: the line says the former."""
    write_films(root, "0012.png")
    text = "image_id,patient_id,mass\nleft_cc,P0,0\nleft_mlo,P0,1\nright_ccc,P1,0\nx12,P2,1\n"
    with pytest.raises(BadInput) as caught:
        describe(text, patient_regex=None)
    assert re.match(
        r"2 rows of the tables name no file: CSV .*0.csv line 4: no image 'right_ccc' below .*; 2 films stand in no row with a "
        r"patient, such as .*0012.png: write their names as the files are called, or give --patient-regex",
        str(caught.value),
    )
    with pytest.raises(BadInput, match=r"line 2: no image 'leftcc' \(did you mean 'left_cc'\?\) below"):
        describe("image_id,mass\nleftcc,1\n")
    with pytest.raises(BadInput, match=r"line 2: no image 'zzzz' \(the folder holds 'left_cc.png'\) below"):
        describe("image_id,mass\nzzzz,1\n")


def test_eaten_zeros_and_the_other_unicode_form_need_no_mend(describe, root):
    """The case that ended with 'names no patient; give a CSV'."""
    nfd = unicodedata.normalize("NFD", "M\u00fcller 1")
    for path in list(root.rglob("*.png")):
        path.unlink()
    write_films(root, "0012.png", "0013.png", f"{nfd}.png")
    nfc = unicodedata.normalize("NFC", nfd)
    made = describe(f"image_id,patient_id,mass\n12,P0,0\n13.0,P1,1\n{nfc},P2,1\n", patient_regex=None)
    assert labels_of(made) == {"mass": [0, 1, 1]}
    assert made.problems == []
    (note,) = [note for note in made.notes if "spelled otherwise" in note]
    assert note.startswith("2 names of the tables are spelled otherwise than their files, such as '12' for 0012.png")


def test_an_excel_sheet_and_utf_16_describe_films(root, tmp_path):
    frame = pd.DataFrame({"File": [12, 13], "Patient": [1, 2], "cancer": [True, False]})
    write_films(root, "0012.png", "0013.png")
    frame.to_excel(tmp_path / "a.xlsx", index=False)
    frame.to_csv(tmp_path / "a.tsv", sep="\t", index=False, encoding="utf-16")
    mapped = parse_columns(["image_id=file", "patient_id=patient"])
    made = [
        prepare_films("folder", root, (tmp_path / name,), columns=mapped, patient_regex=".+") for name in ("a.xlsx", "a.tsv")
    ]
    assert made[0].manifest.equals(made[1].manifest)
    assert labels_of(made[0])["cancer"].count(1) == labels_of(made[0])["cancer"].count(0) == 1
