"""Tile labels from boxes: the guide's CSV of ``tile_path`` and one column a class."""

from __future__ import annotations

import pandas as pd


def tile_labels(tiles: pd.DataFrame, findings: pd.DataFrame, min_fraction: float) -> pd.DataFrame:
    """Label tiles by their overlap with boxes.

    A tile is positive for a label where at least `min_fraction` of one of its boxes lies inside the tile, or at least that
    share of the tile inside the box; negative where none touches it; and unlabelled (missing) in between, so that a
    sliver of a lesion teaches nothing wrong.

    Parameters
    ----------
    tiles
        Rows of ``tiles.parquet``.
    findings
        Boxes in native pixels.
    min_fraction
        Above 0, up to 1.

    Returns
    -------
    pandas.DataFrame
        ``tile_path`` (the tile's key) and one nullable 0/1 column a label, in the order of `tiles`.
    """
    names = sorted(findings["label"].unique())
    labelled = pd.DataFrame({"tile_path": tiles["key"]})
    pairs = tiles[["key", "image_id", "x", "y", "size"]].merge(findings, on="image_id")
    right, bottom = pairs["x"] + pairs["size"], pairs["y"] + pairs["size"]
    width = (right.clip(upper=pairs["xmax"]) - pairs["x"].clip(lower=pairs["xmin"])).clip(lower=0)
    height = (bottom.clip(upper=pairs["ymax"]) - pairs["y"].clip(lower=pairs["ymin"])).clip(lower=0)
    overlap = width * height
    box_area = ((pairs["xmax"] - pairs["xmin"]) * (pairs["ymax"] - pairs["ymin"])).clip(lower=1)
    pairs["fraction"] = (overlap / box_area).combine(overlap / pairs["size"] ** 2, max)
    for name in names:
        best = pairs[pairs["label"] == name].groupby("key")["fraction"].max().reindex(tiles["key"], fill_value=0.0)
        column = pd.array([pd.NA] * len(tiles), dtype="Int8")
        column[(best >= min_fraction).to_numpy()] = 1
        column[(best <= 0).to_numpy()] = 0
        labelled[name] = column
    return labelled
