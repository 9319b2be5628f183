"""Views and sides in one spelling, whatever source they are from, and films that ``--exclude`` leaves out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pandas as pd

from mammostream.common.errors import BadInput, nearest
from mammostream.preprocess.views import MODIFIERS, VIEWS, normal_side, normal_view
from mammostream.shards.annotations.annotations import Problem
from mammostream.shards.manifest import LABEL_PREFIX

# What ``--exclude`` takes besides modifiers and views: what they are told by.
_KINDS = {"implant": "BreastImplantPresent, or a label 'implant'", "partial": "PartialView"}
EXCLUDABLE = (*_KINDS, *MODIFIERS, *VIEWS)


def with_normal_views(films: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    """Return films with ``view``, ``view_modifiers`` and ``laterality`` in one spelling.

    Parameters
    ----------
    films
        ``view`` and ``laterality`` as any source writes them, ``view_modifiers`` as headers have them.
    notes
        Gets the views that are known to nobody, which are kept in capitals, and the sides, which count as unknown.
    """
    views = films["view"].map(lambda text: normal_view(str(text)))
    # A view may name its side, as RMLO does, and its modifiers, as MCC does.
    written = films["laterality"].str.strip()
    given = written.map(normal_side)
    sides = given.where(written != "", views.map(lambda view: view.side))
    films = films.assign(
        view=views.map(lambda view: view.name),
        laterality=sides,
        view_modifiers=[
            " ".join(name for name in MODIFIERS if name in {*known.split(), *view.modifiers})
            for known, view in zip(films["view_modifiers"], views, strict=True)
        ],
    )
    _note(Counter(films.loc[~films["view"].isin(["", *VIEWS]), "view"]), "views that are not known here are kept", notes)
    _note(Counter(written[(written != "") & (given == "")]), "sides that are neither left nor right count as unknown", notes)
    return films


def _note(words: Counter[str], what: str, notes: list[str]) -> None:
    if words:
        shown = ", ".join(f"'{word}' ({count})" for word, count in words.most_common(8))
        notes.append(f"{what}: {shown}{', ...' if len(words) > 8 else ''}")


def check_excluded(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names that ``--exclude`` gives in the spelling used here.

    Raises
    ------
    BadInput
        One of them is unknown.
    """
    known = {name.lower(): name for name in EXCLUDABLE}
    found = []
    for name in names:
        plain = name.strip().lower().replace("-", "_").replace(" ", "_")
        if plain not in known:
            guess = nearest(plain, known)
            raise BadInput(f"--exclude {name} is no kind of view{guess}; use any of: {', '.join(EXCLUDABLE)}")
        found.append(known[plain])
    return tuple(found)


def leave_out(films: pd.DataFrame, names: Sequence[str], problems: list[Problem], notes: list[str]) -> pd.DataFrame:
    """Return the films that are none of the kinds of `EXCLUDABLE` named; the others become problems.

    Raises
    ------
    BadInput
        None is left.
    """
    reasons = pd.Series("", films.index)
    for name in names:
        found = _is(films, name)
        if name in _KINDS:
            silent = int(found.isna().sum())
            if silent:
                notes.append(f"--exclude {name}: {silent} of {len(films)} films do not say ({_KINDS[name]}) and are kept")
        found = found.fillna(False).astype(bool)
        reasons = reasons.mask(found, reasons.where(reasons == "", reasons + ", ") + name)
    out = reasons != ""
    problems += [
        Problem("excluded", f"{path}: {reason} (image '{image_id}')")
        for path, image_id, reason in zip(films.loc[out, "path"], films.loc[out, "image_id"], reasons[out], strict=True)
    ]
    if out.all():
        raise BadInput(f"--exclude {','.join(names)} leaves out all {len(films)} films; drop one of its names")
    return films[~out].reset_index(drop=True)


def _is(films: pd.DataFrame, name: str) -> pd.Series:
    """Tell which films are of a kind, missing where nothing says."""
    if name in VIEWS:
        return (films["view"] == name).astype("boolean")
    if name in MODIFIERS:
        return films["view_modifiers"].str.split().map(lambda modifiers: name in modifiers).astype("boolean")
    said = films["implant" if name == "implant" else "partial_view"].map({"YES": True, "NO": False}).astype("boolean")
    if name == "implant":
        label = f"{LABEL_PREFIX}implant"
        if label in films:
            said = said.fillna(films[label].astype("boolean"))
        said = said.mask(films["view_modifiers"].str.contains("implant_displaced"), True)
    return said
