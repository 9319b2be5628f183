"""Multi-label fine-tuning of a pre-trained backbone on labelled tiles."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import BadInput
from common.files import write_json
from common.progress import progress
from dali_pipelines import TRAIN_VIEW, LabelledLoader, View
from models.checkpoints import load_checkpoint, restore_byol, save_checkpoint
from models.classifier import MammogramClassifier
from shards.reading import check_same_pixels
from train.config import FinetuneConfig
from train.labels import LabelledTiles
from train.metrics import bootstrap_auc, classification_metrics
from train.pictures import draw_curves
from train.runtime import Runtime, resolve_runtime
from train.schedules import learning_rates
from train.tracking import Tracker

SAVE_EVERY = 10


def finetune(
    checkpoint_path: Path,
    train_tiles: LabelledTiles,
    val_tiles: LabelledTiles,
    class_names: Sequence[str],
    preprocessing: dict[str, Any] | None,
    output_dir: Path,
    config: FinetuneConfig,
    command: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Fine-tune and write checkpoints, ``metrics.jsonl``, ``metrics.json`` and curves.

    Parameters
    ----------
    checkpoint_path
        A BYOL checkpoint.
    train_tiles, val_tiles
        Tiles and labels; validation chooses ``best_classification_model.pth`` and nothing else.
    class_names
        C names, in the order of the labels' columns.
    preprocessing
        How the tiles were made (of their shards), or None for a folder of tiles: then the pre-training's record stands.
    output_dir
        The run's directory.
    config
        The options.
    command
        The command's own options, recorded beside `config` in ``config.yaml``.

    Returns
    -------
    dict
        The **last** epoch's validation metrics, with 95 % intervals over films.

    Raises
    ------
    BadInput
        The checkpoint is none, holds another architecture, or was made for other tiles; `output_dir` holds a training.
    """
    if (output_dir / "metrics.jsonl").exists():
        raise BadInput(f"{output_dir} holds a training already; choose another --output-dir")
    torch.manual_seed(config.seed)
    runtime = resolve_runtime(config)
    byol_checkpoint = load_checkpoint(checkpoint_path, "byol")
    byol = restore_byol(byol_checkpoint, checkpoint_path, config.arch)
    model = MammogramClassifier.from_byol(byol, len(class_names))
    model = model.to(runtime.device, memory_format=torch.channels_last)
    learnt = byol_checkpoint["preprocessing"]
    if preprocessing is not None:
        check_same_pixels(learnt, preprocessing, "the labelled tiles' directory")
    record = (preprocessing or learnt) | {"mean": learnt["mean"], "std": learnt["std"]}

    train_loader = _loader(train_tiles, record, config, runtime, TRAIN_VIEW, shuffle=True)
    val_loader = _loader(val_tiles, record, config, runtime, None, shuffle=False)
    groups = [
        {"params": list(model.backbone.parameters()), "peak": config.lr_backbone},
        {"params": list(model.classification_head.parameters()), "peak": config.lr_head},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=config.weight_decay)
    scaler = runtime.scaler()
    shape = learning_rates(1.0, config.epochs * len(train_loader))  # one cosine, times each group's peak
    metrics: dict[str, Any] = {}
    best = -np.inf
    step = 0
    with (
        Tracker(output_dir, config.wandb_project, config.wandb_mode, asdict(config) | dict(command or {})) as tracker,
        progress(None, f"fine-tuning ({runtime})", "tile", total=config.epochs * train_loader.tiles) as bar,
    ):
        for epoch in range(1, config.epochs + 1):
            frozen = epoch <= config.freeze_backbone_epochs
            losses = []
            for tiles, numbers in train_loader:
                labels = torch.from_numpy(train_tiles.labels)[train_tiles.rows(numbers)].to(runtime.device, non_blocking=True)
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * float(shape[step])
                losses.append(_train_step(model, optimizer, scaler, runtime, config, tiles, labels, frozen))
                step += 1
                bar.update(len(tiles))
            train_loss = float(torch.stack(losses).mean())
            if not math.isfinite(train_loss):
                raise BadInput(
                    f"the loss of epoch {epoch} is not finite; lower --lr-head and --lr-backbone, or use --precision fp32"
                )
            probabilities = predict(model, val_loader, val_tiles, runtime)
            metrics = _evaluate(val_tiles, probabilities, class_names, config)
            metrics |= {"train_loss": train_loss, "epoch": epoch}
            tracker.log(step, metrics | {"lr_backbone": 0.0 if frozen else optimizer.param_groups[0]["lr"]})
            checkpoint = {
                "kind": "classifier",
                "arch": byol_checkpoint["arch"],
                "model_state_dict": model.state_dict(),
                "optimizer_state_dict": optimizer.state_dict(),
                "config": asdict(config),
                "class_names": list(class_names),
                "epoch": epoch,
                "step": step,
                "metrics": metrics,
                "preprocessing": record,
            }
            names = []
            is_best = metrics["mean_auc"] is not None and metrics["mean_auc"] > best
            if is_best:
                best = metrics["mean_auc"]
                names.append("best_classification_model")
            if epoch % SAVE_EVERY == 0:
                names.append(f"classification_epoch_{epoch}")
            if epoch == config.epochs:
                names.append("final_classification_model")
            for name in names:
                save_checkpoint(output_dir / f"{name}.pth", checkpoint)
            bar.write(_epoch_lines(epoch, config.epochs, metrics, frozen, is_best))
    intervals = {
        name: bootstrap_auc(val_tiles.labels[:, c], probabilities[:, c], val_tiles.groups, seed=config.seed)
        for c, name in enumerate(class_names)
    }
    for name, interval in intervals.items():
        metrics["per_class"][name]["auc_interval_over_films"] = interval
    metrics["films"] = len(np.unique(val_tiles.groups))
    metrics["patients"] = len(set(val_tiles.patients) - {""})
    write_json(output_dir / "metrics.json", metrics)
    draw_curves(
        tracker.path, ["train_loss", "val_loss", "mean_auc", "mean_ap"], output_dir / "curves.png", "Fine-tuning, validation"
    )
    return metrics


def _train_step(
    model: MammogramClassifier,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    runtime: Runtime,
    config: FinetuneConfig,
    tiles: Tensor,
    labels: Tensor,
    frozen: bool,
) -> Tensor:
    """Take one step and return the loss, still on the device."""
    model.train()
    with runtime.autocast():
        if frozen:
            # Evaluation mode keeps the batch norms' statistics as they were pre-trained.
            model.backbone.eval()
            with torch.no_grad():
                features = model.get_features(tiles)
        else:
            features = model.get_features(tiles)
        logits = model.classification_head(features)
    loss = masked_bce(logits, labels, config.label_smoothing)

    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()

    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
    scaler.step(optimizer)
    scaler.update()
    return loss.detach()


def masked_bce(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Return the mean binary cross entropy over the labels that are there, float32.

    Parameters
    ----------
    logits
        (N, C).
    labels
        (N, C) of 1, 0 and NaN for missing.
    label_smoothing
        s in [0, 1): 1 becomes 1 - s/2, 0 becomes s/2.
    """
    known = ~labels.isnan()
    smooth = labels.nan_to_num() * (1 - label_smoothing) + label_smoothing / 2
    losses = F.binary_cross_entropy_with_logits(logits.float(), smooth, reduction="none")
    return (losses * known).sum() / known.sum().clamp(min=1)


@torch.no_grad()
def predict(model: MammogramClassifier, loader: LabelledLoader, tiles: LabelledTiles, runtime: Runtime) -> np.ndarray:
    """Return (N, C) probabilities in the order of ``tiles.numbers``."""
    model.eval()
    probabilities = np.full(tiles.labels.shape, np.nan, np.float32)
    for batch, numbers in loader:
        with runtime.autocast():
            logits = model.classify(batch)
        probabilities[tiles.rows(numbers).numpy()] = torch.sigmoid(logits.float()).cpu().numpy()
    return probabilities


def _evaluate(
    tiles: LabelledTiles, probabilities: np.ndarray, class_names: Sequence[str], config: FinetuneConfig
) -> dict[str, Any]:
    logits = torch.logit(torch.from_numpy(probabilities), eps=1e-6)
    loss = masked_bce(logits, torch.from_numpy(tiles.labels), config.label_smoothing)
    return {"val_loss": float(loss)} | classification_metrics(tiles.labels, probabilities, class_names)


def _loader(
    tiles: LabelledTiles, record: dict[str, Any], config: FinetuneConfig, runtime: Runtime, view: View | None, shuffle: bool
) -> LabelledLoader:
    return LabelledLoader(
        tiles.source,
        batch_size=config.batch_size,
        tile_size=record["tile_size"],
        mean=record["mean"],
        std=record["std"],
        view=view,
        shuffle=shuffle,
        seed=config.seed,
        device="gpu" if runtime.device.type == "cuda" else "cpu",
        num_threads=config.num_workers,
        tiles=tiles.numbers,
    )


def _epoch_lines(epoch: int, epochs: int, metrics: dict[str, Any], frozen: bool, is_best: bool) -> str:
    def figure(name: str) -> str:
        return "undefined" if metrics[name] is None else f"{metrics[name]:.4f}"

    lines = [f"🧊 Epoch {epoch}: Backbone frozen (training only classification head)"] if frozen else []
    lines += [
        f"Epoch {epoch:3d}/{epochs}:",
        f"  Train Loss: {figure('train_loss')}",
        f"  Val Loss:   {figure('val_loss')}",
        f"  Mean AUC:   {figure('mean_auc')}",
        f"  Mean AP:    {figure('mean_ap')}",
        f"  Exact Match: {figure('exact_match')}",
    ]
    lines += [f"  ✅ New best model saved (AUC: {figure('mean_auc')})"] if is_best else []
    return "\n".join(lines)
