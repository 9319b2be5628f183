"""What a fine-tuning run fits on validation and keeps: calibrations of each level, cross-fitted figures, who was fitted on."""

from __future__ import annotations

import json
import re

import numpy as np
import pandas as pd
import pytest

from mammostream.models.checkpoints import load_checkpoint
from mammostream.shards import open_shards
from mammostream.shards.identity import subject_hashes
from mammostream.train.levels.calibration import stored_calibrations
from mammostream.train.run.labels import join_shards, read_labels


@pytest.fixture(scope="module")
def checkpoint(finetuned):
    return load_checkpoint(finetuned.finetuned / "final_classification_model.pth", "classifier")


@pytest.fixture(scope="module")
def metrics(finetuned):
    return json.loads((finetuned.finetuned / "metrics.json").read_text())


def test_the_checkpoint_keeps_a_calibration_of_each_level(checkpoint, metrics, finetuned):
    calibrations = stored_calibrations(checkpoint)
    assert {level: set(scores) for level, scores in calibrations.items()} == {
        "tile": {"prob"},
        "image": {"max", "top3", "noisy_or"},
        "breast": {"max", "top3", "noisy_or"},
    }
    tile = calibrations["tile"]["prob"]
    assert list(tile.thresholds) == checkpoint["thresholds"]
    for c, name in enumerate(finetuned.classes):
        assert metrics["per_class"][name]["calibration"] == tile.fits[c]
        assert (metrics["per_class"][name]["positives"], metrics["per_class"][name]["negatives"]) == (
            tile.positives[c],
            tile.negatives[c],
        )
    # One validation film: nothing can be said of images, and that is said.
    assert calibrations["image"]["max"].fits == ("not fitted",) * 2
    assert sum(line.startswith("image ") for line in metrics["weak_calibrations"]) == 2


def test_the_checkpoint_keeps_whom_it_was_fitted_on(checkpoint, finetuned):
    tiles = open_shards(finetuned.shards).tiles()
    hashes = {split: set(subject_hashes(t["patient_id"], t["image_id"])) for split, t in tiles.groupby("split")}
    assert checkpoint["fitted_on"] == {
        "trained": sorted(hashes["train"]),
        "validated": sorted(hashes["val"]),
        "pre-trained": sorted(hashes["train"]),
    }
    assert not {*tiles["patient_id"]} & {*map(str, checkpoint["fitted_on"]["trained"])}  # hashes, not ids


def test_validation_of_several_patients_is_cross_fitted(pretrained, mammostream, tmp_path):
    """Labels of both patients on the validation side, with the leak allowed: two groups, so two folds."""
    both = pd.concat([pd.read_csv(pretrained.train_csv), pd.read_csv(pretrained.val_csv)])
    both.to_csv(tmp_path / "both.csv", index=False)
    options = pretrained.finetune_options.replace(str(pretrained.val_csv), f"{tmp_path}/both.csv")
    outcome = mammostream(f"finetune {options} --epochs 1 --allow-leakage --output-dir {tmp_path}/run")
    assert outcome.code == 0, outcome.err
    assert re.search(r"fine-tuning \(cpu, fp32\): +0%\|.*?\| 0/\d+ \[", outcome.err)  # once it began at "False/53"
    assert "image bright: " in outcome.err  # too few images to calibrate
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["cross_fitted"]["folds"] == 2
    assert metrics["levels"]["image"]["max"]["cross_fitted"]["folds"] == 2
    for name in pretrained.classes:
        own, other = metrics["per_class"][name], metrics["cross_fitted"]["per_class"][name]
        assert own["balanced_accuracy"] >= 0.5
        assert 0 <= other["ece"] <= 1
        assert other["brier"] >= own["brier"] - 0.02
    assert metrics["levels"]["image"]["max"]["rows"] == 2


def test_unlabelled_tiles_decide_whether_an_images_label_is_missing(pretrained, tmp_path):
    shards = open_shards(pretrained.shards)
    frame = pd.read_csv(pretrained.val_csv)
    frame.loc[0, pretrained.classes] = np.nan
    unlabelled = int(frame[pretrained.classes].isna().all(axis=1).sum())
    other = pd.read_csv(pretrained.train_csv)
    other[pretrained.classes] = np.nan  # another film, of which nothing is known: not needed
    pd.concat([frame, other]).to_csv(tmp_path / "val.csv", index=False)
    kept = read_labels(tmp_path / "val.csv", pretrained.classes, keep_unlabelled=True)
    assert len(kept) == len(frame) + len(other)
    tiles = join_shards(kept, shards, "val.csv").of_labelled_units()
    assert len(tiles.keys) == len(frame)
    assert np.isnan(tiles.labels).all(1).sum() == unlabelled
    assert set(tiles.breasts) == {f"{tiles.patients[0]} L"} or set(tiles.breasts) == {f"{tiles.patients[0]} R"}
    assert len(read_labels(tmp_path / "val.csv", pretrained.classes)) == len(frame) - unlabelled
