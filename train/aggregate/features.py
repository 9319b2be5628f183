"""Features of tiles as a memory-mapped array, made once from the table that ``embed`` writes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from mammostream.common.errors import BadInput, first_line
from mammostream.common.files import sha256_json, whole_file, write_json
from mammostream.common.progress import progress

_COLUMN = "features"
_IDENTITY = ["key", "image_id", "patient_id", "split", "x", "y", "size", "reason"]
_MEND = "make it with 'mammostream embed'"


@dataclass(frozen=True)
class Features:
    """Features of N tiles.

    Attributes
    ----------
    values
        (N, D) float16, mapped into memory: only what is used is read.
    tiles
        One row per tile, in the same order: ``key``, ``image_id``, ``patient_id``, ``split``, ``x``, ``y``, ``size``.
    unread
        ``image_id`` and ``reason`` of tiles that could not be read and have no features.
    facts
        What they were made by: ``model_sha256``, ``inputs_sha256`` (of the shards and split), ``precision``, ``preprocessing``;
        and ``fitted_on``: whom the backbone was fitted on (:func:`mammostream.shards.identity.seen_by`).
    """

    values: np.ndarray
    tiles: pd.DataFrame
    unread: pd.DataFrame
    facts: dict[str, Any]

    @property
    def fitted_on(self) -> dict[str, list[str]]:
        """Whom the backbone was fitted on; empty in tables of versions that did not write it down."""
        return self.facts.get("fitted_on") or {}

    @property
    def dim(self) -> int:
        """D."""
        return self.values.shape[1]


def open_features(path: Path) -> Features:
    """Open a table of features; its first opening writes them beside it as float16, in parts, which needs little memory.

    Parameters
    ----------
    path
        The Parquet file of ``embed``. The array is ``<path>.f16.npy``, with ``<path>.f16.json`` saying of which file it is.

    Raises
    ------
    BadInput
        No such file, no table of features, or features too large for float16.
    """
    if not path.is_file():
        raise BadInput(f"features {path} does not exist; {_MEND}")
    try:
        table = pq.ParquetFile(path)
        facts = json.loads((table.schema_arrow.metadata or {})[b"mammostream"])
        columns = table.schema_arrow.names
        dim = table.schema_arrow.field(_COLUMN).type.list_size
        tiles = table.read(_IDENTITY).to_pandas()
        model, inputs = facts["model_sha256"], facts["inputs_sha256"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"features {path} is no table of features ({first_line(error)}); {_MEND}") from error
    stat = path.stat()
    source = {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "of": sha256_json([model, inputs, columns])}
    good = (tiles["reason"] == "").to_numpy()
    if not good.any():
        raise BadInput(f"features {path} has no tile that could be read; {_MEND}")
    array, record = (path.with_name(f"{path.name}.f16.{ending}") for ending in ("npy", "json"))
    shape = int(good.sum()), dim
    values = _mapped(array, shape) if _is_of(record, source) else None
    if values is None:
        record.unlink(missing_ok=True)
        _write(table, array, *shape, path)
        write_json(record, source)
        values = np.load(array, mmap_mode="r")
    known = tiles[good].drop(columns="reason").reset_index(drop=True)
    return Features(values, known, tiles.loc[~good, ["image_id", "reason"]], facts)


def _mapped(array: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """Return the array, or None where it is not there or cut short."""
    try:
        values = np.load(array, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return values if values.shape == shape and values.dtype == np.float16 else None


def _is_of(record: Path, source: dict[str, Any]) -> bool:
    try:
        return json.loads(record.read_text(encoding="utf-8")) == source
    except (OSError, ValueError):
        return False


def _write(table: pq.ParquetFile, array: Path, rows: int, dim: int, path: Path) -> None:
    """Copy the features of tiles that could be read, a batch of rows at a time."""
    with whole_file(array) as temporary, progress(None, "reading features", "tile", table.metadata.num_rows) as bar:
        values = np.lib.format.open_memmap(temporary, "w+", np.float16, (rows, dim))
        done = 0
        for batch in table.iter_batches(8192, columns=[_COLUMN]):
            column = batch.column(0)
            good = column.filter(column.is_valid())
            part = pa.array(good).flatten().to_numpy(zero_copy_only=False).reshape(-1, dim)
            if done + len(part) > rows:
                raise BadInput(f"features {path} has features of tiles that have a reason to have none; {_MEND}")
            with np.errstate(over="ignore"):
                values[done : done + len(part)] = part
            if not np.isfinite(values[done : done + len(part)]).all():
                raise BadInput(f"features {path} has values that are no numbers or above 65504: they do not fit float16")
            done += len(part)
            bar.update(len(batch))
        if done != rows:  # else the last rows would stay 0
            raise BadInput(f"features {path} has features of {done} tiles, but {rows} without a reason to have none; {_MEND}")
        values.flush()
        del values
