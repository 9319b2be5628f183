"""A plain folder of mammograms, with or without tables that describe them.

A table has a column ``image_id`` (the file's name or its path below the folder, with or without its ending) or ``path``,
and any of ``patient_id, study_id, laterality, view, split, pixel_spacing_mm``; columns of 0, 1 and empty cells become
labels. ``--columns`` says which columns are meant where they have other names. Boxes come from a CSV of ``image_id, label,
xmin, ymin, xmax, ymax`` in native pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from mammostream.common.errors import BadInput, nearest
from mammostream.shards.annotations.annotations import Annotations, Problem
from mammostream.shards.annotations.columns import TARGETS, TEXTS, ColumnMap, split_names, sure_labels
from mammostream.shards.annotations.csv_rows import binary, filled, numbers, read_rows, refuse, refuse_duplicates
from mammostream.shards.annotations.names import FileNames
from mammostream.shards.annotations.tree import ImageTree, name_without_ending
from mammostream.shards.manifest import FINDING_COLUMNS, LABEL_PREFIX


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


def folder_films(
    tree: ImageTree, csv_paths: tuple[Path, ...], findings_csv: Path | None, columns: ColumnMap | None = None
) -> Annotations:
    """Return every image of a folder with what the tables say of it; a row of an image that is not there is a problem.

    Parameters
    ----------
    tree
        The images.
    csv_paths, findings_csv
        The tables, and the one of boxes.
    columns
        Which columns of the tables hold what, where they have other names.

    Raises
    ------
    BadInput
        A table without ``image_id``, with an image twice, a label that is not 0, 1 or empty, or a path out of the folder; two
        tables that contradict each other; a table none of whose images is there; a column of `columns` that no table has.
    """
    columns = columns or ColumnMap()
    ids = {path: image_id for image_id, path in image_ids(tree).items()}
    names = FileNames(tree)
    annotations = Annotations(pd.DataFrame())
    said: dict[Path, dict[str, pd.Series]] = {}
    own: dict[str, Path] = {}
    tables = [_read(csv_path, columns) for csv_path in csv_paths]
    _require_mapped(columns, tables, csv_paths)
    for csv_path, table in zip(csv_paths, tables, strict=True):
        frame = _known(names, table, annotations.problems, "path" if "path" in table else "image_id", own)
        refuse_duplicates(frame.assign(image_id=frame["file"].map(ids)), "image_id")
        if "path" in frame and "image_id" in frame:  # the table's own ids, which other tables may use
            own |= dict(zip(filled(frame, "image_id"), frame["file"], strict=True))
            ids |= {file: image_id for image_id, file in own.items()}
        said[csv_path] = _cells(frame, columns, annotations.notes)
    films = pd.DataFrame({"path": list(ids)}, index=list(ids.values()), dtype=object)
    for name, column in _together(said, ids).items():
        films[name] = column.reindex(films.index)
    films = films.rename_axis("image_id").reset_index()
    if "pixel_spacing_mm" in films:
        films["spacing_source"] = films["pixel_spacing_mm"].map(lambda spacing: "" if pd.isna(spacing) else "csv")
    annotations.films = films
    if findings_csv is not None:
        annotations.findings = _findings(names, ids, own, findings_csv, annotations.problems)
    if names.respelled:
        name, file = next(iter(names.respelled.items()))
        annotations.notes.append(
            f"{len(names.respelled)} names of the tables are spelled otherwise than their files, such as '{name}' for {file}: "
            "taken for these, since no other file comes near"
        )
    return annotations


def _read(path: Path, columns: ColumnMap) -> pd.DataFrame:
    """Return a table's rows, with the columns that `columns` names under the names that they stand for."""
    own = [name for name in TARGETS if name not in columns.sources]
    frame = read_rows(path, known=(*columns.columns, *own))
    frame = frame.assign(**{target: frame[source] for target, source in columns.sources.items() if source in frame})
    if "image_id" in frame and "path" in frame and "path" not in columns.sources:
        frame = frame.drop(columns="path")  # perhaps one of another machine
    if "image_id" not in frame and "path" not in frame:
        have = ", ".join(name for name in frame if name != "where")
        raise BadInput(
            f"CSV {path} has no column 'image_id'{nearest('image_id', frame.columns)}; its columns are: {have}; say which of "
            "them names the file with --columns image_id=COLUMN"
        )
    return frame


def _require_mapped(columns: ColumnMap, tables: list[pd.DataFrame], paths: tuple[Path, ...]) -> None:
    added = {"where", *columns.sources}
    have = list(dict.fromkeys(name for table in tables for name in table.columns if name not in added))
    have += [name for name in columns.columns if name in added and any(name in table for table in tables)]
    for column in columns.columns:
        if column not in have:
            where = f"the columns of {', '.join(map(str, paths))} are: {', '.join(have)}" if paths else "give --csv-path"
            raise BadInput(f"--columns or --labels: no table has a column '{column}'{nearest(column, have)}; {where}")
    for label in columns.labels:
        cells = pd.concat([table[label.column] for table in tables if label.column in table])
        if label.values and not label.matches(cells).any():
            raise BadInput(
                f"--columns: no cell of the column '{label.column}' is {' or '.join(label.values)}"
                f"{nearest(label.values[0], cells.unique())}; label:{label.label} would be 0 everywhere"
            )


def _known(
    names: FileNames,
    frame: pd.DataFrame,
    problems: list[Problem],
    column: str = "image_id",
    own: Mapping[str, Path] | None = None,
) -> pd.DataFrame:
    """Return the rows whose image is there, with its ``file``; the others become problems. `own`: ids that are no names."""
    own = own or {}
    paths = [
        own.get(name) or names.find(name, where) for name, where in zip(filled(frame, column), frame["where"], strict=True)
    ]
    found = pd.Series([path is not None for path in paths], frame.index)
    root = names.tree.root
    if not found.any():
        row = frame.iloc[0]
        raise BadInput(
            f"{row['where']}: no image '{row[column]}'{names.hint(row[column])} below {root}, nor any of the other "
            f"{len(frame) - 1} rows; the column {column} is to hold the file's name or its path below the folder"
        )
    problems += [
        Problem("missing", f"{where}: no image '{name}' below {root}")
        for name, where in frame.loc[~found, [column, "where"]].to_numpy()
    ]
    return frame[found].assign(file=[path for path in paths if path is not None])


def _cells(frame: pd.DataFrame, columns: ColumnMap, notes: list[str]) -> dict[str, pd.Series]:
    """Return the columns of a manifest that a table gives, by file, missing where a cell is empty."""
    cells: dict[str, pd.Series] = {}
    for name in TEXTS:
        if name in frame:
            cells[name] = frame[name].where(frame[name] != "")
    if "split" in cells:
        cells["split"] = split_names(frame["split"]).where(frame["split"] != "")
    if "pixel_spacing_mm" in frame:
        cells["pixel_spacing_mm"] = numbers(frame, "pixel_spacing_mm", "is no size in mm; correct it or leave it empty")
        wrong = cells["pixel_spacing_mm"] <= 0
        refuse(frame, wrong, "pixel_spacing_mm", "is no size in mm; correct it or leave it empty")
    for label in columns.labels:
        if label.column in frame:
            for name, column in label.cells(frame).items():
                # Several sources of one label: it is there if one of them says so.
                cells[name] = column if name not in cells else pd.concat([cells[name], column], axis=1).max(axis=1)
    if not columns.labels:
        others = [name for name in frame if name not in (*TARGETS, *columns.columns, "where", "file")]
        labels, left = sure_labels(frame, others)
        cells |= {LABEL_PREFIX + name: binary(frame, name) for name in labels}
        if left:
            taken, told = ", ".join(labels) or "none", ", ".join(f"{name} ({why})" for name, why in left.items())
            notes.append(
                f"labels of {_table(frame)}: {taken}; columns that are none: {told}; --labels chooses columns of 0 and 1, "
                "--columns label:NAME=COLUMN==VALUE makes a label of a value"
            )
    return {name: column.set_axis(frame["file"]).dropna() for name, column in cells.items()} | {
        "where": frame["where"].set_axis(frame["file"])
    }


def _table(frame: pd.DataFrame) -> str:
    """Return the name of a table as it stands before the line in ``where``."""
    return frame["where"].iloc[0].rsplit(" ", 2)[0]


def _together(said: dict[Path, dict[str, pd.Series]], ids: dict[Path, str]) -> dict[str, pd.Series]:
    """Return what all tables say, by image.

    Raises
    ------
    BadInput
        Two tables contradict each other.
    """
    together: dict[str, pd.Series] = {}
    for cells in said.values():
        where = cells["where"]
        for name, column in cells.items():
            if name == "where":
                continue
            if name in together:
                _refuse_contradiction(together[name], column, name, where, ids)
                column = column.combine_first(together[name])
            together[name] = column
    return {name: column.set_axis(column.index.map(ids)) for name, column in together.items()}


def _refuse_contradiction(first: pd.Series, second: pd.Series, name: str, where: pd.Series, ids: dict[Path, str]) -> None:
    both = first.index.intersection(second.index)
    differ = both[(first[both] != second[both]).to_numpy(bool)]
    if len(differ):
        file = differ[0]
        column = name.removeprefix(LABEL_PREFIX)
        raise BadInput(
            f"{where[file]}, column '{column}': '{second[file]}' of image '{ids[file]}' contradicts '{first[file]}' in "
            "another CSV; correct one of them"
        )


def _findings(
    names: FileNames, ids: dict[Path, str], own: dict[str, Path], path: Path, problems: list[Problem]
) -> pd.DataFrame:
    """Return the boxes of a CSV."""
    boxes = _known(names, read_rows(path, FINDING_COLUMNS), problems, own=own)
    for side in ("xmin", "ymin", "xmax", "ymax"):
        filled(boxes, side)
        boxes[side] = numbers(boxes, side)
    filled(boxes, "label")
    return boxes.assign(image_id=boxes["file"].map(ids))[list(FINDING_COLUMNS)].reset_index(drop=True)
