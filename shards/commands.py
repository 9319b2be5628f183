"""Commands from films to shards: simulate, preview, shards build|verify|info|labels."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from common.errors import BadInput, TooManyBad
from common.files import write_yaml
from common.options import Command, Group, config_file_option, config_options, resolved
from preprocess.simulation import ClusterConfig
from preprocess.tiling import TilingConfig
from shards.plan import BuildConfig

if TYPE_CHECKING:
    import pandas as pd

FILE = click.Path(path_type=Path)
manifest_option = click.option(
    "--manifest", type=FILE, required=True, help="manifest.parquet that 'prepare' or 'simulate' wrote."
)


def output_option(help: str) -> Any:
    """Return the ``--output-dir`` option with its own help."""
    return click.option("--output-dir", type=FILE, required=True, help=help)


@click.command(cls=Command)
@manifest_option
@output_option("Folder for the copies (images/), manifest.parquet and findings.parquet.")
@click.option("--copies", type=click.IntRange(min=1), default=1, help="Copies of each film, each with clusters of its own.")
@config_options(ClusterConfig)
@click.option("--seed", default=0, help="Seed of where the clusters lie and what they look like.")
@config_file_option
@click.pass_context
def simulate(ctx: click.Context, manifest: Path, output_dir: Path, copies: int, seed: int, **options: Any) -> None:
    """Plant SIMULATED micro-calcification clusters with known boxes into copies of films.

    A truth to test a pipeline with, where no annotated films are at hand: bright specks within a small circle, brighter than
    their surroundings by a multiple of the local noise. They are phantoms, not disease. The films themselves stay as they are.
    """
    from shards.annotations.simulated import simulate_copies
    from shards.manifest import read_manifest, write_findings, write_manifest

    config = ClusterConfig(**options)
    frame, findings = simulate_copies(read_manifest(manifest), output_dir, config, copies, seed)
    write_findings(findings, output_dir / "findings.parquet")
    write_manifest(frame, output_dir / "manifest.parquet")
    write_yaml(output_dir / "config.yaml", resolved(ctx))
    click.echo(f"{len(findings)} simulated clusters in {len(frame)} copies -> {output_dir / 'manifest.parquet'}")


@click.command(cls=Command)
@click.option("--manifest", type=FILE, help="manifest.parquet: a picture for each of its films, and contact sheets.")
@click.option("--image-path", type=FILE, help="One film, instead of a manifest.")
@output_option("Folder for the pictures: <image_id>.png, contact_sheet*.png, energies.png.")
@click.option("--assume-spacing", type=click.FloatRange(0.01, 2), help="Pixel size in mm where --image-path has none.")
@click.option("--findings", type=FILE, help="findings.parquet, whose boxes are drawn.")
@click.option("--sample", type=click.IntRange(min=1), help="Draw only this many of the manifest's films, chosen at random.")
@click.option("--seed", default=0, help="Seed of --sample.")
@click.option("--workers", type=click.IntRange(min=1), default=1, help="Processes; each draws one film at a time.")
@click.option(
    "--overwrite", is_flag=True, help="Draw every picture again, also those drawn from the same film with the same options."
)
@config_options(TilingConfig)
@config_file_option
@click.pass_context
def preview(
    ctx: click.Context,
    manifest: Path | None,
    image_path: Path | None,
    output_dir: Path,
    assume_spacing: float | None,
    findings: Path | None,
    sample: int | None,
    seed: int,
    workers: int,
    overwrite: bool,
    **options: Any,
) -> None:
    """Draw what 'shards build' would keep of each film: mask, tiles by rule, rejected tiles, response to specks.

    Takes the options of 'shards build', so that thresholds can be tried out before hours are spent: contact sheets show a
    manifest's films side by side, energies.png the energies of all tiles with the threshold. A film that cannot be read is
    named and the rest goes on. A picture is drawn again only where its film or an option has changed.
    """
    from common.progress import progress
    from preprocess.overview import PictureJob, draw_pictures, summary_lines, write_contact_sheets, write_energies
    from preprocess.reading import read_header
    from shards.archive import escape_id
    from shards.manifest import read_findings, read_manifest

    if (manifest is None) == (image_path is None):
        raise BadInput("give either --manifest or --image-path")
    config = TilingConfig(**options)
    if manifest:
        frame = read_manifest(manifest)
        frame = frame.sample(sample, random_state=seed).sort_index() if sample and sample < len(frame) else frame
        rows = frame.to_dict("records")
    else:
        header = read_header(image_path)
        spacing = math.nan if header.spacing_mm or assume_spacing is None else assume_spacing
        rows = [{"image_id": image_path.stem, "path": image_path, "laterality": header.laterality}]
        rows[0] |= {"pixel_spacing_mm": spacing, "spacing_source": "assumed"}
    boxes = read_findings(findings).dropna() if findings else None
    found = {} if boxes is None else dict(tuple(boxes.groupby("image_id")[["xmin", "ymin", "xmax", "ymax"]]))
    jobs = [
        PictureJob(
            image_id=row["image_id"],
            image=Path(row["path"]),
            picture=output_dir / f"{escape_id(row['image_id'])}.png",
            # Unknown here: the file may know.
            spacing_mm=None if math.isnan(row["pixel_spacing_mm"]) else row["pixel_spacing_mm"],
            spacing_source=row["spacing_source"],
            laterality=row["laterality"],
            boxes=tuple(map(tuple, found[row["image_id"]].to_numpy().tolist())) if row["image_id"] in found else (),
        )
        for row in rows
    ]
    pictures = list(progress(draw_pictures(jobs, config, workers, overwrite), "drawing", "film", total=len(jobs)))
    bad = [picture for picture in pictures if picture.reason]
    for picture in bad:
        click.echo(f"no picture: {picture.image_id}: {picture.reason}", err=True)
    if len(bad) == len(jobs):
        raise BadInput(f"none of the {len(bad)} films could be drawn; the lines above say why")
    if manifest:
        write_contact_sheets(pictures, output_dir)
        write_energies(pictures, config, output_dir)
    write_yaml(output_dir / "config.yaml", resolved(ctx))
    for line in summary_lines(pictures):
        click.echo(line)
    click.echo(f"{len(jobs) - len(bad)} pictures, {len(bad)} films without -> {output_dir}")


@click.group(cls=Group)
def shards() -> None:
    """Build, verify, describe and label WebDataset shards of tiles."""


shards_argument = click.argument("directory", type=FILE, metavar="SHARDS")


@shards.command()
@manifest_option
@output_option("The shard directory; a build that was stopped goes on there.")
@click.option(
    "--split",
    type=click.Choice(["train", "val", "test"]),
    help="Build this split only; the others may follow into the same directory.",
)
@config_options(BuildConfig)
@click.option("--workers", type=click.IntRange(min=1), default=1, help="Processes; each takes one shard at a time.")
@click.option("--max-bad", default="5%", help="Most films that may fail, a number or a percentage; more end with exit code 3.")
@config_file_option
@click.pass_context
def build(
    ctx: click.Context, manifest: Path, output_dir: Path, split: str | None, workers: int, max_bad: str, **options: Any
) -> None:
    """Cut films into tiles and write WebDataset shards with a DALI index.

    Finished shards are skipped, so the same command goes on after an interruption; other options refuse to mix with them.
    A film that cannot be read becomes a row of images.parquet with its reason, and the rest goes on.
    """
    from shards.build import build_all, finish
    from shards.manifest import read_manifest
    from shards.plan import make_plan
    from shards.reading import open_shards

    config = BuildConfig(**options)
    frame = read_manifest(manifest)
    asked = len(read_manifest(manifest, split)) if split else len(frame)
    limit = _bad_limit(max_bad, asked)
    # The plan is always of the whole manifest: splits may be built one after the other into one directory.
    plan = make_plan(frame, output_dir, config)
    build_all(plan, workers, split)
    finish(plan, split)
    write_yaml(output_dir / "config.yaml", resolved(ctx))
    images = open_shards(output_dir).images()
    _print_images(images)
    images = images[images["split"] == split] if split else images
    bad = int((images["reason"] != "").sum())
    click.echo(f"{len(images)} films ({bad} gave no tiles), {images['kept'].sum()} tiles -> {output_dir}")
    if bad > limit:
        raise TooManyBad(
            f"{bad} of {len(images)} films gave no tiles, more than --max-bad {max_bad}; see {output_dir}/images.parquet"
        )


def _bad_limit(max_bad: str, count: int) -> float:
    try:
        return float(max_bad.rstrip("%")) / 100 * count if max_bad.endswith("%") else int(max_bad)
    except ValueError:
        raise BadInput(f"--max-bad {max_bad!r} is neither a number of films nor a percentage like 5%") from None


def _print_images(images: pd.DataFrame) -> None:
    """Print what happened to the candidates, rule by rule, and each film that gave nothing."""
    columns = [c for c in images.columns if c.startswith(("candidates", "rejected", "kept"))] + ["guide_8bit_kept"]
    totals = images.groupby("split", sort=False)[columns].sum().astype(int).T
    click.echo(totals.rename(index={"guide_8bit_kept": "(the plain 8-bit scale would have kept)"}).to_string() + "\n")
    for row in images[images["reason"] != ""].itertuples():
        click.echo(f"no tiles: {row.image_id}: {row.reason}", err=True)


@shards.command()
@shards_argument
def verify(directory: Path) -> None:
    """Check every byte, every index entry and every tile's pixels against the tables written with them."""
    from shards.reading import open_shards
    from shards.verify import verify_shards

    opened = open_shards(directory)
    faults = verify_shards(opened)
    for fault in faults:
        click.echo(f"fault: {fault}", err=True)
    if faults:
        raise BadInput(f"{len(faults)} faults in {directory}; delete the .parquet of each shard named above and build again")
    click.echo(f"{len(opened.meta['shards'])} shards, {sum(s['tiles'] for s in opened.meta['shards'])} tiles: all well")


@shards.command()
@shards_argument
def info(directory: Path) -> None:
    """Say what a shard directory holds and how its tiles were made."""
    import pandas as pd
    import yaml

    from shards.reading import open_shards

    opened = open_shards(directory)
    table = pd.DataFrame(opened.meta["shards"])
    table["MB"] = (table["tar_bytes"].fillna(0) / 1e6).round(1)
    click.echo(table[["name", "images", "tiles", "MB"]].to_string(index=False) + "\n")
    _print_images(opened.images())
    stored = {"codec": opened.codec, "bits": opened.meta["bits"]} | opened.preprocessing
    click.echo(yaml.safe_dump(stored, sort_keys=False).rstrip())


@shards.command()
@shards_argument
@click.option("--split", type=click.Choice(["train", "val", "test"]), help="Tiles of this split only.")
@click.option("--findings", type=FILE, required=True, help="findings.parquet with the boxes.")
@click.option(
    "--min-fraction",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.5,
    help="A tile is positive from this share "
    "of a box inside it, or of the tile inside a box; a smaller overlap leaves the cell empty (no label).",
)
@click.option("--output", type=FILE, required=True, help="The CSV: tile_path (the tile's key) and a column a class.")
def labels(directory: Path, split: str | None, findings: Path, min_fraction: float, output: Path) -> None:
    """Turn boxes into tile labels: a CSV of tile_path and one 0/1 column a class, empty where the overlap is partial."""
    from common.files import write_text
    from shards.labels import tile_labels
    from shards.manifest import read_findings
    from shards.reading import open_shards

    opened = open_shards(directory)
    opened.shards(split)
    boxes = read_findings(findings)
    known = boxes["image_id"].isin(opened.images()["image_id"])
    if not known.any():
        example = f" (the first is of '{boxes['image_id'].iloc[0]}')" if len(boxes) else ""
        raise BadInput(f"none of the {len(boxes)} boxes of {findings} is of a film of {directory}{example}")
    if not known.all():
        click.echo(f"{(~known).sum()} of {len(boxes)} boxes are of films that are not in {directory}", err=True)
    table = tile_labels(opened.tiles(split), boxes, min_fraction)
    write_text(output, table.to_csv(index=False))
    for name in table.columns[1:]:
        column = table[name]
        click.echo(f"{name}: {(column == 1).sum()} positive, {(column == 0).sum()} negative, {column.isna().sum()} left out")
    click.echo(f"{len(table)} tiles -> {output}")
