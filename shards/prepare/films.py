"""From annotation files and images to a manifest: what the command ``prepare`` does, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from mammostream.common.errors import BadInput
from mammostream.preprocess.mammogram import ReadingConfig
from mammostream.preprocess.reading import AS_IT_COMES
from mammostream.shards.annotations.annotations import Annotations, Problem
from mammostream.shards.annotations.columns import ColumnMap
from mammostream.shards.annotations.datasets import describe
from mammostream.shards.annotations.names import FileNames
from mammostream.shards.annotations.tree import ImageTree
from mammostream.shards.manifest import (
    FINDING_COLUMNS,
    LABEL_PREFIX,
    MANIFEST_COLUMNS,
    OPTIONAL_COLUMNS,
    check_manifest,
    split_by_patient,
)
from mammostream.shards.prepare.headers import fill_in_spacing, with_headers
from mammostream.shards.prepare.patients import compile_regex, film_patients
from mammostream.shards.prepare.sorting import sort_films, without_copies
from mammostream.shards.prepare.view_names import with_named_views
from mammostream.shards.prepare.views import check_excluded, leave_out


@dataclass(frozen=True)
class Prepared:
    """A described data set.

    Attributes
    ----------
    manifest
        Its films, with paths that begin as `images_root` does; :func:`mammostream.shards.manifest.write_manifest` takes it.
    findings
        Its boxes, inside their films, or None where the data set has none.
    problems
        What was left out, and why.
    notes
        What was repaired, and what the user should know.
    """

    manifest: pd.DataFrame
    findings: pd.DataFrame | None
    problems: list[Problem]
    notes: list[str]


def prepare_films(
    dataset: str,
    images_root: Path,
    csv_paths: tuple[Path, ...] = (),
    findings_csv: Path | None = None,
    *,
    columns: ColumnMap | None = None,
    assume_spacing: float | None = None,
    patient_regex: str | None = None,
    patient_from: str | None = None,
    val_fraction: float = 0.1,
    test_fraction: float = 0.0,
    seed: int = 0,
    workers: int = 1,
    skip: Path | None = None,
    follow_links: bool = False,
    reading: ReadingConfig = AS_IT_COMES,
    allow_leakage: bool = False,
    exclude: Sequence[str] = (),
) -> Prepared:
    """Describe a data set's films: annotations, headers, boxes, splits.

    Parameters
    ----------
    dataset
        One of :data:`mammostream.shards.annotations.datasets.DATASETS`.
    images_root
        The folder of its images.
    csv_paths, findings_csv
        Its annotation files.
    columns
        Which columns of a plain folder's tables hold what.
    assume_spacing
        Pixel size in mm of films that neither the annotations nor the files tell one of.
    patient_regex
        What part of the patient id, or of the path if the id is missing or does not match, names the patient of a plain
        folder's film: the first group, else the whole match.
    patient_from
        ``folder``: the first folder below `images_root` is the patient of a plain folder's film, whatever else says.
    val_fraction, test_fraction, seed
        Shares, 0-1, of the training patients for splits that the data set lacks, and the seed of drawing them, ``test`` first.
    workers
        Processes that read headers and masks.
    skip
        A folder below `images_root` that is none of the data set's.
    reading
        What the build is going to read of multi-frame and FOR PROCESSING files; without it they are left out.
    follow_links, allow_leakage, exclude
        As the options of the command.

    Raises
    ------
    BadInput
        The annotations or the folder are at fault, none of the films can be read, a patient is in two splits or unknown, or the
        same DICOM instance is there under two patients.
    """
    pattern = compile_regex(patient_regex, dataset, patient_from)
    exclude = check_excluded(exclude)
    tree = ImageTree.scan(images_root, skip, follow_links)
    said = describe(dataset, tree, csv_paths, findings_csv, columns)
    problems = [*tree.problems, *said.problems]
    notes = [*said.notes, *_ignored(tree)]
    films = sort_films(with_headers(_present(said.films, tree, problems), workers, reading, problems, notes), reading, problems)
    if dataset == "folder":
        films = with_named_views(films, images_root, notes)
    films = leave_out(films, exclude, problems, notes)
    missing = [problem.message for problem in problems if problem.kind == "missing"]
    films["patient_id"] = film_patients(films, images_root, pattern, notes, patient_from=patient_from, missing=missing)
    # An unreadable file's patient would have stood in its header.
    films = without_copies(films[films["patient_id"] != ""].reset_index(drop=True), allow_leakage, problems, notes)
    if said.label_films is not None:
        films = said.label_films(films)
    fill_in_spacing(films, assume_spacing)
    findings = _boxes(said, films, workers, problems, notes)
    films["split"] = _with_test(films, test_fraction, seed, notes)
    films["split"] = _with_validation(films, val_fraction, seed)
    labels = [column for column in films if column.startswith(LABEL_PREFIX)]
    films = films[[*MANIFEST_COLUMNS, *OPTIONAL_COLUMNS, *labels]]
    check_manifest(films, f"the data set of {', '.join(map(str, csv_paths)) or images_root}")
    return Prepared(films, findings, problems, notes)


def _ignored(tree: ImageTree) -> list[str]:
    kinds = ", ".join(f"{count} {kind}" for kind, count in tree.ignored.most_common(8))
    return [f"{tree.ignored.total()} files below {tree.root} are left out, being no images: {kinds}"] if kinds else []


def _present(films: pd.DataFrame, tree: ImageTree, problems: list[Problem]) -> pd.DataFrame:
    """Return the films whose file is there."""
    missing = films["path"].isna()
    if missing.all():
        row = films.iloc[0]
        raise BadInput(
            f"none of the {len(films)} images that the annotations name is below {tree.root}, such as '{row['image_id']}' "
            f"({row['where']}){FileNames(tree).hint(row['image_id'])}; check --images-root"
        )
    problems += [
        Problem("missing", f"{row.where}: no file for the image '{row.image_id}' below {tree.root}")
        for row in films[missing].itertuples()
    ]
    return films[~missing].reset_index(drop=True)


def _boxes(
    said: Annotations, films: pd.DataFrame, workers: int, problems: list[Problem], notes: list[str]
) -> pd.DataFrame | None:
    """Return the boxes of the films, inside them, from the annotations or from files; None where the data set has none."""
    findings = said.findings
    if said.read_boxes is not None:
        findings, faults = said.read_boxes(films.assign(height=films["file_height"], width=films["file_width"]), workers)
        problems += faults
    return None if findings is None else _inside_films(findings, films, problems, notes)


def _inside_films(findings: pd.DataFrame, films: pd.DataFrame, problems: list[Problem], notes: list[str]) -> pd.DataFrame:
    """Return the boxes of the films, clipped to them."""
    sizes = films.set_index("image_id")
    findings = findings[findings["image_id"].isin(sizes.index)].reset_index(drop=True).astype(FINDING_COLUMNS)
    sizes = sizes.reindex(findings["image_id"])
    readable = (sizes["bits"] > 0).to_numpy()
    extent = {}
    for said, read in (("width", "file_width"), ("height", "file_height")):
        extent[said] = sizes[read].to_numpy(float)
        if said in sizes:
            asked = sizes[said].to_numpy(float)
            differ = readable & (asked != extent[said]) & ~np.isnan(asked)
            if differ.any():
                row = sizes[differ].iloc[0]
                raise BadInput(
                    f"image {row['path']} is {row['file_width']} x {row['file_height']} pixels, but its boxes are for "
                    f"{row['width']:g} x {row['height']:g} ({sizes.index[differ].nunique()} such images); give images of their "
                    "own size"
                )
            extent[said] = np.where(readable, extent[said], asked)
    clipped = findings.copy()
    for axis, size in (("x", "width"), ("y", "height")):
        limit = np.where(np.isnan(extent[size]) | (extent[size] <= 0), np.inf, extent[size])
        for side in ("min", "max"):
            clipped[axis + side] = np.clip(findings[axis + side], 0, limit)
    empty = (clipped["xmin"] >= clipped["xmax"]) | (clipped["ymin"] >= clipped["ymax"])
    problems += [
        Problem(
            "no box",
            f"a box of '{row.label}' in image '{row.image_id}' is empty or outside it: "
            f"{row.xmin:g}, {row.ymin:g}, {row.xmax:g}, {row.ymax:g}",
        )
        for row in findings[empty].itertuples()
    ]
    sides = ["xmin", "ymin", "xmax", "ymax"]
    changed = (clipped[sides] != findings[sides]).any(axis=1) & ~empty
    if changed.any():
        notes.append(f"{changed.sum()} boxes reach out of their film and are clipped to it")
    return clipped[~empty].reset_index(drop=True)


def _with_test(films: pd.DataFrame, test_fraction: float, seed: int, notes: list[str]) -> pd.Series:
    """Return the splits, with training patients dealt to ``test`` where no film is of that split."""
    splits = films["split"]
    if not test_fraction:
        return splits
    if (splits == "test").any():
        notes.append("the data set has a test split of its own: --test-fraction is not used")
        return splits
    training = splits.isin(["", "train"])
    dealt = films.loc[training, "patient_id"].map(split_by_patient(films.loc[training, "patient_id"], test_fraction, seed))
    held_out = dealt.index[dealt == "val"]
    return splits.mask(splits == "", "train").mask(splits.index.isin(held_out), "test")


def _with_validation(films: pd.DataFrame, val_fraction: float, seed: int) -> pd.Series:
    """Return the splits, with training patients dealt to ``val`` where no film is of that split."""
    splits = films["split"]
    if (splits == "").all():
        splits = pd.Series("train", films.index)
    if (splits == "val").any():
        return splits
    training = splits == "train"
    dealt = films.loc[training, "patient_id"].map(split_by_patient(films.loc[training, "patient_id"], val_fraction, seed))
    return dealt.reindex(films.index).fillna(splits)
