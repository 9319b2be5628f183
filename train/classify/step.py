"""One step of fine-tuning, and the state that it changes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mammostream.models.classifier import MammogramClassifier
from mammostream.models.tensors import place
from mammostream.train.classify.config import FinetuneConfig
from mammostream.train.classify.ema import WeightAverage
from mammostream.train.classify.losses import Loss, build_loss, mix
from mammostream.train.run.runtime import Runtime
from mammostream.train.run.schedules import learning_rates
from mammostream.train.run.stages import checkpoint_activations


@dataclass
class TrainingState:
    """What a step needs and changes, and what is kept between epochs."""

    model: MammogramClassifier
    average: WeightAverage[MammogramClassifier] | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    loss: Loss
    rates: np.ndarray  # (steps,): one cosine from 1 to 0, times each group's peak
    step: int = 0
    best: float = -math.inf  # the best epoch's score
    stale: int = 0  # epochs since then, counted once nothing was left to unfreeze

    @property
    def evaluated(self) -> MammogramClassifier:
        """The model that is evaluated and saved: the average if there is one."""
        return self.average.model if self.average else self.model


def build_state(
    model: MammogramClassifier, config: FinetuneConfig, runtime: Runtime, steps: int, pos_weight: np.ndarray
) -> TrainingState:
    """Return the model on its device, its optimiser and its schedule, at step 0."""
    model = place(model, runtime.device)
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


def train_step(
    state: TrainingState, network: nn.Module, runtime: Runtime, config: FinetuneConfig, tiles: Tensor, labels: Tensor
) -> Tensor:
    """Take one optimiser step, without waiting for the device.

    Parameters
    ----------
    network
        ``state.model``, or its wrapper from :meth:`Runtime.parallel`.
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
    # The mean over all known labels of the batch, in any process: each process divides by the same number.
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
