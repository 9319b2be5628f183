"""``mammostream bench build``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from mammostream.common.options import Command, config_file_option, config_options
from mammostream.shards.build.plan import BuildConfig


@click.command(cls=Command)
@click.option("--manifest", type=click.Path(path_type=Path), required=True, help="manifest.parquet that 'prepare' wrote.")
@click.option("--films", type=click.IntRange(min=1), default=16, help="Build this many of its films, drawn by --seed.")
@click.option("--rounds", type=click.IntRange(min=1), default=3, help="Builds; the table has the median.")
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=len(os.sched_getaffinity(0)),
    help="Threads of the one process that builds: they read ahead and encode.",
)
@config_options(BuildConfig)
@config_file_option
def build(manifest: Path, films: int, rounds: int, threads: int, **options: Any) -> None:
    """Measure how long films take from file to shard, and by stage, in one process.

    Takes the options of 'shards build'. Nothing is kept. A build with --workers runs as many such processes. Prints a Markdown
    table.
    """
    from mammostream.common.machine import describe
    from mammostream.shards.build.bench import measure_build, table
    from mammostream.shards.build.launch import Launcher
    from mammostream.shards.manifest import read_manifest

    config = BuildConfig(**options)
    rows = read_manifest(manifest)
    rows = rows.sample(min(films, len(rows)), random_state=config.seed)
    speed = measure_build(rows, config, Launcher(threads=threads), rounds)
    click.echo(f"{describe()}\n\n{len(rows)} films, {threads} threads, codec {config.codec}, {rounds} rounds.\n")
    click.echo(table({manifest.parent.name or "films": speed}))
