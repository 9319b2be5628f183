"""``mammostream simulate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mammostream.common.files import write_yaml
from mammostream.common.options import Command, config_file_option, config_options, resolved
from mammostream.preprocess.simulation import ClusterConfig
from mammostream.shards.options import manifest_option, output_option

if TYPE_CHECKING:
    pass


@click.command(cls=Command)
@manifest_option
@output_option("Folder for the copies (images/), manifest.parquet and findings.parquet.")
@click.option("--copies", type=click.IntRange(min=1), default=1, help="Copies of each film, each with its own clusters.")
@config_options(ClusterConfig)
@click.option("--seed", default=0, help="Seed of where the clusters lie and what they look like.")
@config_file_option
@click.pass_context
def simulate(ctx: click.Context, /, manifest: Path, output_dir: Path, copies: int, seed: int, **options: Any) -> None:
    """Plant SIMULATED micro-calcification clusters with known boxes into copies of films.

    A truth to test a pipeline with, where no annotated films are at hand: bright specks within a small circle, brighter than
    their surroundings by a multiple of the local noise. They are phantoms, not disease. The films themselves stay as they are.
    """
    from mammostream.shards.annotations.simulated import simulate_copies
    from mammostream.shards.manifest import read_manifest, write_findings, write_manifest

    config = ClusterConfig(**options)
    frame, findings = simulate_copies(read_manifest(manifest), output_dir, config, copies, seed)
    write_findings(findings, output_dir / "findings.parquet")
    write_manifest(frame, output_dir / "manifest.parquet")
    write_yaml(output_dir / "config.yaml", resolved(ctx))
    click.echo(f"{len(findings)} simulated clusters in {len(frame)} copies -> {output_dir / 'manifest.parquet'}")
