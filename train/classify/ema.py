"""An average of a network's weights over the steps of its training."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


class WeightAverage(Generic[M]):
    """Exponential moving average of a module's parameters and batch-norm statistics (Polyak and Juditsky 1992).

    ``average = d average + (1 - d) current`` after each step, with ``d = min(decay, (1 + t) / (10 + t))`` at step t from 0
    (TensorFlow's rule): the first weights, which are still poor, are soon forgotten.

    Parameters
    ----------
    model
        The module to average; the average starts as a copy of it.
    decay
        In (0, 1): about the last ``1 / (1 - decay)`` steps count.
    """

    def __init__(self, model: M, decay: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)
        """The averaged module."""
        self._decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Update the average with the weights after `step`, counted from 0."""
        decay = min(self._decay, (1 + step) / (10 + step))
        averages, currents = self.model.state_dict(), model.state_dict()
        floats = [name for name, tensor in averages.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([averages[n] for n in floats], [currents[n] for n in floats], 1 - decay)
        for name in averages.keys() - set(floats):  # batch norms count their batches
            averages[name].copy_(currents[name])
