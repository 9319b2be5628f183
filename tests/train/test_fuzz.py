"""A few damaged inputs of each kind; ``python -m benchmarks.fuzz`` tries thousands."""

from __future__ import annotations

import subprocess
import sys


def test_damaged_inputs_are_reported_and_nothing_else_happens(finetuned, tmp_path, single_thread_environment):
    """Each in a process of its own: no signal, traceback, hang, other result without a word, or error of several lines."""
    fuzz = f"-m benchmarks.fuzz --output-dir {tmp_path} --run {finetuned.root} --cases 30 --seed 7 --processes 1"
    ended = subprocess.run(
        [sys.executable, *fuzz.split()], capture_output=True, text=True, check=False, env=single_thread_environment
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr[-3000:]
    total = ended.stdout.strip().splitlines()[-1]
    assert total.split("|")[1:3] == [" all ", " 30 "]
    assert total.split("|")[-2] == " 30 "
