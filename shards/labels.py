"""Tile labels, from boxes or from their films: the guide's CSV of ``tile_path`` and one column a class."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from mammostream.common.errors import BadInput, nearest
from mammostream.shards.manifest import LABEL_PREFIX


def tile_labels(
    tiles: pd.DataFrame, findings: pd.DataFrame, min_fraction: float, manifest: pd.DataFrame | None = None
) -> pd.DataFrame:
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
    manifest
        With ``label:<name>`` columns: a film that has the label but no box of it, or of which nobody knows, has no negative
        tiles, since the lesion may be in any. None, or a label without such a column: each film's boxes are all there is.

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
        column[(best <= 0).to_numpy() & ~tiles["image_id"].isin(_unboxed(name, findings, manifest)).to_numpy()] = 0
        labelled[name] = column
    return labelled


def _unboxed(name: str, findings: pd.DataFrame, manifest: pd.DataFrame | None) -> pd.Series:
    """Return the ids of the films that have, or may have, a lesion of this label that no box shows."""
    if manifest is None or LABEL_PREFIX + name not in manifest:
        return pd.Series(dtype=object)
    boxed = manifest["image_id"].isin(findings.loc[findings["label"] == name, "image_id"])
    return manifest.loc[~boxed & (manifest[LABEL_PREFIX + name] != 0).fillna(True), "image_id"]


def image_labels(tiles: pd.DataFrame, manifest: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Give tiles the labels of their films.

    Parameters
    ----------
    tiles
        Rows of ``tiles.parquet``.
    manifest
        With ``label:<name>`` columns.
    names
        Labels to copy, or ``["all"]``.

    Returns
    -------
    pandas.DataFrame
        One nullable 0/1 column a label, in the order of `tiles`; missing where the film's is.

    Raises
    ------
    BadInput
        The manifest has no such label, or none of the films.
    """
    known = [c.removeprefix(LABEL_PREFIX) for c in manifest.columns if c.startswith(LABEL_PREFIX)]
    if not known:
        raise BadInput("the manifest has no labels; its CSV needs 0/1 columns when 'mammostream prepare' reads it")
    for name in names:
        if name not in known and list(names) != ["all"]:
            raise BadInput(f"the manifest has no label '{name}'{nearest(name, known)}; its labels are: {', '.join(known)}")
    if len(tiles) and not tiles["image_id"].isin(manifest["image_id"]).any():
        raise BadInput("the manifest has none of the films of these shards; give the one they were built from")
    chosen = known if list(names) == ["all"] else list(names)
    by_film = manifest.set_index("image_id")[[LABEL_PREFIX + name for name in chosen]]
    labels = by_film.reindex(tiles["image_id"]).reset_index(drop=True).astype("Int8")
    return labels.set_axis(chosen, axis=1)
