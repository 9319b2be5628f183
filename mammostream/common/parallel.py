"""One function over many items in several processes, with a progress bar."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from mammostream.common.errors import BadInput
from mammostream.common.progress import progress
from mammostream.common.surroundings import usable_workers

Item = TypeVar("Item")
Result = TypeVar("Result")
KILLED = "a worker process was killed, perhaps for want of memory; run the same command again, with fewer --workers"


def available_cpus() -> int:
    """Return how many CPUs this process may use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def process_pool(workers: int, gpus: Sequence[str] = ()) -> Iterator[ProcessPoolExecutor]:
    """Give a pool of fresh processes that end with this one, however it ends; an error stops what is under way.

    Parameters
    ----------
    workers
        Processes.
    gpus
        Dealt to the processes in turn, as CUDA_VISIBLE_DEVICES names them; empty leaves them what this process has.

    Raises
    ------
    BadInput
        A worker was killed.
    """
    # Fresh interpreters: a forked child of a process with threads or a CUDA context may hang.
    context = multiprocessing.get_context("spawn")
    dealt = context.SimpleQueue()
    for number in range(workers if gpus else 0):
        dealt.put(gpus[number % len(gpus)])
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, context, _start_worker, (dealt if gpus else None,))
    hook, threading.excepthook = threading.excepthook, _without_late_workers
    try:
        yield pool
    except BaseException as error:
        # Not only the workers at work: the pool overlooks one that was starting when another died, and would wait forever.
        for child in set(multiprocessing.active_children()) - others:
            child.kill()
        # A worker that dies while it is being started breaks the pipe that it is started through.
        if isinstance(error, (BrokenProcessPool, BrokenPipeError, ConnectionResetError)):
            raise BadInput(KILLED) from None
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        threading.excepthook = hook


def _without_late_workers(args: Any) -> None:
    """Say what ended a thread, unless it is the pool's own, which stumbles over workers that start while it gives up."""
    own = type(args.thread).__module__ == ProcessPoolExecutor.__module__
    if not (own and args.exc_type is RuntimeError and "changed size during iteration" in str(args.exc_value)):
        threading.__excepthook__(args)


@contextmanager
def starting_workers() -> Iterator[None]:
    """Ignore Ctrl-C while a pool is given work, which starts its workers; they go on ignoring it: this process ends them."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may decide, and only it gets Ctrl-C
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _start_worker(gpus: Any) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus.get()


def _end_with_parent() -> None:
    # A worker of a killed parent would wait forever for its next item: it holds the other end of its own queue.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


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
    if len(items) <= 1 or usable_workers(workers) <= 1:
        with progress(items, what, unit) as bar:  # closed before an error is printed
            return [function(item) for item in bar]
    with process_pool(min(workers, len(items))) as pool:
        with starting_workers():
            results = pool.map(function, items, chunksize=chunk)
        with progress(results, what, unit, total=len(items)) as bar:
            return list(bar)
