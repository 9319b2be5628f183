"""Fine-tuning: the loss, the frozen phase, two learning rates, a run's files, and figures that inference confirms."""

from __future__ import annotations

import json
import re

import imagecodecs
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from dali_pipelines import LabelledLoader
from models.checkpoints import load_checkpoint
from shards import open_shards
from train.finetune import masked_bce
from train.pictures import read_metrics

# ---------------------------------------------------------------- the loss


def reference_bce(logits: np.ndarray, labels: np.ndarray, smoothing: float) -> float:
    """The mean over known labels of -(y log p + (1 - y) log(1 - p)), in float64, written so that nothing overflows."""
    x = logits.astype(np.float64)
    y = labels * (1 - smoothing) + smoothing / 2
    losses = y * np.logaddexp(0, -x) + (1 - y) * np.logaddexp(0, x)
    known = ~np.isnan(labels)
    return losses[known].mean() if known.any() else 0.0


@settings(max_examples=100)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 9),
    st.integers(1, 4),
    st.just(0.0) | st.floats(1e-3, 0.9),
    st.sampled_from([0.0, 0.3, 1.0]),
)
def test_the_loss_is_the_mean_over_known_labels(seed, rows, classes, smoothing, missing):
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((rows, classes)) * rng.choice([0.1, 5, 60])).astype(np.float32)
    labels = rng.integers(0, 2, (rows, classes)).astype(np.float32)
    labels[rng.random((rows, classes)) < missing] = np.nan
    tensor = torch.from_numpy(logits).requires_grad_()
    loss = masked_bce(tensor, torch.from_numpy(labels), smoothing)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference_bce(logits, labels, smoothing), rel=1e-4, abs=1e-6)
    loss.backward()
    assert torch.isfinite(tensor.grad).all()
    assert (tensor.grad.numpy()[np.isnan(labels)] == 0).all()


def test_the_loss_is_float32_whatever_the_logits():
    logits = torch.tensor([[3.3, -1.2]], dtype=torch.bfloat16)
    loss = masked_bce(logits, torch.tensor([[1.0, torch.nan]]), 0.1)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference_bce(logits.float().numpy(), np.array([[1, np.nan]]), 0.1), rel=1e-5)


# ---------------------------------------------------------------- phases and learning rates


def backbone_of(state):
    return {name: tensor for name, tensor in state.items() if name.startswith("backbone.")}


def largest_change(state, before, part):
    names = [name for name in before if name.startswith(part) and name.endswith((".weight", ".bias"))]
    return max((state[name] - before[name]).abs().max().item() for name in names)


def test_the_backbone_is_frozen_for_ten_epochs_then_trained(pretrained, run_cli, tmp_path):
    run_cli(
        f"finetune {pretrained.finetune_options} --output-dir {tmp_path} --epochs 11 --freeze-backbone-epochs 10 "
        "--lr-backbone 1e-2 --max-samples 32"
    )
    names = {path.name for path in tmp_path.glob("*.pth")}
    assert names == {"best_classification_model.pth", "classification_epoch_10.pth", "final_classification_model.pth"}
    before = backbone_of(load_checkpoint(pretrained.byol, "byol")["model_state_dict"])
    tenth, final = (load_checkpoint(tmp_path / name, "classifier") for name in sorted(names)[1:])
    assert (tenth["epoch"], final["epoch"]) == (10, 11)

    frozen, trained = backbone_of(tenth["model_state_dict"]), backbone_of(final["model_state_dict"])
    assert frozen.keys() == before.keys()
    assert any("running_mean" in name for name in before)
    for name, tensor in before.items():  # parameters and the batch norms' statistics
        assert torch.equal(frozen[name], tensor), name
    unchanged = [name for name, tensor in before.items() if torch.equal(trained[name], tensor)]
    assert unchanged == []
    head = "classification_head.0.weight"
    assert not torch.equal(tenth["model_state_dict"][head], final["model_state_dict"][head])

    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["lr_backbone"] > 0 for line in lines[:10]] == [False] * 10
    assert len(lines) == 11
    best = load_checkpoint(tmp_path / "best_classification_model.pth", "classifier")
    aucs = [line["mean_auc"] for line in lines]
    assert best["epoch"] == 1 + aucs.index(max(aucs))
    assert best["metrics"]["mean_auc"] == pytest.approx(max(aucs))


def test_backbone_and_head_have_their_own_learning_rates(pretrained, run_cli, tmp_path):
    """AdamW's first step is as long as the learning rate, whatever the gradient."""
    states = []
    for name, rates in (("still", "--lr-backbone 0 --lr-head 0"), ("moved", "--lr-backbone 1e-4 --lr-head 1e-2")):
        run_cli(
            f"finetune {pretrained.finetune_options} --output-dir {tmp_path}/{name} --epochs 1 --freeze-backbone-epochs 0 "
            f"--max-samples 16 {rates}"
        )
        final = load_checkpoint(tmp_path / name / "final_classification_model.pth", "classifier")
        assert final["step"] == 1
        states.append(final["model_state_dict"])
    still, moved = states
    pretrained_state = load_checkpoint(pretrained.byol, "byol")["model_state_dict"]
    assert largest_change(still, backbone_of(pretrained_state), "backbone") == 0
    assert largest_change(moved, backbone_of(pretrained_state), "backbone") == pytest.approx(1e-4, rel=0.05)
    assert largest_change(moved, still, "classification_head") == pytest.approx(1e-2, rel=0.05)


# ---------------------------------------------------------------- a run's files


def assert_metrics_are_those_of(predictions: pd.DataFrame, labels: pd.DataFrame, metrics: dict, classes: list[str]):
    joined = labels.merge(predictions, left_on="tile_path", right_on="key", validate="one_to_one")
    assert len(joined) == len(labels)
    aucs = []
    for name in classes:
        known = joined[joined[name].notna()]
        y, p = known[name], known[f"prob:{name}"]
        figures = metrics["per_class"][name]
        aucs.append(roc_auc_score(y, p))
        assert p.nunique() > len(p) / 2  # a network that says one thing everywhere would prove nothing
        assert figures["auc"] == pytest.approx(aucs[-1], abs=1e-6)
        assert figures["ap"] == pytest.approx(average_precision_score(y, p), abs=1e-6)
        assert (figures["positives"], figures["negatives"]) == (int(y.sum()), int((1 - y).sum()))
    assert metrics["mean_auc"] == pytest.approx(np.mean(aucs), abs=1e-6)


def test_the_reported_figures_are_those_of_the_predictions(finetuned, run_cli, tmp_path):
    folder = finetuned.finetuned
    run_cli(
        f"infer --model-path {folder}/final_classification_model.pth --shards {finetuned.shards} --split val "
        f"--output-dir {tmp_path} --device cpu"
    )
    metrics = json.loads((folder / "metrics.json").read_text())
    labels = pd.read_csv(finetuned.val_csv)
    labels = labels[labels[finetuned.classes].notna().any(axis=1)]
    assert labels[finetuned.classes].isna().any().all()  # both classes have cells left empty
    assert_metrics_are_those_of(pd.read_parquet(tmp_path / "predictions.parquet"), labels, metrics, finetuned.classes)
    assert metrics["epoch"] == 2
    assert (metrics["films"], metrics["patients"]) == (1, 1)
    last = read_metrics(folder / "metrics.jsonl")[-1]
    assert last["mean_auc"] == pytest.approx(metrics["mean_auc"])


def test_a_run_writes_what_inference_needs(finetuned):
    folder = finetuned.finetuned
    for name in ("best", "final"):
        checkpoint = load_checkpoint(folder / f"{name}_classification_model.pth", "classifier")
        assert checkpoint["class_names"] == finetuned.classes
        assert checkpoint["preprocessing"] == open_shards(finetuned.shards).preprocessing | {"mean": 0.449, "std": 0.226}
    assert checkpoint["epoch"] == 2
    assert imagecodecs.png_decode((folder / "curves.png").read_bytes())[..., :3].std() > 10
    assert "label_smoothing: 0.1" in (folder / "config.yaml").read_text()


def test_a_folder_of_tiles_and_the_guides_spelling(pretrained, mammostream, run_cli, tmp_path):
    """PNG tiles named by tile_path, options with underscores: the same tiles as the shards', so the same figures."""
    shards = open_shards(pretrained.shards)
    tiles = tmp_path / "tiles"
    (tiles / "some").mkdir(parents=True)
    record = shards.preprocessing
    loader = LabelledLoader(shards.shards(), batch_size=32, tile_size=record["tile_size"], mean=0.0, std=1.0)
    keys = shards.tiles().set_index("tile")["key"]
    for batch, numbers in loader:
        for tile, number in zip(batch, numbers.tolist(), strict=True):
            pixels = np.rint(tile[0].numpy().astype(np.float64) * 65535).astype(np.uint16)
            (tiles / "some" / f"{keys[number]}.png").write_bytes(imagecodecs.png_encode(pixels))
    for split, path in (("train", pretrained.train_csv), ("val", pretrained.val_csv)):
        labels = pd.read_csv(path)
        labels["tile_path"] = "some/" + labels["tile_path"] + ".png"
        labels.to_csv(tmp_path / f"{split}.csv", index=False)
    outcome = mammostream(
        f"finetune --byol_checkpoint {pretrained.byol} --train_csv {tmp_path}/train.csv --val_csv {tmp_path}/val.csv "
        f"--tiles_dir {tiles} --class_names simulated_calcification bright --output_dir {tmp_path}/run --epochs 1 "
        f"--batch_size 16 --freeze_backbone_epochs 0 --lr_backbone 1e-3 --lr_head 1e-2 {pretrained.small}"
    )
    assert outcome.code == 0, outcome.err
    assert re.search(r"^bright: AUC [01]\.\d{3}.*tiles positive$", outcome.out, re.MULTILINE)
    final = tmp_path / "run/final_classification_model.pth"
    checkpoint = load_checkpoint(final, "classifier")
    # The pre-training's record stands for tiles that say nothing of themselves.
    assert checkpoint["preprocessing"] == load_checkpoint(pretrained.byol, "byol")["preprocessing"]

    run_cli(f"infer --model-path {final} --shards {pretrained.shards} --split val --output-dir {tmp_path}/infer --device cpu")
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    labels = pd.read_csv(pretrained.val_csv)
    labels = labels[labels[pretrained.classes].notna().any(axis=1)]
    assert_metrics_are_those_of(pd.read_parquet(tmp_path / "infer/predictions.parquet"), labels, metrics, pretrained.classes)
    assert (metrics["films"], metrics["patients"]) == (1, 0)  # the tiles of one film, by their names
    assert metrics["per_class"]["bright"]["auc_interval_over_films"] is None  # one film has no spread


def test_shards_of_other_tiles_than_the_pretrainings_are_refused(pretrained, run_cli, mammostream, tmp_path):
    run_cli(
        f"shards build --manifest {pretrained.manifest} --output-dir {tmp_path}/shards --pixel-spacing 0.5 --tile-size 32 "
        "--stride 64 --device cpu"
    )
    for split in ("train", "val"):
        run_cli(
            f"shards labels {tmp_path}/shards --split {split} --findings {pretrained.findings} --output {tmp_path}/{split}.csv"
        )
    outcome = mammostream(
        f"finetune --byol-checkpoint {pretrained.byol} --train-csv {tmp_path}/train.csv --val-csv {tmp_path}/val.csv --shards "
        f"{tmp_path}/shards --class-names simulated_calcification --output-dir {tmp_path}/run --epochs 1 {pretrained.small}"
    )
    assert outcome.code == 2
    assert "pixel_spacing_mm 0.4" in outcome.error


def test_a_diverged_run_ends_with_what_to_change_and_without_a_checkpoint(pretrained, mammostream, tmp_path):
    outcome = mammostream(
        f"finetune {pretrained.finetune_options} --output-dir {tmp_path / 'run'} --epochs 2 --freeze-backbone-epochs 0 "
        "--lr-backbone 1e30 --lr-head 1e30"
    )
    assert outcome.code == 2
    assert "is not finite; lower --lr-head" in outcome.error
    assert not list((tmp_path / "run").glob("*.pth"))
