"""Shard directories of any size for the tests of inference: the tiles of a small real set, dealt to new shards."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np

from mammostream.common.files import sha256_file
from mammostream.shards.archive import read_index, tile_key, write_archive
from mammostream.shards.build.build import encode_meta
from mammostream.shards.build.merge import finish
from mammostream.shards.codecs import decode, encode, encode_number, pixel_crc32
from mammostream.shards.reading import ShardSet
from mammostream.shards.tables import read_shard_metadata, write_shard_table


def read_tiles(shards: ShardSet) -> list[np.ndarray]:
    """Return all tiles of a directory."""
    found = []
    for shard in shards.shards():
        data = shard.tar.read_bytes()
        for sample in read_index(shard.index):
            member = next(m for m in sample if m.extension == shards.codec)
            found.append(decode(data[member.offset : member.offset + member.size], member.extension))
    return found


def write_set(
    source: ShardSet, directory: Path, counts: tuple[int, ...], codec: str = "tif", tiles: list[np.ndarray] | None = None
) -> Path:
    """Write a directory with a shard for each count, of this many tiles and two films of one patient.

    Parameters
    ----------
    source
        Whose record and tiles the new shards have.
    directory
        Where they go.
    counts
        Tiles by shard; 0 makes a shard that has no tar.
    codec
        Of the new tiles.
    tiles
        The tiles to take in turn; None: the source's.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tiles = tiles or read_tiles(source)
    known = read_shard_metadata(source.tables / f"{source.meta['shards'][0]['name']}.parquet")
    for ordinal, count in enumerate(counts):
        name = f"val-{ordinal:06d}"
        images = [
            {"image_id": f"f{ordinal}{side}", "patient_id": f"p{ordinal // 2}", "split": "val", "laterality": side}
            | {"view": "CC", "shard": name, "reason": "" if count else "no breast found", "flags": "", "kept": count // 2}
            for side in "LR"
        ]
        rows, samples = [], []
        for position in range(count):
            tile = tiles[(7 * ordinal + position) % len(tiles)]
            image = images[position % 2]
            row = {"tile": ordinal * 2**20 + position, "key": tile_key(image["image_id"], position, 0), "shard": name}
            row |= {"image_id": image["image_id"], "patient_id": image["patient_id"], "split": "val"}
            row |= {"x": 0, "y": position, "size": len(tile)}
            data = encode(tile, codec)
            rows.append(row | {"crc32": pixel_crc32(decode(data, codec)), "payload_crc32": zlib.crc32(data)})
            members = [(codec, data), ("num", encode_number(row["tile"])), ("json", encode_meta(row))]
            samples.append((row["key"], members))
        metadata = known | {"split": "val", "tiles": count, "images": 2, "counts": [["val", len(counts)]], "codec": codec}
        metadata |= {"tar_sha256": None, "idx_sha256": None, "tar_bytes": None}
        if count:
            tar = directory / f"{name}.tar"
            write_archive(tar, samples)
            hashes = {f"{kind}_sha256": sha256_file(tar.with_suffix(f".{kind}")) for kind in ("tar", "idx")}
            metadata |= hashes | {"tar_bytes": tar.stat().st_size}
        write_shard_table(directory / f"{name}.parquet", rows, images, metadata)
    finish(directory)
    return directory
