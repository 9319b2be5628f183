"""Copies of a manifest's films with simulated micro-calcification clusters, their own manifest and their boxes."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import tifffile

from mammostream.common.errors import BadInput
from mammostream.common.files import whole_file
from mammostream.common.progress import progress
from mammostream.preprocess.polarity import upright
from mammostream.preprocess.reading import read_mammogram
from mammostream.preprocess.simulation import ClusterConfig, plant_clusters
from mammostream.shards.archive import escape_id, short_name
from mammostream.shards.manifest import LABEL_PREFIX

SIMULATED_LABEL = "simulated_calcification"


def simulate_copies(
    manifest: pd.DataFrame, output_dir: Path, config: ClusterConfig, copies: int, seed: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Write planted copies as ``images/<image_id>_simulated<k>.tif`` and return their manifest rows and findings.

    A copy keeps its film's patient, split, spacing and depth. Copies hold stored values: a DICOM film's VOI LUT or window
    does not travel.

    Raises
    ------
    BadInput
        A film has no pixel spacing (a speck's size is in mm) or cannot be read.
    """
    rows, findings = [], []
    jobs = [(row, copy) for row in manifest.to_dict("records") for copy in range(copies)]
    for number, (row, copy) in enumerate(progress(jobs, "planting simulated clusters", "film")):
        if pd.isna(row["pixel_spacing_mm"]):
            raise BadInput(
                f"image '{row['image_id']}' has no pixel spacing; run 'mammostream prepare' with --assume-spacing MM"
            )
        pixels = upright(read_mammogram(row["path"]), "auto").pixels  # clusters are bright
        planted, boxes = plant_clusters(pixels, row["pixel_spacing_mm"], config, seed=(seed, number))
        image_id = f"{row['image_id']}_simulated{copy}"
        path = output_dir / "images" / f"{short_name(escape_id(image_id))}.tif"
        with whole_file(path) as temporary:
            tifffile.imwrite(
                temporary,
                planted,
                photometric="minisblack",
                compression="zstd",
                predictor=True,
                metadata=None,
                software=False,
            )
        label = {LABEL_PREFIX + SIMULATED_LABEL: int(bool(boxes))}
        rows.append(row | {"image_id": image_id, "path": str(path), "bits": 8 * planted.dtype.itemsize} | label)
        findings += [
            {"image_id": image_id, "label": SIMULATED_LABEL, "xmin": a, "ymin": b, "xmax": c, "ymax": d} for a, b, c, d in boxes
        ]
    return pd.DataFrame(rows), pd.DataFrame(findings, columns=["image_id", "label", "xmin", "ymin", "xmax", "ymax"])
