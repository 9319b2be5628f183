"""ONNX: the same answers as torch from a file that says what it takes, of any batch size; or no file at all."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from mammostream.common.files import sha256_file
from mammostream.dali_pipelines import LabelledLoader
from mammostream.models import load_byol, load_classifier
from mammostream.models.checkpoints import load_checkpoint
from mammostream.shards import open_shards


@pytest.fixture(scope="module")
def real_tiles(finetuned):
    """40 normalised tiles of the shards."""
    shards = open_shards(finetuned.shards)
    loader = LabelledLoader(shards.shards(), batch_size=40, tile_size=finetuned.tile_size, mean=0.449, std=0.226)
    return next(iter(loader))[0].clone().contiguous()


@pytest.fixture(scope="module")
def exported(sharp_classifier, finetuned, run_cli, tmp_path_factory):
    """The sharp classifier with normalisation, and a BYOL model's features without."""
    folder = tmp_path_factory.mktemp("onnx")
    run_cli(
        f"export --model-path {sharp_classifier} --output {folder}/classifier.onnx --shards {finetuned.shards} "
        "--include-normalisation"
    )
    run_cli(f"export --model-path {finetuned.byol} --output {folder}/features.onnx --features")
    return folder


def session(path):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("count", [1, 7, 40])
def test_a_classifier_answers_as_torch_does(exported, sharp_classifier, real_tiles, count):
    grey = real_tiles[:count] * 0.226 + 0.449
    logits, probabilities = session(exported / "classifier.onnx").run(None, {"tiles": grey.numpy()})
    model, _, _ = load_classifier(sharp_classifier)
    temperature = load_checkpoint(sharp_classifier, "classifier").get("temperature") or 1.0
    with torch.no_grad():
        expected = model.classify(real_tiles[:count])
    assert count < 7 or expected.std() > 0.5  # the network says different things of different tiles
    np.testing.assert_allclose(logits, expected, atol=1e-3)
    np.testing.assert_allclose(probabilities, torch.sigmoid(expected / temperature), atol=1e-4)


def test_features_are_those_of_the_backbone(exported, finetuned, real_tiles):
    (features,) = session(exported / "features.onnx").run(None, {"tiles": real_tiles.numpy()})
    with torch.no_grad():
        expected = load_byol(finetuned.byol).get_features(real_tiles).numpy()
    assert features.shape == (40, 128)
    np.testing.assert_allclose(features, expected, atol=1e-4 * np.abs(expected).max())


def test_the_file_says_what_it_takes_and_what_it_came_from(exported, sharp_classifier, finetuned):
    checkpoint = load_checkpoint(sharp_classifier, "classifier")
    facts = session(exported / "classifier.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(facts["class_names"]) == checkpoint["class_names"]
    assert json.loads(facts["preprocessing"]) == checkpoint["preprocessing"]
    assert json.loads(facts["thresholds"]) == checkpoint.get("thresholds")
    assert facts["model_sha256"] == sha256_file(sharp_classifier)
    assert facts["input"] == "grey in [0, 1]"
    facts = session(exported / "features.onnx").get_modelmeta().custom_metadata_map
    assert facts["input"] == "grey in [0, 1], minus 0.449, divided by 0.226"
    assert "class_names" not in facts
    for name in ("classifier", "features"):
        onnx.checker.check_model(str(exported / f"{name}.onnx"), full_check=True)
        (tiles,) = session(exported / f"{name}.onnx").get_inputs()
        assert tiles.shape == ["batch", 1, finetuned.tile_size, finetuned.tile_size]
    assert {path.name for path in exported.iterdir()} == {"classifier.onnx", "features.onnx"}  # nothing next to them


def test_a_fitted_temperature_is_in_the_probabilities(sharp_classifier, run_cli, real_tiles, tmp_path):
    from mammostream.models.checkpoints import save_checkpoint

    checkpoint = load_checkpoint(sharp_classifier, "classifier") | {"temperature": 2.5, "thresholds": [0.3, None]}
    save_checkpoint(tmp_path / "model.pth", checkpoint)
    run_cli(f"export --model-path {tmp_path}/model.pth --output {tmp_path}/model.onnx")
    logits, probabilities = session(tmp_path / "model.onnx").run(None, {"tiles": real_tiles.numpy()})
    np.testing.assert_allclose(probabilities, 1 / (1 + np.exp(-logits / 2.5)), atol=1e-5)
    facts = session(tmp_path / "model.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(facts["thresholds"]) == [0.3, None]
    tile = json.loads(facts["calibration"])["tile"]["prob"]
    assert (tile["slope"], tile["intercept"], tile["thresholds"]) == ([0.4, 0.4], [0, 0], [0.3, None])


def test_a_file_that_differs_from_torch_is_not_written(mammostream, sharp_classifier, tmp_path):
    output = tmp_path / "model.onnx"
    output.write_bytes(b"old")
    outcome = mammostream(f"export --model-path {sharp_classifier} --output {output} --tolerance 1e-12")
    assert outcome.code == 2
    assert "differs from torch by" in outcome.error
    assert output.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_bad_input_is_one_line(mammostream, sharp_classifier, finetuned, tmp_path):
    for line, expected in (
        (f"--model-path {finetuned.byol} --output {tmp_path}/a.onnx", "holds a byol model"),
        (f"--model-path {tmp_path}/none.pth --output {tmp_path}/a.onnx", "does not exist"),
        (f"--model-path {sharp_classifier} --output {tmp_path}/a.pt", "does not end in .onnx"),
        (f"--model-path {sharp_classifier} --output {tmp_path}/a.onnx --shards {tmp_path}/none", "does not exist"),
    ):
        outcome = mammostream(f"export {line}")
        assert outcome.code == 2
        assert expected in outcome.error
    assert not list(tmp_path.iterdir())
