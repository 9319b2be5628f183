"""CBIS-DDSM: four CSVs (mass or calc, train or test) with a row an abnormality, and DICOM films, crops and masks.

Lee et al. 2017, doi:10.1038/sdata.2017.177. Paths in the CSVs are ``<case>/<study>/<series>/<file>``; downloads name their
folders and files in several ways, so films and masks are found by the series' or the case's folder.

The copy as JPEG (Kaggle, awsaf49/cbis-ddsm-breast-cancer-image-dataset) has the same CSVs and ``jpeg/<series>/<file>.jpg``;
its ``csv/dicom_info.csv`` says in ``SeriesDescription`` which file is a film, a crop or a mask (``full mammogram images``,
``cropped images``, ``ROI mask images``; empty for some). Public programs join it by the series in ``file_path`` and the
last two parts of ``image_path``.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

from mammostream.common.errors import BadInput
from mammostream.common.parallel import map_processes
from mammostream.preprocess.reading import read_header, read_mammogram
from mammostream.shards.annotations.annotations import Annotations, Problem, findings_frame
from mammostream.shards.annotations.csv_rows import (
    birads_labels,
    coded,
    density_labels,
    filled,
    fold,
    four_categories,
    read_rows,
    refuse,
    table_headers,
)
from mammostream.shards.annotations.tree import ImageTree, inside, name_without_ending
from mammostream.shards.manifest import LABEL_PREFIX

COLUMNS = (
    "patient id",
    "left or right breast",
    "image view",
    "abnormality id",
    "abnormality type",
    "assessment",
    "pathology",
    "image file path",
    "cropped image file path",
    "roi mask file path",
)
# Of dicom_info.csv.
JPEG_COLUMNS = ("file_path", "image_path", "PatientID", "SeriesDescription")
_FILM, _MASK, _CROP = "full mammogram images", "ROI mask images", "cropped images"
_LOSSY = (".jpg", ".jpeg")
# A mask of another size is the film's if it is of its shape, but for this share.
_SHAPE_TOLERANCE = 0.02
# A lossy mask's edges ring: so far (of 255) its values stray, and so many of its pixels do not.
_STRAY, _TWO_VALUED = 48, 0.98
_PATHOLOGIES = {"MALIGNANT": "malignant", "BENIGN": "benign", "BENIGN_WITHOUT_CALLBACK": "benign"}
# Mass shapes that are classes of their own elsewhere.
_SHAPES = {
    "ARCHITECTURAL_DISTORTION": "architectural_distortion",
    "ASYMMETRIC_BREAST_TISSUE": "asymmetry",
    "FOCAL_ASYMMETRIC_DENSITY": "asymmetry",
}


def cbis_films(tree: ImageTree, csv_paths: tuple[Path, ...]) -> Annotations:
    """Return CBIS-DDSM's films, with labels of all abnormalities of a film and boxes from the mask files.

    A film that is in the mass and in the calcification set is two images there, with a mark for one kind each; here both
    get the labels and boxes of both. A patient in the official training set of one kind and the test set of the other is
    moved to the test set as a whole.

    Raises
    ------
    BadInput
        A CSV lacks a column or holds a value that the data set does not know, or a path leads out of the folder.
    """
    tables = {path: {fold(name) for name in table_headers(path)[0]} for path in csv_paths}
    cases = [path for path, have in tables.items() if not have.issuperset(map(fold, JPEG_COLUMNS))]
    if not cases:
        raise BadInput(f"{csv_paths[0]} says which JPEG file is what; give the four case description CSVs after --csv-path too")
    kinds = _kinds([path for path in csv_paths if path not in cases])
    rows = pd.concat([_read(path) for path in cases], ignore_index=True).fillna("")
    rows["case"] = [
        inside(path, where, tree.root).split("/")[0] for path, where in zip(rows["image file path"], rows["where"], strict=True)
    ]
    rows["side"] = coded(rows, "left or right breast", {"LEFT": "L", "RIGHT": "R"})
    rows["film"] = rows["patient id"] + " " + rows["side"] + " " + rows["image view"]
    rows["labels"] = _labels(rows)
    rows["split"] = _official_split(rows)
    notes = _move_torn_patients(rows)

    first = rows.drop_duplicates("case")
    films = pd.DataFrame(
        {
            "image_id": first["case"],
            "path": [
                _film(tree, path, where, kinds) for path, where in zip(first["image file path"], first["where"], strict=True)
            ],
            "where": first["where"],
            "film": first["film"],
            "patient_id": first["patient id"],
            "study_id": first["patient id"],
            "laterality": first["side"],
            "view": first["image view"],
            "split": first["split"],
        }
    ).reset_index(drop=True)
    exploded = rows.explode("labels")
    on_film = pd.crosstab(exploded["film"], exploded["labels"]).reindex(films["film"]) > 0
    films = films.join(on_film.astype("Int8").add_prefix(LABEL_PREFIX).set_index(films.index))
    birads = birads_labels(rows, "assessment", range(6))
    if "breast density" in rows:
        birads = birads.join(density_labels(rows, "breast density", four_categories("0", "0.0")))
    films = films.join(birads.groupby(rows["film"]).max().reindex(films["film"]).set_index(films.index))
    return Annotations(films, read_boxes=partial(_read_boxes, tree, rows, kinds), notes=notes)


def _kinds(paths: list[Path]) -> dict[tuple[str, str], str]:
    """Return what dicom_info.csv says of the files of the copy as JPEG, by series and name without ending."""
    frames = [read_rows(path, JPEG_COLUMNS, keep_all=False) for path in paths]
    return {
        (PurePosixPath(text).parent.name, PurePosixPath(text).stem): kind
        for frame in frames
        for text, kind in frame[["image_path", "SeriesDescription"]].to_numpy()
        if kind
    }


def _kind(path: Path, kinds: dict[tuple[str, str], str]) -> str:
    return kinds.get((path.parent.name, name_without_ending(path)), "")


def _read(path: Path) -> pd.DataFrame:
    frame = read_rows(path, COLUMNS, known=("mass shape", "breast density"))
    for column in ("patient id", "left or right breast", "image view", "abnormality type", "image file path"):
        filled(frame, column)
    return frame


def _labels(rows: pd.DataFrame) -> pd.Series:
    """Return the labels of each abnormality, the kind first."""
    kinds = coded(rows, "abnormality type", {"mass": "mass", "calcification": "calcification"})
    severities = coded(rows, "pathology", _PATHOLOGIES)
    shapes = rows["mass shape"] if "mass shape" in rows else pd.Series("", rows.index)
    of_shape = {text: sorted({_SHAPES[shape] for shape in text.split("-") if shape in _SHAPES}) for text in shapes.unique()}
    return pd.Series(
        [
            [kind, *([severity] if severity else []), *of_shape[shape]]
            for kind, severity, shape in zip(kinds, severities, shapes, strict=True)
        ],
        rows.index,
    )


def _official_split(rows: pd.DataFrame) -> pd.Series:
    """Return the split that each case's name tells: ``Mass-Training_P_00001_LEFT_CC``."""
    kind = rows["image file path"].str.extract(r"^[A-Za-z]+-(Training|Test)_[^/]+/", expand=False)
    refuse(rows, kind.isna(), "image file path", "is no path like 'Mass-Training_P_00001_LEFT_CC/.../000000.dcm'; correct it")
    return kind.map({"Training": "train", "Test": "test"})


def _move_torn_patients(rows: pd.DataFrame) -> list[str]:
    """Put patients of both official splits into the test set; say so."""
    splits = rows.groupby("patient id")["split"].nunique()
    torn = splits.index[splits > 1]
    moved = rows["patient id"].isin(torn) & (rows["split"] == "train")
    films = rows.loc[moved, "case"].nunique()
    rows.loc[moved, "split"] = "test"
    if not len(torn):
        return []
    return [
        f"{len(torn)} patients are in the official training set of one kind and the test set of the other; their {films} "
        f"training films are moved to the test set: {', '.join(torn)}"
    ]


def _film(tree: ImageTree, named: str, where: str, kinds: dict[tuple[str, str], str]) -> Path | None:
    """Return the file of a film that a CSV names, or None."""
    name = name_without_ending(PurePosixPath(named))
    found = _below(tree, named, where)
    if len(found) > 1:
        films = [path for path in found if _kind(path, kinds) == _FILM]
        found = films or [path for path in found if _kind(path, kinds) not in (_MASK, _CROP)] or found
    if len(found) > 1:
        found = [path for path in found if name_without_ending(path) == name] or found
    if len(found) > 1:
        raise BadInput(
            f"{where}: folder '{found[0].parent.name}' holds {len(found)} images, {found[0]} and {found[1]}; keep the full "
            "mammogram"
        )
    return found[0] if found else tree.find((PurePosixPath(named).parts[0],), where)


def _below(tree: ImageTree, named: str, where: str) -> list[Path]:
    """Return the images in the nearest folder of a CSV's path that is there: its series, else its study, else its case."""
    case, *folders, _ = PurePosixPath(inside(named, where, tree.root)).parts
    return next((found for folder in (*reversed(folders), case) if (found := tree.within(folder, where))), [])


def _read_boxes(
    tree: ImageTree, rows: pd.DataFrame, kinds: dict[tuple[str, str], str], films: pd.DataFrame, workers: int
) -> tuple[pd.DataFrame, list[Problem]]:
    """Return the box of each abnormality, on each copy of its film of the same size, and what has none or a scaled one."""
    sizes = {row.image_id: (row.height, row.width) for row in films.itertuples() if row.height}
    of_film = {image_id: Path(path) for image_id, path in zip(films["image_id"], films["path"], strict=True)}
    rows = rows[rows["case"].isin(sizes)]
    jobs = []
    for case, roi, crop, where in rows[["case", "roi mask file path", "cropped image file path", "where"]].to_numpy():
        # Which of the two paths is the mask differs between the sets, and some rows name one file twice.
        near = dict.fromkeys(path for named in (roi, crop) if named for path in _below(tree, named, where))
        candidates = [path for path in near if path != of_film[case] and _kind(path, kinds) not in (_FILM, _CROP)]
        candidates.sort(key=lambda path: _kind(path, kinds) != _MASK)
        jobs.append((tuple(candidates), sizes[case]))
    boxes = map_processes(mask_box, jobs, workers, "reading masks", "mask", chunk=4)
    copies = films.groupby("film")["image_id"].agg(list)
    findings, problems = [], []
    for row, found, (_, size) in zip(rows.to_dict("records"), boxes, jobs, strict=True):
        if isinstance(found, str):
            problems.append(Problem("no box", f"{row['where']}: {found}"))
            continue
        box, remark = found
        if remark:
            problems.append(Problem("scaled box", f"{row['where']}: {remark}"))
        for image_id in copies[row["film"]]:
            if sizes.get(image_id) == size:
                findings += [(image_id, label, *box) for label in row["labels"]]
    return findings_frame(findings), problems


Box = tuple[float, float, float, float]


def mask_box(job: tuple[tuple[Path, ...], tuple[int, int]]) -> tuple[Box, str] | str:
    """Return the box ``(xmin, ymin, xmax, ymax)`` of the mask among some files and "", or why there is none.

    The mask is the file of the film's size (H, W) with two values, the upper of which marks the lesion; the other is a crop. If
    none is of that size, one of the film's shape will do: its box is scaled, and a remark says so.
    """
    candidates, size = job
    seen, others = [], []
    for path in candidates:
        try:
            header = read_header(path)
            if (header.height, header.width) != size:
                seen.append(f"{path.name} is {header.width} x {header.height}")
                if abs(header.height * size[1] / (header.width * size[0]) - 1) <= _SHAPE_TOLERANCE:
                    others.append(path)
                continue
            box = _lesion(path)
        except BadInput as error:
            seen.append(str(error))
            continue
        if box is not None:
            return box, ""
        seen.append(f"{path.name} has more or fewer than two values")
    for path in others:
        try:
            box, mask = _lesion(path), read_header(path)
        except BadInput as error:
            seen.append(str(error))
            continue
        if box is None:
            seen.append(f"{path.name} has more or fewer than two values")
            continue
        x, y = size[1] / mask.width, size[0] / mask.height
        remark = f"mask {path.name} is {mask.width} x {mask.height}, its film {size[1]} x {size[0]}: the box is scaled"
        return (box[0] * x, box[1] * y, box[2] * x, box[3] * y), remark
    if not seen:
        return "no mask file"
    return f"no mask of the film's size, {size[1]} x {size[0]}: {'; '.join(seen)}"


def _lesion(path: Path) -> Box | None:
    """Return the box of a mask's upper value, or None if it is no mask of two values; a JPEG's may stray."""
    pixels = read_mammogram(path).pixels
    low, high = int(pixels.min()), int(pixels.max())
    lesion = pixels > low + (high - low) // 2
    stray = _STRAY if path.suffix.lower() in _LOSSY else 0
    two_valued = (pixels <= low + stray) | (pixels >= high - stray)
    if high - low <= 2 * stray or two_valued.mean() < (_TWO_VALUED if stray else 1):
        return None
    rows, columns = np.flatnonzero(lesion.any(axis=1)), np.flatnonzero(lesion.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
