"""Views and sides: DICOM's codes as pydicom has them, and one spelling for what tables write."""

from __future__ import annotations

import pytest
from pydicom.sr._snomed_dict import mapping
from pydicom.sr.codedict import Collection

from mammostream.preprocess.views import MODIFIERS, VIEWS, View, coded_view, normal_side, normal_view


@pytest.mark.parametrize(("context", "known"), [("CID4014", "name"), ("CID4015", "modifiers")])
def test_every_code_of_the_standard_is_known_in_both_systems_and_by_its_words(context, known):
    codes = [getattr(Collection(context), name) for name in Collection(context).dir()]
    assert len(codes) >= 11
    for code in codes:
        old = mapping["SCT"][code.value]
        modifier = known == "modifiers"
        one, two, three = (
            coded_view("R-10226", "", [pair]) if modifier else coded_view(*pair, [])
            for pair in ((code.value, ""), (old, ""), ("unknown", code.meaning))
        )
        assert one == two == three
        assert getattr(one, known)
        assert one.name in VIEWS


@pytest.mark.parametrize(
    ("written", "view"),
    [
        *((word, View("CC")) for word in ("CC", "Cc", "cc", " cc ", "C.C.", "Cranio-Caudal", "craniocaudal", "CRANIO CAUDAL")),
        *((word, View("MLO")) for word in ("mlo", "Medio-lateral oblique", "MEDIOLATERAL OBLIQUE", "medio_lateral_oblique")),
        ("ml", View("ML")),
        ("Mediolateral", View("ML")),
        ("LM", View("LM")),
        ("lmo", View("LMO")),
        ("xccl", View("XCCL")),
        ("RMLO", View("MLO", (), "R")),
        ("L-CC", View("CC", (), "L")),
        ("left mlo", View("MLO", (), "L")),
        ("MCC", View("CC", ("magnification",))),
        ("RMLOID", View("MLO", ("implant_displaced",), "R")),
        ("spot mag cc", View("CC", ("magnification", "spot"))),
        ("CC, rl", View("CC", ("rolled_lateral",))),
        ("AT", View("AT", ("axillary_tail",))),
        ("tan", View("TAN", ("tangential",))),
        ("stereo", View("STEREO")),
        ("Foo  bar", View("FOO BAR")),
        ("LAT", View("LAT")),  # of which the direction is not said
        ("CC MLO", View("CC MLO")),
        ("", View()),
    ],
)
def test_views_get_one_spelling(written, view):
    assert normal_view(written) == view
    assert normal_view(view.name).name == view.name


def test_every_acronym_stays_itself():
    assert [normal_view(name).name for name in VIEWS] == list(VIEWS)
    assert [normal_view(name).modifiers for name in MODIFIERS] == [(name,) for name in MODIFIERS]


def test_sides_get_one_spelling():
    assert {normal_side(word) for word in ("L", "l", "Left", "LEFT", " left breast", "Lt.")} == {"L"}
    assert {normal_side(word) for word in ("R", "right", "Rt", "RIGHT BREAST")} == {"R"}
    assert {normal_side(word) for word in ("", "B", "U", "lateral", "both", "nan", None)} == {""}
