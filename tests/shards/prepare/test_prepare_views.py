"""``prepare``: one spelling of views and sides, what DICOM headers say of films, and ``--exclude``."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from mammostream.common.errors import BadInput
from mammostream.shards.manifest import read_manifest
from mammostream.shards.prepare.command import prepare as command
from mammostream.shards.prepare.films import prepare_films

PIXELS = np.arange(48 * 32, dtype=np.uint16).reshape(48, 32)


def code(value, **more):
    dataset = Dataset()
    dataset.CodeValue, dataset.CodingSchemeDesignator, dataset.CodeMeaning = value, "SCT", "x"
    for name, inside in more.items():
        setattr(dataset, name, inside)
    return dataset


def view(value, *modifiers):
    return Sequence([code(value, ViewModifierCodeSequence=Sequence([code(m) for m in modifiers]))])


@pytest.fixture
def screening(tmp_path, write_dicom):
    """Six films of a patient each: a plain one, a magnified, a spot, two with implants, a partial one that does not say."""
    folder = tmp_path / "images"
    films = {
        "plain": {"ViewCodeSequence": view("399162004"), "BreastImplantPresent": "NO", "PartialView": "NO"},
        "magnified": {"ViewCodeSequence": view("399368009", "399163009"), "BreastImplantPresent": "NO"},
        "spot": {"ViewPosition": "SCC", "BreastImplantPresent": "NO"},
        "implant": {"ViewPosition": "MLO", "BreastImplantPresent": "YES"},
        "displaced": {"ViewCodeSequence": view("399162004", "399209000")},
        "partial": {"ViewPosition": "cc", "PartialView": "YES"},
    }
    for number, (name, elements) in enumerate(films.items()):
        write_dicom(
            folder / f"{name}.dcm",
            PIXELS,
            BitsStored=12,
            HighBit=11,
            PatientID=f"P{number}",
            Manufacturer="HOLOGIC, Inc.",
            ManufacturerModelName="Selenia",
            PresentationIntentType="FOR PRESENTATION",
            **elements,
        )
    return folder


def test_headers_fill_the_columns(screening):
    films = prepare_films("folder", screening).manifest.set_index("image_id")
    assert films["view"].to_dict() == {
        "plain": "CC",
        "magnified": "MLO",
        "spot": "CC",
        "implant": "MLO",
        "displaced": "CC",
        "partial": "CC",
    }
    assert films["view_modifiers"].replace("", np.nan).dropna().to_dict() == {
        "magnified": "magnification",
        "spot": "spot",
        "displaced": "implant_displaced",
    }
    assert films.loc[["plain", "implant", "displaced"], "implant"].tolist() == ["NO", "YES", ""]
    assert films.loc["partial", "partial_view"] == "YES"
    assert set(films["manufacturer"] + films["model"] + films["intent"]) == {"HOLOGIC, Inc.SeleniaFOR PRESENTATION"}


@pytest.mark.parametrize(
    ("names", "left_out"),
    [
        (("implant",), {"implant", "displaced"}),
        (("magnification", "SPOT"), {"magnified", "spot"}),
        (("implant-displaced",), {"displaced"}),
        (("partial",), {"partial"}),
        (("mlo",), {"magnified", "implant"}),
        (("xccl",), set()),
    ],
)
def test_films_of_a_kind_are_left_out_with_a_reason(screening, names, left_out):
    made = prepare_films("folder", screening, exclude=names)
    everything = {path.stem for path in screening.iterdir()}
    assert set(made.manifest["image_id"]) == everything - left_out
    assert {problem.kind for problem in made.problems} == ({"excluded"} if left_out else set())
    said = " ".join(problem.message for problem in made.problems)
    assert all(f"{name}.dcm" in said for name in left_out)
    assert len(made.problems) == len(left_out)


def test_what_does_not_say_is_kept_and_counted(screening):
    notes = prepare_films("folder", screening, exclude=("partial",)).notes
    assert any("partial: 4 of 6 films do not say" in note for note in notes)


def test_exclude_on_the_command_line(screening, tmp_path):
    args = [
        "--images-root",
        str(screening),
        "--output-dir",
        str(tmp_path / "out"),
        "--exclude",
        "implant,magnification",
        "spot",
    ]
    done = CliRunner().invoke(command, args, catch_exceptions=False)
    assert done.exit_code == 0
    assert "4 excluded" in done.output
    problems = pd.read_csv(tmp_path / "out/problems.csv")
    assert sorted(problems["kind"]) == ["excluded"] * 4
    assert any("magnified.dcm: magnification" in message for message in problems["message"])
    assert set(read_manifest(tmp_path / "out/manifest.parquet")["image_id"]) == {"plain", "partial"}


def test_an_unknown_kind_and_a_set_of_which_nothing_is_left(screening):
    with pytest.raises(BadInput, match=r"--exclude magnifcation is no kind.*magnification"):
        prepare_films("folder", screening, exclude=("magnifcation",))
    with pytest.raises(BadInput, match="leaves out all 6 films"):
        prepare_films("folder", screening, exclude=("CC", "MLO"))


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in "abcdefg":
        Image.fromarray((PIXELS % 255).astype(np.uint8)).save(folder / f"{name}.png")
    return folder


def from_table(tmp_path, pictures, table, **options):
    path = tmp_path / "t.csv"
    path.write_text(table)
    return prepare_films("folder", pictures, (path,), **options)


def test_views_and_sides_of_a_table_get_one_spelling(tmp_path, pictures):
    table = "image_id,patient_id,view,laterality\na,1,CC,L\nb,1,Cc,left\nc,2,cc,RIGHT\nd,2,cranio-caudal,r\n"
    table += "e,3,RMLO,\nf,3,stereo,both\ng,4,Stereo,Lateral\n"
    made = from_table(tmp_path, pictures, table)
    films = made.manifest.set_index("image_id")
    assert films["view"].tolist() == ["CC"] * 4 + ["MLO", "STEREO", "STEREO"]
    assert films["laterality"].tolist() == ["L", "L", "R", "R", "R", "", ""]
    assert any("'STEREO' (2)" in note for note in made.notes)
    assert any("'both' (1)" in note and "'Lateral' (1)" in note for note in made.notes)


def test_an_implant_of_the_annotations_counts(tmp_path, pictures):
    table = "image_id,patient_id,implant\n" + "".join(f"{name},{name},{int(name in 'bd')}\n" for name in "abcdefg")
    films = from_table(tmp_path, pictures, table, exclude=("implant",)).manifest
    assert films["image_id"].tolist() == ["a", "c", "e", "f", "g"]


def test_spacings_in_another_unit_count_as_unknown(tmp_path, pictures):
    table = "image_id,patient_id,pixel_spacing_mm\n" + "".join(
        f"{name},{name},{70 if name < 'c' else 0.07}\n" for name in "abcdefg"
    )
    made = from_table(tmp_path, pictures, table)
    assert made.manifest["pixel_spacing_mm"].isna().tolist() == [True, True, *[False] * 5]
    assert made.manifest["spacing_source"].tolist() == ["", "", *["csv"] * 5]
    assert any("2 pixel spacings" in note and "such as 70 of image 'a'" in note for note in made.notes)
    made = from_table(tmp_path, pictures, table, assume_spacing=0.1)
    assert made.manifest["pixel_spacing_mm"].tolist() == [0.1, 0.1, *[0.07] * 5]
