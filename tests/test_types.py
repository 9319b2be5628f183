"""Type hints hold: mypy, with the settings of ``setup.cfg``, finds nothing in the whole package."""

from __future__ import annotations

import subprocess
import sys

from test_architecture import ROOT


def test_mypy_finds_nothing(tmp_path):
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
