"""The commands of training: bad input ends with exit code 2 and one line, and a config file gives defaults."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import yaml

from mammostream.models.checkpoints import load_checkpoint
from mammostream.train.byol.run import CHECKPOINT_NAME

# What is wrong -> the command and a part of its one line. {road} etc. are filled in below.
PRETRAIN = "pretrain --shards {shards} --output-dir {out} --arch resnet18_narrow --epochs 1 {small}"
FINETUNE = (
    "finetune --byol-checkpoint {byol} --train-csv {train} --val-csv {val} --shards {shards} --class-names bright "
    "--output-dir {out} --epochs 1 {small}"
)
INFER = "infer --model-path {classifier} --shards {shards} --output-dir {out} --device cpu"
BAD = {
    "unknown class": (f"{FINETUNE} --class-names brigth", "has no class 'brigth' (did you mean 'bright'?)"),
    "no labels": (FINETUNE.replace("{train}", "{tmp}/gone.csv"), "gone.csv does not exist"),
    "a patient on both sides": (FINETUNE.replace("{val}", "{train}"), "in both --train-csv and --val-csv: 1 patient (P_"),
    "two sources of tiles": (f"{FINETUNE} --tiles-dir {{tmp}}", "give either --tiles-dir or --shards"),
    "no source of tiles": (FINETUNE.replace("--shards {shards}", ""), "give either --tiles-dir or --shards"),
    "another architecture": (f"{FINETUNE} --arch resnet50", "holds resnet18_narrow, not resnet50; pass --arch resnet18_narrow"),
    "a classifier for a BYOL model": (FINETUNE.replace("{byol}", "{classifier}"), "holds a classifier model, not a byol model"),
    "no checkpoint": (FINETUNE.replace("{byol}", "{tmp}/gone.pth"), "gone.pth does not exist"),
    "garbage for a checkpoint": (FINETUNE.replace("{byol}", "{tmp}/garbage.pth"), "garbage.pth is damaged"),
    "a folder for a checkpoint": (FINETUNE.replace("{byol}", "{tmp}"), "is not a file"),
    "no tiles at all": (f"{FINETUNE} --max-samples 0", "--max-samples 0 is not positive"),
    "a finetuning config with an unknown key": (
        f"{FINETUNE} --config {{tmp}}/unknown.yaml",
        "'batch_sise' (did you mean 'batch_size'?)",
    ),
    "weights for other classes": (f"{FINETUNE} --pos-weight 1 2", "--pos-weight has 2 values for 1 classes"),
    "a seed that is none": (f"{FINETUNE} --seeds 1 x", "--seeds 1 x: give different whole numbers"),
    "shards that are none": (PRETRAIN.replace("{shards}", "{tmp}"), "has no shards.json: it is not a finished shard directory"),
    "shards that are nowhere": (PRETRAIN.replace("{shards}", "{tmp}/gone"), "gone does not exist"),
    "a batch above the tiles": (f"{PRETRAIN} --batch-size 4000", "fill no batch of 4000"),
    "unknown architecture": (f"{PRETRAIN} --arch resnet19", "resnet19"),
    "unknown option": (f"{PRETRAIN} --batchsize 4", "--batchsize"),
    "a word for a number": (f"{PRETRAIN} --epochs many", "many"),
    "a missing option": ("pretrain --output-dir {out}", "--shards"),
    "weights that are nowhere": (f"{PRETRAIN} --weights {{tmp}}/gone.pth", "gone.pth does not exist"),
    "a file for the output": (
        f"{PRETRAIN.replace('{out}', '{tmp}/garbage.pth')} --batch-size 8 --limit-tiles 8",
        "garbage.pth",
    ),
    "config with an unknown key": (f"{PRETRAIN} --config {{tmp}}/unknown.yaml", "'batch_sise' (did you mean 'batch_size'?)"),
    "config that is no mapping": (f"{PRETRAIN} --config {{tmp}}/list.json", "list.json holds no mapping"),
    "config that is garbage": (f"{PRETRAIN} --config {{tmp}}/garbage.json", "is neither YAML nor JSON"),
    "config that is nowhere": (f"{PRETRAIN} --config {{tmp}}/gone.yaml", "gone.yaml does not exist"),
    "a BYOL model for a classifier": (INFER.replace("{classifier}", "{byol}"), "holds a byol model, not a classifier model"),
    "garbage for a classifier": (INFER.replace("{classifier}", "{tmp}/garbage.pth"), "garbage.pth is damaged"),
    "two things to predict": (f"{INFER} --image-path x.dcm", "give one of --shards"),
    "no place for predictions": (INFER.replace("--output-dir {out}", ""), "give --output-dir or --output-json"),
    "a split without tiles": (f"{INFER} --split test", "has no tiles of split 'test'"),
    "a threshold beyond 1": (f"{INFER} --threshold 1.5", "--threshold 1.5"),
    "a film that is nowhere": (
        "infer --model-path {classifier} --image-path {tmp}/gone.dcm --device cpu",
        "gone.dcm does not exist",
    ),
    "no run to report": ("report {tmp}/gone", "gone does not exist"),
}


@pytest.fixture
def places(finetuned, sharp_classifier, tmp_path):
    (tmp_path / "garbage.pth").write_bytes(b"\x00garbage" * 100)
    (tmp_path / "garbage.json").write_text("{never closed")
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "unknown.yaml").write_text("epochs: 1\nbatch_sise: 8\n")
    return {
        "shards": finetuned.shards,
        "out": tmp_path / "out",
        "small": finetuned.small,
        "byol": finetuned.byol,
        "train": finetuned.train_csv,
        "val": finetuned.val_csv,
        "classifier": sharp_classifier,
        "tmp": tmp_path,
    }


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_line_and_leaves_no_run_behind(what, places, mammostream):
    command, message = BAD[what]
    outcome = mammostream(command.format(**places))
    assert outcome.code == 2
    assert message in outcome.error
    assert not list(places["out"].glob("*")), "what was refused left files"


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_a_config_file_gives_defaults_and_flags_win(road, mammostream, tmp_path, suffix):
    options = {"epochs": 3, "batch-size": 4, "limit_tiles": 8, "hidden_dim": 32, "proj_dim": 16, "arch": "resnet18_narrow"}
    path = tmp_path / f"config.{suffix}"
    path.write_text(json.dumps(options) if suffix == "json" else yaml.safe_dump(options))
    out = tmp_path / "run"
    outcome = mammostream(
        f"pretrain --shards {road.shards} --output-dir {out} --epochs 1 --config {path} --proj_dim 8 {road.small}"
    )
    assert outcome.code == 0, outcome.err
    resolved = yaml.safe_load((out / "config.yaml").read_text())
    wanted = {
        "epochs": 1,
        "batch_size": 4,
        "limit_tiles": 8,
        "hidden_dim": 32,
        "proj_dim": 8,
        "arch": "resnet18_narrow",
        "seed": 0,
    }
    assert {name: resolved[name] for name in wanted} == wanted
    checkpoint = load_checkpoint(out / CHECKPOINT_NAME.format("final"), "byol")
    assert {name: checkpoint["config"][name] for name in wanted} == wanted
    assert checkpoint["step"] == 2
    assert checkpoint["model_state_dict"]["projection_head.3.weight"].shape == (8, 32)


def test_a_runs_own_record_runs_it_again(finetuned, mammostream, tmp_path):
    """config.yaml of a run is a config file: only its place changes, and the same run comes out."""
    outcome = mammostream(f"finetune --config {finetuned.finetuned}/config.yaml --output-dir {tmp_path}")
    assert outcome.code == 0, outcome.err
    assert json.loads((tmp_path / "metrics.json").read_text()) == json.loads((finetuned.finetuned / "metrics.json").read_text())


def test_class_names_come_by_spaces_commas_or_from_a_config(finetuned, mammostream, tmp_path):
    (tmp_path / "one.yaml").write_text("class_names: bright\n")
    (tmp_path / "two.json").write_text(json.dumps({"class_names": ["bright", "simulated_calcification"]}))
    base = FINETUNE.replace("--class-names bright ", "").format(
        byol=finetuned.byol,
        train=finetuned.train_csv,
        val=finetuned.train_csv,  # refused for its patients, after the classes were read
        shards=finetuned.shards,
        out=tmp_path / "out",
        small=finetuned.small,
    )
    for spelling in (
        "--class-names bright simulated_calcification",
        "--class-names bright,simulated_calcification",
        "--class_names=bright --class-names simulated_calcification",
        f"--config {tmp_path}/one.yaml",
        f"--config {tmp_path}/two.json",
    ):
        assert "in both --train-csv and --val-csv: 1 patient (P_" in mammostream(f"{base} {spelling}").error
    assert "--class-names" in mammostream(base).error


def test_the_report_names_its_place(finetuned, mammostream, tmp_path):
    outcome = mammostream(f"report {finetuned.root} --output {tmp_path}/page.html")
    assert outcome.code == 0
    assert f"{tmp_path}/page.html" in outcome.out
    assert (tmp_path / "page.html").stat().st_size > 10_000


def test_inference_writes_no_more_than_asked(finetuned, sharp_classifier, mammostream, tmp_path):
    outcome = mammostream(
        f"infer --model_path {sharp_classifier} --shards {finetuned.shards} --split val --output_json {tmp_path}/out.json "
        "--device cpu"
    )
    assert outcome.code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    images = json.loads((tmp_path / "out.json").read_text())["images"]
    labels = pd.read_csv(finetuned.val_csv)
    assert sum(image["tiles"] for image in images) == len(labels)
