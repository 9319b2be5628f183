"""Side and view of films from their files' names, where nothing else tells: ``P1_R_CC.png``, ``RIGHT-MLO.dcm``, ``lcc.jpg``."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

import pandas as pd

from mammostream.preprocess.views import SIDES
from mammostream.shards.annotations.tree import name_without_ending

_VIEWS = ("CC", "MLO", "ML", "LM", "LMO", "XCC", "XCCL", "XCCM")
_SIDE, _VIEW = "|".join(sorted(SIDES, key=len, reverse=True)), "|".join(sorted(_VIEWS, key=len, reverse=True))
# Side and view next to each other, joined or with one mark between them, and nothing but marks around them.
_NAMED = re.compile(
    rf"(?<![A-Za-z0-9])(?:(?P<side>{_SIDE})[ _.-]*(?P<view>{_VIEW})|(?P<view2>{_VIEW})[ _.-]*(?P<side2>{_SIDE}))"
    r"(?![A-Za-z0-9])",
    re.IGNORECASE,
)


def named_view(name: str) -> tuple[str, str] | None:
    """Return the side (L or R) and the view that a file's name tells, or None if it tells none or several."""
    found = {
        (SIDES[(match["side"] or match["side2"]).upper()], (match["view"] or match["view2"]).upper())
        for match in _NAMED.finditer(name)
    }
    return found.pop() if len(found) == 1 else None


def with_named_views(films: pd.DataFrame, root: Path, notes: list[str]) -> pd.DataFrame:
    """Fill in sides and views that nothing else tells from the file's name, else from its folders', the nearest first.

    Parameters
    ----------
    films
        ``path``, ``laterality`` and ``view``, "" where unknown.
    root
        The folder whose own name tells nothing.
    notes
        How many were filled in is added here.
    """
    told = {}
    for index, path, side, view in zip(films.index, films["path"], films["laterality"], films["view"], strict=True):
        if side and view:
            continue
        *folders, name = path.removeprefix(f"{root}/").split("/")
        parts = (name_without_ending(PurePosixPath(name)), *reversed(folders))
        named = next((named for part in parts if (named := named_view(part))), None)
        # A name that contradicts what is known tells nothing.
        if named and side in ("", named[0]) and view.upper() in ("", named[1]):
            told[index] = named
    if not told:
        return films
    films = films.copy()
    films.loc[list(told), ["laterality", "view"]] = list(told.values())
    example = Path(films.loc[next(iter(told)), "path"]).relative_to(root)
    notes.append(f"side and view of {len(told)} films are told by the names of their files, such as {example}")
    return films
