"""The configuration that both loaders share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from mammostream.common.errors import BadInput


@dataclass(frozen=True)
class LoaderConfig:
    """How tiles are read, normalised and returned; the same for both loaders.

    Attributes
    ----------
    batch_size
        Tiles per batch and rank.
    tile_size
        Edge of the tiles in pixels.
    view_size
        Edge of what is returned, to which tiles are resized; None returns them in their own size.
    mean, std
        Normalisation in units of full scale.
    dtype
        ``float32`` or ``float16``.
    seed
        Determines the order and all random draws; each rank has different draws.
    device
        ``cpu`` or ``gpu`` (torch's current device).
    num_threads
        CPU threads of the pipeline; they affect only the speed.
    rank, world_size
        Rank of this process and number of processes that share the tiles; None takes those of torch.distributed if it is
        initialised, otherwise 0 and 1.
    initial_fill
        Samples in the shuffle buffer. The order of the tars also changes each epoch.
    mmap
        Whether tars are mapped into memory, which is fastest on local disks. Use False on network file systems (NFS,
        Lustre): tars are then read instead, and every tar is held open.
    keep_memory
        On a CPU, let this process keep the memory that it frees, which is faster. Use False if one loader follows another
        for hours: the kept memory would fragment and grow.

    Raises
    ------
    BadInput
        A number is out of range, or the device is neither ``cpu`` nor ``gpu``.
    """

    batch_size: int
    tile_size: int
    mean: float
    std: float
    dtype: str = "float32"
    seed: int = 0
    device: str = "cpu"
    num_threads: int = 2
    rank: int | None = None
    world_size: int | None = None
    initial_fill: int = 1024
    mmap: bool = True
    keep_memory: bool = True
    view_size: int | None = None

    @property
    def size(self) -> int:
        """Edge in pixels of what is returned."""
        return self.view_size or self.tile_size

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "gpu"):
            raise BadInput(f"device '{self.device}' is neither 'cpu' nor 'gpu'")
        if min(self.batch_size, self.num_threads, self.initial_fill) < 1:
            raise BadInput(
                f"batch size {self.batch_size}, {self.num_threads} threads, a buffer of {self.initial_fill}: each must be at "
                "least 1"
            )

    @classmethod
    def of(cls, config: LoaderConfig | None, options: dict[str, Any]) -> LoaderConfig:
        """Return `config` with the fields in `options` replaced, or a new config of `options` if it is None."""
        return replace(config, **options) if config else cls(**options)

    def rank_and_world_size(self) -> tuple[int, int]:
        """Return this process's rank and the number of processes.

        Raises
        ------
        BadInput
            The rank is not below the number of processes.
        """
        distributed = torch.distributed
        running = distributed.is_available() and distributed.is_initialized()
        rank = self.rank if self.rank is not None else distributed.get_rank() if running else 0
        world_size = self.world_size if self.world_size is not None else distributed.get_world_size() if running else 1
        if not 0 <= rank < world_size:
            raise BadInput(f"rank {rank} of {world_size} processes: ranks run from 0 to one less than their number")
        return rank, world_size
