"""Runs that are killed, stopped, starved of disk or memory: what is left, what is said, and that going on changes nothing."""

from __future__ import annotations

import gc
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from processes import Child, assert_same_tree
from runs import end_of, lines_without_timing

from mammostream.common.errors import BadInput
from mammostream.models.checkpoints import load_checkpoint
from mammostream.train.run.charts import read_metrics
from mammostream.train.run.memory import memory_use, out_of_memory
from mammostream.train.run.resuming import load_to_resume
from mammostream.train.run.runtime import Runtime
from mammostream.train.run.stopping import StopSignals

# Nine batches an epoch, two a step: the fifth and last step of each epoch has one. A step's line at step 10.
RUN = (
    "--arch resnet18_narrow --hidden-dim 32 --proj-dim 16 --batch-size 3 --accumulate 2 --limit-tiles 28 --epochs 3 "
    "--save-every 2 --lr 1e-3"
)
CPU = Runtime(torch.device("cpu"), "fp32")


def fill(file) -> None:
    while True:
        file.write(bytes(4096))


@pytest.fixture(scope="module")
def uninterrupted(road, run_cli, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    run_cli(f"pretrain --shards {road.shards} --output-dir {folder} {RUN} {road.small}")
    return folder


def test_a_run_killed_and_stopped_in_mid_epoch_goes_on_bit_for_bit(
    road, uninterrupted, run_cli, single_thread_environment, tmp_path
):
    """SIGKILL, then SIGTERM, then SIGUSR1: weights, optimiser, loader, records are those of the run that nothing befell."""
    line = f"pretrain --shards {road.shards} --output-dir {tmp_path} {RUN} {road.small} --resume auto"
    command = [Path(sys.executable).with_name("mammostream"), *shlex.split(f"{line} --save-every-steps 2")]
    last = tmp_path / "mammogram_byol_last.pth"
    steps = []
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1):
        before = last.stat().st_ino if last.exists() else None
        with Child(command, tmp_path / "log", single_thread_environment) as child:
            child.wait_until(lambda: last.exists() and last.stat().st_ino != before)  # noqa: B023
            child.process.send_signal(number)
            code = child.end()
        steps.append(load_checkpoint(last, "byol")["step"])
        if number == signal.SIGKILL:
            assert code == -signal.SIGKILL
        else:
            assert code == 75
            assert f"stopped after step {steps[-1]} of 15 and saved" in child.said
            assert "Traceback" not in child.said
            assert "error: " not in child.said
    assert steps == sorted(set(steps))
    assert any(step % 5 for step in steps)
    assert not (tmp_path / "mammogram_byol_final.pth").exists()

    run_cli(line)
    assert not list(tmp_path.glob(".*.tmp"))
    assert lines_without_timing(tmp_path) == lines_without_timing(uninterrupted)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [5, 10, 10, 15]
    for name in ("best", "epoch_002", "final", "last"):
        assert_same_tree(end_of(tmp_path, name), end_of(uninterrupted, name), name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_deterministic_run_on_a_gpu_goes_on_bit_for_bit(road, mammostream, tmp_path):
    command = f"pretrain --shards {road.shards} {RUN} --save-every 1 --device cuda --deterministic --wandb-mode disabled"
    try:
        assert mammostream(f"{command} --output-dir {tmp_path}/whole").code == 0
        first = tmp_path / "whole/mammogram_byol_epoch_001.pth"
        assert mammostream(f"{command} --output-dir {tmp_path}/resumed --resume {first}").code == 0
    finally:
        torch.use_deterministic_algorithms(False)
    ours, theirs = (end_of(tmp_path / name, "final") for name in ("resumed", "whole"))
    for part in ("model_state_dict", "optimizer_state_dict", "step"):
        assert_same_tree(ours[part], theirs[part], part)


# ---------------------------------------------------------------- signals


def test_signals_are_noted_and_give_way_to_what_was_before(capfd):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    for number, code in ((signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)):
        with StopSignals() as signals:
            assert signals.exit_code(CPU, 1) == 0
            os.kill(os.getpid(), number)
            assert signals.exit_code(CPU, 1) == code
        assert "stopping after this step" in capfd.readouterr().err
    with StopSignals() as signals:  # schedulers send it again and again
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert signals.exit_code(CPU, 1) == 75
    assert capfd.readouterr().err.count("stopping") == 1
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.exit_code(CPU, 1) == 130
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert {number: signal.getsignal(number) for number in before} == before


def test_signals_are_left_alone_outside_the_main_thread():
    codes = []

    def ask():
        with StopSignals() as signals:
            codes.append(signals.exit_code(CPU, 1))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert codes == [0]


# ---------------------------------------------------------------- damage, disk, memory


def test_a_damaged_last_checkpoint_names_the_older_one_to_go_on_from(uninterrupted, mammostream, road, tmp_path):
    for name in ("best", "epoch_002"):
        os.link(uninterrupted / f"mammogram_byol_{name}.pth", tmp_path / f"mammogram_byol_{name}.pth")
    os.utime(tmp_path / "mammogram_byol_epoch_002.pth")
    (tmp_path / "mammogram_byol_epoch_001.pth").write_bytes(b"torn")
    last = tmp_path / "mammogram_byol_last.pth"
    with (uninterrupted / "mammogram_byol_last.pth").open("rb") as whole:
        last.write_bytes(whole.read(10**6))
    command = f"pretrain --shards {road.shards} --output-dir {tmp_path} {RUN} {road.small}"
    outcome = mammostream(f"{command} --resume auto")
    assert outcome.code == 2
    assert f"{last} is damaged" in outcome.error
    assert f"whole, of step 10: resume with --resume {tmp_path}/mammogram_byol_epoch_002.pth" in outcome.error
    shutil.copy(uninterrupted / "metrics.jsonl", tmp_path)
    assert mammostream(f"{command} --resume {tmp_path}/mammogram_byol_epoch_002.pth").code == 0
    assert lines_without_timing(tmp_path) == lines_without_timing(uninterrupted)
    assert_same_tree(end_of(tmp_path, "final"), end_of(uninterrupted, "final"))


def test_a_checkpoint_of_another_program_is_nothing_to_go_on_from(uninterrupted, tmp_path):
    state = load_checkpoint(uninterrupted / "mammogram_byol_last.pth", "byol")["model_state_dict"]
    torch.save({"model_state_dict": state}, tmp_path / "other.pth")
    with pytest.raises(BadInput, match=r"other\.pth holds nothing to resume from"):
        load_to_resume(tmp_path / "other.pth", "byol")


@pytest.fixture
def small_disk(uninterrupted, tmp_path):
    """A disk of its own with room for a checkpoint and a half."""
    size = (uninterrupted / "mammogram_byol_last.pth").stat().st_size * 3 // 2
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_leaves_the_last_checkpoint_whole(road, small_disk, mammostream):
    outcome = mammostream(f"pretrain --shards {road.shards} --output-dir {small_disk} {RUN} {road.small} --save-every-steps 1")
    assert outcome.code == 2
    last = small_disk / "mammogram_byol_last.pth"
    assert f"cannot write checkpoint {last}: the disk is full; make room" in outcome.error
    assert load_checkpoint(last, "byol")["step"] == 1
    assert [path.name for path in small_disk.glob("*.pth")] == [last.name]
    assert not list(small_disk.glob(".*"))
    # No room for a line either. The error's traceback held the half-written file open.
    gc.collect()
    (small_disk / "filling").write_bytes(bytes(shutil.disk_usage(small_disk).free - 4096))
    with (small_disk / "rest").open("wb", buffering=0) as rest, pytest.raises(OSError, match="No space"):
        fill(rest)
    outcome = mammostream(f"pretrain --shards {road.shards} --output-dir {small_disk} {RUN} {road.small} --resume auto")
    assert outcome.code == 2
    assert f"cannot write {small_disk}/.training.lock: No space left on device; free some space" in outcome.error
    assert load_checkpoint(last, "byol")["step"] == 1


def test_too_little_memory_is_one_line_with_the_peak_and_half_the_batch(road, mammostream, tmp_path):
    """More heads than any machine has room for: torch's allocation really fails."""
    outcome = mammostream(
        f"pretrain --shards {road.shards} --output-dir {tmp_path} --arch resnet18_narrow --hidden-dim 2000000000 "
        f"--batch-size 16 {road.small}"
    )
    assert outcome.code == 2
    assert outcome.error.startswith("out of memory with --batch-size 16: the process took ")
    assert "GiB of main memory at its peak; use --batch-size 8 (with --accumulate 2 a step" in outcome.error
    assert "or --gradient-checkpointing" in outcome.error


def test_the_mend_for_too_little_memory_fits_the_batch():
    assert out_of_memory("x", 2, 1) == "out of memory with --batch-size 2: x; use --gradient-checkpointing"
    assert "--batch-size 3 (with --accumulate 8 " in out_of_memory("x", 7, 4)


def test_memory_in_use_is_measured():
    before = float(memory_use(torch.device("cpu")).split(" GiB")[0].rpartition(" ")[2])
    assert before > 0.1
    block = torch.ones(2**28)  # 1 GiB
    after = float(memory_use(torch.device("cpu")).split(" GiB")[0].rpartition(" ")[2])
    assert block[-1] == 1
    assert after >= before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_full_gpu_names_each_pool(road, mammostream, tmp_path):
    torch.cuda.set_per_process_memory_fraction(0.01)  # the network alone then fills the GPU, not the host's memory
    try:
        outcome = mammostream(
            f"pretrain --shards {road.shards} --output-dir {tmp_path} --arch resnet18_narrow --hidden-dim 200000 "
            "--batch-size 16 --device cuda --compile off --wandb-mode disabled"
        )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert outcome.code == 2
    assert "out of memory with --batch-size 16: torch used" in outcome.error
    assert "CuPy's pool" in outcome.error
    assert "DALI" in outcome.error
