"""What a pipeline reads: shards or tile image files, all of them or a subset, checked before DALI opens them.

DALI maps its files into memory and trusts an index: an entry past the end of its tar crashes the process. So every index
is checked here first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from nvidia.dali import fn, types

from common.errors import BadInput, first_line
from shards.archive import Member, Sample, check_index, read_index, write_index
from shards.codecs import CODECS, NUMBER_EXTENSION, decode, decode_number
from shards.reading import Shard

READER = "reader"  # the name of the reader node in every graph
_VERIFY = "run 'mammostream shards verify' on its directory"


@dataclass(frozen=True)
class ShardSource:
    """Tars with the indexes of the samples wanted.

    Attributes
    ----------
    tars, indexes
        Paths, one index a tar.
    count
        Number of samples that the indexes list.
    temporary
        The directory of indexes made for a subset; it goes with this object.
    """

    tars: list[str]
    indexes: list[str]
    count: int
    temporary: TemporaryDirectory | None = None

    resizes = False  # a shard's tiles have the size they were cut to

    def nodes(self, *, shuffle: bool, initial_fill: int, **options: Any) -> tuple[Any, Any]:
        """Return DALI nodes ``(encoded tile, number)``: uint8 bytes and an int64 (1,) tile number.

        Shuffled means: the tars in a new order each epoch, their samples mixed in a buffer of `initial_fill`.
        `options` are those that all DALI readers share.
        """
        return tuple(
            fn.readers.webdataset(
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
        )

    def blame(self) -> str:
        """Say where a tile that DALI could not read lies, as far as that is known."""
        more = f" or the {len(self.tars) - 1} other shards read with it" if len(self.tars) > 1 else ""
        return f"a tile of {self.tars[0]}{more} cannot be read or decoded; {_VERIFY}"


@dataclass(frozen=True)
class FileSource:
    """Tile image files; a tile's number is its position in the list that the caller gave.

    Attributes
    ----------
    files
        Paths of the files wanted.
    numbers
        Their positions in the caller's list.
    """

    files: list[str]
    numbers: list[int]

    resizes = True  # files may have any size

    @property
    def count(self) -> int:
        """Number of files."""
        return len(self.files)

    def nodes(self, *, shuffle: bool, initial_fill: int, **options: Any) -> tuple[Any, Any]:
        """Return DALI nodes ``(encoded tile, number)``: uint8 bytes and an int32 (1,) number.

        Shuffled means: the whole list in a new order each epoch, so `initial_fill` plays no part.
        """
        return tuple(
            fn.readers.file(files=self.files, labels=self.numbers, name=READER, shuffle_after_epoch=shuffle, **options)
        )

    def blame(self) -> str:
        """Name the first file that DALI cannot decode; called after a failure, so the time does not matter."""
        from dali_pipelines.pipelines import count_readable

        readable = count_readable(self)
        if readable < self.count:
            return f"{self.files[readable]} is no readable image (PNG or TIFF); replace it or take it out of the list"
        return f"one of {self.files[0]} … {self.files[-1]} could not be read; check the disk and try again"


def open_source(
    source: Sequence[Shard] | Sequence[str | Path], *, tile_size: int, tiles: Iterable[int] | None = None
) -> ShardSource | FileSource:
    """Check shards or files and choose what to read of them.

    Parameters
    ----------
    source
        Shards, or paths of tile images.
    tile_size
        Edge of the shards' tiles in pixels; files of any size are resized to it.
    tiles
        The numbers of the only tiles to read; None reads all.

    Raises
    ------
    BadInput
        The source is empty; a file is missing; a shard is damaged, holds tiles of another size or no tiles of ours; a
        number of `tiles` is nowhere.
    """
    source = list(source)
    wanted = None if tiles is None else np.unique(np.fromiter(tiles, dtype=np.int64))
    if not source or (wanted is not None and not wanted.size):
        raise BadInput("there are no tiles to read; check the shards or images and the labels that choose among them")
    if isinstance(source[0], Shard):
        return _open_shards(source, tile_size, wanted)
    return _open_files([Path(path) for path in source], wanted)


def _open_files(paths: list[Path], wanted: np.ndarray | None) -> FileSource:
    numbers = np.arange(len(paths)) if wanted is None else wanted
    if numbers[0] < 0 or numbers[-1] >= len(paths):
        raise BadInput(f"tile numbers {numbers[0]} to {numbers[-1]} do not fit the {len(paths)} images given")
    chosen = [paths[i] for i in numbers]
    for path in chosen:
        # In DALI these would fail late, with a message about memory maps.
        if not path.is_file() or path.stat().st_size == 0:
            raise BadInput(f"image {path} does not exist or is empty; check the path")
    return FileSource([str(path) for path in chosen], numbers.tolist())


def _open_shards(shards: list[Shard], tile_size: int, wanted: np.ndarray | None) -> ShardSource:
    temporary = None if wanted is None else TemporaryDirectory(prefix="mammostream-indexes-")
    tars: list[str] = []
    indexes: list[str] = []
    count = 0
    for shard in shards:
        index = read_index(shard.index)
        check_index(shard.tar, index)
        index_path = shard.index
        if wanted is not None:
            chosen = np.flatnonzero(np.isin(tile_numbers(shard.tar, index), wanted))
            index = [index[i] for i in chosen]
            index_path = Path(temporary.name) / f"{len(tars):06d}.idx"
            if index:
                write_index(index_path, index)
        if not index:
            continue
        if not tars:
            _check_first_tile(shard.tar, index[0], tile_size)
        tars.append(str(shard.tar))
        indexes.append(str(index_path))
        count += len(index)
    if wanted is not None and count != wanted.size:
        raise BadInput(
            f"{wanted.size - count} of the {wanted.size} tiles wanted are in none of the {len(shards)} shards given, such as "
            f"{shards[0].tar}; check that the labels belong to these shards and this split"
        )
    if not count:
        raise BadInput(f"{shards[0].tar} and the {len(shards) - 1} other shards given hold no tiles; choose another split")
    return ShardSource(tars, indexes, count, temporary)


def tile_numbers(tar: Path, index: Sequence[Sample]) -> np.ndarray:
    """Return the tile numbers of a tar's samples in the order of `index`: int64 (N,).

    Numbers follow each other, so the first and the last tell them all, unless samples were taken out of the index.
    """
    if not index:
        return np.zeros(0, dtype=np.int64)
    with tar.open("rb") as file:

        def number(sample: Sample) -> int:
            return decode_number(_read(file, _member(tar, sample, (NUMBER_EXTENSION,))))

        first, last = number(index[0]), number(index[-1])
        if last - first == len(index) - 1:
            return np.arange(first, last + 1, dtype=np.int64)
        return np.array([number(sample) for sample in index], dtype=np.int64)


def _check_first_tile(tar: Path, sample: Sample, tile_size: int) -> None:
    """Decode one tile of the source on the host: a wrong size or format then ends in one clear line, not in DALI."""
    member = _member(tar, sample, tuple(CODECS))
    _member(tar, sample, (NUMBER_EXTENSION,))
    with tar.open("rb") as file:
        data = _read(file, member)
    try:
        shape = decode(data, member.extension).shape
    except Exception as error:  # every codec has its own exceptions
        raise BadInput(f"{member.name} of {tar} cannot be decoded ({first_line(error)}); {_VERIFY}") from error
    if shape != (tile_size, tile_size):
        raise BadInput(f"{tar} holds tiles of {'×'.join(map(str, shape))} pixels, not {tile_size}×{tile_size}; set --tile-size")


def _member(tar: Path, sample: Sample, extensions: tuple[str, ...]) -> Member:
    for member in sample:
        if member.extension in extensions:
            return member
    have = ", ".join(member.extension for member in sample)
    raise BadInput(
        f"{tar} has a sample without .{' or .'.join(extensions)} (it has: {have}): it is no shard of this project; "
        "make one with 'mammostream shards build'"
    )


def _read(file: Any, member: Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)
