"""Files are whole or absent, tables are read with errors that name the fault, hashes are canonical."""

from __future__ import annotations

import hashlib
import json

import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mammostream.common.errors import BadInput, TooManyBad, first_line, nearest
from mammostream.common.files import (
    make_folder,
    read_csv,
    read_parquet,
    second_name,
    sha256_file,
    sha256_json,
    whole_file,
    write_json,
    write_parquet,
    write_text,
    write_yaml,
)

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


class Broken(Exception):
    pass


def fail_while_writing(path, text):
    with whole_file(path) as temporary:
        temporary.write_text(text)
        assert not path.exists() or path.read_text() == "old"
        raise Broken


def test_failed_write_leaves_nothing(tmp_path):
    path = tmp_path / "deep" / "file"
    with pytest.raises(Broken):
        fail_while_writing(path, "half")
    assert list(path.parent.iterdir()) == []


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(Broken):
        fail_while_writing(path, "half")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_unfinished_file_is_hidden_and_has_another_ending(tmp_path):
    with whole_file(tmp_path / "a.parquet") as temporary:
        assert temporary.parent == tmp_path
        assert temporary.name.startswith(".")
        assert temporary.suffix == ".tmp"
        temporary.write_bytes(b"x")
    assert [p.name for p in tmp_path.iterdir()] == ["a.parquet"]


@pytest.mark.parametrize("write", [lambda path: write_text(path, "x"), lambda path: make_folder(path.parent)])
def test_writing_below_a_file_is_refused(tmp_path, write):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(BadInput, match=r"cannot .*file.*choose another output directory"):
        write(tmp_path / "file" / "new")
    assert (tmp_path / "file").read_text() == "kept"


def test_json_is_canonical_and_refuses_nan(tmp_path):
    write_json(tmp_path / "a", {"b": 1, "a": [2.5, None]})
    write_json(tmp_path / "b", {"a": [2.5, None], "b": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert json.loads((tmp_path / "a").read_text()) == {"a": [2.5, None], "b": 1}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "c", {"a": float("nan")})
    assert not (tmp_path / "c").exists()


def test_yaml_keeps_the_order(tmp_path):
    write_yaml(tmp_path / "a", {"z": 1, "a": "ä"})
    assert (tmp_path / "a").read_text(encoding="utf-8") == "z: 1\na: ä\n"


def test_parquet_has_the_same_bytes_twice(tmp_path):
    table = pa.table({"a": list(range(1000)), "b": ["x", "y"] * 500})
    for name in ("1", "2"):
        write_parquet(tmp_path / name, table)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert read_parquet(tmp_path / "1", "table", "mend", ["a", "b"])["a"].tolist() == list(range(1000))


def test_parquet_errors_name_the_file_the_mend_and_the_nearest_column(tmp_path):
    with pytest.raises(BadInput, match=r"table .*missing does not exist; make it"):
        read_parquet(tmp_path / "missing", "table", "make it")
    (tmp_path / "no").write_text("a,b\n1,2\n")
    with pytest.raises(BadInput, match=r"table .*no is not a Parquet file: .*; make it"):
        read_parquet(tmp_path / "no", "table", "make it")
    write_parquet(tmp_path / "t", pa.table({"image_ids": [1]}))
    with pytest.raises(BadInput, match=r"no column 'image_id' \(did you mean 'image_ids'\?\)"):
        read_parquet(tmp_path / "t", "table", "make it", ["image_id"])


def test_csv_with_mark_and_windows_lines(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfimage_id,patient_id,mass\r\n007,0012,1\r\n")
    frame = read_csv(tmp_path / "a.csv", "CSV", ["image_id"])
    assert frame.to_dict("records") == [{"image_id": "007", "patient_id": "0012", "mass": 1}]


@pytest.mark.filterwarnings("ignore:Length of header")
def test_csv_with_a_comma_too_many_keeps_its_columns(tmp_path):
    (tmp_path / "a.csv").write_text("image_id,mass\na,1,\nb,0,\n")
    assert read_csv(tmp_path / "a.csv", "CSV").to_dict("list") == {"image_id": ["a", "b"], "mass": [1, 0]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as CSV"),
        (b"image_id,mass\n", "has no rows"),
        (b"\xff\xfea\x00", "cannot be read as CSV"),
        (b"a,b\n1,2\n1,2,3,4\n", "cannot be read as CSV"),
        (b"imageid\n1\n", r"no column 'image_id' \(did you mean 'imageid'\?\)"),
    ],
)
def test_bad_csv_is_named(tmp_path, content, message):
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=message) as caught:
        read_csv(path, "CSV", ["image_id"])
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_csv(tmp_path):
    with pytest.raises(BadInput, match="nowhere.csv does not exist"):
        read_csv(tmp_path / "nowhere.csv", "CSV")


@given(VALUES)
def test_json_hash_does_not_depend_on_key_order(value):
    turned = {"x": value, "y": 1}
    assert sha256_json(turned) == sha256_json({"y": 1, "x": value})
    assert sha256_json(turned) != sha256_json({"x": value, "y": 2})
    assert sha256_json(json.loads(json.dumps(turned))) == sha256_json(turned)


def test_file_hash(tmp_path):
    (tmp_path / "a").write_bytes(b"abc" * 100_000)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(b"abc" * 100_000).hexdigest()


@pytest.mark.parametrize("links", [True, False])
def test_a_second_name_keeps_what_it_named(tmp_path, monkeypatch, links):
    if not links:  # as on a file system without them

        def link(*names):
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr("os.link", link)
    first, second = tmp_path / "first", tmp_path / "folder/second"
    for content in ("one", "two"):
        write_text(first, content)
        second_name(first, second)
        assert second.read_text() == content
    write_text(first, "three")
    assert second.read_text() == "two"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["first", "folder", "second"]


def test_errors():
    assert (BadInput("x").exit_code, TooManyBad("x").exit_code) == (2, 3)
    assert nearest("image_idd", ["patient_id", "image_id"]) == " (did you mean 'image_id'?)"
    assert nearest("zzz", ["patient_id"]) == ""
    assert first_line(ValueError("\n one\ntwo")) == "one"
    assert first_line(KeyError()) == "KeyError"


def test_bytes_of_a_frame_survive(tmp_path):
    frame = pd.DataFrame({"a": [1.5, None], "b": ["x", None]})
    write_parquet(tmp_path / "t", pa.Table.from_pandas(frame, preserve_index=False))
    pd.testing.assert_frame_equal(read_parquet(tmp_path / "t", "t", "m"), frame)
