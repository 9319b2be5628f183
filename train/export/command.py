"""The command export."""

from __future__ import annotations

from pathlib import Path

import click

from mammostream.common.errors import BadInput
from mammostream.common.options import Command, config_file_option

FILE = click.Path(path_type=Path)


@click.command(cls=Command)
@click.option("--model-path", type=FILE, required=True, help="Classifier checkpoint; with --features any checkpoint.")
@click.option("--output", type=FILE, required=True, help="The ONNX file.")
@click.option(
    "--features/--no-features", default=False, help="Export the backbone's features instead of the classifier's answer."
)
@click.option(
    "--include-normalisation/--no-include-normalisation",
    default=False,
    help="Take tiles as grey in [0, 1] and normalise them in the file; default: they come normalised as in the training.",
)
@click.option("--shards", "shards_dir", type=FILE, help="Compare ONNX with torch on 16 real tiles of these shards, too.")
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0, min_open=True),
    default=1e-4,
    help="Largest difference from torch, as a share of the largest output (absolute where that is below 1).",
)
@config_file_option
def export(
    model_path: Path, output: Path, features: bool, include_normalisation: bool, shards_dir: Path | None, tolerance: float
) -> None:
    """Write a network as ONNX, for any batch size, and compare it with torch at once.

    Where the two differ by more than --tolerance, no file is written. The file's metadata say how tiles are made and
    normalised, and name the classes, their thresholds, and the checkpoint's hash. Needs the extra 'onnx'.
    """
    if output.suffix != ".onnx":
        raise BadInput(f"--output {output} does not end in .onnx; give a name that does")
    from mammostream.shards.reading import open_shards

    shards = open_shards(shards_dir) if shards_dir else None
    from mammostream.train.export.onnx import export_onnx

    differences = export_onnx(
        model_path,
        output,
        features=features,
        include_normalisation=include_normalisation,
        shards=shards,
        tolerance=tolerance,
    )
    for kind, difference in differences.items():
        click.echo(f"largest difference from torch on {kind} tiles: {difference:.2g}")
    if shards is None:
        click.echo("give --shards to compare real tiles, too")
    click.echo(f"{output.stat().st_size / 1e6:.1f} MB -> {output}")
