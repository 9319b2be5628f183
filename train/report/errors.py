"""The films that a model misjudges worst: found by joining an evaluation's predictions and labels again, film by film."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from mammostream.common.errors import BadInput
from mammostream.shards.archive import escape_id, short_name
from mammostream.shards.identity import clean_ids
from mammostream.shards.manifest import read_findings
from mammostream.train.evaluate.evaluate import choose_thresholds
from mammostream.train.evaluate.froc import HIT, overlap_fraction
from mammostream.train.evaluate.matching import Matched, match_labels
from mammostream.train.evaluate.reading import Predictions, read_predictions, with_model
from mammostream.train.levels.aggregation import PROBABILITY
from mammostream.train.levels.calibration import IMAGE, TILE
from mammostream.train.report.pictures import Picture, draw_tile_map, embed

NEGATIVE, POSITIVE = "False negative", "False positive"
_EDGES = ["xmin", "ymin", "xmax", "ymax"]


@dataclass
class Case:
    """A film that is misjudged for a class."""

    title: str
    facts: str
    """Where its highest tile lies."""
    boxes: pd.DataFrame | None
    """The boxes on the film and the highest tile that hits each; None if the run has no findings."""
    picture: Picture | None
    """Its heat map."""
    note: str = ""
    """Why there is no picture, or which one it is."""


@dataclass
class Errors:
    """What an evaluation's films show."""

    source: tuple[str, ...] = ()
    """The predictions and labels that were joined; evaluations of several levels may share them."""
    counts: pd.DataFrame | None = None
    """Per class: threshold, films, false negatives and false positives."""
    cases: list[Case] = field(default_factory=list)
    note: str = ""
    """Why nothing can be shown."""


def worst_errors(folder: Path, run_dir: Path, limit: int) -> Errors:
    """Return the false negatives with the lowest and the false positives with the highest probability, of films.

    Parameters
    ----------
    folder
        Of an evaluation, whose ``config.yaml`` names predictions and labels. Whatever it judged (tiles, images, breasts), films
        are judged here, by the ``image_predictions`` that lie next to the predictions.
    run_dir
        The run's folder; files that are no longer where the configuration says are looked for in it.
    limit
        Films of each class and kind of error.
    """
    config_path = folder / "config.yaml"
    config = (yaml.safe_load(config_path.read_text(encoding="utf-8")) or {}) if config_path.is_file() else {}
    try:
        predicted, labels = (_place(config.get(name), name, run_dir) for name in ("predictions", "labels"))
        images = _image_table(predicted)
        predictions = read_predictions(images, str(config.get("score") or "max"))
        model = config.get("model_path")
        if model and Path(model).is_file():
            predictions = with_model(predictions, Path(model))
        matched = match_labels(predictions, labels, str(config.get("patient_column") or "patient_id"), predictions.score)
        if matched.level != IMAGE:
            raise BadInput(f"{labels} labels no images")
        thresholds, _ = choose_thresholds(predictions, matched.class_names, IMAGE, config.get("threshold"))
        tiles = _tiles_beside(images)
        findings = _findings(config, images.parent, run_dir)
    except BadInput as error:
        return Errors(note=f"The worst errors are not shown: {error}.")
    limits = np.array([0.5 if threshold is None else threshold for threshold in thresholds])
    found = Errors((str(images), str(labels)), _counts(matched, limits))
    for c, name in enumerate(matched.class_names):
        y, p = matched.labels[:, c], matched.probabilities[:, c]
        for kind, wrong, order in ((NEGATIVE, (y == 1) & (p < limits[c]), p), (POSITIVE, (y == 0) & (p >= limits[c]), -p)):
            rows = np.flatnonzero(wrong)
            for row in rows[np.argsort(order[rows], kind="stable")][:limit]:
                image = matched.rows["image"].iloc[row]
                title = f"{kind}, {name}: {image}, probability {p[row]:.3f}, threshold {limits[c]:.3f}"
                found.cases.append(_case(title, str(image), name, images.parent, tiles, findings))
    return found


def _counts(matched: Matched, limits: np.ndarray) -> pd.DataFrame:
    rows = []
    for c, name in enumerate(matched.class_names):
        y, found = matched.labels[:, c], matched.probabilities[:, c] >= limits[c]
        rows.append(
            {
                "class": name,
                "threshold": float(limits[c]),
                "positive films": int((y == 1).sum()),
                "false negatives": int(((y == 1) & ~found).sum()),
                "negative films": int((y == 0).sum()),
                "false positives": int(((y == 0) & found).sum()),
                "positive films without prediction": sum(matched.left_out[name]["positives"].values()),
            }
        )
    return pd.DataFrame(rows)


def _case(title: str, image: str, name: str, folder: Path, tiles: pd.DataFrame | None, findings: pd.DataFrame | None) -> Case:
    on_film = None if findings is None else findings[findings["image"] == image]
    mine, facts = None, "Where its tiles lie is not known."
    if tiles is not None:
        mine = tiles[(tiles["image_id"] == image) & tiles[PROBABILITY + name].notna()]
        if len(mine):
            top = mine.loc[mine[PROBABILITY + name].idxmax()]
            place = f"x {top['_x']:.0f}, y {top['_y']:.0f}, {top['_size']:.0f} pixels wide"
            facts = f"Highest of {len(mine)} tiles: {top[PROBABILITY + name]:.3f} ({place} in the film)."
    path = folder / (short_name(f"heatmap_{escape_id(image)}_{escape_id(name)}") + ".png")
    picture, note = (embed(path) if path.is_file() else None), ""
    if picture is None:
        note = f"{folder.name} has no heat map of this film: infer draws them over films, not for shards."
        if mine is not None and len(mine):
            edges = np.empty((0, 4)) if on_film is None else on_film[_EDGES].to_numpy(np.float64)
            picture = draw_tile_map(mine, mine[PROBABILITY + name].to_numpy(), edges, name)
            note += " This is the map of its tiles, without the film."
    boxes = None if on_film is None else _box_table(on_film, name, mine)
    return Case(title, facts, boxes, picture, note)


def _box_table(boxes: pd.DataFrame, name: str, tiles: pd.DataFrame | None) -> pd.DataFrame:
    """Return the boxes of a film, and for those of the class the highest tile that hits them, as FROC has it."""
    table = boxes[["label", *_EDGES]].reset_index(drop=True)
    highest: list[str] = []
    for row in table.itertuples(index=False):
        if row.label != name or tiles is None:
            highest.append("")
            continue
        x, y, size = (tiles[column].to_numpy(np.float64) for column in ("_x", "_y", "_size"))
        edges = np.stack([x, y, x + size, y + size], 1)
        hits = overlap_fraction(edges, np.array([[getattr(row, edge) for edge in _EDGES]], np.float64))[:, 0] >= HIT
        highest.append(f"{tiles.loc[hits, PROBABILITY + name].max():.3f}" if hits.any() else "no tile shows it")
    return table.assign(**{f"highest tile on it ({name})": highest})


def _place(recorded: Any, what: str, run_dir: Path) -> Path:
    """Return a file of an evaluation's configuration, or the one of its name and folder in the run."""
    if not recorded:
        raise BadInput(f"the evaluation's config.yaml does not name its {what}")
    path = Path(str(recorded))
    found = next((p for p in (path, run_dir / path.parent.name / path.name, run_dir / path.name) if p.is_file()), None)
    if found is None:
        raise BadInput(f"{what} {path} is not there any more")
    return found


def _image_table(path: Path) -> Path:
    """Return the predictions of images that lie next to an evaluation's, or are it."""
    if "image_predictions" in path.stem:
        return path
    images = path.with_name(f"image_predictions{path.suffix}")
    if not images.is_file():
        raise BadInput(f"there is no {images.name} next to {path}")
    return images


def _tiles_beside(images: Path) -> pd.DataFrame | None:
    """Return the tiles next to a table of images, if there are any with their places."""
    path = images.with_name(f"predictions{images.suffix}")
    if not path.is_file():
        return None
    found: Predictions = read_predictions(path)
    placed = found.level == TILE and {"_x", "_y", "_size", "image_id"} <= {*found.table}
    return found.table if placed and found.table[["_x", "_y", "_size"]].notna().all(axis=None) else None


def _findings(config: Mapping[str, Any], predictions: Path, run_dir: Path) -> pd.DataFrame | None:
    """Return the boxes that the evaluation was given, else those that infer was."""
    recorded = config.get("findings")
    if not recorded and (predictions / "config.yaml").is_file():
        recorded = (yaml.safe_load((predictions / "config.yaml").read_text(encoding="utf-8")) or {}).get("findings")
    if not recorded:
        return None
    findings = read_findings(_place(recorded, "findings", run_dir))
    return findings.assign(image=clean_ids(findings["image_id"]))
