"""The whole pipeline by its commands: from two films to a report."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import imagecodecs
import pandas as pd
import yaml

from mammostream.common.real_films import film_cases
from mammostream.demo import run_command
from mammostream.train.report.pictures import embed

TILING = "--pixel-spacing 0.2 --tile-size 64 --stride 64"
CLASS = "simulated_calcification"


def test_from_films_to_report(tmp_path, monkeypatch, capsys):
    films, out = tmp_path / "films", tmp_path / "run"
    films.mkdir()
    for case in film_cases()[:2]:
        shutil.copy(case["lcc"], films)
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)  # without a key, wandb does not look for a network

    def run(line: str) -> str:
        """Run a command in this process, as the console script would, and return what it printed."""
        capsys.readouterr()
        run_command(shlex.split(line))
        return capsys.readouterr().out

    # prepare: two patients, one a split
    said = run(
        f"prepare --images-root {films} --output-dir {out}/films --assume-spacing 0.05 --patient-regex 'P_\\d+' "
        "--val-fraction 0.5"
    )
    assert "2 images of 2 patients" in said
    manifest = pd.read_parquet(out / "films/manifest.parquet")
    assert sorted(manifest["split"]) == ["train", "val"]
    assert sorted(manifest["patient_id"]) == ["P_00173", "P_00820"]
    assert manifest["pixel_spacing_mm"].tolist() == [0.05, 0.05]
    patient_of = dict(zip(manifest["split"], manifest["patient_id"], strict=True))

    # simulate: copies with boxes
    run(f"simulate --manifest {out}/films/manifest.parquet --output-dir {out}/simulated --clusters-per-image 6 --contrast 20")
    findings_path, simulated = out / "simulated/findings.parquet", out / "simulated/manifest.parquet"
    findings = pd.read_parquet(findings_path)
    assert len(findings) == 12
    assert set(findings["label"]) == {CLASS}
    assert dict(pd.read_parquet(simulated)[["split", "patient_id"]].to_numpy()) == patient_of

    # preview: one picture per film; shards build
    run(f"preview --manifest {simulated} --findings {findings_path} --output-dir {out}/preview {TILING}")
    run(f"shards build --manifest {simulated} --output-dir {out}/shards {TILING} --device cpu --workers 1")
    assert len(list((out / "preview").glob("*.png"))) == 4  # and a contact sheet, and the energies of all tiles
    tiles = pd.read_parquet(out / "shards/tiles.parquet")
    assert len(tiles) > 60
    assert tiles["tile"].is_unique
    assert set(tiles.loc[tiles["split"] == "train", "patient_id"]) == {patient_of["train"]}
    assert set(tiles.loc[tiles["split"] == "val", "patient_id"]) == {patient_of["val"]}

    # verify, info, labels; pretrain, with wandb's own record next to the run
    small = "--device cpu --num-workers 2 --batch-size 16"
    verified = run(f"shards verify {out}/shards --workers 1")
    info = run(f"shards info {out}/shards")
    for split in ("train", "val"):
        run(f"shards labels {out}/shards --split {split} --findings {findings_path} --output {out}/{split}.csv")
    run(
        f"pretrain --shards {out}/shards --output-dir {out}/pretrain --arch resnet18_narrow --hidden-dim 32 --proj-dim 16 "
        f"--epochs 1 --wandb-mode offline {small}"
    )
    assert f"{len(tiles)} tiles: all well" in verified
    assert "tile_size: 64" in info
    assert re.search(r"train-000000 +1 +\d+", info)
    for split in ("train", "val"):
        labels = pd.read_csv(out / f"{split}.csv")
        assert set(labels["tile_path"]) == set(tiles.loc[tiles["split"] == split, "key"])
        assert set(labels[CLASS].dropna()) == {0, 1}
    assert {p.name for p in (out / "pretrain").glob("*.pth")} == {f"mammogram_byol_{n}.pth" for n in ("best", "final", "last")}
    assert list((out / "pretrain/wandb").glob("offline-run-*/run-*.wandb"))
    lines = [json.loads(line) for line in (out / "pretrain/metrics.jsonl").read_text().splitlines()]
    assert -1 <= lines[-1]["epoch_mean/loss"] <= 1
    assert yaml.safe_load((out / "pretrain/config.yaml").read_text())["hidden_dim"] == 32

    # finetune
    run(
        f"finetune --byol-checkpoint {out}/pretrain/mammogram_byol_final.pth --train-csv {out}/train.csv "
        f"--val-csv {out}/val.csv --shards {out}/shards --class-names {CLASS} --output-dir {out}/finetune --epochs 2 "
        "--freeze-backbone-epochs 1 "
        f"--wandb-mode disabled {small}"
    )
    model = out / "finetune/final_classification_model.pth"
    assert model.is_file()
    assert not (out / "finetune/wandb").exists()
    figures = json.loads((out / "finetune/metrics.json").read_text())["per_class"][CLASS]
    assert 0 <= figures["auc"] <= 1
    labels = pd.read_csv(out / "val.csv")[CLASS]
    assert (figures["positives"], figures["negatives"]) == ((labels == 1).sum(), (labels == 0).sum())

    # infer: the shards of one patient, and one of his films
    film = next(iter(tiles.loc[tiles["split"] == "val", "image_id"]))
    run(f"infer --model-path {model} --shards {out}/shards --split val --output-dir {out}/infer --device cpu")
    # One command by the console script itself.
    predict = (
        f"infer --model-path {model} --image-path {out}/simulated/images/{film}.tif --assume-spacing 0.05 "
        f"--output-dir {out}/infer_film --output-json {out}/infer_film/predictions.json --device cpu"
    )
    script = Path(sys.executable).with_name("mammostream")
    done = subprocess.run([script, *shlex.split(predict)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said = done.stdout
    predictions = pd.read_parquet(out / "infer/predictions.parquet")
    assert set(predictions["patient_id"]) == {patient_of["val"]}
    assert sorted(predictions["key"]) == sorted(tiles.loc[tiles["split"] == "val", "key"])
    assert predictions[f"prob:{CLASS}"].between(0, 1).all()
    (image,) = json.loads((out / "infer_film/predictions.json").read_text())["images"]
    assert image["tiles"] == len(predictions)
    assert abs(image["probabilities"][CLASS] - predictions[f"prob:{CLASS}"].max()) < 1e-3
    assert f"Top prediction: {CLASS}" in said
    heat_maps = list((out / "infer_film").glob("heatmap_*.png"))
    assert len(heat_maps) == 1
    assert imagecodecs.png_decode(heat_maps[0].read_bytes())[..., :3].std() > 10

    # report
    run(f"report {out}")
    page = (out / "report.html").read_text(encoding="utf-8")
    for path in out.glob("*/*.png"):
        assert path.name == "curves.png" or embed(path).source in page, path  # curves are drawn again, from metrics.jsonl
    assert "Pre-training" in page
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", page)
    assert f"{figures['auc']:.4g}" in page
