"""BYOL pre-training on shards."""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from mammostream.common.errors import BadInput, Stopped
from mammostream.common.files import second_name
from mammostream.common.normalisation import MEAN, STD
from mammostream.common.progress import progress
from mammostream.dali_pipelines import LabelledLoader, PretrainLoader, View, recipe_views, views_from_yaml, views_to_dict
from mammostream.models.backbones import build_backbone
from mammostream.models.byol import BYOLOutput, MammogramBYOL
from mammostream.models.checkpoints import save_checkpoint
from mammostream.shards.reading import ShardSet
from mammostream.train.byol.bad_steps import BadSteps, KeptStatistics
from mammostream.train.byol.config import PretrainConfig
from mammostream.train.byol.flops import flops_per_pair, mfu, peak_flops
from mammostream.train.byol.monitoring import ADVICE, READ_EVERY, Monitor, collapse_alarm, device_figures, target_distance
from mammostream.train.byol.optimisation import build_optimizer, resolve_optimisation
from mammostream.train.byol.pictures import draw_views
from mammostream.train.byol.speed import accelerate, collecting_on_schedule, resolve_compile, search_convolutions
from mammostream.train.byol.sync_batch_norm import synchronise_batch_norms
from mammostream.train.run.charts import draw_curves
from mammostream.train.run.memory import memory_explained
from mammostream.train.run.resuming import check_same_options, load_to_resume, random_state, set_random_state
from mammostream.train.run.runtime import Runtime, make_deterministic, resolve_runtime
from mammostream.train.run.schedules import byol_momenta, learning_rates
from mammostream.train.run.stages import checkpoint_activations
from mammostream.train.run.stopping import StopSignals
from mammostream.train.run.tracking import Tracker, drop_lines

if TYPE_CHECKING:
    from mammostream.train.probe.probing import OnlineProbe

VIEWS_SHOWN = 6
CHECKPOINT_NAME = "mammogram_byol_{}.pth"
# What may change between the two halves of a run without changing its result, or by intent. The views' file may move: the
# loader compares what it says.
_FREE = {"num_workers", "wandb_project", "wandb_mode", "save_every", "save_every_steps", "device", "precision", "compile"}
_FREE |= {"cuda_graphs", "mmap", "views", "gradient_checkpointing", "deterministic", "max_bad_steps", "on_collapse"}

Views = tuple[Tensor, Tensor]


@dataclass
class TrainingState:
    """What a step needs and changes."""

    model: MammogramBYOL
    network: nn.Module  # the model itself, or what runs it: compiled, over several processes; they share its tensors
    optimizer: torch.optim.Optimizer  # one that skips where its attribute found_inf is 1, as torch's fused ones do
    scaler: torch.amp.GradScaler
    lrs: np.ndarray  # (steps,)
    momenta: np.ndarray  # (steps,)
    step: int = 0
    chosen: dict[str, str] = field(default_factory=dict)  # what the options left to the machine and the recipe, in words
    sums: Tensor = field(init=False)  # (2,) float64: of this epoch, the loss's sum and the number of steps that were not bad
    statistics: KeptStatistics = field(init=False)

    def __post_init__(self) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64, device=next(self.model.parameters()).device)
        self.statistics = KeptStatistics(self.model)

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return len(self.lrs)


def pretrain(
    shards: ShardSet,
    output_dir: Path,
    config: PretrainConfig,
    resume: Path | None = None,
    command: Mapping[str, Any] | None = None,
    runtime: Runtime | None = None,
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
        A checkpoint of this run to go on from, or None. It may have been saved after any step: the rest of the run is what it
        would have been, on a CPU in fp32 bit for bit.
    command
        The command's own options, recorded beside `config` in ``config.yaml``.
    runtime
        Device, precision and processes; None resolves them from `config` for one process.

    Returns
    -------
    dict
        The last epoch's metrics.

    Raises
    ------
    BadInput
        Too few tiles for a batch, a checkpoint of another architecture or of other options, too many steps without finite
        gradients, a full disk, or too little memory.
    Stopped
        SIGTERM, SIGUSR1 or Ctrl-C came; the last checkpoint is saved.
    """
    runtime = runtime or resolve_runtime(config)
    if config.deterministic:
        make_deterministic()
    with memory_explained(runtime.device, config.batch_size, config.accumulate), StopSignals(runtime.is_main) as signals:
        torch.manual_seed(config.seed)
        loader = _loader(shards, config, runtime)
        state = _initial_state(config, runtime, len(loader))
        bad_steps = BadSteps(output_dir / "bad_batches.jsonl", config.max_bad_steps, runtime)
        monitor, probe = _monitor(shards, config, state), _online_probe(shards, config, runtime)
        run = _Run(shards, output_dir, config, runtime, loader, state, bad_steps, signals, monitor, probe)
        if resume is not None:
            run.restore(resume)
        options = asdict(config) | dict(command or {}) | {"chosen": state.chosen}
        step = state.step if resume else None
        if runtime.is_main:
            drop_lines(bad_steps.path, state.step)
            tracker = Tracker(output_dir, config.wandb_project, config.wandb_mode, options, resume_step=step)
            if not resume:
                _draw_some_views(shards, config, runtime, output_dir / "views.png")
        with tracker if runtime.is_main else nullcontext() as run.tracker:
            run.train()
    if runtime.is_main:
        names = ["loss", "z_std", "effective_rank", "view_retrieval", "probe", "lr"]
        draw_curves(output_dir / "metrics.jsonl", names, output_dir / "curves.png", "BYOL pre-training")
    return runtime.from_main(run.metrics)


def train_step(
    state: TrainingState, runtime: Runtime, config: PretrainConfig, batches: Iterable[Views], count: int = 1
) -> tuple[BYOLOutput, Tensor]:
    """Take one optimiser step and move the target; nothing here waits for the device.

    A step whose gradients are not finite changes neither the weights nor the optimiser nor the batch norms.

    Parameters
    ----------
    batches
        The step's `count` batches, taken one after the other: two (N, 1, H, W) float32 tensors each, on the device.
    count
        Their number: the gradient is the mean of theirs.

    Returns
    -------
    output, gradient norm
        Of the last batch, but the loss is the mean over all; the norm, before clipping, is a scalar, not finite in a bad step.
        Detached, on the device.
    """
    for group in state.optimizer.param_groups:
        group["lr"] = float(state.lrs[state.step])
    state.optimizer.zero_grad(set_to_none=True)
    state.statistics.keep()

    losses = []
    for number, views in enumerate(batches, start=1):
        # The processes exchange gradients once a step.
        with runtime.keeping_gradients(state.network) if number < count else nullcontext():
            with runtime.autocast():
                output = state.network(*views)
            state.scaler.scale(output.loss / count).backward()
        losses.append(output.loss.detach())

    state.scaler.unscale_(state.optimizer)
    norm = nn.utils.clip_grad_norm_(state.model.parameters(), config.gradient_clip)
    bad = ~norm.isfinite()

    state.optimizer.found_inf = bad.float()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.statistics.restore(bad)

    state.model.update_target(float(state.momenta[state.step]))
    loss = torch.stack(losses).mean()
    state.sums += torch.stack([loss.where(~bad, 0), (~bad).float()])
    state.step += 1
    return output._replace(loss=loss), norm


@dataclass
class _Run:
    """A run under way: what its steps, its records and its checkpoints share."""

    shards: ShardSet
    output_dir: Path
    config: PretrainConfig
    runtime: Runtime
    loader: PretrainLoader
    state: TrainingState
    bad_steps: BadSteps
    signals: StopSignals
    monitor: Monitor  # the main process's batches
    probe: OnlineProbe | None  # of the main process
    tracker: Tracker | None = None  # of the main process
    metrics: dict[str, Any] = field(default_factory=dict)  # the last whole epoch's, in the main process
    best: dict[str, Any] | None = None  # the best epoch's

    def train(self) -> None:
        """Take the steps that are left."""
        state, config, runtime = self.state, self.config, self.runtime
        state.model.train()
        clock = _Clock(self.loader, runtime.device, _pair_flops(self.shards, config, runtime))
        batches = _endlessly(self.loader)
        per_epoch = _steps_per_epoch(config, len(self.loader))
        per_batch = config.batch_size * runtime.world_size
        total, done = (per_batch * self._batches_before(step) for step in (state.steps, state.step))
        with (
            progress(None, f"pre-training ({runtime})", "pair", total, done, not runtime.is_main) as bar,
            collecting_on_schedule() as collect,
        ):
            if runtime.is_main:
                bar.write("; ".join(f"{name}: {value}" for name, value in state.chosen.items()))
            while state.step < state.steps:
                count = self._batches_before(state.step + 1) - self._batches_before(state.step)
                numbers: list[Tensor] = []
                output, norm = train_step(state, runtime, config, _views(batches, count, numbers), count)
                self.bad_steps.note(state.step, norm, numbers)
                if runtime.is_main:
                    self.monitor.record(output, norm, torch.cat(numbers))
                collect(state.step)

                clock.pairs += count * config.batch_size
                bar.update(count * per_batch)
                epoch, place = divmod(state.step - 1, per_epoch)
                if state.step % READ_EVERY == 0:
                    self._log(output, norm, epoch + 1, clock, bar)
                stop = self.signals.exit_code(runtime, state.step)
                if place + 1 == per_epoch or state.step == state.steps:
                    self._end_epoch(output, epoch + 1, place + 1, clock)
                elif stop or (config.save_every_steps and state.step % config.save_every_steps == 0):
                    self._save(["last"], unless_bad=not stop)
                if state.step % READ_EVERY == 0 and config.on_collapse == "stop":
                    self._stop_if_collapsed()
                if stop and state.step < state.steps:
                    raise Stopped(
                        f"stopped after step {state.step} of {state.steps} and saved; go on with the same command and "
                        "--resume auto",
                        stop,
                    )

    def _stop_if_collapsed(self) -> None:
        """Save and end the run while the alarm rings."""
        since = self.runtime.from_main(self.monitor.alarm.since)
        if since:
            self._save(["last"])
            signs = " and ".join(f"{name} is too low since step {step}" for name, step in since.items())
            raise BadInput(f"collapse: {signs}; stopped after step {self.state.step} and saved. To mend it: {ADVICE}")

    def _batches_before(self, step: int) -> int:
        """Return how many batches a process takes before a step, counted from 0; an epoch's last step takes those left."""
        epoch, place = divmod(step, _steps_per_epoch(self.config, len(self.loader)))
        return epoch * len(self.loader) + place * self.config.accumulate

    def _log(self, output: BYOLOutput, norm: Tensor, epoch: int, clock: _Clock, bar: Any) -> None:
        """Log the step; here the host waits for the device."""
        self.bad_steps.read()
        loss = float(self.runtime.total(output.loss)) / self.runtime.world_size
        if self.tracker is None:
            return
        step, model = self.state.step, self.state.model
        lr, momentum = float(self.state.lrs[step - 1]), float(self.state.momenta[step - 1])
        measures, alarms = self.monitor.read(step, output.features)
        figures = {"loss": loss} | measures | {"lr": lr, "momentum": momentum}
        figures |= {"target_distance": float(target_distance(model)), "collapse": int(bool(self.monitor.alarm.since))}
        figures |= {"bad_steps": self.bad_steps.total, "epoch": epoch} | device_figures(self.runtime.device)
        self.tracker.log(step, figures)
        for line in alarms:
            bar.write(f"warning: step {step}: {line}", file=sys.stderr)
        wait = clock.figures()["data_wait_percent"]
        bar.set_postfix(
            epoch=epoch, loss=f"{loss:.3f}", lr=f"{lr:.1e}", momentum=f"{momentum:.4f}", data_wait=f"{wait:.0f}%", refresh=False
        )

    def _end_epoch(self, output: BYOLOutput, epoch: int, steps: int, clock: _Clock) -> None:
        """Log the epoch of so many steps and save its checkpoints."""
        self.bad_steps.read()
        loss, good = (self.runtime.total(self.state.sums) / self.runtime.world_size).tolist()
        if 2 * good < steps:
            raise BadInput(
                f"the gradients of {steps - round(good)} of the {steps} steps of epoch {epoch} were not finite; lower --lr, or "
                f"use --precision fp32 (their tiles: {self.bad_steps.path})"
            )
        speeds = self.runtime.gather(clock.figures())
        clock.restart()
        self.state.sums.zero_()
        names = []
        if self.tracker is not None:
            measures, rang = self.monitor.end_epoch(output.features)
            self.metrics = {
                "loss": loss / good,
                **measures,
                "collapsed": rang,
                "lr": float(self.state.lrs[self.state.step - 1]),
                "momentum": float(self.state.momenta[self.state.step - 1]),
                "pairs_per_second": sum(speed["pairs_per_second"] for speed in speeds),
                "data_wait_percent": max(speed["data_wait_percent"] for speed in speeds),
                **({"mfu_percent": sum(s["mfu_percent"] for s in speeds) / len(speeds)} if "mfu_percent" in speeds[0] else {}),
                "bad_steps": self.bad_steps.total,
                "epoch": epoch,
            }
            if self.probe is not None and (epoch % self.config.probe_every == 0 or self.state.step == self.state.steps):
                self._probe()
            ranks = {"rank": dict(enumerate(speeds))} if len(speeds) > 1 else {}
            self.tracker.log(self.state.step, {"epoch_mean": self.metrics | ranks})
            if is_better(self.metrics, self.best):
                self.best = self.metrics
                names.append("best")
            whole = steps == _steps_per_epoch(self.config, len(self.loader))  # --max-steps may end within an epoch
            if whole and epoch % self.config.save_every == 0:
                names.append(f"epoch_{epoch:03d}")
            if self.state.step == self.state.steps:
                names.append("final")
        # A resumed run takes the last one's epoch for done: so it comes after all others of that epoch.
        self._save([*names, "last"])

    def _probe(self) -> None:
        """Probe the backbone as it is; the figures go into the epoch's."""
        aucs = self.probe(self.state.model.backbone)
        self.tracker.log(self.state.step, {"probe": aucs})
        self.metrics["probe"] = aucs["linear"]["mean"]

    def _save(self, names: Sequence[str], unless_bad: bool = False) -> None:
        """Write the checkpoint under each of the names; the processes leave together."""
        self.bad_steps.read()
        if unless_bad and self.bad_steps.ongoing:
            return  # the one before it may be of better weights
        mine = {
            "loader": self.loader.state_dict(),
            "random": random_state(self.runtime.device),
            "sums": self.state.sums.tolist(),
        }
        processes = self.runtime.gather(mine)
        if self.runtime.is_main:
            state, config = self.state, self.config
            checkpoint = {
                "kind": "byol",
                "arch": config.arch,
                "model_state_dict": state.model.state_dict(),
                "optimizer_state_dict": state.optimizer.state_dict(),
                "config": asdict(config),
                "views": views_to_dict(_chosen_views(config, self.shards.preprocessing)),
                "epoch": state.step // _steps_per_epoch(config, len(self.loader)),
                "step": state.step,
                "metrics": self.metrics,
                "preprocessing": self.shards.preprocessing | {"mean": MEAN, "std": STD},
                "resume": {
                    "scaler": state.scaler.state_dict(),
                    "best": self.best,
                    "bad_steps": self.bad_steps.state_dict(),
                    "monitor": self.monitor.state_dict(),
                    "processes": processes,
                },
            }
            first, *others = (self.output_dir / CHECKPOINT_NAME.format(name) for name in names)
            save_checkpoint(first, checkpoint)
            for path in others:
                second_name(first, path)
        self.runtime.wait()

    def restore(self, path: Path) -> None:
        """Put the run back where a checkpoint left it."""
        checkpoint = load_to_resume(path, "byol")
        saved, state, runtime = checkpoint["resume"], self.state, self.runtime
        check_same_options(path, checkpoint["config"], self.config, _FREE)
        if checkpoint["preprocessing"]["shard_config_hash"] != self.shards.preprocessing["shard_config_hash"]:
            raise BadInput(f"checkpoint {path} was trained on other --shards than {self.shards.directory}; resume with them")
        if len(saved["processes"]) != runtime.world_size:
            raise BadInput(f"checkpoint {path} was trained by {len(saved['processes'])} processes; resume with as many")
        state.model.load_state_dict(checkpoint["model_state_dict"])
        state.optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
        if saved["scaler"]:  # empty where the first half needed no scaler
            state.scaler.load_state_dict(saved["scaler"])
        state.step = checkpoint["step"]
        self.metrics, self.best = checkpoint["metrics"], saved["best"]
        self.bad_steps.load_state_dict(saved["bad_steps"])
        self.monitor.load_state_dict(saved["monitor"])
        mine = saved["processes"][runtime.rank]
        state.sums.copy_(torch.tensor(mine["sums"], dtype=torch.float64))
        self.loader.load_state_dict(mine["loader"])
        set_random_state(mine["random"], runtime.device)


def is_better(metrics: Mapping[str, Any], best: Mapping[str, Any] | None) -> bool:
    """Return whether an epoch is better than the best one before it.

    By the online probe (``probe``, higher is better) where it ran; an epoch without it is never better than one with it.
    Elsewhere by the lowest loss, but not of an epoch that set off the collapse alarm (``collapsed``): a collapsed network has
    the lowest loss of all.
    """

    def merit(figures: Mapping[str, Any]) -> tuple[bool, float]:
        probe = figures.get("probe")
        return probe is not None, -figures["loss"] if probe is None else probe

    if metrics.get("collapsed"):
        return False
    return best is None or merit(metrics) > merit(best)


class _Clock:
    """Speed and waiting since the epoch began, or since this process took it up."""

    def __init__(self, loader: PretrainLoader, device: torch.device, flops: int | None) -> None:
        self._loader, self._device, self._flops = loader, device, flops
        self.restart()

    def restart(self) -> None:
        """Count from now on."""
        self.pairs = 0
        self._started, self._waited = time.perf_counter(), self._loader.wait_seconds

    def figures(self) -> dict[str, float]:
        """Return this process's pairs a second, its wait for data and its MFU in percent, the latter where a peak is known."""
        elapsed = max(time.perf_counter() - self._started, 1e-9)
        waited = self._loader.wait_seconds - self._waited
        figures = {"pairs_per_second": self.pairs / elapsed, "data_wait_percent": 100 * waited / elapsed}
        if self._flops is not None:
            figures["mfu_percent"] = 100 * mfu(figures["pairs_per_second"], self._flops, self._device)
        return figures


def _endlessly(loader: PretrainLoader) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    while True:
        yield from loader


def _views(batches: Iterator[tuple[Tensor, Tensor, Tensor]], count: int, numbers: list[Tensor]) -> Iterator[Views]:
    """Yield the views of the next batches and note the numbers of their tiles."""
    for view1, view2, tiles in itertools.islice(batches, count):
        numbers.append(tiles)
        yield view1, view2


def _steps_per_epoch(config: PretrainConfig, batches: int) -> int:
    return math.ceil(batches / config.accumulate)


def _chosen_views(config: PretrainConfig, preprocessing: Mapping[str, Any]) -> tuple[View, View]:
    if config.views is not None:
        return views_from_yaml(Path(config.views))
    spacing = preprocessing["pixel_spacing_mm"] or max(preprocessing["native_spacing_mm"] or [0])
    view_size = config.view_size or preprocessing["tile_size"]
    return recipe_views(config.recipe, spacing * preprocessing["tile_size"] / view_size or None)


def _loader(shards: ShardSet, config: PretrainConfig, runtime: Runtime) -> PretrainLoader:
    tiles = shards.tiles("train")["tile"].to_numpy()
    limited = None
    if config.limit_tiles is not None and config.limit_tiles < len(tiles):
        limited = np.sort(np.random.default_rng(config.seed).permutation(tiles)[: config.limit_tiles])
    return PretrainLoader(
        shards.shards("train"),
        batch_size=config.batch_size,
        views=_chosen_views(config, shards.preprocessing),
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


def _pair_flops(shards: ShardSet, config: PretrainConfig, runtime: Runtime) -> int | None:
    """Return the arithmetic of a pair of views, or None where no peak is known to hold it against."""
    if peak_flops(runtime.device) is None:
        return None
    with torch.device("meta"):
        model = MammogramBYOL(build_backbone(config.arch), hidden_dim=config.hidden_dim, proj_dim=config.proj_dim)
    return flops_per_pair(model, config.view_size or shards.preprocessing["tile_size"])


def _monitor(shards: ShardSet, config: PretrainConfig, state: TrainingState) -> Monitor:
    tiles = shards.tiles("train").sort_values("tile")
    warmup = int(state.lrs.argmax())
    return Monitor(collapse_alarm(config.proj_dim, warmup), tiles["tile"].to_numpy(), tiles["breast_ratio"].to_numpy())


def _online_probe(shards: ShardSet, config: PretrainConfig, runtime: Runtime) -> OnlineProbe | None:
    if config.probe_csv is None:
        return None
    from mammostream.train.probe.probing import (  # scikit-learn is a quarter of all that would be imported
        OnlineProbe,
        read_probe_set,
    )

    probe_set = read_probe_set(Path(config.probe_csv), config.probe_class_names, shards, config.probe_tiles)
    return OnlineProbe(probe_set, runtime, config)


def _draw_some_views(shards: ShardSet, config: PretrainConfig, runtime: Runtime, path: Path) -> None:
    """Draw a few tiles and their two views, from loaders of their own: the training's loader starts untouched."""
    few = replace(config, batch_size=min(config.batch_size, VIEWS_SHOWN), view_size=None)
    view1, view2, numbers = next(iter(_loader(shards, few, replace(runtime, rank=0, world_size=1))))
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


def _initial_state(config: PretrainConfig, runtime: Runtime, batches_per_epoch: int) -> TrainingState:
    optimisation = resolve_optimisation(config, config.batch_size * config.accumulate * runtime.world_size)
    compiling = resolve_compile(config, runtime)
    if not config.deterministic:
        search_convolutions(runtime.device)
    backbone = build_backbone(config.arch, config.weights)
    model = MammogramBYOL(backbone, hidden_dim=config.hidden_dim, proj_dim=config.proj_dim, concat_views=config.concat_views)
    model.classification_head.requires_grad_(False)  # the loss does not reach it
    if config.sync_bn == "on" or (config.sync_bn == "auto" and runtime.world_size > 1):
        model = synchronise_batch_norms(model, runtime.device)
    model = model.to(runtime.device, memory_format=torch.channels_last)
    if config.gradient_checkpointing:
        checkpoint_activations(model.backbone, compiled=compiling != "off")
    per_epoch = _steps_per_epoch(config, batches_per_epoch)
    steps = min(config.epochs * per_epoch, config.max_steps or math.inf)
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
