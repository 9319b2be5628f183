"""The tiles of one shard for prediction, in order; what cannot be read is left out, with its reason, and the rest comes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from common.buckets import LostConnection
from common.errors import BadInput, first_line
from dali_pipelines import LabelledLoader
from shards.archive import Member, Sample, read_index, sample_key, write_index
from shards.codecs import CODECS, NUMBER_EXTENSION, decode
from shards.reading import Shard

_SEARCHED = 4  # batches after the last good one that are searched for a bad tile: DALI reads some ahead
_NUMBER_BYTES = 8
_BLOCK = 512


class ShardTiles:
    """Yields ``(keys, tiles, numbers)`` batch by batch: N keys, a tensor (N, 1, H, W) on the device, N tile numbers.

    A batch that DALI cannot read is looked at sample by sample; the bad samples are left out of a temporary index, and the
    reading goes on from there.

    Parameters
    ----------
    shard
        The shard; its index or its tar may be damaged, cut short or missing.
    tile_size
        Edge of its tiles in pixels.
    options
        Those of :class:`dali_pipelines.LabelledLoader`.

    Attributes
    ----------
    faults
        Key -> reason, of each sample that was left out so far.
    fault
        Why none of the shard's tiles can be read; empty where some can.
    """

    def __init__(self, shard: Shard, tile_size: int, **options: Any) -> None:
        self.faults: dict[str, str] = {}
        self.fault = ""
        self._shard, self._tile_size, self._options = shard, tile_size, options
        self._left: list[Sample] = []
        self._temporary: TemporaryDirectory | None = None
        self._loader: LabelledLoader | None = None
        try:
            index = read_index(shard.index)
            self._left = self._whole(index)
        except LostConnection:
            raise
        except (BadInput, FileNotFoundError) as error:
            self.fault = str(error) if isinstance(error, BadInput) else f"shard {shard.tar} does not exist"
            return
        if len(self._left) == len(index):
            self._begin()

    def _begin(self) -> None:
        """Let the first batches be read; what fails now fails again when they are asked for."""
        try:
            self._loader = self._open(self._shard)
            self._loader.start()
        except LostConnection:
            raise
        except BadInput:
            self._loader = None

    def __iter__(self) -> Iterator[tuple[list[str], torch.Tensor, torch.Tensor]]:
        while self._left:
            try:
                for tiles, numbers in self._loader or self._open(self._of(self._left)):
                    keys = [sample_key(sample) for sample in self._left[: len(tiles)]]
                    yield keys, tiles, numbers
                    self._left = self._left[len(tiles) :]
            except LostConnection:
                raise
            except BadInput as error:
                self._leave_out(error)
            self._loader = None

    def _open(self, shard: Shard) -> LabelledLoader:
        return LabelledLoader([shard], tile_size=self._tile_size, rank=0, world_size=1, **self._options)

    def _of(self, samples: Sequence[Sample]) -> Shard:
        """Return the shard with some of its samples only."""
        self._temporary = self._temporary or TemporaryDirectory(prefix="mammostream-index-")
        path = Path(self._temporary.name) / f"{len(self.faults)}-{len(samples)}.idx"
        write_index(path, samples)
        return Shard(self._shard.tar, path, self._shard.split, len(samples))

    def _whole(self, index: Sequence[Sample]) -> list[Sample]:
        """Return the samples that lie in the tar with all they need; the others get their reason."""
        size = self._shard.tar.stat().st_size
        whole = []
        for sample in index:
            fault = _fault(sample, size, self._tile_size)
            if fault:
                self.faults[sample_key(sample)] = f"{fault} in shard {self._shard.tar}"
            else:
                whole.append(sample)
        return whole

    def _leave_out(self, error: BadInput) -> None:
        """Take the next samples that cannot be read out of those that are left; raise `error` where none is found."""
        batch = self._options["batch_size"]
        for start in range(0, min(len(self._left), _SEARCHED * batch), batch):
            window = self._left[start : start + batch]
            bad = self._damaged(window) or self._refused(window)
            if bad:
                self.faults |= bad
                self._left = [sample for sample in self._left if sample_key(sample) not in bad]
                return
        raise error

    def _damaged(self, samples: Sequence[Sample]) -> dict[str, str]:
        """Decode samples on the host, one by one, and return the reasons of those that it cannot."""
        bad = {}
        with self._shard.tar.open("rb") as file:
            for sample in samples:
                member = _tile(sample)
                file.seek(member.offset)
                data = file.read(member.size)
                try:
                    shape = decode(data, member.extension).shape
                    fault = "" if shape == (self._tile_size,) * 2 else f"has {'×'.join(map(str, shape))} pixels"
                except Exception as error:  # every codec has its own exceptions
                    fault = f"cannot be decoded ({first_line(error)})"
                if fault:
                    bad[sample_key(sample)] = f"{member.name} {fault} in shard {self._shard.tar}"
        return bad

    def _refused(self, samples: Sequence[Sample]) -> dict[str, str]:
        """Let DALI read samples one by one and return the reasons of those that it cannot."""
        bad = {}
        for sample in samples:
            try:
                options = self._options | {"batch_size": 1, "num_threads": 1}
                for _ in LabelledLoader([self._of([sample])], tile_size=self._tile_size, rank=0, world_size=1, **options):
                    break
            except LostConnection:
                raise
            except BadInput:
                bad[sample_key(sample)] = f"{_tile(sample).name} cannot be decoded in shard {self._shard.tar}"
        return bad


def _fault(sample: Sample, size: int, tile_size: int) -> str:
    """Return what a sample lacks in a tar of `size` bytes, in words; empty where it is whole."""
    members = {member.extension: member for member in sample}
    if NUMBER_EXTENSION not in members or not members.keys() & CODECS.keys():
        return "the tile or its number is missing"
    if members[NUMBER_EXTENSION].size != _NUMBER_BYTES or not _tile(sample).size:
        return "the tile or its number is empty"
    if _tile(sample).extension == "raw" and _tile(sample).size not in (tile_size**2, 2 * tile_size**2):
        return f"{_tile(sample).name} has {_tile(sample).size} bytes, too many or too few"
    for member in sample:
        if member.offset < _BLOCK or member.offset + member.size > size:
            return f"the tar was cut short ({size} bytes): {member.name} is not"
    return ""


def _tile(sample: Sample) -> Member:
    return next(member for member in sample if member.extension in CODECS)
