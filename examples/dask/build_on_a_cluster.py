"""Build shards with Dask through a cluster's queue (SLURM, PBS, LSF, SGE, HTCondor): dask-jobqueue submits the workers as jobs.

    python examples/dask/build_on_a_cluster.py slurm 16 --manifest work/manifest.parquet --output-dir work/shards

asks SLURM for 16 jobs of one worker each and starts building when the first one runs; ``local`` instead of ``slurm`` runs the
jobs as local processes, to try it out. Arguments after the number go to ``mammostream shards build``. Account, partition and
other settings of the queue belong in ``~/.config/dask/jobqueue.yaml``. Needs: pip install 'mammostream[dask]' dask-jobqueue.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import dask_jobqueue
from dask_jobqueue.local import LocalCluster

CLUSTERS = {
    "slurm": dask_jobqueue.SLURMCluster,
    "pbs": dask_jobqueue.PBSCluster,
    "lsf": dask_jobqueue.LSFCluster,
    "sge": dask_jobqueue.SGECluster,
    "htcondor": dask_jobqueue.HTCondorCluster,
    "local": LocalCluster,
}


def settings(queue: str) -> dict[str, Any]:
    """Return the resources that a job requests."""
    own = {"local": {}, "htcondor": {"disk": "8GB"}}
    return {"cores": 1, "processes": 1, "memory": "4GiB"} | own.get(queue, {"walltime": "04:00:00"})


def main(queue: str, jobs: int, arguments: list[str]) -> int:
    """Build with `jobs` workers from a queue; return the exit code of the build."""
    with CLUSTERS[queue](**settings(queue)) as cluster:
        cluster.scale(jobs=jobs)
        command = [sys.executable, "-m", "mammostream", "shards", "build", "--dask", cluster.scheduler_address, *arguments]
        return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in CLUSTERS or not sys.argv[2].isdecimal():
        sys.exit(f"usage: {sys.argv[0]} {'|'.join(CLUSTERS)} JOBS --manifest M --output-dir S …")
    sys.exit(main(sys.argv[1], int(sys.argv[2]), sys.argv[3:]))
