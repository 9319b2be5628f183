"""Device and precision: what ``auto`` means on this machine, and the autocast and scaler that follow from it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from common.errors import BadInput
from train.config import RuntimeConfig

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Runtime:
    """The resolved device (``cpu`` or ``cuda``) and precision (``fp32``, ``bf16`` or ``fp16``)."""

    device: torch.device
    precision: str

    def autocast(self) -> AbstractContextManager:
        """Return the autocast context of this precision; fp32 needs none."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=_DTYPES[self.precision])

    def scaler(self) -> torch.amp.GradScaler:
        """Return a gradient scaler; only fp16's narrow range needs one, else it passes everything through."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def __str__(self) -> str:
        return f"{self.device.type}, {self.precision}"


def resolve_runtime(config: RuntimeConfig) -> Runtime:
    """Resolve ``auto`` for this machine.

    Raises
    ------
    BadInput
        ``cuda`` is asked for and there is no GPU.
    """
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise BadInput("--device cuda: torch sees no GPU; use --device cpu, or see 'mammostream doctor'")
    device = torch.device("cuda" if available and config.device != "cpu" else "cpu")
    precision = config.precision
    if precision == "auto":
        precision = "fp32" if device.type == "cpu" else "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return Runtime(device, precision)
