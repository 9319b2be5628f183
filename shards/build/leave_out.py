"""Taking samples out of a finished shard: its index and table are written again, its tar stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mammostream.common.errors import BadInput
from mammostream.common.files import sha256_file
from mammostream.shards.archive import Sample, read_index, sample_key, scan_archive, write_index
from mammostream.shards.tables import write_shard_table


def read_or_scan_index(tar: Path, metadata: dict[str, Any]) -> list[Sample]:
    """Return the index of a shard that was written, or what the tar's headers say where it is missing or changed."""
    path = tar.with_suffix(".idx")
    intact = path.is_file() and sha256_file(path) == metadata.get("idx_sha256")
    return read_index(path) if intact else scan_archive(tar)


def leave_out(
    tar: Path,
    index: Sequence[Sample],
    kept: list[dict[str, Any]],
    images: list[dict[str, Any]],
    metadata: dict[str, Any],
) -> None:
    """Write the index and the table of a shard anew, with some of its samples.

    The table is written last: an interruption before it leaves a shard whose index :func:`read_or_scan_index` no longer trusts.

    Parameters
    ----------
    tar
        The shard's tar.
    index
        Of at least the samples kept.
    kept
        The tile rows (:data:`mammostream.shards.tables.TILE_SCHEMA`) that stay.
    images
        All image rows (:data:`mammostream.shards.tables.IMAGE_SCHEMA`), as they are to be now.
    metadata
        As it is to be now; the number of tiles and the index's checksum are put in here.

    Raises
    ------
    BadInput
        The index lacks a sample.
    """
    by_key = {sample_key(sample): sample for sample in index}
    if missing := [row["key"] for row in kept if row["key"] not in by_key]:
        raise BadInput(f"{tar} is damaged: it has no sample {missing[0]}; see 'mammostream shards verify' and build it again")
    metadata = metadata | {"tiles": len(kept)}
    if kept:
        path = tar.with_suffix(".idx")
        write_index(path, [by_key[row["key"]] for row in kept])
        metadata["idx_sha256"] = sha256_file(path)
    else:
        for name in ("idx_sha256", "tar_sha256", "tar_bytes"):
            metadata.pop(name, None)
    write_shard_table(tar.with_suffix(".parquet"), kept, images, metadata)
