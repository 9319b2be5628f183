"""``mammostream report``."""

from __future__ import annotations

from pathlib import Path

import click

from mammostream.common.options import Command

FILE = click.Path(path_type=Path)


@click.command(cls=Command)
@click.argument("run_dir", type=FILE)
@click.option("--output", type=FILE, help="The page; default: report.html in RUN_DIR.")
@click.option(
    "--errors",
    type=click.IntRange(min=0),
    default=5,
    help="Misjudged films to show of each class and kind of error, the most confident first; 0 = none.",
)
def report(run_dir: Path, output: Path | None, errors: int) -> None:
    """Gather a run's tables, curves and pictures into one self-contained HTML page.

    RUN_DIR is searched for shard directories, trainings, predictions and pictures, as deep as two folders down. Of each
    evaluation the worst false negatives and false positives follow, film by film, with heat map and boxes where there are any.
    """
    from mammostream.train.report.report import write_report

    path = output or run_dir / "report.html"
    pictures = write_report(run_dir, path, errors)
    click.echo(f"{pictures} pictures, {path.stat().st_size / 1e6:.1f} MB -> {path}")
