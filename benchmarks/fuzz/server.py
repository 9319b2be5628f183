"""A fork server: the parent has imported everything and started no thread; each case is a child with limits.

Starting a process that imports torch and DALI costs 6 to 10 seconds of CPU, forking one that has imported them some
milliseconds. The parent must not read a table or start a pipeline itself: a thread is not inherited by a forked child.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import resource
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

MEMORY = 4 << 30
MODULES = [
    "nvidia.dali.fn",
    "torch",
    "torchvision",
    "pandas",
    "pyarrow.parquet",
    "pydicom",
    "tifffile",
    "imagecodecs",
    "scipy.ndimage",
    "skimage.measure",
    "sklearn.linear_model",
    "matplotlib.pyplot",
    "mammostream.cli",
    "mammostream.shards.build.command",
    "mammostream.shards.prepare.command",
    "mammostream.shards.prepare.preview_command",
    "mammostream.train.byol.command",
    "mammostream.train.byol.run",
    "mammostream.train.classify.command",
    "mammostream.train.classify.run",
    "mammostream.train.predict.command",
    "mammostream.train.predict.work",
    "mammostream.train.evaluate.command",
    "mammostream.train.evaluate.evaluate",
    "mammostream.train.probe.command",
    "mammostream.train.probe.compare",
    "mammostream.preprocess.dicom",
    "mammostream.preprocess.plain",
    "mammostream.preprocess.preview",
    "mammostream.dali_pipelines.loaders",
    "mammostream.shards.build.verify",
]


@dataclass
class Ended:
    """How a child ended: its exit code, or minus the signal; what the parent killed it for; seconds; peak memory in bytes."""

    code: int
    killed_for: str
    seconds: float
    memory: int


def warm_up() -> None:
    """Import what the commands import."""
    for name in MODULES:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)


def run_all(
    jobs: Iterable[tuple[int, Path, Callable[[], int]]],
    on_end: Callable[[int, Ended], None],
    processes: int,
    seconds: float,
    memory: int = MEMORY,
) -> None:
    """Run ``(number, folder, work)`` in children, `processes` at a time.

    Parameters
    ----------
    jobs
        `work` returns the child's exit code; its stdout and stderr go into files of `folder`, its working directory.
    on_end
        Gets the number and how its child ended.
    processes, seconds, memory
        Children at a time, and the wall-clock time and resident bytes of each, after which it is killed.
    """
    running: dict[int, tuple[int, float, str]] = {}
    waiting = iter(jobs)
    more = True
    while more or running:
        while more and len(running) < processes:
            job = next(waiting, None)
            if job is None:
                more = False
                break
            number, folder, work = job
            running[_fork(folder, work)] = (number, time.monotonic(), "")
        time.sleep(0.02)
        for pid, (number, start, why) in list(running.items()):
            done, status, usage = os.wait4(pid, os.WNOHANG)
            took = time.monotonic() - start
            if done:
                _kill_group(pid)  # what it left running
                del running[pid]
                peak = usage.ru_maxrss * 1024
                on_end(number, Ended(os.waitstatus_to_exitcode(status), why or ("memory" if peak > memory else ""), took, peak))
            elif not why and (reason := "time" if took > seconds else "memory" if _resident(pid) > memory else ""):
                running[pid] = (number, start, reason)
                _kill_group(pid)


def _fork(folder: Path, work: Callable[[], int]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.chdir(folder)
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o666)
            os.dup2(file, descriptor)
            os.close(file)
        code = work()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)  # never back into the parent's code, nor its exit handlers


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, IndexError):
        return 0
