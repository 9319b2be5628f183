"""What a pre-training is assembled from: loader, networks and optimiser, monitor, online probe, the picture of its views."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mammostream.common.normalisation import MEAN, STD
from mammostream.dali_pipelines import LabelledLoader, PretrainLoader, View, recipe_views, views_from_yaml
from mammostream.models.backbones import build_backbone
from mammostream.models.byol import MammogramBYOL
from mammostream.models.tensors import place
from mammostream.shards.reading import ShardSet
from mammostream.train.byol.config import PretrainConfig
from mammostream.train.byol.flops import flops_per_pair, peak_flops
from mammostream.train.byol.monitoring import Monitor, collapse_alarm
from mammostream.train.byol.optimisation import build_optimizer, resolve_optimisation
from mammostream.train.byol.pictures import draw_views
from mammostream.train.byol.speed import accelerate, resolve_compile, search_convolutions
from mammostream.train.byol.step import TrainingState
from mammostream.train.byol.sync_batch_norm import synchronise_batch_norms
from mammostream.train.run.runtime import Runtime
from mammostream.train.run.schedules import byol_momenta, learning_rates
from mammostream.train.run.stages import checkpoint_activations

if TYPE_CHECKING:
    from mammostream.train.probe.compare import OnlineProbe

VIEWS_SHOWN = 6


def steps_per_epoch(config: PretrainConfig, batches: int) -> int:
    """Return the steps of an epoch of this many batches; the last step takes those that are left."""
    return math.ceil(batches / config.accumulate)


def chosen_views(config: PretrainConfig, preprocessing: Mapping[str, Any]) -> tuple[View, View]:
    """Return the views of ``--views``, else the recipe's for these tiles."""
    if config.views is not None:
        return views_from_yaml(Path(config.views))
    spacing = preprocessing["pixel_spacing_mm"] or max(preprocessing["native_spacing_mm"] or [0])
    view_size = config.view_size or preprocessing["tile_size"]
    return recipe_views(config.recipe, spacing * preprocessing["tile_size"] / view_size or None)


def open_loader(shards: ShardSet, config: PretrainConfig, runtime: Runtime) -> PretrainLoader:
    """Return the loader of the split ``train``, or of the first ``--limit-tiles`` of it in a random order."""
    tiles = shards.tiles("train")["tile"].to_numpy()
    limited = None
    if config.limit_tiles is not None and config.limit_tiles < len(tiles):
        limited = np.sort(np.random.default_rng(config.seed).permutation(tiles)[: config.limit_tiles])
    return PretrainLoader(
        shards.shards("train"),
        batch_size=config.batch_size,
        views=chosen_views(config, shards.preprocessing),
        tile_size=shards.preprocessing["tile_size"],
        view_size=config.view_size,
        mean=MEAN,
        std=STD,
        seed=config.seed,
        device="gpu" if runtime.device.type == "cuda" else "cpu",
        num_threads=config.num_workers,
        tiles=limited,
        rank=runtime.rank,
        world_size=runtime.world_size,
        mmap=config.mmap,
    )


def build_state(config: PretrainConfig, runtime: Runtime, batches_per_epoch: int) -> TrainingState:
    """Return networks, optimiser and schedules at step 0."""
    optimisation = resolve_optimisation(config, config.batch_size * config.accumulate * runtime.world_size)
    compiling = resolve_compile(config, runtime)
    if not config.deterministic:
        search_convolutions(runtime.device)
    backbone = build_backbone(config.arch, config.weights)
    model = MammogramBYOL(backbone, hidden_dim=config.hidden_dim, proj_dim=config.proj_dim, concat_views=config.concat_views)
    model.classification_head.requires_grad_(False)  # the loss does not reach it
    if config.sync_bn == "on" or (config.sync_bn == "auto" and runtime.world_size > 1):
        model = synchronise_batch_norms(model, runtime.device)
    model = place(model, runtime.device)
    if config.gradient_checkpointing:
        checkpoint_activations(model.backbone, compiled=compiling != "off")
    per_epoch = steps_per_epoch(config, batches_per_epoch)
    steps = config.epochs * per_epoch if config.max_steps is None else min(config.epochs * per_epoch, config.max_steps)
    warmup = min(config.warmup_epochs * per_epoch, steps / 10)
    return TrainingState(
        model=model,
        network=accelerate(runtime.parallel(model), compiling),
        optimizer=build_optimizer(model, optimisation),
        scaler=runtime.scaler(),
        lrs=learning_rates(optimisation.lr, steps, round(warmup)),
        momenta=byol_momenta(config.momentum, steps, optimisation.momentum_exponent),
        chosen={"runtime": str(runtime), "compile": compiling, "optimisation": str(optimisation)},
    )


def build_monitor(shards: ShardSet, config: PretrainConfig, state: TrainingState) -> Monitor:
    """Return the monitor of the views, which knows the breast ratio of each tile."""
    tiles = shards.tiles("train").sort_values("tile")
    warmup = int(state.lrs.argmax())
    alarm = collapse_alarm(config.proj_dim, warmup, config.batch_size)
    return Monitor(alarm, tiles["tile"].to_numpy(), tiles["breast_ratio"].to_numpy())


def build_probe(shards: ShardSet, config: PretrainConfig, runtime: Runtime) -> OnlineProbe | None:
    """Return the online probe, or None without ``--probe-csv``."""
    if config.probe_csv is None:
        return None

    # scikit-learn is a quarter of all that would be imported
    from mammostream.train.probe.compare import OnlineProbe
    from mammostream.train.probe.labelled import read_probe_set

    probe_set = read_probe_set(Path(config.probe_csv), config.probe_class_names, shards)
    return OnlineProbe(probe_set, runtime, config, config.probe_tiles, config.view_size)


def pair_flops(shards: ShardSet, config: PretrainConfig, runtime: Runtime) -> int | None:
    """Return the arithmetic of a pair of views, or None where no peak is known to hold it against."""
    if peak_flops(runtime.device) is None:
        return None
    with torch.device("meta"):
        model = MammogramBYOL(build_backbone(config.arch), hidden_dim=config.hidden_dim, proj_dim=config.proj_dim)
    return flops_per_pair(model, config.view_size or shards.preprocessing["tile_size"])


def draw_some_views(shards: ShardSet, config: PretrainConfig, runtime: Runtime, path: Path) -> None:
    """Draw a few tiles and their two views, from loaders of their own: the training's loader starts untouched."""
    few = replace(config, batch_size=min(config.batch_size, VIEWS_SHOWN), view_size=None)
    view1, view2, numbers = next(iter(open_loader(shards, few, replace(runtime, rank=0, world_size=1))))
    plain = LabelledLoader(
        shards.shards("train"),
        batch_size=len(numbers),
        tile_size=shards.preprocessing["tile_size"],
        mean=MEAN,
        std=STD,
        tiles=numbers.tolist(),
        rank=0,
        world_size=1,
        keep_memory=runtime.device.type == "cpu",  # it would concern the decoding threads of the whole run
    )
    tiles, order = next(iter(plain))
    tiles = tiles[torch.searchsorted(order, numbers)]
    rows = {"tile": tiles, "view 1": view1, "view 2": view2}
    draw_views({name: (batch.float().cpu() * STD + MEAN)[:, 0].numpy() for name, batch in rows.items()}, path)
