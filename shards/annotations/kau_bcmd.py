"""KAU-BCMD, King Abdulaziz University's mammograms: ``correctSheetlast.xlsx`` and ``<BI-RADS folder>/2018_BC005421_CC_R.jpg``.

Alsolami et al. 2021, doi:10.3390/data6110111: 1,416 cases of four views, BI-RADS 1, 3, 4 and 5, as JPEG. Form as read by
public programs: sheet ``correctSheet`` of the workbook with ``PatientID``, ``Breast type`` (side), ``Breast view``,
``Assesment`` (such as ``Birad 4``), ``Percentage of\\n grandular tissue(density)`` (``0%-25%`` to ``>75%``) and ``Image
path``, which ends in .dcm where the file is a .jpg. Files are named ``<year>_<patient>_<view>_<side>``, some with blanks; a
few lie in the folders of two categories. Pixel size and pathology are not published with the films.
"""

from __future__ import annotations

import re
from pathlib import Path, PureWindowsPath

import pandas as pd

from mammostream.common.errors import BadInput
from mammostream.shards.annotations.annotations import Annotations, Problem
from mammostream.shards.annotations.csv_rows import DENSITIES, birads_labels, density_labels, leniently_coded, read_rows
from mammostream.shards.annotations.tree import ImageTree
from mammostream.shards.identity import ENDINGS

DENSITY = "Percentage of grandular tissue(density)"
COLUMNS = ("PatientID", "Breast view", "Assesment", "Image path")
# What no other data set's table has.
OWN_COLUMNS = ("Breast view", "Assesment", "Image path")
_DENSITIES = {"0%-25%": "a", "26%-50%": "b", "51%-75%": "c", ">75%": "d"}
_BIRADS = {str(category): str(category) for category in range(1, 6)}
_NAME = re.compile(r"(?:\d{4}_)?(?P<patient>[A-Z]+\d+)_(?P<view>CC|MLO)_(?P<side>[LR])", re.IGNORECASE)


def kau_films(tree: ImageTree, path: Path) -> Annotations:
    """Return the films that the sheet names, all for training, with labels of BI-RADS and density.

    A film that stands in several rows, or lies in several folders, is described once, by its highest BI-RADS category.

    Raises
    ------
    BadInput
        The sheet lacks a column, or names no film.
    """
    frame = read_rows(path, COLUMNS, known=(DENSITY,))
    problems: list[Problem] = []
    frame["film"] = [_stem(text) for text in frame["Image path"]]
    names = frame["film"].map(_NAME.fullmatch)
    problems += [
        Problem("no name", f"{where}: the image path '{text}' ends in no name like '2018_BC005421_CC_R'")
        for text, where in frame.loc[names.isna(), ["Image path", "where"]].to_numpy()
    ]
    if names.isna().all():
        raise BadInput(
            f"CSV {path}: no cell of the column 'Image path' ends in a name like '2018_BC005421_CC_R'; give KAU-BCMD's sheet"
        )
    frame = frame.assign(names=names)[names.notna()].reset_index(drop=True)
    frame["birads"] = leniently_coded(frame.assign(Assesment=frame["Assesment"].map(_digit)), "Assesment", _BIRADS, problems)
    frame = frame.sort_values("birads", ascending=False, kind="stable")
    again = frame["film"].duplicated()
    problems += [Problem("twice", f"{where}: the film '{film}' stands in another row") for film, where in _pairs(frame[again])]
    frame = frame[~again].sort_index().reset_index(drop=True)
    files: dict[str, list[Path]] = {}
    for file in tree.paths:
        files.setdefault(_stem(file.name), []).append(file)
    chosen = [_file(files.get(row.film, []), row.birads) for row in frame.itertuples()]
    problems += [
        Problem("twice", f"{file} is another file of the film '{film}', of which {chosen[number]} is taken")
        for number, film in enumerate(frame["film"])
        for file in files.get(film, [])
        if file != chosen[number]
    ]
    films = pd.DataFrame(
        {
            "image_id": frame["film"],
            "path": [
                tree.require_inside(file, where) if file else None for file, where in zip(chosen, frame["where"], strict=True)
            ],
            "where": frame["where"],
            "patient_id": [match["patient"].upper() for match in frame["names"]],
            "study_id": [film.rsplit("_", 2)[0] for film in frame["film"]],
            "laterality": [match["side"].upper() for match in frame["names"]],
            "view": [match["view"].upper() for match in frame["names"]],
            "split": "train",
        }
    )
    films = films.join(birads_labels(frame, "birads", range(1, 6)))
    if DENSITY in frame:
        frame["density"] = leniently_coded(frame, DENSITY, _DENSITIES, problems)
        films = films.join(density_labels(frame, "density", {d: d for d in DENSITIES}))
    return Annotations(films, problems=problems)


def _stem(name: str) -> str:
    """Return a film's name from a path of any system, without blanks and ending."""
    stem = PureWindowsPath(name).name.replace(" ", "")
    return stem.rpartition(".")[0] if stem.lower().endswith((*ENDINGS, ".jpg", ".jpeg")) else stem


def _digit(text: str) -> str:
    """Return the category of ``Birad 4`` or ``BI-RADS 4``, or the text itself where it has none or several."""
    digits = re.findall(r"\d", text)
    return digits[0] if len(digits) == 1 else text


def _file(files: list[Path], birads: str) -> Path | None:
    """Return the file of a film: that in a folder of its category (``Birad4/b4``) where there are several."""
    folder = re.compile(rf"b(?:i-?rads?)?[ _]?{birads or 'none'}", re.IGNORECASE)
    named = [file for file in files if any(folder.fullmatch(part) for part in file.parts)]
    return next(iter(named or files), None)


def _pairs(frame: pd.DataFrame) -> list[tuple[str, str]]:
    return list(zip(frame["film"], frame["where"], strict=True))
