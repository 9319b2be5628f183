"""Names of temporary files that say whose they are, and the removal of those whose process was killed."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO

_TEMPORARY = re.compile(r"\..+\.(?P<pid>\d{1,10})(?:-(?P<machine>[0-9a-f]{8}))?\.tmp")
_NAME_BYTES = 220  # of 255: room for process and machine
_FOREIGN_SECONDS = 24 * 3600  # nobody can ask another machine whether its process lives
_CLOCK_SECONDS = 60  # that a file server's clock may be off
_swept: set[Path] = set()  # folders that this command has looked at


def temporary_name(name: str) -> str:
    """Return the hidden name under which this process writes a file: ``.<name>.<process>-<machine>.tmp``.

    A long name is replaced by its hash, since a file's name has 255 bytes at most.
    """
    if len(os.fsencode(name)) > _NAME_BYTES:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return f".{name}{_ending()}"


def scratch_folder(folder: Path | None = None) -> tempfile.TemporaryDirectory:
    """Return a new temporary folder below `folder` (default: the system's), and remove those that killed processes left."""
    place = Path(folder or tempfile.gettempdir())
    remove_leftovers(place)
    return tempfile.TemporaryDirectory(prefix=".mammostream.", suffix=_ending(), dir=place)


def spool_file(path: Path) -> IO[bytes]:
    """Return a nameless temporary file on the disk of `path`; on disks that know none, it has a temporary name at first."""
    remove_leftovers(path.parent)
    return tempfile.TemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=_ending())


def new_command() -> None:
    """Let each folder be looked at again: a command starts."""
    _swept.clear()


def remove_leftovers(folder: Path) -> None:
    """Remove a folder's temporary files, and scratch folders, whose process no longer lives; once a command and folder.

    A process of this machine (of this container) is asked for; one that started after the file's last change only bears the
    same number. Other machines' files go when nobody has changed them for a day, and so do those of versions that did not
    write down the machine. Folders of other machines stay: only files tell when they were last written to.

    Where the folder cannot be read or a file not be removed, nothing happens: leftovers do no harm.
    """
    if folder in _swept:
        return
    _swept.add(folder)
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            match = _TEMPORARY.fullmatch(entry.name)
            if match is None:
                continue
            with suppress(OSError):
                is_folder = entry.is_dir(follow_symlinks=False)
                age = time.time() - entry.stat(follow_symlinks=False).st_mtime
                if match["machine"] == _machine():
                    left = not _lives(int(match["pid"]), age)
                else:
                    left = age > _FOREIGN_SECONDS and not is_folder
                if left and is_folder:
                    shutil.rmtree(entry.path, ignore_errors=True)
                elif left:
                    Path(entry.path).unlink()


def _ending() -> str:
    return f".{os.getpid()}-{_machine()}.tmp"


@cache
def _machine() -> str:
    """Return eight digits for what numbers its processes: a machine, or a container on it."""
    numbering = ""
    with suppress(OSError):
        numbering = str(Path("/proc/self/ns/pid").readlink())
    return hashlib.sha256(f"{socket.gethostname()} {numbering}".encode()).hexdigest()[:8]


def _lives(pid: int, age: float) -> bool:
    """Whether the process of this machine that wrote a file, last changed `age` seconds ago, may still run."""
    try:
        os.kill(pid, 0)  # asks only
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    try:
        # Behind the second field, the name, which may hold anything: the state is the third field, the start the 22nd.
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # /proc may hide other users' processes
        return True
    if state in "ZX":  # killed, but its parent has not yet asked how it ended
        return False
    running = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[18]) / os.sysconf("SC_CLK_TCK")
    return running > age - _CLOCK_SECONDS
