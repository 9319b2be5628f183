"""Real processes for tests: torchrun, children that are waited for, and how runs' results are compared."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


def torchrun_command(*options: str) -> list[str]:
    """Return the start of a command line: two processes on this machine."""
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", *options]


def with_this_code(environment: dict[str, str]) -> dict[str, str]:
    """Return an environment in which children import this checkout and its tests' helpers."""
    tests = ROOT / "tests/train"
    paths = [str(path) for path in (ROOT, tests, *tests.iterdir()) if path.is_dir()] + [os.environ.get("PYTHONPATH", "")]
    return environment | {"PYTHONPATH": os.pathsep.join(paths)}


def torchrun_to_end(arguments: Sequence[str], environment: dict[str, str]) -> str:
    """Run two processes to a good end and return what they printed."""
    done = subprocess.run(
        [*torchrun_command(), *arguments],
        capture_output=True,
        text=True,
        env=with_this_code(environment),
        timeout=300,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def workers_of(launcher: int) -> list[int]:
    """Return the ids of the processes that a torchrun has started, which are all its children, in the order of their start."""
    return sorted(int(pid) for file in Path(f"/proc/{launcher}/task").glob("*/children") for pid in file.read_text().split())


class Child:
    """A command that runs, whose stdout and stderr go to a file; at the end of a ``with`` block it is stopped if need be."""

    def __init__(self, command: Sequence[str | Path], log: Path, environment: dict[str, str]) -> None:
        self._log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=file, env=with_this_code(environment), cwd=ROOT, start_new_session=True
            )

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)  # torchrun hands it on
            self.process.wait(60)

    @property
    def said(self) -> str:
        """What it printed so far."""
        return self._log.read_text(errors="replace")

    def wait_until(self, condition: Callable[[], Any], seconds: float = 120) -> Any:
        """Wait until the condition is true and return its value; fails if the command ends before."""
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.01)
        return value

    def end(self, seconds: float = 120) -> int:
        """Wait for the end and return the exit code."""
        return self.process.wait(seconds)


def assert_same_tree(ours: Any, theirs: Any, place: str = "") -> None:
    """Dicts, lists, tensors: the same, bit for bit."""
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), place
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), place
        for name in ours:
            assert_same_tree(ours[name], theirs[name], f"{place}/{name}")
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs), place
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_same_tree(a, b, f"{place}[{i}]")
    else:
        assert ours == theirs, place
