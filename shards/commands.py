"""``mammostream shards``: the group of its commands, and ``labels``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mammostream.common.errors import BadInput
from mammostream.common.options import Command, Group, ListOption, split_commas
from mammostream.shards.build.command import build, finish, info, pack, unpack, verify
from mammostream.shards.options import FILE, shards_argument

if TYPE_CHECKING:
    import pandas as pd

    from mammostream.shards.reading import ShardSet


@click.group(cls=Group)
def shards() -> None:
    """Build, verify, describe, label, pack and unpack WebDataset shards of tiles."""


@click.command(cls=Command)
@shards_argument
@click.option("--split", type=click.Choice(["train", "val", "test"]), help="Tiles of this split only.")
@click.option("--findings", type=FILE, help="findings.parquet with boxes, each label of which becomes a class.")
@click.option(
    "--min-fraction",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.5,
    help="A tile is positive from this share "
    "of a box inside it, or of the tile inside a box; a smaller overlap leaves the cell empty (no label).",
)
@click.option(
    "--manifest",
    type=FILE,
    help="manifest.parquet with the films' labels, for --image-labels, and for which films have a lesion without a box; "
    "default: the one next to --findings.",
)
@click.option(
    "--image-labels",
    cls=ListOption,
    callback=split_commas,
    help="Labels of films to copy to each of their tiles (normal benign malignant …), or 'all' of the manifest's.",
)
@click.option("--output", type=FILE, required=True, help="The CSV: tile_path (the tile's key) and one column per class.")
def labels(
    directory: Path,
    split: str | None,
    findings: Path | None,
    min_fraction: float,
    manifest: Path | None,
    image_labels: tuple[str, ...],
    output: Path,
) -> None:
    """Label tiles by boxes or by their films: a CSV of tile_path and one 0/1 column a class, empty where unknown.

    A box makes the tiles positive that hold enough of it, or lie far enough within it; those it only touches stay empty. So do
    all tiles of a film that the manifest gives the label, or leaves open, where no box shows the lesion.
    """
    import pandas as pd

    from mammostream.common.files import write_text
    from mammostream.shards.labels import image_labels as labels_of_films
    from mammostream.shards.labels import tile_labels
    from mammostream.shards.manifest import read_manifest
    from mammostream.shards.reading import open_shards

    if not (findings or image_labels) or (image_labels and not manifest):
        raise BadInput("give --findings, or --manifest with --image-labels, or all three")
    if findings and not manifest and (beside := findings.parent / "manifest.parquet").is_file():
        manifest = beside
    films = read_manifest(manifest) if manifest else None
    opened = open_shards(directory)
    opened.shards(split)
    tiles = opened.tiles(split)
    table = pd.DataFrame({"tile_path": tiles["key"]})
    if findings:
        table = tile_labels(tiles, _boxes_of(opened, findings), min_fraction, films)
    if image_labels:
        of_films = labels_of_films(tiles, films, image_labels)
        for name in of_films.columns.intersection(table.columns):
            raise BadInput(f"'{name}' is a label of both --findings and --image-labels; leave it out of --image-labels")
        table = pd.concat([table, of_films], axis=1)
    write_text(output, table.to_csv(index=False))
    for name in table.columns[1:]:
        column = table[name]
        click.echo(f"{name}: {(column == 1).sum()} positive, {(column == 0).sum()} negative, {column.isna().sum()} left out")
    click.echo(f"{len(table)} tiles -> {output}")


def _boxes_of(opened: ShardSet, findings: Path) -> pd.DataFrame:
    """Read findings and check that they are of these shards' films."""
    from mammostream.shards.manifest import read_findings

    boxes = read_findings(findings)
    known = boxes["image_id"].isin(opened.images()["image_id"])
    if not known.any():
        example = f" (the first is of '{boxes['image_id'].iloc[0]}')" if len(boxes) else ""
        raise BadInput(f"none of the {len(boxes)} boxes of {findings} is of a film of {opened.directory}{example}")
    if not known.all():
        click.echo(f"{(~known).sum()} of {len(boxes)} boxes are of films that are not in {opened.directory}", err=True)
    return boxes


for command in (build, finish, verify, info, labels, pack, unpack):
    shards.add_command(command)
