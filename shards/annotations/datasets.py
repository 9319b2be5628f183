"""The data sets that ``prepare`` knows, and telling them apart by their annotation files."""

from __future__ import annotations

from pathlib import Path

from mammostream.common.errors import BadInput, nearest
from mammostream.shards.annotations import cbis_ddsm, cmmd, embed, inbreast, kau_bcmd, mias, rsna, vindr
from mammostream.shards.annotations.annotations import Annotations
from mammostream.shards.annotations.columns import ColumnMap
from mammostream.shards.annotations.csv_rows import fold, table_headers
from mammostream.shards.annotations.folder import folder_films
from mammostream.shards.annotations.tree import ImageTree

DATASETS = ("vindr", "cbis-ddsm", "rsna", "mias", "inbreast", "embed", "cmmd", "kau-bcmd", "folder")
# Data set, columns that a table of it must have, and those that no other's has.
_TABLES = (
    ("vindr", vindr.COLUMNS, vindr.OWN_COLUMNS),
    ("cbis-ddsm", cbis_ddsm.COLUMNS, cbis_ddsm.COLUMNS[1:]),
    ("cbis-ddsm", cbis_ddsm.JPEG_COLUMNS, cbis_ddsm.JPEG_COLUMNS[:2]),
    ("rsna", rsna.TEST_COLUMNS, ("prediction_id",)),
    ("rsna", rsna.COLUMNS, rsna.OWN_COLUMNS),
    ("inbreast", inbreast.COLUMNS, inbreast.OWN_COLUMNS),
    ("embed", embed.COLUMNS, embed.OWN_COLUMNS),
    ("embed", embed.CLINICAL_COLUMNS, embed.OWN_COLUMNS),
    ("cmmd", cmmd.COLUMNS, cmmd.OWN_COLUMNS),
    ("kau-bcmd", kau_bcmd.COLUMNS, kau_bcmd.OWN_COLUMNS),
)
_ANNOTATION_FILES = {
    "vindr": "breast-level_annotations.csv",
    "cbis-ddsm": "the four case description CSVs",
    "rsna": "train.csv",
    "mias": "Info.txt",
    "inbreast": "INbreast.csv or INbreast.xlsx",
    "embed": "EMBED_OpenData_metadata.csv and, for labels, EMBED_OpenData_clinical.csv",
    "cmmd": "CMMD_clinicaldata_revision.xlsx",
    "kau-bcmd": "correctSheetlast.xlsx",
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
    if path.is_file() and mias.is_mias(path):
        return "mias", f"{path} has rows like 'mdb001 G CIRC B 535 425 197'"
    headers = table_headers(path)
    for header in headers:
        have = {fold(column) for column in header}
        for name, needed, own in _TABLES:
            if all(fold(column) in have for column in needed) and any(fold(column) in have for column in own):
                return name, f"{path} has its columns"
    for header in headers:
        have = {fold(column) for column in header}
        for name, needed, own in _TABLES:
            if len(have.intersection(map(fold, own))) >= 2:
                lacking = next(column for column in needed if fold(column) not in have)
                raise BadInput(
                    f"CSV {path} looks like {name}'s but has no column '{lacking}'{nearest(lacking, header)}; mend it, or give "
                    "--dataset"
                )
    names = {fold(column) for header in headers for column in header}
    if named := next((name for name in ("image_id", "path") if name in names), None):
        return "folder", f"{path} has a column {named} and not those of another data set"
    raise BadInput(
        f"CSV {path} has no column 'image_id'{nearest('image_id', headers[0])}, and its columns are those of no data set known "
        f"here ({', '.join(DATASETS)}): {', '.join(headers[0])}; say which of them names the file with "
        "--columns image_id=COLUMN"
    )


def describe(
    dataset: str,
    tree: ImageTree,
    csv_paths: tuple[Path, ...],
    findings_csv: Path | None,
    columns: ColumnMap | None = None,
) -> Annotations:
    """Return what the annotation files of a data set say.

    Raises
    ------
    BadInput
        They are missing or faulty, or ``--findings-csv`` or ``--columns`` is given for a data set that has none.
    """
    if dataset in _ANNOTATION_FILES and not csv_paths:
        raise BadInput(f"--dataset {dataset} needs --csv-path: {_ANNOTATION_FILES[dataset]}")
    if findings_csv is not None and dataset not in ("vindr", "folder"):
        raise BadInput(f"--findings-csv is for vindr and folder; {dataset} brings its boxes along")
    if columns is not None and dataset != "folder":
        raise BadInput(f"--columns and --labels are for --dataset folder; {dataset} has columns and labels of its own")
    if dataset == "vindr":
        return vindr.vindr_films(tree, csv_paths, findings_csv)
    if dataset == "folder":
        return folder_films(tree, csv_paths, findings_csv, columns)
    if dataset == "embed":
        return embed.embed_films(tree, csv_paths)
    if dataset == "cbis-ddsm":
        return cbis_ddsm.cbis_films(tree, csv_paths)
    if dataset == "rsna":
        return rsna.rsna_films(tree, csv_paths)
    if len(csv_paths) > 1:
        raise BadInput(f"--dataset {dataset} takes one --csv-path: {_ANNOTATION_FILES[dataset]}")
    one_table = {
        "mias": mias.mias_films,
        "inbreast": inbreast.inbreast_films,
        "cmmd": cmmd.cmmd_films,
        "kau-bcmd": kau_bcmd.kau_films,
    }
    return one_table[dataset](tree, csv_paths[0])
