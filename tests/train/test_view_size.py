"""A network that learnt from views smaller than the tiles is shown tiles at that scale ever after."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from mammostream.models.backbones import encode
from mammostream.models.checkpoints import load_checkpoint
from mammostream.shards import open_shards
from mammostream.train.probe.config import ProbeConfig
from mammostream.train.probe.features import cached_features, checkpoint_network
from mammostream.train.probe.labelled import read_probe_set
from mammostream.train.run.runtime import resolve_runtime

VIEW = 16


@pytest.fixture(scope="module")
def small_views(road, run_cli, tmp_path_factory):
    """A pre-training and a fine-tuning with views of half the tiles' edge."""
    folder = tmp_path_factory.mktemp("small_views")
    options = road.pretrain_options.replace("--epochs 4", "--epochs 1")
    run_cli(f"pretrain --shards {road.shards} {options} --view-size {VIEW} --output-dir {folder}/pretrain")
    byol = folder / "pretrain/mammogram_byol_final.pth"
    finetune = road.finetune_options.replace(str(road.byol), str(byol))
    run_cli(f"finetune {finetune} --epochs 1 --output-dir {folder}/finetune")
    return folder


def test_the_view_size_is_in_the_checkpoints(small_views, road):
    for name in ("pretrain/mammogram_byol_final.pth", "finetune/final_classification_model.pth"):
        record = load_checkpoint(small_views / name, None)["preprocessing"]
        assert (record["tile_size"], record["view_size"]) == (road.tile_size, VIEW)


@pytest.fixture
def seen_sizes(monkeypatch):
    """The edges of all tiles that a backbone is given."""
    sizes = set()

    def recorded(backbone, x):
        sizes.add(x.shape[-1])
        return encode(backbone, x)

    for module in ("train.probe.features", "train.predict.network", "models.classifier", "models.byol"):
        monkeypatch.setattr(f"mammostream.{module}.encode", recorded)
    return sizes


def test_probe_finetuning_and_inference_show_tiles_at_that_scale(small_views, road, seen_sizes, run_cli, tmp_path):
    byol, model = small_views / "pretrain/mammogram_byol_final.pth", small_views / "finetune/final_classification_model.pth"
    shards = open_shards(road.shards)
    network, _ = checkpoint_network(byol, "byol", shards)
    config = ProbeConfig(device="cpu", batch_size=16, num_workers=2)
    both = pd.concat([pd.read_csv(road.train_csv), pd.read_csv(road.val_csv)])
    both.to_csv(tmp_path / "both.csv", index=False)
    probe_set = read_probe_set(tmp_path / "both.csv", road.classes, shards)
    cached_features(network, 0, probe_set, resolve_runtime(config), config, tmp_path)
    assert seen_sizes == {VIEW}
    finetune = road.finetune_options.replace(str(road.byol), str(byol))
    run_cli(f"finetune {finetune} --epochs 1 --output-dir {tmp_path}/finetune")
    run_cli(f"infer --model-path {model} --shards {road.shards} --output-dir {tmp_path}/a --device cpu --sheet-tiles 2")
    assert seen_sizes == {VIEW}


def test_raw_films_are_shown_as_their_shards_are(small_views, road, run_cli, tmp_path):
    model = small_views / "finetune/final_classification_model.pth"
    predict = f"infer --model-path {model} --device cpu --sheet-tiles 2"
    run_cli(f"{predict} --shards {road.shards} --output-dir {tmp_path}/shards")
    run_cli(f"{predict} --manifest {road.manifest} --output-dir {tmp_path}/films")
    one, other = (
        pd.read_parquet(tmp_path / name / "predictions.parquet").set_index("key").sort_index() for name in ("shards", "films")
    )
    assert one.index.tolist() == other.index.tolist()
    for name in road.classes:
        np.testing.assert_allclose(one[f"prob:{name}"], other[f"prob:{name}"], atol=1e-3)


def test_the_exported_network_takes_tiles_of_that_size(small_views, run_cli, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    run_cli(f"export --model-path {small_views}/finetune/final_classification_model.pth --output {tmp_path}/m.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    logits, _ = session.run(None, {"tiles": torch.zeros(3, 1, VIEW, VIEW).numpy()})
    assert logits.shape == (3, 2)


def test_tiles_of_another_size_keep_the_scale():
    from mammostream.shards.reading import view_size_of

    learnt = {"tile_size": 512, "view_size": 256}
    assert [view_size_of(learnt, size) for size in (512, 256, 1024)] == [256, 128, 512]
    assert view_size_of({"tile_size": 512}, 256) is None
