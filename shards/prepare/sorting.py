"""What an archive's export holds besides the films to build: other objects, raw twins of processed films, copies."""

from __future__ import annotations

import pandas as pd

from mammostream.common.errors import BadInput
from mammostream.preprocess.mammogram import ReadingConfig
from mammostream.preprocess.objects import why_left_out
from mammostream.shards.annotations.annotations import Problem

# An identifier that more files share was written by an anonymiser: it tells nothing.
_MAX_COPIES = 4


def sort_films(films: pd.DataFrame, reading: ReadingConfig, problems: list[Problem]) -> pd.DataFrame:
    """Return the films that a build with the same options reads; of a raw film and its processed version, the latter.

    Parameters
    ----------
    films
        With the columns ``facts`` (see :func:`mammostream.preprocess.objects.object_facts`; empty where the file is no DICOM),
        ``path, study_id, laterality, view, bits``.
    reading
        Which files the build is going to read.
    problems
        What is left out is added here, with its reason.

    Raises
    ------
    BadInput
        Nothing is left.
    """
    out: dict[int, Problem] = {}
    for row in films.itertuples():
        if other := why_left_out(row.facts, reading):
            out[row.Index] = Problem(other.kind, f"image {row.path} {other}")
    twins = _raw_twins(films.drop(list(out)))
    out |= {
        raw: Problem(
            "raw twin", f"image {films.at[raw, 'path']} is raw; its processed version {films.at[twin, 'path']} is kept"
        )
        for raw, twin in twins.items()
    }
    problems += out.values()
    if len(out) == len(films):
        raise BadInput(f"none of the {len(films)} images can be built from; the first: {next(iter(out.values())).message}")
    return films.drop(list(out)).reset_index(drop=True)


def _raw_twins(films: pd.DataFrame) -> dict[int, int]:
    """Return raw films and their processed versions, by their rows.

    A processed film may name the instance that it was made from. Else the two agree in study, side, view and, where both
    tell it, the time of acquisition.
    """
    facts = films["facts"]
    raw = facts.map(lambda said: "raw" in said).astype(bool)
    if not raw.any() or raw.all():
        return {}
    processed = films[~raw & facts.map(bool)]
    sources = {uid: row.Index for row in processed.itertuples() for uid in row.facts.get("sources", "").split()}
    takes: dict[tuple, list[int]] = {}
    for row in processed.itertuples():
        takes.setdefault((row.study_id, row.laterality, row.view), []).append(row.Index)
    twins = {}
    for row in films[raw].itertuples():
        twin = sources.get(row.facts.get("sop_instance", ""))
        if twin is None and row.study_id and row.laterality and row.view:
            acquired = row.facts.get("acquired", "")
            alike = takes.get((row.study_id, row.laterality, row.view), [])
            twin = next((i for i in alike if facts[i].get("acquired", "") in ("", acquired) or not acquired), None)
        if twin is not None:
            twins[row.Index] = twin
    return twins


def without_copies(films: pd.DataFrame, allow_leakage: bool, problems: list[Problem], notes: list[str]) -> pd.DataFrame:
    """Return the films without those that are the same DICOM instance as an earlier one.

    Parameters
    ----------
    films
        With ``facts, path, patient_id, laterality, view, file_height, file_width``.
    allow_leakage
        Keep an instance that is there under two patients, with a note.
    problems, notes
        What is left out, and what the user should know.

    Raises
    ------
    BadInput
        An instance is there under two patients.
    """
    uids = films["facts"].map(lambda said: said.get("sop_instance", ""))
    counts = uids[uids != ""].value_counts()
    for uid in counts.index[counts > _MAX_COPIES]:
        notes.append(f"the SOPInstanceUID '{uid}' of {counts[uid]} files tells nothing: it is not used to find copies")
    uids = uids.where(~uids.isin(counts.index[counts > _MAX_COPIES]), "")
    key = pd.DataFrame({"uid": uids}).join(films[["laterality", "view", "file_height", "file_width"]])
    first = _first_of(key)
    copies = films.index[(first != films.index) & (uids != "")]
    torn = [i for i in copies if films.at[i, "patient_id"] != films.at[first[i], "patient_id"]]
    if torn:
        one, other = films.loc[first[torn[0]]], films.loc[torn[0]]
        said = (
            f"image {other['path']} of patient '{other['patient_id']}' is the same instance (SOPInstanceUID) as {one['path']} "
            f"of patient '{one['patient_id']}' ({len(torn)} such images)"
        )
        if not allow_leakage:
            raise BadInput(
                f"{said}; one person under two ids may end up in two splits: correct the ids, or give --allow-leakage to keep "
                "both"
            )
        notes.append(f"warning: {said}; both are kept")
    copies = copies.difference(torn)
    problems += [
        Problem("duplicate", f"image {films.at[i, 'path']} is the same instance as {films.at[first[i], 'path']}, which is kept")
        for i in copies
    ]
    return films.drop(copies).reset_index(drop=True)


def _first_of(key: pd.DataFrame) -> pd.Series:
    """Return for each row the index of the first row that equals it."""
    rows = pd.Series(key.index, key.index)
    return rows.groupby([key[name] for name in key], sort=False).transform("first")
