"""Who is who: the film that a tile's name refers to, and patients whose ids are spelled in more than one way."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

import numpy as np
import pandas as pd

from mammostream.common.errors import BadInput
from mammostream.preprocess.reading import IMAGE_SUFFIXES
from mammostream.preprocess.views import normal_side
from mammostream.shards.archive import escape_id

ENDINGS = IMAGE_SUFFIXES
# What follows the film's name in a tile's: in the shards' keys, and in the guide's patient1_tile_001.png.
_POSITION = re.compile(r"(?:_y\d+_x\d+|_x\d+_y\d+|[_-](?:tile|patch)[_-]?\d+)$", re.IGNORECASE)
_KEY = re.compile(r"[A-Za-z0-9_%-]+")
_ESCAPED = re.compile(r"(?:[A-Za-z0-9_-]|%[0-9A-F]{2})+")
_WHOLE = re.compile(r"(\d+)\.0+")
_LEADING_ZEROS = re.compile(r"(?<!\d)0+(?=\d)")
# What anonymisers, spreadsheets and exports write in place of an id, alone or joined as in ANON^ANON and PATIENT_ID.
_NOBODY = {
    *("anonymous", "anonymized", "anonymised", "anonymize", "anonymise", "anonym", "anon", "deidentified", "deid"),
    *("removed", "redacted", "deleted", "hidden", "confidential", "private", "missing", "blank", "empty", "default"),
    *("unknown", "undefined", "unnamed", "none", "null", "nan", "na", "nil", "no", "noname", "noid"),
    *("patient", "patientid", "patientname", "id", "name", "subject"),
}
_FILLER = re.compile(r"x{2,}")
_VIEW = re.compile(r"(.+?)[ _-]+(?:LEFT|RIGHT|L|R)[ _-]+(?:CC|MLO|ML|LM|LMO|XCC|XCCL|XCCM|FB)(?:[ _-]+\d+)?", re.IGNORECASE)
_CBIS_SET = re.compile(r"(?:Mass|Calc)-(?:Training|Test)_(?=P_\d+$)")
SEEN = ("trained", "validated", "pre-trained")
"""What a model may have been fitted on a patient for, the gravest first."""
_MANY_STUDIES = 3
_LISTED = 3


def tile_stem(tile_path: str) -> str:
    """Return a tile's file name without folders and without the endings of image formats, however many dots it holds."""
    name = tile_path.rpartition("/")[2]
    while name.lower().endswith(ENDINGS):
        name = name.rpartition(".")[0]
    return name


def key_of_path(path: str) -> str:
    """Return a path without its image ending as a shard's key: unchanged if it is a valid one, escaped otherwise."""
    folders, slash, _ = path.rpartition("/")
    stem = folders + slash + tile_stem(path)
    return stem if _KEY.fullmatch(stem) else escape_id(stem)


def film_of_tile(tile_path: str) -> str | None:
    """Return the film that a tile's name refers to, or None if the name does not tell.

    The name is the film's id followed by a position: ``_y<y>_x<x>`` as in the keys of shards, ``_tile_<n>`` as in the guide,
    or the like. The film's id may hold dots, spaces and any letters; if it is escaped as in a key, it is unescaped, so that a
    tile is of the same film before and after packing. Names that differ only in Unicode normalisation are of one film.
    """
    name = unicodedata.normalize("NFC", tile_stem(tile_path))
    film, found = _POSITION.subn("", name)
    if not found or not film:
        return None
    return unicodedata.normalize("NFC", unquote(film)) if _ESCAPED.fullmatch(film) else film


def clean_ids(values: Iterable[object]) -> pd.Series:
    """Return ids as text in one spelling: Unicode NFC, no surrounding spaces, no ``.0`` after a whole number; "" if missing.

    A column of whole numbers with an empty cell becomes one of floats in many programs, which then write ``10006.0``.
    """
    series = values if isinstance(values, pd.Series) else pd.Series(list(values), dtype=object)
    series = series.astype(object)
    unique = {value: _clean(value) for value in series.dropna().unique()}
    return series.map(lambda value: unique.get(value, "")).astype(str)


def _clean(value: object) -> str:
    text = unicodedata.normalize("NFC", str(value)).strip(" \t\r\n\0\u00a0\ufeff")
    whole = _WHOLE.fullmatch(text)
    return whole[1] if whole else text


def clean_patients(values: Iterable[object]) -> pd.Series:
    """Return patient ids as :func:`clean_ids` does, and "" for what names nobody, such as ``removed`` or ``anonymous``."""
    ids = clean_ids(values)
    nobody = {value for value in ids.unique() if names_nobody(value)}
    return ids.where(~ids.isin(nobody), "")


def names_nobody(patient: str) -> bool:
    """Return whether an id is empty or a constant that anonymisers write, such as ``removed`` or ``ANON^ANON``."""
    text = patient.casefold().replace("n/a", "na").replace("de-identified", "deidentified")
    words = re.split(r"[\W_]+", text)
    return all(not word or word in _NOBODY or _FILLER.fullmatch(word) for word in words)


def stands_for_all(patients: pd.Series, studies: pd.Series) -> bool:
    """Return whether all films have one patient id but are of many studies: an anonymiser's constant, not a patient."""
    return patients.nunique() == 1 and patients.iloc[0] != "" and studies[studies != ""].nunique() >= _MANY_STUDIES


def without_views(patients: pd.Series) -> pd.Series:
    """Return the patients of ids that name a film, such as CBIS-DDSM's ``Mass-Test_P_00173_LEFT_CC``: ``P_00173``.

    Ids are returned unchanged unless all of them (those that are not "") end in a side and a view.
    """
    unique = [value for value in patients.unique() if value]
    matches = {value: match for value in unique if (match := _VIEW.fullmatch(value))}
    if not unique or len(matches) < len(unique):
        return patients
    return patients.map({value: _CBIS_SET.sub("", match[1]) for value, match in matches.items()}).fillna("")


def spelling(patient: str) -> str:
    """Return what two spellings of one id have in common: without case and without zeros in front of numbers."""
    return _LEADING_ZEROS.sub("", unicodedata.normalize("NFKC", patient).casefold())


def lookalikes(ids: Iterable[str], others: Iterable[str]) -> list[tuple[str, str]]:
    """Return pairs of an id and another one that differ only in case or leading zeros (``P1`` and ``p01``), sorted."""
    by_spelling: dict[str, set[str]] = {}
    for name in set(map(str, ids)) - {""}:
        by_spelling.setdefault(spelling(name), set()).add(name)
    found = ((one, other) for other in set(map(str, others)) - {""} for one in by_spelling.get(spelling(other), ()))
    return sorted((one, other) for one, other in found if one != other)


def refuse_split_lookalikes(patients: pd.Series, splits: pd.Series, what: str = "") -> None:
    """Refuse different ids that may be one patient and are in different splits; `what` stands before the error.

    Raises
    ------
    BadInput
        There are such ids.
    """
    if alike := split_lookalikes(patients, splits):
        raise BadInput(
            f"{what}patients in different splits differ only in case or leading zeros: {describe_lookalikes(alike)}; if they "
            "are the same, spell them alike and put all that is theirs into one split; else rename one"
        )


def describe_lookalikes(pairs: list[tuple[str, str]]) -> str:
    """Return pairs of :func:`lookalikes` as words: ``'P1' and 'p01', … and 4 more``."""
    shown = ", ".join(f"'{one}' and '{other}'" for one, other in pairs[:_LISTED])
    return shown + (f" and {len(pairs) - _LISTED} more" if len(pairs) > _LISTED else "")


def split_lookalikes(patients: pd.Series, splits: pd.Series) -> list[tuple[str, str]]:
    """Return the pairs of different ids that may be one patient and whose films are in different splits."""
    pairs = pd.DataFrame({"patient": patients.astype(str), "split": splits.astype(str)}).drop_duplicates()
    pairs = pairs[pairs["patient"] != ""]
    names = [group["patient"].to_numpy() for _, group in pairs.groupby("split")]
    found = [pair for i, one in enumerate(names) for other in names[i + 1 :] for pair in lookalikes(one, other)]
    return sorted({(min(pair), max(pair)) for pair in found})


def known_breast(patients: np.ndarray, sides: np.ndarray) -> np.ndarray:
    """Return the breast of each row as ``<patient> <side>``, "" if either is unknown."""
    named = np.char.add(np.char.add(patients.astype(str), " "), sides.astype(str))
    return np.where((patients == "") | (sides == ""), "", named)


def clean_sides(values: Iterable[object]) -> pd.Series:
    """Return the side of each breast as ``L`` or ``R`` (from ``left``, ``RIGHT`` and the like), "" if unknown."""
    return clean_ids(values).map(normal_side)


def subject_hashes(patients: Iterable[str], films: Iterable[str]) -> np.ndarray:
    """Return for each row a hash of its patient, or of its film if the patient is unknown.

    A checkpoint keeps those that it was fitted on, so that it can be told later whether it is judged on them. The hash does not
    depend on case or leading zeros. It hides ids from the eye, not from someone who tries all possible ids.
    """

    def digest(patient: str, film: str) -> str:
        subject = f"patient {spelling(patient)}" if patient else f"film {unicodedata.normalize('NFC', film)}"
        return hashlib.sha256(f"mammostream {subject}".encode()).hexdigest()[:16]

    pairs = pd.DataFrame({"patient": list(map(str, patients)), "film": list(map(str, films))}, dtype=object)
    pairs["film"] = pairs["film"].where(pairs["patient"] == "", "")
    unique = pairs.drop_duplicates()
    known = {(p, f): digest(p, f) for p, f in unique.itertuples(index=False)}
    return np.array([known[pair] for pair in pairs.itertuples(index=False, name=None)], dtype=str)


def fitted_subjects(checkpoint: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the :func:`subject_hashes` that a checkpoint keeps, by what the model was fitted on them for.

    A classifier's has ``fitted_on``, that of a pre-training ``subjects``.

    Raises
    ------
    TypeError
        They are no lists of hashes.
    """
    found = checkpoint.get("fitted_on") or ({"pre-trained": checkpoint["subjects"]} if "subjects" in checkpoint else {})
    for purpose, hashes in found.items():
        if not isinstance(hashes, list) or not all(isinstance(value, str) for value in hashes):
            raise TypeError(f"fitted_on of '{purpose}' is no list of hashes")
    return found


def seen_by(fitted_on: Mapping[str, Sequence[str]], patients: Iterable[str], films: Iterable[str]) -> np.ndarray:
    """Return for each row what a model was fitted on its patient for: one of :data:`SEEN`, the gravest, or "" if for nothing.

    Parameters
    ----------
    fitted_on
        One of :data:`SEEN` -> the :func:`subject_hashes` that a checkpoint keeps.
    patients, films
        Of each row; the film counts if the patient is "".
    """
    hashes = subject_hashes(patients, films)
    found = np.full(len(hashes), "", object)
    for purpose in reversed(SEEN):
        found[np.isin(hashes, list(fitted_on.get(purpose, ())))] = purpose
    return found
