"""Commands from films to shards: simulate, preview, shards build|finish|verify|info|labels|pack|unpack."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mammostream.common.errors import BadInput, TooManyBad
from mammostream.common.files import write_yaml
from mammostream.common.options import Command, Group, ListOption, config_file_option, config_options, resolved, split_commas
from mammostream.preprocess.simulation import ClusterConfig
from mammostream.preprocess.tiling import TilingConfig
from mammostream.shards.build.launch import LaunchConfig
from mammostream.shards.build.plan import BuildConfig, PackConfig

if TYPE_CHECKING:
    import pandas as pd

    from mammostream.shards.reading import ShardSet

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
    from mammostream.shards.annotations.simulated import simulate_copies
    from mammostream.shards.manifest import read_manifest, write_findings, write_manifest

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
    from mammostream.common.progress import progress
    from mammostream.preprocess.overview import PictureJob, draw_pictures, summary_lines, write_contact_sheets, write_energies
    from mammostream.preprocess.reading import read_header
    from mammostream.shards.archive import escape_id
    from mammostream.shards.manifest import read_findings, read_manifest

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
    """Build, verify, describe, label, pack and unpack WebDataset shards of tiles."""


shards_argument = click.argument("directory", type=FILE, metavar="SHARDS")


def _parse_range(value: str | None) -> range | None:
    if value is None:
        return None
    first, colon, last = value.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise BadInput(f"--shard-range {value!r} is not A:B with 0 <= A < B; 0:8 means the first eight shards")
    return range(int(first), int(last))


workers_option = click.option(
    "--workers", type=click.IntRange(min=1), help="Processes, each at one shard at a time; default: one a core."
)
check_every_option = click.option(
    "--check-every",
    type=click.IntRange(min=1),
    default=1,
    help="Decode every so many tiles with an independent decoder, and compare, before their shard is kept.",
)
max_bad_option = click.option(
    "--max-bad", default="5%", help="Most films that may fail, a number or a percentage; more end with exit code 3."
)


@shards.command()
@manifest_option
@output_option("The shard directory; a build that was stopped goes on there.")
@click.option(
    "--split",
    type=click.Choice(["train", "val", "test"]),
    help="Build this split only; the others may follow into the same directory.",
)
@click.option(
    "--shard-range",
    metavar="A:B",
    help="Build the shards A to B-1 only, as one of several jobs on one directory; 'shards finish' ends them.",
)
@config_options(BuildConfig)
@config_options(LaunchConfig)
@check_every_option
@max_bad_option
@config_file_option
@click.pass_context
def build(
    ctx: click.Context,
    manifest: Path,
    output_dir: Path,
    split: str | None,
    shard_range: str | None,
    workers: int | None,
    threads: int | None,
    dask: str | None,
    check_every: int,
    max_bad: str,
    **options: Any,
) -> None:
    """Cut films into tiles and write WebDataset shards with a DALI index.

    Finished shards are skipped, so the same command goes on after an interruption; other options refuse to mix with them.
    A film that cannot be read becomes a row of images.parquet with its reason, and the rest goes on. The same films, options
    and library versions give the same bytes, however many processes or machines build.
    """
    from mammostream.shards.build.build import build_all
    from mammostream.shards.build.launch import Launcher
    from mammostream.shards.build.merge import finish, read_images
    from mammostream.shards.build.plan import make_plan
    from mammostream.shards.manifest import read_manifest
    from mammostream.shards.reading import open_shards

    config, launch = BuildConfig(**options), LaunchConfig(workers, threads, dask)
    ordinals = _parse_range(shard_range)
    _bad_limit(max_bad, 1)
    # The plan is always of the whole manifest: splits and ranges may be built one after the other into one directory.
    plan = make_plan(read_manifest(manifest), output_dir, config)
    count = len(plan.shards)
    plan = plan.select(split, ordinals)
    if split and not plan.counts.get(split):
        raise BadInput(f"manifest {manifest} has no rows of split '{split}'; it has: {', '.join(plan.counts)}")
    if not plan.shards:
        click.echo(f"the plan has {count} shards, none of them in this range: nothing to do")
        return
    launcher = Launcher.of(launch, plan.recipe["options"]["device"])
    build_all(plan, launcher, check_every=check_every)
    write_yaml(output_dir / "config.yaml", resolved(ctx))
    if ordinals is None:
        finish(output_dir, split)
        images = open_shards(output_dir).images()
        images = images[images["split"] == split] if split else images
    else:
        images = read_images(output_dir, [shard.name for shard in plan.shards])
        built = f"{len(plan.shards)} of {count} shards"
        click.echo(f"built {built}; when all are, run 'mammostream shards finish {output_dir}'\n")
    _report_images(images, output_dir, max_bad)


@shards.command()
@shards_argument
@click.option("--split", type=click.Choice(["train", "val", "test"]), help="Demand this split's shards only.")
@max_bad_option
def finish(directory: Path, split: str | None, max_bad: str) -> None:
    """Merge the tables of shards that several jobs built (--shard-range) into tiles.parquet, images.parquet, shards.json.

    Refuses, naming them, while shards are missing. Doing it twice changes nothing.
    """
    from mammostream.shards.build.merge import finish as merge
    from mammostream.shards.reading import open_shards

    _bad_limit(max_bad, 1)
    merge(directory, split)
    images = open_shards(directory).images()
    _report_images(images[images["split"] == split] if split else images, directory, max_bad)


def _report_images(images: pd.DataFrame, directory: Path, max_bad: str) -> None:
    """Print what became of some films; too many bad ones are an error."""
    _print_images(images)
    bad = int((images["reason"] != "").sum())
    click.echo(f"{len(images)} films ({bad} gave no tiles), {images['kept'].sum()} tiles -> {directory}")
    if bad > _bad_limit(max_bad, len(images)):
        raise TooManyBad(
            f"{bad} of {len(images)} films gave no tiles, more than --max-bad {max_bad}; the reasons are above and in "
            "images.parquet; to try films again, delete the .parquet of their shards and run the same command"
        )


def _bad_limit(max_bad: str, count: int) -> float:
    try:
        return float(max_bad.rstrip("%")) / 100 * count if max_bad.endswith("%") else int(max_bad)
    except ValueError:
        raise BadInput(f"--max-bad {max_bad!r} is neither a number of films nor a percentage like 5%") from None


def _print_images(images: pd.DataFrame) -> None:
    """Print what happened to the candidates, rule by rule, and each film that gave nothing."""
    columns = [c for c in images.columns if c.startswith(("candidates", "rejected", "kept", "clusters"))] + ["guide_8bit_kept"]
    totals = images.groupby("split", sort=False)[columns].sum().astype(int).T
    click.echo(totals.rename(index={"guide_8bit_kept": "(the plain 8-bit scale would have kept)"}).to_string() + "\n")
    _print_reasons(images)


def _print_reasons(images: pd.DataFrame) -> None:
    for row in images[images["reason"] != ""].itertuples():
        click.echo(f"no tiles: {row.image_id}: {row.reason}", err=True)


@shards.command()
@click.option(
    "--csv",
    "csvs",
    cls=ListOption,
    type=FILE,
    required=True,
    help="CSVs of tile_path and any of split, image_id, patient_id; class columns may follow and stay in the CSV.",
)
@click.option(
    "--split",
    "splits",
    cls=ListOption,
    type=click.Choice(["train", "val", "test"]),
    help="The split of each CSV, in their order; default: their column 'split'.",
)
@click.option("--tiles-dir", type=FILE, required=True, help="Folder that tile_path is relative to.")
@output_option("The shard directory; what was stopped goes on there.")
@config_options(PackConfig)
@config_options(LaunchConfig)
@check_every_option
@max_bad_option
@config_file_option
@click.pass_context
def pack(
    ctx: click.Context,
    csvs: tuple[Path, ...],
    splits: tuple[str, ...],
    tiles_dir: Path,
    output_dir: Path,
    workers: int | None,
    threads: int | None,
    dask: str | None,
    check_every: int,
    max_bad: str,
    **options: Any,
) -> None:
    """Pack tiles that are image files already, named by CSVs, into shards.

    Labels are no part of shards: each CSV is written again beside them with the tiles' keys for tile_path, as 'finetune'
    takes it. A tile that cannot be read, or is of another size or depth than the first, is told and left out.
    """
    from mammostream.shards.build.build import build_all
    from mammostream.shards.build.launch import Launcher
    from mammostream.shards.build.merge import finish
    from mammostream.shards.build.pack import make_pack_plan, pack_shard, read_tile_csvs, write_packed_csvs
    from mammostream.shards.reading import open_shards

    config, launch = PackConfig(**options), LaunchConfig(workers, threads, dask)
    tiles = read_tile_csvs(csvs, splits, tiles_dir)
    limit = _bad_limit(max_bad, len(tiles))
    plan = make_pack_plan(tiles, tiles_dir, output_dir, config)
    build_all(plan, Launcher.of(launch), check_every=check_every, build=pack_shard)
    finish(output_dir)
    opened = open_shards(output_dir)
    written = write_packed_csvs(csvs, tiles, opened.tiles(), output_dir)
    write_yaml(output_dir / "config.yaml", resolved(ctx))
    _print_reasons(opened.images())
    bad = len(tiles) - len(opened.tiles())
    click.echo(f"{len(tiles) - bad} tiles packed, {bad} left out -> {output_dir}; labels: {', '.join(map(str, written))}")
    if bad > limit:
        raise TooManyBad(
            f"{bad} of {len(tiles)} tiles were left out, more than --max-bad {max_bad}; see {output_dir}/images.parquet"
        )


@shards.command()
@shards_argument
@click.option("--split", type=click.Choice(["train", "val", "test"]), help="Tiles of this split only.")
@output_option("Folder for the tiles as <key>.png, and for tiles.csv, which names them.")
@workers_option
def unpack(directory: Path, split: str | None, output_dir: Path, workers: int | None) -> None:
    """Write the tiles of shards as PNG files, without loss, for tools that read no shards; 'pack' does the reverse."""
    from mammostream.shards.build.launch import Launcher
    from mammostream.shards.build.pack import TILES_CSV, unpack_shards
    from mammostream.shards.reading import open_shards

    count = unpack_shards(open_shards(directory), output_dir, split, Launcher.of(LaunchConfig(workers)))
    click.echo(f"{count} tiles -> {output_dir}, named in {output_dir / TILES_CSV}")


@shards.command()
@shards_argument
@workers_option
@click.option("--decode/--no-decode", "decoding", default=True, help="Decode every tile; without, only bytes are compared.")
@click.option(
    "--quarantine", is_flag=True, help="Take damaged samples out of the indexes and tables, so that what is left can be used."
)
def verify(directory: Path, workers: int | None, decoding: bool, quarantine: bool) -> None:
    """Check every byte, every index entry, every tile's pixels and every table against each other.

    A check that was stopped goes on where it stopped.
    """
    from mammostream.shards.build.launch import Launcher
    from mammostream.shards.build.verify import quarantine as take_out
    from mammostream.shards.build.verify import verify_shards
    from mammostream.shards.reading import open_shards

    opened = open_shards(directory)
    faults = verify_shards(opened, Launcher.of(LaunchConfig(workers)), decoding=decoding)
    for fault in faults:
        click.echo(f"fault: {fault}", err=True)
    if faults and not quarantine:
        raise BadInput(
            f"{len(faults)} faults in {directory}; delete the .parquet of each shard named above and build again, or leave "
            "the damaged samples out with --quarantine"
        )
    if faults:
        left_out = take_out(opened, faults)
        for fault in left_out:
            click.echo(f"left out: {fault}")
        click.echo(f"{len(left_out)} samples left out of the indexes and tables of {directory}; check it again")
        return
    click.echo(f"{len(opened.meta['shards'])} shards, {sum(s['tiles'] for s in opened.meta['shards'])} tiles: all well")


@shards.command()
@shards_argument
def info(directory: Path) -> None:
    """Say what a shard directory holds and how its tiles were made."""
    import pandas as pd
    import yaml

    from mammostream.shards.reading import open_shards

    opened = open_shards(directory)
    table = pd.DataFrame(opened.meta["shards"])
    table["MB"] = (table["tar_bytes"].fillna(0) / 1e6).round(1)
    click.echo(table[["name", "images", "tiles", "quarantined", "MB"]].to_string(index=False) + "\n")
    _print_images(opened.images())
    stored = {"codec": opened.codec, "bits": opened.meta["bits"]} | opened.preprocessing
    click.echo(yaml.safe_dump(stored, sort_keys=False).rstrip())


@shards.command()
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
    "default: the one beside --findings.",
)
@click.option(
    "--image-labels",
    cls=ListOption,
    callback=split_commas,
    help="Labels of films to copy to each of their tiles (normal benign malignant …), or 'all' of the manifest's.",
)
@click.option("--output", type=FILE, required=True, help="The CSV: tile_path (the tile's key) and a column a class.")
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
