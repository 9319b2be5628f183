"""``mammostream finetune``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mammostream.common.errors import BadInput
from mammostream.common.files import write_json, write_yaml
from mammostream.common.options import Command, ListOption, config_file_option, config_options, resolved, split_commas
from mammostream.train.classify.config import FinetuneConfig
from mammostream.train.classify.folds_command import check_folds, run_folds

if TYPE_CHECKING:
    from mammostream.train.classify.run import LabelledData

FILE = click.Path(path_type=Path)


@click.command(cls=Command)
@click.option("--byol-checkpoint", type=FILE, required=True, help="mammogram_byol_*.pth that 'pretrain' wrote.")
@click.option("--train-csv", type=FILE, required=True, help="CSV of tile_path and one 0/1 column per class; empty = no label.")
@click.option(
    "--val-csv",
    type=FILE,
    help="The same for validation; it must share no patient, film or tile with --train-csv. With --folds it is optional: its "
    "tiles are added to those of --train-csv.",
)
@click.option("--tiles-dir", type=FILE, help="Folder that tile_path is relative to.")
@click.option("--shards", "shards_dir", type=FILE, help="Shard directory, instead of --tiles-dir; tile_path then holds keys.")
@click.option(
    "--class-names",
    cls=ListOption,
    callback=split_commas,
    required=True,
    help="Columns to learn, separated by spaces or commas.",
)
@click.option("--output-dir", type=FILE, required=True, help="The run's folder: checkpoints, metrics, curves.png.")
@click.option("--resume", help="auto = resume from the run's last checkpoint if there is one; or a checkpoint's path.")
@click.option(
    "--seeds",
    cls=ListOption,
    callback=split_commas,
    help="Train once with each of these seeds, in --output-dir/seed_<n>, and report mean and spread (instead of --seed).",
)
@click.option(
    "--folds",
    type=int,
    help="Cross-validate by patient, stratified by label: each of so many folds (3 or more) is tested by a model that the next "
    "fold validated and the others trained, in --output-dir/fold-<n>; the out-of-fold predictions are gathered. The folds "
    "follow from labels, patients and --seed.",
)
@click.option(
    "--fold",
    type=int,
    help="Run only this fold of --folds (from 0), for instance as a task of a SLURM array; the last to finish, or the command "
    "without --fold, gathers the predictions.",
)
@click.option("--patient-regex", help="With --tiles-dir: the part of tile_path that names the patient, e.g. 'patient\\d+'.")
@click.option(
    "--allow-leakage/--no-allow-leakage",
    default=False,
    help="Train even if patients, images or tiles are in both CSVs; every checkpoint then records it.",
)
@config_options(FinetuneConfig)
@config_file_option
@click.pass_context
def finetune(
    ctx: click.Context,
    /,
    byol_checkpoint: Path,
    train_csv: Path,
    val_csv: Path | None,
    tiles_dir: Path | None,
    shards_dir: Path | None,
    class_names: tuple[str, ...],
    output_dir: Path,
    resume: str | None,
    seeds: tuple[str, ...],
    folds: int | None,
    fold: int | None,
    patient_regex: str | None,
    allow_leakage: bool,
    **options: Any,
) -> None:
    """Fine-tune a pre-trained backbone for multi-label classification of tiles.

    The backbone is frozen for the first epochs, then trained with its own, smaller learning rate. Writes
    best_classification_model.pth (highest validation AUC), classification_epoch_10.pth and so on, _last after each epoch,
    final_classification_model.pth, and metrics.json with the LAST epoch's figures: the best epoch's are biased upwards by the
    selection. SIGTERM, SIGUSR1 and Ctrl-C save _last after the current step; the exit code is then 75 (Ctrl-C: 130), and
    --resume auto continues after that step. With --folds, --resume auto also skips the folds that are finished.
    Several processes: torchrun --standalone --nproc-per-node N -m mammostream finetune ...
    """
    if (tiles_dir is None) == (shards_dir is None):
        raise BadInput("give either --tiles-dir or --shards")
    config = FinetuneConfig(**options)
    configs = _by_seed(config, seeds)
    if resume not in (None, "auto") and seeds:
        raise BadInput("--resume PATH resumes one run; with --seeds use --resume auto")
    if folds is not None or fold is not None:
        csvs = (train_csv,) if val_csv is None else (train_csv, val_csv)
        check_folds(folds, fold, seeds, resume)
        run_folds(ctx, csvs, config, class_names, output_dir)
        return
    if val_csv is None:
        raise BadInput("give --val-csv, or --folds for a cross-validation over the patients of --train-csv")
    csvs = (train_csv, val_csv)
    data = _read_data(csvs, class_names, config.max_samples, tiles_dir, shards_dir, patient_regex)
    from mammostream.train.classify.finetune import finetune as run
    from mammostream.train.classify.run import CHECKPOINT_NAME
    from mammostream.train.classify.spread import summarise
    from mammostream.train.run.resuming import find_resume
    from mammostream.train.run.runtime import join_processes

    folders = {seed: output_dir / f"seed_{seed}" if seeds else output_dir for seed in configs}
    checkpoints = {seed: find_resume(resume, folder / CHECKPOINT_NAME.format("last")) for seed, folder in folders.items()}
    with join_processes(config) as runtime:
        data = _with_leakage(data, allow_leakage, quiet=not runtime.is_main)
        runs = {}
        for seed, seed_config in configs.items():
            command = resolved(ctx) | {"seed": seed, "seeds": []}
            runs[seed] = run(
                byol_checkpoint, data, folders[seed], seed_config, command, resume=checkpoints[seed], runtime=runtime
            )
        if not runtime.is_main:
            return
        if seeds:
            summary = summarise(runs)
            write_json(output_dir / "seeds.json", summary)
            write_yaml(output_dir / "config.yaml", resolved(ctx))
            _print_seeds(summary)
        else:
            for line in runs[config.seed]["weak_calibrations"]:
                click.echo(line, err=True)
            for name, figures in runs[config.seed]["per_class"].items():
                click.echo(f"{name}: {auc_line(figures, runs[config.seed])}")
        click.echo(f"epoch {max(run['epoch'] for run in runs.values())} of {config.epochs}; checkpoints -> {output_dir}")


def _read_data(
    csvs: tuple[Path, Path],
    class_names: Sequence[str],
    max_samples: int | None,
    tiles_dir: Path | None,
    shards_dir: Path | None,
    patient_regex: str | None,
) -> LabelledData:
    """Read the training and validation CSVs and join them to the tiles of a folder or of shards, whichever is given."""
    from mammostream.shards.reading import open_shards
    from mammostream.train.run.labels import join_folder, join_shards, read_labels

    shards = open_shards(shards_dir) if shards_dir else None
    sides = []
    for path, is_validation in zip(csvs, (False, True), strict=True):
        frame = read_labels(path, class_names, max_samples, keep_unlabelled=is_validation)
        if shards is not None:
            sides.append(join_shards(frame, shards, str(path)))
        elif tiles_dir is not None:
            sides.append(join_folder(frame, tiles_dir, str(path), patient_regex))
    # How tiles from image files (packed or not) were made is unknown: then the checkpoint's record is used.
    record = shards.preprocessing if shards and shards.preprocessing["mapping"] else None
    from mammostream.train.classify.run import LabelledData

    train, val = sides
    return LabelledData(train, val.of_labelled_units(), class_names, record)


def _with_leakage(data: LabelledData, allowed: bool, quiet: bool) -> LabelledData:
    """Return the data with what both CSVs share; BadInput if that is not allowed. Warns about unknown patients."""
    from mammostream.train.run.labels import describe_leakage, find_leakage

    leakage = find_leakage(data.train, data.val)
    if not quiet:
        for kind, names in leakage.items():
            click.echo(f"{kind} in both --train-csv and --val-csv:\n  " + "\n  ".join(names), err=True)
    if leakage and not allowed:
        raise BadInput(
            f"{describe_leakage(leakage)}; validation would score training data: keep each patient in one CSV, or "
            "pass --allow-leakage, which every checkpoint then records"
        )
    if not quiet and any((side.patients == "").any() for side in (data.train, data.val)):
        click.echo(
            "the patients of some tiles are unknown: make sure that no patient is in both CSVs, or give --patient-regex or a "
            "column patient_id",
            err=True,
        )
    return replace(data, leakage=leakage)


def _by_seed(config: FinetuneConfig, seeds: tuple[str, ...]) -> dict[int, FinetuneConfig]:
    """Return the options of each run by its seed: ``--seeds`` if given, else ``--seed`` alone."""
    if not all(seed.isdecimal() for seed in seeds) or len(set(map(int, seeds))) < len(seeds):
        raise BadInput(f"--seeds {' '.join(seeds)}: give different whole numbers from 0 on")
    return {seed: replace(config, seed=seed) for seed in (map(int, seeds) if seeds else [config.seed])}


def _print_seeds(summary: dict[str, Any]) -> None:
    """Print mean and standard deviation over seeds of the AUCs and average precisions."""

    from mammostream.train.classify.spread import spread_words as words

    seeds = f"{len(summary['seeds'])} seeds ({', '.join(map(str, summary['seeds']))}), mean ± standard deviation"
    for name, figures in [*summary["per_class"].items(), ("mean", {"auc": summary["mean_auc"], "ap": summary["mean_ap"]})]:
        click.echo(f"{name}: AUC {words(figures['auc'])}, AP {words(figures['ap'])} over {seeds}")


def auc_line(figures: dict[str, Any], metrics: dict[str, Any]) -> str:
    """Return a class's AUC with its interval in words."""
    if figures["auc"] is None:
        return f"AUC undefined ({figures['positives']} positive, {figures['negatives']} negative tiles)"
    interval = figures["intervals"]["auc"]
    over = metrics["intervals_over"]
    spread = f" (95 % interval over {metrics[over]} {over} {interval[0]:.3f}-{interval[1]:.3f})" if interval else ""
    tiles = figures["positives"] + figures["negatives"]
    return f"AUC {figures['auc']:.3f}{spread}, {figures['positives']} of {tiles} tiles positive"
