"""``mammostream probe``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mammostream.common.errors import BadInput
from mammostream.common.files import write_json, write_text, write_yaml
from mammostream.common.options import Command, ListOption, config_file_option, config_options, resolved, split_commas
from mammostream.train.probe.config import ProbeConfig

FILE = click.Path(path_type=Path)


@click.command(cls=Command)
@click.option(
    "--checkpoint",
    "checkpoints",
    cls=ListOption,
    required=True,
    help="Checkpoints that 'pretrain' or 'finetune' wrote, separated by spaces.",
)
@click.option("--shards", "shards_dir", type=FILE, required=True, help="Shard directory with the labelled tiles.")
@click.option(
    "--labels", "labels_path", type=FILE, required=True, help="CSV of tile_path and one 0/1 column per class; empty = no label."
)
@click.option(
    "--class-names",
    cls=ListOption,
    callback=split_commas,
    help="Columns to probe; default: all with only 0, 1 and empty cells.",
)
@click.option("--weights-file", type=FILE, help="File with ImageNet weights, for machines without internet access.")
@click.option("--output-dir", type=FILE, required=True, help="Folder for probe.json, probe.csv, probe.png and the features.")
@config_options(ProbeConfig)
@config_file_option
@click.pass_context
def probe(
    ctx: click.Context,
    /,
    checkpoints: tuple[str, ...],
    shards_dir: Path,
    labels_path: Path,
    class_names: tuple[str, ...],
    weights_file: Path | None,
    output_dir: Path,
    **options: Any,
) -> None:
    """Compare frozen features on labels: checkpoints next to random and ImageNet weights.

    Logistic regression and nearest neighbours learn from 1, 10 and 100 % of the labels, drawn by patient, and score tiles,
    images and breasts of other patients: the val split (else test) if it and the train split have labels, else by
    cross-validation. AUC with 95 % intervals over patients, mean over seeds. An image or breast is positive if one of its
    tiles is. Features are cached in --output-dir.
    """
    config = ProbeConfig(**options)
    from mammostream.shards.reading import open_shards
    from mammostream.train.probe.compare import compare, markdown
    from mammostream.train.probe.features import checkpoint_network, imagenet_network, random_network
    from mammostream.train.probe.labelled import read_probe_set
    from mammostream.train.probe.pictures import draw_probe
    from mammostream.train.run.runtime import resolve_runtime

    shards = open_shards(shards_dir)
    probe_set = read_probe_set(labels_path, class_names, shards)
    runtime = resolve_runtime(config)
    paths = [Path(path) for path in checkpoints]
    found = [checkpoint_network(path, name, shards) for path, name in zip(paths, _short_names(paths), strict=True)]
    networks = [network for network, _ in found]
    for arch, view_size in dict.fromkeys((arch, network.view_size) for network, arch in found):
        networks.append(random_network(arch, view_size))
        try:
            networks.append(imagenet_network(arch, weights_file or "imagenet", view_size))
        except BadInput as error:
            if weights_file:
                raise
            click.echo(f"without ImageNet: {error}", err=True)
    result = compare(networks, probe_set, runtime, config, output_dir / "features")
    import pandas as pd

    write_json(output_dir / "probe.json", result)
    write_text(output_dir / "probe.csv", pd.DataFrame(result["rows"]).drop(columns="aucs").to_csv(index=False))
    write_yaml(output_dir / "config.yaml", resolved(ctx))
    draw_probe(result["rows"], output_dir / "probe.png")
    for line in markdown(result):
        click.echo(line)
    click.echo(f"probe.json, probe.csv, probe.png -> {output_dir}")


def _short_names(paths: list[Path]) -> list[str]:
    """Return the checkpoints' names, each with enough parent folders to be unique."""
    # From two parts on, even if every path is the bare name of a file in the current folder.
    for parts in range(2, max(2, *(len(path.parts) for path in paths)) + 1):
        names = ["/".join(path.with_suffix("").parts[-parts:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            break
    return names
