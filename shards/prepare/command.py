"""The command ``prepare``: from annotation files and images to a manifest."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mammostream.common.files import write_text, write_yaml
from mammostream.common.options import Command, ListOption, config_file_option, config_options, resolved, split_commas
from mammostream.preprocess.mammogram import ReadingConfig

if TYPE_CHECKING:
    import pandas as pd

    from mammostream.shards.annotations.annotations import Problem
    from mammostream.shards.prepare.films import Prepared

FILE = click.Path(path_type=Path)
# Lines that the terminal shows of each kind of problem; problems.csv has all.
_SHOWN = 10


@click.command(cls=Command)
@click.option(
    "--dataset",
    type=click.Choice(["auto", "vindr", "cbis-ddsm", "rsna", "mias", "inbreast", "embed", "cmmd", "kau-bcmd", "folder"]),
    default="auto",
    help="Layout of the annotations; auto detects it from the tables' columns.",
)
@click.option(
    "--csv-path",
    "csv_paths",
    cls=ListOption,
    type=FILE,
    help="Tables, CSV or .xlsx; several may follow. vindr: breast-level_annotations.csv. cbis-ddsm: all four CSVs, JPEG copy: "
    "dicom_info.csv too. rsna: train.csv, test.csv. mias: Info.txt. inbreast: INbreast.csv. embed: metadata and clinical CSV. "
    "cmmd: CMMD_clinicaldata_revision.xlsx. kau-bcmd: correctSheetlast.xlsx. folder: image_id, any of patient_id, study_id, "
    "laterality, view, split, pixel_spacing_mm, and labels.",
)
@click.option(
    "--columns",
    cls=ListOption,
    help="folder: columns by other names: image_id=file,label:cancer=type==MALIGNANT; see docs/own_data.md.",
)
@click.option(
    "--labels",
    cls=ListOption,
    help="folder: the columns of 0/1, true/false or yes/no that are labels.",
)
@click.option(
    "--findings-csv",
    type=FILE,
    help="Boxes. vindr: finding_annotations.csv. folder: image_id, label, xmin, ymin, xmax, ymax (pixels).",
)
@click.option(
    "--images-root",
    type=FILE,
    required=True,
    help="Films, searched recursively: DICOM (with or without an ending), PNG, TIFF, PGM, JPEG, JPEG 2000, BMP, WebP.",
)
@click.option("--follow-links", is_flag=True, help="Follow symbolic links to other places.")
@click.option("--output-dir", type=FILE, required=True, help="For manifest.parquet, findings.parquet and problems.csv.")
@click.option("--assume-spacing", type=click.FloatRange(0.01, 2), metavar="MM", help="Pixel size where it is unknown.")
@click.option(
    "--patient-regex",
    metavar="REGEX",
    help="folder: the part of PatientID or path that names the patient: 'P_\\d+'.",
)
@click.option(
    "--patient-from",
    type=click.Choice(["folder"]),
    help="folder: the first folder below --images-root names the patient.",
)
@click.option(
    "--exclude",
    cls=ListOption,
    callback=split_commas,
    help="Leave out: implant, partial, a modifier (magnification, spot, implant_displaced, …) or a view (XCCL, SPECIMEN, …).",
)
@click.option(
    "--val-fraction",
    type=click.FloatRange(0, 1),
    default=0.1,
    metavar="SHARE",
    help="Share of training patients for validation, if there is no such split.",
)
@click.option(
    "--test-fraction",
    type=click.FloatRange(0, 1),
    default=0.0,
    metavar="SHARE",
    help="Share of training patients held out, if there is no test split.",
)
@click.option("--seed", default=0, help="Seed of these choices.")
@click.option(
    "--copy/--no-copy",
    default=False,
    help="Also copy the films' stored values to <split>/<study>_<image>.png.",
)
@click.option(
    "--pseudonymise",
    "key_file",
    type=FILE,
    metavar="KEYFILE",
    help="Replace ids by keyed hashes; a missing KEYFILE is made. See docs/privacy.md.",
)
@config_options(ReadingConfig)
@click.option(
    "--allow-leakage",
    is_flag=True,
    help="Go on where two patients share a DICOM instance.",
)
@click.option("--workers", type=click.IntRange(min=1), help="Processes that read and copy.  [default: one per CPU]")
@config_file_option
@click.pass_context
def prepare(
    ctx: click.Context,
    /,
    dataset: str,
    csv_paths: tuple[Path, ...],
    columns: tuple[str, ...],
    labels: tuple[str, ...],
    findings_csv: Path | None,
    images_root: Path,
    follow_links: bool,
    output_dir: Path,
    assume_spacing: float | None,
    patient_regex: str | None,
    patient_from: str | None,
    exclude: tuple[str, ...],
    val_fraction: float,
    test_fraction: float,
    seed: int,
    copy: bool,
    key_file: Path | None,
    allow_leakage: bool,
    workers: int | None,
    **options: Any,
) -> None:
    """Describe a data set of mammograms in one table, split by patient.

    Writes manifest.parquet (patient, side, view, split, pixel spacing and labels of each film; no patient is in two splits),
    findings.parquet (boxes) and problems.csv (what was left out, or cannot be read). Other modalities, reports, presentation
    states and what a build refuses are left out and counted. Only headers are read. See docs/data_sets.md.
    """
    from mammostream.common.errors import BadInput
    from mammostream.common.parallel import available_cpus
    from mammostream.shards.annotations.columns import parse_columns
    from mammostream.shards.manifest import write_findings, write_manifest
    from mammostream.shards.prepare.films import prepare_films
    from mammostream.shards.prepare.layout import copy_films

    if copy and output_dir.resolve() == images_root.resolve():
        raise BadInput("--copy would lay images out among those of --images-root; choose another --output-dir")
    mapped = parse_columns(columns, labels) if columns or labels else None
    dataset = _detected(csv_paths, mapped is not None) if dataset == "auto" else dataset
    workers = workers or available_cpus()
    reading = ReadingConfig(**options)
    key = _read_key(key_file, output_dir)
    made = prepare_films(
        dataset,
        images_root,
        csv_paths,
        findings_csv,
        columns=mapped,
        assume_spacing=assume_spacing,
        patient_regex=patient_regex,
        patient_from=patient_from,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        seed=seed,
        workers=workers,
        skip=output_dir,
        follow_links=follow_links,
        reading=reading,
        allow_leakage=allow_leakage,
        exclude=exclude,
    )
    made, apart = _pseudonymised(made, key, key_file, output_dir, dataset, copy)
    films, problems, notes = made.manifest, made.problems, made.notes
    if copy:
        films, not_copied, others = copy_films(films, output_dir, workers, reading)
        problems, notes = [*problems, *not_copied], [*notes, *others]
    findings_path, path = output_dir / "findings.parquet", output_dir / "manifest.parquet"
    if made.findings is not None:
        write_findings(made.findings, findings_path)
    elif findings_path.exists():
        notes.append(f"{findings_path} is of an earlier run: this data set gave no boxes")
    _write_problems(problems, Path(f"{apart}problems.csv"))
    write_manifest(films, path)
    write_yaml(output_dir / "config.yaml", resolved(ctx))

    _report(films, made.findings, problems, notes, output_dir, apart)


def _detected(csv_paths: tuple[Path, ...], has_columns: bool) -> str:
    """Return the data set that ``auto`` means, and say why."""
    from mammostream.shards.annotations.datasets import tell_dataset

    dataset, reason = ("folder", "--columns or --labels is given") if has_columns else tell_dataset(csv_paths)
    click.echo(f"data set: {dataset} ({reason})")
    return dataset


def _read_key(path: Path | None, output_dir: Path) -> bytes:
    """Return the key of ``--pseudonymise``, and say what must be said of its file; without one, nothing."""
    from mammostream.shards.prepare.pseudonyms import KEY_BYTES, read_key

    if path is None:
        return b""
    key, made = read_key(path)
    if made:
        click.echo(f"made the key {path}, {KEY_BYTES} random bytes: without it the same ids get other pseudonyms", err=True)
    if output_dir.resolve() in path.resolve().parents:
        click.echo(f"warning: the key {path} and the map lie in --output-dir: do not hand them on with it", err=True)
    return key


def _pseudonymised(
    made: Prepared, key: bytes, key_file: Path | None, output_dir: Path, dataset: str, copy: bool
) -> tuple[Prepared, str]:
    """Return the data set with pseudonyms where there is a key, and how the paths begin of what still tells the ids."""
    from mammostream.shards.prepare.pseudonyms import pseudonymised, write_map

    if key_file is None:
        return made, f"{output_dir}/"
    films, findings, replaced = pseudonymised(made.manifest, made.findings, key, every_image=dataset == "folder")
    path = Path(f"{key_file}.ids.csv")
    write_map(path, replaced)
    counts = ", ".join(f"{kind} {count}" for kind, count in replaced["kind"].value_counts(sort=False).items())
    paths = "" if copy else "; the manifest still names the files by their paths: --copy leaves those behind"
    note = f"ids are replaced by pseudonyms ({counts}); the map is {path}{paths}"
    return replace(made, manifest=films, findings=findings, notes=[*made.notes, note]), f"{key_file}."


def _report(
    films: pd.DataFrame,
    findings: pd.DataFrame | None,
    problems: list[Problem],
    notes: list[str],
    output_dir: Path,
    apart: str,
) -> None:
    """Print what was left out, what the user should know, and the counts."""
    _print_problems(problems, Path(f"{apart}problems.csv"))
    for note in notes:
        click.echo(note if note.startswith("warning: ") else f"note: {note}", err=True)
    _print_summary(films, findings)
    unknown = films["pixel_spacing_mm"].isna().sum()
    if unknown:
        click.echo(f"{unknown} images have no pixel spacing; give --assume-spacing MM if you know it", err=True)
    counts = Counter(problem.kind for problem in problems)
    left_out = "".join(f", {count} {kind}" for kind, count in counts.items())
    click.echo(
        f"{len(films)} images of {films['patient_id'].nunique()} patients{left_out} -> {output_dir / 'manifest.parquet'}"
    )


def _write_problems(problems: list[Problem], path: Path) -> None:
    import pandas as pd

    write_text(path, pd.DataFrame([vars(p) for p in problems], columns=["kind", "message"]).to_csv(index=False))


def _print_problems(problems: list[Problem], path: Path) -> None:
    """Print the first problems of each kind."""
    shown: Counter[str] = Counter()
    for problem in problems:
        shown[problem.kind] += 1
        if shown[problem.kind] <= _SHOWN:
            click.echo(f"{problem.kind}: {problem.message}", err=True)
    for kind, count in shown.items():
        if count > _SHOWN:
            click.echo(f"{kind}: and {count - _SHOWN} more, see {path}", err=True)


def _print_summary(films: pd.DataFrame, findings: pd.DataFrame | None) -> None:
    """Print counts by split: films by view, side and spacing, labels as 'positive of known', boxes by label."""
    import pandas as pd

    from mammostream.shards.manifest import LABEL_PREFIX, SPLITS

    splits = [split for split in SPLITS if split in set(films["split"])]

    def show(table: pd.DataFrame, what: str) -> None:
        table = table.reindex(columns=splits, fill_value=0).rename_axis(index=None, columns=what)
        click.echo(table.rename(index={"": "(unknown)"}).to_string() + "\n")

    show(films.groupby("split").size().to_frame("images").T, "")
    for column, what in (("view", "view"), ("laterality", "side"), ("spacing_source", "spacing from")):
        show(pd.crosstab(films[column], films["split"]), what)
    labels = {c: c.removeprefix(LABEL_PREFIX) for c in films.columns if c.startswith(LABEL_PREFIX)}
    if labels:
        by_split = films.groupby("split")[list(labels)]
        positive, known = by_split.sum().astype(int).T, by_split.count().T
        show((positive.astype(str) + " of " + known.astype(str)).rename(index=labels), "label")
    if findings is not None and len(findings):
        show(pd.crosstab(findings["label"], findings["image_id"].map(films.set_index("image_id")["split"])), "boxes")
