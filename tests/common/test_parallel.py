"""Work in several processes: in order, with errors that pass, and with no process left over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mammostream.common.errors import BadInput
from mammostream.common.parallel import available_cpus, map_processes


def square(number):
    return number * number, os.getpid()


def refuse_three(number):
    if number == 3:
        raise BadInput("three is at fault")
    return number


def die_at_three(number):
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order(workers):
    done = map_processes(square, list(range(50)), workers, "squaring", "number", chunk=3)
    assert [value for value, _ in done] == [n * n for n in range(50)]
    assert (os.getpid() in {process for _, process in done}) == (workers == 1)
    assert map_processes(square, [], workers, "squaring", "number") == []


@pytest.mark.parametrize("workers", [1, 2])
def test_errors_pass_through(workers, capfd):
    with pytest.raises(BadInput, match="three is at fault"):
        map_processes(refuse_three, list(range(9)), workers, "refusing", "number")
    # The bar is closed: what is printed next begins a line.
    assert capfd.readouterr().err.endswith("\n")


def test_a_killed_worker_is_told():
    with pytest.raises(BadInput, match="a worker process was killed"):
        map_processes(die_at_three, list(range(9)), 2, "dying", "number")


def runs(process):
    """Tell whether a process runs; one that ended may wait for the machine to take notice."""
    try:
        return Path("/proc", process, "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_workers_of_a_killed_parent_end(tmp_path):
    code = f"""
import os, time
from pathlib import Path
from mammostream.common.parallel import map_processes

def work(number):
    Path({str(tmp_path)!r}, str(os.getpid())).touch()
    time.sleep(0.05)

if __name__ == "__main__":
    map_processes(work, list(range(2000)), 2, "working", "item")
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    process = subprocess.Popen(
        [sys.executable, script], stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(Path.cwd())}
    )
    deadline = time.monotonic() + 60
    while len(workers := [p.name for p in tmp_path.iterdir() if p.name.isdigit()]) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    while any(runs(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_available_cpus_are_those_of_this_process():
    assert 1 <= available_cpus() <= os.cpu_count()
