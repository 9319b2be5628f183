"""``mammostream aggregate train`` and ``mammostream aggregate predict``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mammostream.common.errors import BadInput
from mammostream.common.files import make_folder, write_json, write_text
from mammostream.common.options import Group, ListOption, config_file_option, config_options, resolved, split_commas
from mammostream.train.aggregate.config import AggregateConfig

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from mammostream.train.aggregate.bags import Bags
    from mammostream.train.aggregate.training import Training

FILE = click.Path(path_type=Path)
FINAL = "final_aggregator.pth"
_POOLINGS = ("gated", "mean", "max", "top")
_features = click.option("--features", "features_path", type=FILE, required=True, help="Table of features that 'embed' wrote.")
_manifest = click.option(
    "--manifest", type=FILE, required=True, help="manifest.parquet: patients, sides, splits and label:<class> of the films."
)


@click.group(cls=Group)
def aggregate() -> None:
    """Learn from labels of films, breasts or patients which tiles matter (multiple-instance learning)."""


@aggregate.command()
@_features
@_manifest
@click.option(
    "--class-names",
    cls=ListOption,
    callback=split_commas,
    required=True,
    help="Labels of the manifest to learn, separated by spaces or commas.",
)
@click.option("--output-dir", type=FILE, required=True, help="The run's folder: checkpoints, metrics, predictions.")
@click.option("--resume", help="auto = resume from the run's last checkpoint if there is one; or a checkpoint's path.")
@config_options(AggregateConfig)
@config_file_option
@click.pass_context
def train(
    ctx: click.Context,
    /,
    features_path: Path,
    manifest: Path,
    class_names: tuple[str, ...],
    output_dir: Path,
    resume: str | None,
    **options: Any,
) -> None:
    """Train heads that aggregate the features of tiles: gated attention, and mean, max and top pooling beside it.

    A bag is an image, a breast or a patient (--level); a breast or patient is positive where one of its films is. All heads
    learn from the same batches of the split train, each is kept as it was in the epoch with its highest AUC on the split val,
    and calibrated there. Writes final_aggregator.pth, predictions_<pooling>.parquet of the splits val and test for 'evaluate',
    problems.csv of films that are in no bag, metrics.json, and a table of AUCs with intervals over patients.

    SIGTERM, SIGUSR1 and Ctrl-C end with exit code 75 (Ctrl-C: 130); --resume auto begins the stopped epoch again and ends as
    if nothing had happened.
    """
    config = AggregateConfig(**options)
    from mammostream.shards.manifest import read_manifest
    from mammostream.train.aggregate.bags import check_labels, describe_seen, joined_subjects, make_bags
    from mammostream.train.aggregate.features import open_features
    from mammostream.train.aggregate.training import LAST, fit, start_training
    from mammostream.train.run.resuming import find_resume
    from mammostream.train.run.runtime import resolve_runtime

    checkpoint = find_resume(resume, output_dir / LAST)
    films = read_manifest(manifest)
    features = open_features(features_path)
    sides, problems = {}, []
    for split in ("train", "val", "test"):
        sides[split], lost = make_bags(features, films, config.level, class_names, split, config.position)
        problems.append(lost)
    make_folder(output_dir)
    _write_problems(problems, output_dir / "problems.csv")
    for line in check_labels(sides["train"], sides["val"], class_names):
        click.echo(line, err=True)
    runtime = resolve_runtime(config)
    run = start_training(sides["train"], sides["val"], list(class_names), config, runtime)
    own = {"trained": run.train.subjects, "validated": run.val.subjects}
    facts = {
        "features": {name: features.facts[name] for name in ("model_sha256", "inputs_sha256")},
        "fitted_on": joined_subjects(own, features.fitted_on),
    }
    for split in ("val", "test"):
        if line := describe_seen(sides[split], features.fitted_on, split):
            click.echo(line, err=True)
    fit(run, output_dir, resolved(ctx), checkpoint, facts)
    _finish(run, facts, {name: bags for name, bags in sides.items() if name != "train" and len(bags)}, output_dir)


def _write_problems(problems: list[pd.DataFrame], path: Path) -> None:
    import pandas as pd

    rows = pd.concat(problems, ignore_index=True)
    if len(rows):
        click.echo(f"{len(rows)} films are in no bag -> {path}", err=True)
    write_text(path, rows.to_csv(index=False))


def _finish(run: Training, facts: dict[str, Any], judged: dict[str, Bags], output_dir: Path) -> None:
    """Calibrate the best heads, write the final checkpoint, the predictions and the figures, and print the AUCs."""
    from mammostream.models.checkpoints import save_checkpoint
    from mammostream.train.aggregate.outcome import Aggregator, auc_table, judge_heads, write_predictions
    from mammostream.train.aggregate.training import bag_logits, checkpoint_of, named_heads
    from mammostream.train.levels.calibration import fit_calibration

    calibrations = {}
    for name, head in named_heads(run.heads).items():
        head.load_state_dict(run.best[name]["state"])
        logits, _ = bag_logits(head, run.val, run.config.batch_size, run.runtime.device)
        calibrations[name] = fit_calibration(run.val.labels, logits).as_dict()
    epochs = {name: best["epoch"] for name, best in run.best.items()}
    checkpoint = checkpoint_of(run, facts, best_epochs=epochs, calibration=calibrations)
    save_checkpoint(output_dir / FINAL, checkpoint)
    aggregator = Aggregator(output_dir / FINAL, run.runtime.device)
    metrics: dict[str, Any] = {"epoch": run.epoch, "best_epochs": epochs}
    for split, bags in judged.items():
        probabilities: dict[str, np.ndarray] = {}
        for name in aggregator.poolings:
            probabilities[name], _ = aggregator.predict(bags, name)
            path = output_dir / (f"predictions_{name}.parquet" if split == "val" else f"{split}_predictions_{name}.parquet")
            write_predictions(path, bags, probabilities[name], aggregator, name)
        metrics[split] = judge_heads(bags, probabilities, run.class_names)
        chosen = "; heads were chosen and calibrated on these bags, which flatters them" if split == "val" else ""
        click.echo(f"AUC on {len(bags)} bags of split '{split}' (95 % interval over patients{chosen}):")
        click.echo("\n".join(f"  {line}" for line in auc_table(metrics[split], run.class_names)))
    write_json(output_dir / "metrics.json", metrics)
    click.echo(f"epoch {run.epoch} of {run.config.epochs}; {FINAL} -> {output_dir}")


@aggregate.command()
@click.option("--aggregator", "path", type=FILE, required=True, help="final_aggregator.pth that 'aggregate train' wrote.")
@_features
@_manifest
@click.option("--split", type=click.Choice(["train", "val", "test"]), default="test", help="The films to predict.")
@click.option("--pooling", type=click.Choice(_POOLINGS), default="gated", help="The head.")
@click.option("--output", type=FILE, required=True, help="Parquet file: one row per bag, which 'evaluate' reads.")
@click.option("--attention", "attention_path", type=FILE, help="Also write the weight of each tile in its bag; Parquet.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="auto = the GPU where there is one.")
def predict(
    path: Path,
    features_path: Path,
    manifest: Path,
    split: str,
    pooling: str,
    output: Path,
    attention_path: Path | None,
    device: str,
) -> None:
    """Predict bags with trained heads, from features of the same backbone."""
    for flag, place in (("--output", output), ("--attention", attention_path)):
        if place is not None and place.suffix != ".parquet":
            raise BadInput(f"{flag} {place} is not a Parquet file; give a name that ends in .parquet")
    if attention_path is not None and pooling != "gated":
        raise BadInput(f"--attention needs --pooling gated: '{pooling}' has no weights")
    from mammostream.shards.manifest import read_manifest
    from mammostream.train.aggregate.bags import make_bags
    from mammostream.train.aggregate.features import open_features
    from mammostream.train.aggregate.outcome import Aggregator, write_attention, write_predictions
    from mammostream.train.aggregate.training import check_features
    from mammostream.train.run.config import RuntimeConfig
    from mammostream.train.run.runtime import resolve_runtime

    aggregator = Aggregator(path, resolve_runtime(RuntimeConfig(device=device)).device)
    features = open_features(features_path)
    check_features(aggregator.checkpoint, features.facts, path, same_shards=False)
    chosen = aggregator.config
    bags, problems = make_bags(features, read_manifest(manifest, split), chosen.level, (), split, chosen.position)
    for row in problems.to_dict("records"):
        click.echo(f"left out: {row['image_id']}: {row['reason']}", err=True)
    if not len(bags):
        raise BadInput(f"no film of split '{split}' of {manifest} has tiles in {features_path}")
    probabilities, weights = aggregator.predict(bags, pooling)
    write_predictions(output, bags, probabilities, aggregator, pooling)
    if attention_path is not None and weights is not None:
        write_attention(attention_path, bags, weights, aggregator.class_names)
    click.echo(f"{len(bags)} bags of {int(bags.sizes.sum())} tiles -> {output}")
