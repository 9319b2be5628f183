"""How much arithmetic a BYOL step is, and how much the device could do: their ratio is the MFU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

_COUNTED = 2  # pairs: the fewest that a batch norm in training takes
# Dense half-precision peaks of the makers' datasheets in FLOP/s (bf16; fp16 where a chip has no bf16). The first part of a name
# that fits counts, so that an H100 NVL is not treated as an H100 SXM.
_PEAKS = {
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A40": 150e12,
    "A30": 165e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "V100": 125e12,
    "T4": 65e12,
}


def flops_per_pair(model: nn.Module, size: int, channels: int = 1) -> int:
    """Return the floating-point operations of a training step for one pair of views: forward, backward, target's forward.

    They are counted by torch over the real step, on tensors without memory: matrix products and convolutions, a
    multiplication and an addition as two. What gradient checkpointing computes a second time is no work of the model and
    is not counted.

    Parameters
    ----------
    model
        A :class:`mammostream.models.byol.MammogramBYOL`, neither compiled nor wrapped; it is left as it is.
    size
        Side of the views in pixels.
    channels
        The views' channels.
    """
    shapes = {
        name: torch.empty_like(tensor, device="meta", requires_grad=tensor.requires_grad)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }
    views = tuple(torch.empty(_COUNTED, channels, size, size, device="meta") for _ in range(2))
    was_training = model.training
    model.train()
    try:
        with _activations_kept(model), FlopCounterMode(display=False) as counter:
            functional_call(model, shapes, views).loss.backward()
    finally:
        model.train(was_training)
    return counter.get_total_flops() // _COUNTED


def peak_flops(device: torch.device) -> float | None:
    """Return the device's dense half-precision peak in FLOP/s by its datasheet; None for a CPU or an unknown GPU."""
    return peak_by_name(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_by_name(name: str) -> float | None:
    """Return the peak of a GPU by the name that its driver gives, see :func:`peak_flops`."""
    words = name.replace("-", " ")
    return next((peak for part, peak in _PEAKS.items() if f" {part.lower()} " in f" {words.lower()} "), None)


def mfu(pairs_per_second: float, flops: int, device: torch.device) -> float | None:
    """Return the model FLOP utilisation, 0-1: the arithmetic done over what the device's peak allows; None without a peak.

    Parameters
    ----------
    pairs_per_second
        Of this device.
    flops
        Of one pair, see :func:`flops_per_pair`.
    """
    peak = peak_flops(device)
    return None if peak is None else pairs_per_second * flops / peak


@contextmanager
def _activations_kept(model: nn.Module) -> Iterator[None]:
    """Undo :func:`mammostream.train.run.stages.checkpoint_activations` for a while."""
    hidden = {module: vars(module).pop("forward") for module in model.modules() if "forward" in vars(module)}
    try:
        yield
    finally:
        for module, forward in hidden.items():
            module.forward = forward
