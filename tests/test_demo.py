"""The demo's folder: an earlier demo is replaced, anything else stays."""

from __future__ import annotations

import pytest

from mammostream.common.errors import BadInput
from mammostream.demo import _empty


def test_only_an_earlier_demo_is_replaced(tmp_path):
    demo = tmp_path / "runs/demo"
    _empty(demo)
    (demo / "films").mkdir()
    (demo / "films/old").touch()
    _empty(demo)
    assert [p.name for p in demo.iterdir()] == [".mammostream-demo"]


def test_a_folder_of_someones_films_is_left_alone(tmp_path):
    (tmp_path / "films").mkdir()
    (tmp_path / "films/film.dcm").touch()
    with pytest.raises(BadInput, match="holds something other than a demo"):
        _empty(tmp_path)
    with pytest.raises(BadInput, match="holds something other than a demo"):
        _empty(tmp_path / "films/film.dcm")
    assert (tmp_path / "films/film.dcm").exists()
