"""Errors that end a command with one line and a documented exit code."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable


class BadInput(Exception):
    """The input is at fault. The message names the thing and how to fix it, on one line; the exit code is 2."""

    exit_code = 2


class TooManyBad(BadInput):
    """A bulk command finished, but more items failed than its limit allows; the exit code is 3."""

    exit_code = 3


class MachineFault(Exception):
    """The machine failed, not the input: no memory, no file handles, a network drive that went away. One line; the exit code
    is 1. Bulk commands stop, rather than record items as bad: what was finished stays, and a rerun does the rest.
    """

    exit_code = 1


class Stopped(Exception):
    """The command was told to stop, saved what it had done and can go on; the message says how.

    The exit code is 75 (``EX_TEMPFAIL`` of sysexits.h: try again), so that a script can tell it from an error.
    """

    def __init__(self, message: str, exit_code: int = 75) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def speaks_for_all() -> bool:
    """Whether this process is to print why the command ends: alone always, of torchrun's processes the first that asks.

    Bad input stops all processes alike, but it needs saying once; a fault that one process alone meets is said by that one.
    """
    agent_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or not agent_store:
        return True
    from datetime import timedelta

    from torch.distributed import TCPStore

    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=10))
        return store.add(f"mammostream/end/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1) == 1
    except (RuntimeError, ValueError, KeyError):  # torchrun itself is gone: better said twice than never
        return True


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the known name closest to `name`, or an empty string."""
    matches = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.5)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class name where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
