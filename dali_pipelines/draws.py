"""An epoch that repeats some tiles and leaves out others: the source that a reader gets for one epoch.

DALI reads a tar by its index, and any selection of a tar's samples in any order is an index of it. The draws of an epoch are
cut into parts in their order, and each part gets an index per tar. Since the reader shuffles the indexes, the copies of a tile
spread over the whole epoch, although all of them lie in one tar.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from mammostream.common.files import writing
from mammostream.common.temporaries import scratch_folder
from mammostream.dali_pipelines.readers import FileSource, ShardSource

_PER_INDEX = 128  # draws, on average: fewer mix better, but each index is a file to write and to open
_LEAST_PER_PART = 1024  # draws: within the reader's buffer more parts mix no better


def drawn_source(source: ShardSource | FileSource, numbers: np.ndarray) -> ShardSource | FileSource:
    """Return a source that holds each tile as often as it is drawn.

    Parameters
    ----------
    source
        Where the tiles are; opened with a choice of tiles.
    numbers
        (N,) tile numbers in the order in which they are drawn. N is the source's number of tiles, so that an epoch stays as
        long as it is; a tile may occur several times or not at all.

    Raises
    ------
    ValueError
        There are more or fewer draws than tiles, or a number that the source lacks.
    """
    if len(numbers) != source.count:
        raise ValueError(f"{len(numbers)} draws for {source.count} tiles")
    known = np.concatenate(source.listed) if isinstance(source, ShardSource) else np.array(source.positions)
    order = np.argsort(known)
    found = np.searchsorted(known, numbers, sorter=order)
    rows = order[np.minimum(found, len(known) - 1)]
    if (known[rows] != numbers).any():
        raise ValueError(f"tile {numbers[known[rows] != numbers][0]} is not in the source")
    if isinstance(source, FileSource):
        return FileSource([source.files[row] for row in rows], numbers.tolist())
    return _drawn_shards(source, rows)


def _drawn_shards(source: ShardSource, rows: np.ndarray) -> ShardSource:
    """Return the source with indexes of the samples at these rows of its concatenated indexes."""
    starts = np.cumsum([0, *map(len, source.listed)])
    tar_of = np.searchsorted(starts, rows, side="right") - 1
    parts = max(1, len(rows) // max(_LEAST_PER_PART, _PER_INDEX * len(source.tars)))
    part_of = np.arange(len(rows)) * parts // len(rows)
    order = np.lexsort((part_of, tar_of))  # stable: within an index the draws keep their order
    cuts = np.flatnonzero(np.diff(tar_of[order] * parts + part_of[order])) + 1
    temporary = scratch_folder()
    tars: list[str] = []
    indexes: list[str] = []
    listed: list[np.ndarray] = []
    lines: list[str] = []
    last = -1
    for drawn in np.split(order, cuts):
        tar = int(tar_of[drawn[0]])
        if tar != last:
            version, *lines = Path(source.indexes[tar]).read_text(encoding="ascii").splitlines()
            last = tar
        mine = rows[drawn] - starts[tar]
        path = Path(temporary.name) / f"{len(tars):08d}.idx"
        head = f"{version.split()[0]} {len(mine)}"
        with writing(path):
            path.write_text("\n".join([head, *(lines[row] for row in mine)]) + "\n", encoding="ascii")
        tars.append(source.tars[tar])
        indexes.append(str(path))
        listed.append(source.listed[tar][mine])
    return replace(source, tars=tars, indexes=indexes, listed=listed, temporary=temporary)
