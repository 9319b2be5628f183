"""Films with the same pixels: the first counts, its copies are flagged and give no tiles; two patients may not share one."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pyarrow as pa

from mammostream.common.errors import BadInput
from mammostream.shards.build.leave_out import leave_out, read_or_scan_index
from mammostream.shards.identity import spelling
from mammostream.shards.tables import read_shard_table

FLAG = "duplicate"
_LISTED = 5


def mark_duplicates(images: pa.Table) -> pa.Table:
    """Flag films that have the pixels of an earlier one, say of which, and count their tiles as rejected.

    Parameters
    ----------
    images
        Image rows (:data:`mammostream.shards.tables.IMAGE_SCHEMA`) in the order of their shards. Films that gave no tile, such
        as empty ones, are copies of nothing. Marking twice changes nothing.
    """
    kept = [name for name in images.schema.names if name.startswith("kept")]
    changed = [*kept, "rejected_duplicate", "flags", "remarks"]
    rows = images.select(["image_id", "pixels_hash", *changed]).to_pylist()
    first: dict[str, str] = {}
    for row in rows:
        if not row["kept"] or not row["pixels_hash"]:
            continue
        original = first.setdefault(row["pixels_hash"], row["image_id"])
        if original != row["image_id"]:
            row["flags"] = f"{row['flags']} {FLAG}".strip()
            row["remarks"] = "; ".join(filter(None, (row["remarks"], f"{FLAG}: has the pixels of {original}")))
            row["rejected_duplicate"] = row["kept"]
            row |= dict.fromkeys(kept, 0)
    for name in changed:
        at, field = images.schema.get_field_index(name), images.schema.field(name)
        images = images.set_column(at, field, pa.array([row[name] for row in rows], field.type))
    return images


def leave_out_copies(table: Path, images: pa.Table) -> None:
    """Take the tiles of a shard's copies out of its index and table; its tar stays as it is.

    The WebDataset library reads tars without an index and still meets these tiles.

    Parameters
    ----------
    table
        The shard's table.
    images
        Its image rows, marked by :func:`mark_duplicates`.
    """
    tiles, _, metadata = read_shard_table(table)
    rows = images.to_pylist()
    films = {row["image_id"] for row in rows if row["kept"]}
    tar = table.with_suffix(".tar")
    kept = [tile for tile in tiles.to_pylist() if tile["image_id"] in films]
    leave_out(tar, read_or_scan_index(tar, metadata), kept, rows, metadata)


def refuse_shared_films(images: pd.DataFrame, directory: Path) -> None:
    """Refuse films that are there under two patients, who may be one person in two splits.

    Raises
    ------
    BadInput
        There are such films.
    """
    known = images[
        (images["kept"] + images["rejected_duplicate"].fillna(0) > 0)
        & images["pixels_hash"].notna()
        & (images["patient_id"].fillna("") != "")
    ]
    known = known.assign(patient=known["patient_id"].map(spelling))
    shared = known.groupby("pixels_hash")["patient"].transform("nunique") > 1
    pairs = [
        " and ".join(f"'{row.image_id}' of patient '{row.patient_id}' ({row.split})" for row in films.head(3).itertuples())
        for _, films in known[shared].groupby("pixels_hash", sort=False)
    ]
    if pairs:
        shown = "; ".join(pairs[:_LISTED]) + (f"; and {len(pairs) - _LISTED} more" if len(pairs) > _LISTED else "")
        raise BadInput(
            f"{len(pairs)} films of {directory} are there under two patients with the same pixels: {shown}; one person under "
            "two ids may be in two splits: correct the ids or leave films out and prepare again, or give --allow-leakage"
        )
