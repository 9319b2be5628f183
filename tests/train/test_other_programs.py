"""Checkpoints of other programs on the pipeline: a training starts from them, inference takes what it can know."""

from __future__ import annotations

import re

import imagecodecs
import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from mammostream.dali_pipelines import create_inference_transform
from mammostream.models.backbones import build_backbone
from mammostream.models.checkpoints import load_checkpoint, load_classifier
from mammostream.shards import open_shards


@pytest.mark.parametrize("kind", ["script", "torchvision"])
def test_a_training_starts_from_three_channel_weights(kind, finetuned, mammostream, tmp_path):
    torch.manual_seed(0)
    resnet = torchvision.models.resnet18(weights=None)
    script = nn.ModuleDict({"backbone": nn.Sequential(*list(resnet.children())[:-1])})
    saved = {"model_state_dict": script.state_dict()} if kind == "script" else resnet.state_dict()
    torch.save(saved, tmp_path / "old.pth")
    options = finetuned.finetune_options.replace(str(finetuned.byol), str(tmp_path / "old.pth"))
    outcome = mammostream(f"finetune {options} --output-dir {tmp_path}/run --epochs 1 --freeze-backbone-epochs 1")
    assert outcome.code == 0, outcome.err
    checkpoint = load_checkpoint(tmp_path / "run/final_classification_model.pth", "classifier")
    # Frozen, the backbone is the folded one; the shards say how the tiles are made, the folding what they are normalised by.
    folded = build_backbone("resnet18", tmp_path / "old.pth").state_dict()
    assert all(torch.equal(checkpoint["model_state_dict"][f"backbone.{name}"], tensor) for name, tensor in folded.items())
    assert checkpoint["preprocessing"] == open_shards(finetuned.shards).preprocessing | {"mean": 0.449, "std": 0.226}


def test_a_classifier_takes_tiles_but_no_films(sharp_classifier, finetuned, mammostream, tmp_path):
    checkpoint = load_checkpoint(sharp_classifier, "classifier")
    model = tmp_path / "other.pth"
    torch.save({"model_state_dict": checkpoint["model_state_dict"], "class_names": checkpoint["class_names"]}, model)
    tile = np.random.default_rng(0).integers(0, 65535, (512, 512), dtype=np.uint16)
    (tmp_path / "tile.png").write_bytes(imagecodecs.png_encode(tile))
    outcome = mammostream(f"infer --model-path {model} --device cpu --image-path {tmp_path}/tile.png")
    assert outcome.code == 0, outcome.err
    loaded = load_classifier(model)[0]
    with torch.no_grad():
        expected = loaded.classify(create_inference_transform()(tile)[None]).sigmoid()[0]
    for name, probability in zip(finetuned.classes, expected.tolist(), strict=True):
        assert re.search(rf"{name} *: {probability:.2f}", outcome.out), (outcome.out, expected)
    film = f"--image-path {finetuned.films}/1-280.dcm --assume-spacing 0.2"
    outcome = mammostream(f"infer --model-path {model} --device cpu {film}")
    assert outcome.code == 2
    assert "does not say how its tiles were made" in outcome.error
