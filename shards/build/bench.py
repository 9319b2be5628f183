"""``mammostream bench build``: films per second from file to shard, and where the time of a film goes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from mammostream.common.temporaries import scratch_folder
from mammostream.preprocess.segmentation import segment_breast
from mammostream.preprocess.tiling import Film, tile_film
from mammostream.shards.build.build import build_all
from mammostream.shards.build.film_tiles import read_film
from mammostream.shards.build.launch import Launcher
from mammostream.shards.build.merge import finish
from mammostream.shards.build.plan import BuildConfig, BuildPlan, make_plan
from mammostream.shards.codecs import encode

STAGES = ("read", "segment", "map, score, select", "cut, encode")


@dataclass(frozen=True)
class BuildSpeed:
    """What a build of some films took.

    Attributes
    ----------
    films_per_second, tiles_per_second
        Of the whole, as it runs: stages of one film overlap those of others.
    stages
        Stage of :data:`STAGES` -> seconds per film, one after the other with nothing next to it: they may add up to more than
        a film takes in the whole.
    """

    films_per_second: float
    tiles_per_second: float
    stages: dict[str, float]


def measure_build(manifest: pd.DataFrame, config: BuildConfig, launcher: Launcher, rounds: int) -> BuildSpeed:
    """Build the films of a manifest `rounds` times, after once for warming up, and time the stages of each film once.

    Raises
    ------
    BadInput
        A film cannot be read, or there is no GPU where one is asked for.
    """
    seconds = []
    with scratch_folder() as folder:
        for number in range(rounds + 1):
            plan = make_plan(manifest, Path(folder) / str(number), config)
            summaries, taken = _timed(partial(build_all, plan, launcher))
            finishing = _timed(partial(finish, plan.output_dir))[1]
            seconds.append(taken + finishing)
        stages = _stages(plan)
    taken = statistics.median(seconds[1:])  # the first build imports the libraries
    return BuildSpeed(len(manifest) / taken, sum(summary.tiles for summary in summaries) / taken, stages)


def _stages(plan: BuildPlan) -> dict[str, float]:
    config, device = plan.film_config, plan.recipe["options"]["device"]
    spent = dict.fromkeys(STAGES, 0.0)
    rows = [row for shard in plan.shards for row in shard.rows]
    for row in rows:
        mammogram, reading = _timed(partial(read_film, row, plan), device)
        spacing = mammogram.header.spacing_mm
        _, segmenting = _timed(partial(segment_breast, mammogram.pixels, spacing), device)
        film, tiling = _timed(partial(tile_film, mammogram, config), device)
        _, encoding = _timed(partial(_encode_tiles, film, plan))
        for stage, value in zip(STAGES, (reading, segmenting, tiling - segmenting, encoding), strict=True):
            spent[stage] += value
    return {stage: value / len(rows) for stage, value in spent.items()}


def _encode_tiles(film: Film, plan: BuildPlan) -> None:
    for index in range(len(film.tiles.x)):
        encode(film.cut(index, plan.film_config.tile_size, plan.bits), plan.config.codec)


def _timed(function: Callable[[], Any], device: str = "cpu") -> tuple[Any, float]:
    """Return a call's result and its wall time in seconds, a GPU's work included."""
    start = time.perf_counter()
    result = function()
    if device == "cuda":
        import cupy

        cupy.cuda.runtime.deviceSynchronize()
    return result, time.perf_counter() - start


def table(speeds: dict[str, BuildSpeed], what: str = "films") -> str:
    """Return a Markdown table, one row per kind of films."""
    lines = [f"| {what} | films/s | tiles/s | " + " | ".join(f"{name}, ms per film" for name in STAGES) + " |"]
    lines.append("|---|" + "---:|" * (2 + len(STAGES)))
    for name, speed in speeds.items():
        cells = " | ".join(f"{1000 * speed.stages[stage]:.0f}" for stage in STAGES)
        lines.append(f"| {name} | {speed.films_per_second:.2f} | {speed.tiles_per_second:.0f} | {cells} |")
    return "\n".join(lines)
