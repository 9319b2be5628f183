"""What is damaged, how, and the command that reads it."""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.fuzz import damage, film_damage
from benchmarks.fuzz.checkpoint_damage import checkpoint_damage
from benchmarks.fuzz.outcomes import (
    built,
    content,
    evaluated,
    files,
    labels,
    manifest,
    merged,
    predicted,
    printed,
    table,
    trained,
)
from benchmarks.fuzz.staging import Target

# Damage that the bytes themselves show, in any binary format.
MISSING = frozenset({"truncate"})
# ... and in formats with a checksum over everything that counts.
ALL_BYTES = frozenset(how.__name__ for how in damage.BYTES)


def _films() -> list[Target]:
    found = []
    special = {
        ".dcm": film_damage.dicom_damage,
        ".png": film_damage.png_damage,
        ".tif": film_damage.tiff_damage,
        ".jpg": film_damage.jpeg_damage,
        ".pgm": damage.ascii_number_damage,
        ".jp2": film_damage.jpeg2000_damage,
    }
    for name in FILMS:
        suffix = Path(name).suffix
        # Of JPEG and JPEG 2000 streams only a missing end shows; PNG has checksums; the rest says how much there should be.
        shown = ALL_BYTES | {"png"} if suffix == ".png" else MISSING
        if suffix == ".dcm":
            shown |= {f"{element} {how}" for element in film_damage.DECISIVE for how in ("remove", "empty", "value")}
        kind = f"film, {suffix[1:]}"
        build = "shards build --manifest manifest.parquet --output-dir out --tile-size 32 --stride 32 --device cpu --workers 1"
        found.append(Target(kind, f"films_small/{name}", build, special[suffix], built, shown, 3))
        infer = (
            "infer --model-path {base}/finetune/final_classification_model.pth --image-path {file} --assume-spacing 0.4 "
            "--output-dir out --device cpu --num-workers 1 --compile off"
        )
        found.append(Target(kind, f"films_small/{name}", infer, special[suffix], predicted, shown, 1.2))
        preview = "preview --manifest manifest.parquet --output-dir out --tile-size 32 --stride 32 --workers 1"
        found.append(Target(kind, f"films_small/{name}", preview, special[suffix], printed, frozenset(), 0.4))
        prepare = "prepare --images-root . --output-dir out --assume-spacing 0.4 --patient-regex '[^/]+$'"
        found.append(Target(kind, f"films_small/{name}", prepare, special[suffix], manifest, frozenset(), 0.8))
    return found


FILMS = [
    "explicit.dcm",
    "implicit.dcm",
    "big_endian.dcm",
    "deflated.dcm",
    "rle.dcm",
    "jpeg_ls.dcm",
    "jpeg2000.dcm",
    "lossless.dcm",
    "baseline.dcm",
    "film.png",
    "film.tif",
    "zstd.tif",
    "film.jpg",
    "film.pgm",
    "film.jp2",
]
DEVICE = "--device cpu --num-workers 1"
TRAIN = f"{DEVICE} --wandb-mode disabled --batch-size 16"
PRETRAIN = f"pretrain --output-dir out --epochs 1 --arch resnet18_narrow --hidden-dim 32 --proj-dim 16 --limit-tiles 32 {TRAIN}"
FINETUNE = f"finetune --output-dir out --epochs 1 --class-names simulated_calcification bright {TRAIN} --byol-checkpoint "
BYOL = "{base}/pretrain/mammogram_byol_final.pth"
MODEL = "{base}/finetune/final_classification_model.pth"
INFER = f"infer --split val --output-dir out --compile off --sheet-tiles 0 {DEVICE}"


def _shards() -> list[Target]:
    tools = (
        ("shards verify shards --workers 1", content, 3.0),
        ("shards info shards", printed, 1.0),
        ("shards unpack shards --output-dir out --workers 1", files, 1.2),
        ("shards finish shards", merged, 1.0),
        ("shards labels shards --split val --findings {base}/simulated/findings.parquet --output out.csv", labels, 1.0),
        (f"{INFER} --model-path {MODEL} --shards shards", predicted, 1.2),
        (f"{PRETRAIN} --shards shards", trained, 0.5),
    )
    sources = (
        ("shard tar", "val-000000.tar", damage.ascii_number_damage, ALL_BYTES),
        ("shard index", "val-000000.idx", damage.ascii_number_damage, frozenset()),
        ("shard tables", "val-000000.parquet", damage.table_damage, MISSING),
        ("shard tables", "tiles.parquet", damage.table_damage, MISSING),
        ("shard tables", "images.parquet", damage.table_damage, MISSING),
        ("shards.json", "shards.json", damage.json_damage, frozenset()),
    )
    found = []
    for kind, name, structured, shown in sources:
        for command, outcome, share in tools:
            if name.endswith(".tar") and not any(word in command for word in ("verify", "unpack", "infer", "pretrain")):
                continue
            verify = frozenset({""}) if "verify" in command else shown  # verify must notice everything
            found.append(Target(kind, f"shards/{name}", command, structured, outcome, verify, share * 3, "shards"))
    return found


# Damage that shows in a CSV itself.
_CSV_SHOWN = frozenset({"extra cell", "nul", "cell 1 = 'x'", "cell 1 = 'ä"})


def _tables() -> list[Target]:
    evaluate = "evaluate --output-dir out --bootstrap 20"
    prediction = "{base}/infer/predictions.parquet"
    tables = damage.table_damage
    return [
        Target(
            "manifest",
            "manifest.parquet",
            "shards build --manifest {file} --output-dir out --tile-size 64 --stride 64 "
            "--pixel-spacing 0.4 --device cpu --workers 1",
            tables,
            built,
            frozenset({"double row"}),
            10,
        ),
        Target(
            "manifest",
            "manifest.parquet",
            f"infer --manifest {{file}} --output-dir out --sheet-tiles 0 {DEVICE} --compile off --model-path {MODEL}",
            tables,
            predicted,
            frozenset({"double row"}),
            6,
        ),
        Target(
            "manifest",
            "film_labels.parquet",
            "evaluate --labels {file} --output-dir out --bootstrap 20 --predictions {base}/infer/image_predictions.parquet",
            tables,
            evaluated,
            frozenset({"double row"}),
            3,
        ),
        Target(
            "findings",
            "simulated/findings.parquet",
            "shards labels {base}/shards --split val --findings {file} --output out.csv",
            tables,
            labels,
            frozenset({"inf", "nan"}),
            10,
        ),
        Target(
            "findings",
            "simulated/findings.parquet",
            f"{evaluate} --predictions {prediction} --labels {{base}}/val.csv --findings {{file}}",
            tables,
            evaluated,
            frozenset(),
            6,
        ),
    ]


def _label_tables() -> list[Target]:
    finetune = f"{FINETUNE}{BYOL} --shards {{base}}/shards"
    evaluate = "evaluate --output-dir out --bootstrap 20"
    prediction = "{base}/infer/predictions.parquet"
    return [
        Target(
            "label CSV",
            "train.csv",
            f"{finetune} --train-csv {{file}} --val-csv {{base}}/val.csv",
            damage.csv_damage,
            trained,
            _CSV_SHOWN,
            12,
        ),
        Target(
            "label CSV",
            "val.csv",
            f"{evaluate} --predictions {prediction} --labels {{file}}",
            damage.csv_damage,
            evaluated,
            _CSV_SHOWN,
            18,
        ),
        Target(
            "label CSV",
            "both.csv",
            "probe --checkpoint " + BYOL + " --shards {base}/shards --labels {file} --output-dir out "
            f"--bootstrap 20 --seeds 0 --class-names bright {DEVICE}",
            damage.csv_damage,
            files,
            frozenset(),
            4,
        ),
        Target(
            "film CSV",
            "films.csv",
            "prepare --images-root {base}/films --csv-path {file} --output-dir out",
            damage.csv_damage,
            manifest,
            frozenset({"nul"}),
            20,
        ),
    ]


def _predictions() -> list[Target]:
    evaluate = "evaluate --output-dir out --bootstrap 20"
    tables = damage.table_damage
    bad_numbers = frozenset({"inf prob", "nan prob", "huge prob", "negative prob", "double row"})
    return [
        Target(
            "predictions",
            "infer/predictions.parquet",
            f"{evaluate} --predictions {{file}} --labels {{base}}/val.csv",
            tables,
            evaluated,
            bad_numbers,
            16,
        ),
        Target(
            "predictions",
            "infer/image_predictions.parquet",
            f"{evaluate} --predictions {{file}} --labels {{base}}/simulated/manifest.parquet",
            tables,
            evaluated,
            frozenset(),
            5,
        ),
        Target(
            "predictions",
            "predictions.csv",
            f"{evaluate} --predictions {{file}} --labels {{base}}/val.csv",
            damage.csv_damage,
            evaluated,
            _CSV_SHOWN,
            10,
        ),
        Target(
            "predictions",
            "predictions.json",
            f"{evaluate} --predictions {{file}} --labels {{base}}/val.csv",
            damage.json_damage,
            evaluated,
            frozenset(),
            8,
        ),
    ]


def _configs() -> list[Target]:
    yaml = damage.yaml_damage
    shards = "--shards {base}/shards"
    return [
        Target("config", "pretrain/config.yaml", f"{PRETRAIN} {shards} --config {{file}}", yaml, trained, frozenset(), 12),
        Target(
            "config",
            "finetune/config.yaml",
            f"{FINETUNE}{BYOL} {shards} --train-csv {{base}}/train.csv --val-csv {{base}}/val.csv --config {{file}}",
            yaml,
            trained,
            frozenset(),
            10,
        ),
        Target(
            "config",
            "infer/config.yaml",
            f"{INFER} {shards} --model-path {MODEL} --config {{file}}",
            yaml,
            predicted,
            frozenset(),
            10,
        ),
        Target(
            "config",
            "shards/config.yaml",
            "shards build --config {file} --manifest {base}/simulated/manifest.parquet "
            "--output-dir out --device cpu --workers 1 --tile-size 64 --stride 64 --pixel-spacing 0.4",
            yaml,
            built,
            frozenset(),
            10,
        ),
    ]


def _checkpoints() -> list[Target]:
    shown = ALL_BYTES | {"code", "bare pickle"}
    shards = "--shards {base}/shards"
    csvs = "--train-csv {base}/train.csv --val-csv {base}/val.csv"
    model, byol = "finetune/final_classification_model.pth", "pretrain/mammogram_byol_final.pth"
    do = checkpoint_damage
    resume = (
        f"finetune {csvs} {shards} --class-names simulated_calcification bright --output-dir out --epochs 2 --resume {{file}} "
        + TRAIN
    )
    again = (
        f"pretrain {shards} --output-dir out --arch resnet18_narrow --hidden-dim 32 --proj-dim 16 --batch-size 16 --epochs 3 "
    )
    return [
        Target("classifier", model, f"{INFER} {shards} --model-path {{file}}", do, predicted, shown, 22),
        Target(
            "classifier",
            model,
            "evaluate --predictions {base}/infer/predictions.parquet --labels {base}/val.csv "
            "--output-dir out --bootstrap 20 --model-path {file}",
            do,
            evaluated,
            frozenset(),
            8,
        ),
        Target("classifier", model, "export --model-path {file} --output out.onnx", do, printed, frozenset(), 3),
        Target(
            "classifier", "finetune/last_classification_model.pth", f"{resume} --byol-checkpoint {BYOL}", do, trained, shown, 8
        ),
        Target("backbone", byol, f"{FINETUNE}{{file}} {shards} {csvs}", do, trained, shown, 10),
        Target("backbone", byol, f"{again} {DEVICE} --wandb-mode disabled --resume {{file}}", do, trained, shown, 10),
        Target(
            "backbone",
            byol,
            f"embed --checkpoint {{file}} {shards} --split val --output out.parquet {DEVICE}",
            do,
            lambda folder: {"rows": table(folder / "out.parquet")},
            shown,
            8,
        ),
        Target(
            "backbone",
            byol,
            "probe --checkpoint {file} " + shards + " --labels {base}/both.csv --output-dir out --bootstrap 20 "
            f"--seeds 0 --class-names bright {DEVICE}",
            do,
            files,
            frozenset(),
            3,
        ),
    ]


def targets() -> list[Target]:
    """All of them."""
    return [*_films(), *_shards(), *_tables(), *_label_tables(), *_predictions(), *_configs(), *_checkpoints()]


def environment() -> None:
    """Of the process and its children: one thread, no network, no colours."""
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", WANDB_MODE="disabled", NO_COLOR="1", COLUMNS="200")
