"""Runs of pre-training for tests: small options, and what of two runs is compared."""

from __future__ import annotations

from pathlib import Path

from mammostream.models.checkpoints import load_checkpoint
from mammostream.train.byol.config import PretrainConfig
from mammostream.train.run.charts import read_metrics


def small_config(**options):
    small = {"arch": "resnet18_narrow", "hidden_dim": 32, "proj_dim": 16, "batch_size": 8, "limit_tiles": 16, "epochs": 1}
    return PretrainConfig(**(small | {"device": "cpu", "num_workers": 2, "wandb_mode": "disabled"} | options))


def lines_without_timing(folder: Path) -> list[dict]:
    return [
        {name: value for name, value in line.items() if not name.endswith(("pairs_per_second", "data_wait_percent"))}
        for line in read_metrics(folder / "metrics.jsonl")
    ]


def end_of(folder: Path, name: str) -> dict:
    """A checkpoint but for what says how fast it went and how often it was saved."""
    checkpoint = load_checkpoint(folder / f"mammogram_byol_{name}.pth", "byol")
    del checkpoint["config"]
    for figures in (checkpoint["metrics"], checkpoint["resume"]["best"]):
        for name in ("pairs_per_second", "data_wait_percent"):
            figures.pop(name, None)  # both may be the same epoch's
    return checkpoint
