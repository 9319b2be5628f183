"""``mammostream aggregate``: what is planted is found, runs resume bit for bit, other features are refused."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from planted_set import planted_tiles, write_features

from mammostream.models.checkpoints import load_checkpoint
from mammostream.shards.identity import SEEN, subject_hashes
from mammostream.train.aggregate.features import open_features
from mammostream.train.run.charts import read_metrics

SMALL = "--device cpu --num-workers 1 --wandb-mode disabled --batch-size 16 --lr 3e-3 --hidden-dim 16 --attention-dim 8"


def train_line(planted, out, more=""):
    return (
        f"aggregate train --features {planted.features} --manifest {planted.manifest} --class-names lesion --output-dir {out} "
        f"--level breast --epochs 12 {SMALL} {more}"
    )


def predict_line(run, planted, out, more="", features=None):
    return (
        f"aggregate predict --aggregator {run}/final_aggregator.pth --features {features or planted.features} "
        f"--manifest {planted.manifest} --output {out} --device cpu {more}"
    )


@pytest.fixture(scope="session")
def trained(planted, run_cli, tmp_path_factory):
    """The folder of a finished run."""
    out = tmp_path_factory.mktemp("aggregated")
    run_cli(train_line(planted, out))
    return out


def assert_equal(one, other, place=""):
    """Compare nested dicts, lists and tensors bit for bit."""
    assert type(one) is type(other), place
    if isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one:
            assert_equal(one[key], other[key], f"{place}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), place
        for n, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal(a, b, f"{place}[{n}]")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), place
    else:
        assert one == other or (one != one and other != other), place


def test_attention_finds_the_planted_tile(trained, planted):
    metrics = pd.read_json(trained / "metrics.json", typ="series")
    auc = {name: found["per_class"]["lesion"]["auc"] for name, found in metrics["test"].items()}
    assert auc["gated"] > 0.95
    assert auc["max"] > 0.95
    low, high = metrics["test"]["gated"]["per_class"]["lesion"]["intervals"]["auc"]
    assert low <= auc["gated"] <= high
    assert auc["mean"] < auc["gated"]


def test_the_weights_of_tiles_point_at_the_planted_one(trained, planted, mammostream, tmp_path):
    line = predict_line(trained, planted, tmp_path / "p.parquet", f"--attention {tmp_path / 'a.parquet'}")
    outcome = mammostream(line)
    assert outcome.code == 0, outcome.err
    tiles = pd.read_parquet(tmp_path / "a.parquet")
    films = planted.films().set_index("image_id")
    tiles["breast"] = [f"{films.at[i, 'patient_id']} {films.at[i, 'laterality']}" for i in tiles["image_id"]]
    np.testing.assert_allclose(tiles.groupby("breast")["attention"].sum(), 1, atol=1e-5)
    features = planted.open()
    planted_keys = set(features.tiles["key"][features.values[:, :3].mean(1) > 3.5])
    highest = tiles.loc[tiles.groupby("breast")["attention"].idxmax()].set_index("breast")
    positive = {f"{r.patient_id} {r.laterality}" for r in films[films["label:lesion"] == 1].itertuples()} & set(highest.index)
    assert len(positive) > 10
    assert np.mean([highest.at[breast, "key"] in planted_keys for breast in positive]) > 0.9


def test_predictions_are_those_of_the_training_and_evaluate_reads_them(trained, planted, mammostream, tmp_path):
    for pooling in ("gated", "mean", "max", "top"):
        assert mammostream(predict_line(trained, planted, tmp_path / "p.parquet", f"--pooling {pooling}")).code == 0
        pd.testing.assert_frame_equal(
            pd.read_parquet(tmp_path / "p.parquet"), pd.read_parquet(trained / f"test_predictions_{pooling}.parquet")
        )
    outcome = mammostream(
        f"evaluate --predictions {trained}/test_predictions_gated.parquet --labels {planted.manifest} --bootstrap 20 "
        f"--output-dir {tmp_path}/e"
    )
    assert outcome.code == 0, outcome.err
    evaluated = pd.read_json(tmp_path / "e/metrics.json", typ="series")
    metrics = pd.read_json(trained / "metrics.json", typ="series")
    assert evaluated["level"] == "breast"
    thresholds = load_checkpoint(trained / "final_aggregator.pth", "aggregator")["calibration"]["gated"]["thresholds"]
    assert [figures["threshold"] for figures in evaluated["per_class"].values()] == pytest.approx(thresholds)
    assert "thresholds: the predictions" in outcome.out
    assert evaluated["mean_auc"] == pytest.approx(metrics["test"]["gated"]["mean_auc"])
    seen = pd.read_parquet(trained / "predictions_gated.parquet")["seen"]
    assert set(seen) == {"validated"}
    assert set(pd.read_parquet(trained / "test_predictions_gated.parquet")["seen"]) == {""}


@pytest.mark.parametrize("level", ["image", "patient"])
def test_other_levels_are_evaluated_too(planted, mammostream, tmp_path, level):
    line = train_line(planted, tmp_path / "out").replace("--level breast", f"--level {level}")
    assert mammostream(line.replace("--epochs 12", "--epochs 2")).code == 0
    predictions = tmp_path / "out/test_predictions_max.parquet"
    outcome = mammostream(f"evaluate --predictions {predictions} --labels {planted.manifest} --output-dir {tmp_path}/e")
    assert outcome.code == 0, outcome.err
    metrics = pd.read_json(tmp_path / "out/metrics.json", typ="series")
    evaluated = pd.read_json(tmp_path / "e/metrics.json", typ="series")
    assert evaluated["level"] == level
    assert evaluated["rows"] == {"image": 120, "patient": 30}[level]
    assert evaluated["mean_auc"] == pytest.approx(metrics["test"]["max"]["mean_auc"])


def test_a_missing_label_teaches_nothing(planted, mammostream, tmp_path):
    """Labels of breasts of which two thirds are unknown: they are masked, not taken for 0."""
    line = train_line(planted, tmp_path / "out").replace("--class-names lesion", "--class-names mostly_unknown lesion")
    outcome = mammostream(line.replace("--level breast", "--level image").replace("--epochs 12", "--epochs 6"))
    assert outcome.code == 0, outcome.err
    metrics = pd.read_json(tmp_path / "out/metrics.json", typ="series")
    figures = metrics["test"]["max"]["per_class"]
    assert figures["mostly_unknown"]["positives"] + figures["mostly_unknown"]["negatives"] < 50
    assert figures["mostly_unknown"]["auc"] > 0.8


def test_a_resumed_run_is_the_uninterrupted_one(trained, planted, mammostream, tmp_path, monkeypatch):
    import mammostream.train.aggregate.training as training

    real, calls = training.save_checkpoint, []

    def stop_after_the_fifth(path, checkpoint):
        real(path, checkpoint)
        calls.append(path)
        if len(calls) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "save_checkpoint", stop_after_the_fifth)
    assert mammostream(train_line(planted, tmp_path / "out")).code == 130
    monkeypatch.setattr(training, "save_checkpoint", real)
    refused = mammostream(train_line(planted, tmp_path / "out"))
    assert "resume with --resume auto" in refused.error
    assert mammostream(train_line(planted, tmp_path / "out", "--resume auto")).code == 0
    for name in ("last_aggregator.pth", "final_aggregator.pth"):
        one, other = (load_checkpoint(folder / name, "aggregator") for folder in (trained, tmp_path / "out"))
        assert_equal(one, other)
    assert read_metrics(tmp_path / "out/metrics.jsonl") == read_metrics(trained / "metrics.jsonl")
    for name in ("gated", "top"):
        path = f"predictions_{name}.parquet"
        assert (tmp_path / "out" / path).read_bytes() == (trained / path).read_bytes()


def test_a_signal_ends_with_its_code_and_the_run_resumes(trained, planted, mammostream, tmp_path, single_thread_environment):
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "mammostream",
        *shlex.split(train_line(planted, out).replace("--epochs 12", "--epochs 4000")),
    ]
    command += ["--early-stopping", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=single_thread_environment)
    while not (out / "last_aggregator.pth").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert "resume with --resume auto" in said
    assert not (out / ".training.lock").exists()
    epoch = load_checkpoint(out / "last_aggregator.pth", "aggregator")["epoch"]
    assert epoch >= 1
    other = mammostream(train_line(planted, out, "--resume auto"))
    assert "--epochs 4000, not 12" in other.error


def test_features_of_another_backbone_are_refused_by_name(trained, planted, mammostream, tmp_path):
    write_features(tmp_path / "f.parquet", planted_tiles(planted.films()), model="c" * 64)
    refused = mammostream(predict_line(trained, planted, tmp_path / "p.parquet", features=tmp_path / "f.parquet"))
    assert refused.code == 2
    assert "another backbone (checkpoint aaaaaaaaaaaa" in refused.error
    assert "cccccccccccc" in refused.error
    assert not (tmp_path / "p.parquet").exists()


def test_patients_that_the_backbone_learnt_from_are_known(planted, mammostream, tmp_path):
    films = planted.films()
    learnt = films.loc[films["split"] == "test", "patient_id"].unique()[:4]
    fitted_on = {"trained": subject_hashes(learnt, learnt).tolist()}
    write_features(tmp_path / "f.parquet", planted_tiles(films), fitted_on=fitted_on)
    line = train_line(planted, tmp_path / "out").replace(str(planted.features), str(tmp_path / "f.parquet"))
    outcome = mammostream(line.replace("--epochs 12", "--epochs 1"))
    assert outcome.code == 0, outcome.err
    assert "fitted on labels of the patients of 8 of 60 bags of split 'test'" in outcome.err
    found = pd.read_parquet(tmp_path / "out/test_predictions_gated.parquet")
    assert set(found.loc[found["seen"] == "trained", "patient_id"]) == set(learnt)
    assert set(found["seen"]) == {"trained", ""}


def test_embed_says_whom_the_backbone_was_fitted_on(finetuned, mammostream, tmp_path):
    classifier = finetuned.finetuned / "final_classification_model.pth"
    for path, purposes in ((finetuned.byol, {"pre-trained"}), (classifier, set(SEEN))):
        table = tmp_path / f"{path.stem}.parquet"
        line = f"embed --checkpoint {path} --shards {finetuned.shards} --split val --device cpu --output {table}"
        assert mammostream(line).code == 0
        fitted_on = open_features(table).fitted_on
        assert {purpose for purpose, hashes in fitted_on.items() if hashes} == purposes


def test_resuming_with_features_of_other_shards_is_refused(trained, planted, mammostream, tmp_path):
    write_features(tmp_path / "f.parquet", planted_tiles(planted.films()), inputs="d" * 64)
    line = train_line(planted, tmp_path / "o", f"--resume {trained}/last_aggregator.pth")
    refused = mammostream(line.replace(str(planted.features), str(tmp_path / "f.parquet")))
    assert "features of other shards" in refused.error


def test_other_checkpoints_are_refused(trained, finetuned, planted, mammostream, tmp_path):
    line = predict_line(trained, planted, tmp_path / "p.parquet")
    model = finetuned.finetuned / "final_classification_model.pth"
    refused = mammostream(line.replace(f"{trained}/final_aggregator.pth", str(model)))
    assert "holds a classifier model, not an aggregator model" in refused.error
    refused = mammostream(line.replace("final_aggregator", "last_aggregator"))
    assert "calibration" in refused.error
    embed = f"embed --checkpoint {trained}/final_aggregator.pth --shards {finetuned.shards} --device cpu"
    refused = mammostream(f"{embed} --output {tmp_path}/e.parquet")
    assert "holds an aggregator model, not a byol or classifier model" in refused.error
    refused = mammostream(
        predict_line(trained, planted, tmp_path / "p.parquet", f"--pooling mean --attention {tmp_path}/a.parquet")
    )
    assert "'mean' has no weights" in refused.error


def test_the_real_thing_from_embed(finetuned, mammostream, tmp_path):
    """Features of real tiles; the two films of the small run have one label each, which is nothing to learn from."""
    outcome = mammostream(
        f"embed --checkpoint {finetuned.byol} --shards {finetuned.shards} --device cpu --output {tmp_path}/f.parquet"
    )
    assert outcome.code == 0
    line = (
        f"aggregate train --features {tmp_path}/f.parquet --manifest {finetuned.manifest} --level image "
        f"--class-names simulated_calcification --output-dir {tmp_path}/out {SMALL}"
    )
    assert "bags of split 'train': nothing to tell apart" in mammostream(line).error
    assert (tmp_path / "out/problems.csv").exists()


def test_heads_that_know_positions_predict_as_they_were_trained(planted, mammostream, tmp_path):
    run = tmp_path / "out"
    assert mammostream(train_line(planted, run, "--position").replace("--epochs 12", "--epochs 2")).code == 0
    outcome = mammostream(predict_line(run, planted, tmp_path / "p.parquet"))
    assert outcome.code == 0, outcome.err
    one, other = pd.read_parquet(tmp_path / "p.parquet"), pd.read_parquet(run / "test_predictions_gated.parquet")
    pd.testing.assert_frame_equal(one, other)
