"""Tables as text cells whose errors name the line: a quoted cell may hold line ends, as CBIS-DDSM's do."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd

from mammostream.common.errors import BadInput, nearest
from mammostream.common.files import require_columns
from mammostream.shards.annotations.annotations import Problem
from mammostream.shards.annotations.table_files import Sheet, sheets
from mammostream.shards.manifest import LABEL_PREFIX

# What spreadsheets, R and pandas write for "no value".
EMPTY = frozenset({"", "NA", "N/A", "n/a", "NaN", "nan", "NULL", "null", "None", "<NA>"})
BINARY = {"": pd.NA} | dict.fromkeys(("0", "0.0", "false", "no"), 0) | dict.fromkeys(("1", "1.0", "true", "yes"), 1)
DENSITIES = "abcd"
# A comma before exactly three digits may separate thousands.
_DECIMAL_COMMA = re.compile(r"^([-+]?(?:0|\d+(?!,\d{3}$))),(\d+)$")


def read_rows(
    path: Path,
    columns: Iterable[str] = (),
    what: str = "CSV",
    known: Iterable[str] = (),
    keep_all: bool = True,
) -> pd.DataFrame:
    """Read a table as stripped text, "" for no value.

    Parameters
    ----------
    path
        A CSV (of commas, semicolons, tabulators or bars; UTF-8, UTF-16 or Windows-1252) or an Excel workbook, of which the
        sheet with the most of these columns is read.
    columns
        Columns that must be there. Names count in any case, and with spaces or hyphens for underscores.
    what
        What the file is, for errors.
    known
        Further names that count so.
    keep_all
        Whether columns other than these are kept too; a table of hundreds of columns needs much memory.

    Returns
    -------
    pandas.DataFrame
        Cells as text, and a column ``where``: ``CSV <path> line <n>``, the line that the row begins at. Columns without a
        name (an index that pandas wrote) are left out.

    Raises
    ------
    BadInput
        The file is missing, no table, torn, has no rows, or lacks a column.
    """
    columns = tuple(columns)
    names = (*columns, *known)
    header, sheet = max(_headers(path, what, names), key=lambda found: len(set(names).intersection(found[0])))
    kept = [number for number, name in enumerate(header) if name and (keep_all or name in names)]
    lines: list[int] = []
    rows: list[list[str]] = []
    width = len(header)
    for line, cells in sheet.rows:
        if len(cells) != width and (len(cells) < width or any(cells[width:])):
            raise BadInput(f"{what} {path} {sheet.unit} {line} has {len(cells)} cells, its header {width}; repair the line")
        lines.append(line)
        rows.append(["" if cells[number] in EMPTY else cells[number] for number in kept])
    if not rows:
        raise BadInput(f"{what} {path} has no rows; give a CSV with a header and at least one row")
    frame = pd.DataFrame(rows, columns=[header[number] for number in kept], dtype=str)
    require_columns(frame, columns, f"{what} {path}")
    return frame.assign(where=[f"{what} {path} {sheet.unit} {line}" for line in lines])


def table_headers(path: Path) -> list[list[str]]:
    """Return the column names of a CSV, or of each sheet of a workbook that has any.

    Raises
    ------
    BadInput
        As :func:`read_rows`, but for the rows.
    """
    return [header for header, _ in _headers(path, "CSV", ())]


def fold(name: str) -> str:
    """Return what two spellings of a column's name have in common: ``Image ID``, ``image-id`` and ``image_id`` are one."""
    return re.sub(r"[\s_-]+", "_", name.strip()).casefold()


def canonical(header: list[str], known: Iterable[str], what: str) -> list[str]:
    """Return column names with those that are spelled otherwise than the known ones they stand for renamed.

    Raises
    ------
    BadInput
        Two columns stand for one.
    """
    names = {fold(name): name for name in known}
    exact = set(header)
    renamed = [names.get(fold(name), name) if names.get(fold(name)) not in exact else name for name in header]
    for name in names.values():
        if renamed.count(name) > 1:
            first, second = [old for old, new in zip(header, renamed, strict=True) if new == name][:2]
            raise BadInput(f"{what} has the columns '{first}' and '{second}', which are both '{name}'; rename one of them")
    return renamed


def _headers(path: Path, what: str, known: Iterable[str]) -> list[tuple[list[str], Sheet]]:
    """Return each sheet that has rows with its header, under the known names; the sheet's own rows follow it."""
    found = []
    for sheet in sheets(path, what):
        for _, cells in itertools.islice(sheet.rows, 1):
            found.append((canonical(_check_header(cells, path, what), known, f"{what} {path}"), sheet))
    if not found:
        raise BadInput(f"{what} {path} is empty; give a CSV with a header and at least one row")
    return found


def _check_header(cells: list[str], path: Path, what: str) -> list[str]:
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
    """Return a column as float64, NaN for empty cells; ``0,07`` is a number too."""
    texts = frame[column].str.replace(_DECIMAL_COMMA, r"\1.\2", regex=True)
    values = pd.to_numeric(texts.where(texts != ""), errors="coerce").astype(float)
    refuse(frame, values.isna() & (frame[column] != ""), column, reason)
    return values


def binary(frame: pd.DataFrame, column: str) -> pd.Series:
    """Return a column of 0, 1 (or true, false, yes, no in any case) and empty cells as nullable Int8."""
    values = frame[column].str.lower()
    refuse(frame, ~values.isin(BINARY), column, "is not 0, 1 or empty; correct it or drop the column")
    return values.map(BINARY).astype("Int8")


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


def leniently_coded(frame: pd.DataFrame, column: str, codes: Mapping[str, str], problems: list[Problem]) -> pd.Series:
    """Return a column translated as :func:`coded` does, in any case; values whose meaning is not documented are unknown, "".

    For data sets of which not every value is known here: such values become one problem a column.
    """
    folded = {text.casefold(): code for text, code in codes.items()} | {"": ""}
    values = frame[column].str.casefold().map(folded)
    if values.isna().any():
        row = frame[values.isna()].iloc[0]
        problems.append(
            Problem(
                "unknown value",
                f"{values.isna().sum()} cells of the column '{column}' hold no documented value, such as '{row[column]}' "
                f"({row['where']}): treated as unknown",
            )
        )
    return values.fillna("")


def birads_labels(frame: pd.DataFrame, column: str, known: Iterable[int], prefix: str = "") -> pd.DataFrame:
    """Return a 0/1 label column ``label:birads_<n>`` a known category, missing where the cell is empty.

    Cells are ``<prefix><n>``; BadInput names the first that is not.
    """
    codes = {text: str(n) for n in known for text in (f"{prefix}{n}", f"{prefix}{n}.0")}
    values = coded(frame, column, codes)
    return pd.DataFrame({f"{LABEL_PREFIX}birads_{n}": (values == str(n)).astype("Int8").mask(values == "") for n in known})


def density_labels(frame: pd.DataFrame, column: str, codes: Mapping[str, str]) -> pd.DataFrame:
    """Return a 0/1 label column ``label:density_<letter>`` for each of a to d, missing where the cell is empty.

    BI-RADS writes densities as 1 to 4 up to its fourth edition and as a to d from its fifth on.

    Parameters
    ----------
    frame, column
        The table and its column.
    codes
        Cell -> a, b, c, d, or "" for unknown. BadInput names the first that is none of them.
    """
    values = coded(frame, column, codes)
    return pd.DataFrame({f"{LABEL_PREFIX}density_{d}": (values == d).astype("Int8").mask(values == "") for d in DENSITIES})


def four_categories(*more: str) -> dict[str, str]:
    """Return the codes of a density of 1 to 4 for :func:`density_labels`; `more` cells mean that it is unknown."""
    numbered = {text: d for n, d in enumerate(DENSITIES, start=1) for text in (str(n), f"{n}.0")}
    return numbered | dict.fromkeys(more, "")
