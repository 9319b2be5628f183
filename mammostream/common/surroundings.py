"""What a container, a scheduler or a locale may lack, and how a command does without it."""

from __future__ import annotations

import getpass
import io
import multiprocessing
import os
import sys
import tempfile
from functools import cache
from pathlib import Path

from mammostream.common.errors import first_line

SHARED_MEMORY_MEND = "give the container a writable /dev/shm (docker: --shm-size, Apptainer: --bind /dev/shm)"


def make_do() -> None:
    """Prepare this process, before torch is imported, for a log that is not UTF-8, a user without a name, no shared memory."""
    for stream in (sys.stdout, sys.stderr):
        # What a log cannot hold must not end the work that it tells of.
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")
    if user_name() is None:
        # torch names its cache folder after the user; this is where getpass.getuser looks first.
        os.environ["LOGNAME"] = f"uid{os.getuid()}"
    try:
        Path.home()
    except RuntimeError:
        home = Path(tempfile.gettempdir()) / f"mammostream-uid{os.getuid()}"
        home.mkdir(mode=0o700, exist_ok=True)
        # Caches hold code: a folder of that name that somebody else made is not used.
        os.environ["HOME"] = str(home) if home.lstat().st_uid == os.getuid() else tempfile.mkdtemp()
    if shared_memory_fault():
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # more are processes that share locks


def user_name() -> str | None:
    """Return the user's name; None where neither the environment nor the passwd file knows one."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # OSError since Python 3.13
        return None


@cache
def shared_memory_fault() -> str:
    """Return why processes cannot share locks on this machine; empty where they can."""
    try:
        multiprocessing.get_context("fork").Lock()  # unlike 'spawn', this leaves no helper process behind
    except (OSError, ImportError) as error:
        return f"no shared memory here (/dev/shm: {first_line(error)})"
    return ""


@cache
def usable_workers(workers: int) -> int:
    """Return `workers`, or 1 where processes cannot share locks; that is said once."""
    if workers > 1 and (fault := shared_memory_fault()):
        print(f"{fault}: one process does the work; for several, {SHARED_MEMORY_MEND}", file=sys.stderr)
        return 1
    return workers


def describe_surroundings() -> dict[str, str]:
    """Return what ``doctor`` says of the user, the log and the shared memory: name -> value."""
    name = user_name() or ""
    known = name != f"uid{os.getuid()}"
    home = Path.home()
    encoding = getattr(sys.stdout, "encoding", None) or "none"
    whole = encoding.lower().replace("-", "") == "utf8"
    return {
        "user": name if known else f"{os.getuid()}, which has no passwd entry: named {name} here",
        "home": f"{home}" if os.access(home, os.W_OK) else f"{home}, not writable: set HOME to a folder for caches",
        "output": encoding if whole else f"{encoding}: what it lacks is replaced (PYTHONIOENCODING=utf-8 keeps it)",
        "shared memory": f"{fault}: one process; {SHARED_MEMORY_MEND}" if (fault := shared_memory_fault()) else "yes",
    }
