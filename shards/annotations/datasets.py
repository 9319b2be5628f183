"""The data sets that ``prepare`` knows, and telling them apart by their annotation files."""

from __future__ import annotations

from pathlib import Path

from mammostream.common.errors import BadInput, nearest
from mammostream.shards.annotations import cbis_ddsm, mias, rsna, vindr
from mammostream.shards.annotations.annotations import Annotations
from mammostream.shards.annotations.csv_rows import csv_header
from mammostream.shards.annotations.folder import folder_films
from mammostream.shards.annotations.tree import ImageTree

DATASETS = ("vindr", "cbis-ddsm", "rsna", "mias", "folder")
# The columns that a data set's CSV must have, and those that no other's has.
_COLUMNS = {
    "vindr": (vindr.COLUMNS, vindr.OWN_COLUMNS),
    "cbis-ddsm": (cbis_ddsm.COLUMNS, cbis_ddsm.COLUMNS[1:]),
    "rsna": (rsna.COLUMNS, rsna.OWN_COLUMNS),
}
_ANNOTATION_FILES = {
    "vindr": "breast-level_annotations.csv",
    "cbis-ddsm": "the four case description CSVs",
    "rsna": "train.csv",
    "mias": "Info.txt",
}


def tell_dataset(csv_paths: tuple[Path, ...]) -> tuple[str, str]:
    """Tell which data set annotation files belong to.

    Returns
    -------
    name, reason
        One of :data:`DATASETS`, and by what it was told.

    Raises
    ------
    BadInput
        They fit none, or several.
    """
    if not csv_paths:
        return "folder", "no --csv-path is given"
    told = [_tell(path) for path in csv_paths]
    if len({name for name, _ in told}) > 1:
        names = ", ".join(f"{path} is of {name}" for path, (name, _) in zip(csv_paths, told, strict=True))
        raise BadInput(f"the files of --csv-path belong to several data sets ({names}); prepare one at a time")
    return told[0]


def _tell(path: Path) -> tuple[str, str]:
    if path.is_file() and mias.is_mias(mias.read_text(path)):
        return "mias", f"{path} has rows like 'mdb001 G CIRC B 535 425 197'"
    header = csv_header(path)
    for name, (needed, own) in _COLUMNS.items():
        have = {cbis_ddsm.column_name(column) for column in header} if name == "cbis-ddsm" else set(header)
        lacking = [column for column in needed if column not in have]
        if not lacking and have.intersection(own):
            return name, f"{path} has its columns"
        if len(have.intersection(own)) >= 2:
            raise BadInput(
                f"CSV {path} looks like {name}'s but has no column '{lacking[0]}'{nearest(lacking[0], have)}; mend it, or give "
                "--dataset"
            )
    if "image_id" in header:
        return "folder", f"{path} has a column image_id and not those of another data set"
    raise BadInput(
        f"CSV {path} has no column 'image_id'{nearest('image_id', header)}, and its columns are those of no data set known "
        f"here ({', '.join(DATASETS)}): {', '.join(header)}"
    )


def describe(dataset: str, tree: ImageTree, csv_paths: tuple[Path, ...], findings_csv: Path | None) -> Annotations:
    """Return what the annotation files of a data set say.

    Raises
    ------
    BadInput
        They are missing or faulty, or ``--findings-csv`` is given for a data set that has none.
    """
    if dataset in _ANNOTATION_FILES and not csv_paths:
        raise BadInput(f"--dataset {dataset} needs --csv-path: {_ANNOTATION_FILES[dataset]}")
    if findings_csv is not None and dataset not in ("vindr", "folder"):
        raise BadInput(f"--findings-csv is for vindr and folder; {dataset} brings its boxes along")
    if dataset == "vindr":
        return vindr.vindr_films(tree, csv_paths, findings_csv)
    if dataset == "cbis-ddsm":
        return cbis_ddsm.cbis_films(tree, csv_paths)
    if dataset == "rsna":
        return rsna.rsna_films(tree, csv_paths)
    if dataset == "mias":
        if len(csv_paths) > 1:
            raise BadInput("--dataset mias takes one --csv-path: Info.txt")
        return mias.mias_films(tree, csv_paths[0])
    return folder_films(tree, csv_paths, findings_csv)
