"""One writer at a time: POSIX record locks on bytes of a hidden file in the folder that is written to.

The kernel keeps these locks (on NFS the server does), refuses what overlaps, and drops them when their process ends, however
it ends: none is ever stale. Those who hold other bytes of the file run side by side. See fcntl(2), "Advisory record locking".
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
from mammostream.common.files import make_folder, writing

# Who holds a lock that starts at byte n is named at n * _RECORD, where nobody else writes.
_RECORD = 256
_FLOCK = "hhqqi"  # struct flock of 64-bit Linux: l_type, l_whence, l_start, l_len, l_pid


@contextmanager
def hold(path: Path, span: range = range(1), *, wait: bool = False) -> Iterator[None]:
    """Hold a lock; its file is there only while somebody does.

    Parameters
    ----------
    path
        The file, in the folder that is written to, which is made where it is not there.
    span
        The bytes to lock, without gaps; none locks nothing.
    wait
        Wait for other holders instead of refusing.

    Raises
    ------
    BadInput
        Another process holds one of the bytes; it is named. Or the folder cannot be written.
    """
    if not span:
        yield
        return
    make_folder(path.parent)
    with writing(path):
        file = _take(path, span, wait)
    if file is None:
        click.echo(f"{path.parent} is on a disk without file locks: see to it that no other command writes there", err=True)
        yield
        return
    try:
        yield
    finally:
        _release(path, file, span)


def _take(path: Path, span: range, wait: bool) -> int | None:
    """Return the locked file's descriptor, or None where the file system knows no locks."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), len(span), span.start)
            if _is_still(path, file):
                break
            os.close(file)  # its last holder removed it between our opening and our locking
        except OSError as error:
            refusal = _refusal(path, file, span) if error.errno in (errno.EACCES, errno.EAGAIN) else None
            os.close(file)
            if refusal:
                raise refusal from None
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                return None
            raise
    owner = f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"
    os.pwrite(file, owner.encode()[:_RECORD].ljust(_RECORD, b"\0"), span.start * _RECORD)
    os.fsync(file)
    return file


def _is_still(path: Path, file: int) -> bool:
    try:
        return path.stat().st_ino == os.fstat(file).st_ino
    except FileNotFoundError:
        return False


def _release(path: Path, file: int, span: range) -> None:
    try:
        # All of it is ours only where nobody else holds a part; then the file may go.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except OSError:
        os.pwrite(file, bytes(_RECORD), span.start * _RECORD)
    finally:
        os.close(file)


def _refusal(path: Path, file: int, span: range) -> BadInput:
    asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, span.start, len(span), 0)
    answer = fcntl.fcntl(file, fcntl.F_GETLK, asked)
    kind, _, start, _, pid = struct.unpack(_FLOCK, answer)
    if kind == fcntl.F_UNLCK:
        return BadInput(f"another command that wrote to {path.parent} has just ended; run the same command again")
    owner = os.pread(file, _RECORD, start * _RECORD).rstrip(b"\0").decode(errors="replace") or f"process {pid}"
    return BadInput(
        f"{path.parent} is being written by {owner}; wait for it or stop it: its lock goes with it "
        f"(only where its whole machine is gone for good: delete {path})"
    )
