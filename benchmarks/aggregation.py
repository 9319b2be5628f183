"""What an epoch of ``aggregate train`` costs over as many bags as a data set has; prints a Markdown table.

``python -m benchmarks.aggregation --output-dir DIR``. The features are random: what is measured is reading and computing. How
the poolings compare in quality is what ``evaluate --predictions ... --compare-with ...`` says of a run's predictions.
"""

from __future__ import annotations

import resource
import time
from pathlib import Path

import click
import numpy as np
import pandas as pd

from mammostream.common.machine import describe


@click.command(context_settings={"show_default": True})
@click.option("--output-dir", type=click.Path(path_type=Path), required=True, help="Folder for the features: 4 GB by default.")
@click.option("--films", default=16_000, help="Films, four per patient.")
@click.option("--tiles", default=60, help="Tiles per film.")
@click.option("--dim", default=2048, help="Length of a tile's features.")
@click.option("--epochs", default=2, help="Epochs to time.")
@click.option("--level", default="image", help="What a bag is: image, breast or patient.")
def main(output_dir: Path, films: int, tiles: int, dim: int, epochs: int, level: str) -> None:
    """Time epochs over bags of random features."""
    import torch

    from mammostream.train.aggregate.bags import make_bags
    from mammostream.train.aggregate.config import AggregateConfig
    from mammostream.train.aggregate.features import Features
    from mammostream.train.aggregate.training import fit, start_training
    from mammostream.train.run.runtime import resolve_runtime

    output_dir.mkdir(parents=True, exist_ok=True)
    values = np.lib.format.open_memmap(output_dir / "features.npy", "w+", np.float16, (films * tiles, dim))
    rng = np.random.default_rng(0)
    for start in range(0, len(values), 2**14):
        values[start : start + 2**14] = rng.random((min(2**14, len(values) - start), dim), np.float32)
    values.flush()
    del values
    names = [f"f{n}" for n in range(films)]
    frame = pd.DataFrame({"image_id": names, "patient_id": [f"p{n // 4}" for n in range(films)]})
    frame["laterality"], frame["split"] = np.where(np.arange(films) % 4 < 2, "L", "R"), "train"
    frame.loc[films - films // 10 :, "split"] = "val"
    frame["label:x"] = rng.integers(0, 2, films)
    rows = frame.loc[np.repeat(np.arange(films), tiles), ["image_id", "patient_id", "split"]].reset_index(drop=True)
    mapped = np.load(output_dir / "features.npy", mmap_mode="r")
    facts = {"model_sha256": "-", "inputs_sha256": "-"}
    features = Features(mapped, rows, rows.iloc[:0].assign(reason=""), facts)
    config = AggregateConfig(level=level, epochs=epochs, wandb_mode="disabled", early_stopping=0)
    runtime = resolve_runtime(config)
    sides = [make_bags(features, frame, level, ["x"], split)[0] for split in ("train", "val")]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    run = start_training(*sides, ["x"], config, runtime)
    start = time.perf_counter()
    fit(run, output_dir / "run", {}, None, {"features": facts})
    seconds = (time.perf_counter() - start) / epochs
    held = _anonymous_peak()
    print(f"{describe()}\n\n| bags | tiles | features, GB | seconds per epoch, validation included | memory, MB |")
    print("|---|---|---|---|---|")
    size = mapped.nbytes / 1e9
    print(f"| {len(sides[0])} + {len(sides[1])} {level}s | {len(mapped):,} of {dim} | {size:.1f} | {seconds:.0f} | {held} |")
    print(f"\nMemory: {before:.0f} MB before the training; {torch.get_num_threads()} threads, {runtime}.")


def _anonymous_peak() -> str:
    """Return resident memory now, without and with what is mapped from files (which the system takes back when it needs it)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, mapped = (int(status[name].split()[0]) // 1024 for name in ("RssAnon", "RssFile"))
    return f"{own} + {mapped} mapped"


if __name__ == "__main__":
    main()
