"""BYOL pre-training on shards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.errors import BadInput
from common.normalisation import MEAN, STD
from common.progress import progress
from dali_pipelines import RECIPES, LabelledLoader, PretrainLoader
from models.backbones import build_backbone
from models.byol import BYOLOutput, MammogramBYOL
from models.checkpoints import load_checkpoint, save_checkpoint
from shards.reading import ShardSet
from train.config import PretrainConfig
from train.monitoring import effective_rank, z_std
from train.pictures import draw_curves, draw_views
from train.resuming import check_same_options
from train.runtime import Runtime, resolve_runtime
from train.schedules import byol_momenta, learning_rates
from train.tracking import Tracker

LOG_EVERY = 10  # steps between reads of the loss: reading it waits for the device
VIEWS_SHOWN = 6
BASE_BATCH = 32
BASE_LR = {"guide": 2e-3, "mammo": 3e-4}  # at BASE_BATCH
CHECKPOINT_NAME = "mammogram_byol_{}.pth"


@dataclass
class TrainingState:
    """What a step needs and changes."""

    model: MammogramBYOL
    compiled: torch.nn.Module  # the model itself, or its compiled form, which shares its tensors
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    lrs: np.ndarray  # (steps,)
    momenta: np.ndarray  # (steps,)
    step: int = 0


def pretrain(
    shards: ShardSet,
    output_dir: Path,
    config: PretrainConfig,
    resume: Path | None = None,
    command: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Pre-train a backbone by BYOL and write checkpoints, ``metrics.jsonl`` and pictures.

    Parameters
    ----------
    shards
        Tiles of the split ``train``.
    output_dir
        The run's directory.
    config
        The options.
    resume
        A checkpoint of this run to go on from, or None.
    command
        The command's own options, recorded beside `config` in ``config.yaml``.

    Returns
    -------
    dict
        The last epoch's metrics.

    Raises
    ------
    BadInput
        Too few tiles for a batch, or a checkpoint of another architecture or of other options.
    """
    torch.manual_seed(config.seed)
    runtime = resolve_runtime(config)
    loader = _loader(shards, config, runtime)
    state = _initial_state(config, runtime, len(loader))
    best = math.inf
    if resume is not None:
        best = _restore(resume, state, loader, config, shards)
    metrics: dict[str, Any] = {}
    options = asdict(config) | dict(command or {})
    step = state.step if resume else None
    with Tracker(output_dir, config.wandb_project, config.wandb_mode, options, resume_step=step) as tracker:
        if not resume:
            _draw_some_views(shards, config, runtime, output_dir / "views.png")
        with progress(None, f"pre-training ({runtime})", "pair", total=config.epochs * len(loader) * config.batch_size) as bar:
            bar.update(state.step * config.batch_size)
            while loader.epoch < config.epochs:
                metrics = _epoch(state, loader, runtime, config, tracker, bar)
                checkpoint = _checkpoint(state, loader, config, shards, metrics, min(best, metrics["loss"]))
                names = []
                if metrics["loss"] < best:
                    best = metrics["loss"]
                    names.append("best")
                if loader.epoch % config.save_every == 0:
                    names.append(f"epoch_{loader.epoch:03d}")
                if loader.epoch == config.epochs:
                    names.append("final")
                # A resumed run takes the last one's epoch for done: so it comes after all others of that epoch.
                for name in [*names, "last"]:
                    save_checkpoint(output_dir / CHECKPOINT_NAME.format(name), checkpoint)
    draw_curves(tracker.path, ["loss", "z_std", "effective_rank", "lr"], output_dir / "curves.png", "BYOL pre-training")
    return metrics


def train_step(
    state: TrainingState, runtime: Runtime, config: PretrainConfig, views: Sequence[torch.Tensor]
) -> tuple[BYOLOutput, torch.Tensor]:
    """Take one optimiser step and move the target; nothing here waits for the device.

    Parameters
    ----------
    views
        Two (N, 1, H, W) float32 tensors on the device.

    Returns
    -------
    output, gradient norm
        Detached tensors on the device; the norm is a scalar.
    """
    for group in state.optimizer.param_groups:
        group["lr"] = float(state.lrs[state.step])

    with runtime.autocast():
        output = state.compiled(*views)

    state.optimizer.zero_grad(set_to_none=True)
    state.scaler.scale(output.loss).backward()

    state.scaler.unscale_(state.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), config.gradient_clip)
    state.scaler.step(state.optimizer)
    state.scaler.update()

    state.model.update_target(float(state.momenta[state.step]))
    state.step += 1
    return output._replace(loss=output.loss.detach()), norm.detach()


def _epoch(
    state: TrainingState, loader: PretrainLoader, runtime: Runtime, config: PretrainConfig, tracker: Tracker, bar: Any
) -> dict[str, Any]:
    state.model.train()
    losses = []
    waited, started = loader.wait_seconds, bar.format_dict["elapsed"]
    epoch = loader.epoch + 1
    for view1, view2, _ in loader:
        output, norm = train_step(state, runtime, config, (view1, view2))
        losses.append(output.loss)
        bar.update(len(view1))
        if state.step % LOG_EVERY == 0:
            momentum, lr = float(state.momenta[state.step - 1]), float(state.lrs[state.step - 1])
            # One wait for the device every LOG_EVERY steps.
            step = {"loss": float(output.loss), "z_std": float(z_std(output.projections)), "grad_norm": float(norm)}
            tracker.log(state.step, step | {"lr": lr, "momentum": momentum, "epoch": epoch})
            elapsed = bar.format_dict["elapsed"] - started
            share = (loader.wait_seconds - waited) / max(elapsed, 1e-9)
            bar.set_postfix(epoch=epoch, loss=f"{step['loss']:.3f}", lr=f"{lr:.1e}", data_wait=f"{share:.0%}")
    elapsed = max(bar.format_dict["elapsed"] - started, 1e-9)
    mean_loss = float(torch.stack(losses).mean())
    if not math.isfinite(mean_loss):
        raise BadInput(f"the loss of epoch {epoch} is not finite; lower --lr, or use --precision fp32")
    metrics = {
        "loss": mean_loss,
        "z_std": float(z_std(output.projections)),
        "effective_rank": float(effective_rank(output.features)),
        "lr": float(state.lrs[state.step - 1]),
        "momentum": float(state.momenta[state.step - 1]),
        "pairs_per_second": len(losses) * config.batch_size / elapsed,
        "data_wait_percent": 100 * (loader.wait_seconds - waited) / elapsed,
        "epoch": epoch,
    }
    tracker.log(state.step, {"epoch_mean": metrics})
    return metrics


def _loader(shards: ShardSet, config: PretrainConfig, runtime: Runtime) -> PretrainLoader:
    tiles = shards.tiles("train")["tile"].to_numpy()
    limited = None
    if config.limit_tiles is not None and config.limit_tiles < len(tiles):
        limited = np.sort(np.random.default_rng(config.seed).permutation(tiles)[: config.limit_tiles])
    return PretrainLoader(
        shards.shards("train"),
        batch_size=config.batch_size,
        views=RECIPES[config.recipe],
        tile_size=shards.preprocessing["tile_size"],
        mean=MEAN,
        std=STD,
        seed=config.seed,
        device="gpu" if runtime.device.type == "cuda" else "cpu",
        num_threads=config.num_workers,
        tiles=limited,
    )


def _draw_some_views(shards: ShardSet, config: PretrainConfig, runtime: Runtime, path: Path) -> None:
    """Draw a few tiles and their two views, from loaders of their own: the training's loader starts untouched."""
    few = replace(config, batch_size=min(config.batch_size, VIEWS_SHOWN))
    view1, view2, numbers = next(iter(_loader(shards, few, runtime)))
    plain = LabelledLoader(
        shards.shards("train"),
        batch_size=len(numbers),
        tile_size=shards.preprocessing["tile_size"],
        mean=MEAN,
        std=STD,
        tiles=numbers.tolist(),
    )
    tiles, order = next(iter(plain))
    tiles = tiles[torch.searchsorted(order, numbers)]
    rows = {"tile": tiles, "view 1": view1, "view 2": view2}
    draw_views({name: (batch.float().cpu() * STD + MEAN)[:, 0].numpy() for name, batch in rows.items()}, path)


def _initial_state(config: PretrainConfig, runtime: Runtime, steps_per_epoch: int) -> TrainingState:
    backbone = build_backbone(config.arch, config.weights)
    model = MammogramBYOL(backbone, hidden_dim=config.hidden_dim, proj_dim=config.proj_dim)
    model = model.to(runtime.device, memory_format=torch.channels_last)
    compile_it = config.compile == "on" or (config.compile == "auto" and runtime.device.type == "cuda")
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=0.0, weight_decay=config.weight_decay, fused=True if runtime.device.type == "cuda" else None
    )
    peak = config.lr if config.lr is not None else BASE_LR[config.recipe] * math.sqrt(config.batch_size / BASE_BATCH)
    steps = config.epochs * steps_per_epoch
    warmup = min(config.warmup_epochs, config.epochs / 10) * steps_per_epoch
    return TrainingState(
        model=model,
        compiled=torch.compile(model) if compile_it else model,
        optimizer=optimizer,
        scaler=runtime.scaler(),
        lrs=learning_rates(peak, steps, round(warmup)),
        momenta=byol_momenta(config.momentum, steps),
    )


def _checkpoint(
    state: TrainingState, loader: PretrainLoader, config: PretrainConfig, shards: ShardSet, metrics: dict, best: float
) -> dict[str, Any]:
    return {
        "kind": "byol",
        "arch": config.arch,
        "model_state_dict": state.model.state_dict(),
        "optimizer_state_dict": state.optimizer.state_dict(),
        "scaler_state_dict": state.scaler.state_dict(),
        "config": asdict(config),
        "epoch": loader.epoch,
        "step": state.step,
        "metrics": metrics,
        "best_loss": best,
        "preprocessing": shards.preprocessing | {"mean": MEAN, "std": STD},
        "loader": loader.state_dict(),
        "rng": torch.get_rng_state(),
    }


def _restore(path: Path, state: TrainingState, loader: PretrainLoader, config: PretrainConfig, shards: ShardSet) -> float:
    """Put a run back where a checkpoint left it and return its best loss so far."""
    checkpoint = load_checkpoint(path, "byol")
    # What may change between the two halves of a run without changing its result, or by intent.
    free = {"num_workers", "wandb_project", "wandb_mode", "save_every", "device", "precision", "compile"}
    check_same_options(path, checkpoint["config"], config, free)
    if checkpoint["preprocessing"]["shard_config_hash"] != shards.preprocessing["shard_config_hash"]:
        raise BadInput(f"checkpoint {path} was trained on other --shards than {shards.directory}; resume with them")
    state.model.load_state_dict(checkpoint["model_state_dict"])
    state.optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
    if checkpoint["scaler_state_dict"]:  # empty where the first half needed no scaler
        state.scaler.load_state_dict(checkpoint["scaler_state_dict"])
    state.step = checkpoint["step"]
    loader.load_state_dict(checkpoint["loader"])
    torch.set_rng_state(checkpoint["rng"])
    return checkpoint["best_loss"]
