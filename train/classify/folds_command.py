"""``mammostream finetune --folds``: the part of the command that reads all labels at once and runs the folds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mammostream.common.errors import BadInput
from mammostream.common.files import write_yaml
from mammostream.common.options import resolved
from mammostream.train.classify.config import FinetuneConfig

if TYPE_CHECKING:
    from mammostream.train.classify.cross_validation import Pool


def check_folds(folds: int | None, fold: int | None, seeds: Sequence[str], resume: str | None) -> None:
    """Check the options of a cross-validation among each other.

    Raises
    ------
    BadInput
        They do not fit.
    """
    if folds is None:
        raise BadInput(f"--fold {fold} is one of --folds; give that, too")
    if seeds:
        raise BadInput("--folds and --seeds both train several times; give one")
    if resume not in (None, "auto"):
        raise BadInput("--resume PATH resumes one run; with --folds use --resume auto")
    if fold is not None and not 0 <= fold < folds:
        raise BadInput(f"--fold {fold} is none of the {folds} folds; give 0 to {folds - 1}")


def run_folds(
    ctx: click.Context, csvs: Sequence[Path], config: FinetuneConfig, class_names: Sequence[str], output_dir: Path
) -> None:
    """Run a cross-validation with the command's options, and print its figures once all folds are there.

    Parameters
    ----------
    ctx
        The command's.
    csvs
        The labels, of all patients together.
    config, class_names, output_dir
        As the command has them.
    """
    options = ctx.params
    pool = _read_pool(csvs, class_names, config, options["folds"], options)
    from mammostream.train.classify.cross_validation import cross_validate, refuse_shared, shared_by_folds
    from mammostream.train.classify.out_of_fold import summary_lines
    from mammostream.train.run.runtime import join_processes

    with join_processes(config) as runtime:
        shared = shared_by_folds(pool.tiles, pool.plan)
        if not options["allow_leakage"]:
            refuse_shared(shared)
        if runtime.is_main and (pool.tiles.patients == "").any():
            click.echo(
                "the patients of some tiles are unknown: each of their films counts as a patient of its own; give "
                "--patient-regex or a column patient_id",
                err=True,
            )
        command = resolved(ctx)
        summary, left = cross_validate(
            options["byol_checkpoint"],
            replace(pool, leakage=shared),
            output_dir,
            config,
            command,
            only=options["fold"],
            resume=options["resume"],
            runtime=runtime,
        )
        if not runtime.is_main:
            return
        write_yaml(output_dir / "config.yaml", command | {"fold": None})
        for line in summary_lines(summary["levels"], pool.plan.count) if summary else ():
            click.echo(line)
        if left:
            names = ", ".join(map(str, left))
            click.echo(f"folds left: {names}; run each with --fold, or all of them without it, with --resume auto")
        else:
            click.echo(f"out-of-fold predictions and folds.json -> {output_dir}")


def _read_pool(csvs: Sequence[Path], class_names: Sequence[str], config: FinetuneConfig, folds: int, options: dict) -> Pool:
    """Read the labels of all CSVs, join them to their tiles, and deal the patients to folds."""
    import pandas as pd

    from mammostream.shards.reading import open_shards
    from mammostream.train.classify.cross_validation import Pool
    from mammostream.train.run.folds import plan_folds
    from mammostream.train.run.labels import join_folder, join_shards, read_labels

    frames = [read_labels(path, class_names, config.max_samples, keep_unlabelled=True) for path in csvs]
    frame = pd.concat(frames, ignore_index=True)
    twice = frame["tile_path"].duplicated()
    if twice.any():
        raise BadInput(f"tile '{frame['tile_path'][twice].iloc[0]}' is in both --train-csv and --val-csv; keep it in one")
    what = " and ".join(map(str, csvs))
    if options["shards_dir"] is not None:
        shards = open_shards(options["shards_dir"])
        tiles = join_shards(frame, shards, what).of_labelled_units()
        places = shards.tiles().set_index("key")[["split", "x", "y", "size"]]
        record = shards.preprocessing if shards.preprocessing["mapping"] else None
    else:
        tiles = join_folder(frame, options["tiles_dir"], what, options["patient_regex"]).of_labelled_units()
        places, record = None, None
    plan = plan_folds(tiles.people, tiles.labels, class_names, folds, config.seed)
    return Pool(tiles, class_names, record, plan, places)
