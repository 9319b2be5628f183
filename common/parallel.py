"""One function over many items in several processes, with a progress bar."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from threading import Thread
from typing import TypeVar

from common.errors import BadInput
from common.progress import progress

Item = TypeVar("Item")
Result = TypeVar("Result")


def available_cpus() -> int:
    """Return how many CPUs this process may use."""
    return len(os.sched_getaffinity(0))


def end_with_parent() -> None:
    """End this worker when the process that started it ends, however it ends; a pool's ``initializer``.

    A worker of a killed parent would wait for ever for its next item: it holds the other end of its own queue.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def map_processes(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int, what: str, unit: str, chunk: int = 1
) -> list[Result]:
    """Return ``[function(item) for item in items]``, computed by `workers` processes under a progress bar.

    Parameters
    ----------
    function
        A function of a module (it is pickled); its exceptions pass through.
    items
        The items, picklable.
    workers
        Processes; up to 1 computes here.
    what, unit
        Words of the progress bar.
    chunk
        Items handed over at once: more where one takes microseconds.

    Raises
    ------
    BadInput
        A worker was killed.
    """
    if workers <= 1 or len(items) <= 1:
        with progress(items, what, unit) as bar:  # closed before an error is printed
            return [function(item) for item in bar]
    # Fresh interpreters: a forked child of a process with threads or a CUDA context may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(items)), mp_context=context, initializer=end_with_parent) as pool:
        try:
            with progress(pool.map(function, items, chunksize=chunk), what, unit, total=len(items)) as bar:
                return list(bar)
        except BrokenProcessPool:
            # The pool overlooks a worker that was starting when the other died, and would wait for it for ever.
            for child in multiprocessing.active_children():
                child.terminate()
            raise BadInput(
                "a worker process was killed, perhaps for want of memory; run the same command again, with fewer --workers"
            ) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
