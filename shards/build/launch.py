"""Running a function over many items: in this process, in a pool of processes, or on a Dask cluster.

Nothing here touches what is computed, so the result does not depend on who launches it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

from mammostream.common.errors import BadInput, first_line
from mammostream.common.options import option
from mammostream.common.parallel import KILLED, available_cpus, process_pool, starting_workers
from mammostream.common.surroundings import SHARED_MEMORY_MEND, shared_memory_fault, usable_workers

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class LaunchConfig:
    """Who does the work, and how many at a time; none of it changes a byte."""

    workers: int | None = option(None, "Processes, each at one shard at a time; default: one per GPU, else one per core.")
    threads: int | None = option(
        None, "Threads per process: one computes, the others read ahead and encode; default: the cores divided by --workers."
    )
    dask: str | None = option(
        None, "Run on Dask: 'local', or the address of a scheduler (tcp://host:8786) whose workers share the disks."
    )

    def __post_init__(self) -> None:
        for name in ("workers", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BadInput(f"--{name} {value} is not positive")


@dataclass(frozen=True)
class Launcher:
    """A :class:`LaunchConfig` made definite on this machine.

    Attributes
    ----------
    workers, threads
        Processes, and threads in each of them.
    dask
        ``local``, a scheduler's address, or None.
    gpus
        As CUDA_VISIBLE_DEVICES names them, to deal to the processes in turn; empty on the CPU.
    """

    workers: int = 1
    threads: int = 1
    dask: str | None = None
    gpus: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: LaunchConfig, device: str = "cpu") -> Launcher:
        """Fill in the defaults for work on ``cpu`` or ``cuda``."""
        gpus = visible_gpus() if device == "cuda" else ()
        workers = config.workers or len(gpus) or available_cpus()
        workers = workers if config.dask else usable_workers(workers)
        return cls(workers, config.threads or max(1, available_cpus() // workers), config.dask, gpus)

    def run(self, function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
        """Yield ``function(item)`` of each item, in the order in which they end.

        The first error ends it: what is under way is stopped, and the error passes on.

        Raises
        ------
        BadInput
            A worker process was killed, or Dask cannot be reached.
        """
        if self.dask and items:
            return self._run_dask(function, items)
        if min(self.workers, len(items)) > 1:
            return self._run_pool(function, items)
        return (function(item) for item in items)

    def _run_pool(self, function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
        with process_pool(min(self.workers, len(items)), self.gpus) as pool:
            with starting_workers():
                futures = [pool.submit(function, item) for item in items]
            for future in as_completed(futures):
                yield future.result()

    def _run_dask(self, function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
        try:
            import distributed
        except ImportError:
            raise BadInput("--dask needs the package distributed; install mammostream[dask]") from None

        with ExitStack() as stack:
            cluster: Any = self.dask
            if cluster == "local":
                if fault := shared_memory_fault():
                    raise BadInput(f"--dask local: {fault}; leave out --dask, or {SHARED_MEMORY_MEND}")
                count = min(self.workers, len(items))
                options = {"n_workers": count, "threads_per_worker": 1, "memory_limit": 0, "dashboard_address": None}
                cluster = stack.enter_context(distributed.LocalCluster(**options))
            try:
                client = stack.enter_context(distributed.Client(cluster))
            except (OSError, ValueError) as error:
                raise BadInput(f"--dask {self.dask}: no Dask scheduler answers there ({first_line(error)})") from error
            try:
                futures = client.map(function, items, pure=False)
                for _, result in distributed.as_completed(futures, with_results=True):
                    yield result
            except distributed.KilledWorker:
                raise BadInput(KILLED) from None
            except distributed.CancelledError as error:
                raise BadInput(f"the Dask cluster was lost ({first_line(error)}); run the same command again") from None


ALONE = Launcher()
"""One process with one thread: this one."""


def visible_gpus() -> tuple[str, ...]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import cupy

    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return tuple(named.split(",")) if named else tuple(str(i) for i in range(cupy.cuda.runtime.getDeviceCount()))
