"""Two commands that write to one folder: the second is refused and told who is first; a killed one leaves no lock."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from mammostream.train.run.runtime import PREDICTION_LOCK, TRAINING_LOCK


@pytest.fixture
def holder():
    """Return a function that lets another process hold a lock until the test ends, and returns that process."""
    processes = []

    def hold(path):
        code = "import sys, time, pathlib; from mammostream.common.locks import hold\n"
        code += "with hold(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(100)"
        process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in processes:
        process.kill()
        process.wait()


COMMANDS = {
    "pretrain": ("pretrain --shards {run.shards} --output-dir {out} {run.pretrain_options}", TRAINING_LOCK),
    "finetune": ("finetune {run.finetune_options} --epochs 1 --output-dir {out}", TRAINING_LOCK),
    "infer": (
        "infer --model-path {run.finetuned}/best_classification_model.pth --shards {run.shards} --split val --device cpu "
        "--output-dir {out}",
        PREDICTION_LOCK,
    ),
    "embed": ("embed --checkpoint {run.byol} --shards {run.shards} --device cpu --output {out}/e.parquet", ".e.parquet.lock"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_second_is_refused_and_told_who_is_first(finetuned, mammostream, holder, tmp_path, name):
    line, lock = COMMANDS[name]
    out = tmp_path / "out"
    first = holder(out / lock)
    refused = mammostream(line.format(run=finetuned, out=out))
    assert refused.code == 2
    assert f"{out} is being written by process {first.pid} on " in refused.error
    assert f"delete {out / lock}" in refused.error
    assert [path.name for path in out.iterdir()] == [lock]


def test_a_killed_run_leaves_no_lock_behind(finetuned, mammostream, holder, tmp_path):
    line, lock = COMMANDS["infer"]
    first = holder(tmp_path / lock)
    first.kill()
    first.wait()
    assert (tmp_path / lock).exists()
    assert mammostream(line.format(run=finetuned, out=tmp_path)).code == 0
    assert not (tmp_path / lock).exists()


def test_two_trainings_started_together(finetuned, tmp_path, single_thread_environment):
    """The real thing: one goes on to the end, the other ends with one line."""
    line, _ = COMMANDS["pretrain"]
    command = [sys.executable, "-m", "mammostream", *line.format(run=finetuned, out=tmp_path).split(), "--resume", "auto"]
    both = []
    for _ in range(2):
        both.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=single_thread_environment)
        )
        time.sleep(0.3)
    ended = [(process, *process.communicate(timeout=200)) for process in both]
    (good,) = [process for process, _, _ in ended if process.returncode == 0]
    ((_, _, said),) = [end for end in ended if end[0] is not good]
    assert f"error: {tmp_path} is being written by process {good.pid} on " in said
    assert "Traceback" not in said
    assert (tmp_path / "mammogram_byol_final.pth").exists()
