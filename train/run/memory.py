"""What to say when the memory does not suffice: how much was in use, and by whom."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mammostream.common.errors import BadInput

_SIGNS = ("out of memory", "can't allocate memory", "bad_alloc", "cannot allocate memory")


@contextmanager
def memory_explained(device: torch.device, batch_size: int, accumulate: int) -> Iterator[None]:
    """Turn an error of torch, DALI or CuPy that says that the memory is used up into one line with how to fix it.

    Raises
    ------
    BadInput
        The memory does not suffice; the line has the measured peaks and a batch of half the size.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in _SIGNS)):
            raise
        raise BadInput(out_of_memory(memory_use(device), batch_size, accumulate)) from error


def out_of_memory(use: str, batch_size: int, accumulate: int) -> str:
    """Return the line: what was in use, and what to run instead."""
    mends = ["--gradient-checkpointing"]
    if batch_size > 2:
        half = batch_size // 2
        mends.insert(0, f"--batch-size {half} (with --accumulate {2 * accumulate} a step still has as many tiles)")
    return f"out of memory with --batch-size {batch_size}: {use}; use {', or '.join(mends)}"


def memory_use(device: torch.device) -> str:
    """Return in words how much memory this process used at its peak, by pool where the device is a GPU."""
    if device.type != "cuda":
        return f"the process took {_gib(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)} of main memory at its peak"
    free, total = torch.cuda.mem_get_info(device)
    torchs = torch.cuda.memory_reserved(device)
    cupys = sys.modules["cupy"].get_default_memory_pool().total_bytes() if "cupy" in sys.modules else 0
    return (
        f"torch used {_gib(torch.cuda.max_memory_allocated(device))} at its peak, its pool holds {_gib(torchs)}, CuPy's pool "
        f"{_gib(cupys)}, DALI, CUDA and other processes hold {_gib(max(total - free - torchs - cupys, 0))}, of {_gib(total)}"
    )


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
