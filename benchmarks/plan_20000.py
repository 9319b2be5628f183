"""What planning and tables cost for 20,000 films, where no film is read: seconds and peak memory. Prints a Markdown table.

Run it as ``python benchmarks/plan_20000.py`` with the folder of this project on ``PYTHONPATH``. The films and their tiles are
simulated rows. "In the build's own process" is what one process does however many build: read the manifest, plan, look for
finished shards, cut the plan into tasks, merge the tables. Writing the shards' own tables is the workers' share, and spread
over them; here one process does it.
"""

from __future__ import annotations

import pickle
import resource
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import click
import numpy as np
import pandas as pd

from mammostream.common.machine import describe


def simulated_manifest(films: int) -> pd.DataFrame:
    """Return a manifest of films that are nowhere: four a patient, a fifth of the patients to validate."""
    patients = [f"{n // 4:032x}" for n in range(films)]
    return pd.DataFrame(
        {
            "image_id": [f"{n:032x}" for n in range(films)],
            "path": [f"/data/films/{p}/{n:032x}.dicom" for n, p in enumerate(patients)],
            "patient_id": patients,
            "study_id": patients,
            "laterality": ["L", "R"] * (films // 2),
            "view": ["CC", "CC", "MLO", "MLO"] * (films // 4),
            "split": ["val" if n // 4 % 5 == 0 else "train" for n in range(films)],
            "pixel_spacing_mm": 0.085,
            "spacing_source": "dicom:ImagerPixelSpacing",
            "bits": 12,
        }
    )


def simulated_tiles(shard, tiles_per_film: int, rng: np.random.Generator) -> tuple[list[dict], list[dict]]:
    """Return the rows of a shard's tiles and images."""
    tiles, images = [], []
    for row in shard.rows:
        scores = rng.random((tiles_per_film, 4))
        crcs = rng.integers(2**32, size=(tiles_per_film, 2))
        for n in range(tiles_per_film):
            x, y = 256 * (n % 10), 256 * (n // 10)
            tiles.append(
                {
                    "tile": shard.ordinal * 2**20 + len(tiles),
                    "key": f"{row['image_id']}_y{y}_x{x}",
                    "shard": shard.name,
                    "image_id": row["image_id"],
                    "patient_id": row["patient_id"],
                    "split": shard.split,
                    "x": x,
                    "y": y,
                    "size": 512,
                    **dict(zip(("breast_ratio", "freq_energy", "mean_intensity", "nonzero_ratio"), scores[n], strict=True)),
                    "rule": "breast",
                    "crc32": crcs[n, 0],
                    "payload_crc32": crcs[n, 1],
                }
            )
        facts = {name: row[name] for name in ("image_id", "patient_id", "split", "laterality", "view", "pixel_spacing_mm")}
        images.append(facts | {"shard": shard.name, "reason": "", "flags": "", "kept": tiles_per_film})
    return tiles, images


@click.command()
@click.option("--films", default=20_000, help="Simulated films.")
@click.option("--tiles-per-film", default=60, help="Simulated tiles of each.")
def main(films: int, tiles_per_film: int) -> None:
    """Measure planning and tables."""
    from mammostream.shards.build.build import finished_shard
    from mammostream.shards.build.merge import finish
    from mammostream.shards.build.plan import BuildConfig, make_plan
    from mammostream.shards.manifest import read_manifest, write_manifest
    from mammostream.shards.tables import write_shard_table

    rows: list[tuple[str, str, float]] = []
    own, workers = "the build's own process", "its workers"

    @contextmanager
    def timed(what: str, whose: str = own):
        start = time.perf_counter()
        yield
        rows.append((what, whose, time.perf_counter() - start))

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "shards"
        directory.mkdir()
        write_manifest(simulated_manifest(films), Path(folder) / "manifest.parquet")
        with timed("read and check the manifest"):
            manifest = read_manifest(Path(folder) / "manifest.parquet")
        with timed("plan"):
            plan = make_plan(manifest, directory, BuildConfig(device="cpu"))
        with timed("look for finished shards"):
            todo = [s.ordinal for s in plan.shards if finished_shard(plan, s.ordinal) is None]
        with timed("tasks, as they are sent"):
            sent = sum(len(pickle.dumps(plan.select(ordinals=range(n, n + 1)))) for n in todo)
        for shard in plan.shards:
            tiles, images = simulated_tiles(shard, tiles_per_film, rng)
            metadata = {
                "config_hash": plan.config_hash,
                "recipe": plan.recipe,
                "ordinal": shard.ordinal,
                "split": shard.split,
                "counts": list(plan.counts.items()),
                "codec": "tif",
                "bits": 16,
                "preprocessing": plan.preprocessing,
                **{"tiles": len(tiles), "images": len(images), "bad_images": 0, "tar_bytes": 1},
            }
            start = time.perf_counter()
            write_shard_table(directory / f"{shard.name}.parquet", tiles, images, metadata)
            rows.append(("write the shards' own tables", workers, time.perf_counter() - start))
        with timed("look for finished shards, all finished"):
            assert all(finished_shard(plan, s.ordinal) for s in plan.shards)
        with timed("merge the tables"):
            finish(directory)
        size = sum(path.stat().st_size for path in directory.iterdir())
    table = pd.DataFrame(rows, columns=["what", "whose", "seconds"]).groupby(["what", "whose"], sort=False)["seconds"].sum()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    click.echo(f"{describe()}\n\n{films:,} films, {films * tiles_per_film:,} tiles, {len(plan.shards)} shards.\n")
    click.echo("| what | where | seconds |\n|---|---|---|")
    for (what, whose), seconds in table.items():
        click.echo(f"| {what} | {whose} | {seconds:.2f} |")
    sums = table.groupby("whose", sort=False).sum()
    click.echo(f"| **all** | {own} | **{sums[own]:.2f}** |\n| **all** | both, as one process | **{sums.sum():.2f}** |")
    click.echo(f"\nPeak memory of all of it: {peak:.0f} MiB. Tasks: {sent / 1e6:.0f} MB. Tables: {size / 1e6:.0f} MB.")


if __name__ == "__main__":
    main()
