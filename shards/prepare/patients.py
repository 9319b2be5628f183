"""The patient of each film: from annotations, headers or ``--patient-regex``, with what looks wrong about them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from mammostream.common.errors import BadInput
from mammostream.shards.identity import clean_ids, describe_lookalikes, lookalikes, names_nobody, stands_for_all, without_views

_MEND = (
    "give --patient-regex (such as '[^/]+$' if each film is of another patient), --patient-from folder if each patient has a "
    "folder, or a CSV with image_id and patient_id"
)


def compile_regex(patient_regex: str | None, dataset: str, patient_from: str | None = None) -> re.Pattern[str] | None:
    """Return ``--patient-regex`` as a pattern.

    Raises
    ------
    BadInput
        It is no regular expression, ``--patient-from`` is given too, or the data set names its patients itself.
    """
    if patient_regex and patient_from:
        raise BadInput("--patient-regex and --patient-from both say where the patient stands; give one")
    if patient_from and dataset != "folder":
        raise BadInput(f"--patient-from is for plain folders; {dataset} names its patients itself")
    if patient_regex and dataset != "folder":
        raise BadInput(f"--patient-regex is for plain folders; {dataset} names its patients itself")
    try:
        return re.compile(patient_regex) if patient_regex else None
    except re.error as error:
        raise BadInput(f"--patient-regex {patient_regex!r} is not a regular expression: {error}") from error


def film_patients(
    films: pd.DataFrame,
    root: Path,
    pattern: re.Pattern[str] | None,
    notes: list[str],
    *,
    patient_from: str | None = None,
    missing: Sequence[str] = (),
) -> pd.Series:
    """Return each film's patient; "" if the file cannot be read and nothing else tells.

    Parameters
    ----------
    films
        ``path``, ``patient_id`` and ``study_id`` as annotations and headers have them, and ``bits``, 0 if unreadable.
    root
        Folder that the pattern's paths are relative to.
    pattern
        ``--patient-regex``: applied to the id, and to the path if there is no id or it does not match.
    notes
        What was repaired, and what looks wrong, is added here.
    patient_from
        ``folder``: the first folder below `root` is the patient.
    missing
        Rows of tables that name no file: the likely cause where a film has no patient.

    Raises
    ------
    BadInput
        A readable film has no patient.
    """
    if patient_from == "folder":
        patients = _first_folders(films, root)
        notes += _doubts(patients)
        return patients
    patients = _known(films, notes)
    if pattern is not None:
        patients = _matched(films, patients, root, pattern, notes)
    else:
        named = without_views(patients)
        if (named != patients).any():
            example = patients[named != patients].iloc[0]
            notes.append(
                f"the patient ids name side and view, such as '{example}': the films count as those of {named.nunique()} "
                "patients; give --patient-regex if that is wrong"
            )
        patients = named
    nameless = films[(patients == "") & (films["bits"] > 0)]
    if len(nameless):
        path = Path(nameless["path"].iloc[0]).relative_to(root)
        why = f": {notes[0]}" if notes and "names nobody" in notes[0] else ""
        if missing:
            raise BadInput(
                f"{len(missing)} rows of the tables name no file: {missing[0]}; {len(nameless)} films stand in no row with a "
                f"patient, such as {path}: write their names as the files are called, or {_MEND}{why}"
            )
        raise BadInput(f"{path} names no patient; {_MEND} ({len(nameless)} such films{why})")
    notes += _doubts(patients[patients != ""])
    return patients


def _known(films: pd.DataFrame, notes: list[str]) -> pd.Series:
    """Return the ids that name somebody, and "" elsewhere."""
    ids = clean_ids(films["patient_id"])
    for name in ids[ids != ""].unique():
        if names_nobody(name):
            notes.insert(0, f"the patient id '{name}' of {(ids == name).sum()} films names nobody: treated as unknown")
            ids = ids.where(ids != name, "")
    if stands_for_all(ids[films["bits"] > 0], clean_ids(films["study_id"])[films["bits"] > 0]):
        name, studies = ids[ids != ""].iloc[0], films.loc[films["bits"] > 0, "study_id"].nunique()
        notes.insert(0, f"the patient id '{name}' of all {studies} studies names nobody: treated as unknown")
        ids = ids.where(ids == "", "")
    return ids


def _first_folders(films: pd.DataFrame, root: Path) -> pd.Series:
    """Return the first folder below `root` that each film lies in."""
    parts = [Path(path).relative_to(root).parts for path in films["path"]]
    outside = next((path for path, names in zip(films["path"], parts, strict=True) if len(names) < 2), None)
    if outside is not None:
        raise BadInput(f"--patient-from folder: {outside} lies in no folder below {root}; move it, or give --patient-regex")
    return clean_ids(pd.Series([names[0] for names in parts], films.index, dtype=object))


def _matched(films: pd.DataFrame, patients: pd.Series, root: Path, pattern: re.Pattern[str], notes: list[str]) -> pd.Series:
    paths = [Path(path).relative_to(root).as_posix() for path in films["path"]]
    found, by_path = [], 0
    for patient, path, file in zip(patients, paths, films["path"], strict=True):
        name = _find(pattern, patient) if patient else ""
        if not name:
            name = _find(pattern, path)
            by_path += bool(patient and name)
        if not name:
            tried = f"neither the patient id '{patient}' nor the path '{path}'" if patient else f"'{path}'"
            verb = "matches" if patient else "does not match"
            raise BadInput(f"--patient-regex {pattern.pattern!r} {verb} {tried} of {file}; correct it")
        found.append(name)
    if by_path:
        notes.append(f"{by_path} patient ids do not match --patient-regex: it was applied to the paths of their films")
    return clean_ids(pd.Series(found, films.index, dtype=object))


def _find(pattern: re.Pattern[str], text: str) -> str:
    match = pattern.search(text)
    return (match.group(1 if pattern.groups else 0) or "") if match else ""


def _doubts(patients: pd.Series) -> list[str]:
    """Return what looks wrong about the patients of all films, as lines for the user."""
    if len(patients) < 2:
        return []
    doubts = []
    if patients.nunique() == len(patients):
        doubts.append(
            f"warning: each of the {len(patients)} films has a patient of its own, such as '{patients.iloc[0]}'; if patients "
            "have several films, they may now be in two splits: check the ids, and give --patient-regex"
        )
    elif patients.nunique() == 1:
        doubts.append(
            f"warning: all {len(patients)} films are of one patient, '{patients.iloc[0]}', so no validation split can be made; "
            "if that is wrong, give --patient-regex"
        )
    alike = [pair for pair in lookalikes(patients, patients) if pair[0] < pair[1]]
    if alike:
        doubts.append(
            f"warning: patients differ only in case or leading zeros: {describe_lookalikes(alike)}; they are kept in the same "
            "split"
        )
    return doubts
