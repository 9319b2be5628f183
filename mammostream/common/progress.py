"""One look for every progress bar."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress(
    items: Iterable[Any] | None, what: str, unit: str, total: int | None = None, initial: int = 0, silent: bool = False
) -> tqdm[Any]:
    """Wrap `items` in a progress bar on stderr: a live line on a terminal, one line every 30 s in a log file.

    What was there before (`initial`) does not count for the rate and the time left. `silent` shows nothing: of several
    processes one speaks.
    """
    interactive = sys.stderr.isatty()
    return tqdm(
        items,
        desc=what,
        unit=f" {unit}",
        total=total,
        initial=initial,
        dynamic_ncols=interactive,
        mininterval=0.2 if interactive else 30,
        file=sys.stderr,
        disable=silent,
    )
