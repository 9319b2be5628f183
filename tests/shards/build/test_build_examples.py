"""The examples that build shards on many machines, run on this one: every way gives the bytes of a build by one process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[3] / "examples"
BIN = Path(sys.executable).parent

# Stands in for SLURM's sbatch: runs what is submitted at once, an array task by task. It knows the options that are used.
SBATCH = """#!/usr/bin/env bash
set -euo pipefail
echo "$@" >> "$SUBMITTED"
while [[ $1 == --* && $1 != --wrap ]]; do shift; done
if [[ $1 == --wrap ]]; then exec bash -c "$2"; fi
for task in 0 1 2; do SLURM_ARRAY_TASK_ID=$task SLURM_CPUS_PER_TASK=1 bash "$@" > "$SUBMITTED.$task"; done
echo 4711
"""


TILING = ["--tile-size", "64", "--stride", "48", "--images-per-shard", "2", "--device", "cpu"]


def run(*command, **environment):
    done = subprocess.run(
        [str(c) for c in command],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"} | environment,
    )
    assert done.returncode == 0, done.stderr
    return done


def files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "config.yaml"}


@pytest.fixture
def expected(built):
    """The files of a build by one process."""
    return files(built.shards.directory)


@pytest.fixture
def arguments(manifest, tmp_path):
    return ["--manifest", manifest, "--output-dir", tmp_path / "s", *TILING]


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("**/*.s*")), ids=lambda path: path.name)
def test_shell_scripts_are_sound(script):
    run("bash", "-n", script)


def test_slurm_array(manifest, expected, tmp_path):
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(SBATCH)
    sbatch.chmod(0o755)
    script = EXAMPLES / "slurm/build_shards.sbatch"
    out = tmp_path / "s h"  # a blank in the path
    path = f"{sbatch.parent}:{BIN}:{os.environ['PATH']}"
    run("bash", script, manifest, out, *TILING, PATH=path, SUBMITTED=str(tmp_path / "submitted"), PER_TASK="2")
    assert files(out) == expected
    array, finish = (tmp_path / "submitted").read_text().splitlines()
    assert array.startswith(f"--parsable {script} {manifest}")
    assert "--dependency=afterany:4711" in finish
    assert "none of them in this range: nothing to do" in (tmp_path / "submitted.2").read_text()


def test_dask_scheduler_and_workers(arguments, expected, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run("bash", EXAMPLES / "dask/build_here.sh", *arguments, PORT=str(port))
    assert files(tmp_path / "s") == expected


def test_dask_workers_as_jobs(arguments, expected, tmp_path):
    pytest.importorskip("dask_jobqueue")
    run(sys.executable, EXAMPLES / "dask/build_on_a_cluster.py", "local", 2, *arguments)
    assert files(tmp_path / "s") == expected


@pytest.mark.parametrize("queue", ["slurm", "pbs", "lsf", "sge", "htcondor"])
def test_settings_of_the_queues(queue, monkeypatch):
    """Each queue's job can be written with the settings that the example gives."""
    pytest.importorskip("dask_jobqueue")
    monkeypatch.syspath_prepend(EXAMPLES / "dask")
    import build_on_a_cluster as example

    job = example.CLUSTERS[queue].job_cls(scheduler="tcp://10.0.0.1:8786", name="worker", **example.settings(queue))
    assert "distributed.cli.dask_worker tcp://10.0.0.1:8786" in job.job_script()
