"""Long predictions: constant memory, kills, several processes, damaged shards; each against a run that nothing disturbed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from processes import Child, torchrun_to_end, with_this_code
from shard_sets import write_set

from mammostream.common.files import sha256_file
from mammostream.models.checkpoints import load_checkpoint, restore_byol, save_checkpoint
from mammostream.shards import open_shards
from mammostream.shards.archive import read_index, sample_key, write_index

COUNTS = (9, 0, 14, 5, 1, 33)
TABLES = ("predictions", "image_predictions", "breast_predictions")


@pytest.fixture(scope="module")
def shard_set(finetuned, tmp_path_factory):
    """Six shards of 62 tiles, one of them empty."""
    return write_set(open_shards(finetuned.shards), tmp_path_factory.mktemp("set"), COUNTS)


@pytest.fixture(scope="module")
def undisturbed(shard_set, sharp_classifier, run_cli, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    run_cli(f"infer --model-path {sharp_classifier} --shards {shard_set} --output-dir {folder} --device cpu")
    return folder


def assert_same_files(one: Path, other: Path) -> None:
    for name in TABLES:
        assert (one / f"{name}.parquet").read_bytes() == (other / f"{name}.parquet").read_bytes(), name


def command(model: Path, shards: Path, folder: Path, *more: str) -> list[str]:
    place = ["--model-path", str(model), "--shards", str(shards), "--output-dir", str(folder), "--device", "cpu"]
    return ["-m", "mammostream", "infer", *place, *more]


# ---------------------------------------------------------------- order, processes, kills


def test_the_table_is_complete_and_in_the_order_of_tile_numbers(shard_set, undisturbed, finetuned):
    truth = open_shards(shard_set).tiles().sort_values("tile")
    tiles = pd.read_parquet(undisturbed / "predictions.parquet")
    assert tiles["key"].tolist() == truth["key"].tolist()
    assert tiles[[f"prob:{name}" for name in finetuned.classes]].notna().all(axis=None)
    images = pd.read_parquet(undisturbed / "image_predictions.parquet").set_index("image_id")
    assert len(images) == 2 * len(COUNTS)
    empty = images.loc[["f1L", "f1R"]]  # of the shard without tiles
    assert (empty["reason"] == "no breast found").all()
    assert (empty["tiles"] == 0).all()
    assert sorted(path.name for path in undisturbed.iterdir()) == [
        *("breast_predictions.parquet", "config.yaml", "image_predictions.parquet", "infer.json", "predictions.parquet"),
        *(f"top_tiles_{name}.png" for name in sorted(finetuned.classes)),
    ]


def test_two_processes_write_what_one_writes(shard_set, sharp_classifier, undisturbed, single_thread_environment, tmp_path):
    torchrun_to_end(
        command(sharp_classifier, shard_set, tmp_path)[:1]
        + ["mammostream.train.infer"]
        + command(sharp_classifier, shard_set, tmp_path)[3:],
        single_thread_environment,
    )
    assert_same_files(tmp_path, undisturbed)


def test_a_killed_run_goes_on_and_leaves_the_same_table(
    finetuned, sharp_classifier, run_cli, mammostream, single_thread_environment, tmp_path, capfd
):
    shards = write_set(open_shards(finetuned.shards), tmp_path / "set", (60,) * 12)
    whole = tmp_path / "whole"
    run_cli(f"infer --model-path {sharp_classifier} --shards {shards} --output-dir {whole} --device cpu")
    folder = tmp_path / "killed"
    child = Child([sys.executable, *command(sharp_classifier, shards, folder)], tmp_path / "log", single_thread_environment)
    child.wait_until(lambda: list((folder / "parts").glob("val-0000*[0-9].parquet")))
    child.process.send_signal(signal.SIGKILL)
    assert child.end() == -signal.SIGKILL
    finished = sorted((folder / "parts").glob("val-0000*[0-9].parquet"))
    assert 0 < len(finished) < 12
    assert not list(folder.glob("*predictions*"))
    # Another model, or other options, are not mixed in.
    for options, flag in (
        ("--temperature 2", "--temperature"),
        ("--precision bf16", "--precision"),
        ("--split val", "--shards"),
    ):
        outcome = mammostream(
            f"infer --model-path {sharp_classifier} --shards {shards} --output-dir {folder} --device cpu {options}"
        )
        assert outcome.code == 2
        assert f"made with another {flag}" in outcome.error
    # What is finished is not read again: its tar is gone.
    for path in finished:
        (shards / f"{path.stem}.tar").unlink()
    run_cli(f"infer --model-path {sharp_classifier} --shards {shards} --output-dir {folder} --device cpu")
    assert_same_files(folder, whole)
    assert not (folder / "parts").exists()
    assert "no contact sheets: shard" in capfd.readouterr().err  # their tiles are gone


def test_a_finished_run_is_not_made_again_nor_replaced(shard_set, sharp_classifier, undisturbed, mammostream):
    predict = f"infer --model-path {sharp_classifier} --shards {shard_set} --output-dir {undisturbed} --device cpu"
    before = {path: path.stat().st_mtime_ns for path in undisturbed.iterdir()}
    outcome = mammostream(predict)
    assert outcome.code == 0
    assert "holds these predictions already" in outcome.out
    for options, flag in (("--threshold 0.9", "--threshold"), ("--top-tiles 2", "--top-tiles"), ("--format csv", "--format")):
        assert f"holds the predictions of another {flag}" in mammostream(f"{predict} {options}").error
    assert before == {path: path.stat().st_mtime_ns for path in undisturbed.iterdir()}


def test_ten_times_the_shards_take_no_more_memory(finetuned, sharp_classifier, single_thread_environment, tmp_path):
    """Peak resident memory of a whole process; undecoded tiles, so that mapped tars would show."""
    checkpoint = load_checkpoint(sharp_classifier, "classifier")
    checkpoint["preprocessing"]["tile_size"] = 64
    model = tmp_path / "model.pth"
    save_checkpoint(model, checkpoint)
    rng = np.random.default_rng(0)
    tiles = [rng.integers(0, 2**16, (64, 64), dtype=np.uint16) for _ in range(8)]
    peaks = []
    for shards in (2, 20):
        place = write_set(open_shards(finetuned.shards), tmp_path / f"set{shards}", (80,) * shards, "raw", tiles)
        meta = json.loads((place / "shards.json").read_text())
        meta["preprocessing"]["tile_size"] = 64
        (place / "shards.json").write_text(json.dumps(meta))
        line = [sys.executable, *command(model, place, tmp_path / f"out{shards}", "--batch-size", "64")]
        child = subprocess.Popen(
            line, env=with_this_code(single_thread_environment), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        assert child.returncode == 0
        peaks.append(usage.ru_maxrss)
        assert pq.read_metadata(tmp_path / f"out{shards}/predictions.parquet").num_rows == 80 * shards
        shutil.rmtree(place)
    assert peaks[1] < 1.05 * peaks[0]


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("codec", ["tif", "png", "raw"])
def test_what_is_damaged_is_a_row_with_its_reason_and_the_rest_goes_on(
    finetuned, sharp_classifier, mammostream, tmp_path, codec
):
    shards = write_set(open_shards(finetuned.shards), tmp_path / "set", (40, 40, 6, 6, 6, 6), codec)
    predict = f"infer --model-path {sharp_classifier} --shards {shards} --device cpu --batch-size 8"
    assert mammostream(f"{predict} --output-dir {tmp_path}/clean").code == 0
    expected = pd.read_parquet(tmp_path / "clean/predictions.parquet").set_index("key")

    wanted = {}  # key -> what its reason names

    def samples(ordinal):
        return read_index(shards / f"val-{ordinal:06d}.idx")

    def overwrite(ordinal, position, extension, data):
        sample = samples(ordinal)[position]
        member = next(m for m in sample if m.extension == extension)
        with (shards / f"val-{ordinal:06d}.tar").open("r+b") as file:
            file.seek(member.offset)
            file.write(data[: member.size])
        return sample_key(sample)

    for position in (0, 17, 18, 39):  # the first, two in one batch, the last
        wanted[overwrite(0, position, codec, b"\x00garbage" * 8)] = "changed since it was built"
    wanted[overwrite(1, 5, "num", (2**30).to_bytes(8, "little"))] = "its number"
    cut = shards / "val-000002.tar"
    end = samples(2)[3][0].offset + 10
    cut.write_bytes(cut.read_bytes()[:end])
    wanted |= {sample_key(sample): "cut short" for sample in samples(2)[3:]}
    (shards / "val-000003.tar").unlink()
    wanted |= {sample_key(sample): "does not exist" for sample in samples(3)}
    index = samples(4)
    write_index(shards / "val-000004.idx", index[:2] + index[3:])
    wanted[sample_key(index[2])] = "the index"
    wanted |= {sample_key(sample): "is damaged" for sample in samples(5)}
    (shards / "val-000005.idx").write_text("no index\n")

    outcome = mammostream(f"{predict} --output-dir {tmp_path}/out --max-bad 100%")
    assert outcome.code == 0, outcome.err
    assert f"{len(wanted)} tiles failed" in outcome.out
    tiles = pd.read_parquet(tmp_path / "out/predictions.parquet").set_index("key")
    assert tiles.index.tolist() == expected.index.tolist()
    bad = tiles["reason"] != ""
    assert set(tiles.index[bad]) == set(wanted)
    for key, words in wanted.items():
        assert words in tiles.loc[key, "reason"], key
    for name in finetuned.classes:
        column = f"prob:{name}"
        assert tiles.loc[bad, column].isna().all()
        np.testing.assert_allclose(tiles.loc[~bad, column], expected.loc[~bad, column], atol=1e-5)
    images = pd.read_parquet(tmp_path / "out/image_predictions.parquet").set_index("image_id")
    lost = ["f3L", "f3R", "f5L", "f5R"]
    assert images.index[images["reason"] != ""].tolist() == lost
    assert images["failed_tiles"].sum() == len(wanted)
    for image_id, rows in tiles[~bad].groupby("image_id"):
        assert images.loc[image_id, "tiles"] == len(rows)

    outcome = mammostream(f"{predict} --output-dir {tmp_path}/strict")
    assert outcome.code == 3
    assert f"{len(wanted)} of 104 tiles failed, more than --max-bad 5%" in outcome.error
    assert_same_files(tmp_path / "out", tmp_path / "strict")


def test_a_bad_tile_image_is_a_row_with_its_reason(finetuned, sharp_classifier, mammostream, run_cli, tmp_path):
    run_cli(f"shards unpack {finetuned.shards} --split val --output-dir {tmp_path}/tiles")
    paths = sorted((tmp_path / "tiles").glob("*.png"))
    for path in paths[20:]:
        path.unlink()
    paths[3].write_bytes(paths[3].read_bytes()[:200])
    predict = f"infer --model-path {sharp_classifier} --images-dir {tmp_path}/tiles --device cpu --batch-size 8"
    outcome = mammostream(f"{predict} --output-dir {tmp_path}/out --output-json {tmp_path}/out.json")
    assert outcome.code == 0, outcome.err
    tiles = pd.read_parquet(tmp_path / "out/predictions.parquet")
    assert tiles["key"].tolist() == [path.stem for path in paths[:20]]
    assert tiles.index[tiles["reason"] != ""].tolist() == [3]
    assert paths[3].name in tiles["reason"][3]
    assert tiles[f"prob:{finetuned.classes[0]}"].isna().tolist() == [n == 3 for n in range(20)]
    errors = [record for record in json.loads((tmp_path / "out.json").read_text())["images"] if "error" in record]
    assert [record["image"] for record in errors] == [str(paths[3])]


# ---------------------------------------------------------------- outputs


def test_every_format_says_the_same_and_evaluates_alike(
    shard_set, sharp_classifier, undisturbed, finetuned, run_cli, mammostream, tmp_path
):
    """Parquet and JSON carry the checkpoint's thresholds to the evaluation; a CSV is given the model."""
    checkpoint = load_checkpoint(sharp_classifier, "classifier")
    model = tmp_path / "model.pth"
    save_checkpoint(model, checkpoint | {"thresholds": [0.3, None], "temperature": 2.0})
    labels = pd.read_parquet(undisturbed / "predictions.parquet")[["key"]].rename(columns={"key": "tile_path"})
    labels["bright"] = np.arange(len(labels)) % 2
    labels[finetuned.classes[0]] = np.arange(len(labels)) % 3 == 0
    labels[finetuned.classes[0]] = labels[finetuned.classes[0]].astype(int)
    labels.to_csv(tmp_path / "labels.csv", index=False)
    plain = pd.read_parquet(undisturbed / "predictions.parquet")
    said = []
    for kind in ("parquet", "csv", "json"):
        run_cli(f"infer --model-path {model} --shards {shard_set} --output-dir {tmp_path}/{kind} --device cpu --format {kind}")
        path = tmp_path / kind / f"predictions.{kind}"
        given = f"--model-path {model}" if kind == "csv" else ""
        run_cli(
            f"evaluate --predictions {path} --labels {tmp_path}/labels.csv --output-dir {path.parent}/e --bootstrap 0 {given}"
        )
        said.append(json.loads((tmp_path / kind / "e/metrics.json").read_text()))
    assert said[0]["rows"] == sum(COUNTS)
    thresholds = [said[0]["per_class"][name]["threshold"] for name in finetuned.classes]
    assert thresholds == pytest.approx([0.3, 0.5])
    for other in said[1:]:
        for name in finetuned.classes:
            for figure, value in said[0]["per_class"][name].items():
                if isinstance(value, float):
                    assert other["per_class"][name][figure] == pytest.approx(value, abs=1e-6)
    warm = pd.read_parquet(tmp_path / "parquet/predictions.parquet")
    logits = torch.from_numpy(plain["prob:bright"].to_numpy(np.float64)).logit()
    np.testing.assert_allclose(warm["prob:bright"], (logits / 2).sigmoid(), atol=1e-5)
    facts = json.loads(pq.read_schema(tmp_path / "parquet/predictions.parquet").metadata[b"mammostream"])
    assert facts["thresholds"] == {finetuned.classes[0]: 0.3, "bright": 0.5}
    assert facts["temperature"] == 2.0
    assert facts["class_names"] == finetuned.classes
    assert facts["model_sha256"] == sha256_file(model)
    assert facts["versions"]["torch"]
    # Another temperature moves the thresholds along: the same tiles are found.
    run_cli(f"infer --model-path {model} --shards {shard_set} --output-dir {tmp_path}/t1 --device cpu --temperature 1")
    cold = pd.read_parquet(tmp_path / "t1/predictions.parquet")
    moved = json.loads((tmp_path / "t1/infer.json").read_text())["thresholds"]
    column = f"prob:{finetuned.classes[0]}"
    assert ((cold[column] >= moved[finetuned.classes[0]]) == (warm[column] >= 0.3)).all()
    assert moved[finetuned.classes[0]] != 0.3
    assert (
        "--embeddings needs"
        in mammostream(
            f"infer --model-path {model} --shards {shard_set} --output-dir {tmp_path}/no --format csv --embeddings"
        ).error
    )


def test_features_come_with_predictions_and_alone(shard_set, sharp_classifier, finetuned, run_cli, tmp_path):
    from mammostream.dali_pipelines import LabelledLoader

    checkpoint = load_checkpoint(finetuned.byol, "byol")
    model, record = restore_byol(checkpoint, finetuned.byol), checkpoint["preprocessing"]
    loader = LabelledLoader(
        open_shards(shard_set).shards(), batch_size=16, tile_size=record["tile_size"], mean=record["mean"], std=record["std"]
    )
    with torch.no_grad():
        expected = torch.cat([model.get_features(tiles) for tiles, _ in loader]).numpy()
    run_cli(f"embed --checkpoint {finetuned.byol} --shards {shard_set} --output {tmp_path}/byol.parquet --device cpu")
    alone = pd.read_parquet(tmp_path / "byol.parquet")
    assert alone["key"].tolist() == open_shards(shard_set).tiles().sort_values("tile")["key"].tolist()
    np.testing.assert_allclose(np.stack(alone["features"]), expected, rtol=1e-3, atol=1e-4)
    assert not list(tmp_path.glob("*.parts"))
    run_cli(f"embed --checkpoint {sharp_classifier} --shards {shard_set} --output {tmp_path}/classifier.parquet --device cpu")
    run_cli(f"infer --model-path {sharp_classifier} --shards {shard_set} --output-dir {tmp_path}/out --device cpu --embeddings")
    one, other = pd.read_parquet(tmp_path / "classifier.parquet"), pd.read_parquet(tmp_path / "out/predictions.parquet")
    assert (np.stack(one["features"]) == np.stack(other["features"])).all()
    assert not np.allclose(np.stack(one["features"]), expected, atol=1e-2)
