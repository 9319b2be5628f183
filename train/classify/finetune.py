"""Multi-label fine-tuning of a pre-trained backbone on labelled tiles."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mammostream.common.errors import BadInput
from mammostream.common.files import write_json
from mammostream.common.progress import progress
from mammostream.dali_pipelines import TRAIN_VIEW, LabelledLoader, View
from mammostream.models.checkpoints import load_checkpoint, restore_byol, save_checkpoint
from mammostream.models.classifier import MammogramClassifier
from mammostream.shards.reading import check_same_pixels
from mammostream.train.classify.config import FinetuneConfig
from mammostream.train.classify.ema import WeightAverage
from mammostream.train.classify.losses import Loss, build_loss, mix, positive_weights
from mammostream.train.evaluate.metrics import (
    calibrate,
    classification_metrics,
    evaluate_predictions,
    fit_temperature,
    fit_thresholds,
)
from mammostream.train.run.charts import draw_curves
from mammostream.train.run.labels import LabelledTiles
from mammostream.train.run.resuming import check_same_options, load_to_resume, random_state, set_random_state
from mammostream.train.run.runtime import Runtime, resolve_runtime
from mammostream.train.run.schedules import learning_rates, trainable_stages
from mammostream.train.run.stages import STAGE_COUNT, checkpoint_activations, train_top_stages
from mammostream.train.run.tracking import Tracker

SAVE_EVERY = 10
CHECKPOINT_NAME = "{}_classification_model.pth"
EPOCH_NAME = "classification_epoch_{}.pth"
# What may change between the two halves of a run without changing its result, or by intent.
_FREE = {"num_workers", "wandb_project", "wandb_mode", "device", "precision", "gradient_checkpointing"}


@dataclass
class TrainingState:
    """What a step needs and changes, and what the epochs remember."""

    model: MammogramClassifier
    average: WeightAverage | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    loss: Loss
    rates: np.ndarray  # (steps,): one cosine from 1 to 0, times each group's peak
    step: int = 0
    best: float = -math.inf  # the best epoch's score
    stale: int = 0  # epochs since then, while nothing was left to unfreeze

    @property
    def evaluated(self) -> MammogramClassifier:
        """The model that is evaluated and saved: the average where there is one."""
        return self.average.model if self.average else self.model


def finetune(
    checkpoint_path: Path,
    train_tiles: LabelledTiles,
    val_tiles: LabelledTiles,
    class_names: Sequence[str],
    preprocessing: dict[str, Any] | None,
    output_dir: Path,
    config: FinetuneConfig,
    command: Mapping[str, Any] | None = None,
    *,
    resume: Path | None = None,
    leakage: Mapping[str, list[str]] | None = None,
    runtime: Runtime | None = None,
) -> dict[str, Any]:
    """Fine-tune and write checkpoints, ``metrics.jsonl``, ``metrics.json`` and curves.

    Parameters
    ----------
    checkpoint_path
        A BYOL checkpoint.
    train_tiles, val_tiles
        Tiles and labels. Validation chooses ``best_classification_model.pth``, stops early where that is asked for, and
        decides each checkpoint's ``thresholds`` and ``temperature``; nothing else.
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
    resume
        A checkpoint of this run to go on from, or None.
    leakage
        What :func:`mammostream.train.run.labels.find_leakage` found and the user allowed; written into the checkpoints.
    runtime
        Device, precision and processes; None resolves them from `config` for one process.

    Returns
    -------
    dict
        The **last** epoch's validation metrics, with 95 % intervals over patients; over films where there are not two
        patients, or not all are known (``intervals_over`` says which). Probabilities are those that inference gives, and
        thresholds those of the checkpoint. Both were fitted on this very validation: that flatters the figures that
        depend on them (balanced accuracy, accuracy, exact match, Brier score, ECE), and no others.

    Raises
    ------
    BadInput
        The checkpoint is none, holds another architecture, or was made for tiles of another scale or mapping; that to
        resume from is of other options, labels or tiles; the training diverged.
    """
    runtime = runtime or resolve_runtime(config)
    torch.manual_seed(config.seed)
    byol_checkpoint = load_checkpoint(checkpoint_path, "byol")
    byol = restore_byol(byol_checkpoint, checkpoint_path, config.arch)
    learnt = byol_checkpoint["preprocessing"]
    if preprocessing is not None:
        # A ResNet averages over its feature map: it takes tiles of any size, as long as a pixel means the same.
        check_same_pixels(learnt, preprocessing, "the labelled tiles' directory", any_tile_size=True)
    record = (preprocessing or learnt) | {"mean": learnt["mean"], "std": learnt["std"]}

    train_loader = _loader(train_tiles, record, config, runtime, TRAIN_VIEW, shuffle=True)
    val_loader = _loader(val_tiles, record, config, runtime, None, shuffle=False)
    # The largest share of the processes decides how many steps all of them take.
    steps = math.ceil(math.ceil(train_loader.tiles / runtime.world_size) / config.batch_size)
    weights = positive_weights(train_tiles.labels, config.pos_weight, class_names)
    model = MammogramClassifier.from_byol(byol, len(class_names), config.dropout)
    state = _initial_state(model, config, runtime, steps * config.epochs, weights)
    if runtime.rank:  # the same weights, but other draws
        torch.manual_seed(int(np.random.SeedSequence([config.seed, runtime.rank]).generate_state(1)[0]))
    fingerprint = _fingerprint(class_names, train_tiles, val_tiles)
    metrics: dict[str, Any] = {}
    if resume is not None:
        metrics = _restore(resume, state, train_loader, config, fingerprint, runtime)
    last_stages = _stages(config.epochs, config)
    options = asdict(config) | dict(command or {})
    tracker = (
        Tracker(output_dir, config.wandb_project, config.wandb_mode, options, resume_step=state.step if resume else None)
        if runtime.is_main
        else None
    )
    logits = decisions = None
    total = config.epochs * train_loader.tiles
    with tracker or nullcontext(), progress(None, f"fine-tuning ({runtime})", "tile", total, not runtime.is_main) as bar:
        bar.update(train_loader.epoch * train_loader.tiles)
        if (report := byol_checkpoint.get("load_report")) and runtime.is_main:
            bar.write("\n".join(report.lines()))
        while train_loader.epoch < config.epochs and not _stopped(state, config):
            epoch = train_loader.epoch + 1
            stages = _stages(epoch, config)
            train_loss = _train_epoch(state, train_loader, train_tiles, steps, stages, runtime, config, bar)
            metrics, logits, decisions = _validate(state, val_loader, val_tiles, class_names, runtime)
            if not math.isfinite(train_loss + metrics["val_loss"]):
                raise BadInput(
                    f"the loss of epoch {epoch} is not finite; lower --lr-head and --lr-backbone, or use --precision fp32"
                )
            metrics |= {"train_loss": train_loss, "epoch": epoch}
            score = _score(metrics)
            is_best = score > state.best
            state.best = max(score, state.best)
            state.stale = 0 if is_best or stages < last_stages else state.stale + 1
            names = [CHECKPOINT_NAME.format("best")] if is_best else []
            if epoch % SAVE_EVERY == 0:
                names.append(EPOCH_NAME.format(epoch))
            if epoch == config.epochs or _stopped(state, config):
                names.append(CHECKPOINT_NAME.format("final"))
            processes = runtime.gather({"loader": train_loader.state_dict(), "random": random_state(runtime.device)})
            if not runtime.is_main:
                continue
            rates = {name: group["lr"] for name, group in zip(("backbone", "head"), state.optimizer.param_groups, strict=True)}
            tracker.log(state.step, metrics | {"lr_backbone": rates["backbone"] if stages else 0.0, "lr_head": rates["head"]})
            checkpoint = {
                "kind": "classifier",
                "arch": byol_checkpoint["arch"],
                "model_state_dict": state.evaluated.state_dict(),
                "optimizer_state_dict": state.optimizer.state_dict(),
                "config": asdict(config),
                "class_names": list(class_names),
                "epoch": epoch,
                "step": state.step,
                "metrics": metrics,
                "preprocessing": record,
                **decisions,
                "leakage": dict(leakage or {}),
                "resume": {
                    "weights": state.model.state_dict() if state.average else None,  # those the average is made of
                    "scaler": state.scaler.state_dict(),
                    "best": state.best,
                    "stale": state.stale,
                    "data": fingerprint,
                    "processes": processes,
                },
            }
            # A resumed run takes the last one's epoch for done: so it comes after all others of that epoch.
            for name in [*names, CHECKPOINT_NAME.format("last")]:
                save_checkpoint(output_dir / name, checkpoint)
            bar.write(_epoch_lines(epoch, config.epochs, metrics, stages, is_best))
            if _stopped(state, config):
                bar.write(f"⏹️ Early stopping: no better validation for {state.stale} epochs")
    if decisions is None:  # a finished run, resumed
        _, logits, decisions = _validate(state, val_loader, val_tiles, class_names, runtime)
    if runtime.is_main:
        metrics |= _with_intervals(val_tiles, logits, class_names, decisions)
        write_json(output_dir / "metrics.json", metrics)
        names = ["train_loss", "val_loss", "mean_auc", "mean_ap"]
        draw_curves(tracker.path, names, output_dir / "curves.png", "Fine-tuning, validation")
    return runtime.from_main(metrics)


def train_step(
    state: TrainingState, network: nn.Module, runtime: Runtime, config: FinetuneConfig, tiles: Tensor, labels: Tensor
) -> Tensor:
    """Take one optimiser step; nothing here waits for the device.

    Parameters
    ----------
    network
        ``state.model``, or what :meth:`Runtime.parallel` made of it.
    tiles, labels
        This process's share of the batch: (N, 1, H, W) and (N, C) on the device.

    Returns
    -------
    Tensor
        A scalar whose mean over the processes is the loss of the whole batch, detached, on the device.
    """
    for group in state.optimizer.param_groups:
        group["lr"] = group["peak"] * float(state.rates[state.step])
    if config.mixup_alpha:
        tiles, labels = mix(tiles, labels, config.mixup_alpha)

    with runtime.autocast():
        logits = network(tiles)
    # The mean over all known labels of the batch, wherever they are: each process divides by the same number.
    known = runtime.total((~labels.isnan()).sum())
    loss = state.loss(logits, labels).sum() / known.clamp(min=1) * runtime.world_size

    state.optimizer.zero_grad(set_to_none=True)
    state.scaler.scale(loss).backward()

    state.scaler.unscale_(state.optimizer)
    torch.nn.utils.clip_grad_norm_(state.model.parameters(), config.gradient_clip)
    state.scaler.step(state.optimizer)
    state.scaler.update()

    if state.average:
        state.average.update(state.model, state.step)
    state.step += 1
    return loss.detach()


@torch.no_grad()
def predict(model: MammogramClassifier, loader: LabelledLoader, tiles: LabelledTiles, runtime: Runtime) -> np.ndarray | None:
    """Return (N, C) logits in the order of ``tiles.numbers``, those of all processes; None in any but the main one."""
    model.eval()
    rows, values = [], []
    for batch, numbers in loader:
        with runtime.autocast():
            logits = model.classify(batch)
        rows.append(tiles.rows(numbers).numpy())
        values.append(logits.float().cpu().numpy())
    gathered = runtime.gather((np.concatenate(rows), np.concatenate(values)))
    if not runtime.is_main:
        return None
    logits = np.full(tiles.labels.shape, np.nan, np.float32)
    for rows, values in gathered:
        logits[rows] = values
    return logits


def summarise(runs: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Return mean, standard deviation (of the sample, n - 1) and values over seeds of each metric, undefined ones as None.

    Parameters
    ----------
    runs
        Seed -> metrics as :func:`finetune` returns them.
    """

    def spread(values: list[float | None]) -> dict[str, Any]:
        defined = None not in values
        return {
            "mean": float(np.mean(values)) if defined else None,
            "sd": float(np.std(values, ddof=1)) if defined and len(values) > 1 else None,
            "values": values,
        }

    metrics = list(runs.values())
    return {
        "seeds": list(runs),
        **{name: spread([m[name] for m in metrics]) for name in ("mean_auc", "mean_ap", "exact_match", "val_loss")},
        "per_class": {
            name: {figure: spread([m["per_class"][name][figure] for m in metrics]) for figure in ("auc", "ap")}
            for name in metrics[0]["per_class"]
        },
    }


def _initial_state(
    model: MammogramClassifier, config: FinetuneConfig, runtime: Runtime, steps: int, pos_weight: np.ndarray
) -> TrainingState:
    model = model.to(runtime.device, memory_format=torch.channels_last)
    average = WeightAverage(model, config.ema_decay) if config.ema_decay else None
    if config.gradient_checkpointing:
        checkpoint_activations(model.backbone)
    groups = [
        {"params": list(model.backbone.parameters()), "peak": config.lr_backbone},
        {"params": list(model.classification_head.parameters()), "peak": config.lr_head},
    ]
    return TrainingState(
        model=model,
        average=average,
        optimizer=torch.optim.AdamW(groups, lr=0.0, weight_decay=config.weight_decay),
        scaler=runtime.scaler(),
        loss=build_loss(config, torch.from_numpy(pos_weight).to(runtime.device)),
        rates=learning_rates(1.0, steps),
    )


def _train_epoch(
    state: TrainingState,
    loader: LabelledLoader,
    tiles: LabelledTiles,
    steps: int,
    stages: int,
    runtime: Runtime,
    config: FinetuneConfig,
    bar: Any,
) -> float:
    """Train for an epoch and return its mean loss over steps and processes."""
    state.model.train()
    train_top_stages(state.model.backbone, stages)
    network = runtime.parallel(state.model)
    losses = []
    for batch, labels in _batches(loader, tiles, steps, runtime):
        if len(batch) == 1:
            # One tile has no statistics to normalise by. It is an epoch's last batch, or all of them are single.
            state.model.backbone.eval()
        losses.append(train_step(state, network, runtime, config, batch, labels))
        bar.update(len(batch) * runtime.world_size)
    return float(runtime.total(torch.stack(losses).mean())) / runtime.world_size


def _batches(loader: LabelledLoader, tiles: LabelledTiles, steps: int, runtime: Runtime) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield an epoch's tiles and labels, as many batches in each process."""
    all_labels = torch.from_numpy(tiles.labels)
    for batch, numbers in loader:
        labels = all_labels[tiles.rows(numbers)].to(runtime.device, non_blocking=True)
        yield batch, labels
    for _ in range(steps - len(loader)):
        # This process has no more tiles, but the others wait for it: its last ones again, counting nothing.
        yield batch, torch.full_like(labels, torch.nan)


def _validate(
    state: TrainingState, loader: LabelledLoader, tiles: LabelledTiles, class_names: Sequence[str], runtime: Runtime
) -> tuple[dict[str, Any], np.ndarray | None, dict[str, Any]]:
    """Return the metrics, in all processes; the logits (N, C), in the main one; and what turns logits into decisions there."""
    runtime.share_buffers(state.evaluated)
    logits = predict(state.evaluated, loader, tiles, runtime)
    metrics: dict[str, Any] = {}
    decisions: dict[str, Any] = {}
    if runtime.is_main:
        labels = torch.from_numpy(tiles.labels).to(runtime.device)
        losses = state.loss(torch.from_numpy(logits).to(runtime.device), labels)
        temperature = fit_temperature(tiles.labels, logits)
        probabilities = calibrate(logits, temperature)
        decisions = {"temperature": temperature, "thresholds": fit_thresholds(tiles.labels, probabilities)}
        metrics["val_loss"] = float(losses.sum() / (~labels.isnan()).sum())
        metrics |= classification_metrics(tiles.labels, probabilities, class_names, decisions["thresholds"])
    return runtime.from_main(metrics), logits, decisions


def _with_intervals(
    tiles: LabelledTiles, logits: np.ndarray, class_names: Sequence[str], decisions: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the metrics with intervals over patients or films, and how many there are of both."""
    known = set(tiles.patients) - {""}
    by_patient = len(known) > 1 and (tiles.patients != "").all()
    metrics = evaluate_predictions(
        tiles.labels,
        calibrate(logits, decisions["temperature"]),
        class_names,
        tiles.patients if by_patient else tiles.groups,
        decisions["thresholds"],
    )
    counts = {"films": len(np.unique(tiles.groups)), "patients": len(known)}
    return metrics | counts | {"intervals_over": "patients" if by_patient else "films"}


def _score(metrics: Mapping[str, Any]) -> float:
    """Return what the best epoch is best in: the mean AUC; where the labels define none, the validation loss, negative."""
    return -metrics["val_loss"] if metrics["mean_auc"] is None else metrics["mean_auc"]


def _stages(epoch: int, config: FinetuneConfig) -> int:
    return trainable_stages(epoch, config.freeze_backbone_epochs, config.unfreeze_every, STAGE_COUNT)


def _stopped(state: TrainingState, config: FinetuneConfig) -> bool:
    return 0 < config.early_stopping <= state.stale


def _fingerprint(class_names: Sequence[str], *sides: LabelledTiles) -> str:
    """Return a hash of the classes, tiles and labels that decide a run."""
    digest = hashlib.sha256("\0".join(class_names).encode())
    for side in sides:
        digest.update("\0".join(side.keys).encode())
        digest.update(side.labels.tobytes())
    return digest.hexdigest()


def _restore(
    path: Path, state: TrainingState, loader: LabelledLoader, config: FinetuneConfig, fingerprint: str, runtime: Runtime
) -> dict[str, Any]:
    """Put a run back where a checkpoint left it and return that epoch's metrics."""
    checkpoint = load_to_resume(path, "classifier")
    saved = checkpoint["resume"]
    check_same_options(path, checkpoint["config"], config, _FREE)
    if saved["data"] != fingerprint:
        raise BadInput(f"checkpoint {path} was trained with other classes, labels or tiles; resume with the same CSVs")
    if len(saved["processes"]) != runtime.world_size:
        raise BadInput(f"checkpoint {path} was trained by {len(saved['processes'])} processes; resume with as many")
    state.model.load_state_dict(saved["weights"] or checkpoint["model_state_dict"])
    if state.average:
        state.average.model.load_state_dict(checkpoint["model_state_dict"])
    state.optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
    if saved["scaler"]:  # empty where the first half needed no scaler
        state.scaler.load_state_dict(saved["scaler"])
    state.step, state.best, state.stale = checkpoint["step"], saved["best"], saved["stale"]
    mine = saved["processes"][runtime.rank]
    loader.load_state_dict(mine["loader"])
    set_random_state(mine["random"], runtime.device)
    return checkpoint["metrics"]


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
        rank=runtime.rank,
        world_size=runtime.world_size,
    )


def _epoch_lines(epoch: int, epochs: int, metrics: dict[str, Any], stages: int, is_best: bool) -> str:
    def figure(name: str) -> str:
        return "undefined" if metrics[name] is None else f"{metrics[name]:.4f}"

    lines = []
    if stages == 0:
        lines.append(f"🧊 Epoch {epoch}: Backbone frozen (training only classification head)")
    elif stages < STAGE_COUNT:
        lines.append(f"🔓 Epoch {epoch}: Backbone partly frozen (training its last {stages} of {STAGE_COUNT} stages)")
    lines += [
        f"Epoch {epoch:3d}/{epochs}:",
        f"  Train Loss: {figure('train_loss')}",
        f"  Val Loss:   {figure('val_loss')}",
        f"  Mean AUC:   {figure('mean_auc')}",
        f"  Mean AP:    {figure('mean_ap')}",
        f"  Exact Match: {figure('exact_match')}",
    ]
    if is_best:
        by = f"Val Loss: {figure('val_loss')}" if metrics["mean_auc"] is None else f"AUC: {figure('mean_auc')}"
        lines.append(f"  ✅ New best model saved ({by})")
    return "\n".join(lines)
