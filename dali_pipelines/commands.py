"""``mammostream bench loader``."""

from __future__ import annotations

from pathlib import Path

import click

from mammostream.common.errors import BadInput, nearest
from mammostream.common.measuring import check_page, spelled, write_report
from mammostream.common.options import Command, ListOption, config_file_option, split_commas

FILE = click.Path(path_type=Path)


@click.command(cls=Command)
@click.option("--shards", "directory", type=FILE, required=True, help="Shard directory; all contenders read its codec.")
@click.option("--split", default="train", help="The split to read.")
@click.option("--recipe", type=click.Choice(["guide", "mammo"]), default="guide", help="The two views.")
@click.option("--views", "views_file", type=FILE, help="YAML file with view1 and view2, instead of a recipe.")
@click.option("--batch-size", type=click.IntRange(min=1), default=32, help="Tiles per batch.")
@click.option("--workers", type=click.IntRange(min=1), default=2, help="Threads for mammostream, worker processes for others.")
@click.option("--device", type=click.Choice(["cpu", "gpu"]), default="cpu", help="Device on which the batches are delivered.")
@click.option("--rounds", type=click.IntRange(min=1), default=7, help="Number of turns per contender.")
@click.option("--seconds", type=click.FloatRange(min=0, min_open=True), default=4.0, help="Length of a turn in seconds.")
@click.option(
    "--only", cls=ListOption, callback=split_commas, help="Contenders to run; default: all whose packages are installed."
)
@click.option("--output", type=FILE, help="A Markdown page to write the table to; the bar chart goes next to it as PNG.")
@config_file_option
@click.pass_context
def loader(
    ctx: click.Context,
    /,
    directory: Path,
    split: str,
    recipe: str,
    views_file: Path | None,
    batch_size: int,
    workers: int,
    device: str,
    rounds: int,
    seconds: float,
    only: tuple[str, ...],
    output: Path | None,
) -> None:
    """Measure the loader against other libraries that make the same two views of the same tiles.

    Contenders: mammostream, opencv, torchvision, kornia (if installed), 'decode only' (our reader and decoder without views: an
    upper bound for the views) and synthetic (no data at all: the cost of the loop itself). They take turns, each in its own
    process. Prints a Markdown table.
    """
    from mammostream.dali_pipelines.bench import CONTENDERS, Task, describe_task, draw, installed, measure, table
    from mammostream.dali_pipelines.recipes import RECIPES, views_from_yaml
    from mammostream.shards.reading import open_shards

    for name in only:
        if name not in CONTENDERS:
            known = ", ".join(CONTENDERS)
            raise BadInput(f"--only {name}: there is no such contender{nearest(name, CONTENDERS)}; there are: {known}")
        if name not in installed():
            packages = " ".join(CONTENDERS[name][1])
            raise BadInput(
                f"--only {name}: its package is not installed (Python cannot import {packages}); install it or leave it out"
            )
    check_page(output)
    # Each contender runs in its own process; a missing package is reported once, here.
    import torch  # noqa: F401

    shards = open_shards(directory)
    task = Task(
        shards=tuple(shards.shards(split)),
        tile_size=shards.preprocessing["tile_size"],
        views=RECIPES[recipe] if views_file is None else views_from_yaml(views_file),
        batch_size=batch_size,
        workers=workers,
        device=device,
    )
    turns = measure(task, [name for name in CONTENDERS if name in (only or installed())], rounds, seconds)
    lines = describe_task(task, shards, recipe if views_file is None else views_file.name, rounds, seconds)
    markdown = table(turns)
    click.echo("\n".join(lines) + "\n\n" + markdown)
    if output is not None:
        title = f"Loader: two views of {task.tile_size}×{task.tile_size} tiles, codec {shards.codec}"
        chart = output.with_suffix(".png")
        draw(turns, chart, title)
        write_report(output, title, lines, markdown, spelled(ctx), chart)
        click.echo(f"\n-> {output}, {chart}")
