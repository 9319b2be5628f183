"""An input and its reader, and how the input gets into a case's folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.fuzz import damage

Damage = Callable[[bytes, Random], tuple[bytes, str]]


@dataclass(frozen=True)
class Target:
    """An input and its reader.

    Attributes
    ----------
    kind
        The row of the table.
    source
        The file to damage, relative to the base.
    command
        The command line; ``{base}`` is the base, ``{file}`` the damaged file. It runs in the case's folder.
    structured
        Damage that knows the format; half of the cases have it, the others :func:`damage.bytes_damage`.
    noticeable
        Beginnings of the notes of damage that the input itself shows: such damage must not change the result without a word.
    outcome
        Reads the results to compare.
    share
        Cases, compared with other targets.
    tree
        Folder of the base to copy into the case's folder; `source` lies in it.
    """

    kind: str
    source: str
    command: str
    structured: Damage
    outcome: Callable[[Path], Any]
    noticeable: frozenset[str] = frozenset()
    share: float = 1
    tree: str = ""


def stage(target: Target, base: Path, folder: Path, rng: Random | None) -> str:
    """Put the input, damaged unless `rng` is None, into the case's folder; return what was done to it."""
    source = base / target.source
    if target.tree:
        tree = base / target.tree
        shutil.copytree(tree, folder / tree.name, ignore=lambda _, names: [n for n in names if n.endswith((".lock", ".png"))])
        place = folder / tree.name / source.relative_to(tree)
    else:
        place = folder / source.name
    data, note = source.read_bytes(), "none"
    if rng is not None:
        data, note = (target.structured if rng.random() < 0.55 else damage.bytes_damage)(data, rng)
    place.unlink(missing_ok=True)
    place.write_bytes(data)
    if target.kind.startswith("film"):
        _film_manifest(base, place, folder)
    return note


def _film_manifest(base: Path, film: Path, folder: Path) -> None:
    import pandas as pd

    manifest = pd.read_parquet(base / "prepared/manifest.parquet").iloc[:1].assign(path=str(film), image_id="film")
    manifest["pixel_spacing_mm"] = 0.4
    manifest.to_parquet(folder / "manifest.parquet", index=False)


def command_line(target: Target, base: Path) -> str:
    """The command with its paths."""
    tree = Path(target.tree).name
    name = str(Path(target.source).relative_to(target.tree)) if target.tree else Path(target.source).name
    return target.command.format(base=base, file=f"{tree}/{name}" if tree else name)
