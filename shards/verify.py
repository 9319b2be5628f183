"""Checking a shard directory byte by byte and pixel by pixel."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

from common.errors import BadInput, first_line
from common.files import sha256_file
from common.progress import progress
from shards.archive import Sample, check_index, read_index
from shards.codecs import NUMBER_EXTENSION, decode, encode_number, pixel_crc32
from shards.reading import ShardSet
from shards.tables import read_shard_table


def verify_shards(shards: ShardSet) -> list[str]:
    """Check every tar, index and sample of a directory against the tables written with them.

    Returns
    -------
    list of str
        One line a fault, naming the shard and, where the fault lies in a sample, the sample; empty where all is well.
    """
    faults = []
    for shard in progress(shards.meta["shards"], "verifying", "shard"):
        faults += _shard_faults(shards, shard)
    return faults


def _shard_faults(shards: ShardSet, shard: dict[str, Any]) -> Iterator[str]:
    name = shard["name"]
    try:
        tiles, _, metadata = read_shard_table(shards.directory / f"{name}.parquet")
    except BadInput as error:
        yield f"{name}: {error}"
        return
    if metadata["config_hash"] != shards.preprocessing["shard_config_hash"]:
        yield f"{name}: was built with other options than shards.json says"
    if not len(tiles):
        return
    tar = shards.directory / f"{name}.tar"
    index_path = tar.with_suffix(".idx")
    try:
        index = read_index(index_path)
        check_index(tar, index)
    except BadInput as error:
        yield f"{name}: {error}"
        return
    if sha256_file(index_path) != metadata["idx_sha256"]:
        yield f"{name}: {index_path.name} is not the index that was written (sha256 differs)"
    tar_changed = sha256_file(tar) != metadata["tar_sha256"]
    rows = tiles.to_pylist()
    if len(rows) != len(index):
        yield f"{name}: the index has {len(index)} samples, the table {len(rows)} tiles"
        return
    named = False
    with tar.open("rb") as file:
        for row, sample in zip(rows, index, strict=True):
            payloads = {}
            for member in sample:
                file.seek(member.offset)
                payloads[member.extension] = file.read(member.size)
            if fault := _sample_fault(row, sample, payloads, shards.codec):
                named = True
                yield f"{name}: sample {row['key']}: {fault}"
    if tar_changed and not named:
        yield f"{name}: {tar.name} is not the tar that was written (sha256 differs, outside the tiles' bytes)"


def _sample_fault(row: dict[str, Any], sample: Sample, payloads: dict[str, bytes], codec: str) -> str | None:
    """Return what is wrong with a sample, or None."""
    if any(member.name.partition(".")[0] != row["key"] for member in sample):
        return f"the index names {sample[0].name} in its place"
    if codec not in payloads or NUMBER_EXTENSION not in payloads:
        return f"lacks .{codec} or .{NUMBER_EXTENSION}"
    if payloads[NUMBER_EXTENSION] != encode_number(row["tile"]):
        return "its tile number differs from the table's"
    if zlib.crc32(payloads[codec]) != row["payload_crc32"]:
        return f"the bytes of its .{codec} changed"
    try:
        pixels = decode(payloads[codec], codec)
    except Exception as error:  # whatever the decoder raises is a fault of this sample
        return f"does not decode ({first_line(error)})"
    return None if pixel_crc32(pixels) == row["crc32"] else "its pixels changed"
