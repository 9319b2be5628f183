"""What makes steps fast on this machine: compiling, CUDA graphs, cuDNN's search, Python's garbage collector out of the way."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from mammostream.common.errors import BadInput
from mammostream.models.byol import BYOLOutput
from mammostream.train.byol.config import PretrainConfig
from mammostream.train.run.runtime import Runtime

COLLECT_EVERY = 1000  # steps
_TRITON = (7, 0)  # the minimum compute capability that torch.compile's Triton supports


def resolve_compile(config: PretrainConfig, runtime: Runtime) -> str:
    """Return what ``--compile`` and ``--cuda-graphs`` mean here: ``off``, ``on`` or ``cuda graphs``.

    Raises
    ------
    BadInput
        CUDA graphs are asked for where there are none.
    """
    on_gpu = runtime.device.type == "cuda"
    if config.cuda_graphs:
        reasons = {
            "need a GPU": not on_gpu,
            "replay a compiled step; leave --compile off away": config.compile == "off",
            "take one batch a step; leave --accumulate away": config.accumulate > 1,
            "are for one process: what processes exchange is no part of a graph": runtime.world_size > 1,
        }
        for reason, holds in reasons.items():
            if holds:
                raise BadInput(f"--cuda-graphs {reason}")
        return "cuda graphs"
    if config.compile != "auto":
        return config.compile
    return "on" if on_gpu and torch.cuda.get_device_capability(runtime.device) >= _TRITON else "off"


def accelerate(network: nn.Module, choice: str) -> nn.Module:
    """Return the network compiled as :func:`resolve_compile` chose; it shares its tensors.

    The compilation itself happens in the first step. Shapes are taken as fixed: every batch is full.
    """
    if choice == "off":
        return network
    if choice == "on":
        return cast(nn.Module, torch.compile(network, dynamic=False))
    return _Replayed(cast(nn.Module, torch.compile(network, dynamic=False, mode="reduce-overhead")))


class _Replayed(nn.Module):
    """A network whose forward and backward passes are CUDA graphs: their results are copied out of the memory they reuse."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *views: Tensor) -> BYOLOutput:
        torch.compiler.cudagraph_mark_step_begin()
        return BYOLOutput(*(tensor.clone() for tensor in self.network(*views)))


def search_convolutions(device: torch.device) -> None:
    """Let cuDNN try its convolutions on the first batch and keep the fastest, for the whole process; shapes never change."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True


@contextmanager
def collecting_on_schedule(every: int = COLLECT_EVERY) -> Iterator[Callable[[int], None]]:
    """Stop Python's garbage collector from running at any moment; yields what to call after each step with its number.

    It runs every this many steps instead, at the same step in all processes: one that collects makes the others wait
    (as torchtitan does). What has no cycles is freed at once in any case.
    """

    def after(step: int) -> None:
        if step % every == 0:
            gc.collect(1)

    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield after
    finally:
        if was_enabled:
            gc.enable()
