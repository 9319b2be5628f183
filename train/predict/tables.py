"""Tables of predictions, written row group by row group as Parquet, CSV or JSON: none is ever whole in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from mammostream.common.files import whole_file
from mammostream.train.levels.aggregation import PROBABILITY, TOP_TILES, score_columns

METADATA_KEY = "mammostream"
FEATURES = "features"
FORMATS = ("parquet", "csv", "json")
_SIDE = {"laterality": pa.string(), "view": pa.string()}


def tile_schema(class_names: Sequence[str], feature_dim: int = 0) -> pa.Schema:
    """Return the columns of a tile table.

    ``x``, ``y`` and ``size`` are in native pixels, null for tiles that came as image files; ``seen`` says what the model was
    fitted on the tile's patient for (``trained``, ``validated``, ``pre-trained``, or empty); ``reason`` says why a tile has no
    probabilities, and is empty where it has; ``features`` are there where they were asked for.
    """
    fields = [(name, pa.string()) for name in ("key", "image_id", "patient_id", "split")]
    fields += [(name, pa.int32()) for name in ("x", "y", "size")]
    fields += [(PROBABILITY + name, pa.float32()) for name in class_names]
    fields += [("seen", pa.string())] if class_names else []
    fields += [("reason", pa.string())]
    return pa.schema(fields + ([(FEATURES, pa.list_(pa.float32(), feature_dim))] if feature_dim else []))


def image_schema(class_names: Sequence[str], top: int = TOP_TILES) -> pa.Schema:
    """Return the columns of an image table; ``seen`` and ``reason`` are as in :func:`tile_schema`."""
    fields = [(name, pa.string()) for name in ("image_id", "patient_id", "split")]
    fields += [("tiles", pa.int64()), *_score_fields(class_names, top), *_SIDE.items()]
    return pa.schema([*fields, ("failed_tiles", pa.int64()), ("seen", pa.string()), ("reason", pa.string())])


def breast_schema(class_names: Sequence[str], top: int = TOP_TILES) -> pa.Schema:
    """Return the columns of a breast table: ``images`` it was predicted from, those that failed, and as in the others."""
    fields = [(name, pa.string()) for name in ("patient_id", "laterality")]
    counts = [(name, pa.int64()) for name in ("images", "failed_images")]
    fields += [("tiles", pa.int64()), *_score_fields(class_names, top), *counts]
    return pa.schema([*fields, ("seen", pa.string()), ("reason", pa.string())])


def as_table(frame: pd.DataFrame, schema: pa.Schema) -> pa.Table:
    """Return a frame as an Arrow table of a schema; columns that it lacks are null."""
    columns = [
        pa.nulls(len(frame), field.type)
        if field.name not in frame
        else pa.array(list(frame[field.name]), field.type)
        if pa.types.is_fixed_size_list(field.type)
        else pa.array(frame[field.name], field.type, from_pandas=True)
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


class TableWriter:
    """A table that is written in parts, whole or not at all.

    A context: on success the file is there, on an error there is none.

    Parameters
    ----------
    path
        Its ending is one of :data:`FORMATS`.
    schema
        The columns.
    facts
        What is written next to the rows: into the metadata of Parquet, the head of JSON; a CSV has no place for it.
    rows_name
        What JSON calls the rows.
    """

    def __init__(self, path: Path, schema: pa.Schema, facts: Mapping[str, Any], rows_name: str) -> None:
        self.path, self.rows = path, 0
        self._schema, self._facts, self._rows_name = schema, facts, rows_name

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            temporary = stack.enter_context(whole_file(self.path))
            kind = self.path.suffix
            if kind == ".parquet":
                schema = self._schema.with_metadata({METADATA_KEY: json.dumps(self._facts, sort_keys=True)})
                self._writer = stack.enter_context(pq.ParquetWriter(temporary, schema, compression="zstd"))
            elif kind == ".csv":
                self._writer = stack.enter_context(pa.csv.CSVWriter(temporary, self._schema))
            else:
                self._writer = stack.enter_context(JsonWriter(temporary, self._facts, self._rows_name))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def write(self, frame: pd.DataFrame | pa.Table) -> None:
        """Add rows."""
        table = frame if isinstance(frame, pa.Table) else as_table(frame, self._schema)
        self.rows += len(table)
        if len(table):
            self._writer.write_table(table.replace_schema_metadata(self._metadata()))

    def _metadata(self) -> Mapping[bytes, bytes] | None:
        return self._writer.schema.metadata if self.path.suffix == ".parquet" else None


class JsonWriter:
    """A JSON object of facts, of which there is one at least, and a list of rows, one line per row."""

    def __init__(self, path: Path, facts: Mapping[str, Any], rows_name: str) -> None:
        self._path, self._facts, self._name = path, facts, rows_name

    def __enter__(self) -> Self:
        self._file = self._path.open("w", encoding="utf-8")
        head = json.dumps(self._facts, indent=2, sort_keys=True, allow_nan=False)
        self._file.write(head.removesuffix("\n}") + f",\n  {json.dumps(self._name)}: [")
        self._separator = "\n"
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.write("\n  ]\n}\n")
        self._file.close()

    def write_table(self, table: pa.Table) -> None:
        """Add the rows of a table, their probabilities by class."""
        for row in table.to_pylist():
            self.write_row(_json_row(row))

    def write_row(self, row: Mapping[str, Any]) -> None:
        """Add a row."""
        self._file.write(f"{self._separator}    {json.dumps(row, allow_nan=False)}")
        self._separator = ",\n"


def _json_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row as JSON has it: what is not there is left out, the probabilities of a tile are gathered by class."""
    known = {name: value for name, value in row.items() if value is not None and not _is_nan(value)}
    scores = {name.removeprefix(PROBABILITY): value for name, value in known.items() if name.startswith(PROBABILITY)}
    rest = {name: value for name, value in known.items() if not name.startswith(PROBABILITY)}
    return rest | ({"probabilities": scores} if scores else {})


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _score_fields(class_names: Sequence[str], top: int) -> list[tuple[str, pa.DataType]]:
    return [(column, pa.float64()) for name in class_names for column in score_columns(name, top)]
