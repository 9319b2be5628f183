"""``mammostream preview``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from mammostream.common.errors import BadInput
from mammostream.common.files import write_yaml
from mammostream.common.options import Command, config_file_option, config_options, resolved
from mammostream.preprocess.tiling import TilingConfig
from mammostream.shards.options import FILE, output_option


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
    /,
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
    """Draw what 'shards build' would keep of each film: mask, muscle, tiles by rule, rejected tiles, response to specks.

    Takes the options of 'shards build', so that thresholds can be tried out before hours are spent: contact sheets show a
    manifest's films side by side, those first whose side disagrees with the picture; energies.png the energies of all tiles
    with the threshold. A film that cannot be read is reported and the rest continues. A picture is drawn again only where its
    film or an option has changed.
    """
    from mammostream.common.progress import progress
    from mammostream.preprocess.overview import (
        SIDE_DISAGREES,
        PictureJob,
        draw_pictures,
        summary_lines,
        write_contact_sheets,
        write_energies,
    )
    from mammostream.shards.archive import escape_id, short_name
    from mammostream.shards.manifest import read_findings

    config = TilingConfig(**options)
    if manifest and not image_path:
        rows = _films_of(manifest, sample, seed)
    elif image_path and not manifest:
        rows = _one_film(image_path, assume_spacing)
    else:
        raise BadInput("give either --manifest or --image-path")
    boxes = read_findings(findings).dropna() if findings else None
    found = {} if boxes is None else dict(tuple(boxes.groupby("image_id")[["xmin", "ymin", "xmax", "ymax"]]))
    jobs = [
        PictureJob(
            image_id=row["image_id"],
            image=Path(row["path"]),
            picture=output_dir / f"{short_name(escape_id(row['image_id']))}.png",
            # Unknown here: the file may know.
            spacing_mm=None if math.isnan(row["pixel_spacing_mm"]) else row["pixel_spacing_mm"],
            spacing_source=row["spacing_source"],
            laterality=row["laterality"],
            view=row["view"],
            boxes=tuple(map(tuple, found[row["image_id"]].to_numpy().tolist())) if row["image_id"] in found else (),
        )
        for row in rows
    ]
    found_films = progress(draw_pictures(jobs, config, workers, overwrite), "drawing", "film", total=len(jobs))
    # A mirrored or mislabelled film is what people look for, and then a wrong mask.
    pictures = sorted(found_films, key=lambda picture: (SIDE_DISAGREES not in picture.flags, picture.plausibility))
    bad = [picture for picture in pictures if picture.reason]
    for picture in pictures:
        if SIDE_DISAGREES in picture.flags:
            click.echo(f"side disagrees: {picture.image_id}: the breast is not at the side that its table or file says")
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


def _films_of(manifest: Path, sample: int | None, seed: int) -> list[dict[Any, Any]]:
    """Return the rows of a manifest, or of a random sample of its films."""
    from mammostream.shards.manifest import read_manifest

    frame = read_manifest(manifest)
    frame = frame.sample(sample, random_state=seed).sort_index() if sample and sample < len(frame) else frame
    return frame.to_dict("records")


def _one_film(path: Path, assume_spacing: float | None) -> list[dict[Any, Any]]:
    """Return the row of a film without a manifest."""
    from mammostream.preprocess.reading import read_header

    header = read_header(path)
    spacing = math.nan if header.spacing_mm or assume_spacing is None else assume_spacing
    row = {"image_id": path.stem, "path": path, "laterality": header.laterality, "view": header.view}
    return [row | {"pixel_spacing_mm": spacing, "spacing_source": "assumed"}]
