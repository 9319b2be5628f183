"""Who is who: films by the names of their tiles, patients by ids that are spelled in several ways."""

from __future__ import annotations

import string
import unicodedata

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mammostream.shards.archive import tile_key
from mammostream.shards.identity import (
    ENDINGS,
    clean_ids,
    clean_patients,
    clean_sides,
    film_of_tile,
    key_of_path,
    known_breast,
    lookalikes,
    names_nobody,
    split_lookalikes,
    stands_for_all,
    tile_stem,
    without_views,
)

# Ids as they occur: UIDs, names with dots, spaces and letters of any script.
film_ids = st.one_of(
    st.lists(st.integers(0, 10**6), min_size=2, max_size=8).map(lambda parts: ".".join(map(str, parts))),
    st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="/%"), min_size=1, max_size=30),
    st.text(string.ascii_letters + string.digits + "._- ", min_size=1, max_size=30),
)
endings = st.sampled_from(["", *ENDINGS, ".PNG", ".Tiff", ".dcm.png"])
positions = st.one_of(
    st.tuples(st.integers(0, 9999), st.integers(0, 9999)).map(lambda p: f"_y{p[0]}_x{p[1]}"),
    st.integers(0, 9999).map(lambda n: f"_tile_{n:03d}"),
)


@given(film_ids, positions, positions, endings, endings, st.sampled_from(["", "a/", "a.b/c d/"]))
def test_tiles_of_one_film_are_of_one_film(film, one, other, ending, other_ending, folder):
    found = film_of_tile(f"{folder}{film}{one}{ending}")
    assert found == film_of_tile(f"{film}{other}{other_ending}") is not None
    assert unicodedata.normalize("NFC", film) == found


@given(film_ids, film_ids, positions, positions)
def test_tiles_of_two_films_are_of_two_films(film, other, one, two):
    assume(unicodedata.normalize("NFC", film) != unicodedata.normalize("NFC", other))
    assert film_of_tile(film + one + ".png") != film_of_tile(other + two + ".png")


@given(st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=30), st.integers(0, 9999), st.integers(0, 9999))
def test_a_shards_key_tells_its_image(image_id, y, x):
    key = tile_key(image_id, y, x)
    assert film_of_tile(key + ".png") == unicodedata.normalize("NFC", image_id)
    assert key_of_path(key + ".png") == key_of_path(key) == key


@given(film_ids, positions, endings)
def test_a_key_holds_no_dot_and_escaping_twice_changes_nothing(film, position, ending):
    key = key_of_path(film + position + ending)
    assert "." not in key
    assert key_of_path(key) == key


@pytest.mark.parametrize("name", ["tile_001.png", "_tile_001.png", "scan.png", "1.2.840.png", "a/tile_001.png", "y1_x2.png"])
def test_a_name_that_is_no_films_tells_none(name):
    assert film_of_tile(name) is None


@pytest.mark.parametrize(
    ("path", "stem"),
    [
        ("a/b.c/1.2.840.113.png", "1.2.840.113"),
        ("patient1.left_tile_003.TIFF", "patient1.left_tile_003"),
        ("1.2.840", "1.2.840"),
    ],
)
def test_only_the_endings_of_images_are_endings(path, stem):
    assert tile_stem(path) == stem


def test_one_id_one_spelling():
    spelled = ["10006", "10006.0", 10006, 10006.0, " 10006 ", "10006\u00a0", "10006\0", np.int64(10006)]
    assert clean_ids(spelled).tolist() == ["10006"] * len(spelled)
    kept = ["0012", "1.2.840.0", "P1", "p1", "1.05", "a b"]
    assert clean_ids(kept).tolist() == kept
    assert clean_ids([None, np.nan, pd.NA, "", "  "]).tolist() == [""] * 5
    assert clean_ids(pd.Series([1.0, np.nan, 3.0])).tolist() == ["1", "", "3"]
    assert clean_ids(["e\u0301"]).tolist() == ["\u00e9"]


@given(st.lists(st.one_of(st.text(max_size=12), st.integers(0, 10**9), st.none())))
def test_cleaning_twice_changes_nothing(values):
    once = clean_ids(values)
    assert clean_ids(once).tolist() == once.tolist()


@pytest.mark.parametrize(
    "name",
    ["removed", "ANONYMOUS", "Anonymized", "anon^anon", "PATIENT_ID", "unknown", "n/a", "de-identified", "XXXX", "", "--"],
)
def test_an_anonymisers_constant_is_nobody(name):
    assert names_nobody(name)
    assert clean_patients([name, "P1"]).tolist() == ["", "P1"]


@pytest.mark.parametrize("name", ["P1", "anon_17", "Anonymous001", "A", "n", "0", "12", "Nanna", "x1", "1.2.840"])
def test_a_name_is_somebody(name):
    assert not names_nobody(name)


def test_one_id_for_many_studies_is_nobody():
    studies = pd.Series(["1", "2", "3"])
    assert stands_for_all(pd.Series(["X"] * 3), studies)
    assert not stands_for_all(pd.Series(["X", "X", "Y"]), studies)
    assert not stands_for_all(pd.Series(["X"] * 3), pd.Series(["1", "1", "2"]))  # a woman who came twice


def test_ids_that_name_films_name_patients_without_side_and_view():
    films = pd.Series([f"Mass-Test_P_00173_{side}_{view}" for side in ("LEFT", "RIGHT") for view in ("CC", "MLO")])
    assert without_views(films).tolist() == ["P_00173"] * 4
    assert without_views(pd.Series(["w1_L_CC_1", "w1-R-MLO", ""])).tolist() == ["w1", "w1", ""]
    mixed = pd.Series(["w1_L_CC", "w2"])
    assert without_views(mixed).tolist() == mixed.tolist()


def test_spellings_that_may_be_one_patient():
    assert lookalikes(["P1", "0012", "a7"], ["p01", "12", "a7", "a70"]) == [("0012", "12"), ("P1", "p01")]
    patients, splits = pd.Series(["P1", "p1", "P2", "P2", "p2"]), pd.Series(["train", "val", "train", "val", "train"])
    assert split_lookalikes(patients, splits) == [("P1", "p1"), ("P2", "p2")]
    assert split_lookalikes(pd.Series(["P1", "p1", ""]), pd.Series(["train", "train", "val"])) == []


def test_sides_and_breasts():
    sides = clean_sides(["L", "left", "RIGHT ", "r", "B", None, ""])
    assert sides.tolist() == ["L", "L", "R", "R", "", "", ""]
    assert known_breast(np.array(["P1", "", "P1"]), np.array(["L", "L", ""])).tolist() == ["P1 L", "", ""]
