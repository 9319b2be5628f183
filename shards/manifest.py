"""The manifest (one row per mammogram) and the findings (one row per box and label): their columns and their checks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pyarrow as pa

from mammostream.common.errors import BadInput, first_line, nearest
from mammostream.common.files import read_parquet, write_parquet
from mammostream.shards.identity import clean_patients, names_nobody, refuse_split_lookalikes, spelling

if TYPE_CHECKING:
    from collections.abc import Iterable

SPLITS = ("train", "val", "test")
LABEL_PREFIX = "label:"
MANIFEST_COLUMNS = {
    "image_id": "string",  # unique
    "path": "string",  # relative to the manifest where possible
    "patient_id": "string",
    "study_id": "string",
    "laterality": "string",  # L | R | empty
    "view": "string",
    "split": "string",  # train | val | test
    "pixel_spacing_mm": "float64",  # NaN if unknown
    "spacing_source": "string",  # dicom:… | csv | dataset | assumed | empty
    "bits": "int32",  # stored bits per pixel, 0 if the file could not be read
}
# What DICOM headers say besides; empty where they do not, and in manifests written before there were these columns.
OPTIONAL_COLUMNS = {
    "view_modifiers": "string",  # names of preprocess.views.MODIFIERS, with spaces between them
    "implant": "string",  # YES | NO | empty: of the breast
    "partial_view": "string",  # YES | NO | empty
    "manufacturer": "string",
    "model": "string",
    "intent": "string",  # FOR PRESENTATION | FOR PROCESSING | empty
}
FINDING_COLUMNS = {
    "image_id": "string",
    "label": "string",
    "xmin": "float64",  # native pixels; far edges exclusive
    "ymin": "float64",
    "xmax": "float64",
    "ymax": "float64",
}
_LARGEST = 1e6  # of any number in a manifest
MAKE_MANIFEST = "make one with 'mammostream prepare'"


def write_manifest(frame: pd.DataFrame, path: Path) -> None:
    """Check a manifest and write it, with image paths relative to it where they can be.

    Raises
    ------
    BadInput
        See :func:`check_manifest`.
    """
    check_manifest(frame, f"manifest {path}")
    labels = sorted(c for c in frame.columns if c.startswith(LABEL_PREFIX))
    frame = _with_optional(frame)[[*MANIFEST_COLUMNS, *OPTIONAL_COLUMNS, *labels]]
    frame = frame.astype(MANIFEST_COLUMNS | OPTIONAL_COLUMNS | dict.fromkeys(labels, "Int8"))
    frame["path"] = [_relative(Path(p), path.parent) for p in frame["path"]]
    write_parquet(path, pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata())


def read_manifest(path: Path, split: str | None = None) -> pd.DataFrame:
    """Read and check a manifest; its ``path`` column comes back absolute.

    Parameters
    ----------
    path
        The Parquet file.
    split
        Keep only this split's rows.

    Raises
    ------
    BadInput
        The file is missing or no manifest, has no rows (of that split), or breaks :func:`check_manifest`.
    """
    frame = _with_optional(_typed(read_parquet(path, "manifest", MAKE_MANIFEST, MANIFEST_COLUMNS), f"manifest {path}"))
    frame["patient_id"] = clean_patients(frame["patient_id"]).where(frame["patient_id"].notna())
    check_manifest(frame, f"manifest {path}")
    frame["path"] = [str((path.parent / p).absolute()) for p in frame["path"]]
    if split is not None:
        have = sorted(frame["split"].unique())
        frame = frame[frame["split"] == split].reset_index(drop=True)
        if frame.empty:
            raise BadInput(f"manifest {path} has no rows of split '{split}'{nearest(split, have)}; it has: {', '.join(have)}")
    return frame


def check_manifest(frame: pd.DataFrame, what: str) -> None:
    """Check that ids are unique, splits known, and that no patient is in two splits, by the same or a similar spelling.

    Raises
    ------
    BadInput
        Naming the first offending image or patient.
    """
    if frame.empty:
        raise BadInput(f"{what} has no rows; check --images-root and --csv-path")
    duplicated = frame["image_id"][frame["image_id"].duplicated()]
    if len(duplicated):
        raise BadInput(f"{what} has the image_id '{duplicated.iloc[0]}' more than once; make image ids unique")
    unknown = frame[~frame["split"].isin(SPLITS)]
    if len(unknown):
        row = unknown.iloc[0]
        raise BadInput(f"{what}: image '{row.image_id}' has the split '{row.split}'; use one of: {', '.join(SPLITS)}")
    nobody = frame["patient_id"].map(lambda patient: pd.isna(patient) or names_nobody(patient)).astype(bool)
    if nobody.any() and (frame["split"].nunique() > 1 or frame["patient_id"].isna().any()):
        raise BadInput(
            f"{what}: image '{frame[nobody].iloc[0].image_id}' has no patient_id ({nobody.sum()} such images); without one, "
            "splits may share a patient"
        )
    pairs = frame[["patient_id", "split"]].drop_duplicates()
    torn = pairs[pairs["patient_id"].duplicated(keep=False)]
    if len(torn):
        patient = torn["patient_id"].iloc[0]
        splits = " and ".join(torn.loc[torn["patient_id"] == patient, "split"])
        raise BadInput(
            f"{what}: patient '{patient}' is in the splits {splits} ({torn['patient_id'].nunique()} such patients); "
            "put all films of a patient into one split"
        )
    refuse_split_lookalikes(frame["patient_id"], frame["split"], f"{what}: ")


def split_by_patient(patients: Iterable[str], val_fraction: float, seed: int) -> dict[str, str]:
    """Deal patients to ``train`` and ``val``; ids that differ only in case or leading zeros go to the same one.

    Parameters
    ----------
    patients
        Patient ids, repeats allowed.
    val_fraction
        Share of patients that go to ``val``, 0-1; above 0 it is at least one patient, and one stays in ``train``.
    seed
        The same patients and seed give the same split.
    """
    alike: dict[str, list[str]] = {}
    for patient in sorted(set(patients)):
        alike.setdefault(spelling(patient), []).append(patient)
    unique = sorted(names[0] for names in alike.values())
    count = 0
    if val_fraction > 0 and len(unique) > 1:
        count = min(max(1, round(val_fraction * len(unique))), len(unique) - 1)
    chosen = set(np.random.default_rng(seed).permutation(unique)[:count])
    return {patient: "val" if names[0] in chosen else "train" for names in alike.values() for patient in names}


def write_findings(frame: pd.DataFrame, path: Path) -> None:
    """Write findings as Parquet."""
    frame = frame[list(FINDING_COLUMNS)].astype(FINDING_COLUMNS)
    write_parquet(path, pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata())


def read_findings(path: Path) -> pd.DataFrame:
    """Read findings.

    Raises
    ------
    BadInput
        The file is missing, lacks a column, or has boxes that are no numbers.
    """
    mend = f"it is a Parquet table with the columns {', '.join(FINDING_COLUMNS)}; 'mammostream simulate' writes one"
    frame = read_parquet(path, "findings", mend, FINDING_COLUMNS)
    try:
        frame = frame.astype(FINDING_COLUMNS)
        nameless = frame[["image_id", "label"]].isna().any(axis=1).to_numpy()
        if nameless.any():
            raise ValueError(f"row {nameless.argmax() + 1} lacks its image_id or label")
        endless = np.isinf(frame[["xmin", "ymin", "xmax", "ymax"]]).any(axis=1).to_numpy()
        if endless.any():
            raise ValueError(f"row {endless.argmax() + 1} has a box without end")
    except (ValueError, TypeError) as error:
        raise BadInput(
            f"findings {path}: {first_line(error)}; give each box its film, label and edges in native pixels"
        ) from error
    return frame


def _with_optional(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(**{c: frame[c].fillna("") if c in frame else "" for c in OPTIONAL_COLUMNS})


def _typed(frame: pd.DataFrame, what: str) -> pd.DataFrame:
    """Return a manifest's columns as :data:`MANIFEST_COLUMNS` has them; what is unknown is empty, of a number NaN or 0."""
    columns: dict[str, pd.Series] = {}
    for name, kind in MANIFEST_COLUMNS.items():
        if kind == "string":
            unknown = frame[name].isna()
            if name in ("image_id", "path") and unknown.any():
                raise BadInput(f"{what}: row {unknown.to_numpy().argmax() + 1} has no {name}; {MAKE_MANIFEST}")
            if name != "patient_id":  # without one, see check_manifest
                columns[name] = frame[name].astype(str).where(~unknown, "")
            continue
        values = pd.to_numeric(frame[name], errors="coerce").astype("float64")
        wrong = (values.isna() & frame[name].notna()) | (values.abs() > _LARGEST)
        if wrong.any():
            first = frame[wrong].iloc[0]
            raise BadInput(f"{what}: image '{first['image_id']}' has the {name} {first[name]!r}; correct it")
        columns[name] = values if kind == "float64" else values.fillna(0).astype(kind)
    return frame.assign(**columns)


def _relative(path: Path, base: Path) -> str:
    try:
        return Path(os.path.relpath(path.absolute(), base.absolute())).as_posix()
    except ValueError:
        return path.absolute().as_posix()
