"""CBIS-DDSM: four CSVs (mass or calc, train or test) with a row an abnormality, and DICOM films, crops and masks.

Lee et al. 2017, doi:10.1038/sdata.2017.177. Paths in the CSVs are ``<case>/<study>/<series>/<file>``; downloads name their
folders and files in several ways, so films and masks are found by the case's or the series' folder.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

from mammostream.common.errors import BadInput
from mammostream.common.files import require_columns
from mammostream.common.parallel import map_processes
from mammostream.preprocess.reading import read_header, read_mammogram
from mammostream.shards.annotations.annotations import Annotations, Problem, findings_frame
from mammostream.shards.annotations.csv_rows import birads_labels, coded, filled, read_rows, refuse
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
_PATHOLOGIES = {"MALIGNANT": "malignant", "BENIGN": "benign", "BENIGN_WITHOUT_CALLBACK": "benign"}
# Mass shapes that are classes of their own elsewhere.
_SHAPES = {
    "ARCHITECTURAL_DISTORTION": "architectural_distortion",
    "ASYMMETRIC_BREAST_TISSUE": "asymmetry",
    "FOCAL_ASYMMETRIC_DENSITY": "asymmetry",
}


def column_name(name: str) -> str:
    """Return the one spelling of a column: ``breast_density`` and ``breast density`` are the same."""
    return name.lower().replace("_", " ")


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
    rows = pd.concat([_read(path) for path in csv_paths], ignore_index=True).fillna("")
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
            "path": [_film(tree, path, where) for path, where in zip(first["image file path"], first["where"], strict=True)],
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
    films = films.join(birads.groupby(rows["film"]).max().reindex(films["film"]).set_index(films.index))
    return Annotations(films, read_boxes=partial(_read_boxes, tree, rows), notes=notes)


def _read(path: Path) -> pd.DataFrame:
    frame = read_rows(path)
    frame = frame.rename(columns=lambda name: column_name(name) if name != "where" else name)
    require_columns(frame, COLUMNS, f"CSV {path}")
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


def _film(tree: ImageTree, named: str, where: str) -> Path | None:
    """Return the file of a film that a CSV names, or None."""
    case, *folders, name = PurePosixPath(named).parts
    for folder in (*reversed(folders), case):
        found = tree.within(folder, where)
        same = [path for path in found if name_without_ending(path) == name_without_ending(PurePosixPath(name))]
        found = same or found
        if len(found) > 1:
            raise BadInput(
                f"{where}: folder '{folder}' holds {len(found)} images, {found[0]} and {found[1]}; keep the full mammogram"
            )
        if found:
            return found[0]
    return tree.find((case,), where)


def _read_boxes(tree: ImageTree, rows: pd.DataFrame, films: pd.DataFrame, workers: int) -> tuple[pd.DataFrame, list[Problem]]:
    """Return the box of each abnormality, on each copy of its film of the mask's size, and what has none."""
    sizes = {row.image_id: (row.height, row.width) for row in films.itertuples() if row.height}
    of_film = {image_id: Path(path) for image_id, path in zip(films["image_id"], films["path"], strict=True)}
    rows = rows[rows["case"].isin(sizes)]
    jobs = []
    for case, roi, crop, where in rows[["case", "roi mask file path", "cropped image file path", "where"]].to_numpy():
        # Which of the two paths is the mask differs between the sets, and some rows name one file twice.
        folders = dict.fromkeys(PurePosixPath(inside(named, where, tree.root)).parts[0] for named in (roi, crop) if named)
        candidates = [path for folder in folders for path in tree.within(folder, where) if path != of_film[case]]
        jobs.append((tuple(candidates), sizes[case]))
    boxes = map_processes(mask_box, jobs, workers, "reading masks", "mask", chunk=4)
    copies = films.groupby("film")["image_id"].agg(list)
    findings, problems = [], []
    for row, box, (_, size) in zip(rows.to_dict("records"), boxes, jobs, strict=True):
        if isinstance(box, str):
            problems.append(Problem("no box", f"{row['where']}: {box}"))
            continue
        for image_id in copies[row["film"]]:
            if sizes.get(image_id) == size:
                findings += [(image_id, label, *box) for label in row["labels"]]
    return findings_frame(findings), problems


def mask_box(job: tuple[tuple[Path, ...], tuple[int, int]]) -> tuple[int, int, int, int] | str:
    """Return the box ``(xmin, ymin, xmax, ymax)`` of the mask among some files, or why there is none.

    The mask is the file of the film's size (H, W) with two values, the upper of which marks the lesion; the other is a crop.
    """
    candidates, size = job
    seen = []
    for path in candidates:
        try:
            header = read_header(path)
            if (header.height, header.width) != size:
                seen.append(f"{path.name} is {header.width} x {header.height}")
                continue
            pixels = read_mammogram(path).pixels
        except BadInput as error:
            seen.append(str(error))
            continue
        low, high = pixels.min(), pixels.max()
        lesion = pixels == high
        if low == high or not (lesion | (pixels == low)).all():
            seen.append(f"{path.name} has more or fewer than two values")
            continue
        rows, columns = np.flatnonzero(lesion.any(axis=1)), np.flatnonzero(lesion.any(axis=0))
        return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
    if not seen:
        return "no mask file"
    return f"no mask of the film's size, {size[1]} x {size[0]}: {'; '.join(seen)}"
