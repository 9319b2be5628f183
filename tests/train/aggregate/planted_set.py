"""A data set of planted lesions, in the formats of ``embed`` and ``prepare``: one tile of a positive film stands out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from mammostream.shards.manifest import read_manifest
from mammostream.train.aggregate.features import Features, open_features
from mammostream.train.predict.tables import TableWriter, tile_schema

DIM = 16


@dataclass(frozen=True)
class Planted:
    """Where the tables lie."""

    folder: Path
    features = property(lambda self: self.folder / "features.parquet")
    manifest = property(lambda self: self.folder / "manifest.parquet")

    def open(self) -> Features:
        """Return the features."""
        return open_features(self.features)

    def films(self) -> pd.DataFrame:
        """Return the manifest."""
        return read_manifest(self.manifest)


def write_features(path: Path, tiles: pd.DataFrame, model: str = "a" * 64, inputs: str = "b" * 64, **more) -> None:
    """Write a table as ``embed`` writes it, in several row groups."""
    facts = {"model_sha256": model, "inputs_sha256": inputs, "precision": "fp32", "preprocessing": {"tile_size": 64}} | more
    with TableWriter(path, tile_schema((), DIM), facts, "tiles") as table:
        for start in range(0, len(tiles), 500):
            table.write(tiles.iloc[start : start + 500])


def planted_tiles(films: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Return tiles of films: noise, and one tile far from the others in each film with a lesion."""
    rng = np.random.default_rng(seed)
    rows = []
    for film in films.to_dict("records"):
        count = int(rng.integers(6, 14))
        values = rng.normal(size=(count, DIM)).astype(np.float32)
        if film["label:lesion"] == 1:
            values[rng.integers(count), :3] += 5
        for n in range(count):
            name = f"{film['image_id']}_y{64 * n}_x0"
            rows.append((name, film["image_id"], film["patient_id"], film["split"], 0, 64 * n, 64, "", values[n]))
    return pd.DataFrame(rows, columns=["key", "image_id", "patient_id", "split", "x", "y", "size", "reason", "features"])
