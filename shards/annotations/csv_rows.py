"""CSV files as text cells whose errors name the line: a quoted cell may hold line ends, as CBIS-DDSM's do."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd

from mammostream.common.errors import BadInput, nearest
from mammostream.common.files import require_columns
from mammostream.shards.manifest import LABEL_PREFIX

# What spreadsheets, R and pandas write for "no value".
_EMPTY = frozenset({"", "NA", "N/A", "n/a", "NaN", "nan", "NULL", "null", "None", "<NA>"})
_BINARY = {"": pd.NA} | dict.fromkeys(("0", "0.0", "false"), 0) | dict.fromkeys(("1", "1.0", "true"), 1)


def read_rows(path: Path, columns: Iterable[str] = (), what: str = "CSV") -> pd.DataFrame:
    """Read a CSV as stripped text, "" for no value; a UTF-8 byte-order mark and Windows line ends are fine.

    Parameters
    ----------
    path
        The file.
    columns
        Columns that must be there.
    what
        What the file is, for errors.

    Returns
    -------
    pandas.DataFrame
        Cells as text, and a column ``where``: ``CSV <path> line <n>``, the line that the row begins at. Columns without a
        name (an index that pandas wrote) are left out.

    Raises
    ------
    BadInput
        The file is missing, no comma-separated UTF-8, torn, has no rows, or lacks a column.
    """
    header, lines, rows = _read(path, what)
    if not rows:
        raise BadInput(f"{what} {path} has no rows; give a CSV with a header and at least one row")
    frame = pd.DataFrame(rows, columns=pd.RangeIndex(len(header)), dtype=str)
    frame = frame[[number for number, name in enumerate(header) if name]]
    frame.columns = [name for name in header if name]
    require_columns(frame, columns, f"{what} {path}")
    return frame.assign(where=[f"{what} {path} line {line}" for line in lines])


def csv_header(path: Path) -> list[str]:
    """Return a CSV's column names.

    Raises
    ------
    BadInput
        As :func:`read_rows`, but for the rows.
    """
    return _read(path, "CSV", header_only=True)[0]


def _read(path: Path, what: str, header_only: bool = False) -> tuple[list[str], list[int], list[list[str]]]:
    if not path.is_file():
        raise BadInput(f"{what} {path} does not exist; check the path")
    header: list[str] | None = None
    lines: list[int] = []
    rows: list[list[str]] = []
    begin = 1
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            for cells in reader:
                line, begin = begin, reader.line_num + 1
                cells = [cell.strip() for cell in cells]
                if not any(cells):
                    continue
                if header is None:
                    header = _check_header(cells, path, what)
                    if header_only:
                        break
                    continue
                if len(cells) != len(header):
                    if len(cells) < len(header) or any(cells[len(header) :]):
                        raise BadInput(
                            f"{what} {path} line {line} has {len(cells)} cells, its header {len(header)}; repair the line"
                        )
                    cells = cells[: len(header)]
                lines.append(line)
                rows.append(["" if cell in _EMPTY else cell for cell in cells])
    except UnicodeDecodeError:
        raise BadInput(f"{what} {path} is not UTF-8 text; save it as comma-separated UTF-8") from None
    except csv.Error as error:
        raise BadInput(f"{what} {path} line {begin} begins a row that cannot be read: {error}; repair its quotes") from error
    except OSError as error:
        raise BadInput(f"{what} {path} cannot be read: {error.strerror}; check its permissions") from error
    if header is None:
        raise BadInput(f"{what} {path} is empty; give a CSV with a header and at least one row")
    return header, lines, rows


def _check_header(cells: list[str], path: Path, what: str) -> list[str]:
    separator = next((s for s in (";", "\t", "|") if len(cells) == 1 and s in cells[0]), None)
    if separator:
        raise BadInput(f"{what} {path} is separated by {separator!r}; save it as comma-separated UTF-8")
    named = [cell for cell in cells if cell]
    if len(set(named)) < len(named):
        twice = next(name for name in named if named.count(name) > 1)
        raise BadInput(f"{what} {path} has the column '{twice}' twice; rename one of them")
    return cells


def refuse_duplicates(frame: pd.DataFrame, column: str) -> None:
    """Raise BadInput where a value of a column stands in two rows, naming both."""
    again = frame[column].duplicated()
    if again.any():
        second = frame[again].iloc[0]
        first = frame[frame[column] == second[column]].iloc[0]
        raise BadInput(
            f"{second['where']}: the {column} '{second[column]}' stands in {first['where']} already; keep one of the rows "
            f"({again.sum()} such rows)"
        )


def refuse(frame: pd.DataFrame, wrong: pd.Series, column: str, reason: str) -> None:
    """Raise BadInput for the first row where `wrong` holds, naming its line, column and cell; `reason` says what is wrong."""
    if wrong.any():
        row = frame[wrong].iloc[0]
        raise BadInput(f"{row['where']}, column '{column}': '{row[column]}' {reason}")


def filled(frame: pd.DataFrame, column: str) -> pd.Series:
    """Return a column of which no cell may be empty."""
    refuse(frame, frame[column] == "", column, "is empty; fill it in or drop the row")
    return frame[column]


def numbers(frame: pd.DataFrame, column: str, reason: str = "is not a number; correct it or leave it empty") -> pd.Series:
    """Return a column as float64, NaN for empty cells."""
    values = pd.to_numeric(frame[column].where(frame[column] != ""), errors="coerce").astype(float)
    refuse(frame, values.isna() & (frame[column] != ""), column, reason)
    return values


def binary(frame: pd.DataFrame, column: str) -> pd.Series:
    """Return a column of 0, 1 (or True, False) and empty cells as nullable Int8."""
    values = frame[column].str.lower()
    refuse(frame, ~values.isin(_BINARY), column, "is not 0, 1 or empty; correct it or drop the column")
    return values.map(_BINARY).astype("Int8")


def coded(frame: pd.DataFrame, column: str, codes: Mapping[str, str]) -> pd.Series:
    """Return a column translated by a table of its values (as the data set writes them); empty stays empty unless told.

    Raises
    ------
    BadInput
        A cell holds no known value.
    """
    unknown = ~frame[column].isin(codes) & (frame[column] != "")
    if unknown.any():
        guess = nearest(frame.loc[unknown, column].iloc[0], codes)
        refuse(frame, unknown, column, f"is none of {', '.join(codes)}{guess}; correct it")
    return frame[column].map({"": ""} | dict(codes))


def birads_labels(frame: pd.DataFrame, column: str, known: Iterable[int], prefix: str = "") -> pd.DataFrame:
    """Return a 0/1 label column ``label:birads_<n>`` a known category, missing where the cell is empty.

    Cells are ``<prefix><n>``; BadInput names the first that is not.
    """
    codes = {text: str(n) for n in known for text in (f"{prefix}{n}", f"{prefix}{n}.0")}
    values = coded(frame, column, codes)
    return pd.DataFrame({f"{LABEL_PREFIX}birads_{n}": (values == str(n)).astype("Int8").mask(values == "") for n in known})
