"""The options that every training and every prediction takes.

The options of a command live in its room's ``config.py``, apart from the code that they configure, so that ``--help`` need not
import torch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from mammostream.common.errors import BadInput
from mammostream.common.options import option


@dataclass(frozen=True)
class RuntimeConfig:
    """What both trainings and inference share: where they run and how they read."""

    batch_size: int = option(32, "Tiles per batch, of each process where torchrun started several.")
    num_workers: int = option(min(16, os.cpu_count() or 1), "CPU threads that decode and augment tiles.")
    device: str = option("auto", "auto = the GPU where there is one, else the CPU.", choices=("auto", "cpu", "cuda"))
    precision: str = option(
        "auto",
        "auto = bf16 on a GPU that has it, fp16 on an older one, fp32 on the CPU.",
        choices=("auto", "fp32", "bf16", "fp16"),
    )

    def __post_init__(self) -> None:
        require_positive(self, "batch_size", "num_workers")


@dataclass(frozen=True)
class TrainingConfig(RuntimeConfig):
    """What both trainings share."""

    seed: int = option(0, "Seed of the weights, the order of tiles and the augmentations.")
    gradient_clip: float = option(1.0, "Largest gradient norm; larger ones are scaled down.")
    wandb_project: str = option("mammostream", "Weights & Biases project.")
    wandb_mode: str = option(
        "auto",
        "auto = online where a key is set up, else offline below the run's folder; metrics.jsonl is always written.",
        choices=("auto", "online", "offline", "disabled"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "epochs", "gradient_clip")
        require_not_negative(self, "seed", "weight_decay")


def require_positive(config: RuntimeConfig, *names: str) -> None:
    """Raise BadInput for the first of the options that is given and not above 0."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise BadInput(f"--{name.replace('_', '-')} {value} is not positive")


def require_not_negative(config: RuntimeConfig, *names: str) -> None:
    """Raise BadInput for the first of the options that is given and below 0."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= 0:
            raise BadInput(f"--{name.replace('_', '-')} {value} is negative")
