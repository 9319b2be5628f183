"""The images below a folder, and finding the one that an annotation names."""

from __future__ import annotations

import os
import posixpath
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath

from mammostream.common.errors import BadInput
from mammostream.preprocess.reading import IMAGE_SUFFIXES, has_ending, may_be_image
from mammostream.shards.annotations.annotations import Problem

# Endings of formats that exports give a preview or a copy in, next to the film itself.
_COPIES = frozenset((".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".j2k", ".j2c", ".bmp", ".webp"))


@dataclass(frozen=True)
class ImageTree:
    """The images below a folder, each once, in sorted order.

    Attributes
    ----------
    root
        The folder.
    paths
        Image files below it. Folders that are links are entered only where links are followed.
    links
        Those of `paths` that are symbolic links which must not lead outside where an annotation names them.
    ignored
        How many other files there are, by ending or by what they are (``DICOMDIR``, ``._*``).
    problems
        Folders that could not be searched, and copies of films next to them.
    """

    root: Path
    paths: tuple[Path, ...]
    links: frozenset[Path] = frozenset()
    ignored: Counter[str] = field(default_factory=Counter)
    problems: tuple[Problem, ...] = ()

    @classmethod
    def scan(cls, root: Path, skip: Path | None = None, follow_links: bool = False) -> ImageTree:
        """Search a folder deeply; hidden files and the folder `skip` (for instance of earlier output) are left out.

        Every command that takes a folder of images searches it by this rule.

        Parameters
        ----------
        root
            The folder.
        skip
            A folder below it that is not searched.
        follow_links
            Enter folders that are symbolic links, each once, and let annotations name files that link outside.

        Raises
        ------
        BadInput
            The folder is missing, cannot be read or holds no image, or a file's name is no text.
        """
        if not root.is_dir():
            raise BadInput(f"images folder {root} does not exist; check --images-root")
        paths: list[Path] = []
        links: set[Path] = set()
        ignored: Counter[str] = Counter()
        problems: list[Problem] = []
        for entry in _files(root, skip, follow_links, ignored, problems):
            path = Path(entry.path)
            if not _is_image(path):
                ignored[_sort_of(path)] += 1
                continue
            try:
                entry.path.encode()
            except UnicodeEncodeError:
                raise BadInput(f"the file name {entry.path!r} is not UTF-8, so no table can hold it; rename the file") from None
            paths.append(path)
            if entry.is_symlink() and not follow_links:
                links.add(path)
        if not paths:
            raise BadInput(
                f"images folder {root} holds no images; put DICOM files there, or files of one of these endings: "
                f"{' '.join(IMAGE_SUFFIXES)}" + "".join(f"; {problem.message}" for problem in problems[:1])
            )
        paths = _without_copies(sorted(paths), problems)
        return cls(root, tuple(paths), frozenset(links), ignored, tuple(problems))

    def key(self, path: Path) -> str:
        """Return a file's path below the folder without its ending."""
        return path.relative_to(self.root).with_name(name_without_ending(path)).as_posix()

    @cached_property
    def keys(self) -> dict[Path, str]:
        """:meth:`key` of every image."""
        return {path: self.key(path) for path in self.paths}

    @cached_property
    def _by_tail(self) -> dict[str, list[Path]]:
        """Images by their path without ending: the last part, the last two, and all of it."""
        found: dict[str, list[Path]] = {}
        for path, key in self.keys.items():
            parts = key.split("/")
            for tail in {key, parts[-1], "/".join(parts[-2:])}:
                found.setdefault(tail, []).append(path)
        return found

    @cached_property
    def _by_folder(self) -> dict[str, list[Path]]:
        """Images by the name of each folder that they lie in, near or far."""
        found: dict[str, list[Path]] = {}
        for path, key in self.keys.items():
            for name in set(key.split("/")[:-1]):
                found.setdefault(name, []).append(path)
        return found

    def find(self, names: tuple[str, ...], where: str) -> Path | None:
        """Return the image that the first fitting of some names stands for, or None.

        Parameters
        ----------
        names
            File names, or paths below the folder or of the last two parts, all without ending; the first that fits counts.
        where
            Where the names stand, for errors (``CSV x.csv line 7``).

        Raises
        ------
        BadInput
            A name leads outside the folder, or fits several files.
        """
        for name in names:
            found = self._by_tail.get(inside(name, where, self.root), [])
            if len(found) > 1:
                raise BadInput(
                    f"{where}: '{name}' fits {len(found)} files below {self.root}: {found[0]} and {found[1]}; "
                    "keep one of them, or give the folder that holds one of each as --images-root"
                )
            if found:
                return self.require_inside(found[0], where)
        return None

    def within(self, folder: str, where: str) -> list[Path]:
        """Return the images below folders of this name, wherever such a folder lies.

        Raises
        ------
        BadInput
            As :meth:`find`.
        """
        return [self.require_inside(path, where) for path in self._by_folder.get(inside(folder, where, self.root), [])]

    def require_inside(self, path: Path, where: str) -> Path:
        """Return `path`, unless it is a link that leads outside the folder.

        Raises
        ------
        BadInput
            It is.
        """
        if path in self.links and not path.resolve().is_relative_to(self.root.resolve()):
            raise BadInput(
                f"{where}: {path} is a link to {path.resolve()}, outside --images-root {self.root}; give --follow-links to "
                "read it, or put the file itself there"
            )
        return path


def inside(name: str, where: str, root: Path) -> str:
    """Return a path from an annotation file in plain form.

    Raises
    ------
    BadInput
        It leads outside the folder that it is relative to.
    """
    if "/" not in name and name not in ("..", "."):
        return name
    plain = posixpath.normpath(name)
    if plain.startswith("/") or plain == ".." or plain.startswith("../"):
        raise BadInput(f"{where}: the path '{name}' leads outside --images-root {root}; correct it")
    return plain


def name_without_ending(path: Path | PurePosixPath) -> str:
    """Return a file's name without the ending of an image format; ``1.2.840.1`` has none."""
    return path.stem if path.suffix.lower() in IMAGE_SUFFIXES else path.name


def _files(
    root: Path, skip: Path | None, follow_links: bool, ignored: Counter[str], problems: list[Problem]
) -> Iterator[os.DirEntry[str]]:
    """Yield the files below a folder; say which folders could not be searched and count what is hidden."""
    skipped = None if skip is None else skip.resolve()
    folders, linked = [str(root)], list[str]()
    entered: set[Path] = set()
    while folders or linked:
        # Links last: a folder that is there itself goes by its own name.
        folder = folders.pop() if folders else linked.pop(0)
        if follow_links:
            place = Path(folder).resolve()
            if place in entered or place == skipped:
                continue
            entered.add(place)
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            if folder == str(root):
                raise BadInput(f"images folder {root} cannot be read: {error.strerror}; check its permissions") from error
            problems.append(Problem("unreadable", f"folder {folder} cannot be read: {error.strerror}; check its permissions"))
            continue
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                if entry.name.startswith("."):
                    ignored[f"{entry.name}/"] += 1
                elif skipped is None or Path(entry.path).resolve() != skipped:
                    folders.append(entry.path)
            elif entry.name.startswith("."):
                ignored["._*" if entry.name.startswith("._") else entry.name] += 1
            elif entry.is_symlink() and Path(entry.path).is_dir():
                if follow_links:
                    linked.append(entry.path)
                    continue
                problems.append(
                    Problem(
                        "not searched",
                        f"folder {entry.path} is a link; give --follow-links to search it, or the folder itself as "
                        "--images-root",
                    )
                )
            else:
                yield entry


def _is_image(path: Path) -> bool:
    if path.name.upper() == "DICOMDIR":  # a table of contents
        return False
    try:
        return may_be_image(path)
    except OSError:
        return False


def _sort_of(path: Path) -> str:
    """Return under what a file that is no image is counted."""
    if path.name.upper() == "DICOMDIR" or path.name.lower() == "thumbs.db":
        return path.name
    return path.suffix.lower() if has_ending(path) else "none"


def _without_copies(paths: list[Path], problems: list[Problem]) -> list[Path]:
    """Leave out previews and copies that lie next to a film of the same name: ``film.jpg`` next to ``film.dcm``."""
    films = {path.with_name(name_without_ending(path)): path for path in paths if path.suffix.lower() not in _COPIES}
    kept = []
    for path in paths:
        film = films.get(path.with_suffix("")) if path.suffix.lower() in _COPIES else None
        if film is None:
            kept.append(path)
        else:
            problems.append(Problem("copy", f"image {path} is left out: {film.name} next to it has the same name"))
    return kept
