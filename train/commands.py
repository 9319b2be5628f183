"""Commands from shards to answers: pretrain, probe, finetune, infer, report, evaluate."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from common.errors import BadInput
from common.files import write_json, write_text, write_yaml
from common.options import Command, ListOption, config_file_option, config_options, resolved, split_commas
from train.config import FinetuneConfig, InferConfig, PretrainConfig, ProbeConfig

if TYPE_CHECKING:
    import pandas as pd

    from train.infer import FilmInput, Predictor

FILE = click.Path(path_type=Path)


@click.command(cls=Command)
@click.option("--shards", "shards_dir", type=FILE, required=True, help="Shard directory; its split 'train' is used.")
@click.option("--output-dir", type=FILE, required=True, help="The run's folder: checkpoints, metrics.jsonl, pictures.")
@click.option("--resume", help="auto = go on from the run's last checkpoint if there is one; or a checkpoint's path.")
@config_options(PretrainConfig)
@config_file_option
@click.pass_context
def pretrain(ctx: click.Context, shards_dir: Path, output_dir: Path, resume: str | None, **options: Any) -> None:
    """Pre-train a backbone by BYOL: two views of each tile, no labels.

    Writes mammogram_byol_last.pth after each epoch, _best, _epoch_010 and so on, and _final; metrics.jsonl with loss, z_std,
    effective rank, view retrieval and more; views.png and curves.png. A warning with its evidence tells a collapse. The best
    epoch is that of the highest online probe where it runs, else of the lowest loss without a collapse alarm. SIGTERM, SIGUSR1
    and Ctrl-C save after the step under way; the exit code is then 75 (Ctrl-C: 130), and --resume auto goes on as if nothing
    had happened. Several processes: torchrun --nproc-per-node N -m mammostream pretrain ...
    """
    from shards.reading import open_shards

    config = PretrainConfig(**options)
    shards = open_shards(shards_dir)
    shards.shards("train")
    from train.pretrain import CHECKPOINT_NAME
    from train.pretrain import pretrain as run
    from train.resuming import find_resume
    from train.runtime import join_processes

    checkpoint = find_resume(resume, output_dir / CHECKPOINT_NAME.format("last"))
    with join_processes(config) as runtime:
        metrics = run(shards, output_dir, config, checkpoint, resolved(ctx), runtime)
        if runtime.is_main:
            click.echo(
                f"loss {metrics['loss']:.4f}, z_std {metrics['z_std']:.4f}, {metrics['pairs_per_second']:.1f} pairs/s, "
                f"data wait {metrics['data_wait_percent']:.1f} %"
            )
            click.echo(f"checkpoints -> {output_dir}")


@click.command(cls=Command)
@click.option(
    "--checkpoint",
    "checkpoints",
    cls=ListOption,
    required=True,
    help="Checkpoints that 'pretrain' or 'finetune' wrote, spaces between them.",
)
@click.option("--shards", "shards_dir", type=FILE, required=True, help="Shard directory with the labelled tiles.")
@click.option(
    "--labels", "labels_path", type=FILE, required=True, help="CSV of tile_path and one 0/1 column a class; empty = no label."
)
@click.option(
    "--class-names", cls=ListOption, callback=split_commas, help="Columns to probe; default: all that hold only 0, 1 and empty."
)
@click.option("--weights-file", type=FILE, help="File with ImageNet's weights, where there is no network.")
@click.option("--output-dir", type=FILE, required=True, help="Folder for probe.json, probe.csv, probe.png and the features.")
@config_options(ProbeConfig)
@config_file_option
@click.pass_context
def probe(
    ctx: click.Context,
    checkpoints: tuple[str, ...],
    shards_dir: Path,
    labels_path: Path,
    class_names: tuple[str, ...],
    weights_file: Path | None,
    output_dir: Path,
    **options: Any,
) -> None:
    """Compare frozen features on labels: checkpoints beside random weights and ImageNet's.

    Logistic regression and nearest neighbours learn from 1, 10 and 100 % of the labels, drawn by patient, and score tiles,
    images and breasts of other patients: those of the split val (else test) where both sides have labels, else by
    cross-validation. AUC with 95 % intervals over patients, mean over seeds. An image or breast is positive where one of its
    tiles is. Features are kept in --output-dir and used again.
    """
    config = ProbeConfig(**options)
    from shards.reading import open_shards
    from train.pictures import draw_probe
    from train.probing import checkpoint_network, compare, imagenet_network, markdown, random_network, read_probe_set
    from train.runtime import resolve_runtime

    shards = open_shards(shards_dir)
    probe_set = read_probe_set(labels_path, class_names, shards)
    runtime = resolve_runtime(config)
    paths = [Path(path) for path in checkpoints]
    found = [checkpoint_network(path, name, shards) for path, name in zip(paths, _short_names(paths), strict=True)]
    networks = [network for network, _ in found]
    for arch in dict.fromkeys(arch for _, arch in found):
        networks.append(random_network(arch))
        try:
            networks.append(imagenet_network(arch, weights_file or "imagenet"))
        except BadInput as error:
            if weights_file:
                raise
            click.echo(f"without ImageNet: {error}", err=True)
    result = compare(networks, probe_set, runtime, config, output_dir / "features")
    import pandas as pd

    write_json(output_dir / "probe.json", result)
    write_text(output_dir / "probe.csv", pd.DataFrame(result["rows"]).drop(columns="aucs").to_csv(index=False))
    write_yaml(output_dir / "config.yaml", resolved(ctx))
    draw_probe(result["rows"], output_dir / "probe.png")
    for line in markdown(result):
        click.echo(line)
    click.echo(f"probe.json, probe.csv, probe.png -> {output_dir}")


def _short_names(paths: list[Path]) -> list[str]:
    """Return the checkpoints' names with as many folders before them as tell them apart."""
    for parts in range(2, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.with_suffix("").parts[-parts:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            break
    return names


@click.command(cls=Command)
@click.option("--byol-checkpoint", type=FILE, required=True, help="mammogram_byol_*.pth that 'pretrain' wrote.")
@click.option("--train-csv", type=FILE, required=True, help="CSV of tile_path and one 0/1 column a class; empty = no label.")
@click.option(
    "--val-csv",
    type=FILE,
    required=True,
    help="The same for validation; no patient, film or tile of the training may be in it.",
)
@click.option("--tiles-dir", type=FILE, help="Folder that tile_path is relative to.")
@click.option("--shards", "shards_dir", type=FILE, help="Shard directory, instead of --tiles-dir; tile_path names keys.")
@click.option(
    "--class-names",
    cls=ListOption,
    callback=split_commas,
    required=True,
    help="Columns to learn, spaces or commas between them.",
)
@click.option("--output-dir", type=FILE, required=True, help="The run's folder: checkpoints, metrics, curves.png.")
@click.option("--resume", help="auto = go on from the run's last checkpoint if there is one; or a checkpoint's path.")
@click.option(
    "--seeds",
    cls=ListOption,
    callback=split_commas,
    help="Train once with each of these seeds, in seed_<n> below --output-dir, and give mean and spread (instead of --seed).",
)
@click.option("--patient-regex", help="With --tiles-dir: what part of tile_path names the patient, e.g. 'patient\\d+'.")
@click.option(
    "--allow-leakage/--no-allow-leakage",
    default=False,
    help="Train although patients, images or tiles are in both CSVs; every checkpoint then says so.",
)
@config_options(FinetuneConfig)
@config_file_option
@click.pass_context
def finetune(
    ctx: click.Context,
    byol_checkpoint: Path,
    train_csv: Path,
    val_csv: Path,
    tiles_dir: Path | None,
    shards_dir: Path | None,
    class_names: tuple[str, ...],
    output_dir: Path,
    resume: str | None,
    seeds: tuple[str, ...],
    patient_regex: str | None,
    allow_leakage: bool,
    **options: Any,
) -> None:
    """Fine-tune a pre-trained backbone for multi-label classification of tiles.

    The backbone is frozen for the first epochs, then trained with its own, smaller learning rate. Writes
    best_classification_model.pth (highest validation AUC), classification_epoch_10.pth and so on, _last after each epoch,
    final_classification_model.pth, and metrics.json with the LAST epoch's figures: the best epoch's are flattered by having
    been chosen. Several processes: torchrun --nproc-per-node N -m mammostream finetune ...
    """
    if (tiles_dir is None) == (shards_dir is None):
        raise BadInput("give either --tiles-dir or --shards")
    config = FinetuneConfig(**options)
    configs = _by_seed(config, seeds)
    if resume not in (None, "auto") and seeds:
        raise BadInput("--resume PATH goes on with one run; with --seeds use --resume auto")
    from shards.reading import open_shards
    from train.labels import describe_leakage, find_leakage, join_folder, join_shards, read_labels

    shards = open_shards(shards_dir) if shards_dir else None
    sides = []
    for path in (train_csv, val_csv):
        frame = read_labels(path, class_names, config.max_samples)
        sides.append(
            join_shards(frame, shards, str(path)) if shards else join_folder(frame, tiles_dir, str(path), patient_regex)
        )
    from train.finetune import CHECKPOINT_NAME, summarise
    from train.finetune import finetune as run
    from train.resuming import find_resume
    from train.runtime import join_processes

    folders = {seed: output_dir / f"seed_{seed}" if seeds else output_dir for seed in configs}
    checkpoints = {seed: find_resume(resume, folder / CHECKPOINT_NAME.format("last")) for seed, folder in folders.items()}
    # Nobody knows how tiles were made that came as image files, packed or not: then as the checkpoint's were.
    record = shards.preprocessing if shards and shards.preprocessing["mapping"] else None
    with join_processes(config) as runtime:
        leakage = find_leakage(*sides)
        for kind, names in leakage.items() if runtime.is_main else ():
            click.echo(f"{kind} in both --train-csv and --val-csv:\n  " + "\n  ".join(names), err=True)
        if leakage and not allow_leakage:
            raise BadInput(
                f"{describe_leakage(leakage)}; the validation would be of what was learnt: keep each patient on one side, or "
                "pass --allow-leakage, which every checkpoint then says"
            )
        if runtime.is_main and any((side.patients == "").any() for side in sides):
            click.echo(
                "the patients of some tiles are unknown: that none is in both CSVs is for you to check; or give "
                "--patient-regex or a column patient_id",
                err=True,
            )
        runs = {}
        for seed, seed_config in configs.items():
            command = resolved(ctx) | {"seed": seed, "seeds": []}
            runs[seed] = run(
                byol_checkpoint,
                *sides,
                class_names,
                record,
                folders[seed],
                seed_config,
                command,
                resume=checkpoints[seed],
                leakage=leakage,
                runtime=runtime,
            )
        if runtime.is_main and seeds:
            summary = summarise(runs)
            write_json(output_dir / "seeds.json", summary)
            write_yaml(output_dir / "config.yaml", resolved(ctx))
            _print_seeds(summary)
        elif runtime.is_main:
            for name, figures in runs[config.seed]["per_class"].items():
                click.echo(f"{name}: {auc_line(figures, runs[config.seed]['films'])}")
        if runtime.is_main:
            click.echo(f"epoch {max(run['epoch'] for run in runs.values())} of {config.epochs}; checkpoints -> {output_dir}")


def _by_seed(config: FinetuneConfig, seeds: tuple[str, ...]) -> dict[int, FinetuneConfig]:
    """Return the options of each run by its seed: of ``--seeds`` where they are given, else of ``--seed`` alone."""
    if not all(seed.isdecimal() for seed in seeds) or len(set(map(int, seeds))) < len(seeds):
        raise BadInput(f"--seeds {' '.join(seeds)}: give different whole numbers from 0 on")
    return {seed: replace(config, seed=seed) for seed in (map(int, seeds) if seeds else [config.seed])}


def _print_seeds(summary: dict[str, Any]) -> None:
    """Print mean and standard deviation over seeds of the AUCs and average precisions."""

    def words(spread: dict[str, Any]) -> str:
        if spread["mean"] is None:
            return "undefined"
        return f"{spread['mean']:.3f}" + (f" ± {spread['sd']:.3f}" if spread["sd"] is not None else "")

    seeds = f"{len(summary['seeds'])} seeds ({', '.join(map(str, summary['seeds']))}), mean ± standard deviation"
    for name, figures in [*summary["per_class"].items(), ("mean", {"auc": summary["mean_auc"], "ap": summary["mean_ap"]})]:
        click.echo(f"{name}: AUC {words(figures['auc'])}, AP {words(figures['ap'])} over {seeds}")


def auc_line(figures: dict[str, Any], films: int) -> str:
    """Return a class's AUC with its interval in words."""
    if figures["auc"] is None:
        return f"AUC undefined ({figures['positives']} positive, {figures['negatives']} negative tiles)"
    interval = figures["auc_interval_over_films"]
    spread = f" (95 % interval over {films} films {interval[0]:.3f}-{interval[1]:.3f})" if interval else ""
    tiles = figures["positives"] + figures["negatives"]
    return f"AUC {figures['auc']:.3f}{spread}, {figures['positives']} of {tiles} tiles positive"


@click.command(cls=Command)
@click.option("--model-path", type=FILE, required=True, help="Classifier checkpoint that 'finetune' wrote.")
@click.option("--shards", "shards_dir", type=FILE, help="Predict the tiles of a shard directory.")
@click.option("--split", type=click.Choice(["train", "val", "test"]), help="With --shards: this split only.")
@click.option("--image-path", type=FILE, help="Predict one film (DICOM, PNG, TIFF, PGM) or one tile image.")
@click.option("--images-dir", type=FILE, help="Predict each film or tile image below a folder.")
@click.option("--manifest", type=FILE, help="Predict each film of a manifest.")
@click.option(
    "--images-are",
    type=click.Choice(["auto", "films", "tiles"]),
    default="auto",
    help="What --image-path and --images-dir name; auto = tiles where no edge is longer than the model's tile.",
)
@click.option("--assume-spacing", type=click.FloatRange(0.01, 2), help="Pixel size in mm of films whose own is unknown.")
@click.option("--findings", type=FILE, help="findings.parquet, whose boxes are drawn on the heat maps.")
@click.option("--output-dir", type=FILE, help="Folder for the tables, and for heat maps of films.")
@click.option("--output-json", type=FILE, help="JSON with the probabilities of each image.")
@config_options(InferConfig)
@config_file_option
@click.pass_context
def infer(
    ctx: click.Context,
    model_path: Path,
    shards_dir: Path | None,
    split: str | None,
    image_path: Path | None,
    images_dir: Path | None,
    manifest: Path | None,
    images_are: str,
    assume_spacing: float | None,
    findings: Path | None,
    output_dir: Path | None,
    output_json: Path | None,
    **options: Any,
) -> None:
    """Predict the tiles of shards, or raw films through the model's own preprocessing.

    An image's probability of a class is that of its highest tile (max) or the mean of its three highest (top3). A film that
    cannot be read becomes a row with its reason, and the rest goes on.
    """
    sources = {"--shards": shards_dir, "--image-path": image_path, "--images-dir": images_dir, "--manifest": manifest}
    if sum(value is not None for value in sources.values()) != 1:
        raise BadInput(f"give one of {', '.join(sources)}")
    if output_dir is None and output_json is None and image_path is None:
        raise BadInput("give --output-dir or --output-json: the predictions need a place")
    config = InferConfig(**options)
    from shards.reading import open_shards

    shards = open_shards(shards_dir) if shards_dir else None
    from train.infer import aggregate, load_predictor, predict_shards, predict_tile_images

    predictor = load_predictor(model_path, config)
    bad: list[dict[str, str]] = []  # image_id and reason of each image that failed
    if shards is not None:
        tiles = predict_shards(predictor, shards, split)
        sides = shards.images()[["image_id", "laterality", "view"]]
    else:
        films = _films(image_path, images_dir, manifest, assume_spacing, findings, bad)
        if _are_tiles(images_are, films, predictor):
            tiles = predict_tile_images(predictor, [film.path for film in films])
            sides = None
        else:
            tiles = _predict_films(predictor, films, output_dir, bad, single=image_path is not None)
            sides = _film_sides(films)
    by = [c for c in ("image_id", "patient_id", "split") if c in tiles.columns]
    images = aggregate(tiles, by)
    if sides is not None:
        images = images.merge(sides, on="image_id", how="left")
    images = _with_bad(images, bad)
    if output_dir is not None:
        _write_tables(output_dir, tiles, images, model_path, predictor, resolved(ctx))
    if output_json is not None:
        _write_json(output_json, images, predictor)
    if shards is None:
        _print_images(images, predictor, bad)
    where = " and ".join(str(p) for p in (output_dir, output_json) if p)
    click.echo(
        f"{len(tiles)} tiles of {len(images) - len(bad)} images{f', {len(bad)} images failed' if bad else ''}"
        + (f" -> {where}" if where else "")
    )


def _films(
    image_path: Path | None,
    images_dir: Path | None,
    manifest: Path | None,
    assume_spacing: float | None,
    findings: Path | None,
    bad: list[dict[str, str]],
) -> list[FilmInput]:
    """Return the images that were named, films or tiles; those that cannot be read go to `bad`."""
    from preprocess.reading import read_header
    from shards.annotations.folder import find_images
    from shards.manifest import read_findings, read_manifest
    from train.infer import FilmInput

    boxes: dict[str, tuple] = {}
    if findings is not None:
        for image_id, rows in read_findings(findings).groupby("image_id"):
            boxes[image_id] = tuple(map(tuple, rows[["xmin", "ymin", "xmax", "ymax"]].to_numpy()))
    if manifest is not None:
        rows = read_manifest(manifest).to_dict("records")
    else:
        # Named by their files alone: no identity is read from a DICOM header into the tables.
        named = find_images(images_dir) if images_dir else {image_path.stem: image_path}
        rows = [{"image_id": image_id, "path": path, "patient_id": ""} for image_id, path in named.items()]
    films = []
    for row in rows:
        try:
            header = read_header(Path(row["path"]))
        except BadInput as error:
            if image_path is not None:
                raise
            bad.append({"image_id": row["image_id"], "reason": str(error)})
            continue
        given = row.get("pixel_spacing_mm", math.nan)
        films.append(
            FilmInput(
                path=Path(row["path"]),
                image_id=row["image_id"],
                shape=(header.height, header.width),
                patient_id=row["patient_id"],
                laterality=row.get("laterality", header.laterality),
                spacing_mm=(header.spacing_mm or assume_spacing) if math.isnan(given) else given,
                boxes=boxes.get(row["image_id"], ()),
            )
        )
    if not films:
        raise BadInput(f"none of the {len(bad)} images can be read; the first: {bad[0]['reason']}")
    return films


def _are_tiles(images_are: str, films: list[FilmInput], predictor: Predictor) -> bool:
    """Tell tile images from films: by ``--images-are``, else by whether an edge is longer than the model's tile."""
    if images_are != "auto":
        return images_are == "tiles"
    tiles = all(max(film.shape) <= predictor.preprocessing["tile_size"] for film in films)
    click.echo(f"taken for {'tiles' if tiles else 'films'}; --images-are says otherwise", err=True)
    return tiles


def _predict_films(
    predictor: Predictor, films: list[FilmInput], output_dir: Path | None, bad: list[dict[str, str]], single: bool
) -> pd.DataFrame:
    """Predict films one by one and return all their tiles; a film that fails goes to `bad`, a single one is an error."""
    import pandas as pd

    from common.progress import progress
    from train.infer import draw_film_heat_maps, predict_film

    tables = []
    for film_input in progress(films, f"predicting ({predictor.runtime})", "film"):
        try:
            film, tiles = predict_film(predictor, film_input)
        except BadInput as error:
            if single:
                raise
            bad.append({"image_id": film_input.image_id, "reason": str(error)})
            continue
        tables.append(tiles)
        if output_dir is not None:
            draw_film_heat_maps(predictor, film_input, film, tiles, output_dir)
    if not tables:
        raise BadInput(f"none of the {len(films)} films could be predicted; the first: {bad[0]['reason']}")
    return pd.concat(tables, ignore_index=True)


def _film_sides(films: list[FilmInput]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame([{"image_id": f.image_id, "laterality": f.laterality} for f in films])


def _with_bad(images: pd.DataFrame, bad: list[dict[str, str]]) -> pd.DataFrame:
    import pandas as pd

    images["reason"] = ""
    return pd.concat([images, pd.DataFrame(bad)], ignore_index=True) if bad else images


def _write_tables(
    output_dir: Path, tiles: pd.DataFrame, images: pd.DataFrame, model_path: Path, predictor: Predictor, config: dict[str, Any]
) -> None:
    """Write the tables of tiles, images and breasts, with the model's hash and its preprocessing as metadata."""
    import json

    import pyarrow as pa

    from common.files import sha256_file, write_parquet, write_yaml
    from train.infer import aggregate

    tables = {"predictions": tiles, "image_predictions": images}
    if "laterality" in images.columns:
        sides = tiles.merge(images[["image_id", "laterality"]], on="image_id")
        known = (sides["patient_id"] != "") & (sides["laterality"] != "")
        if known.any():
            tables["breast_predictions"] = aggregate(sides[known], ["patient_id", "laterality"])
    facts = {"model_sha256": sha256_file(model_path), "preprocessing": predictor.preprocessing}
    for name, frame in tables.items():
        table = pa.Table.from_pandas(frame, preserve_index=False)
        write_parquet(output_dir / f"{name}.parquet", table.replace_schema_metadata({"mammostream": json.dumps(facts)}))
    write_yaml(output_dir / "config.yaml", config)


def _write_json(path: Path, images: pd.DataFrame, predictor: Predictor) -> None:
    from common.files import write_json

    records = []
    for row in images.to_dict("records"):
        if row["reason"]:
            records.append({"image": row["image_id"], "error": row["reason"]})
            continue
        scores = {name: float(row[f"max:{name}"]) for name in predictor.class_names}
        top = max(scores, key=scores.get)
        positive = [name for name, score in scores.items() if score >= predictor.config.threshold]
        records.append(
            {
                "image": row["image_id"],
                "tiles": int(row["tiles"]),
                "probabilities": scores,
                "top_prediction": top,
                "positive": positive,
            }
        )
    write_json(path, {"threshold": predictor.config.threshold, "class_names": predictor.class_names, "images": records})


def _print_images(images: pd.DataFrame, predictor: Predictor, bad: list[dict[str, str]]) -> None:
    for number, row in enumerate(images[images["reason"] == ""].to_dict("records"), start=1):
        scores = sorted(((row[f"max:{name}"], name) for name in predictor.class_names), reverse=True)
        click.echo(f"📸 Image {number}: {row['image_id']}")
        click.echo(f"🏆 Top prediction: {scores[0][1]} ({scores[0][0]:.3f})")
        click.echo("📊 All probabilities:")
        for score, name in scores:
            click.echo(f"   {'✅' if score >= predictor.config.threshold else '❌'} {name:<18}: {score:.3f}")
    for failed in bad:
        click.echo(f"failed: {failed['image_id']}: {failed['reason']}", err=True)


@click.command(cls=Command)
@click.argument("run_dir", type=FILE)
@click.option("--output", type=FILE, help="The page; default: report.html in RUN_DIR.")
def report(run_dir: Path, output: Path | None) -> None:
    """Gather a run's tables, curves and pictures into one self-contained HTML page.

    RUN_DIR is searched for shard directories, trainings, predictions and pictures, as deep as two folders down.
    """
    from train.report import write_report

    path = output or run_dir / "report.html"
    pictures = write_report(run_dir, path)
    click.echo(f"{pictures} pictures, {path.stat().st_size / 1e6:.1f} MB -> {path}")


@click.command(cls=Command)
@click.option("--predictions", "predictions_path", type=FILE, required=True, help="Parquet, CSV or JSON that 'infer' wrote.")
@click.option(
    "--labels",
    "labels_path",
    type=FILE,
    required=True,
    help="CSV or Parquet of tile_path, image_id, or patient_id and laterality, and one 0/1 column a class; empty = no label.",
)
@click.option("--output-dir", type=FILE, help="Folder for metrics.json and the plots.")
@click.option("--model-path", type=FILE, help="The classifier that predicted, for its fitted thresholds.")
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1),
    help="Probability from which each class counts as found; default: the model's, else those in the predictions, else 0.5.",
)
@click.option(
    "--score",
    type=click.Choice(["max", "top3"]),
    default="max",
    help="An image's or breast's probability: its highest tile's, or the mean of its three highest.",
)
@click.option("--patient-column", default="patient_id", help="Column of --labels, where the predictions name no patient.")
@click.option(
    "--bootstrap", type=click.IntRange(min=0), default=1000, help="Resamples of patients for the 95 % intervals; 0 = none."
)
@config_file_option
@click.pass_context
def evaluate(
    ctx: click.Context,
    predictions_path: Path,
    labels_path: Path,
    output_dir: Path | None,
    model_path: Path | None,
    threshold: float | None,
    score: str,
    patient_column: str,
    bootstrap: int,
) -> None:
    """Compare predictions with labels: AUC, AP, balanced accuracy, sensitivity at 90 % specificity, Brier score, ECE.

    Tiles, images or breasts, as both files name them; 95 % intervals over patients. Rows without a counterpart and rows that
    stand there twice are counted. Writes metrics.json, roc.png, precision_recall.png and reliability.png.
    """
    from common.files import write_yaml
    from train.evaluate import choose_thresholds, match_labels, read_predictions, table_lines
    from train.evaluate import evaluate as run

    predictions = read_predictions(predictions_path, score)
    matched = match_labels(predictions, labels_path, patient_column, score)
    thresholds, source = choose_thresholds(predictions, matched.class_names, threshold, model_path)
    for note in matched.notes:
        click.echo(note, err=True)
    metrics = run(matched, thresholds, bootstrap, output_dir)
    for line in table_lines(metrics):
        click.echo(line)
    click.echo(f"{metrics['rows']} {metrics['level']}s of {metrics['patients']} patients; thresholds: {source}")
    if output_dir is not None:
        write_yaml(output_dir / "config.yaml", resolved(ctx))
        click.echo(f"metrics.json and plots -> {output_dir}")
