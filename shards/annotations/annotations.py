"""What an adapter says of its films before any of them is opened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pandas as pd

from mammostream.shards.manifest import FINDING_COLUMNS


@dataclass(frozen=True)
class Problem:
    """Something that was left out or changed, and why: a kind in one or two words (``missing``, ``no box``) and a sentence."""

    kind: str
    message: str


FilmLabeller = Callable[[pd.DataFrame], pd.DataFrame]
BoxReader = Callable[[pd.DataFrame, int], tuple[pd.DataFrame, list[Problem]]]


@dataclass
class Annotations:
    """What the annotation files say.

    Attributes
    ----------
    films
        One row per film: ``image_id``, ``path`` (None where there is no such file), and any column of a manifest; ``where``
        (where the film is named, for messages) and ``height, width`` (the size that boxes refer to) are used but not kept.
    findings
        Boxes in native pixels, or None where the data set has none.
    read_boxes
        For boxes that must be read from files: from `films` with ``height, width`` of the files themselves, and a number of
        processes, to findings and what is missing of them.
    label_films
        For labels of a breast that only a film's header names: from `films` with what the headers say to `films` with labels.
    problems
        What was left out.
    notes
        What was repaired, and what the user should know.
    """

    films: pd.DataFrame
    findings: pd.DataFrame | None = None
    read_boxes: BoxReader | None = None
    label_films: FilmLabeller | None = None
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def findings_frame(rows: list[tuple]) -> pd.DataFrame:
    """Return findings from ``(image_id, label, xmin, ymin, xmax, ymax)`` rows."""
    return pd.DataFrame(rows, columns=list(FINDING_COLUMNS)).astype(FINDING_COLUMNS)
