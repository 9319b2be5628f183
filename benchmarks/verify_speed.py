"""How fast ``shards verify`` reads shards, with and without decoding. Prints a Markdown table.

Run it as ``python benchmarks/verify_speed.py`` with the folder of this project on ``PYTHONPATH``. The shards hold real 16-bit
tiles of 512 x 512 pixels, each many times; they were just written, so they come from memory, not from a disk. Times are of the
real command, its start included; the rounds go through all its variants in turn, and the table has the medians.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import click
import numpy as np
import pandas as pd
from tiles import real_tiles

from mammostream.common.machine import describe

TILES_PER_FILM = 60
VARIANTS = [("--no-decode", 1), ("--no-decode", 2), ("--decode", 1), ("--decode", 2)]


def write_shards(directory: Path, films: int) -> None:
    """Write shards of simulated films that all have the same real tiles."""
    from mammostream.shards.archive import tile_key
    from mammostream.shards.build.build import build_all, write_shard
    from mammostream.shards.build.film_tiles import image_row
    from mammostream.shards.build.launch import Launcher
    from mammostream.shards.build.merge import finish
    from mammostream.shards.build.plan import BuildConfig, make_plan

    pixels = real_tiles(TILES_PER_FILM)

    def cut(plan, shard, row, _):
        names = {name: row[name] for name in ("image_id", "patient_id")} | {"shard": shard.name, "split": shard.split}
        tiles = [
            (names | {"key": tile_key(row["image_id"], 0, n), "x": n, "y": 0, "size": 512, "rule": "breast"}, tile)
            for n, tile in enumerate(pixels)
        ]
        return image_row(row, shard) | {"kept": len(tiles)}, tiles

    manifest = pd.DataFrame(
        {
            "image_id": [f"film{n}" for n in range(films)],
            "patient_id": [f"patient{n}" for n in range(films)],
            **dict.fromkeys(("path", "study_id", "laterality", "view", "spacing_source"), ""),
            **{"split": "train", "pixel_spacing_mm": np.nan, "bits": 16},
        }
    )
    plan = make_plan(manifest, directory, BuildConfig(device="cpu", images_per_shard=8))
    build_all(plan, Launcher(threads=2), build=partial(write_shard, read=lambda row: None, cut=cut))
    finish(directory)


@click.command()
@click.option("--films", default=96, help="Films of 60 tiles each; 21 MB per film.")
@click.option("--rounds", default=3, help="Rounds; the table has the medians.")
def main(films: int, rounds: int) -> None:
    """Measure the command verify."""
    times: dict[tuple[str, int], list[float]] = {variant: [] for variant in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder) / "s", films)
        size = sum(path.stat().st_size for path in Path(folder).glob("s/*.tar"))
        for _ in range(rounds):
            for decoding, workers in VARIANTS:
                command = [sys.executable, "-m", "mammostream", "shards", "verify", f"{folder}/s", decoding]
                start = time.perf_counter()
                subprocess.run([*command, "--workers", str(workers)], check=True, capture_output=True)
                times[decoding, workers].append(time.perf_counter() - start)

    click.echo(f"{describe()}\n\n{size / 1e6:,.0f} MB, {films * TILES_PER_FILM:,} tiles, {rounds} rounds.\n")
    click.echo("| command | seconds | MB/s |\n|---|---|---|")
    for (decoding, workers), seconds in times.items():
        middle = statistics.median(seconds)
        click.echo(f"| `shards verify {decoding} --workers {workers}` | {middle:.1f} | {size / 1e6 / middle:,.0f} |")


if __name__ == "__main__":
    main()
