"""What a recipe means for the optimiser and the target: rates, scaling with the batch, which parameters decay; and LARS."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mammostream.train.byol.config import PretrainConfig

REFERENCE_BATCH = 32  # pairs: the batch that the recipes' rates and momentum are for
_POWERS = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}


@dataclass(frozen=True)
class Recipe:
    """How a pre-training recipe optimises, where no option says otherwise.

    Attributes
    ----------
    lr
        AdamW's peak learning rate at :data:`REFERENCE_BATCH`.
    scaling
        How that rate grows with the effective batch: ``none`` or ``sqrt`` (Malladi et al. 2022, arXiv:2205.10287).
    decays_all
        Whether norms and biases decay too.
    scales_momentum
        Whether the target's momentum follows the batch: ``m^(B / B0)``, the EMA scaling rule (Busbridge et al. 2023,
        arXiv:2307.13813), so that the target forgets as fast per pair of views at any batch.
    """

    lr: float
    scaling: str
    decays_all: bool
    scales_momentum: bool


RECIPES = {
    # The guide's script: its rate as it stands, whatever the batch, and torch's AdamW over all parameters alike.
    "guide": Recipe(lr=2e-3, scaling="none", decays_all=True, scales_momentum=False),
    "mammo": Recipe(lr=3e-4, scaling="sqrt", decays_all=False, scales_momentum=True),
}
ADAMW_DECAY = 1e-4
# Grill et al. 2020: 0.2 at a batch of 256, linear in the batch, for LARS; no decay and no adaptation of norms and biases.
LARS_LR, LARS_BATCH, LARS_DECAY = 0.2, 256, 1.5e-6


@dataclass(frozen=True)
class Optimisation:
    """An optimiser and the target's momentum as a run will use them.

    Attributes
    ----------
    optimizer
        ``adamw`` or ``lars``.
    batch
        The effective batch: pairs per step of one process × processes × accumulated steps.
    lr
        The peak learning rate.
    why
        Where the rate comes from, in words.
    weight_decay
        Of what decays.
    decays_all
        Whether norms and biases decay too.
    momentum_exponent
        The power that each step's target momentum is raised to.
    """

    optimizer: str
    batch: int
    lr: float
    why: str
    weight_decay: float
    decays_all: bool
    momentum_exponent: float

    def __str__(self) -> str:
        which = "all parameters" if self.decays_all else "all but norms and biases"
        name = {"adamw": "AdamW", "lars": "LARS"}[self.optimizer]
        return (
            f"{name}, peak lr {self.lr:.3g} ({self.why}) for an effective batch of {self.batch}, decay {self.weight_decay:g} "
            f"of {which}, target momentum to the power {self.momentum_exponent:g}"
        )


def resolve_optimisation(config: PretrainConfig, batch: int) -> Optimisation:
    """Return what a recipe and the options mean at an effective batch of `batch` pairs."""
    recipe = RECIPES[config.recipe]
    optimizer = "adamw" if config.optimizer == "auto" else config.optimizer
    if optimizer == "lars":
        lr, reference, scaling, decay = LARS_LR, LARS_BATCH, "linear", LARS_DECAY
    else:
        lr, reference, scaling, decay = recipe.lr, REFERENCE_BATCH, recipe.scaling, ADAMW_DECAY
    if config.lr is not None:
        lr, why = config.lr, "as given"
    elif scaling == "none":
        why = "the guide's, at any batch"
    else:
        why = f"{lr:g} at a batch of {reference}, {scaling} scaling"
        lr *= (batch / reference) ** _POWERS[scaling]
    return Optimisation(
        optimizer=optimizer,
        batch=batch,
        lr=lr,
        why=why,
        weight_decay=decay if config.weight_decay is None else config.weight_decay,
        decays_all=recipe.decays_all and optimizer == "adamw",
        momentum_exponent=batch / REFERENCE_BATCH if recipe.scales_momentum else 1.0,
    )


def build_optimizer(model: nn.Module, optimisation: Optimisation) -> torch.optim.Optimizer:
    """Return the optimiser of a model's parameters that train, its rate 0 until the schedule sets it.

    AdamW is torch's fused one on any device: one kernel over all parameters, and its counters of steps are never read.
    """
    decaying, others = split_parameters(model)
    if optimisation.decays_all:
        decaying, others = [*decaying, *others], []
    groups = [
        {"params": decaying, "weight_decay": optimisation.weight_decay},
        {"params": others, "weight_decay": 0.0, "adapts": False},
    ]
    groups = [group for group in groups if group["params"]]
    if optimisation.optimizer == "lars":
        return LARS(groups, lr=0.0)
    return torch.optim.AdamW([{k: v for k, v in group.items() if k != "adapts"} for group in groups], lr=0.0, fused=True)


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the parameters that train: matrices and kernels, and the rest: norms, biases and ConvNeXt's layer scales."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    rest = {name for name, p in named if p.ndim <= 1 or name.endswith("layer_scale")}
    return [p for name, p in named if name not in rest], [p for name, p in named if name in rest]


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling with momentum (You et al. 2017, arXiv:1708.03888, algorithm 1).

    For each parameter w with gradient g::

        rate = trust |w| / (|g| + decay |w|)        1 where w or g is 0, or the group does not adapt
        v    = momentum v + lr rate (g + decay w)
        w    = w - v

    All parameters of a group move together, and no value is read back from the device. As with torch's fused optimisers, a
    step changes nothing while the attribute ``found_inf``, a tensor on the device, is 1.

    Parameters
    ----------
    params
        Parameters, or groups of them; a group with ``adapts`` False takes a rate of 1 (norms and biases: their lengths say
        nothing about a good step).
    lr
        The learning rate.
    momentum
        In [0, 1).
    weight_decay
        0 or more.
    trust
        The paper's eta.
    """

    _step_supports_amp_scaling = True  # GradScaler then sets found_inf instead of reading it

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 1e-3,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust, "adapts": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step; `closure`, where given, computes the gradients again and its value is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        weights = [p for p in group["params"] if p.grad is not None]
        if not weights:
            return
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["velocity"] = torch.zeros_like(weight)
        velocities = [self.state[weight]["velocity"] for weight in weights]
        gradients = [weight.grad for weight in weights]
        good = 1 - getattr(self, "found_inf", weights[0].new_zeros(())).to(weights[0])
        gradients = [gradient.where(good > 0, 0) for gradient in gradients]  # NaN times 0 would be NaN

        decay = group["weight_decay"]
        rates = weights[0].new_ones(len(weights))
        if group["adapts"]:
            lengths = torch.stack(torch._foreach_norm(weights))
            slopes = torch.stack(torch._foreach_norm(gradients))
            rates = group["trust"] * lengths / (slopes + decay * lengths)
            rates = rates.where((lengths > 0) & (slopes > 0), 1.0)
        updates = torch._foreach_add(gradients, weights, alpha=decay)
        torch._foreach_mul_(updates, (group["lr"] * good * rates).unbind())

        torch._foreach_mul_(velocities, group["momentum"] ** good)
        torch._foreach_add_(velocities, updates)
        torch._foreach_sub_(weights, torch._foreach_mul(velocities, good))
