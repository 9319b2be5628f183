"""Finding the file that a user's table means, however the table spells its name."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from mammostream.common.errors import BadInput, nearest
from mammostream.shards.annotations.tree import ImageTree, inside
from mammostream.shards.identity import ENDINGS, spelling

_DRIVE = re.compile(r"[A-Za-z]:/")
_WHOLE = re.compile(r"(\d+)\.0+")


@dataclass
class FileNames:
    """The images of a tree by name.

    A name is a file's name or the last parts of its path, with or without its ending; a path may also begin above the folder
    (``images/P1/left.png`` where ``--images-root`` is ``images``). Unicode NFC and NFD, and ``/`` and ``\\`` are one. Where no
    file has that name, one whose name differs only in case or leading zeros, or in a ``.0`` behind a number, is meant if
    there is just one.

    Attributes
    ----------
    tree
        The images.
    respelled
        Names of the tables that were taken for files of other spellings, and the first such file.
    """

    tree: ImageTree
    respelled: dict[str, str] = field(default_factory=dict)

    @cached_property
    def _roots(self) -> tuple[str, str]:
        return f"{self.tree.root.absolute().as_posix()}/", f"{self.tree.root.resolve().as_posix()}/"

    @cached_property
    def _by_last(self) -> dict[str, list[tuple[tuple[str, ...], Path]]]:
        found: dict[str, list[tuple[tuple[str, ...], Path]]] = {}
        for path, key in self.tree.keys.items():
            parts = tuple(unicodedata.normalize("NFC", key).split("/"))
            found.setdefault(parts[-1], []).append((parts, path))
        return found

    @cached_property
    def _by_spelling(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for last in self._by_last:
            found.setdefault(spelling(last), []).append(last)
        return found

    def find(self, name: str, where: str) -> Path | None:
        """Return the file that a cell names, or None.

        Raises
        ------
        BadInput
            The name leads outside the folder, or fits several files.
        """
        *folders, whole = self._parts(name, where)
        last = whole.rpartition(".")[0] if whole.lower().endswith(ENDINGS) else whole
        found = self._fitting((*folders, last)) or self._fitting((*folders, whole))
        if not found:
            number = _WHOLE.fullmatch(last)
            others = self._by_spelling.get(spelling(number[1] if number else last), [])
            found = [file for other in others for file in self._fitting((*folders, other))]
            if len(found) != 1:
                return None
            self.respelled[name] = found[0].name
        if len(found) > 1:
            raise BadInput(
                f"{where}: '{name}' fits {len(found)} files below {self.tree.root}: {found[0]} and {found[1]}; "
                "keep one of them, or give the folder that holds one of each as --images-root"
            )
        return self.tree.require_inside(found[0], where)

    def _parts(self, name: str, where: str) -> tuple[str, ...]:
        """Return the parts of a cell's path."""
        plain = unicodedata.normalize("NFC", name).replace("\\", "/")
        # A drive's letter stands for a place that is not here: what follows may end as a path below the folder does.
        plain = _DRIVE.sub("", plain) if _DRIVE.match(plain) else plain
        for root in self._roots:
            plain = plain.removeprefix(root)
        return tuple(inside(plain, where, self.tree.root).split("/"))

    def _fitting(self, parts: tuple[str, ...]) -> list[Path]:
        """Return the files whose path ends with `parts` or the other way round; those whose whole path it is, if any."""
        candidates = self._by_last.get(parts[-1], [])
        exact = [path for key, path in candidates if key == parts]
        if exact:
            return exact
        return [path for key, path in candidates if all(a == b for a, b in zip(reversed(key), reversed(parts), strict=False))]

    def hint(self, name: str) -> str:
        """Return what a name that fits no file may mean, as the end of a sentence: the nearest name, or an example."""
        guess = nearest(unicodedata.normalize("NFC", name).replace("\\", "/").rpartition("/")[2], self._by_last)
        return guess or f" (the folder holds '{self.tree.paths[0].name}')"
