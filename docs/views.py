"""Draw docs/views.jpg: real tiles and what the two recipes make of them. Run it as ``python docs/views.py [OUTPUT]``.

Simulated micro-calcification clusters are planted into copies of the 8 real films first, so that one can see whether fine
specks survive.
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from mammostream.common.files import whole_file
from mammostream.common.normalisation import MEAN, STD
from mammostream.common.real_films import films_folder
from mammostream.dali_pipelines import RECIPES, LabelledLoader, PretrainLoader
from mammostream.demo import run_command
from mammostream.shards import open_shards
from mammostream.shards.labels import tile_labels
from mammostream.shards.manifest import read_findings
from mammostream.train.byol.pictures import draw_views

TILES = 6
EDGE = 512


def main(output: Path) -> None:
    """Build tiles of the films at their own resolution, draw the views of some that hold a simulated cluster."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        options = ["--assume-spacing", "0.05", "--patient-regex", r"P_\d+", "--val-fraction", "0"]
        run_command(["prepare", "--images-root", str(films_folder()), "--output-dir", f"{work}/films", *options])
        manifest = ["--manifest", f"{work}/films/manifest.parquet"]
        run_command(["simulate", *manifest, "--output-dir", f"{work}/copies", "--contrast", "8"])
        manifest = ["--manifest", f"{work}/copies/manifest.parquet"]
        run_command(
            ["shards", "build", *manifest, "--output-dir", f"{work}/shards", "--tile-size", str(EDGE), "--device", "cpu"]
        )
        shards = open_shards(work / "shards")
        findings = read_findings(work / "copies/findings.parquet")

        labels = tile_labels(shards.tiles(), findings, min_fraction=1.0)
        positive = shards.tiles().set_index("key").loc[labels["tile_path"][labels.iloc[:, 1] == 1]]
        chosen = positive.groupby("image_id")["tile"].first().to_numpy()[:TILES]
        source = {"shards": shards.shards(), "batch_size": len(chosen), "tile_size": EDGE, "mean": MEAN, "std": STD}
        rows = {"tile": _ordered(LabelledLoader(source.pop("shards"), tiles=chosen, **source))[0]}
        for recipe, views in RECIPES.items():
            first, second = _ordered(PretrainLoader(shards.shards(), views=views, tiles=chosen, seed=1, **source))
            rows |= {f"{recipe}, view 1": first, f"{recipe}, view 2": second}

        draw_views(rows, work / "views.png")
        picture = io.BytesIO()
        Image.open(work / "views.png").convert("L").save(picture, "JPEG", quality=80)
    with whole_file(output) as temporary:
        temporary.write_bytes(picture.getvalue())


def _ordered(loader: LabelledLoader | PretrainLoader) -> list[np.ndarray]:
    """Return the images of the loader's first batch by tile number: float (N, H, W) on the scale of the film each."""
    *images, numbers = next(iter(loader))
    order = numbers.argsort()
    return [(batch[order, 0] * STD + MEAN).numpy() for batch in images]


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/views.jpg"))
