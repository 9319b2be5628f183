"""CSVs as text cells: spreadsheets' habits, and errors that name the true line."""

from __future__ import annotations

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mammostream.common.errors import BadInput
from mammostream.shards.annotations.csv_rows import binary, coded, numbers, read_rows, refuse_duplicates


@pytest.fixture
def read(tmp_path):
    """Return a function that reads a CSV of the given content."""

    def run(content, columns=()):
        path = tmp_path / "a.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_rows(path, columns)

    return run


def lines(frame):
    return [int(where.rsplit(" ", 1)[1]) for where in frame["where"]]


def test_mark_windows_lines_spaces_and_words_for_nothing(read):
    frame = read(b'\xef\xbb\xbfimage_id , mass\r\n 007,1\r\n"a b",NA\r\n')
    assert frame.drop(columns="where").to_dict("records") == [{"image_id": "007", "mass": "1"}, {"image_id": "a b", "mass": ""}]
    assert lines(frame) == [2, 3]


def test_lines_are_true_after_quoted_line_ends_and_empty_lines(read):
    frame = read('id,path\n1,"x\n"\n\n\n2,"a\nb\n\nc"\n,\n3,z\n')
    assert frame["id"].tolist() == ["1", "2", "3"]
    assert frame["path"].tolist() == ["x", "a\nb\n\nc", "z"]
    assert lines(frame) == [2, 6, 11]


def test_index_column_of_pandas_and_a_comma_too_many(read):
    frame = read(",id,mass,\n0,a,1,\n1,b,0\n".replace("0\n", "0,\n"))
    assert list(frame.columns) == ["id", "mass", "where"]
    assert frame["mass"].tolist() == ["1", "0"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; give a CSV"),
        (b"id\n", "has no rows"),
        (b"id\r\n\r\n\r\n", "has no rows"),
        (b"id,n\xe4me\n", "has no rows"),  # of another encoding, which is no fault
        (bytes(range(256)), "is no text and no Excel sheet; save it as"),
        ("id,mass\na,1\n".encode("utf-16")[:-1], "is torn UTF-16 text; save it as"),
        (b"PK\x03\x04 and no workbook", "cannot be read as an Excel workbook"),
        (b"\xd0\xcf\x11\xe0 and no workbook", "is a workbook of Excel before 2007; save it as"),
        (b"Id,mass,ID\na,1,b\n", "has the columns 'Id' and 'ID', which are both 'id'"),
        (b"id,mass\na,1,2\n", "line 2 has 3 cells, its header 2"),
        (b'id,mass\n"a\nb",1\nc', "line 4 has 1 cells, its header 2"),
        (b'id,mass\na,1\n"b,0\nc,1\n', "line 3 begins a row that cannot be read"),
        (b"id,mass,id\na,1,b\n", "column 'id' twice"),
        (b"ids,mass\na,1\n", r"no column 'id' \(did you mean 'ids'\?\)"),
    ],
)
def test_bad_csv_is_named(read, tmp_path, content, message):
    with pytest.raises(BadInput, match=message) as caught:
        read(content, ["id"])
    assert str(tmp_path / "a.csv") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_unreadable(tmp_path):
    with pytest.raises(BadInput, match="nowhere.csv does not exist"):
        read_rows(tmp_path / "nowhere.csv")
    with pytest.raises(BadInput, match="does not exist"):
        read_rows(tmp_path)


def test_cells_to_values(read):
    frame = read('id,label,size,side\na,1,2.5,LEFT\nb,False,,\n"c\n",1.0,7,RIGHT\nd,NaN,1e3,LEFT\n')
    assert binary(frame, "label").fillna(-1).tolist() == [1, 0, 1, -1]
    assert numbers(frame, "size").fillna(-1).tolist() == [2.5, -1, 7, 1000]
    assert coded(frame, "side", {"LEFT": "L", "RIGHT": "R"}).tolist() == ["L", "", "R", "L"]
    with pytest.raises(BadInput, match="line 2, column 'size': '2.5' is not 0, 1 or empty"):
        binary(frame, "size")
    with pytest.raises(BadInput, match="line 3, column 'label': 'False' is not a number"):
        numbers(frame, "label")
    with pytest.raises(BadInput, match=r"line 4, column 'side': 'RIGHT' is none of LEFT, RIGTH \(did you mean 'RIGTH'\?\)"):
        coded(frame, "side", {"LEFT": "L", "RIGTH": "R"})


def test_duplicates_name_both_lines(read):
    frame = read("id,x\na,1\nb,2\n\na,3\na,4\n")
    with pytest.raises(BadInput, match=r"line 5: the id 'a' stands in .* line 2 already; keep one of the rows \(2 such rows\)"):
        refuse_duplicates(frame, "id")


texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)


@given(st.lists(st.lists(texts, min_size=3, max_size=3), min_size=1, max_size=6), st.sampled_from(["\n", "\r\n"]))
def test_what_a_csv_writer_writes_comes_back(tmp_path_factory, rows, end):
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerow(["id", "b", "c"])
    begins = []
    for number, row in enumerate(rows):
        # As many lines as a program counts that ends them at LF, CRLF or CR.
        begins.append(len(buffer.getvalue().replace("\r\n", "\n").replace("\r", "\n").split("\n")))
        writer.writerow([f"row {number}", *row[1:]])
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    path.write_bytes(buffer.getvalue().encode())
    frame = read_rows(path, ["id", "b", "c"])
    assert frame["id"].tolist() == [f"row {number}" for number in range(len(rows))]
    assert lines(frame) == begins
    words = {"NA", "N/A", "n/a", "NaN", "nan", "NULL", "null", "None", "<NA>"}
    assert frame["b"].tolist() == ["" if row[1].strip() in words else row[1].strip() for row in rows]
