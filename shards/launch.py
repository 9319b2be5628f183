"""Running a function over many items: in this process, in a pool of processes, or on a Dask cluster.

Nothing here touches what is computed, so the result does not depend on who launches it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from common.errors import BadInput, first_line
from common.options import option

T = TypeVar("T")
R = TypeVar("R")
_KILLED = (
    "a worker process was killed, perhaps for want of memory; run the same command again, with fewer --workers: "
    "finished shards are kept"
)


@dataclass(frozen=True)
class LaunchConfig:
    """Who does the work, and how many at a time; none of it changes a byte."""

    workers: int | None = option(None, "Processes, each at one shard at a time; default: one a GPU, else one a core.")
    threads: int | None = option(
        None, "Threads a process: one computes, the others read ahead and encode; default: the cores divided by --workers."
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
    devices
        The GPUs, as CUDA_VISIBLE_DEVICES names them, to deal to the processes in turn; empty on the CPU.
    """

    workers: int = 1
    threads: int = 1
    dask: str | None = None
    devices: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: LaunchConfig, device: str = "cpu") -> Launcher:
        """Fill in the defaults for work on ``cpu`` or ``cuda``."""
        devices = visible_gpus() if device == "cuda" else ()
        cores = len(os.sched_getaffinity(0))
        workers = config.workers or len(devices) or cores
        return cls(workers, config.threads or max(1, cores // workers), config.dask, devices)

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
        # Fresh interpreters: a forked child of a process with threads or a CUDA context may hang.
        context = multiprocessing.get_context("spawn")
        count = min(self.workers, len(items))
        devices = context.SimpleQueue()
        for number in range(count if self.devices else 0):
            devices.put(self.devices[number % len(self.devices)])
        others = set(multiprocessing.active_children())
        pool = ProcessPoolExecutor(count, context, _start_worker, (devices if self.devices else None,))
        try:
            with _no_interrupts():
                futures = [pool.submit(function, item) for item in items]
            for future in as_completed(futures):
                yield future.result()
        except BaseException as error:
            # Not only the workers at work: the pool overlooks one that was starting when another died, and would wait for ever.
            for child in set(multiprocessing.active_children()) - others:
                child.kill()
            # A worker that dies while it is being started breaks the pipe that it is started through.
            if isinstance(error, (BrokenProcessPool, BrokenPipeError, ConnectionResetError)):
                raise BadInput(_KILLED) from None
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def _run_dask(self, function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
        try:
            import distributed
        except ImportError:
            raise BadInput("--dask needs the package distributed; install mammostream[dask]") from None

        with ExitStack() as stack:
            cluster: Any = self.dask
            if cluster == "local":
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
                raise BadInput(_KILLED) from None
            except distributed.CancelledError as error:
                raise BadInput(f"the Dask cluster was lost ({first_line(error)}); run the same command again") from None


ALONE = Launcher()
"""One process with one thread: this one."""


def visible_gpus() -> tuple[str, ...]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import cupy

    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return tuple(named.split(",")) if named else tuple(str(i) for i in range(cupy.cuda.runtime.getDeviceCount()))


@contextmanager
def _no_interrupts() -> Iterator[None]:
    """Ignore Ctrl-C while worker processes are started, which go on ignoring it: their parent ends them."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may decide, and only it gets Ctrl-C
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _start_worker(devices: Any) -> None:
    """Make a fresh worker process end with its parent, and see only its own GPU."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices.get()


def _end_with_parent() -> None:
    # Without this, the workers of a killed parent wait for work for ever.
    multiprocessing.parent_process().join()
    os._exit(1)
