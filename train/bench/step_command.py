"""``mammostream bench step``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from mammostream.common.errors import BadInput, nearest
from mammostream.common.measuring import check_page, spelled, write_report
from mammostream.common.options import Command, ListOption, config_file_option, split_commas
from mammostream.models.architectures import ARCHITECTURES

FILE = click.Path(path_type=Path)
# What is not given: something that a CPU does in two or three minutes, and what a GPU is there for.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"arch": "resnet18", "batch_size": ("8",), "tile_size": 128, "steps": 2, "warmup": 2, "rounds": 5},
    "cuda": {
        "arch": "resnet50",
        "batch_size": ("32", "64", "96", "128"),
        "tile_size": 512,
        "steps": 20,
        "warmup": 5,
        "rounds": 5,
    },
}


@click.command(cls=Command)
@click.option("--arch", type=click.Choice(ARCHITECTURES), help="Backbone; default: resnet50 on a GPU, resnet18 on a CPU.")
@click.option("--batch-size", cls=ListOption, callback=split_commas, help="Pairs per step; default: 32 64 96 128, on a CPU 8.")
@click.option("--tile-size", type=click.IntRange(min=32), help="Side of the views in pixels; default: 512, on a CPU 128.")
@click.option("--steps", type=click.IntRange(min=1), help="Steps per turn; default: 20, on a CPU 2.")
@click.option("--warmup", type=click.IntRange(min=2), help="Steps before the first turn; default: 5, on a CPU 2.")
@click.option("--rounds", type=click.IntRange(min=1), help="Turns of each rung; default: 5.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="auto = the GPU where there is one.")
@click.option("--rungs", cls=ListOption, callback=split_commas, help="Rungs to measure; default: all that can run here.")
@click.option("--shards", "directory", type=FILE, help="A shard directory for the rung real-data.")
@click.option(
    "--workers", type=click.IntRange(min=1), default=min(16, os.cpu_count() or 1), help="Threads that read the shards."
)
@click.option("--profile", "profiled", help="Also show the operations that take the most time in this rung (first batch size).")
@click.option("--output", type=FILE, help="A Markdown page to write the table to; JSON and profile go next to it.")
@config_file_option
@click.pass_context
def step(
    ctx: click.Context,
    /,
    batch_size: tuple[str, ...],
    device: str,
    rungs: tuple[str, ...],
    directory: Path | None,
    workers: int,
    profiled: str | None,
    output: Path | None,
    **options: int | str | None,
) -> None:
    """Measure the training step, one measure after the other, next to a plain script's step.

    Each rung adds something to the one before it: precision, layout, nothing read back, fused optimiser, torch.compile, CUDA
    graphs, real data; two more try other forms of the first convolution. A rung that fails is a row with its reason. Prints a
    Markdown table: pairs per second, the ratio to the plain step, MFU, memory, waiting for data.
    """
    import torch

    from mammostream.common.files import write_json, write_text
    from mammostream.shards.reading import open_shards
    from mammostream.train.bench.ladder import RUNGS, Task, default_rungs
    from mammostream.train.bench.step import describe_task, flops_of, measure, profile, rows, table

    check_page(output)
    if device == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: torch sees no GPU; use --device cpu, or see 'mammostream doctor'")
    defaults = _DEFAULTS["cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"]
    chosen: dict[str, Any] = {name: defaults[name] if value is None else value for name, value in options.items()}
    batch_sizes = batch_size or defaults["batch_size"]
    for text in batch_sizes:
        if not text.isdecimal() or int(text) < 2:
            raise BadInput(f"--batch-size {text}: give whole numbers from 2 on")
    for name in (*rungs, *([profiled] if profiled else [])):
        if name not in RUNGS:
            raise BadInput(f"there is no rung '{name}'{nearest(name, RUNGS)}; there are: {', '.join(RUNGS)}")
        if RUNGS[name].real and directory is None:
            raise BadInput(f"rung '{name}' needs --shards")
    shards = open_shards(directory) if directory else None

    made: list[Any] = []
    lines: list[str] = []
    page = ""
    for number, text in enumerate(batch_sizes):
        task = Task(
            batch_size=int(text),
            device=device,
            shards=tuple(shards.shards("train")) if shards else (),
            shard_tile_size=shards.preprocessing["tile_size"] if shards else 0,
            workers=workers,
            **chosen,
        )
        flops = flops_of(task)
        lines = lines or describe_task(task, flops)
        made += rows(task, measure(task, [name for name in RUNGS if name in (rungs or default_rungs(task))]), flops)
        if profiled and number == 0:
            page = profile(task, profiled)
    markdown = table(made)
    click.echo("\n".join(lines) + "\n\n" + markdown)
    if output is None:
        click.echo(page, nl=bool(page))
        return
    write_report(output, f"Training step: {task.arch} at {task.tile_size} pixels", lines, markdown, spelled(ctx))
    write_json(output.with_suffix(".json"), {"description": lines, "rows": made})
    written = [output, output.with_suffix(".json")]
    if page:
        written.append(output.with_suffix(".profile.txt"))
        write_text(written[-1], page)
    click.echo(f"\n-> {', '.join(map(str, written))}")
