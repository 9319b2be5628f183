"""Cross-validation by patient: which fold each patient is in, stratified by label, and the record that a rerun must fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from mammostream.common.errors import BadInput
from mammostream.common.files import parquet_facts, read_parquet, sha256_json, write_parquet
from mammostream.shards.identity import spelling

LEAST_FOLDS = 3  # one to test, one to validate, one to train
RECORD_NAME = "folds.parquet"


@dataclass(frozen=True)
class FoldPlan:
    """The fold of each patient.

    Attributes
    ----------
    folds
        Patient -> fold, from 0 to ``count - 1``; patients whose ids differ only in case or leading zeros are in the same one.
    count
        Number of folds.
    class_names
        C names.
    table
        One row per patient: ``patient``, ``fold``, ``rows``, and per class ``positive:<class>`` and ``negative:<class>``, how
        many of its rows have that label.
    """

    folds: Mapping[str, int]
    count: int
    class_names: Sequence[str]
    table: pd.DataFrame

    def of(self, people: np.ndarray) -> np.ndarray:
        """Return the fold of each row, (N,), from its patient."""
        unique, rows = np.unique(people, return_inverse=True)
        return np.array([self.folds[str(name)] for name in unique], int)[rows]

    def roles(self, fold: int) -> dict[str, list[int]]:
        """Return which folds do what when `fold` is tested: the next one validates, all others train."""
        validating = (fold + 1) % self.count
        return {
            "train": [other for other in range(self.count) if other not in (fold, validating)],
            "val": [validating],
            "test": [fold],
        }


def plan_folds(people: np.ndarray, labels: np.ndarray, class_names: Sequence[str], count: int, seed: int) -> FoldPlan:
    """Deal patients to folds, so that each fold has its share of the patients with each label.

    Iterative stratification (Sechidis, Tsoumakas and Vlahavas 2011, On the stratification of multi-label data, ECML PKDD,
    pages 145-158) over patients: the rarest label left is dealt first, each of its patients to the fold that lacks most of it,
    among those to the fold with most room for patients, then for rows, then at random. A patient's labels are, per class,
    *positive* if one of its rows is, else *negative* if one is. With one class, folds differ by at most one patient of
    each label.

    Parameters
    ----------
    people
        (N,) patient of each row, never "".
    labels
        (N, C) of 1, 0 and NaN for a missing label, of tiles or anything else that belongs to a patient.
    class_names
        C names.
    count
        Number of folds, at least 3.
    seed
        Decides what is at random. The same patients, labels and seed give the same folds, in whatever order the rows are.

    Raises
    ------
    BadInput
        There are fewer than 3 folds, fewer patients than folds, fewer patients with positive or with negative rows of a class
        than folds, or a fold came out without one of them.
    """
    if count < LEAST_FOLDS:
        raise BadInput(f"--folds {count}: give {LEAST_FOLDS} or more, since one fold tests, one validates and the others train")
    spellings = np.array([spelling(name) for name in np.unique(people)])
    names, of_spelling = np.unique(spellings, return_inverse=True)
    person = of_spelling[np.unique(people, return_inverse=True)[1]]
    if len(names) < count:
        raise BadInput(f"--folds {count}: there are {len(names)} patients only; give fewer folds, or labels of more patients")
    rows = np.bincount(person, minlength=len(names))
    counts = np.stack(
        [np.stack([np.bincount(person, column == value, len(names)) for column in labels.T], 1) for value in (1, 0)], 1
    ).astype(int)  # (G, 2, C)
    _check_enough(counts > 0, class_names, count)
    positive, negative = counts[:, 0] > 0, counts[:, 1] > 0
    folds = _deal(np.concatenate([positive, negative & ~positive], 1), rows, count, np.random.default_rng(seed))
    _check_folds(counts > 0, folds, class_names, count)

    known = {str(name): int(folds[unit]) for name, unit in zip(np.unique(people), of_spelling, strict=True)}
    # A row per spelling: a patient that is spelled in two ways is named by both.
    spelled = pd.Series(np.unique(people)).groupby(of_spelling).agg(" = ".join)
    columns = {"patient": spelled.to_numpy(), "fold": folds, "rows": rows}
    for c, name in enumerate(class_names):
        columns |= {f"positive:{name}": counts[:, 0, c], f"negative:{name}": counts[:, 1, c]}
    return FoldPlan(known, count, list(class_names), pd.DataFrame(columns))


def _deal(marks: np.ndarray, sizes: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return the fold of each of G patients, from their (G, L) labels as marks and their numbers of rows."""
    folds = np.full(len(marks), -1)
    lacking = np.tile(marks.sum(0) / count, (count, 1))  # of each label, by fold
    room = np.full(count, len(marks) / count)
    row_room = np.full(count, sizes.sum() / count)
    shuffled = rng.permutation(len(marks))
    shuffled = shuffled[np.argsort(-sizes[shuffled], kind="stable")]  # large patients first: small ones then even out
    while (folds < 0).any():
        left = marks[folds < 0].sum(0)
        label = int(np.argmin(np.where(left > 0, left, np.inf))) if left.any() else None
        for patient in shuffled[folds[shuffled] < 0]:
            if label is not None and not marks[patient, label]:
                continue
            wanted = room if label is None else lacking[:, label]
            fold = np.lexsort((rng.random(count), -row_room, -room, -np.round(wanted, 6)))[0]
            folds[patient] = fold
            lacking[fold] -= marks[patient]
            room[fold] -= 1
            row_room[fold] -= sizes[patient]
    return folds


def _check_enough(there: np.ndarray, class_names: Sequence[str], count: int) -> None:
    """Check that each class has positives and negatives in as many patients as there are folds; `there` is (G, 2, C)."""
    for c, name in enumerate(class_names):
        for kind, patients in zip(("positive", "negative"), there[:, :, c].sum(0).tolist(), strict=True):
            if patients < count:
                mend = f"give --folds {patients} or fewer, or " if patients >= LEAST_FOLDS else ""
                raise BadInput(
                    f"--folds {count}: {patients} {'patient has' if patients == 1 else 'patients have'} {kind} labels of "
                    f"'{name}', so a fold would have none; {mend}leave the class out of --class-names"
                )


def _check_folds(there: np.ndarray, folds: np.ndarray, class_names: Sequence[str], count: int) -> None:
    """Check that each fold has positives and negatives of each class."""
    for fold in range(count):
        for k, c in zip(*np.nonzero(~there[folds == fold].any(0)), strict=True):
            kind = ("positive", "negative")[k]
            raise BadInput(
                f"--folds {count}: fold {fold} came out without {kind} labels of '{class_names[c]}'; try another --seed, or "
                "fewer folds"
            )


def record_plan(folder: Path, plan: FoldPlan, facts: Mapping[str, Any], *, begun: bool = True, write: bool = True) -> str:
    """Write ``folds.parquet``, or check that the one that is there is of the same plan and inputs.

    Parameters
    ----------
    folder
        The folder of the folds.
    plan
        The folds.
    facts
        What else all folds must have in common, of plain types: name -> value. The name says what is at fault where it
        differs (``--lr-head``); a value may be a hash, which no message shows.
    begun
        Whether a fold has left something; else a record that differs is replaced: nothing was made with it.
    write
        Whether to write it; else it is only checked.

    Returns
    -------
    str
        A hash of plan and facts.

    Raises
    ------
    BadInput
        Other inputs or options; the message names the first that differ.
    """
    path = folder / RECORD_NAME
    facts = {"--folds": plan.count, "--class-names": list(plan.class_names)} | dict(facts)
    facts["patients or labels"] = sha256_json(plan.table.drop(columns="fold").to_dict("list"))
    facts["folds"] = sha256_json(plan.table["fold"].tolist())
    if path.is_file() and begun:
        read_parquet(path, "record of the folds", "choose another --output-dir", list(plan.table.columns[:3]))
        recorded = parquet_facts(path)
        for name in facts:
            if recorded.get(name) != facts[name]:
                made = f"{name} {_words(recorded.get(name))}, not {_words(facts[name])}"
                made = f"other {name}" if _is_hash(facts[name]) else made
                raise BadInput(f"the folds of {path} were made with {made}; give the same, or another --output-dir")
    elif write:
        table = pa.Table.from_pandas(plan.table, preserve_index=False)
        write_parquet(path, table, facts)
    return sha256_json(facts)


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64


def _words(value: Any) -> str:
    if value is None or value == []:
        return "its default"
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
