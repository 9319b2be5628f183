"""Errors that end a command with one line and a documented exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BadInput(Exception):
    """The input is at fault. The message names the thing and the mend, on one line; the exit code is 2."""

    exit_code = 2


class TooManyBad(BadInput):
    """A bulk command finished, but more items failed than its limit allows; the exit code is 3."""

    exit_code = 3


class MachineFault(Exception):
    """The machine failed, not the input: no memory, no file handles, a network drive that went away. One line; the exit code
    is 1. Bulk commands stop, rather than record items as bad: what was finished stays, and a rerun does the rest.
    """

    exit_code = 1


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the known name closest to `name`, or an empty string."""
    matches = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.5)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class name where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
