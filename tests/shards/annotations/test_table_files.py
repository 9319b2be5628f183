"""Tables as programs write them: separators, encodings, Excel workbooks; the same cells come out of all."""

from __future__ import annotations

import codecs

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mammostream.common.errors import BadInput
from mammostream.shards.annotations.csv_rows import numbers, read_rows, table_headers

TABLE = [["image_id", "size", "Näme"], ["0012", "1", "Müller, A."], ["0013", "", 'a "b"\nc']]
CELLS = [["0012", "1", "Müller, A."], ["0013", "", 'a "b"\nc']]


def text(separator):
    return pd.DataFrame(TABLE[1:], columns=TABLE[0]).to_csv(sep=separator, index=False)


def cells(frame):
    return frame.drop(columns="where").to_numpy().tolist()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252"])
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_separator_and_encoding_are_told(tmp_path, separator, encoding):
    path = tmp_path / "a.csv"
    path.write_bytes(text(separator).replace("\n", "\r\n").encode(encoding))
    frame = read_rows(path, ["IMAGE ID"])
    assert list(frame.columns) == ["IMAGE ID", "size", "Näme", "where"]
    assert cells(frame) == [[cell.replace("\n", "\r\n") for cell in row] for row in CELLS]
    assert table_headers(path) == [TABLE[0]]
    told = " (as Windows-1252)" if encoding == "cp1252" else ""
    assert frame["where"].tolist() == [f"CSV {path}{told} line {n}" for n in (2, 3)]


def test_utf_16_with_its_mark_of_the_other_order(tmp_path):
    (tmp_path / "a.csv").write_bytes(codecs.BOM_UTF16_BE + text(";").encode("utf-16-be"))
    assert cells(read_rows(tmp_path / "a.csv")) == CELLS


@pytest.mark.parametrize(("first", "separator"), [("sep=;", ";"), ("sep=,", ","), ("sep=\t", "\t"), ('"sep=|"', "|")])
def test_excels_own_line_about_the_separator(tmp_path, first, separator):
    path = tmp_path / "a.csv"
    path.write_text(f"{first}\n{text(separator)}", newline="")
    frame = read_rows(path, ["image_id"])
    assert cells(frame) == CELLS
    assert frame["where"].tolist() == [f"CSV {path} line {n}" for n in (3, 4)]


def test_a_single_column_and_separators_within_names(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("image_id\na;b\nc\n")
    assert cells(read_rows(path)) == [["a;b"], ["c"]]
    path.write_text('image_id;"size, mm";x\na;1,5;2\n')
    frame = read_rows(path)
    assert list(frame.columns) == ["image_id", "size, mm", "x", "where"]
    assert numbers(frame, "size, mm").tolist() == [1.5]


@pytest.mark.parametrize(
    ("cell", "value"),
    [("0,07", 0.07), ("0,143", 0.143), ("-1,5", -1.5), ("70,25", 70.25), ("12,3456", 12.3456), ("1e-1", 0.1), ("7", 7)],
)
def test_a_comma_is_a_decimal_point(tmp_path, cell, value):
    (tmp_path / "a.csv").write_text(f"a;b\n{cell};\n")
    assert numbers(read_rows(tmp_path / "a.csv"), "a").tolist() == [value]


@pytest.mark.parametrize("cell", ["1,024", "1,024,000", "1.024,5", "1,5 mm", ",5"])
def test_what_may_mean_thousands_is_refused(tmp_path, cell):
    (tmp_path / "a.csv").write_text(f"a;b\n{cell};\n")
    with pytest.raises(BadInput, match="line 2, column 'a': '.*' is not a number"):
        numbers(read_rows(tmp_path / "a.csv"), "a")


def test_the_sheet_with_the_columns_is_read(tmp_path):
    path = tmp_path / "a.xlsx"
    with pd.ExcelWriter(path) as book:
        pd.DataFrame().to_excel(book, sheet_name="empty")
        pd.DataFrame({"image_id": ["x"]}).to_excel(book, sheet_name="notes", index=False)
        frame = pd.DataFrame(
            {"Image ID": [12, 13.5, None, "0014"], "Mass": [True, False, None, 1], "at": pd.Timestamp("2020-01-02")}
        )
        frame.to_excel(book, sheet_name="Films", index=False, startrow=2)
    read = read_rows(path, ["image_id"], known=["mass"])
    assert list(read.columns) == ["image_id", "mass", "at", "where"]
    assert read["image_id"].tolist() == ["12", "13.5", "", "0014"]
    assert read["mass"].tolist() == ["True", "False", "", "1"]
    assert read["where"].tolist() == [f"CSV {path} sheet 'Films' row {n}" for n in (4, 5, 6, 7)]
    assert [header[0] for header in table_headers(path)] == ["image_id", "Image ID"]
    path.rename(tmp_path / "a.csv")  # whatever its name is
    assert read_rows(tmp_path / "a.csv", ["image_id"], known=["mass"])["mass"].tolist() == ["True", "False", "", "1"]


def test_columns_that_are_not_asked_for_can_be_left_out(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("a,b,c\n1,2,3\n")
    assert cells(read_rows(path, ["c"], known=["a"], keep_all=False)) == [["1", "3"]]


words = st.text(st.characters(codec="cp1252", exclude_characters="\0\r\n"), min_size=1, max_size=6).map(
    lambda word: f"x{word}".strip()
)


@given(
    st.lists(st.lists(words, min_size=3, max_size=3), min_size=1, max_size=4),
    st.sampled_from([",", ";", "\t", "|"]),
    st.sampled_from(["utf-8", "utf-16", "utf-16-le", "utf-16-be"]),
)
def test_what_a_program_writes_comes_back(tmp_path_factory, rows, separator, encoding):
    path = tmp_path_factory.mktemp("table") / "a.csv"
    written = pd.DataFrame(rows, columns=["image_id", "b", "c"]).to_csv(sep=separator, index=False)
    path.write_bytes(written.encode(encoding))
    assert cells(read_rows(path, ["image_id"])) == [[cell.strip() for cell in row] for row in rows]
