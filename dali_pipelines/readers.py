"""What a pipeline reads: shards or tile image files, all of them or a subset, checked before DALI opens them.

DALI maps its files into memory and trusts the index: an entry past the end of its tar crashes the process. So every index
is checked here first.

A tile number is unique only within its shard directory. Where shards of several directories are read together, a loader
returns ``directory * DIRECTORY_STRIDE + tile``, where directories are counted from 0 in the order of the given shards. For a
single directory it is the tile number itself. ``divmod(number, DIRECTORY_STRIDE)`` splits it.
"""

from __future__ import annotations

import re
import resource
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types

from mammostream.common.buckets import SCHEME, BucketPath
from mammostream.common.errors import BadInput, first_line
from mammostream.common.temporaries import scratch_folder
from mammostream.shards.archive import Member, Sample, check_index, read_index, write_index
from mammostream.shards.codecs import CODECS, NUMBER_EXTENSION, decode, decode_number
from mammostream.shards.reading import Shard

READER = "reader"  # the name of the reader node in every graph
DIRECTORY_STRIDE = 2**40  # a shard's ordinal and a tile's position in its shard are both below 2^20
_NUMBER_BYTES = 8
# How DALI names a sample in an error message: "path of the tar:offset:member" or "path of the image".
_NAMED = re.compile(r"sample #\d+ : (?P<info>[^\n]+)")


@dataclass(frozen=True)
class ShardSource:
    """Tars with the indexes of the samples to read.

    Attributes
    ----------
    tars, indexes
        Paths, one index per tar.
    count
        Number of samples that the indexes list.
    raw_bits
        Bits per pixel of ``raw`` tiles, which need no decoder; None for all other codecs.
    directories
        Directory number of each tar, by path; empty if there is only one directory.
    listed
        Tile numbers of each index's samples, in their order; only for a subset.
    temporary
        The directory of indexes made for a subset; it is deleted with this object.
    """

    tars: list[str]
    indexes: list[str]
    count: int
    raw_bits: int | None
    directories: dict[str, int]
    listed: list[np.ndarray] = field(default_factory=list)
    temporary: TemporaryDirectory | None = None

    resizes = False  # a shard's tiles all have the same size

    @property
    def file_count(self) -> int:
        """Number of files that are read."""
        return len(self.tars)

    @property
    def bucket(self) -> str | None:
        """The first tar that is in a bucket, or None."""
        return next((tar for tar in self.tars if tar.startswith(SCHEME)), None)

    @property
    def label_count(self) -> int:
        """Number of labels that :meth:`nodes` returns."""
        return 2 if self.directories else 1

    def nodes(self, *, shuffle: bool, initial_fill: int, **options: Any) -> tuple[Any, list[Any]]:
        """Return DALI nodes ``(encoded tile, labels)``: uint8 bytes; the int64 tile number and, if there are several
        directories, uint8 characters that name the tar.

        With `shuffle`, the tars come in a new order each epoch and their samples are mixed in a buffer of `initial_fill`.
        `options` are passed to the DALI reader.
        """
        data, number = fn.readers.webdataset(  # type: ignore[misc]  # its stub allows for graphs without outputs
            paths=self.tars,
            index_paths=self.indexes,
            ext=[";".join(CODECS), NUMBER_EXTENSION],
            dtypes=[types.UINT8, types.INT64],
            missing_component_behavior="error",
            name=READER,
            shuffle_after_epoch=shuffle,
            random_shuffle=shuffle,
            initial_fill=initial_fill,
            **options,
        )
        number = fn.reshape(number, shape=[])
        return data, [number, fn.get_property(data, key="source_info")] if self.directories else [number]

    def numbers(self, numbers: Any, infos: Any = None) -> torch.Tensor:
        """Return a batch's numbers, int64 (N,), from the labels of :meth:`nodes`."""
        tiles = torch.from_dlpack(numbers.as_tensor())
        if infos is None:
            return tiles
        tars = (bytes(np.asarray(infos[i])).decode().rsplit(":", 2)[0] for i in range(len(infos)))
        return tiles + torch.tensor([self.directories[tar] for tar in tars]) * DIRECTORY_STRIDE

    def blame(self, error: str, reason: str) -> str:
        """Return a message that names the tile DALI could not read, from `error` and `reason` (one line), and how to fix it.

        If DALI did not name the sample, all headers are read again. That takes time, but the run is over anyway.
        """
        named = _NAMED.search(error)
        found = None if named else _first_that_is_no_image(self)
        if named:
            tar, _, member = named["info"].rsplit(":", 2)
        elif found is not None:
            tar, member = self._member(found)
        else:
            others = f" or of the {len(self.tars) - 1} other shards" if len(self.tars) > 1 else ""
            return f"a tile of shard {self.tars[0]}{others} cannot be read ({reason}); {_mend(self.tars[0])}"
        return f"tile {member.partition('.')[0]} of shard {tar} cannot be decoded; {_mend(tar)}"

    def _member(self, position: int) -> tuple[str, str]:
        """Return the tar and the member's name of the sample at a position in the concatenated indexes."""
        for tar, index_path in zip(self.tars, self.indexes, strict=True):
            index = read_index(Path(index_path))
            if position < len(index):
                return tar, index[position][0].name
            position -= len(index)
        raise IndexError(position)


@dataclass(frozen=True)
class FileSource:
    """Tile image files; a tile's number is its position in the caller's list.

    Attributes
    ----------
    files
        Paths of the files to read.
    positions
        Their positions in the caller's list.
    """

    files: list[str]
    positions: list[int]

    resizes = True  # files may have any size
    raw_bits = None
    bucket = None
    label_count = 1

    @property
    def count(self) -> int:
        """Number of files."""
        return len(self.files)

    file_count = count

    def nodes(self, *, shuffle: bool, initial_fill: int, **options: Any) -> tuple[Any, list[Any]]:
        """Return DALI nodes ``(encoded tile, labels)``: uint8 bytes; the int64 number.

        With `shuffle`, the whole list comes in a new order each epoch, so `initial_fill` has no effect.
        """
        data, number = fn.readers.file(
            files=self.files, labels=self.positions, name=READER, shuffle_after_epoch=shuffle, **options
        )
        return data, [fn.reshape(fn.cast(number, dtype=types.INT64), shape=[])]

    def numbers(self, numbers: Any) -> torch.Tensor:
        """Return a batch's numbers, int64 (N,)."""
        return torch.from_dlpack(numbers.as_tensor())

    def blame(self, error: str, reason: str) -> str:
        """Return a message that names the file DALI could not read, from `error` and `reason` (one line), and how to fix it."""
        named = _NAMED.search(error)
        found = None if named else _first_that_is_no_image(self)
        if named is None and found is None:
            return f"one of {self.files[0]} … {self.files[-1]} could not be read ({reason}); check the disk and try again"
        path = named["info"] if named else self.files[found or 0]
        return f"{path} is not a readable image; replace it or take it out of the list"


@pipeline_def
def _peek_pipeline(source: ShardSource | FileSource) -> Any:
    return fn.peek_image_shape(source.nodes(shuffle=False, initial_fill=1)[0])


def _first_that_is_no_image(source: ShardSource | FileSource) -> int | None:
    """Return the position of the first payload that DALI does not recognise as an image, or None."""
    # One per batch, in order: the number of batches before the failure is the position of the payload.
    pipeline = _peek_pipeline(source, batch_size=1, num_threads=1, device_id=None)
    for done in range(source.count):
        try:
            pipeline.run()
        except RuntimeError:
            return done
    return None


def _mend(tar: str) -> str:
    return f"run 'mammostream shards verify --quarantine {tar.rpartition('/')[0]}'"


def allow_open_files(count: int) -> None:
    """Let this process hold `count` more files open, as DALI does with every tar that it does not map into memory.

    Raises
    ------
    BadInput
        The system does not allow this many.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + len(list(Path("/proc/self/fd").iterdir())) + 64  # libraries open some as well
    if soft >= needed or soft == resource.RLIM_INFINITY:
        return
    if hard < needed and hard != resource.RLIM_INFINITY:
        raise BadInput(
            f"reading {count} shards without memory maps needs {needed} open files and the system allows {hard}; raise it "
            "('ulimit -Hn'), use memory maps, or build fewer, larger shards (--images-per-shard)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def open_source(
    source: Sequence[Shard] | Sequence[str | Path], *, tile_size: int, tiles: Iterable[int] | None = None
) -> ShardSource | FileSource:
    """Check shards or files and choose what to read of them.

    Parameters
    ----------
    source
        Shards, of one directory or of several, or paths of tile images.
    tile_size
        Edge of the shards' tiles in pixels; files of any size are resized to it.
    tiles
        Numbers of the tiles to read; None reads all.

    Raises
    ------
    BadInput
        The source is empty; a file is missing; a shard is damaged, holds tiles of another size or is not a shard of this
        project; raw tiles are mixed with others; a number of `tiles` is not found.
    """
    wanted = None if tiles is None else np.unique(np.fromiter(tiles, dtype=np.int64))
    items = list(source)
    if not items or (wanted is not None and not wanted.size):
        raise BadInput("there are no tiles to read; check the shards or images and the labels that choose among them")
    shards = [item for item in items if isinstance(item, Shard)]
    if shards:
        return _open_shards(shards, tile_size, wanted)
    return _open_files([Path(item) for item in items if not isinstance(item, Shard)], wanted)


def _open_files(paths: list[Path], wanted: np.ndarray | None) -> FileSource:
    numbers = np.arange(len(paths)) if wanted is None else wanted
    if numbers[0] < 0 or numbers[-1] >= len(paths):
        raise BadInput(f"tile numbers {numbers[0]} to {numbers[-1]} do not fit the {len(paths)} images given")
    chosen = [paths[i] for i in numbers]
    for path in chosen:
        # In DALI these would fail later, with a message about memory maps.
        if not path.is_file() or path.stat().st_size == 0:
            raise BadInput(f"image {path} does not exist or is empty; check the path")
    return FileSource([str(path) for path in chosen], numbers.tolist())


def _open_shards(shards: list[Shard], tile_size: int, wanted: np.ndarray | None) -> ShardSource:
    temporary = None if wanted is None else scratch_folder()
    order = {directory: number for number, directory in enumerate(dict.fromkeys(shard.tar.parent for shard in shards))}
    tars: list[str] = []
    numbered: list[int] = []  # directory number of each tar
    stored: dict[int, int | None] = {}  # directory number -> bits per pixel of raw tiles, or None
    indexes: list[str] = []
    listed: list[np.ndarray] = []  # tile numbers of each index, of a subset
    count = 0
    for shard in shards:
        index = read_index(shard.index)
        check_index(shard.tar, index)
        _check_members(shard.tar, index)
        directory = order[shard.tar.parent]
        index_path = shard.index
        if wanted is not None and temporary is not None:
            numbers = tile_numbers(shard.tar, index) + directory * DIRECTORY_STRIDE
            chosen = np.flatnonzero(np.isin(numbers, wanted))
            index = [index[i] for i in chosen]
            index_path = Path(temporary.name) / f"{len(tars):06d}.idx"
            if index:
                write_index(index_path, index)
                listed.append(numbers[chosen])
        if not index:
            continue
        if directory not in stored:
            stored[directory] = _check_first_tile(shard.tar, index[0], tile_size)
        if (bits := stored[directory]) is not None:
            _check_raw_sizes(shard.tar, index, tile_size, bits)
        tars.append(str(shard.tar))
        numbered.append(directory)
        indexes.append(str(index_path))
        count += len(index)
    if wanted is not None and count != wanted.size:
        raise BadInput(
            f"{wanted.size - count} of the {wanted.size} tiles wanted are in none of the {len(shards)} shards given, such as "
            f"{shards[0].tar}; check that the labels belong to these shards and this split"
        )
    if not count:
        raise BadInput(f"{shards[0].tar} and the {len(shards) - 1} other shards given hold no tiles; choose another split")
    if len(set(stored.values())) > 1:
        raise BadInput(
            "raw tiles cannot be read together with tiles of other codecs or of another --bit-depth; build these directories "
            f"alike: {', '.join(map(str, order))}"
        )
    directories = dict(zip(tars, numbered, strict=True)) if any(numbered) else {}
    return ShardSource(tars, indexes, count, next(iter(stored.values())), directories, listed, temporary)


def tile_numbers(tar: Path | BucketPath, index: Sequence[Sample]) -> np.ndarray:
    """Return the tile numbers of a tar's samples in the order of `index`: int64 (N,).

    Numbers are consecutive, so the first and the last give them all, unless samples were removed from the index.
    """
    if not index:
        return np.zeros(0, dtype=np.int64)
    with tar.open("rb") as file:

        def number(sample: Sample) -> int:
            return decode_number(_read(file, _member_of(sample, (NUMBER_EXTENSION,))))

        first, last = number(index[0]), number(index[-1])
        if last - first == len(index) - 1:
            return np.arange(first, last + 1, dtype=np.int64)
        return np.array([number(sample) for sample in index], dtype=np.int64)


def _check_members(tar: Path | BucketPath, index: Sequence[Sample]) -> None:
    """Check that each sample has a tile and a number; DALI would fail later, without naming the sample."""
    for sample in index:
        image, number = _member(sample, tuple(CODECS)), _member(sample, (NUMBER_EXTENSION,))
        if image is None or number is None:
            have = ", ".join(member.extension for member in sample)
            raise BadInput(
                f"{tar} has a sample without .{' or .'.join(CODECS) if image is None else NUMBER_EXTENSION} (it has: {have}): "
                "it is not a shard of this project; make one with 'mammostream shards build'"
            )
        if not image.size or number.size != _NUMBER_BYTES:
            wrong = number if image.size else image
            raise BadInput(f"{wrong.name} of shard {tar} has {wrong.size} bytes; {_mend(str(tar))}")


def _check_raw_sizes(tar: Path | BucketPath, index: Sequence[Sample], tile_size: int, bits: int) -> None:
    expected = tile_size * tile_size * bits // 8
    for sample in index:
        member = _member_of(sample, tuple(CODECS))
        if member.size != expected:
            raise BadInput(f"{member.name} of shard {tar} has {member.size} bytes, not {expected}; {_mend(str(tar))}")


def _check_first_tile(tar: Path | BucketPath, sample: Sample, tile_size: int) -> int | None:
    """Decode one tile of a directory on the host, so that a wrong size or format gives one clear line, not a DALI error.

    Returns the bits per pixel of a raw tile, None for other codecs.
    """
    member = _member_of(sample, tuple(CODECS))
    with tar.open("rb") as file:
        data = _read(file, member)
    try:
        tile = decode(data, member.extension)
    except Exception as error:  # every codec has its own exceptions
        raise BadInput(
            f"tile {member.name.partition('.')[0]} of shard {tar} cannot be decoded ({first_line(error)}); {_mend(str(tar))}"
        ) from error
    if tile.shape != (tile_size, tile_size):
        size = "×".join(map(str, tile.shape))
        raise BadInput(f"{tar} holds tiles of {size} pixels, not {tile_size}×{tile_size}; set --tile-size")
    return 8 * tile.itemsize if member.extension == "raw" else None


def _member(sample: Sample, extensions: tuple[str, ...]) -> Member | None:
    return next((member for member in sample if member.extension in extensions), None)


def _member_of(sample: Sample, extensions: tuple[str, ...]) -> Member:
    """Return the member of a sample that :func:`_check_members` found to be there."""
    return next(member for member in sample if member.extension in extensions)


def _read(file: Any, member: Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)
