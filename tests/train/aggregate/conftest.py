"""A session's planted data set."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from planted_set import Planted, planted_tiles, write_features

from mammostream.shards.manifest import write_manifest

SPLITS = {"train": 60, "val": 30, "test": 30}  # patients


@pytest.fixture(scope="session")
def planted(tmp_path_factory) -> Planted:
    """Four films a patient, two of each breast; a lesion lies in both films of a breast or in none."""
    found = Planted(tmp_path_factory.mktemp("planted"))
    rng = np.random.default_rng(1)
    rows = []
    for split, count in SPLITS.items():
        for patient in range(count):
            for side in "LR":
                lesion = int(rng.random() < 0.4)
                for view in ("CC", "MLO"):
                    name = f"{split}{patient}_{side}_{view}"
                    rows.append((name, f"{name}.png", f"{split}{patient}", "", side, view, split, 0.1, "csv", 16, lesion))
    columns = ["image_id", "path", "patient_id", "study_id", "laterality", "view", "split", "pixel_spacing_mm"]
    films = pd.DataFrame(rows, columns=[*columns, "spacing_source", "bits", "label:lesion"])
    films["label:mostly_unknown"] = np.where(np.arange(len(films)) % 3, np.nan, films["label:lesion"])
    write_manifest(films, found.manifest)
    write_features(found.features, planted_tiles(films))
    return found
