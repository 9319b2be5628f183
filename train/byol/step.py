"""One step of BYOL pre-training, and the state that it changes."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mammostream.models.byol import BYOLOutput, MammogramBYOL
from mammostream.train.byol.bad_steps import KeptStatistics
from mammostream.train.byol.config import PretrainConfig
from mammostream.train.run.runtime import Runtime

Views = tuple[Tensor, Tensor]


@dataclass
class TrainingState:
    """What a step needs and changes."""

    model: MammogramBYOL
    network: nn.Module  # the model itself, or what runs it: compiled, over several processes; they share its tensors
    optimizer: Any  # torch.optim.Optimizer, one that skips where its attribute found_inf is 1, as torch's fused ones do
    scaler: torch.amp.GradScaler
    lrs: np.ndarray  # (steps,)
    momenta: np.ndarray  # (steps,)
    step: int = 0
    chosen: dict[str, str] = field(default_factory=dict)  # what the options left to the machine and the recipe, in words
    sums: Tensor = field(init=False)  # (2,) float64: of this epoch, the loss's sum and the number of steps that were not bad
    statistics: KeptStatistics = field(init=False)

    def __post_init__(self) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64, device=next(self.model.parameters()).device)
        self.statistics = KeptStatistics(self.model)

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return len(self.lrs)


def train_step(
    state: TrainingState, runtime: Runtime, config: PretrainConfig, batches: Iterable[Views], count: int = 1
) -> tuple[BYOLOutput, Tensor]:
    """Take one optimiser step and move the target; nothing here waits for the device.

    A step whose gradients are not finite changes neither the weights nor the optimiser nor the batch norms nor the target. It
    counts as a step all the same: learning rate and momentum are functions of the batches taken.

    Parameters
    ----------
    batches
        The step's `count` batches, taken one after the other: two (N, 1, H, W) float32 tensors each, on the device.
    count
        Their number: the gradient is the mean of theirs.

    Returns
    -------
    output, gradient norm
        Of the last batch, but the loss is the mean over all; the norm, before clipping, is a scalar, not finite in a bad step.
        Detached, on the device.
    """
    for group in state.optimizer.param_groups:
        group["lr"] = float(state.lrs[state.step])
    state.optimizer.zero_grad(set_to_none=True)
    state.statistics.keep()

    losses = []
    for number, views in enumerate(batches, start=1):
        # The processes exchange gradients once a step.
        with runtime.keeping_gradients(state.network) if number < count else nullcontext():
            with runtime.autocast():
                output = state.network(*views)
            state.scaler.scale(output.loss / count).backward()
        losses.append(output.loss.detach())

    state.scaler.unscale_(state.optimizer)
    norm = nn.utils.clip_grad_norm_(state.model.parameters(), config.gradient_clip)
    bad = ~norm.isfinite()

    state.optimizer.found_inf = bad.float()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.statistics.restore(bad)

    state.model.update_target(float(state.momenta[state.step]), skipped=bad)
    loss = torch.stack(losses).mean()
    state.sums += torch.stack([loss.where(~bad, 0), (~bad).float()])
    state.step += 1
    return output._replace(loss=loss), norm
