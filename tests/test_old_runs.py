"""Shards, checkpoints and run folders of earlier versions still load.

``data/run-0.1.0.tar.xz`` was written by version 0.1.0, before its modules moved into rooms. It holds shards of four synthetic
films, a pre-training that stopped after one of two epochs, a classifier, and what that version made of them: predictions, and
the metrics of the resumed pre-training. Weights were replaced by a repeating pattern, so that 220 MiB compress to 130 kB.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from mammostream.demo import run_command
from mammostream.shards.reading import open_shards
from mammostream.shards.tables import ADDED_COLUMNS, IMAGE_SCHEMA, TILE_SCHEMA

ONE_THREAD = "--device cpu --num-workers 1"


@pytest.fixture
def mammostream(old_run, monkeypatch, capsys):
    """Run a command in this process, within the old run's folder, and return what it printed."""
    monkeypatch.chdir(old_run)
    before = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(line: str) -> str:
        capsys.readouterr()
        run_command(shlex.split(line))
        return capsys.readouterr().out

    yield run
    torch.set_num_threads(before)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_shards_verify(mammostream):
    assert "4 shards, 24 tiles: all well" in mammostream("shards verify shards --workers 1")


def test_merged_tables_as_they_are_have_columns_added_since(old_run):
    shards = open_shards(old_run / "shards")
    assert "pectoral_ratio" not in pd.read_parquet(old_run / "shards/tiles.parquet")
    assert list(shards.tiles().columns.sort_values()) == sorted(TILE_SCHEMA.names)
    assert list(shards.images().columns.sort_values()) == sorted(IMAGE_SCHEMA.names)
    assert shards.tiles()["pectoral_ratio"].isna().all()


def test_columns_added_since_are_null(old_run, mammostream):
    mammostream("shards finish shards")  # merges the old tables anew
    tables = {name: pd.read_parquet(old_run / f"shards/{name}.parquet") for name in ("tiles", "images")}
    assert set().union(*tables.values()) >= ADDED_COLUMNS
    for table in tables.values():
        assert table[sorted(ADDED_COLUMNS & set(table))].isna().all(axis=None)
    images = tables["images"]
    assert (images["kept"] > 0).all()
    assert "4 shards, 24 tiles: all well" in mammostream("shards verify shards --workers 1")


def test_a_film_is_predicted_as_its_model_was_made(old_run, mammostream, cropped_films):
    """The record of 0.1.0 does not have the options that came later."""
    film = cropped_films / "P0_lmlo.png"
    model = "finetune/final_classification_model.pth"
    mammostream(f"infer --model-path {model} --image-path {film} --assume-spacing 0.4 --output-dir film --device cpu")
    assert len(pd.read_parquet(old_run / "film/predictions.parquet"))


def test_old_tiles_can_be_unpacked_and_packed_again(old_run, mammostream):
    mammostream("shards unpack shards --output-dir tiles --workers 1")
    mammostream("shards pack --csv tiles/tiles.csv --tiles-dir tiles --output-dir packed --workers 1")
    old, new = (open_shards(old_run / name) for name in ("shards", "packed"))
    assert new.preprocessing["mapping"] == old.preprocessing["mapping"]
    assert sorted(new.tiles()["crc32"]) == sorted(old.tiles()["crc32"])


def test_a_classifier_answers_as_it_did(old_run, mammostream):
    model = "finetune/final_classification_model.pth"
    mammostream(f"infer --model-path {model} --shards shards --output-dir again {ONE_THREAD}")
    for name, key in (("predictions.parquet", "key"), ("image_predictions.parquet", "image_id")):
        then, now = (pd.read_parquet(old_run / folder / name) for folder in ("infer", "again"))
        assert [column for column in now.columns if column in then.columns] == list(then.columns)
        assert now[key].tolist() == then[key].tolist()
        for column in then.select_dtypes("number"):
            np.testing.assert_allclose(now[column], then[column], atol=1e-4, err_msg=column)


def test_an_interrupted_pretraining_goes_on(old_run, mammostream):
    options = "--arch resnet18 --hidden-dim 8 --proj-dim 4 --batch-size 4 --epochs 2 --save-every 1 --resume auto"
    mammostream(f"pretrain --shards shards --output-dir pretrain {options} {ONE_THREAD} --wandb-mode disabled")
    then, now = lines(old_run / "resumed_metrics.jsonl"), lines(old_run / "pretrain/metrics.jsonl")
    assert now[0] == then[0]  # the epoch before the interruption, as logged then
    assert now[1].keys() >= then[1].keys()
    same = ("step", "epoch_mean/epoch", "epoch_mean/lr", "epoch_mean/momentum", "epoch_mean/breast_ratio")
    assert [now[1][name] for name in same] == [then[1][name] for name in same]
    # Gradients of the pattern are steep: versions of torch differ by more than rounding after three steps.
    assert now[1]["epoch_mean/loss"] == pytest.approx(then[1]["epoch_mean/loss"], abs=0.2)
    assert (old_run / "pretrain/mammogram_byol_final.pth").is_file()


def test_an_old_backbone_can_be_finetuned_and_the_folder_reported(old_run, mammostream):
    mammostream(
        "finetune --byol-checkpoint pretrain/mammogram_byol_last.pth --shards shards --train-csv train.csv --val-csv val.csv "
        f"--class-names bright --output-dir new --epochs 1 --batch-size 4 {ONE_THREAD} --wandb-mode disabled",
    )
    assert (
        json.loads((old_run / "new/metrics.json").read_text()).keys()
        >= json.loads((old_run / "finetune/metrics.json").read_text()).keys()
    )
    assert "report.html" in mammostream("report .")
