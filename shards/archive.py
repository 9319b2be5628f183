"""The tar of a shard and its DALI index.

A sample's members follow each other in the tar and share the name up to the first dot. The index is DALI's text format
``v1.2``: a line with the version and the number of samples, then a line a sample with ``extension offset size name`` for
each member, ``offset`` being where the member's data starts. It equals what NVIDIA's ``wds2idx`` makes of the tar.
"""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mammostream.common.buckets import BucketPath
from mammostream.common.errors import BadInput, first_line
from mammostream.common.files import whole_file

INDEX_VERSION = "v1.2"
_BLOCK = 512
_LONGEST_NAME = 200  # of 255 bytes; endings and the marks of temporary files come on top


@dataclass(frozen=True)
class Member:
    """One file of a sample: its extension without a dot, and where its data lies in the tar (bytes)."""

    extension: str
    offset: int
    size: int
    name: str


Sample = tuple[Member, ...]


def escape_id(identifier: str) -> str:
    """Escape everything but ASCII letters, digits, ``-`` and ``_`` as %XX of its UTF-8 bytes, so that ids never collide."""
    return "".join(chr(b) if re.match(rb"[A-Za-z0-9_-]", bytes([b])) else f"%{b:02X}" for b in identifier.encode())


def short_name(name: str) -> str:
    """Return a file's name without ending, cut and with a hash of the whole where file systems would refuse its length."""
    if len(name) <= _LONGEST_NAME:
        return name
    cut = re.sub(r"%[0-9A-F]?$", "", name[: _LONGEST_NAME - 17])
    return f"{cut}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def tile_key(image_id: str, y: int, x: int) -> str:
    """Return the key of the tile of an image whose top-left native pixel is (x, y)."""
    return f"{escape_id(image_id)}_y{y}_x{x}"


def write_archive(tar_path: Path, samples: Iterable[tuple[str, Sequence[tuple[str, bytes]]]]) -> list[Sample]:
    """Write samples ``(key, [(extension, data), ...])`` to a tar and its index next to it (``.idx``).

    The bytes depend on the samples alone: no times, owners or modes of the machine. Returns the index.
    """
    index: list[Sample] = []
    with whole_file(tar_path) as temporary, tarfile.open(temporary, "w", format=tarfile.GNU_FORMAT) as tar:
        for key, members in samples:
            sample = []
            for extension, data in members:
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size, info.mode = len(data), 0o444
                tar.addfile(info, io.BytesIO(data))
                padded = -(-len(data) // _BLOCK) * _BLOCK
                sample.append(Member(extension, tar.offset - padded, len(data), info.name))
            index.append(tuple(sample))
    write_index(tar_path.with_suffix(".idx"), index)
    return index


def write_index(path: Path, index: Sequence[Sample]) -> None:
    """Write a DALI index of `index`; any selection of a tar's samples, in any order, is a valid index of it."""
    lines = [f"{INDEX_VERSION} {len(index)}"]
    lines += [" ".join(f"{m.extension} {m.offset} {m.size} {m.name}" for m in sample) for sample in index]
    with whole_file(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="ascii")


def read_index(path: Path) -> list[Sample]:
    """Read a DALI index.

    Raises
    ------
    BadInput
        The index is missing or not of version v1.2 as :func:`write_index` writes it.
    """
    mend = "build the shard again: delete its .parquet and run 'mammostream shards build'"
    try:
        header, *lines = path.read_text(encoding="ascii").splitlines()
        version, count = header.split()
        intact = version == INDEX_VERSION and int(count) == len(lines)
        index = []
        for line in lines:
            words = line.split(" ")
            members = zip(*(words[i::4] for i in range(4)), strict=True)
            index.append(tuple(Member(ext, int(offset), int(size), name) for ext, offset, size, name in members))
    except FileNotFoundError:
        raise BadInput(f"index {path} does not exist; {mend}") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"index {path} is damaged ({first_line(error)}); {mend}") from error
    if not intact:
        raise BadInput(f"index {path} is damaged (header '{header}', {len(index)} samples); {mend}")
    return index


def sample_key(sample: Sample) -> str:
    """Return the key of a sample: what the names of its members begin with."""
    return sample[0].name.partition(".")[0]


def scan_archive(tar_path: Path) -> list[Sample]:
    """Make a tar's index again from its headers, up to its end or the first damaged one."""
    samples: dict[str, list[Member]] = {}
    with suppress(tarfile.TarError, OSError), tarfile.open(tar_path) as tar:
        for info in tar:
            key, _, extension = info.name.partition(".")
            samples.setdefault(key, []).append(Member(extension, info.offset_data, info.size, info.name))
    return [tuple(members) for members in samples.values()]


def check_index(tar_path: Path | BucketPath, index: Sequence[Sample]) -> None:
    """Check that every member of `index` lies inside the tar; a member past the end would crash DALI's process.

    Raises
    ------
    BadInput
        The tar is missing, or shorter than its index says.
    """
    if not tar_path.is_file():
        raise BadInput(f"shard {tar_path} does not exist; build it again with 'mammostream shards build'")
    size = tar_path.stat().st_size
    for sample in index:
        for member in sample:
            if member.offset < _BLOCK or member.size < 0 or member.offset + member.size > size:
                raise BadInput(
                    f"shard {tar_path} ({size} bytes) does not hold {member.name} at {member.offset}+{member.size} as its "
                    "index says: it was cut short or changed; see 'mammostream shards verify' and build it again"
                )
