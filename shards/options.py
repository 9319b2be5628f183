"""Command-line options that several commands on shards share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    pass

FILE = click.Path(path_type=Path)

manifest_option = click.option(
    "--manifest", type=FILE, required=True, help="manifest.parquet that 'prepare' or 'simulate' wrote."
)


def output_option(help: str) -> Any:
    """Return the ``--output-dir`` option with its own help."""
    return click.option("--output-dir", type=FILE, required=True, help=help)


shards_argument = click.argument("directory", type=FILE, metavar="SHARDS")

workers_option = click.option(
    "--workers", type=click.IntRange(min=1), help="Processes, each at one shard at a time; default: one per core."
)
