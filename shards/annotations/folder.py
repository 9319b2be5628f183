"""A plain folder of mammograms, with or without CSVs that describe them.

A CSV has a column ``image_id`` (the file's name without its ending, or its path below the folder without it) and any of
``patient_id, study_id, laterality, view, split, pixel_spacing_mm``; every further column of 0, 1 and empty cells becomes a
label. Boxes come from a CSV of ``image_id, label, xmin, ymin, xmax, ymax`` in native pixels.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from mammostream.common.errors import BadInput, nearest
from mammostream.shards.annotations.annotations import Annotations, Problem
from mammostream.shards.annotations.csv_rows import binary, filled, numbers, read_rows, refuse, refuse_duplicates
from mammostream.shards.annotations.tree import ImageTree, name_without_ending
from mammostream.shards.manifest import FINDING_COLUMNS, LABEL_PREFIX

_TEXTS = ("patient_id", "study_id", "laterality", "view", "split")


def find_images(root: Path, follow_links: bool = False) -> dict[str, Path]:
    """Return the images below a folder by id: the file's name without its ending where all differ, else its path.

    Raises
    ------
    BadInput
        The folder is missing, cannot be read or holds no image, or two files differ only in their ending.
    """
    return image_ids(ImageTree.scan(root, follow_links=follow_links))


def image_ids(tree: ImageTree) -> dict[str, Path]:
    """Return a tree's images by id, as :func:`find_images` does."""
    images = {name_without_ending(path): path for path in tree.paths}
    if len(images) < len(tree.paths):
        images = {key: path for path, key in tree.keys.items()}
    if len(images) < len(tree.paths):
        kept = set(images.values())
        twin = next(path for path in tree.paths if path not in kept)
        raise BadInput(f"{twin} has a namesake with another ending in its folder; keep one of them")
    return images


def folder_films(tree: ImageTree, csv_paths: tuple[Path, ...], findings_csv: Path | None) -> Annotations:
    """Return every image of a folder with what the CSVs say of it; a row of an image that is not there is a problem.

    Raises
    ------
    BadInput
        A CSV without ``image_id``, with an image twice, a label that is not 0, 1 or empty, or a path out of the folder; two
        CSVs that contradict each other; a CSV none of whose images is there.
    """
    images = image_ids(tree)
    ids = {path: image_id for image_id, path in images.items()}
    films = pd.DataFrame({"path": list(images.values())}, index=list(images), dtype=object)
    problems: list[Problem] = []
    said: dict[str, pd.Series] = {}
    for csv_path in csv_paths:
        frame = _known(tree, ids, read_rows(csv_path, ["image_id"]), problems)
        refuse_duplicates(frame, "image_id")
        for name, column in _cells(frame).items():
            column = column.set_axis(frame["image_id"]).dropna()
            if name in said:
                _refuse_contradiction(said[name], column, name, frame)
                column = column.combine_first(said[name])
            said[name] = column
    for name, column in said.items():
        films[name] = column.reindex(films.index)
    films = films.rename_axis("image_id").reset_index()
    if "pixel_spacing_mm" in films:
        films["spacing_source"] = films["pixel_spacing_mm"].map(lambda spacing: "" if pd.isna(spacing) else "csv")
    findings = None
    if findings_csv is not None:
        boxes = _known(tree, ids, read_rows(findings_csv, FINDING_COLUMNS), problems)
        for side in ("xmin", "ymin", "xmax", "ymax"):
            filled(boxes, side)
            boxes[side] = numbers(boxes, side)
        filled(boxes, "label")
        findings = boxes[list(FINDING_COLUMNS)].reset_index(drop=True)
    return Annotations(films, findings, problems=problems)


def _known(tree: ImageTree, ids: dict[Path, str], frame: pd.DataFrame, problems: list[Problem]) -> pd.DataFrame:
    """Return the rows whose image is there, by its id in the folder; the others become problems."""
    paths = [tree.find((name,), where) for name, where in zip(filled(frame, "image_id"), frame["where"], strict=True)]
    found = pd.Series([path is not None for path in paths], frame.index)
    problems += [
        Problem("missing", f"{where}: no image '{name}' below {tree.root}")
        for name, where in frame.loc[~found, ["image_id", "where"]].to_numpy()
    ]
    if not found.any():
        row = frame.iloc[0]
        guess = nearest(row["image_id"], ids.values())
        raise BadInput(
            f"{row['where']}: no image '{row['image_id']}'{guess} below {tree.root}, nor any of the other {len(frame) - 1} "
            "rows; image_id is the file's name without its ending"
        )
    return frame[found].assign(image_id=[ids[path] for path in paths if path is not None])


def _cells(frame: pd.DataFrame) -> dict[str, pd.Series]:
    """Return the columns of a manifest that a CSV gives, missing where a cell is empty."""
    cells = {}
    for column in frame.columns:
        if column in _TEXTS:
            cells[column] = frame[column].where(frame[column] != "")
        elif column == "pixel_spacing_mm":
            cells[column] = numbers(frame, column, "is no size in mm; correct it or leave it empty")
            refuse(frame, cells[column] <= 0, column, "is no size in mm; correct it or leave it empty")
        elif column not in ("image_id", "where"):
            cells[LABEL_PREFIX + column] = binary(frame, column)
    return cells


def _refuse_contradiction(first: pd.Series, second: pd.Series, name: str, frame: pd.DataFrame) -> None:
    both = first.index.intersection(second.index)
    differ = both[(first[both] != second[both]).to_numpy(bool)]
    if len(differ):
        image_id = differ[0]
        where = frame.loc[frame["image_id"] == image_id, "where"].iloc[0]
        column = name.removeprefix(LABEL_PREFIX)
        raise BadInput(
            f"{where}, column '{column}': '{second[image_id]}' of image '{image_id}' contradicts '{first[image_id]}' in "
            "another CSV; correct one of them"
        )
