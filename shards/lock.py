"""Who builds which shards: a lock of one byte per shard, so that jobs that build other shards run side by side."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from mammostream.common.locks import hold

TABLES = range(-1, 0)  # the merged tables
ALL = range(-1, 2**40)  # these and every shard there could be


def lock_shards(directory: Path, shards: range, *, wait: bool = False) -> AbstractContextManager[None]:
    """Hold the lock of a range of shards of a directory, see :func:`mammostream.common.locks.hold`.

    Parameters
    ----------
    directory
        The shard directory.
    shards
        The ordinals, without gaps; or :data:`TABLES` or :data:`ALL`.
    wait
        Wait for other holders instead of refusing.
    """
    return hold(directory / ".lock", range(shards.start + 1, shards.stop + 1), wait=wait)
