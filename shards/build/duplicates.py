"""Films with the same pixels: which one counts as the film, which are its copies, and whether two patients share one."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pyarrow as pa

from mammostream.common.errors import BadInput
from mammostream.shards.identity import spelling

FLAG = "duplicate"
_LISTED = 5


def mark_duplicates(images: pa.Table) -> pa.Table:
    """Flag films that have the pixels of an earlier one, and say of which.

    Parameters
    ----------
    images
        Image rows (:data:`mammostream.shards.tables.IMAGE_SCHEMA`) in the order of their shards. Films that gave no tile, such
        as empty ones, are copies of nothing. Marking twice changes nothing.
    """
    rows = images.select(["image_id", "pixels_hash", "kept", "flags", "remarks"]).to_pylist()
    first: dict[str, str] = {}
    marked = False
    for row in rows:
        if not row["kept"] or not row["pixels_hash"]:
            continue
        original = first.setdefault(row["pixels_hash"], row["image_id"])
        if original != row["image_id"] and FLAG not in row["flags"].split():
            row["flags"] = f"{row['flags']} {FLAG}".strip()
            row["remarks"] = "; ".join(filter(None, (row["remarks"], f"{FLAG}: has the pixels of {original}")))
            marked = True
    if not marked:
        return images
    for name in ("flags", "remarks"):
        at = images.schema.get_field_index(name)
        images = images.set_column(at, images.schema.field(name), pa.array([row[name] for row in rows], pa.string()))
    return images


def refuse_shared_films(images: pd.DataFrame, directory: Path) -> None:
    """Refuse films that are there under two patients, who may be one person in two splits.

    Raises
    ------
    BadInput
        There are such films.
    """
    known = images[(images["kept"] > 0) & images["pixels_hash"].notna() & (images["patient_id"].fillna("") != "")]
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
