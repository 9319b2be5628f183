"""Fine-tuning that is stopped or killed at any step: what is said, and that the resumed run is the uninterrupted one."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from processes import Child, assert_same_tree, torchrun_to_end

from mammostream.models.checkpoints import load_checkpoint
from mammostream.train.classify import finetune as loop

# Four steps an epoch, the last with two tiles. The backbone is frozen in the first epoch.
RUN = (
    "--epochs 2 --batch-size 6 --max-samples 20 --freeze-backbone-epochs 1 --lr-backbone 1e-3 --lr-head 1e-2 --ema-decay 0.8 "
    "--mixup-alpha 0.3 --dropout 0.4 --loss asymmetric"
)


def command_of(pretrained, folder) -> str:
    return f"finetune {pretrained.finetune_options} --output-dir {folder} {RUN}"


@pytest.fixture(scope="module")
def uninterrupted(pretrained, run_cli, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    run_cli(command_of(pretrained, folder))
    return folder


def assert_same_run(ours: Path, theirs: Path) -> None:
    for name in ("best", "last", "final"):
        trees = [load_checkpoint(folder / f"{name}_classification_model.pth", "classifier") for folder in (ours, theirs)]
        for tree in trees:
            del tree["config"]  # --save-every-steps may differ
        assert_same_tree(*trees, name)
    for name in ("metrics.jsonl", "metrics.json"):
        assert (ours / name).read_text() == (theirs / name).read_text()


@pytest.fixture
def signals_at(monkeypatch):
    """Send this process a signal after steps."""
    plan: dict[int, signal.Signals] = {}

    def step(state, *arguments):
        loss = train_step(state, *arguments)
        if state.step in plan:
            os.kill(os.getpid(), plan.pop(state.step))
        return loss

    train_step = loop.train_step
    monkeypatch.setattr(loop, "train_step", step)
    return plan


def test_a_run_stopped_at_any_step_goes_on_bit_for_bit(pretrained, uninterrupted, mammostream, signals_at, tmp_path):
    """Within the first epoch, after its last step, within the second, and after the very last step."""
    last = tmp_path / "last_classification_model.pth"
    command = f"{command_of(pretrained, tmp_path)} --resume auto"
    stops = {1: signal.SIGTERM, 4: signal.SIGUSR1, 6: signal.SIGINT, 8: signal.SIGTERM}
    for step, number in stops.items():
        signals_at[step] = number
        outcome = mammostream(command)
        assert outcome.code == (130 if number == signal.SIGINT else 75)
        assert f"stopped after step {step} of 8 and saved; resume with the same command" in outcome.err
        assert "Traceback" not in outcome.err
        checkpoint = load_checkpoint(last, "classifier")
        assert (checkpoint["step"], checkpoint["epoch"]) == (step, (step - 1) // 4)
        assert not (tmp_path / "final_classification_model.pth").exists()
    assert mammostream(command).code == 0
    assert_same_run(tmp_path, uninterrupted)


def test_a_killed_run_goes_on_from_its_last_saved_step(pretrained, uninterrupted, run_cli, single_thread_environment, tmp_path):
    command = f"{command_of(pretrained, tmp_path)} --save-every-steps 1"
    last = tmp_path / "last_classification_model.pth"
    script = [Path(sys.executable).with_name("mammostream"), *shlex.split(command)]
    with Child(script, tmp_path / "log", single_thread_environment) as child:
        child.wait_until(last.exists)
        child.process.send_signal(signal.SIGKILL)
        child.end()
    assert load_checkpoint(last, "classifier")["step"] < 8
    run_cli(f"{command_of(pretrained, tmp_path)} --resume auto")
    assert_same_run(tmp_path, uninterrupted)
    assert not list(tmp_path.glob(".*.tmp"))


def test_weights_within_an_epoch_predict_nothing_and_checkpoints_without_steps_resume(
    pretrained, uninterrupted, run_cli, signals_at, mammostream, tmp_path
):
    path = tmp_path / "last_classification_model.pth"
    signals_at[5] = signal.SIGTERM
    mammostream(command_of(pretrained, tmp_path))
    outcome = mammostream(f"infer --model-path {path} --shards {pretrained.shards} --output-dir {tmp_path}/out --device cpu")
    assert outcome.code == 2
    assert "saved within epoch 2 of its fine-tuning, so it has neither calibration nor thresholds" in outcome.error

    # The first epoch's checkpoint, without the entries that came with saving at any step.
    shutil.move(tmp_path / "best_classification_model.pth", path)
    checkpoint = load_checkpoint(path, "classifier")
    assert checkpoint["step"] == 4
    del checkpoint["config"]["save_every_steps"]
    for process in checkpoint["resume"]["processes"]:
        del process["losses"], process["buffers"]
    torch.save(checkpoint, path)
    run_cli(f"{command_of(pretrained, tmp_path)} --resume auto")
    for name in ("last", "final"):
        ours, theirs = (
            load_checkpoint(p / f"{name}_classification_model.pth", "classifier") for p in (tmp_path, uninterrupted)
        )
        assert_same_tree(ours, theirs, name)


def test_a_diverged_run_keeps_the_checkpoint_before(pretrained, mammostream, tmp_path):
    outcome = mammostream(f"{command_of(pretrained, tmp_path)} --save-every-steps 1 --lr-head 1e30 --loss bce")
    assert outcome.code == 2
    assert "the loss of epoch 1 is not finite; lower --lr-head" in outcome.error
    last = load_checkpoint(tmp_path / "last_classification_model.pth", "classifier")
    assert 1 <= last["step"] < 4


TWO = """
import os, shlex, signal, sys
from pathlib import Path
import click, torch
from mammostream.common.errors import Stopped
from mammostream.train.classify import finetune as loop
from mammostream.train.classify.command import _read_data, finetune as command
from mammostream.train.run.runtime import join_processes

torch.set_num_threads(1)
train_step, plan = loop.train_step, set()
def step(state, network, runtime, *rest):
    loss = train_step(state, network, runtime, *rest)
    if runtime.rank == 1 and state.step in plan:
        os.kill(os.getpid(), signal.SIGUSR1)
    plan.discard(state.step)
    return loss
loop.train_step = step

root, arguments = Path(sys.argv[1]), sys.argv[2:]
with command.make_context("finetune", [*arguments, "--output-dir", str(root)]) as ctx:
    p = ctx.params
config = loop.FinetuneConfig(**{name: p[name] for name in loop.FinetuneConfig.__dataclass_fields__})
data = _read_data((p["train_csv"], p["val_csv"]), p["class_names"], config.max_samples, None, p["shards_dir"], None)
with join_processes(config) as runtime:
    loop.finetune(p["byol_checkpoint"], data, root / "whole", config, runtime=runtime)
    resume, steps = None, []
    for stop in (1, 2, None):
        plan.add(stop)
        try:
            loop.finetune(p["byol_checkpoint"], data, root / "parts", config, resume=resume, runtime=runtime)
        except Stopped as stopped:
            assert stopped.exit_code == 75
            steps.append(int(str(stopped).split()[3]))
            resume = root / "parts/last_classification_model.pth"
    gathered = runtime.gather(steps)
    if runtime.is_main:
        print("stopped after", gathered, flush=True)
    runtime.wait()
os._exit(0)  # see test_torchrun.py
"""


def test_two_processes_stop_together_and_go_on_bit_for_bit(pretrained, single_thread_environment, tmp_path):
    """Only one of them gets the signal, and one has a batch less; in the last steps of an epoch they stop at its end."""
    (tmp_path / "two.py").write_text(TWO)
    options = shlex.split(f"{pretrained.finetune_options} {RUN} --batch-size 4 --max-samples 17 --allow-leakage")
    said = torchrun_to_end([str(tmp_path / "two.py"), str(tmp_path), *options], single_thread_environment)
    assert "stopped after [[1, 3], [1, 3]]" in said.replace("(", "[").replace(")", "]")
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
