"""The tables of a shard directory: one row per tile, one row per image; and the per-shard file that holds both.

``<shard>.parquet`` carries both kinds of rows (column ``row`` tells them apart) and, as metadata, what the shard was built
with. It is written last, so that it alone marks the shard as finished. ``tiles.parquet``, ``images.parquet`` and
``shards.json`` are merges of these files in shard order and hold nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from mammostream.common.errors import BadInput, first_line
from mammostream.common.files import FACTS_KEY, write_parquet

TILE_SCHEMA = pa.schema(
    [
        ("tile", pa.int64()),  # shard ordinal * 2**20 + position in the tar
        ("key", pa.string()),
        ("shard", pa.string()),
        ("image_id", pa.string()),
        ("patient_id", pa.string()),
        ("split", pa.string()),
        ("x", pa.int32()),  # native pixels, left edge
        ("y", pa.int32()),  # native pixels, top edge
        ("size", pa.int32()),  # native pixels, edge length
        ("breast_ratio", pa.float32()),
        ("freq_energy", pa.float32()),
        ("mean_intensity", pa.float32()),
        ("nonzero_ratio", pa.float32()),
        ("pectoral_ratio", pa.float32()),  # share of the tile that is pectoral muscle
        ("rule", pa.string()),  # breast | frequency | both | rescue
        ("crc32", pa.uint32()),  # of the decoded pixels
        ("payload_crc32", pa.uint32()),  # of the encoded bytes
    ]
)

IMAGE_SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("patient_id", pa.string()),
        ("split", pa.string()),
        ("laterality", pa.string()),  # as the manifest has it
        ("view", pa.string()),
        ("shard", pa.string()),
        ("reason", pa.string()),  # why the image gave nothing; empty where it is fine
        ("flags", pa.string()),  # space-separated
        ("remarks", pa.string()),  # the particulars of flags that have any: "flag: particulars; ..."
        ("height", pa.int32()),  # native pixels
        ("width", pa.int32()),
        ("bits", pa.int32()),
        ("pixel_spacing_mm", pa.float64()),
        ("spacing_source", pa.string()),
        ("mapping", pa.string()),
        ("side", pa.string()),  # L | R, from where the tissue is
        ("segmentation", pa.string()),  # the method that gave the mask
        ("breast_area_mm2", pa.float64()),
        ("plausibility", pa.float64()),  # of the breast mask, 0-1
        ("fog_mm2", pa.float64()),  # cut off the mask as film fog
        ("pectoral_area_mm2", pa.float64()),  # of the pectoral muscle, which is part of the breast's; 0 where none was found
        ("candidates", pa.int32()),
        ("rejected_intensity", pa.int32()),
        ("rejected_nonzero", pa.int32()),
        ("rejected_rules", pa.int32()),
        ("rejected_pectoral", pa.int32()),
        ("rejected_limit", pa.int32()),
        ("rejected_duplicate", pa.int32()),  # kept at first, but the film is a copy of another
        ("kept", pa.int32()),
        ("kept_breast_only", pa.int32()),
        ("kept_frequency_only", pa.int32()),
        ("kept_both_rules", pa.int32()),
        ("kept_rescue", pa.int32()),  # off the grid, for clusters of specks that no other kept tile holds
        ("clusters", pa.int32()),  # of specks
        ("clusters_unheld", pa.int32()),  # that no kept tile holds
        ("guide_8bit_kept", pa.int32()),  # tiles that the guide's plain 8-bit scale would have kept
        ("lossy", pa.bool_()),  # whether the file's pixels were compressed with loss; null where it does not say
        ("pixels_hash", pa.string()),  # of the decoded pixels
    ]
)

# Since version 0.1.0, of tiles or images.
ADDED_COLUMNS = frozenset(
    {
        "remarks",
        "lossy",
        "pixels_hash",
        "plausibility",
        "fog_mm2",
        "pectoral_ratio",
        "pectoral_area_mm2",
        "rejected_pectoral",
        "rejected_duplicate",
    }
)

# Columns that have a value in every row.
_FILLED = frozenset(
    {"tile", "key", "shard", "image_id", "patient_id", "split", "crc32", "payload_crc32", "reason", "flags", "kept"}
)


def write_shard_table(path: Path, tiles: list[dict], images: list[dict], metadata: dict[str, Any]) -> None:
    """Write the table that marks a shard as finished."""
    table = _together(pa.Table.from_pylist(tiles, TILE_SCHEMA), pa.Table.from_pylist(images, IMAGE_SCHEMA))
    write_parquet(path, table, metadata)


def _together(tiles: pa.Table, images: pa.Table) -> pa.Table:
    """Return the rows of a shard's tiles and images as its table has them."""
    kinds = (("tile", tiles), ("image", images))
    parts = [table.add_column(0, "row", pa.array([kind] * len(table), pa.string())) for kind, table in kinds]
    return pa.concat_tables(parts, promote_options="default")


def read_shard_metadata(path: Path) -> dict[str, Any]:
    """Read what a shard was built with and what it came to, without its rows.

    Raises
    ------
    BadInput
        The file is not a shard table.
    """
    with _a_shard_table(path):
        return json.loads(pq.read_schema(path).metadata[FACTS_KEY])


def read_shard_table(path: Path) -> tuple[pa.Table, pa.Table, dict[str, Any]]:
    """Read a shard's tiles, images and metadata.

    Raises
    ------
    BadInput
        The file is not a shard table.
    """
    with _a_shard_table(path):
        table = pq.read_table(path)
        table.validate(full=True)
        metadata = json.loads(table.schema.metadata[FACTS_KEY])
        rows = table.column("row")
        # Without the whole table's metadata, which is one shard's.
        tiles, images = (
            with_schema(table.filter(pc.equal(rows, kind)), schema)
            for kind, schema in (("tile", TILE_SCHEMA), ("image", IMAGE_SCHEMA))
        )
    return tiles, images, metadata


def is_as_written(path: Path, tiles: pa.Table, images: pa.Table) -> bool:
    """Return whether a shard's table has the columns and types that it was written with, and nothing in cells that are empty.

    Parameters
    ----------
    path
        The table.
    tiles, images
        What :func:`read_shard_table` read of it.
    """
    found = pq.read_table(path).replace_schema_metadata()
    made = _together(tiles, images)
    return has_columns_of(found.schema, made.schema) and same_rows(found, made.select(found.column_names))


def has_columns_of(found: pa.Schema, schema: pa.Schema) -> bool:
    """Return whether a table's columns are those of a schema, in its order; earlier versions lack some."""
    wanted = [field for field in schema if field.name in found.names or field.name not in ADDED_COLUMNS]
    return found.remove_metadata().equals(pa.schema(wanted))


def same_rows(table: pa.Table, other: pa.Table) -> bool:
    """Return whether two tables have the same rows; NaN equals NaN."""
    # As text, since Arrow holds no NaN equal to another.
    return json.dumps(table.to_pylist()) == json.dumps(other.to_pylist())


def read_shard_images(path: Path) -> pa.Table:
    """Read a shard's images only.

    Raises
    ------
    BadInput
        The file is not a shard table.
    """
    with _a_shard_table(path):
        images = pq.read_table(path, filters=[("row", "=", "image")]).replace_schema_metadata()
        return with_schema(images, IMAGE_SCHEMA)


def read_merged(path: Path, schema: pa.Schema, mend: str, columns: Sequence[str] = (), shard: str | None = None) -> pa.Table:
    """Read ``tiles.parquet`` or ``images.parquet``, or some columns or one shard's rows of it.

    Parameters
    ----------
    path
        The file.
    schema
        :data:`TILE_SCHEMA` or :data:`IMAGE_SCHEMA`.
    mend
        What to do where it is missing or damaged, for the error.
    columns
        The columns to read; none reads all.
    shard
        Name of the shard whose rows are read; None reads all rows. Row groups of other shards are not read.

    Raises
    ------
    BadInput
        The file is missing or damaged, or a column or a value that every row must have is missing or of the wrong type.
    """
    if not path.is_file():
        raise BadInput(f"{path} does not exist; {mend}")
    wanted = pa.schema([schema.field(name) for name in columns]) if columns else schema
    rows = None if shard is None else pc.field("shard") == shard
    try:
        file = ds.dataset(path, format="parquet")
        table = file.to_table([name for name in wanted.names if name in file.schema.names], filter=rows)
        table.validate(full=True)  # text may be no UTF-8
        table = with_schema(table, wanted)
    except (OSError, ValueError, KeyError, TypeError, NotImplementedError) as error:
        raise BadInput(f"{path} is damaged ({first_line(error)}); {mend}") from error
    for name in wanted.names:
        if name in _FILLED and table.column(name).null_count:
            raise BadInput(f"{path} is damaged (column '{name}' has rows without a value); {mend}")
    return table


def with_schema(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return a table with a schema's columns; those that earlier versions did not write are null."""
    for field in schema:
        if field.name in ADDED_COLUMNS and field.name not in table.column_names:
            table = table.append_column(field, pa.nulls(table.num_rows, field.type))
    return table.select(schema.names).cast(schema)


@contextmanager
def _a_shard_table(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, NotImplementedError) as error:
        raise BadInput(f"{path} is no shard table ({first_line(error)}); delete it and build again") from error
