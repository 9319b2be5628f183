"""The command ``prepare``: from annotation files and images to a manifest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from common.files import write_yaml
from common.options import Command, ListOption, config_file_option, resolved

if TYPE_CHECKING:
    import pandas as pd

FILE = click.Path(path_type=Path)


@click.command(cls=Command)
@click.option("--dataset", type=click.Choice(["folder"]), default="folder", help="Layout of the annotations.")
@click.option(
    "--csv-path",
    "csv_paths",
    cls=ListOption,
    type=FILE,
    help="CSV with image_id and any of patient_id, study_id, "
    "laterality, view, split, pixel_spacing_mm; further 0/1 columns become labels. Several may follow.",
)
@click.option("--images-root", type=FILE, required=True, help="Folder of mammograms (DICOM, PNG, TIFF, PGM), searched deeply.")
@click.option("--output-dir", type=FILE, required=True, help="Folder for manifest.parquet.")
@click.option("--assume-spacing", type=click.FloatRange(0.01, 2), help="Pixel size in mm for images whose own is unknown.")
@click.option("--patient-regex", help="What part of the DICOM PatientID (or the path) names the patient, e.g. 'P_\\d+'.")
@click.option(
    "--val-fraction",
    type=click.FloatRange(0, 1),
    default=0.1,
    help="Share of patients for validation, where the CSV has no split.",
)
@click.option("--seed", default=0, help="Seed of the split.")
@config_file_option
@click.pass_context
def prepare(
    ctx: click.Context,
    dataset: str,
    csv_paths: tuple[Path, ...],
    images_root: Path,
    output_dir: Path,
    assume_spacing: float | None,
    patient_regex: str | None,
    val_fraction: float,
    seed: int,
) -> None:
    """Describe a folder of mammograms in one table, split by patient.

    Writes manifest.parquet: a row an image with its patient, side, view, split, pixel spacing and labels. No patient is ever
    in two splits. Images that cannot be read are listed; they stay in the table where their patient is known, and the build
    records why they gave nothing.
    """
    from shards.annotations.folder import folder_rows
    from shards.manifest import split_by_patient, write_manifest

    frame, unreadable = folder_rows(images_root, csv_paths, patient_regex)
    unknown = frame["pixel_spacing_mm"].isna()
    if assume_spacing is not None:
        frame.loc[unknown, ["pixel_spacing_mm", "spacing_source"]] = [assume_spacing, "assumed"]
    if (frame["split"] == "").all():
        frame["split"] = frame["patient_id"].map(split_by_patient(frame["patient_id"], val_fraction, seed))
    path = output_dir / "manifest.parquet"
    write_manifest(frame, path)
    write_yaml(output_dir / "config.yaml", resolved(ctx))

    for line in unreadable:
        click.echo(f"unreadable: {line}", err=True)
    _print_summary(frame)
    if unknown.any() and assume_spacing is None:
        click.echo(f"{int(unknown.sum())} images have no pixel spacing; give --assume-spacing MM if you know it", err=True)
    click.echo(f"{len(frame)} images of {frame['patient_id'].nunique()} patients -> {path}")


def _print_summary(frame: pd.DataFrame) -> None:
    from shards.manifest import LABEL_PREFIX

    for column in ("view", "laterality", "spacing_source"):
        click.echo(frame.groupby(["split", column]).size().unstack(fill_value=0).to_string() + "\n")
    labels = [c for c in frame.columns if c.startswith(LABEL_PREFIX)]
    if labels:
        click.echo(frame.groupby("split")[labels].sum().to_string() + "\n")
