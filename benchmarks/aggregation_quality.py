"""Gated attention compared with simple poolings, by cross-validation over the patients of a data set.

``python -m benchmarks.aggregation_quality --features F --manifest M --class-names a,b --output-dir DIR`` trains ``aggregate``
once per fold and seed (a fold to test, the next to validate, the others to train), puts the test predictions of all folds
together and prints a Markdown table: the AUC of each pooling with its 95 % interval over patients, and the paired difference of
attention to it. No bag is judged by a head that saw it. Finished runs are not trained again.
"""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd

from mammostream.common.machine import describe
from mammostream.demo import run_command

POOLINGS = ("gated", "mean", "max", "top")


@click.command(context_settings={"show_default": True})
@click.option("--features", type=click.Path(path_type=Path), required=True, help="Table that 'embed' wrote.")
@click.option("--manifest", type=click.Path(path_type=Path), required=True, help="Its manifest, with labels.")
@click.option("--class-names", required=True, help="Classes, with commas; each is learnt by itself.")
@click.option("--level", default="breast", help="What a bag is.")
@click.option("--folds", default=5, help="Folds.")
@click.option("--seeds", default="0,1,2", help="Seeds of the heads, with commas; a bag's probabilities are averaged.")
@click.option("--output-dir", type=click.Path(path_type=Path), required=True, help="Folder of the runs.")
def main(features: Path, manifest: Path, class_names: str, level: str, folds: int, seeds: str, output_dir: Path) -> None:
    """Compare the poolings of 'aggregate' by cross-validation."""
    from mammostream.shards.manifest import read_manifest, write_manifest
    from mammostream.train.run.folds import plan_folds

    films = read_manifest(manifest)
    print(f"{describe()}\n\n| class | bags (positive) | pooling | AUC (95 % over patients) | attention minus it (95 %) |")
    print("|---|---|---|---|---|", flush=True)
    for name in class_names.split(","):
        labels = films[[f"label:{name}"]].to_numpy(np.float64)
        plan = plan_folds(films["patient_id"].to_numpy(str), labels, [name], folds, seed=0)
        of_film = plan.of(films["patient_id"].to_numpy(str))
        tables: dict[str, list[pd.DataFrame]] = {pooling: [] for pooling in POOLINGS}
        for fold in range(folds):
            folder = output_dir / name / f"fold-{fold}"
            split = np.where(of_film == fold, "test", np.where(of_film == (fold + 1) % folds, "val", "train"))
            write_manifest(films.assign(split=split), folder / "manifest.parquet")
            for seed in seeds.split(","):
                out = folder / f"seed-{seed}"
                if not (out / "metrics.json").is_file():
                    line = ["aggregate", "train", "--features", str(features), "--manifest", str(folder / "manifest.parquet")]
                    line += ["--class-names", name, "--level", level, "--output-dir", str(out), "--wandb-mode", "disabled"]
                    line += ["--device", "cpu", "--seed", seed, "--pos-weight", "auto", "--resume", "auto"]
                    _quietly(line)
                for pooling in POOLINGS:
                    tables[pooling].append(pd.read_parquet(out / f"test_predictions_{pooling}.parquet"))
        _print(name, tables, manifest, level, output_dir / name)


def _quietly(line: list[str]) -> None:
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        run_command(line)


def _print(name: str, tables: dict[str, list[pd.DataFrame]], manifest: Path, level: str, folder: Path) -> None:
    """Write the pooled predictions, judge them by ``evaluate``, and print a row per pooling."""
    import json

    by = {"image": ["image_id", "patient_id"], "breast": ["patient_id", "laterality"]}[level]
    files = {}
    for pooling, parts in tables.items():
        files[pooling] = folder / f"{pooling}.parquet"
        mean = pd.concat(parts).groupby(by, as_index=False)[f"prob:{name}"].mean()
        mean.to_parquet(files[pooling], index=False)
    for pooling in POOLINGS:
        out = folder / f"evaluate_{pooling}"
        line = ["evaluate", "--predictions", str(files["gated"]), "--labels", str(manifest), "--output-dir", str(out)]
        _quietly([*line, "--compare-with", str(files[pooling])] if pooling != "gated" else line)
        found = json.loads((out / "metrics.json").read_text())
        own: dict[str, Any] = found["per_class"][name]
        if pooling == "gated":
            bags = f"{own['positives'] + own['negatives']} ({own['positives']})"
            low, high = own["intervals"]["auc"]
            print(f"| {name} | {bags} | gated | {own['auc']:.3f} ({low:.3f}-{high:.3f}) | |")
            continue
        pair = found["comparison"]["per_class"][name]["auc"]
        low, high = pair["interval"]
        print(f"| | | {pooling} | {pair['second']:.3f} | {pair['difference']:+.3f} ({low:+.3f} to {high:+.3f}) |", flush=True)


if __name__ == "__main__":
    main()
