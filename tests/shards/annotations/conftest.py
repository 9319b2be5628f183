"""Films that tiles are cut from, and the steps of the data sets' page up to labels of tiles."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

DATA_SETS = (Path(__file__).parents[3] / "docs/data_sets.md").read_text()
HEIGHT, WIDTH, RADIUS = 400, 300, 12
SMALL = {
    "prepare": "--assume-spacing 0.4 --val-fraction 0.3 --workers 1",
    "shards build": "--pixel-spacing 0.4 --tile-size 64 --stride 64 --workers 1 --device cpu",
}
BUILD = "shards build --manifest work/manifest.parquet --output-dir work/shards"


def lesion_at(side: str) -> tuple[int, int]:
    """Return x and y of the centre of a film's lesion."""
    return (70 if side == "L" else WIDTH - 70), HEIGHT // 2


@pytest.fixture(scope="session")
def breast() -> Callable[..., np.ndarray]:
    """Return a function that draws a 12-bit film: a textured breast at its side's edge, with a bright lesion or without."""

    def draw(seed: int, side: str = "L", lesion: bool = False) -> np.ndarray:
        rng = np.random.default_rng(seed)
        y, x = np.mgrid[:HEIGHT, :WIDTH]
        distance = np.hypot((y - HEIGHT / 2) / (0.42 * HEIGHT), (x if side == "L" else WIDTH - 1 - x) / (0.75 * WIDTH))
        pixels = np.where(distance < 1, 1500 + 150 * rng.standard_normal((HEIGHT, WIDTH)), 0)
        if lesion:
            pixels += 1500 * (np.hypot(y - lesion_at(side)[1], x - lesion_at(side)[0]) < RADIUS)
        return np.clip(pixels, 0, 4095).astype(np.uint16)

    return draw


@pytest.fixture
def run_page(call, monkeypatch) -> Callable[..., dict[str, pd.DataFrame]]:
    """Return a function that runs a section of the page in a folder: prepare, build, labels; and gives the labels by split."""

    def run(section: str, folder: Path, rest: str | None = None, build: str = "") -> dict[str, pd.DataFrame]:
        monkeypatch.chdir(folder)

        def lines(title: str, command: str) -> list[str]:
            text = DATA_SETS[DATA_SETS.index(f"\n## {title}\n") :].split("\n## ")[1].replace("\\\n", " ")
            return re.findall(rf"^ *mammostream ({command}.*)$", text, re.MULTILINE)

        (prepare,) = lines(section, "prepare")
        (label,) = lines(rest or section, "shards labels")
        splits = ("train", "val", "test")
        for line in (
            prepare,
            f"{BUILD} {SMALL['shards build']} {build}",
            *(re.sub(r"\$\{?split\}?", split, label) for split in splits),
        ):
            if line.startswith("prepare"):
                line = f"{line.replace('--test-fraction 0.2', '--test-fraction 0.3')} {SMALL['prepare']}"
            code, out, err = call(*shlex.split(line))
            assert code == 0, f"{line}: {out}{err}"
        return {split: pd.read_csv(f"{split}_labels.csv") for split in splits}

    return run
