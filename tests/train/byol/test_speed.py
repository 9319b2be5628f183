"""A step's speed: what auto chooses, no waiting for the device, compiled steps equal to plain ones, collection on schedule."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mammostream.common.errors import BadInput
from mammostream.models.backbones import build_backbone
from mammostream.models.byol import BYOLOutput, MammogramBYOL
from mammostream.train.byol.config import PretrainConfig
from mammostream.train.byol.optimisation import build_optimizer, resolve_optimisation
from mammostream.train.byol.speed import accelerate, collecting_on_schedule, resolve_compile
from mammostream.train.byol.step import TrainingState, train_step
from mammostream.train.run.runtime import Runtime
from mammostream.train.run.stages import checkpoint_activations

CPU = Runtime(torch.device("cpu"), "fp32")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def small_config(**options) -> PretrainConfig:
    return PretrainConfig(**({"arch": "resnet18_narrow", "hidden_dim": 32, "proj_dim": 16, "batch_size": 8} | options))


def small_state(config: PretrainConfig, runtime: Runtime, compiling: str = "off", steps: int = 20) -> TrainingState:
    """A small network and its training, as a run makes them."""
    torch.manual_seed(0)
    model = MammogramBYOL(build_backbone(config.arch), hidden_dim=config.hidden_dim, proj_dim=config.proj_dim)
    model.classification_head.requires_grad_(False)
    model = model.to(runtime.device, memory_format=torch.channels_last).train()
    if config.gradient_checkpointing:
        checkpoint_activations(model.backbone, compiled=compiling != "off")
    return TrainingState(
        model=model,
        network=accelerate(model, compiling),
        optimizer=build_optimizer(model, resolve_optimisation(config, config.batch_size)),
        scaler=runtime.scaler(),
        lrs=np.full(steps, 1e-3),
        momenta=np.full(steps, 0.9),
    )


def views(runtime: Runtime, seed: int, size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(8, 1, size, size, generator=generator).to(runtime.device, memory_format=torch.channels_last)
        for _ in range(2)
    )


# ---------------------------------------------------------------- no waiting


class NothingIsRead(TorchDispatchMode):
    """Fails where one tensor's value comes to the host: ``.item()``, ``float(tensor)``, ``if tensor``."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("a tensor's value was read")
        return function(*args, **(kwargs or {}))


def test_the_watch_sees_a_value_being_read():
    for read in (float, bool, torch.Tensor.item):
        with pytest.raises(AssertionError, match="was read"), NothingIsRead():
            read(torch.ones(()))


@pytest.mark.parametrize("optimizer", ["adamw", "lars"])
def test_a_step_reads_no_value(optimizer):
    config = small_config(optimizer=optimizer)
    state = small_state(config, CPU)
    batches = [views(CPU, 0), views(CPU, 1)]
    for _ in range(2):  # the first one makes the optimiser's state
        with NothingIsRead():
            output, norm = train_step(state, CPU, config, batches, 2)
    assert torch.isfinite(output.loss)
    assert norm > 0


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", ["adamw", "lars"])
def test_a_step_on_the_gpu_never_waits_for_it(optimizer, precision):
    runtime = Runtime(torch.device("cuda"), precision)
    config = small_config(optimizer=optimizer)
    state = small_state(config, runtime)
    batches = [views(runtime, 0)]
    for _ in range(3):  # cuDNN and the caching allocator settle
        train_step(state, runtime, config, batches)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            train_step(state, runtime, config, batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---------------------------------------------------------------- compiling


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "need a GPU"),
        ({"compile": "off"}, "need a GPU"),
    ],
)
def test_cuda_graphs_want_a_gpu(options, reason):
    with pytest.raises(BadInput, match=f"--cuda-graphs {reason}"):
        resolve_compile(small_config(cuda_graphs=True, **options), CPU)


@pytest.mark.parametrize(
    ("options", "processes", "reason"),
    [({"compile": "off"}, 1, "leave --compile off away"), ({"accumulate": 2}, 1, "one batch a step"), ({}, 2, "one process")],
)
def test_what_cuda_graphs_do_not_go_with_is_refused(options, processes, reason):
    gpu = Runtime(torch.device("cuda"), "bf16", 0, processes)  # nothing is computed on it
    with pytest.raises(BadInput, match=reason):
        resolve_compile(small_config(cuda_graphs=True, **options), gpu)
    assert resolve_compile(small_config(cuda_graphs=True), Runtime(torch.device("cuda"), "bf16")) == "cuda graphs"


def test_auto_compiles_on_a_gpu_alone():
    assert resolve_compile(small_config(), CPU) == "off"
    assert resolve_compile(small_config(compile="on"), CPU) == "on"


def gradients(state: TrainingState) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in state.model.parameters() if parameter.grad is not None])


def assert_same_training(config, runtime, choice, steps, **tolerance):
    """Losses, gradients and statistics of the accelerated network equal those of the plain one.

    AdamW's first steps are like signs: at a usual rate, differences of 3e-7 grow to 0.04 in the loss within three steps.
    """
    plain, fast = small_state(config, runtime), small_state(config, runtime, choice)
    for state in (plain, fast):
        state.lrs[:] = 1e-6
    for step in range(steps):
        losses = [train_step(state, runtime, config, [views(runtime, step)])[0].loss for state in (plain, fast)]
        torch.testing.assert_close(losses[1], losses[0], **tolerance)
        expected = gradients(plain)
        assert (gradients(fast) - expected).norm() <= 0.01 * expected.norm()
    states = plain.model.state_dict(), fast.model.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        if name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            torch.testing.assert_close(states[1][name], tensor, rtol=1e-2, atol=1e-3, msg=name)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("choice", ["on", "cuda graphs"])
def test_compiled_steps_on_the_gpu_are_the_plain_ones(choice, checkpointing, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.compiler.reset()  # else the networks of other tests count towards the limit, past which nothing is compiled
    runtime = Runtime(torch.device("cuda"), "fp32")
    config = small_config(gradient_checkpointing=checkpointing)
    assert_same_training(config, runtime, choice, 5, rtol=1e-3, atol=1e-3)


def test_what_cuda_graphs_give_is_copied_out_of_their_memory(monkeypatch):
    """The next step writes over it; the gradient passes through the copy."""
    monkeypatch.setattr(torch, "compile", lambda network, **options: network)
    given = []

    class Network(torch.nn.Module):
        def forward(self, view1, view2):
            given.append(BYOLOutput((view1 * view2).sum(), view1.detach(), view1.detach(), view2.detach()))
            return given[-1]

    view = torch.ones(3, requires_grad=True)
    output = accelerate(Network(), "cuda graphs")(view, 2 * torch.ones(3))
    output.loss.backward()
    assert torch.equal(view.grad, 2 * torch.ones(3))
    for copied, original in zip(output, given[0], strict=True):
        assert torch.equal(copied, original)
        assert copied.data_ptr() != original.data_ptr()


def test_checkpointing_within_a_compiled_step_leaves_the_statistics_alone(monkeypatch):
    """Traced as torch.compile does, without the compiler: its graphs are what is run."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network, **options: compile_(network, backend="aot_eager", dynamic=False))
    config = small_config(gradient_checkpointing=True)
    assert_same_training(config, CPU, "on", 2, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- what was chosen


def test_what_was_left_to_the_machine_is_printed_and_recorded(pretrained, mammostream):
    """The record is a config file too: the run that it starts is the finished one."""
    import yaml

    record = pretrained.pretrained / "config.yaml"
    chosen = yaml.safe_load(record.read_text())["chosen"]
    assert chosen == {
        "runtime": "cpu, fp32",
        "compile": "off",
        "optimisation": "AdamW, peak lr 0.002 (the guide's, at any batch) for an effective batch of 16, decay 0.0001 of all "
        "parameters, target momentum to the power 1",
    }
    outcome = mammostream(f"pretrain --config {record} --resume auto")
    assert outcome.code == 0, outcome.err
    assert "runtime: cpu, fp32; compile: off; optimisation: AdamW, peak lr 0.002" in outcome.out


# ---------------------------------------------------------------- garbage


def test_cycles_are_collected_on_schedule_and_not_in_between():
    class Node:
        pass

    def cycle() -> weakref.ref:
        one, other = Node(), Node()
        one.other, other.one = other, one
        return weakref.ref(one)

    assert gc.isenabled()
    with collecting_on_schedule(every=3) as collect:
        assert not gc.isenabled()
        dropped = cycle()
        for step in (1, 2):
            collect(step)
            [[] for _ in range(10_000)]  # many times what would set it off
            assert dropped() is not None
        collect(3)
        assert dropped() is None
    assert gc.isenabled()
    with pytest.raises(KeyError), collecting_on_schedule():
        raise KeyError
    assert gc.isenabled()
