"""mini-MIAS: ``Info.txt`` (prose, then a row a lesion) and 1024 x 1024 PGM films of 0.2 mm a pixel.

Suckling et al. 1994. Rows are ``mdb001 G CIRC B 535 425 197``: film, tissue, class, severity, centre and radius in pixels,
counted from the bottom left corner. Even films are left, odd ones right breasts; (1, 2), (3, 4), ... are one patient each.
Tissue is F (fatty), G (fatty-glandular) or D (dense-glandular). Copies of the table as CSV, with ``nan`` or ``,,`` for
empty cells and ``535.0`` for numbers, are read too.
"""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from mammostream.common.errors import BadInput
from mammostream.shards.annotations.annotations import Annotations, Problem, findings_frame
from mammostream.shards.annotations.csv_rows import EMPTY
from mammostream.shards.annotations.tree import ImageTree
from mammostream.shards.manifest import LABEL_PREFIX

SPACING_MM = 0.2
SIZE = 1024
_CLASSES = {
    "CALC": ("calcification",),
    "CIRC": ("circumscribed_mass", "mass"),
    "SPIC": ("spiculated_mass", "mass"),
    "MISC": ("ill_defined_mass", "mass"),
    "ARCH": ("architectural_distortion",),
    "ASYM": ("asymmetry",),
    "NORM": ("normal",),
}
_SEVERITIES = {"B": "benign", "M": "malignant"}
_TISSUES = {"F": "density_fatty", "G": "density_fatty_glandular", "D": "density_dense_glandular"}
_FINDINGS = sorted({name for names in _CLASSES.values() for name in names} - {"normal"})
_LABELS = ("normal", *_TISSUES.values(), *_SEVERITIES.values(), *_FINDINGS)
_ROW = re.compile(
    rf"(?:\d+ )?(?P<film>mdb\d{{3}}) (?P<tissue>[FGD]) (?P<kind>{'|'.join(_CLASSES)})(?: (?P<severity>[BM])"
    r"(?: (?:(?P<x>\d+)(?:\.0+)? (?P<y>\d+)(?:\.0+)? (?P<radius>\d+)(?:\.0+)?|\*NOTE ?\d\*))?)?"
)
_FILM_FIRST = re.compile(r"(?:\d+[\s,;])?\"?mdb\d{3}[\s,;\"]")
_SNIFFED = 65_536


def is_mias(path: Path) -> bool:
    """Tell whether a file holds rows of mini-MIAS near its beginning."""
    return any(_row(line) for line in _read_text(path, _SNIFFED).splitlines())


def _row(line: str) -> re.Match[str] | None:
    """Read a row whose cells are separated by blanks, commas, semicolons or tabulators; empty ones count for nothing."""
    cells = re.split(r"[,;\t]", line) if re.search(r"[,;\t]", line) else line.split()
    cells = [" ".join(cell.strip(' "').split()) for cell in cells]
    return _ROW.fullmatch(" ".join(cell for cell in cells if cell not in EMPTY))


def _read_text(path: Path, size: int = -1) -> str:
    """Read a text file, or its first bytes, whose prose may be of any encoding.

    Raises
    ------
    BadInput
        The file is missing or cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(size).decode("latin-1").removeprefix("\xef\xbb\xbf")
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}; check --csv-path") from error


def mias_films(tree: ImageTree, path: Path) -> Annotations:
    """Return mini-MIAS's films, all for training, with a label a class and severity, and boxes about the circles.

    Raises
    ------
    BadInput
        A row of a film is torn, or there is none.
    """
    rows = _rows(path)
    labels: dict[str, set[str]] = {}
    where: dict[str, str] = {}
    boxes, problems = [], []
    for line, row in rows:
        film = row["film"]
        where.setdefault(film, f"{path} line {line}")
        names = (*_CLASSES[row["kind"]], *([_SEVERITIES[row["severity"]]] if row["severity"] else []))
        labels.setdefault(film, set()).update((*names, _TISSUES[row["tissue"]]))
        if row["x"]:
            x, y, radius = int(row["x"]), SIZE - int(row["y"]), int(row["radius"])
            boxes += [(film, name, x - radius, y - radius, x + radius, y + radius) for name in names]
        elif row["kind"] != "NORM":
            problems.append(Problem("no box", f"{path} line {line}: the {row['kind']} of '{film}' has no coordinates"))
    numbers = [int(film[3:]) for film in labels]
    patients = [f"mias{(number + 1) // 2:03d}" for number in numbers]
    films = pd.DataFrame(
        {
            "image_id": list(labels),
            "path": [tree.find((film,), where[film]) for film in labels],
            "where": [where[film] for film in labels],
            "patient_id": patients,
            "study_id": patients,
            "laterality": ["R" if number % 2 else "L" for number in numbers],
            "view": "MLO",
            "split": "train",
            "pixel_spacing_mm": SPACING_MM,
            "spacing_source": "dataset",
            "height": SIZE,
            "width": SIZE,
        }
        | {LABEL_PREFIX + name: pd.array([int(name in found) for found in labels.values()], "Int8") for name in _LABELS}
    )
    return Annotations(films, findings_frame(boxes), problems=problems)


def _rows(path: Path) -> list[tuple[int, re.Match[str]]]:
    rows = []
    for line, text in enumerate(_read_text(path).splitlines(), start=1):
        if match := _row(text):
            rows.append((line, match))
        elif _FILM_FIRST.match(text):
            raise BadInput(
                f"{path} line {line}: '{text.strip()}' is no row like 'mdb001 G CIRC B 535 425 197'; repair the line"
            )
    if not rows:
        raise BadInput(f"{path} has no rows like 'mdb001 G CIRC B 535 425 197'; give mini-MIAS's Info.txt as --csv-path")
    return rows
