"""``--columns`` and ``--labels``: which column of a user's table holds what, and which of its columns are labels."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import pandas as pd

from mammostream.common.errors import BadInput, nearest
from mammostream.shards.annotations.csv_rows import BINARY, binary, fold
from mammostream.shards.manifest import LABEL_PREFIX

TEXTS = ("patient_id", "study_id", "laterality", "view", "split")
TARGETS = ("image_id", "path", *TEXTS, "pixel_spacing_mm")
SPLIT_WORDS = {"train": ("training",), "val": ("valid", "validation", "dev"), "test": ("testing",)}
# Words in the names of columns that may hold 0 and 1 without being labels.
_NO_LABELS = {
    *("fold", "folds", "kfold", "cv", "split", "subset", "partition", "train", "training", "val", "valid", "validation"),
    *("test", "testing"),
    *("id", "ids", "uid", "idx", "index", "no", "nr", "num", "number", "row", "count", "file", "filename", "path", "name"),
    *("age", "sex", "gender", "race", "ethnicity", "weight", "year", "date", "time", "bmi"),
    *("birads", "rads", "acr", "density", "assessment", "grade", "stage", "severity", "score", "subtlety"),
    *("site", "center", "centre", "hospital", "machine", "scanner", "device", "vendor", "manufacturer", "model", "batch"),
    *("cohort", "series", "study", "exam", "visit", "frame", "frames", "slice", "width", "height", "rows", "columns", "bits"),
    *("side", "laterality", "view", "left", "right", "modality", "quality", "reader", "radiologist", "x", "y", "z"),
}
# Names of columns that are labels: another value than 0 and 1 among their cells is a slip, not another kind of column.
_LABELS = {
    *("cancer", "malignant", "malignancy", "benign", "normal", "abnormal", "lesion", "tumor", "tumour", "mass", "masses"),
    *("calc", "calcs", "calcification", "calcifications", "microcalcification", "microcalcifications", "asymmetry"),
    *("distortion", "architectural_distortion", "suspicious_calcification", "biopsy", "invasive", "target", "label"),
}
_LABEL_NAME = re.compile(r"[^\W_][\w.-]*\*?", re.ASCII)


@dataclass(frozen=True)
class LabelSource:
    """Where a label comes from: a column of 0 and 1, or where one of some values is in it."""

    label: str
    column: str
    values: tuple[str, ...] = ()

    def cells(self, frame: pd.DataFrame) -> dict[str, pd.Series]:
        """Return the label's cells under its name, or those of one label a value for ``birads_*``."""
        if self.label.endswith("*"):
            values = frame[self.column].map(_value)
            every = sorted(set(values) - {""})
            names = {value: self.label[:-1] + re.sub(r"\W+", "_", value).strip("_") for value in every}
            return {LABEL_PREFIX + name: (values == value).astype("Int8").mask(values == "") for value, name in names.items()}
        if self.values:
            cells = frame[self.column]
            return {LABEL_PREFIX + self.label: self.matches(cells).astype("Int8").mask(cells == "")}
        return {LABEL_PREFIX + self.label: binary(frame, self.column)}

    def matches(self, cells: pd.Series) -> pd.Series:
        """Return which cells have one of the values."""
        return cells.map(_value).isin([_value(value) for value in self.values])


@dataclass(frozen=True)
class ColumnMap:
    """What a user says of a table's columns.

    Attributes
    ----------
    sources
        One of :data:`TARGETS` -> the column that holds it; others count where a column has their name.
    labels
        The labels of ``--columns`` and ``--labels``; where there are none, :func:`sure_labels` are taken.
    """

    sources: dict[str, str] = field(default_factory=dict)
    labels: tuple[LabelSource, ...] = ()

    @property
    def columns(self) -> list[str]:
        """The columns of tables that it names, each once."""
        return list(dict.fromkeys([*self.sources.values(), *(label.column for label in self.labels)]))


def parse_columns(items: Iterable[str], labels: Iterable[str] = ()) -> ColumnMap:
    """Read ``image_id=png_filename,label:cancer=pathology==MALIGNANT`` and the columns of ``--labels``.

    Parameters
    ----------
    items
        ``TARGET=COLUMN``, ``label:NAME=COLUMN`` (0 and 1), ``label:NAME=COLUMN==VALUE|VALUE`` or ``label:NAME_*=COLUMN`` (one
        label a value); several may stand in an item, with commas between them.
    labels
        Columns of 0 and 1, which become labels of their own names; commas separate them too.

    Raises
    ------
    BadInput
        An item is none of these.
    """
    parts: list[str] = []
    for piece in (piece for item in items for piece in item.split(",")):
        if parts and not re.match(r"[^=]+=(?!=)", piece):  # a comma within a column's name
            parts[-1] += f",{piece}"
        else:
            parts.append(piece)
    sources: dict[str, str] = {}
    found: list[LabelSource] = []
    for part in parts:
        target, _, column = (text.strip() for text in part.partition("="))
        if not target or not column:
            raise BadInput(f"--columns: '{part}' is no TARGET=COLUMN, such as image_id=file_name or label:cancer=cancer")
        if target.lower().startswith(LABEL_PREFIX):
            found.append(_label(target[len(LABEL_PREFIX) :].strip(), column, part))
            continue
        target = fold(target)
        if target not in TARGETS:
            known = (*TARGETS, "label:NAME")
            raise BadInput(f"--columns: '{target}' is none of {', '.join(known)}{nearest(target, known)}")
        if sources.setdefault(target, column) != column:
            raise BadInput(f"--columns: '{target}' has two columns, '{sources[target]}' and '{column}'; give one")
    names = [name.strip() for item in labels for name in item.split(",") if name.strip()]
    found += [LabelSource(name.removeprefix(LABEL_PREFIX), name) for name in names]
    return ColumnMap(sources, tuple(found))


def _label(name: str, text: str, part: str) -> LabelSource:
    column, equals, values = (piece.strip() for piece in text.partition("=="))
    if not _LABEL_NAME.fullmatch(name):
        raise BadInput(f"--columns: '{part}': a label's name is letters, digits and '_', such as label:cancer=cancer")
    if name.endswith("*") and equals:
        raise BadInput(f"--columns: '{part}': give label:{name}=COLUMN, without a value, for one label a value")
    wanted = tuple(value.strip() for value in values.split("|")) if equals else ()
    if equals and not all(wanted):
        raise BadInput(f"--columns: '{part}' names no value behind '=='; give label:NAME=COLUMN==VALUE")
    return LabelSource(name, column, wanted)


def _value(cell: str) -> str:
    """Return what two spellings of a value have in common: case, and ``.0`` behind a whole number."""
    return re.sub(r"^(\d+)\.0+$", r"\1", cell.strip().casefold())


def sure_labels(frame: pd.DataFrame, columns: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """Tell which columns are labels: those of 0, 1 and empty cells whose name is not that of something else.

    Returns
    -------
    labels, others
        The columns, and why each other one is none.

    Raises
    ------
    BadInput
        A column that must be a label by its name, such as ``mass``, holds 0 or 1 in one row and something else in another.
    """
    labels: list[str] = []
    others: dict[str, str] = {}
    for column in columns:
        cells = frame[column].str.lower()
        wrong = ~cells.isin(BINARY)
        words = set(re.split(r"[\W_\d]+", fold(column)))
        if wrong.any():
            if fold(column) in _LABELS and cells[cells != ""].isin(BINARY).any():
                binary(frame, column)
            others[column] = f"'{frame.loc[wrong, column].iloc[0]}'"
        elif (cells == "").all():
            others[column] = "empty"
        elif words & _NO_LABELS:
            others[column] = "by its name"
        else:
            labels.append(column)
    return labels, others


def split_names(column: pd.Series) -> pd.Series:
    """Return splits as ``train``, ``val`` or ``test`` where they are other words for these, in any case."""
    words = {word: split for split, others in SPLIT_WORDS.items() for word in (split, *others)}
    return column.map(lambda cell: words.get(cell.strip().lower(), cell))
