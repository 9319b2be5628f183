"""Checking a shard directory byte by byte and pixel by pixel, and taking what is damaged out of it."""

from __future__ import annotations

import json
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow.parquet as pq

from mammostream.common.buckets import BucketPath
from mammostream.common.errors import BadInput, first_line
from mammostream.common.files import make_folder, sha256_file
from mammostream.common.progress import progress
from mammostream.common.temporaries import scratch_folder
from mammostream.shards.archive import Member, Sample, check_index, read_index, sample_key
from mammostream.shards.build.build import encode_meta
from mammostream.shards.build.launch import ALONE, Launcher
from mammostream.shards.build.leave_out import leave_out, read_or_scan_index
from mammostream.shards.build.merge import describe_directory, describe_shard, merge_tables
from mammostream.shards.codecs import META_EXTENSION, NUMBER_EXTENSION, decode, encode_number, pixel_crc32
from mammostream.shards.lock import ALL, lock_shards
from mammostream.shards.reading import SHARDS_JSON, ShardSet
from mammostream.shards.tables import (
    IMAGE_SCHEMA,
    TILE_SCHEMA,
    has_columns_of,
    is_as_written,
    read_merged,
    read_shard_table,
    same_rows,
)

# What an interrupted check has found so far; a finished one removes it.
_RECORD = ".verify.jsonl"
_SUFFIXES = (".tar", ".idx", ".parquet")


@dataclass(frozen=True)
class Fault:
    """Something wrong in a directory: with a shard or a merged table, or with one sample of a shard."""

    place: str  # the shard's or table's name
    what: str
    key: str = ""  # the sample's key, where the fault is a sample's

    def __str__(self) -> str:
        return f"{self.place}: sample {self.key}: {self.what}" if self.key else f"{self.place}: {self.what}"


@dataclass(frozen=True)
class _Job:
    """A shard to check, and what shards.json says of it and of all."""

    directory: Path | BucketPath
    folder: Path  # where its files are read: the directory, or where a bucket's are fetched into
    shard: dict[str, Any]
    config_hash: str
    codec: str
    decoding: bool


def verify_shards(shards: ShardSet, launcher: Launcher = ALONE, *, decoding: bool = True) -> list[Fault]:
    """Check every tar, index, table and sample of a directory.

    Compared are the checksums of tars and indexes, every index entry with the tar, every payload's checksum, number and
    description, the decoded pixels' checksums, and the directory's tables with the shards' own. A check that was stopped goes
    on with the shards that are left, unless they changed since.

    Parameters
    ----------
    shards
        The directory.
    launcher
        Who checks; a shard at a time.
    decoding
        Decode every tile; otherwise only bytes are compared.

    Returns
    -------
    list of Fault
        In the order of the shards; empty where all is well.
    """
    with _at_hand(shards) as folder:
        return _verify(shards, folder, launcher, decoding)


@contextmanager
def _at_hand(shards: ShardSet) -> Iterator[Path]:
    """Give the folder that is read: the directory, or of a bucket a new one with its tables, which gets the shards in turn."""
    if isinstance(shards.directory, Path):
        yield shards.directory
        return
    make_folder(shards.tables)
    with scratch_folder(shards.tables) as folder:
        for name in ("tiles.parquet", "images.parquet"):
            (shards.directory / name).fetch(Path(folder) / name)
        yield Path(folder)


def _verify(shards: ShardSet, folder: Path, launcher: Launcher, decoding: bool) -> list[Fault]:
    directory, entries = shards.directory, shards.meta["shards"]
    jobs = [
        _Job(directory, folder, entry, shards.preprocessing["shard_config_hash"], shards.codec, decoding) for entry in entries
    ]
    record = shards.tables / _RECORD
    found = _resumed(record, jobs)
    todo = {job.shard["name"]: job for job in jobs if job.shard["name"] not in found}
    sizes = {entry["name"]: entry["tar_bytes"] or 0 for entry in entries}
    with progress(None, "verifying", "B", total=sum(sizes.values()), initial=sum(sizes[name] for name in found)) as bar:
        bar.unit_scale = True
        for name, faults in launcher.run(_check_shard, list(todo.values())):
            found[name] = faults
            _record(record, todo[name], faults)
            bar.update(sizes[name])
    faults = [fault for entry in entries for fault in found[entry["name"]]] + list(_merged_faults(shards, folder))
    if record.is_file():
        record.unlink()
    return faults


def _resumed(path: Path, jobs: Sequence[_Job]) -> dict[str, list[Fault]]:
    """Return what a stopped check found of shards that are still as they were."""
    found: dict[str, list[Fault]] = {}
    by_name = {job.shard["name"]: job for job in jobs}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
            job = by_name[record["shard"]]
        except (ValueError, KeyError):  # the line that was being written
            continue
        if record["stamp"] == _stamp(job) and record["decoding"] >= job.decoding:
            found[record["shard"]] = [Fault(**fault) for fault in record["faults"]]
    return found


def _record(path: Path, job: _Job, faults: list[Fault]) -> None:
    line = {"shard": job.shard["name"], "stamp": _stamp(job), "decoding": job.decoding, "faults": [asdict(f) for f in faults]}
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    except OSError:  # a directory that may only be read is checked all the same, in one go
        pass


def _stamp(job: _Job) -> list[Any]:
    """Return what changes with a shard's files, with tiles.parquet, and with the record of it in shards.json."""
    paths = [*(job.directory / f"{job.shard['name']}{suffix}" for suffix in _SUFFIXES), job.directory / "tiles.parquet"]
    stats = [path.stat() if path.is_file() else None for path in paths]
    return [*([s.st_size, s.st_mtime_ns] if s else None for s in stats), json.dumps(job.shard, sort_keys=True)]


def _check_shard(job: _Job) -> tuple[str, list[Fault]]:
    name = job.shard["name"]
    if isinstance(job.directory, Path):
        return name, [Fault(name, *fault) for fault in _shard_faults(job)]
    paths = [job.folder / f"{name}{suffix}" for suffix in _SUFFIXES]
    try:
        for path in paths:
            (job.directory / path.name).fetch(path)
        said = [(what.replace(str(job.folder), str(job.directory)), *key) for what, *key in _shard_faults(job)]
        return name, [Fault(name, *fault) for fault in said]
    finally:
        paths[0].unlink(missing_ok=True)  # the tar: there need be room for those under way only


def _shard_faults(job: _Job) -> Iterator[tuple[str, ...]]:
    """Yield ``(what,)`` for each fault of the shard and ``(what, key)`` for each fault of a sample."""
    name = job.shard["name"]
    try:
        tiles, images, metadata = read_shard_table(job.folder / f"{name}.parquet")
    except BadInput as error:
        yield (str(error),)
        return
    if metadata["config_hash"] != job.config_hash:
        yield ("was built with other options than shards.json says",)
        return
    if not is_as_written(job.folder / f"{name}.parquet", tiles, images):
        yield ("its own table has other columns than were written, or something in cells that are empty",)
    if describe_shard(name, metadata) != job.shard:
        yield ("shards.json disagrees with its own table",)
    if not len(tiles):
        return
    try:
        same = same_rows(read_merged(job.folder / "tiles.parquet", TILE_SCHEMA, "", shard=name), tiles)
    except BadInput:
        same = False
    if not same:
        yield ("tiles.parquet says otherwise of its tiles than its own table",)
    tar = job.folder / f"{name}.tar"
    index_path = tar.with_suffix(".idx")
    try:
        index = read_index(index_path)
        check_index(tar, index)
    except BadInput as error:
        yield (str(error),)
        return
    if sha256_file(index_path) != metadata["idx_sha256"]:
        yield (f"{index_path.name} is not the index that was written (sha256 differs)",)
    tar_changed = sha256_file(tar) != metadata["tar_sha256"]
    faults = list(_sample_faults(tar, index, tiles.to_pylist(), job.codec, job.decoding))
    yield from faults
    if tar_changed and not faults:
        yield (f"{tar.name} is not the tar that was written (sha256 differs, outside the tiles' bytes)",)


def _sample_faults(
    tar: Path, index: Sequence[Sample], rows: list[dict[str, Any]], codec: str, decoding: bool
) -> Iterator[tuple[str, str]]:
    by_key = {sample_key(sample): sample for sample in index}
    with tar.open("rb", buffering=0) as file:
        for row in rows:
            sample = by_key.pop(row["key"], None)
            fault = "the index does not have it" if sample is None else _sample_fault(file, row, sample, codec, decoding)
            if fault:
                yield fault, row["key"]
    for key in by_key:
        yield "the index has it, the table does not", key


def _sample_fault(file: IO[bytes], row: dict[str, Any], sample: Sample, codec: str, decoding: bool) -> str | None:
    """Return what is wrong with a sample, or None."""
    payloads = {}
    for member in sample:
        file.seek(member.offset - tarfile.BLOCKSIZE)
        data = memoryview(file.read(tarfile.BLOCKSIZE + member.size))
        if not _is_header_of(data[: tarfile.BLOCKSIZE], member):
            return f"the tar does not have {member.name} where the index says"
        payloads[member.extension] = data[tarfile.BLOCKSIZE :]
    if set(payloads) != {codec, NUMBER_EXTENSION, META_EXTENSION}:
        return f"has .{', .'.join(payloads)}, not .{codec}, .{NUMBER_EXTENSION}, .{META_EXTENSION}"
    if payloads[NUMBER_EXTENSION] != encode_number(row["tile"]):
        return "its tile number differs from the table's"
    if payloads[META_EXTENSION] != encode_meta(row):
        return f"its .{META_EXTENSION} differs from the table"
    if zlib.crc32(payloads[codec]) != row["payload_crc32"]:
        return f"the bytes of its .{codec} changed"
    if not decoding:
        return None
    try:
        pixels = decode(bytes(payloads[codec]), codec)
    except Exception as error:  # whatever the decoder raises is a fault of this sample
        return f"does not decode ({first_line(error)})"
    return None if pixel_crc32(pixels) == row["crc32"] else "its pixels changed"


def _is_header_of(block: memoryview, member: Member) -> bool:
    try:
        info = tarfile.TarInfo.frombuf(bytes(block), tarfile.ENCODING, "strict")
    except (tarfile.HeaderError, UnicodeError):
        return False
    # Longer names stand in a header of their own before this one, which has their beginning.
    return info.size == member.size and info.name == member.name[: tarfile.LENGTH_NAME]


def _merged_faults(shards: ShardSet, folder: Path) -> Iterator[Fault]:
    """Compare images.parquet and shards.json with the shards' own tables; unreadable ones of those are named already."""
    try:
        merged = read_merged(folder / "images.parquet", IMAGE_SCHEMA, "build again")
    except BadInput as error:
        yield Fault("images.parquet", str(error).replace(str(folder), str(shards.directory)))
        return
    for path, schema in ((folder / "tiles.parquet", TILE_SCHEMA), (folder / "images.parquet", IMAGE_SCHEMA)):
        with suppress(OSError, ValueError):  # said already
            if not has_columns_of(pq.read_schema(path), schema):
                yield Fault(path.name, "has other columns than were written")
    first, described = 0, False
    for entry in shards.meta["shards"]:
        its_rows = merged.slice(first, entry["images"])
        first += entry["images"]
        try:
            path = folder / f"{entry['name']}.parquet"
            if isinstance(shards.directory, BucketPath) and not path.is_file():  # checked in an earlier run
                (shards.directory / path.name).fetch(path)
            _, images, metadata = read_shard_table(path)
        except BadInput:
            continue
        if not described and metadata["config_hash"] == shards.preprocessing["shard_config_hash"]:
            described = True
            said = describe_directory(metadata)
            wrong = [name for name in sorted({*said, *shards.meta} - {"shards"}) if said.get(name) != shards.meta.get(name)]
            if wrong:
                yield Fault(SHARDS_JSON, f"says otherwise than the shards' own tables of: {', '.join(wrong)}")
        if not same_rows(its_rows, images):
            yield Fault("images.parquet", f"says otherwise of the films of {entry['name']} than its own table")
    if first != len(merged):
        yield Fault("images.parquet", f"has {len(merged)} films, the shards have {first}")


def quarantine(shards: ShardSet, faults: Sequence[Fault]) -> list[Fault]:
    """Take damaged samples out of the indexes and tables of a directory; the tars stay as they are.

    What is left are whole samples, which loaders and a later check read without fault. The WebDataset library reads tars
    without an index and still meets the damaged samples.

    Parameters
    ----------
    shards
        The directory.
    faults
        What :func:`verify_shards` found there.

    Returns
    -------
    list of Fault
        The samples left out, with the reason; every one that a damaged or missing tar took along is named.

    Raises
    ------
    BadInput
        A shard's own table is damaged or of another build: only building it again mends that. Nothing was changed then.
    """
    directory = shards.folder
    places = {fault.place for fault in faults}
    left_out: list[Fault] = []
    with lock_shards(directory, ALL):
        tables = {}
        for name in (entry["name"] for entry in shards.meta["shards"] if entry["name"] in places):
            tables[name] = read_shard_table(directory / f"{name}.parquet")
            if tables[name][2]["config_hash"] != shards.preprocessing["shard_config_hash"]:
                raise BadInput(f"{name} was built with other options than the rest; delete its .parquet and build it again")
        for name, (tiles, images, metadata) in tables.items():
            left_out += _quarantine_shard(
                directory / f"{name}.tar", tiles.to_pylist(), images.to_pylist(), metadata, shards.codec
            )
        merge_tables(directory, demanded=())
    return left_out


def _quarantine_shard(
    tar: Path, rows: list[dict[str, Any]], images: list[dict[str, Any]], metadata: dict[str, Any], codec: str
) -> list[Fault]:
    """Rewrite one shard's index and table to its whole samples; return those left out."""
    if not tar.is_file():
        index, facts, lost = [], {}, {row["key"]: f"{tar.name} is missing" for row in rows}
    else:
        size = tar.stat().st_size
        index = [s for s in read_or_scan_index(tar, metadata) if all(m.offset + m.size <= size for m in s)]
        facts = {"tar_sha256": sha256_file(tar), "tar_bytes": size}
        lost = {key: what for what, key in _sample_faults(tar, index, rows, codec, decoding=True)}
    kept = [row for row in rows if row["key"] not in lost]
    films = {row["image_id"] for row in rows if row["key"] in lost}
    images = [_flagged(image) if image["image_id"] in films else image for image in images]
    if lost:
        facts["quarantined"] = metadata.get("quarantined", {}) | lost
    leave_out(tar, index, kept, images, metadata | facts)
    return [Fault(tar.stem, what, key) for key, what in lost.items() if key in {row["key"] for row in rows}]


def _flagged(image: dict[str, Any]) -> dict[str, Any]:
    flags = image["flags"].split()
    return image | {"flags": " ".join([*flags, *({"quarantined"} - set(flags))])}
