"""Tiles of a shard or of image files for prediction, in order; what cannot be read is left out, with its reason."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import compress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image

from mammostream.common.buckets import BucketPath, LostConnection, Patience
from mammostream.common.errors import BadInput, first_line
from mammostream.common.temporaries import scratch_folder
from mammostream.dali_pipelines import LabelledLoader, create_inference_transform
from mammostream.shards.archive import Member, Sample, read_index, sample_key, write_index
from mammostream.shards.codecs import CODECS, NUMBER_EXTENSION, decode
from mammostream.shards.reading import Shard

_SEARCHED = 4  # batches after the last good one that are searched for a bad tile: DALI reads some ahead
_NUMBER_BYTES = 8
_BLOCK = 512


class _ReadableTiles:
    """Yields ``(items, tiles, numbers)`` batch by batch: N items, a tensor (N, 1, H, W) on the device, N tile numbers.

    DALI gives up on a batch with a tile that it cannot read. That batch is looked at tile by tile, the bad ones are left out,
    and the reading resumes from there. A bucket's server that goes away is waited for
    (:class:`mammostream.common.buckets.Patience`).

    Parameters
    ----------
    options
        Those of :class:`dali_pipelines.LabelledLoader`.

    Attributes
    ----------
    faults
        Item's name -> reason, of each that was left out so far.
    """

    def __init__(self, **options: Any) -> None:
        self.faults: dict[str, str] = {}
        self._options = options
        self._left: list[Any] = []
        self._loader: LabelledLoader | None = None

    def __iter__(self) -> Iterator[tuple[list[str], torch.Tensor, torch.Tensor]]:
        patience = Patience()
        while self._left:
            try:
                try:
                    for tiles, numbers in self._loader or self._open(self._left):
                        patience.restore()
                        yield [self._name(item) for item in self._left[: len(tiles)]], tiles, numbers
                        self._left = self._left[len(tiles) :]
                except LostConnection:
                    raise
                except BadInput as error:
                    self._leave_out(error)
            except LostConnection as error:
                patience.wait(error)
            self._loader = None

    def _begin(self, source: Sequence[Any]) -> None:
        """Let the first batches be read; what fails now fails again when they are asked for."""
        try:
            self._loader = self._load(source)
            self._loader.start()
        except BadInput:
            self._loader = None

    def _leave_out(self, error: BadInput) -> None:
        """Take the next items that cannot be read out of those that are left; raise `error` where none is found."""
        batch = self._options["batch_size"]
        for start in range(0, min(len(self._left), _SEARCHED * batch), batch):
            window = self._left[start : start + batch]
            bad = self._damaged(window) or self._refused(window)
            if bad:
                self.faults |= bad
                self._left = [item for item in self._left if self._name(item) not in bad]
                return
        raise error

    def _refused(self, items: Sequence[Any]) -> dict[str, str]:
        """Let DALI read items one by one and return the reasons of those that it cannot."""
        bad = {}
        for item in items:
            try:
                next(iter(self._open([item], batch_size=1, num_threads=1)))
            except LostConnection:
                raise
            except BadInput:
                bad[self._name(item)] = f"{self._name(item)} cannot be decoded"
        return bad

    def _load(self, source: Sequence[Any], **options: Any) -> LabelledLoader:
        return LabelledLoader(source, rank=0, world_size=1, **(self._options | options))

    def _name(self, item: Any) -> str:
        raise NotImplementedError

    def _open(self, items: Sequence[Any], **options: Any) -> LabelledLoader:
        raise NotImplementedError

    def _damaged(self, items: Sequence[Any]) -> dict[str, str]:
        """Decode items on the host, one by one, and return the reasons of those that it cannot."""
        raise NotImplementedError


class ShardTiles(_ReadableTiles):
    """The tiles of a shard by key; its index or tar may be damaged, cut short or missing.

    A tar on a disk is read once before DALI opens it, and tiles whose bytes changed are left out: decoders make pixels of some
    damage. Of a tar in a bucket, which would have to be transferred twice, only the length is checked. The first batches are
    being read when it is made, and it may be made in another thread.

    Parameters
    ----------
    shard
        The shard.
    checksums
        Key -> CRC-32 of the encoded tile.
    options
        Those of :class:`dali_pipelines.LabelledLoader`.

    Attributes
    ----------
    fault
        Why none of the shard's tiles can be read; empty where some can.
    """

    def __init__(self, shard: Shard, checksums: Mapping[str, int], **options: Any) -> None:
        super().__init__(**options)
        self.fault = ""
        self._shard = shard
        self._temporary: TemporaryDirectory | None = None
        try:
            index = read_index(shard.index)
            self._left = self._whole(index, checksums)
        except LostConnection:
            raise
        except BadInput as error:
            self.fault = str(error)
        except FileNotFoundError:
            self.fault = f"shard {shard.tar} does not exist"
        else:
            if len(self._left) == len(index):
                self._begin([shard])

    def _name(self, item: Sample) -> str:
        return sample_key(item)

    def _open(self, items: Sequence[Sample], **options: Any) -> LabelledLoader:
        """Open a loader over some of the samples only, by an index of them."""
        self._temporary = self._temporary or scratch_folder()
        path = Path(self._temporary.name) / f"{len(items)}.idx"
        write_index(path, items)
        return self._load([Shard(self._shard.tar, path, self._shard.split, len(items))], **options)

    def _whole(self, index: Sequence[Sample], checksums: Mapping[str, int]) -> list[Sample]:
        """Return the samples that lie in the tar with all they need, unchanged; the others get their reason."""
        tar = self._shard.tar
        size = tar.stat().st_size
        faults = {sample_key(sample): _fault(sample, size, self._options["tile_size"]) for sample in index}
        whole = [sample for sample in index if not faults[sample_key(sample)]]
        if not isinstance(tar, BucketPath):
            with tar.open("rb", buffering=0) as file, ThreadPoolExecutor(self._options.get("num_threads")) as threads:
                # Reading and zlib release Python's lock.
                changed = threads.map(partial(_is_changed, file.fileno(), checksums), whole)
                for sample in compress(whole, changed):
                    faults[sample_key(sample)] = f"the bytes of {_tile(sample).name} changed since it was built"
        self.faults |= {key: f"shard {tar}: {fault}" for key, fault in faults.items() if fault}
        return [sample for sample in index if not faults[sample_key(sample)]]

    def _damaged(self, items: Sequence[Sample]) -> dict[str, str]:
        if not self._shard.tar.is_file():  # removed since it was opened
            return {sample_key(sample): f"shard {self._shard.tar} does not exist" for sample in items}
        bad = {}
        with self._shard.tar.open("rb") as file:
            for sample in items:
                member = _tile(sample)
                file.seek(member.offset)
                data = file.read(member.size)
                try:
                    shape = decode(data, member.extension).shape
                    fault = "" if shape == (self._options["tile_size"],) * 2 else f"has {'×'.join(map(str, shape))} pixels"
                except Exception as error:  # every codec has its own exceptions
                    fault = f"cannot be decoded ({first_line(error)})"
                if fault:
                    bad[sample_key(sample)] = f"shard {self._shard.tar}: {member.name} {fault}"
        return bad


class FileTiles(_ReadableTiles):
    """Tile images by path."""

    def __init__(self, paths: Sequence[Path], **options: Any) -> None:
        super().__init__(**options)
        for path in paths:
            if path.is_file() and path.stat().st_size:
                self._left.append(path)
            else:
                self.faults[str(path)] = f"image {path} does not exist or is empty"

    def _name(self, item: Path) -> str:
        return str(item)

    def _open(self, items: Sequence[Path], **options: Any) -> LabelledLoader:
        return self._load(items, **options)

    def _damaged(self, items: Sequence[Path]) -> dict[str, str]:
        transform = create_inference_transform()
        bad = {}
        for path in items:
            try:
                with Image.open(path) as image:
                    transform(image)
            except Exception as error:  # as many kinds as there are formats
                bad[str(path)] = f"image {path} cannot be decoded ({first_line(error)})"
        return bad


def _fault(sample: Sample, size: int, tile_size: int) -> str:
    """Return what a sample lacks in a tar of `size` bytes, in words; empty where it is whole."""
    members = {member.extension: member for member in sample}
    if NUMBER_EXTENSION not in members or not members.keys() & CODECS.keys():
        return "the tile or its number is missing"
    tile = _tile(sample)
    if members[NUMBER_EXTENSION].size != _NUMBER_BYTES or not tile.size:
        return "the tile or its number is empty"
    if tile.extension == "raw" and tile.size not in (tile_size**2, 2 * tile_size**2):
        return f"{tile.name} has {tile.size} bytes, which is no tile of {tile_size} pixels"
    for member in sample:
        if member.offset < _BLOCK or member.offset + member.size > size:
            return f"the tar was cut short to {size} bytes: {member.name} is not in it"
    return ""


def _is_changed(file: int, checksums: Mapping[str, int], sample: Sample) -> bool:
    """Return whether the bytes of a sample's tile are not those of its checksum, where there is one."""
    tile, key = _tile(sample), sample_key(sample)
    return key in checksums and zlib.crc32(os.pread(file, tile.size, tile.offset)) != checksums[key]


def _tile(sample: Sample) -> Member:
    return next(member for member in sample if member.extension in CODECS)
