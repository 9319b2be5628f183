"""``mammostream shards build|finish|verify|info|pack|unpack``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mammostream.common.buckets import as_bucket, refuse_bucket
from mammostream.common.errors import BadInput, TooManyBad
from mammostream.common.files import write_yaml
from mammostream.common.options import Command, ListOption, bad_limit, config_file_option, config_options, resolved
from mammostream.shards.build.duplicates import FLAG
from mammostream.shards.build.launch import LaunchConfig
from mammostream.shards.build.plan import BuildConfig, PackConfig
from mammostream.shards.options import FILE, manifest_option, output_option, shards_argument, workers_option

if TYPE_CHECKING:
    import pandas as pd


check_every_option = click.option(
    "--check-every",
    type=click.IntRange(min=1),
    default=1,
    help="Decode every this many tiles with an independent decoder, and compare, before their shard is kept.",
)

max_bad_option = click.option(
    "--max-bad",
    default="5%",
    help="Maximum number of films that may fail, a number or a percentage; more end with exit code 3.",
)


allow_leakage_option = click.option(
    "--allow-leakage",
    is_flag=True,
    help="Finish although two patients share a film (the same pixels): one person under two ids may be in two splits.",
)


def _parse_range(value: str | None) -> range | None:
    if value is None:
        return None
    first, colon, last = value.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise BadInput(f"--shard-range {value!r} is not A:B with 0 <= A < B; 0:8 means the first eight shards")
    return range(int(first), int(last))


@click.command(cls=Command)
@manifest_option
@output_option("The shard directory; a stopped build resumes there.")
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
@allow_leakage_option
@config_file_option
@click.pass_context
def build(
    ctx: click.Context,
    /,
    manifest: Path,
    output_dir: Path,
    split: str | None,
    shard_range: str | None,
    workers: int | None,
    threads: int | None,
    dask: str | None,
    check_every: int,
    max_bad: str,
    allow_leakage: bool,
    **options: Any,
) -> None:
    """Cut films into tiles and write WebDataset shards with a DALI index.

    Finished shards are skipped, so the same command resumes after an interruption; other options refuse to mix with them.
    A film that cannot be read becomes a row of images.parquet with its reason, and the rest continues; one that has the pixels
    of another is flagged 'duplicate' and gives no tiles. The same films, options and library versions give the same bytes,
    however many processes or machines build.
    """
    from mammostream.shards.build.build import build_all
    from mammostream.shards.build.launch import Launcher
    from mammostream.shards.build.merge import finish, read_images
    from mammostream.shards.build.plan import make_plan
    from mammostream.shards.manifest import read_manifest
    from mammostream.shards.reading import open_shards

    config, launch = BuildConfig(**options), LaunchConfig(workers, threads, dask)
    ordinals = _parse_range(shard_range)
    bad_limit(max_bad, 1)
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
        finish(output_dir, split, allow_leakage)
        images = open_shards(output_dir).images()
        images = images[images["split"] == split] if split else images
    else:
        images = read_images(output_dir, [shard.name for shard in plan.shards])
        built = f"{len(plan.shards)} of {count} shards"
        click.echo(f"built {built}; when all are, run 'mammostream shards finish {output_dir}'\n")
    _report_images(images, output_dir, max_bad)


@click.command(cls=Command)
@shards_argument
@click.option("--split", type=click.Choice(["train", "val", "test"]), help="Demand this split's shards only.")
@max_bad_option
@allow_leakage_option
def finish(directory: Path, split: str | None, max_bad: str, allow_leakage: bool) -> None:
    """Merge the tables of shards that several jobs built (--shard-range) into tiles.parquet, images.parquet, shards.json.

    Refuses, naming them, while shards are missing, and films that two patients share. Doing it twice changes nothing.
    """
    from mammostream.shards.build.merge import finish as merge
    from mammostream.shards.reading import open_shards

    bad_limit(max_bad, 1)
    refuse_bucket(directory, "SHARDS")
    merge(directory, split, allow_leakage)
    images = open_shards(directory).images()
    _report_images(images[images["split"] == split] if split else images, directory, max_bad)


def _report_images(images: pd.DataFrame, directory: Path, max_bad: str) -> None:
    """Print what became of some films; too many bad ones are an error."""
    _print_images(images)
    bad = int((images["reason"] != "").sum())
    click.echo(f"{len(images)} films ({bad} gave no tiles), {images['kept'].sum()} tiles -> {directory}")
    if bad > bad_limit(max_bad, len(images)):
        raise TooManyBad(
            f"{bad} of {len(images)} films gave no tiles, more than --max-bad {max_bad}; the reasons are above and in "
            "images.parquet; to try films again, delete the .parquet of their shards and run the same command"
        )


def _print_images(images: pd.DataFrame) -> None:
    """Print what happened to the candidates, rule by rule, and each film that gave nothing."""
    columns = [c for c in images.columns if c.startswith(("candidates", "rejected", "kept", "clusters"))] + ["guide_8bit_kept"]
    totals = images.groupby("split", sort=False)[columns].sum().astype(int).T
    click.echo(totals.rename(index={"guide_8bit_kept": "(the plain 8-bit scale would have kept)"}).to_string() + "\n")
    _print_flags(images)
    _print_reasons(images)
    _print_duplicates(images)


def _print_flags(images: pd.DataFrame) -> None:
    """Print how many films have each flag, the most frequent first."""
    counts = Counter(flag for flags in images["flags"] for flag in flags.split())
    if "lossy" in images and (lossy := int(images["lossy"].eq(True).sum())):
        counts["(compressed with loss)"] = lossy
    for flag, count in counts.most_common():
        click.echo(f"{flag:<24} {count:>8} films")
    click.echo("" if counts else "no film is flagged\n")


def _print_duplicates(images: pd.DataFrame) -> None:
    for row in images[images["flags"].str.split().map(lambda flags: FLAG in flags)].itertuples():
        said = next(part for part in row.remarks.split("; ") if part.startswith(f"{FLAG}: "))
        click.echo(f"{FLAG}: {row.image_id} {said.removeprefix(f'{FLAG}: ')}", err=True)


def _print_reasons(images: pd.DataFrame) -> None:
    for row in images[images["reason"] != ""].itertuples():
        click.echo(f"no tiles: {row.image_id}: {row.reason}", err=True)


@click.command(cls=Command)
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
@output_option("The shard directory; a stopped run resumes there.")
@config_options(PackConfig)
@config_options(LaunchConfig)
@check_every_option
@max_bad_option
@config_file_option
@click.pass_context
def pack(
    ctx: click.Context,
    /,
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

    Labels are no part of shards: each CSV is written again next to them with the tiles' keys for tile_path, as 'finetune'
    takes it. A tile that cannot be read, or is of another size or depth than the first, is reported and left out.
    """
    from mammostream.shards.build.build import build_all
    from mammostream.shards.build.launch import Launcher
    from mammostream.shards.build.merge import finish
    from mammostream.shards.build.pack import make_pack_plan, pack_shard, read_tile_csvs, write_packed_csvs
    from mammostream.shards.reading import open_shards

    config, launch = PackConfig(**options), LaunchConfig(workers, threads, dask)
    tiles = read_tile_csvs(csvs, splits, tiles_dir)
    limit = bad_limit(max_bad, len(tiles))
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


@click.command(cls=Command)
@shards_argument
@click.option("--split", type=click.Choice(["train", "val", "test"]), help="Tiles of this split only.")
@output_option("Folder for the tiles as <key>.png, and for tiles.csv, which names them.")
@click.option(
    "--bits",
    type=click.Choice(["8", "16"]),
    help="Bits per pixel of the PNG files; default: as stored. Many programs cannot read 16: PIL's convert('RGB') turns such "
    "tiles white. 8 rounds 16-bit tiles to 256 grey levels.",
)
@workers_option
def unpack(directory: Path, split: str | None, output_dir: Path, bits: str | None, workers: int | None) -> None:
    """Write the tiles of shards as PNG files for tools that read no shards; 'pack' does the reverse.

    SHARDS may be s3://bucket/prefix. Nothing is lost unless --bits 8 is given for tiles of 16 bits.
    """
    from mammostream.shards.build.launch import Launcher
    from mammostream.shards.build.pack import TILES_CSV, unpack_shards
    from mammostream.shards.reading import open_shards

    shards, launcher = open_shards(directory), Launcher.of(LaunchConfig(workers))
    count = unpack_shards(shards, output_dir, split, launcher, int(bits) if bits else None)
    click.echo(f"{count} tiles -> {output_dir}, named in {output_dir / TILES_CSV}")


@click.command(cls=Command)
@shards_argument
@workers_option
@click.option("--decode/--no-decode", "decoding", default=True, help="Decode every tile; otherwise only bytes are compared.")
@click.option(
    "--quarantine", is_flag=True, help="Take damaged samples out of the indexes and tables, so that what is left can be used."
)
def verify(directory: Path, workers: int | None, decoding: bool, quarantine: bool) -> None:
    """Check every byte, every index entry, every tile's pixels and every table against each other.

    SHARDS may be s3://bucket/prefix, except with --quarantine. A stopped check resumes where it stopped.
    """
    from mammostream.shards.build.launch import Launcher
    from mammostream.shards.build.verify import quarantine as take_out
    from mammostream.shards.build.verify import verify_shards
    from mammostream.shards.reading import open_shards

    opened = open_shards(directory)
    if quarantine:
        opened.folder  # noqa: B018  # refuses a bucket, before hours of checking
    faults = verify_shards(opened, Launcher.of(LaunchConfig(workers)), decoding=decoding)
    for fault in faults:
        click.echo(f"fault: {fault}", err=True)
    if faults and not quarantine:
        raise BadInput(
            f"{len(faults)} faults in {opened.directory}; "
            + (
                "upload the shards named above again, or copy all to a disk and see 'mammostream shards verify --quarantine'"
                if as_bucket(directory)
                else "delete the .parquet of each shard named above and build again, or leave the damaged samples out with "
                "--quarantine"
            )
        )
    if faults:
        left_out = take_out(opened, faults)
        for fault in left_out:
            click.echo(f"left out: {fault}")
        click.echo(f"{len(left_out)} samples left out of the indexes and tables of {directory}; check it again")
        return
    click.echo(f"{len(opened.meta['shards'])} shards, {sum(s['tiles'] for s in opened.meta['shards'])} tiles: all well")


@click.command(cls=Command)
@shards_argument
def info(directory: Path) -> None:
    """Say what a shard directory, or s3://bucket/prefix, holds and how its tiles were made."""
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
