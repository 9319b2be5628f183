"""One build a shard at a time: POSIX record locks on one file of the shard directory, a byte a shard.

The kernel keeps these locks (on NFS the server does), refuses what overlaps, and drops them when their process ends, however
it ends: none is ever stale. Jobs that build other shards hold other bytes and run side by side. See fcntl(2), "Advisory
record locking".
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from mammostream.common.errors import BadInput
from mammostream.common.files import writing

LOCK_FILE = ".lock"
TABLES = range(-1, 0)  # the merged tables
ALL = range(-1, 2**40)  # these and every shard there could be
# The lock's bytes start with the tables'. Whose lock starts at byte n is named at n * _RECORD, where only he writes.
_RECORD = 256
_FLOCK = "hhqqi"  # struct flock of 64-bit Linux: l_type, l_whence, l_start, l_len, l_pid


@contextmanager
def lock_shards(directory: Path, shards: range, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a range of shards of a directory.

    Parameters
    ----------
    directory
        The shard directory.
    shards
        The ordinals, without gaps; or :data:`TABLES` or :data:`ALL`.
    wait
        Wait for other holders instead of refusing.

    Raises
    ------
    BadInput
        Another process holds the lock of one of them; it is named. Or the directory cannot be written.
    """
    if not shards:
        yield
        return
    path = directory / LOCK_FILE
    with writing(path):
        file = _take(path, shards, wait)
    if file is None:
        click.echo(f"{directory} is on a disk without file locks: see to it that no other build writes there", err=True)
        yield
        return
    try:
        yield
    finally:
        _release(path, file, shards)


def _take(path: Path, shards: range, wait: bool) -> int | None:
    """Return the locked file's descriptor, or None where the file system knows no locks."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), len(shards), shards.start + 1)
            if _is_still(path, file):
                break
            os.close(file)  # its last holder removed it between our opening and our locking
        except OSError as error:
            refusal = _refusal(path, file, shards) if error.errno in (errno.EACCES, errno.EAGAIN) else None
            os.close(file)
            if refusal:
                raise refusal from None
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                return None
            raise
    owner = f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"
    os.pwrite(file, owner.encode()[:_RECORD].ljust(_RECORD, b"\0"), (shards.start + 1) * _RECORD)
    os.fsync(file)
    return file


def _is_still(path: Path, file: int) -> bool:
    try:
        return path.stat().st_ino == os.fstat(file).st_ino
    except FileNotFoundError:
        return False


def _release(path: Path, file: int, shards: range) -> None:
    try:
        # All of it is ours only where nobody else holds a part; then the file may go.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except OSError:
        os.pwrite(file, bytes(_RECORD), (shards.start + 1) * _RECORD)
    finally:
        os.close(file)


def _refusal(path: Path, file: int, shards: range) -> BadInput:
    asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, shards.start + 1, len(shards), 0)
    answer = fcntl.fcntl(file, fcntl.F_GETLK, asked)
    kind, _, start, _, pid = struct.unpack(_FLOCK, answer)
    if kind == fcntl.F_UNLCK:
        return BadInput(f"another build of {path.parent} has just ended; run the same command again")
    owner = os.pread(file, _RECORD, start * _RECORD).rstrip(b"\0").decode(errors="replace") or f"process {pid}"
    return BadInput(
        f"{path.parent} is being written by {owner}; wait for it or stop it: its lock goes with it "
        f"(only where its whole machine is gone for good: delete {path})"
    )
