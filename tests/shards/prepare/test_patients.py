"""The patient of each film: ids that name nobody, ids that name films, the regex on the path, warnings."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest

from mammostream.common.errors import BadInput
from mammostream.common.real_films import film_cases
from mammostream.shards.prepare.films import prepare_films
from mammostream.shards.prepare.patients import film_patients

ROOT = Path("/films")


def films(patients, studies=None, bits=8, paths=None):
    count = len(patients)
    paths = [ROOT / path for path in paths or [f"case{n}/film{n}.dcm" for n in range(count)]]
    return pd.DataFrame({"path": map(str, paths), "patient_id": patients, "study_id": studies or [""] * count, "bits": bits})


def patients_of(frame, regex=None):
    notes: list[str] = []
    found = film_patients(frame, ROOT, re.compile(regex) if regex else None, notes)
    return found.tolist(), " | ".join(notes)


def test_ids_of_whole_numbers_are_written_alike():
    found, notes = patients_of(films(["10006", "10006.0", " 10006", "10007"]))
    assert found == ["10006", "10006", "10006", "10007"]
    assert not notes


def test_a_constant_is_no_patient():
    frame = films(["removed", "removed", "P1", "P1"])
    with pytest.raises(
        BadInput, match=r"case0/film0\.dcm names no patient; give --patient-regex .*'removed' of 2 films names nobody"
    ):
        patients_of(frame)
    found, notes = patients_of(frame, r"case\d|P\d")
    assert found == ["case0", "case1", "P1", "P1"]
    assert "'removed' of 2 films names nobody" in notes


def test_one_id_for_many_studies_is_no_patient():
    frame = films(["X"] * 4, studies=["1", "2", "3", "3"])
    with pytest.raises(BadInput, match=r"names no patient; .*the patient id 'X' of all 3 studies names nobody"):
        patients_of(frame)
    assert patients_of(frame, "case.")[0] == ["case0", "case1", "case2", "case3"]


def test_the_regex_is_tried_on_the_path_if_the_id_does_not_match():
    found, notes = patients_of(films(["P_1", "n17", ""], paths=["a.dcm", "P_2/b.dcm", "P_3.dcm"]), r"P_\d+")
    assert found == ["P_1", "P_2", "P_3"]
    assert "1 patient ids do not match --patient-regex" in notes
    with pytest.raises(BadInput, match=r"'P_.*' matches neither the patient id 'n17' nor the path 'b.dcm'"):
        patients_of(films(["P_1", "n17"], paths=["a.dcm", "b.dcm"]), r"P_\d+")


def test_a_regex_that_matches_nothing_names_no_patient():
    """An optional group once gave readable films the patient "", and they vanished."""
    with pytest.raises(BadInput, match="does not match 'b.dcm'"):
        patients_of(films(["", ""], paths=["P1.dcm", "b.dcm"]), r"(P\d)?")


@pytest.mark.parametrize(
    ("patients", "warning"),
    [
        (["a1", "b2", "c3"], "each of the 3 films has a patient of its own, such as 'a1'"),
        (["a", "a", "a"], "all 3 films are of one patient, 'a'"),
        (["P1", "p1", "P2"], "differ only in case or leading zeros: 'P1' and 'p1'; they are kept in the same split"),
    ],
)
def test_what_looks_wrong_is_said(patients, warning):
    found, notes = patients_of(films(patients))
    assert found == patients
    assert warning in notes


def test_the_real_films_are_of_two_women():
    """Their PatientID is 'Mass-Test_P_00173_LEFT_CC': a patient per film, as it stands."""
    root = film_cases()[0]["rcc"].parent.parent
    made = prepare_films("folder", root, val_fraction=0.5, assume_spacing=0.05)
    assert sorted(made.manifest["patient_id"].unique()) == ["P_00173", "P_00820"]
    assert made.manifest.groupby("patient_id")["split"].nunique().eq(1).all()
    assert sorted(made.manifest["split"].unique()) == ["train", "val"]
    assert any("the patient ids name side and view" in note for note in made.notes)
