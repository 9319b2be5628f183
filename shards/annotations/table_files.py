"""Table files as lists of text cells: CSV of any separator and common encoding, and Excel sheets.

Separator and encoding are told from the file. Excel sheets are read through pandas and openpyxl (extra ``excel``), the binary
.xls of Excel before 2007 only where xlrd is installed.
"""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mammostream.common.errors import BadInput, first_line

_SEPARATORS = (",", ";", "\t", "|")
_XLSX, _XLS = b"PK\x03\x04", b"\xd0\xcf\x11\xe0"
_SAVE_AS = "save it as comma-separated UTF-8 or as .xlsx"
_SNIFFED = 65_536


@dataclass(frozen=True)
class Sheet:
    """A table: its rows of stripped cells, the header first, each with the line that it begins at.

    Attributes
    ----------
    rows
        ``(line, cells)`` in order; empty rows are left out. Can be gone through once.
    unit
        What a row is counted in, for errors: ``line``, or ``sheet 'x' row``.
    """

    rows: Iterator[tuple[int, list[str]]]
    unit: str = "line"


def sheets(path: Path, what: str) -> Iterator[Sheet]:
    """Yield the tables of a file: one of a text file, one a sheet of an Excel file.

    Raises
    ------
    BadInput
        The file is missing or cannot be read, is no table, or what reads it is not installed; later, from the rows, if a
        quoted cell does not end.
    """
    if not path.is_file():
        raise BadInput(f"{what} {path} does not exist; check the path")
    try:
        with path.open("rb") as file:
            start = file.read(_SNIFFED)
    except OSError as error:
        raise BadInput(f"{what} {path} cannot be read: {error.strerror}; check its permissions") from error
    if start.startswith((_XLSX, _XLS)):
        yield from _excel(path, what, start)
    else:
        encoding = _encoding(start, path, what)
        unit = "(as Windows-1252) line" if encoding == "cp1252" else "line"
        yield Sheet(_text_rows(path, what, encoding), unit)


def _encoding(start: bytes, path: Path, what: str) -> str:
    """Tell the encoding: by its mark, by the zeros of UTF-16, else UTF-8 if the whole file is that, else Windows-1252."""
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    zeros = [start[offset::2].count(0) for offset in (0, 1)]
    for half, name in ((1, "utf-16-le"), (0, "utf-16-be")):
        if zeros[half] > len(start) // 8 and not zeros[1 - half]:
            return name
    if any(zeros):
        raise BadInput(f"{what} {path} is no text and no Excel sheet; {_SAVE_AS}")
    try:
        decoder = codecs.getincrementaldecoder("utf-8")()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                decoder.decode(block)
            decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return "cp1252"
    return "utf-8-sig"


def _text_rows(path: Path, what: str, encoding: str) -> Iterator[tuple[int, list[str]]]:
    begin = 1
    try:
        # What Windows-1252 leaves undefined stays one character a byte.
        with path.open(newline="", encoding=encoding, errors="replace" if encoding == "cp1252" else "strict") as file:
            first, separator = _header_line(file)
            begin += first
            reader = csv.reader(file, strict=True, delimiter=separator)
            for cells in reader:
                line, begin = begin, first + reader.line_num + 1
                cells = [cell.strip() for cell in cells]
                if any(cells):
                    yield line, cells
    except UnicodeDecodeError:
        raise BadInput(f"{what} {path} is torn UTF-16 text; {_SAVE_AS}") from None
    except csv.Error as error:
        raise BadInput(f"{what} {path} line {begin} begins a row that cannot be read: {error}; repair its quotes") from error
    except OSError as error:
        raise BadInput(f"{what} {path} cannot be read: {error.strerror}; check its permissions") from error


def _header_line(file: io.TextIOBase) -> tuple[int, str]:
    """Return how many lines to skip before the header and what separates its cells; the file stands behind the former."""
    text = file.read(_SNIFFED)
    file.seek(0)
    first = text.split("\n", 1)[0].strip("\r\ufeff\"' ").lower()
    if first.startswith("sep=") and len(first) == 5:  # Excel's own way to name the separator
        file.readline()
        return 1, first[4]
    if first == "sep=":  # of a tabulator, which is stripped
        file.readline()
        return 1, "\t"

    def width(separator: str) -> int:
        try:
            rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
            return next((len(row) for row in rows if any(cell.strip() for cell in row)), 0)
        except csv.Error:
            return 0

    return 0, max(_SEPARATORS, key=width)


def _excel(path: Path, what: str, start: bytes) -> Iterator[Sheet]:
    import pandas as pd

    old = start.startswith(_XLS)
    try:
        book = pd.read_excel(
            path, sheet_name=None, header=None, dtype=str, na_filter=False, engine="xlrd" if old else "openpyxl"
        )
    except ImportError:
        if old:
            raise BadInput(f"{what} {path} is a workbook of Excel before 2007; {_SAVE_AS}") from None
        raise BadInput(
            f"{what} {path} is an Excel workbook, which needs the package openpyxl; install it with: "
            "pip install 'mammostream[excel]', or save the sheet as comma-separated UTF-8"
        ) from None
    except Exception as error:  # zip, XML and openpyxl raise what they like
        raise BadInput(f"{what} {path} cannot be read as an Excel workbook: {first_line(error)}; {_SAVE_AS}") from error
    for name, frame in book.items():
        cells = ([cell.strip() for cell in row] for row in frame.astype(str).to_numpy().tolist())
        rows = ((number, row) for number, row in enumerate(cells, start=1) if any(row))
        yield Sheet(rows, f"sheet '{name}' row")
