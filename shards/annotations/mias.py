"""mini-MIAS: ``Info.txt`` (prose, then a row a lesion) and 1024 x 1024 PGM films of 0.2 mm a pixel.

Suckling et al. 1994. Rows are ``mdb001 G CIRC B 535 425 197``: film, tissue, class, severity, centre and radius in pixels,
counted from the bottom left corner. Even films are left, odd ones right breasts; (1, 2), (3, 4), ... are one patient each.
"""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from mammostream.common.errors import BadInput
from mammostream.shards.annotations.annotations import Annotations, Problem, findings_frame
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
_LABELS = ("normal", *_SEVERITIES.values(), *sorted({n for names in _CLASSES.values() for n in names} - {"normal"}))
_ROW = re.compile(
    rf"(?P<film>mdb\d{{3}})\s+[FGD]\s+(?P<kind>{'|'.join(_CLASSES)})(?:\s+(?P<severity>[BM])"
    r"(?:\s+(?:(?P<x>\d+)\s+(?P<y>\d+)\s+(?P<radius>\d+)|\*NOTE\s*\d\*))?)?\s*"
)


def is_mias(text: str) -> bool:
    """Tell whether a text holds rows of mini-MIAS."""
    return any(_ROW.fullmatch(line) for line in text.splitlines())


def read_text(path: Path) -> str:
    """Read a text file whose prose may be of any encoding.

    Raises
    ------
    BadInput
        The file is missing or cannot be read.
    """
    try:
        return path.read_bytes().decode("latin-1").removeprefix("\xef\xbb\xbf")
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
        labels.setdefault(film, set()).update(names)
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
    for line, text in enumerate(read_text(path).splitlines(), start=1):
        if match := _ROW.fullmatch(text):
            rows.append((line, match))
        elif re.match(r"mdb\d{3}\s", text):
            raise BadInput(
                f"{path} line {line}: '{text.strip()}' is no row like 'mdb001 G CIRC B 535 425 197'; repair the line"
            )
    if not rows:
        raise BadInput(f"{path} has no rows like 'mdb001 G CIRC B 535 425 197'; give mini-MIAS's Info.txt as --csv-path")
    return rows
