"""The measures that make a training step fast, as rungs of a ladder, from a plain step upwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from mammostream.models.backbones import build_backbone
from mammostream.models.byol import MammogramBYOL, byol_loss
from mammostream.models.stems import PaddedStem, SpaceToDepthStem
from mammostream.shards.reading import Shard
from mammostream.train.byol.config import PretrainConfig
from mammostream.train.byol.step import TrainingState
from mammostream.train.run.runtime import Runtime, resolve_runtime

NAIVE = "naive"

_LR, _MOMENTUM = 1e-4, 0.996

STEMS: dict[str, Callable[[nn.Conv2d], nn.Module]] = {"padded": PaddedStem, "space-to-depth": SpaceToDepthStem}


@dataclass(frozen=True)
class Task:
    """What every rung does."""

    arch: str
    batch_size: int
    tile_size: int
    device: str  # auto | cpu | cuda
    steps: int  # a turn
    warmup: int  # steps before the first turn, at least 2
    rounds: int
    shards: tuple[Shard, ...] = ()
    shard_tile_size: int = 0
    workers: int = 1


@dataclass(frozen=True)
class Rung:
    """One way to take the step.

    Attributes
    ----------
    what
        What it changes, in words.
    precision
        ``fp32``, ``bf16``, ``fp16``; ``auto`` is what training chooses on the device; ``old`` is fp16 on a GPU, else fp32.
    plain
        A plain script's step: the target moved parameter by parameter, AdamW as torch makes it, the loss read in each step.
    channels
        Of the views.
    channels_last
        The layout of views and weights.
    fused
        Whether AdamW is one kernel.
    compiling
        ``off``, ``on``, ``graphs``, or ``auto`` as training chooses.
    stem
        Another form of a ResNet's first convolution, or nothing.
    real
        Whether views come from shards, through DALI.
    """

    what: str
    precision: str = "auto"
    plain: bool = False
    channels: int = 1
    channels_last: bool = True
    fused: bool = True
    compiling: str = "off"
    stem: str = ""
    real: bool = False


RUNGS = {
    NAIVE: Rung(
        "plain script: fp16 autocast on a GPU, NCHW, 3 channels, target parameter by parameter, loss read each step",
        precision="old",
        plain=True,
        channels=3,
        channels_last=False,
    ),
    "fp32": Rung("the same in fp32, on 1 channel", precision="fp32", plain=True, channels_last=False),
    "channels-last": Rung("the same in channels-last layout", precision="fp32", plain=True),
    "bf16": Rung("the same under bf16 autocast", precision="bf16", plain=True),
    "sync-free": Rung("our step at the precision of --precision auto: target in one kernel, nothing read", fused=False),
    "fused": Rung("AdamW fused"),
    "compile": Rung("torch.compile", compiling="on"),
    "cuda-graphs": Rung("the compiled step as CUDA graphs", compiling="graphs"),
    "real-data": Rung("as training runs, on views from the shards", compiling="auto", real=True),
    "channels-8": Rung("as training runs, first convolution over 8 channels, 7 of them zeros", compiling="auto", stem="padded"),
    "space-to-depth": Rung("as training runs, first convolution on 2 × 2 blocks", compiling="auto", stem="space-to-depth"),
}


def default_rungs(task: Task) -> list[str]:
    """Return the rungs that a task without a choice takes: all, real data where there are shards, graphs on a GPU."""
    on_gpu = resolve_runtime(rung_config(task, Rung(""))).device.type == "cuda"
    return [name for name, rung in RUNGS.items() if (task.shards or not rung.real) and (on_gpu or rung.compiling != "graphs")]


class AsTorchMakesIt(torch.optim.AdamW):
    """AdamW with torch's choice of kernels. It cannot skip a step as fused ones can, so it is not told to."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        vars(self).pop("found_inf", None)
        return super().step(closure)


def build_model(arch: str, rung: Rung) -> MammogramBYOL:
    """Return a network for a rung's views, its first convolution in the rung's form, on the CPU."""
    model = MammogramBYOL(build_backbone(arch))
    model.classification_head.requires_grad_(False)
    for backbone in (model.backbone, model.backbone_momentum):
        if rung.channels == 1 and not rung.stem:
            continue
        name = "features.0.0" if arch.startswith("convnext") else "conv1"
        conv = cast(nn.Conv2d, backbone.get_submodule(name))
        if rung.stem:
            first: nn.Module = STEMS[rung.stem](conv)
        else:
            geometry: dict[str, Any] = {name: getattr(conv, name) for name in ("kernel_size", "stride", "padding")}
            first = nn.Conv2d(rung.channels, conv.out_channels, **(geometry | {"bias": conv.bias is not None}))
            first.requires_grad_(conv.weight.requires_grad)
        backbone.set_submodule(name, first)
    return model


def plain_step(state: TrainingState, runtime: Runtime, config: PretrainConfig, views: tuple[Tensor, Tensor]) -> float:
    """Take a step as a script does that nobody has measured."""
    model, optimizer, scaler = state.model, state.optimizer, state.scaler
    for group in optimizer.param_groups:
        group["lr"] = _LR
    with runtime.autocast():
        predictions = [model.prediction_head(model.projection_head(model.backbone(view).flatten(1))) for view in views]
        with torch.no_grad():
            targets = [model.projection_head_momentum(model.backbone_momentum(view).flatten(1)) for view in views]
        loss = (byol_loss(predictions[0], targets[1]) + byol_loss(predictions[1], targets[0])) / 2
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
    scaler.step(optimizer)
    scaler.update()
    for online, target in (
        (model.backbone, model.backbone_momentum),
        (model.projection_head, model.projection_head_momentum),
    ):
        for source, moved in zip(online.parameters(), target.parameters(), strict=True):
            moved.data = moved.data * _MOMENTUM + source.data * (1 - _MOMENTUM)
    return loss.item()


def rung_config(task: Task, rung: Rung) -> PretrainConfig:
    """Return the options of training that stand for a rung."""
    config = PretrainConfig(arch=task.arch, batch_size=task.batch_size, device=task.device)
    precision = rung.precision
    if precision == "old":
        precision = "fp16" if resolve_runtime(config).device.type == "cuda" else "fp32"
    compiling = "on" if rung.compiling == "graphs" else rung.compiling
    return PretrainConfig(
        arch=task.arch,
        batch_size=task.batch_size,
        device=task.device,
        precision=precision,
        compile=compiling,
        cuda_graphs=rung.compiling == "graphs",
    )
