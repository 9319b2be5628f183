"""What tests pass to a fresh process; not in a conftest, since the process imports it by module name."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mammostream.shards.reading import Shard


@dataclass(frozen=True)
class Tiles:
    """Shards and their contents: pixels by tile number, in reading order."""

    shards: list[Shard]
    pixels: dict[int, np.ndarray]
    size: int


def call(connection: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        connection.send((function(*args), ""))
    except Exception as error:
        connection.send((None, f"{type(error).__name__}: {error}"))
        traceback.print_exc()
        raise SystemExit(getattr(error, "exit_code", 1)) from None
