"""Views as data: YAML round trips, and errors that name the field."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mammostream.common.errors import BadInput
from mammostream.dali_pipelines import RECIPES, View, recipe_views
from mammostream.dali_pipelines.recipes import views_from_dict, views_from_yaml, views_to_dict

share = st.floats(0, 1)


def pairs(low, high):
    return st.tuples(st.floats(low, high), st.floats(low, high)).map(lambda pair: tuple(sorted(pair)))


any_view = st.builds(
    View,
    rotation_deg=st.floats(0, 180),
    scale=pairs(0.1, 3),
    horizontal_flip=share,
    vertical_flip=share,
    translation=share,
    crop_area=st.none() | pairs(0.01, 1),
    perspective=st.floats(0, 0.49),
    brightness=st.floats(0, 0.99),
    contrast=st.floats(0, 0.99),
    blur_probability=share,
    blur_sigma=pairs(0.1, 5),
    noise=share,
)


@given(st.tuples(any_view, any_view))
def test_views_survive_yaml_and_json(views):
    written = views_to_dict(views)
    assert views_from_dict(yaml.safe_load(yaml.safe_dump(written)), "x") == views
    assert views_from_dict(json.loads(json.dumps(written)), "x") == views


def test_fields_left_out_change_nothing(tmp_path):
    (tmp_path / "views.yaml").write_text("view1: {rotation_deg: 15, scale: [0.85, 1.15]}\nview2: {}\n")
    assert views_from_yaml(tmp_path / "views.yaml") == (View(rotation_deg=15, scale=(0.85, 1.15)), View())


def test_an_edited_recipe(tmp_path):
    written = views_to_dict(RECIPES["guide"])
    written["view2"]["blur_probability"] = 0.25
    (tmp_path / "views.yaml").write_text(yaml.safe_dump(written))
    first, second = views_from_yaml(tmp_path / "views.yaml")
    assert first == RECIPES["guide"][0]
    assert second.blur_probability == 0.25
    assert second.perspective == RECIPES["guide"][1].perspective


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("view1: {rotaton_deg: 15}\nview2: {}", "views.yaml, view1 has the unknown field 'rotaton_deg'.*'rotation_deg'"),
        ("view1: {}\nview2: {scale: 1.5}", "view2: scale is 1.5; give two numbers"),
        ("view1: {}\nview2: {scale: [1, 2, 3]}", "view2: scale is .*two numbers"),
        ("view1: {brightness: bright}\nview2: {}", "view1: brightness is 'bright'; give a number"),
        ("view1: {brightness: true}\nview2: {}", "view1: brightness is True; give a number"),
        ("view1: {brightness: null}\nview2: {}", "view1: brightness is None"),
        ("view1: {}\nview2: {perspective: 0.7}", "views.yaml, view2: perspective 0.7 is out of range; give 0 to below 0.5"),
        ("view1: {}", "no mapping 'view2'"),
        ("view1: {}\nview2: []", "no mapping 'view2'"),
        ("view1: {}\nview2: {}\nview3: {}", "unknown key 'view3'"),
        ("- 1", "holds no mapping"),
    ],
)
def test_errors_name_the_field(tmp_path: Path, text, message):
    path = tmp_path / "views.yaml"
    path.write_text(text)
    with pytest.raises(BadInput, match=message):
        views_from_yaml(path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rotation_deg": -1},
        {"scale": (1.2, 0.8)},
        {"scale": (0, 1)},
        {"horizontal_flip": 1.5},
        {"crop_area": (0.5, 1.1)},
        {"perspective": 0.5},
        {"brightness": 1.0},
        {"contrast": 1.0},
        {"blur_sigma": (0, 1)},
        {"noise": -0.1},
    ],
    ids=str,
)
def test_ranges_are_checked(wrong):
    with pytest.raises(BadInput, match=next(iter(wrong))):
        View(**wrong)


@pytest.mark.parametrize(("pixel_mm", "widest"), [(None, 1.0), (0.05, 1.0), (0.1, 1.0), (0.2, 0.5), (4.0, 0.025)])
def test_the_recipe_for_mammograms_never_blurs_by_more_than_a_tenth_of_a_millimetre(pixel_mm, widest):
    for view, plain in zip(recipe_views("mammo", pixel_mm), RECIPES["mammo"], strict=True):
        assert view.blur_sigma == (min(0.1, widest), pytest.approx(widest))
        assert replace(view, blur_sigma=plain.blur_sigma) == plain
    assert recipe_views("guide", pixel_mm) is RECIPES["guide"]
