"""Several processes: they compute what one does, agree on when to stop, restart together and speak once."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from processes import ROOT, Child, assert_same_tree, torchrun_command, torchrun_to_end, with_this_code, workers_of
from runs import end_of, lines_without_timing

from mammostream.models.backbones import build_backbone
from mammostream.models.byol import MammogramBYOL
from mammostream.train.byol.config import PretrainConfig
from mammostream.train.byol.step import TrainingState, train_step
from mammostream.train.run.charts import read_metrics
from mammostream.train.run.runtime import Runtime

CPU = Runtime(torch.device("cpu"), "fp32")
# 12 and 13 tiles per process: four batches, two steps an epoch.
RUN = (
    "--arch resnet18_narrow --hidden-dim 32 --proj-dim 16 --batch-size 3 --accumulate 2 --limit-tiles 25 --epochs 3 --lr 1e-3 "
    "--save-every 10"
)


# ---------------------------------------------------------------- the step

# Run by two processes. Float64, so that the order of sums does not blur what is compared.
STEP = """
import os, signal, sys, torch
from torch import nn
from test_torchrun import PretrainConfig, norm_case, small_state, some_batches, train_step
from mammostream.train.byol.bad_steps import BadSteps
from mammostream.train.run.runtime import join_processes
from mammostream.train.run.stopping import StopSignals
from mammostream.train.byol.sync_batch_norm import GlooBatchNorm, synchronise_batch_norms

torch.set_num_threads(1)
config = PretrainConfig(device="cpu", gradient_clip=0.5)
found = {}
with join_processes(config) as runtime:
    part = slice(runtime.rank * 4, runtime.rank * 4 + 4)
    state = small_state(lambda model: synchronise_batch_norms(model, runtime.device), runtime.parallel)
    found["steps"] = []
    for views in some_batches():
        mine = [tuple(view[part] for view in pair) for pair in views]
        output, norm = train_step(state, runtime, config, iter(mine), len(mine))
        found["steps"].append((runtime.total(output.loss) / 2, norm))
    found["model"] = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}

    # A tile of one process alone is poisoned: none of them steps.
    before = {name: tensor.clone() for name, tensor in state.model.state_dict().items() if "momentum" not in name}
    poisoned = [tuple(view[part] * (float("nan") if runtime.rank else 1) for view in pair) for pair in some_batches()[0]]
    _, norm = train_step(state, runtime, config, iter(poisoned), len(poisoned))
    bad_steps = BadSteps(__import__("pathlib").Path(sys.argv[1]).with_name("bad.jsonl"), 5, runtime)
    bad_steps.note(state.step, norm, [torch.tensor([runtime.rank * 10]), torch.tensor([runtime.rank * 10 + 1])])
    bad_steps.read()
    after = state.model.state_dict()
    same = all(torch.equal(after[n], t) for n, t in before.items() if t.is_floating_point())
    found["skipped"] = [bad_steps.total, int(runtime.total(torch.tensor(int(same))))]

    # Uneven batches, of two and of four dimensions.
    found["norms"] = []
    for dims in (2, 4):
        x, weights, norm_layer = norm_case(dims)
        rows = slice(0, 3) if runtime.rank == 0 else slice(3, 8)
        mine = x[rows].clone().requires_grad_()
        layer = GlooBatchNorm.of(norm_layer)
        out = layer(mine)
        (out * weights[rows]).sum().backward()
        gradients = [runtime.total(p.grad) for p in (layer.weight, layer.bias)]
        parts = runtime.gather((out.detach(), mine.grad))
        layer.eval()
        found["norms"].append((parts, gradients, layer.state_dict(), layer(x).detach()))

    # A signal reaches one process only.
    with StopSignals() as signals:
        assert signals.exit_code(runtime, 1) == 0
        if runtime.rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        found["codes"] = runtime.gather(signals.exit_code(runtime, 2))
    if runtime.is_main:
        torch.save(found, sys.argv[1])
# Without DALI, which every command loads, an interpreter that shuts down after gloo has aborted now and then.
os._exit(0)
"""


def small_state(change=lambda model: model, parallel=lambda model: model) -> TrainingState:
    torch.manual_seed(0)
    model = change(MammogramBYOL(build_backbone("resnet18_narrow"), hidden_dim=32, proj_dim=16)).double().train()
    model.classification_head.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0, momentum=0.9, fused=True)
    return TrainingState(model, parallel(model), optimizer, CPU.scaler(), [0.5, 0.3, 0.1, 0.1], [0.9, 0.95, 0.99, 0.99])


def some_batches() -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Three steps of 1, 2 and 1 batches of eight pairs."""
    generator = torch.Generator().manual_seed(1)

    def view():
        return torch.randn(8, 1, 32, 32, generator=generator, dtype=torch.float64)

    return [[(view(), view()) for _ in range(count)] for count in (1, 2, 1)]


def norm_case(dims):
    generator = torch.Generator().manual_seed(dims)
    shape = (8, 5, 3, 2)[:dims]
    x, weights = (torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 7 for _ in range(2))
    layer = (torch.nn.BatchNorm1d if dims == 2 else torch.nn.BatchNorm2d)(5).double()
    with torch.no_grad():
        layer.weight.copy_(torch.arange(1, 6))
        layer.bias.copy_(torch.arange(5))
    return x, weights, layer


@pytest.fixture(scope="module")
def of_two(single_thread_environment, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("two")
    (folder / "step.py").write_text(STEP)
    torchrun_to_end([str(folder / "step.py"), str(folder / "two.pt")], single_thread_environment)
    found = torch.load(folder / "two.pt", weights_only=True)
    return found | {"bad": (folder / "bad.jsonl").read_text()}


def test_two_processes_take_the_steps_of_one_with_twice_the_batch(of_two):
    state = small_state()
    config = PretrainConfig(device="cpu", gradient_clip=0.5)
    for views, (loss, norm) in zip(some_batches(), of_two["steps"], strict=True):
        output, expected = train_step(state, CPU, config, iter(views), len(views))
        assert float(norm) > 0.5  # it is clipped
        torch.testing.assert_close(loss, output.loss, rtol=1e-5, atol=1e-6)  # the loss is computed in float32
        torch.testing.assert_close(norm, expected, rtol=1e-4, atol=0)
    ours = of_two["model"]
    assert not torch.equal(ours["backbone.conv1.weight"], small_state().model.backbone.conv1.weight)
    for name, theirs in state.model.state_dict().items():
        torch.testing.assert_close(ours[name], theirs, rtol=1e-4, atol=1e-5, msg=name)


def test_batch_norms_of_two_processes_are_those_of_one(of_two):
    for dims, (parts, gradients, saved, evaluated) in zip((2, 4), of_two["norms"], strict=True):
        x, weights, layer = norm_case(dims)
        x.requires_grad_()
        out = layer(x)
        (out * weights).sum().backward()
        close = {"rtol": 1e-9, "atol": 1e-9}
        torch.testing.assert_close(torch.cat([part for part, _ in parts]), out.detach(), **close)
        torch.testing.assert_close(torch.cat([gradient for _, gradient in parts]), x.grad, **close)
        torch.testing.assert_close(gradients, [layer.weight.grad, layer.bias.grad], **close)
        torch.testing.assert_close(saved, dict(layer.state_dict()), **close)
        torch.testing.assert_close(evaluated, layer.eval()(x).detach(), **close)


def test_a_step_that_is_bad_in_one_process_is_skipped_in_both(of_two):
    assert of_two["skipped"] == [1, 2]
    assert of_two["bad"] == '{"step": 4, "tiles": [0, 1, 10, 11]}\n'


def test_a_signal_to_one_process_stops_both(of_two):
    assert of_two["codes"] == [75, 75]


# ---------------------------------------------------------------- whole runs

# What the example asks of SLURM: a step's command runs here, its tasks get signals by the step's id.
SLURM = {
    "srun": 'echo $$ > "$STATE/step"\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"',
    "scancel": '[[ $* == "--signal=TERM 4711.0" ]] && kill -TERM "$(cat "$STATE/step")"',
    "scontrol": '[[ $1 == requeue ]] && echo "$2" >> "$STATE/requeued" || echo 127.0.0.1',
}


def test_a_run_of_two_processes_survives_under_slurm(road, single_thread_environment, tmp_path):
    """A process is killed and torchrun starts both again; SLURM stops the job, which goes back into the queue and ends."""
    small = f"{road.small} --num-workers 1"
    torchrun_to_end(
        [
            "-m",
            "train.pretrain",
            *shlex.split(f"--shards {road.shards} --output-dir {tmp_path}/whole {RUN} {small}"),
        ],
        single_thread_environment,
    )
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    for name, body in SLURM.items():
        (bin_dir / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (bin_dir / name).chmod(0o755)
    path = f"{bin_dir}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = single_thread_environment | {"PATH": path, "STATE": str(tmp_path), "PROCESSES_PER_NODE": "2"}
    environment |= {"SLURM_JOB_ID": "4711", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "here"}
    script = ROOT / "examples/slurm/pretrain.sbatch"
    run = tmp_path / "r n"  # a blank in the path
    last = run / "mammogram_byol_last.pth"
    command = ["bash", script, road.shards, run, *shlex.split(f"{RUN} {small} --save-every-steps 1")]

    with Child(command, tmp_path / "log", environment) as child:
        child.wait_until(last.exists)
        launcher = int((tmp_path / "step").read_text())
        workers = workers_of(launcher)
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGKILL)
        child.wait_until(lambda: len(set(workers_of(launcher)) - set(workers)) == 2)
        before = last.stat().st_ino
        child.wait_until(lambda: last.stat().st_ino != before)
        child.process.send_signal(signal.SIGUSR1)
        assert child.end() != 0
    assert child.said.count("stopped after step") == 1
    assert (tmp_path / "requeued").read_text() == "4711\n"
    assert not (run / "mammogram_byol_final.pth").exists()

    done = subprocess.run(command, env=with_this_code(environment), capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "requeued").read_text() == "4711\n"
    assert lines_without_timing(run) == lines_without_timing(tmp_path / "whole")
    for name in ("best", "final", "last"):
        assert_same_tree(end_of(run, name), end_of(tmp_path / "whole", name), name)
    (line,) = (line for line in read_metrics(run / "metrics.jsonl") if line.get("epoch_mean/epoch") == 3)
    speeds = [line[f"epoch_mean/rank/{rank}/pairs_per_second"] for rank in (0, 1)]
    assert line["epoch_mean/pairs_per_second"] == pytest.approx(sum(speeds))


def test_bad_input_is_said_once(road, single_thread_environment, tmp_path):
    """Whether all processes meet it or only that which reads a tile with damaged bytes."""
    shutil.copytree(road.shards, tmp_path / "damaged")
    (tar,) = (tmp_path / "damaged").glob("train-*.tar")
    with tarfile.open(tar) as archive:
        tiles = [member for member in archive if not member.name.endswith((".num", ".json"))]
    with tar.open("r+b") as file:
        for tile in tiles[::2]:
            file.seek(tile.offset_data)
            file.write(bytes(tile.size))
    for arguments, message in (
        (f"pretrain --shards {tmp_path}/damaged --output-dir {tmp_path}/run {RUN} {road.small}", str(tar)),
        (f"finetune --shards {road.shards} --no-such-option", "no-such-option"),
    ):
        done = subprocess.run(
            [*torchrun_command(), "-m", "mammostream", *shlex.split(arguments)],
            env=with_this_code(single_thread_environment),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert done.returncode != 0
        assert done.stderr.count("error: ") == 1, done.stderr
        assert message in next(line for line in done.stderr.splitlines() if "error: " in line)
        # torchrun's own report follows; of this program there is no traceback.
        assert done.stderr.count("Traceback") <= 1, done.stderr
