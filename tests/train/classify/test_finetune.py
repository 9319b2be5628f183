"""Fine-tuning: which parts train when, each option by its effect, a run's files, resuming, several processes and seeds."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import imagecodecs
import numpy as np
import pandas as pd
import pytest
import torch
from processes import assert_same_tree, torchrun_to_end
from sklearn.metrics import average_precision_score, roc_auc_score

from mammostream.common.errors import BadInput
from mammostream.dali_pipelines import LabelledLoader
from mammostream.models import MammogramClassifier, build_backbone
from mammostream.models.checkpoints import load_checkpoint, restore_classifier
from mammostream.models.classifier import build_classification_head
from mammostream.shards import open_shards
from mammostream.train.classify.config import FinetuneConfig
from mammostream.train.classify.ema import WeightAverage
from mammostream.train.classify.losses import build_loss
from mammostream.train.classify.step import TrainingState, train_step
from mammostream.train.run.charts import read_metrics
from mammostream.train.run.labels import join_shards, read_labels
from mammostream.train.run.runtime import Runtime
from mammostream.train.run.stages import STAGE_COUNT, checkpoint_activations, stages_of, train_top_stages

CPU = Runtime(torch.device("cpu"), "fp32")

# ---------------------------------------------------------------- phases and learning rates


def backbone_of(state):
    return {name: tensor for name, tensor in state.items() if name.startswith("backbone.")}


def largest_change(state, before, part):
    names = [name for name in before if name.startswith(part) and name.endswith((".weight", ".bias"))]
    return max((state[name] - before[name]).abs().max().item() for name in names)


def test_the_backbone_is_frozen_for_ten_epochs_then_trained(pretrained, run_cli, capsys, tmp_path):
    run_cli(
        f"finetune {pretrained.finetune_options} --output-dir {tmp_path} --epochs 11 --freeze-backbone-epochs 10 "
        "--lr-backbone 1e-2 --max-samples 32"
    )
    out = capsys.readouterr().out
    for epoch in range(1, 12):
        frozen = rf"🧊 Epoch {epoch}: Backbone frozen \(training only classification head\)\n" if epoch < 11 else ""
        number = r"(\d\.\d{4}|undefined)"
        assert re.search(
            rf"{frozen}Epoch +{epoch}/11:\n  Train Loss: {number}\n  Val Loss:   {number}\n  Mean AUC:   {number}\n"
            rf"  Mean AP:    {number}\n  Exact Match: {number}\n",
            out,
        ), out
    assert out.count("🧊") == 10
    assert re.search(r"  ✅ New best model saved \(AUC: \d\.\d{4}\)\n", out)
    names = {path.name for path in tmp_path.glob("*.pth")}
    models = {f"{name}_classification_model.pth" for name in ("best", "final", "last")}
    assert names == models | {"classification_epoch_10.pth"}
    before = backbone_of(load_checkpoint(pretrained.byol, "byol")["model_state_dict"])
    tenth, final = (load_checkpoint(tmp_path / name, "classifier") for name in sorted(names)[1:3])
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
    rates = [line["lr_head"] for line in lines]  # one cosine from its peak to 0
    assert all(rate == pytest.approx(1e-3 * (1 + math.cos(math.pi * (2 * e + 1) / 21)) / 2) for e, rate in enumerate(rates))
    assert lines[10]["lr_backbone"] == pytest.approx(1e-2 * rates[10] / 1e-3, abs=1e-12)
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


# ---------------------------------------------------------------- a step, part by part


def small_state(config: FinetuneConfig = FinetuneConfig(), steps: int = 9) -> TrainingState:  # noqa: B008
    """A small classifier and its training, as the command makes them."""
    torch.manual_seed(1)
    backbone = build_backbone("resnet18")
    model = MammogramClassifier(backbone, build_classification_head(backbone.num_features, 2, config.dropout))
    groups = [
        {"params": list(model.backbone.parameters()), "peak": config.lr_backbone},
        {"params": list(model.classification_head.parameters()), "peak": config.lr_head},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=config.weight_decay)
    average = WeightAverage(model, config.ema_decay) if config.ema_decay else None
    return TrainingState(model, average, optimizer, CPU.scaler(), build_loss(config, torch.ones(2)), np.ones(steps))


def small_batch(rows: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(0, 2, (rows, 2), generator=generator).float()
    labels[1, 0] = torch.nan
    return torch.randn(rows, 1, 48, 48, generator=generator), labels


def take_step(state: TrainingState, config: FinetuneConfig, stages: int = STAGE_COUNT, rows: int = 6) -> torch.Tensor:
    state.model.train()
    train_top_stages(state.model.backbone, stages)
    return train_step(state, state.model, CPU, config, *small_batch(rows))


@pytest.mark.parametrize("stages", range(6))
def test_stages_train_from_the_output_down_and_the_others_stand_still(stages):
    """Parameters and batch-norm statistics of frozen stages stay, and no gradient is computed for them."""
    config = FinetuneConfig(lr_backbone=1e-3)
    state = small_state(config)
    before = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    take_step(state, config, stages)
    after = state.model.state_dict()
    gradients = {name for name, p in state.model.named_parameters() if p.grad is not None}
    for depth, names in enumerate(reversed(stages_of(state.model.backbone))):
        for name in names:
            part = [n for n in before if n.startswith(f"backbone.{name}.")]
            assert part
            changed = {n for n in part if not torch.equal(before[n], after[n])}
            with_gradient = {n for n in part if n in gradients}
            if depth < stages:
                assert changed == set(part)
                assert len(with_gradient) == len([n for n in part if n.endswith((".weight", ".bias"))])
            else:
                assert changed == with_gradient == set()
    assert {n for n in gradients if n.startswith("classification_head")} == {
        f"classification_head.{layer}.{kind}" for layer in (0, 3) for kind in ("weight", "bias")
    }


def test_checkpointed_activations_give_the_same_step_with_less_memory():
    config = FinetuneConfig(lr_backbone=1e-3)
    results = []
    for checkpointed in (False, True):
        state = small_state(config)
        if checkpointed:
            checkpoint_activations(state.model.backbone)
        kept = 0

        def keep(tensor):
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            for _ in range(2):
                take_step(state, config, stages=4)
        results.append((state.model.state_dict(), kept))
    (plain, memory), (checkpointed, less) = results
    assert plain.keys() == checkpointed.keys()
    for name, tensor in plain.items():
        assert torch.equal(tensor, checkpointed[name]), name
    assert less < memory / 2


def test_the_average_follows_the_weights():
    config = FinetuneConfig(lr_backbone=1e-2, ema_decay=0.5)
    state = small_state(config)
    name, norm = "backbone.conv1.weight", "backbone.bn1.running_mean"
    expected = {n: state.model.state_dict()[n].clone() for n in (name, norm)}
    for step in range(4):
        take_step(state, config)
        decay = min(0.5, (1 + step) / (10 + step))
        for n, tensor in expected.items():
            expected[n] = decay * tensor + (1 - decay) * state.model.state_dict()[n]
    average = state.evaluated.state_dict()
    for n, tensor in expected.items():
        torch.testing.assert_close(average[n], tensor)
        assert not torch.equal(average[n], state.model.state_dict()[n])
    assert average["backbone.bn1.num_batches_tracked"] == 4
    assert not any(p.requires_grad for p in state.evaluated.parameters())


def test_gradients_are_clipped():
    """Plain gradient descent shows the gradient: AdamW hides its length."""
    config = FinetuneConfig(gradient_clip=1e-3)
    state = small_state(config)
    state.optimizer = torch.optim.SGD([{"params": list(state.model.parameters()), "peak": 1.0}], lr=0.0)
    before = [p.clone() for p in state.model.parameters()]
    take_step(state, config)
    moved = math.sqrt(sum((p - b).square().sum().item() for p, b in zip(state.model.parameters(), before, strict=True)))
    assert moved == pytest.approx(1e-3, rel=1e-2)


def test_dropout_acts_in_training_alone():
    losses = {}
    for dropout in (0.0, 0.9):
        config = FinetuneConfig(dropout=dropout, lr_head=0.0, lr_backbone=0.0)
        state = small_state(config)
        losses[dropout] = [float(take_step(state, config, stages=0)) for _ in range(2)]
        state.model.eval()
        with torch.no_grad():
            losses[dropout].append(float(state.model(small_batch()[0]).sum()))
    assert losses[0.0][0] == losses[0.0][1]  # without dropout nothing is random
    assert losses[0.9][0] != losses[0.9][1]
    assert losses[0.0][2] == losses[0.9][2]


def test_mixup_changes_what_a_step_learns_from():
    losses = []
    for alpha in (0.0, 5.0):
        config = FinetuneConfig(dropout=0.0, mixup_alpha=alpha)
        state = small_state(config)
        losses.append(float(take_step(state, config)))
    assert losses[0] != losses[1]


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
        assert p.nunique() > len(p) / 2  # a constant output would prove nothing
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
    # Tiles from image files have no record: the pre-training's is used.
    assert checkpoint["preprocessing"] == load_checkpoint(pretrained.byol, "byol")["preprocessing"]

    run_cli(f"infer --model-path {final} --shards {pretrained.shards} --split val --output-dir {tmp_path}/infer --device cpu")
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    labels = pd.read_csv(pretrained.val_csv)
    labels = labels[labels[pretrained.classes].notna().any(axis=1)]
    assert_metrics_are_those_of(pd.read_parquet(tmp_path / "infer/predictions.parquet"), labels, metrics, pretrained.classes)
    assert (metrics["films"], metrics["patients"]) == (1, 0)  # the tiles of one film, by their names
    assert metrics["intervals_over"] == "films"  # the patients are unknown
    assert metrics["per_class"]["bright"]["intervals"]["auc"] is None  # one film has no spread


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


# ---------------------------------------------------------------- options by their effect


def final_of(folder: Path, name: str = "final") -> dict:
    return load_checkpoint(folder / f"{name}_classification_model.pth", "classifier")


def test_a_run_stops_when_nothing_gets_better(pretrained, mammostream, tmp_path):
    """With learning rate 0 and the backbone frozen, no epoch improves on the first: the run stops after two more."""
    outcome = mammostream(
        f"finetune {pretrained.finetune_options} --output-dir {tmp_path} --epochs 50 --freeze-backbone-epochs 50 "
        "--lr-head 0 --early-stopping 2 --max-samples 16 --loss focal --pos-weight 2,0.5"
    )
    assert outcome.code == 0, outcome.err
    assert "Early stopping: no better validation for 2 epochs" in outcome.out
    assert "epoch 3 of 50" in outcome.out
    assert (final_of(tmp_path)["epoch"], final_of(tmp_path, "best")["epoch"]) == (3, 1)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3
    assert final_of(tmp_path)["config"]["pos_weight"] == ("2", "0.5")


def test_stages_unfreeze_one_by_one_before_a_run_may_stop(pretrained, mammostream, tmp_path):
    outcome = mammostream(
        f"finetune {pretrained.finetune_options} --output-dir {tmp_path} --epochs 3 --freeze-backbone-epochs 1 "
        "--unfreeze-every 1 --lr-backbone 1e-3 --lr-head 0 --early-stopping 1 --max-samples 16"
    )
    assert outcome.code == 0, outcome.err
    assert re.findall(r"Epoch (\d): Backbone partly frozen \(training its last (\d) of 5", outcome.out) == [
        ("2", "1"),
        ("3", "2"),
    ]
    before = backbone_of(load_checkpoint(pretrained.byol, "byol")["model_state_dict"])
    after = final_of(tmp_path)["model_state_dict"]
    changed = {name.split(".")[1] for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {"layer3", "layer4"}


def test_the_averaged_weights_are_those_evaluated_and_saved(pretrained, run_cli, tmp_path):
    run_cli(
        f"finetune {pretrained.finetune_options} --output-dir {tmp_path} --epochs 2 --freeze-backbone-epochs 0 "
        "--lr-backbone 1e-3 --ema-decay 0.9 --max-samples 32"
    )
    checkpoint = final_of(tmp_path)
    saved, current = checkpoint["model_state_dict"], checkpoint["resume"]["weights"]
    assert saved.keys() == current.keys()
    assert not torch.equal(saved["backbone.conv1.weight"], current["backbone.conv1.weight"])
    shards = open_shards(pretrained.shards)
    tiles = join_shards(read_labels(pretrained.val_csv, pretrained.classes, 32), shards, "val")
    record = checkpoint["preprocessing"]
    loader = LabelledLoader(
        tiles.source,
        batch_size=64,
        tile_size=record["tile_size"],
        mean=record["mean"],
        std=record["std"],
        tiles=tiles.numbers,
    )
    ((batch, numbers),) = loader
    with torch.no_grad():
        logits = restore_classifier(checkpoint, tmp_path).classify(batch).numpy()
    labels = tiles.labels[tiles.rows(numbers).numpy()]
    known = ~np.isnan(labels[:, 1])
    auc = roc_auc_score(labels[known, 1], logits[known, 1])
    assert checkpoint["metrics"]["per_class"]["bright"]["auc"] == pytest.approx(auc, abs=1e-6)
    # The validation loss is that of these logits, too.
    losses = build_loss(FinetuneConfig(), torch.ones(2))(torch.from_numpy(logits), torch.from_numpy(labels))
    assert checkpoint["metrics"]["val_loss"] == pytest.approx(float(losses.sum()) / (~np.isnan(labels)).sum(), rel=1e-5)


def test_several_seeds_give_mean_and_spread(pretrained, mammostream, tmp_path):
    options = (
        f"finetune {pretrained.finetune_options} --epochs 1 --freeze-backbone-epochs 0 --lr-backbone 1e-3 --max-samples 32"
    )
    outcome = mammostream(f"{options} --output-dir {tmp_path}/seeds --seeds 3,1")
    assert outcome.code == 0, outcome.err
    runs = [json.loads((tmp_path / f"seeds/seed_{seed}/metrics.json").read_text()) for seed in (3, 1)]
    summary = json.loads((tmp_path / "seeds/seeds.json").read_text())
    assert summary["seeds"] == [3, 1]
    for got, values in (
        (summary["mean_auc"], [run["mean_auc"] for run in runs]),
        (summary["per_class"]["bright"]["ap"], [run["per_class"]["bright"]["ap"] for run in runs]),
    ):
        assert got == {"mean": pytest.approx(np.mean(values)), "sd": pytest.approx(np.std(values, ddof=1)), "values": values}
    assert len({run["mean_auc"] for run in runs}) > 1
    assert runs[0]["val_loss"] != runs[1]["val_loss"]  # ranks may be perfect for both seeds, by the machine's rounding
    mean, sd = summary["mean_auc"]["mean"], summary["mean_auc"]["sd"]
    assert f"mean: AUC {mean:.3f} ± {sd:.3f}" in outcome.out
    # Each is the run of that seed alone.
    assert mammostream(f"finetune --config {tmp_path}/seeds/seed_1/config.yaml --output-dir {tmp_path}/alone").code == 0
    assert json.loads((tmp_path / "alone/metrics.json").read_text()) == runs[1]
    for wrong in ("1 1", "one", "-- -1"):
        assert mammostream(f"{options} --output-dir {tmp_path}/wrong --seeds {wrong}").code == 2


# ---------------------------------------------------------------- little data, wrong data


def test_what_leaks_stops_the_run_with_its_list_unless_it_is_allowed(pretrained, mammostream, tmp_path):
    val = pd.read_csv(pretrained.train_csv).iloc[20:40]
    val.to_csv(tmp_path / "val.csv", index=False)
    command = f"finetune {pretrained.finetune_options} --val-csv {tmp_path}/val.csv --output-dir {tmp_path}/run --epochs 1"
    outcome = mammostream(command)
    assert outcome.code == 2
    assert re.search(r"1 patient \(P_\d+\), 1 image \(.*\), \d+ tiles \(", outcome.error)
    keys = [key for key in val["tile_path"] if key in outcome.err]
    assert len(keys) == val[pretrained.classes].notna().any(axis=1).sum()
    assert not (tmp_path / "run").exists()
    assert mammostream(f"{command} --allow-leakage").code == 0
    leakage = final_of(tmp_path / "run")["leakage"]
    assert leakage["tiles"] == sorted(keys)
    assert leakage["patients"] == [re.search(r"P_\d+", outcome.error)[0]]


def test_a_run_without_leakage_says_so(finetuned):
    assert final_of(finetuned.finetuned)["leakage"] == {}


def test_one_row_trains_and_validates(pretrained, mammostream, tmp_path):
    """No AUC is defined: the best epoch is the one with the lowest loss, and its model is saved."""
    for split, path in (("train", pretrained.train_csv), ("val", pretrained.val_csv)):
        pd.read_csv(path).dropna().head(1).to_csv(tmp_path / f"{split}.csv", index=False)
    outcome = mammostream(
        f"finetune {pretrained.finetune_options} --train-csv {tmp_path}/train.csv --val-csv {tmp_path}/val.csv "
        f"--output-dir {tmp_path}/run --epochs 2 --freeze-backbone-epochs 1"
    )
    assert outcome.code == 0, outcome.err
    assert "Mean AUC:   undefined" in outcome.out
    assert re.search(r"✅ New best model saved \(Val Loss: \d\.\d{4}\)", outcome.out)
    assert "bright: AUC undefined" in outcome.out
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    losses = [line["val_loss"] for line in read_metrics(tmp_path / "run/metrics.jsonl")]
    assert metrics["mean_auc"] is metrics["mean_ap"] is None
    assert final_of(tmp_path / "run", "best")["epoch"] == 1 + losses.index(min(losses))
    assert final_of(tmp_path / "run")["thresholds"] == [None, None]


def test_tiles_of_another_size_but_the_same_scale_are_taken(pretrained, run_cli, tmp_path):
    run_cli(
        f"shards build --manifest {pretrained.manifest} --output-dir {tmp_path}/shards --pixel-spacing 0.4 --tile-size 48 "
        "--stride 48 --device cpu"
    )
    for split in ("train", "val"):
        run_cli(
            f"shards labels {tmp_path}/shards --split {split} --findings {pretrained.findings} --output {tmp_path}/{split}.csv"
        )
    run_cli(
        f"finetune --byol-checkpoint {pretrained.byol} --train-csv {tmp_path}/train.csv --val-csv {tmp_path}/val.csv --shards "
        f"{tmp_path}/shards --class-names simulated_calcification --output-dir {tmp_path}/run --epochs 1 {pretrained.small}"
    )
    assert final_of(tmp_path / "run")["preprocessing"]["tile_size"] == 48


# ---------------------------------------------------------------- resuming

RESUMED = (
    "--epochs 4 --freeze-backbone-epochs 1 --unfreeze-every 1 --lr-backbone 1e-3 --lr-head 1e-2 --ema-decay 0.8 "
    "--mixup-alpha 0.3 --dropout 0.4 --early-stopping 3 --loss asymmetric --pos-weight auto --gradient-checkpointing"
)


@pytest.fixture(scope="module")
def uninterrupted(pretrained, run_cli, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    run_cli(f"finetune {pretrained.finetune_options} --output-dir {folder} {RESUMED}")
    return folder


def test_a_killed_run_goes_on_bit_for_bit(pretrained, uninterrupted, run_cli, single_thread_environment, tmp_path):
    """Kill -9 after the first epoch's checkpoint, resume: the same weights, state and metrics as an uninterrupted run."""
    command = f"finetune {pretrained.finetune_options} --output-dir {tmp_path} {RESUMED}"
    last = tmp_path / "last_classification_model.pth"
    with (tmp_path / "log").open("wb") as log:
        script = Path(sys.executable).with_name("mammostream")
        child = subprocess.Popen([script, *shlex.split(command)], stdout=log, stderr=log, env=single_thread_environment)
        deadline = time.monotonic() + 120
        while not last.exists():
            assert child.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    assert 1 <= load_checkpoint(last, "classifier")["epoch"] < 4
    assert not (tmp_path / "final_classification_model.pth").exists()

    run_cli(f"{command} --resume auto")
    for name in ("best", "last", "final"):
        assert_same_tree(final_of(tmp_path, name), final_of(uninterrupted, name), name)
    assert (tmp_path / "metrics.jsonl").read_text() == (uninterrupted / "metrics.jsonl").read_text()
    assert (tmp_path / "metrics.json").read_text() == (uninterrupted / "metrics.json").read_text()


def test_a_finished_run_resumes_to_nothing(pretrained, uninterrupted, mammostream):
    before = {path.name: path.stat().st_mtime_ns for path in uninterrupted.glob("*.pth")}
    record = [(uninterrupted / name).read_text() for name in ("metrics.json", "metrics.jsonl")]
    command = f"finetune {pretrained.finetune_options} --output-dir {uninterrupted} {RESUMED}"
    assert mammostream(f"{command} --resume auto").code == 0
    assert {path.name: path.stat().st_mtime_ns for path in uninterrupted.glob("*.pth")} == before
    assert [(uninterrupted / name).read_text() for name in ("metrics.json", "metrics.jsonl")] == record
    assert "resume with --resume auto" in mammostream(command).error


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("--lr-head 0.5", "--lr-head 0.01, not 0.5"),
        ("--epochs 5", "--epochs 4, not 5"),
        ("--loss bce", "--loss asymmetric, not bce"),
        ("--max-samples 20", "--max-samples None, not 20"),
        ("--class-names bright", "other classes, labels or tiles"),
        ("--seeds 0 1 --resume {root}/uninterrupted/last_classification_model.pth", "with --seeds use --resume auto"),
        ("--resume {byol}", "holds a byol model"),
        ("--resume {root}/gone.pth", "gone.pth does not exist"),
    ],
)
def test_resuming_otherwise_names_what_differs(pretrained, uninterrupted, mammostream, other, message):
    record = (uninterrupted / "config.yaml").read_text()
    options = pretrained.finetune_options.replace("--class-names simulated_calcification bright", "")
    classes = "" if "--class-names" in other else "--class-names simulated_calcification bright"
    outcome = mammostream(
        f"finetune {options} {classes} --output-dir {uninterrupted} {RESUMED} --resume auto "
        + other.format(root=pretrained.root, byol=pretrained.byol)
    )
    assert outcome.code == 2
    assert message in outcome.error
    assert (uninterrupted / "config.yaml").read_text() == record


# ---------------------------------------------------------------- several processes

STEP = """
import os, sys, torch
from test_finetune import CPU, FinetuneConfig, small_batch, small_state
from mammostream.train.classify.step import train_step
from mammostream.train.run.runtime import join_processes

torch.set_num_threads(1)
config = FinetuneConfig(dropout=0.0, device="cpu")
state = small_state(config)
state.model.eval()  # batch norms see other tiles in each process: their running statistics do not
tiles, labels = small_batch(6)
labels[:4, 1] = torch.nan  # the processes know different numbers of labels
with join_processes(config) as runtime:
    part = slice(0, 4) if runtime.rank == 0 else slice(4, 6)
    loss = runtime.total(train_step(state, runtime.parallel(state.model), runtime, config, tiles[part], labels[part]))
    if runtime.is_main:
        gradients = {name: p.grad for name, p in state.model.named_parameters()}
        torch.save({"loss": loss / runtime.world_size, "gradients": gradients}, sys.argv[1])
os._exit(0)  # see test_torchrun.py
"""


def test_two_processes_take_the_step_of_one(single_thread_environment, tmp_path):
    """Loss and gradients are means over all known labels, in any process."""
    (tmp_path / "step.py").write_text(STEP)
    torchrun_to_end([str(tmp_path / "step.py"), str(tmp_path / "two.pt")], single_thread_environment)
    two = torch.load(tmp_path / "two.pt", weights_only=True)

    config = FinetuneConfig(dropout=0.0)
    state = small_state(config)
    state.model.eval()
    tiles, labels = small_batch(6)
    labels[:4, 1] = torch.nan
    loss = train_step(state, state.model, CPU, config, tiles, labels)
    assert float(two["loss"]) == pytest.approx(float(loss), rel=1e-5)
    for name, parameter in state.model.named_parameters():
        torch.testing.assert_close(two["gradients"][name], parameter.grad, rtol=1e-3, atol=1e-6)


def test_two_processes_report_what_one_finds(pretrained, run_cli, single_thread_environment, tmp_path):
    """An odd number of tiles, stages that unfreeze: the metrics are those of all tiles in their order."""
    options = (
        f"finetune {pretrained.finetune_options} --output-dir {tmp_path}/run --epochs 3 --freeze-backbone-epochs 1 "
        "--unfreeze-every 1 --lr-backbone 1e-3 --lr-head 1e-2 --max-samples 33"
    )
    said = torchrun_to_end(["-m", "mammostream", *shlex.split(options)], single_thread_environment)
    assert said.count("Train Loss") == 3  # one process prints
    final = final_of(tmp_path / "run")
    assert final["step"] == 6  # 16 and 17 tiles by 16: the first process waits for the second's last
    run_cli(
        f"infer --model-path {tmp_path}/run/final_classification_model.pth --shards {pretrained.shards} --split val "
        f"--output-dir {tmp_path}/infer --device cpu"
    )
    labels = pd.read_csv(pretrained.val_csv)
    labels = labels[labels[pretrained.classes].notna().any(axis=1)].head(33)
    predictions = pd.read_parquet(tmp_path / "infer/predictions.parquet")
    predictions = predictions[predictions["key"].isin(labels["tile_path"])]
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert_metrics_are_those_of(predictions, labels, metrics, pretrained.classes)
    assert len(final["resume"]["processes"]) == 2
    with pytest.raises(BadInput, match="trained by 2 processes; resume with as many"):
        run_cli(f"{options} --resume auto")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("lr_head", -1.0),
        ("freeze_backbone_epochs", -1),
        ("unfreeze_every", -1),
        ("label_smoothing", 1.0),
        ("dropout", 1.0),
        ("ema_decay", 1.0),
        ("mixup_alpha", -0.1),
        ("focal_gamma", -1.0),
        ("asymmetric_margin", 1.0),
        ("early_stopping", -1),
        ("max_samples", 0),
    ],
)
def test_options_out_of_range_are_refused(name, value):
    with pytest.raises(BadInput, match=f"--{name.replace('_', '-')} {value}"):
        FinetuneConfig(**{name: value})
