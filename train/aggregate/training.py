"""Training of the heads: all of them on the same batches, each kept as it was in its own best epoch."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from mammostream.common.errors import BadInput, Stopped
from mammostream.common.progress import progress
from mammostream.models.checkpoints import entries_of, save_checkpoint
from mammostream.models.tensors import load_state
from mammostream.train.aggregate.bags import Bags
from mammostream.train.aggregate.config import AggregateConfig
from mammostream.train.aggregate.heads import POOLINGS, BagHead
from mammostream.train.classify.losses import bce_loss, masked_loss, positive_weights
from mammostream.train.evaluate.metrics import classification_metrics
from mammostream.train.run.resuming import check_same_options, load_to_resume
from mammostream.train.run.runtime import TRAINING_LOCK, Runtime, only_run
from mammostream.train.run.schedules import learning_rates
from mammostream.train.run.stopping import StopSignals
from mammostream.train.run.tracking import Tracker

LAST = "last_aggregator.pth"
_SAMPLED = 20_000  # tiles whose features are normalised to mean 0 and deviation 1
# What may change between two halves of a run.
_FREE = frozenset({"device", "num_workers", "wandb_project", "wandb_mode"})


@dataclass
class Training:
    """A run: the heads, what trains them, and the best of each so far.

    Attributes
    ----------
    best
        Pooling -> ``state`` of the head, its ``epoch`` and validation ``auc`` (NaN where undefined) and ``loss``.
    stale
        Epochs since any head got better.
    """

    train: Bags
    val: Bags
    class_names: list[str]
    config: AggregateConfig
    runtime: Runtime
    heads: nn.ModuleDict
    optimizer: torch.optim.Optimizer
    lrs: np.ndarray
    pos_weight: Tensor
    epoch: int = 0
    stale: int = 0
    best: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch; the last may be smaller."""
        return math.ceil(len(self.train) / self.config.batch_size)

    @property
    def finished(self) -> bool:
        """Whether no epoch is left, or the validation has not improved for too long."""
        return self.epoch >= self.config.epochs or 0 < self.config.early_stopping <= self.stale


def build_heads(feature_dim: int, num_classes: int, config: AggregateConfig) -> nn.ModuleDict:
    """Return a new head of each pooling."""
    heads = {
        name: BagHead(
            name,
            feature_dim,
            num_classes,
            hidden_dim=config.hidden_dim,
            attention_dim=config.attention_dim,
            per_class=config.attention == "per-class",
            top=config.top,
            dropout=config.dropout,
        )
        for name in POOLINGS
    }
    return nn.ModuleDict(heads)


def named_heads(heads: nn.ModuleDict) -> dict[str, BagHead]:
    """Return the heads by pooling."""
    return {name: cast(BagHead, head) for name, head in heads.items()}


def start_training(train: Bags, val: Bags, class_names: list[str], config: AggregateConfig, runtime: Runtime) -> Training:
    """Return a run before its first epoch; bags without any label are left out of the training."""
    train = train.take(~np.isnan(train.labels).all(1))
    torch.manual_seed(config.seed)
    heads = build_heads(train.dim, len(class_names), config)
    mean, std = _moments(train, config.seed)
    for head in named_heads(heads).values():
        head.mean.copy_(mean)
        head.std.copy_(std)
    heads = heads.to(runtime.device)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    steps = math.ceil(len(train) / config.batch_size) * config.epochs
    weights = torch.from_numpy(positive_weights(train.labels, config.pos_weight, class_names)).to(runtime.device)
    lrs = learning_rates(config.lr, steps)
    return Training(train, val, class_names, config, runtime, heads, optimizer, lrs, weights)


def _moments(bags: Bags, seed: int) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (D,) of the features of a sample of tiles; 1 where a feature is constant."""
    rows = bags.order
    if len(rows) > _SAMPLED:
        rows = np.sort(np.random.default_rng(seed).choice(rows, _SAMPLED, replace=False))
    sample = bags.inputs(rows).float().numpy()
    std = sample.std(0)
    return torch.from_numpy(sample.mean(0)), torch.from_numpy(np.where(std > 1e-6, std, 1))


def fit(run: Training, output_dir: Path, command: Mapping[str, Any], resume: Path | None, facts: Mapping[str, Any]) -> None:
    """Train until the end, or the validation no longer improves; the checkpoint of the last epoch allows to resume exactly.

    Parameters
    ----------
    run
        What :func:`start_training` gave.
    output_dir
        The run's folder.
    command
        The command's resolved options.
    resume
        A checkpoint of this run to go on from, or None.
    facts
        What checkpoints hold besides: ``level``, ``features`` (what made them) and ``fitted_on``.

    Raises
    ------
    BadInput
        The checkpoint has other options, features, labels or bags; or the loss is no longer finite.
    Stopped
        A signal arrived: the last finished epoch is saved.
    """
    if resume is not None:
        with entries_of(resume, "aggregator"):
            _restore(run, resume, facts)
    config, runtime = run.config, run.runtime
    with (
        only_run(output_dir / TRAINING_LOCK, runtime),
        StopSignals() as signals,
        Tracker(
            output_dir,
            config.wandb_project,
            config.wandb_mode,
            dict(command),
            resume_step=None if resume is None else run.epoch * run.steps_per_epoch,
        ) as tracker,
        progress(None, f"training ({runtime})", "bag", len(run.train) * config.epochs, len(run.train) * run.epoch) as bar,
    ):
        while not run.finished:
            losses = _train_epoch(run, signals, bar)
            run.epoch += 1
            figures = _validate(run)
            bar.set_postfix(epoch=run.epoch, loss=f"{losses.sum():.3f}", refresh=False)
            trained = {f"{name}/train_loss": float(loss) for name, loss in zip(run.heads, losses, strict=True)}
            tracker.log(run.epoch * run.steps_per_epoch, {"epoch": run.epoch} | trained | figures)
            save_checkpoint(output_dir / LAST, checkpoint_of(run, facts, **_to_resume(run)))


def _train_epoch(run: Training, signals: StopSignals, bar: Any) -> np.ndarray:
    """Take the steps of an epoch; return each head's mean loss. Order and dropout depend on seed and epoch alone."""
    config, runtime = run.config, run.runtime
    order = np.random.default_rng([config.seed, run.epoch]).permutation(len(run.train))
    torch.manual_seed(int(np.random.SeedSequence([config.seed, run.epoch]).generate_state(1)[0]))
    run.heads.train()
    sums = torch.zeros(len(run.heads), device=runtime.device)
    for number, start in enumerate(range(0, len(order), config.batch_size)):
        chosen = order[start : start + config.batch_size]
        features, bag, labels = run.train.batch(chosen, runtime.device)
        step = run.epoch * run.steps_per_epoch + number
        for group in run.optimizer.param_groups:
            group["lr"] = float(run.lrs[step])
        losses = torch.stack([_loss(run, head(features, bag, len(chosen))[0], labels) for head in run.heads.values()])
        run.optimizer.zero_grad(set_to_none=True)
        losses.sum().backward()
        for head in run.heads.values():  # each by itself: the heads only share their batches
            nn.utils.clip_grad_norm_(head.parameters(), config.gradient_clip)
        run.optimizer.step()
        sums += losses.detach() * len(chosen)
        bar.update(len(chosen))
        if code := signals.exit_code(runtime, step):
            raise Stopped(f"stopped in epoch {run.epoch + 1}, which is begun again; resume with --resume auto", code)
    means = (sums / len(order)).cpu().numpy()
    if not np.isfinite(means).all():
        raise BadInput(f"the loss of epoch {run.epoch + 1} is not finite; lower --lr")
    return means


def _loss(run: Training, logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean loss over the labels that are known."""
    smoothing = run.config.label_smoothing
    losses = masked_loss(logits, labels, kind=bce_loss, pos_weight=run.pos_weight, label_smoothing=smoothing)
    return losses.sum() / (~labels.isnan()).sum().clamp(min=1)


@torch.inference_mode()
def bag_logits(head: BagHead, bags: Bags, batch_size: int, device: torch.device) -> tuple[np.ndarray, np.ndarray | None]:
    """Return logits (B, C) of bags and, of gated attention, the weights (N, A) of their tiles, as ``bags.order`` has them."""
    head.eval()
    logits, weights = [], []
    for start in range(0, len(bags), batch_size):
        chosen = np.arange(start, min(start + batch_size, len(bags)))
        features, bag, _ = bags.batch(chosen, device)
        found, attention = head(features, bag, len(chosen))
        logits.append(found.cpu().numpy())
        if attention is not None:
            weights.append(attention.cpu().numpy())
    return np.concatenate(logits), np.concatenate(weights) if weights else None


def _validate(run: Training) -> dict[str, Any]:
    """Judge each head on the validation bags, and keep those that are better than before."""
    figures: dict[str, Any] = {}
    better = False
    for name, head in named_heads(run.heads).items():
        logits, _ = bag_logits(head, run.val, run.config.batch_size, run.runtime.device)
        loss = float(
            _loss(run, torch.from_numpy(logits).to(run.runtime.device), torch.from_numpy(run.val.labels).to(run.runtime.device))
        )
        probabilities = 1 / (1 + np.exp(-logits.astype(np.float64)))
        auc = classification_metrics(run.val.labels, probabilities, run.class_names)["mean_auc"]
        figures |= {f"{name}/val_loss": loss, f"{name}/val_auc": auc}
        found = {"auc": math.nan if auc is None else float(auc), "loss": loss}
        if name not in run.best or _merit(found) > _merit(run.best[name]):
            better = True
            run.best[name] = found | {"epoch": run.epoch, "state": copy.deepcopy(head.state_dict())}
    run.stale = 0 if better else run.stale + 1
    return figures


def _merit(found: Mapping[str, Any]) -> tuple[float, float]:
    """By the AUC, and where it is equal or undefined by the loss."""
    return (0.0 if math.isnan(found["auc"]) else found["auc"]), -found["loss"]


def checkpoint_of(run: Training, facts: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Return a checkpoint of the heads as they are, with further entries."""
    return {
        "kind": "aggregator",
        "arch": "aggregator",
        "model_state_dict": run.heads.state_dict(),
        "config": asdict(run.config),
        "class_names": run.class_names,
        "feature_dim": run.train.dim,
        "epoch": run.epoch,
        **more,
        **facts,
    }


def _to_resume(run: Training) -> dict[str, Any]:
    """Return what a checkpoint needs for the run to go on from it."""
    state = {"optimizer": run.optimizer.state_dict(), "best": run.best, "stale": run.stale, "data": _fingerprint(run)}
    return {"step": run.epoch * run.steps_per_epoch, "resume": state}


def _fingerprint(run: Training) -> str:
    """Return a hash of the bags and their labels."""
    from mammostream.common.files import sha256_json

    sides = [
        [bags.names.astype(str).to_numpy().tolist(), bags.sizes.tolist(), np.nan_to_num(bags.labels, nan=-1).tolist()]
        for bags in (run.train, run.val)
    ]
    return sha256_json([sides, run.class_names])


def _restore(run: Training, path: Path, facts: Mapping[str, Any]) -> None:
    checkpoint = load_to_resume(path, "aggregator")
    saved = checkpoint["resume"]
    check_same_options(path, checkpoint["config"], run.config, _FREE)
    check_features(checkpoint, facts["features"], path)
    if saved["data"] != _fingerprint(run):
        raise BadInput(f"checkpoint {path} was trained with other classes, labels or bags; resume with the same manifest")
    load_state(run.heads, checkpoint["model_state_dict"], f"checkpoint {path}")
    run.optimizer.load_state_dict(saved["optimizer"])
    run.epoch, run.best, run.stale = checkpoint["epoch"], saved["best"], saved["stale"]


def check_features(checkpoint: Mapping[str, Any], found: Mapping[str, Any], path: Path, same_shards: bool = True) -> None:
    """Check that features are of the network, and of the shards, that a checkpoint's heads learnt from.

    Raises
    ------
    BadInput
        They are of another; it is named.
    """
    learnt = checkpoint["features"]
    if learnt["model_sha256"] != found["model_sha256"]:
        raise BadInput(
            f"the heads of {path} learnt from features of another backbone (checkpoint {learnt['model_sha256'][:12]}…, these "
            f"features are of {found['model_sha256'][:12]}…); run 'mammostream embed' with that checkpoint"
        )
    if same_shards and learnt["inputs_sha256"] != found["inputs_sha256"]:
        raise BadInput(
            f"checkpoint {path} learnt from features of other shards or another --split; resume with the same features"
        )
