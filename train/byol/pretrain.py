"""BYOL pre-training on shards: the loop over steps and epochs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mammostream.common.errors import BadInput, Stopped
from mammostream.common.progress import progress
from mammostream.dali_pipelines import PretrainLoader
from mammostream.models.byol import BYOLOutput
from mammostream.models.checkpoints import entries_of
from mammostream.shards.reading import ShardSet
from mammostream.train.byol.assembly import build_monitor, build_probe, build_state, draw_some_views, open_loader, pair_flops
from mammostream.train.byol.bad_steps import BadSteps
from mammostream.train.byol.config import PretrainConfig
from mammostream.train.byol.monitoring import ADVICE, READ_EVERY
from mammostream.train.byol.records import Clock, is_better, log_step, record_epoch
from mammostream.train.byol.run import Run
from mammostream.train.byol.speed import collecting_on_schedule
from mammostream.train.byol.step import Views, train_step
from mammostream.train.run.charts import draw_curves
from mammostream.train.run.memory import memory_explained
from mammostream.train.run.runtime import TRAINING_LOCK, Runtime, make_deterministic, only_run, resolve_runtime
from mammostream.train.run.stopping import StopSignals
from mammostream.train.run.tracking import Tracker, drop_lines


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
        A checkpoint of this run to resume from, or None. It may have been saved after any step: the rest of the run is what
        it would have been, on a CPU in fp32 bit for bit.
    command
        The command's own options, recorded next to `config` in ``config.yaml``.
    runtime
        Device, precision and processes; None resolves them from `config` for one process.

    Returns
    -------
    dict
        The last epoch's metrics.

    Raises
    ------
    BadInput
        Too few tiles for a batch, a checkpoint of another architecture or with other options, too many steps without finite
        gradients, a full disk, or too little memory.
    Stopped
        SIGTERM, SIGUSR1 or Ctrl-C arrived; the last checkpoint is saved.
    """
    runtime = runtime or resolve_runtime(config)
    if config.deterministic:
        make_deterministic()
    with (
        only_run(output_dir / TRAINING_LOCK, runtime),
        memory_explained(runtime.device, config.batch_size, config.accumulate),
        StopSignals(runtime.is_main) as signals,
    ):
        torch.manual_seed(config.seed)
        loader = open_loader(shards, config, runtime)
        state = build_state(config, runtime, len(loader))
        bad_steps = BadSteps(output_dir / "bad_batches.jsonl", config.max_bad_steps, runtime)
        monitor, probe = build_monitor(shards, config, state), build_probe(shards, config, runtime)
        if probe is not None:
            state.chosen["online probe"] = probe.about
        run = Run(shards, output_dir, config, runtime, loader, state, bad_steps, signals, monitor, probe)
        if resume is not None:
            with entries_of(resume, "byol"):
                run.restore(resume)
        with _tracker(run, command, resumed=resume is not None) or nullcontext() as run.tracker:
            _train(run)
    if runtime.is_main:
        names = ["loss", "z_std", "effective_rank", "view_retrieval", "probe", "lr"]
        draw_curves(output_dir / "metrics.jsonl", names, output_dir / "curves.png", "BYOL pre-training")
    return runtime.from_main(run.metrics)


def _tracker(run: Run, command: Mapping[str, Any] | None, resumed: bool) -> Tracker | None:
    """Return what logs the run, in the main process; a new run starts with the picture of its views."""
    if not run.runtime.is_main:
        return None
    drop_lines(run.bad_steps.path, run.state.step)
    options = asdict(run.config) | dict(command or {}) | {"chosen": run.state.chosen}
    step = run.state.step if resumed else None
    tracker = Tracker(run.output_dir, run.config.wandb_project, run.config.wandb_mode, options, resume_step=step)
    if not resumed:
        draw_some_views(run.shards, run.config, run.runtime, run.output_dir / "views.png")
    return tracker


def _train(run: Run) -> None:
    """Take the steps that are left."""
    state, config, runtime = run.state, run.config, run.runtime
    state.model.train()
    clock = Clock(run.loader, runtime.device, pair_flops(run.shards, config, runtime))
    batches = _endlessly(run.loader)
    pairs_per_batch = config.batch_size * runtime.world_size
    total, done = (pairs_per_batch * run.batches_before(step) for step in (state.steps, state.step))
    with (
        progress(None, f"pre-training ({runtime})", "pair", total, done, not runtime.is_main) as bar,
        collecting_on_schedule() as collect,
    ):
        if runtime.is_main:
            bar.write("; ".join(f"{name}: {value}" for name, value in state.chosen.items()))
        while state.step < state.steps:
            count = run.batches_before(state.step + 1) - run.batches_before(state.step)
            numbers: list[Tensor] = []
            output, norm = train_step(state, runtime, config, _views(batches, count, numbers), count)
            run.bad_steps.note(state.step, norm, numbers)
            if runtime.is_main:
                run.monitor.record(output, norm, torch.cat(numbers))
            collect(state.step)
            clock.pairs += count * config.batch_size
            bar.update(count * pairs_per_batch)
            _after_step(run, output, clock, bar)


def _after_step(run: Run, output: BYOLOutput, clock: Clock, bar: Any) -> None:
    """Log, save and stop where the step just taken is one to do so after."""
    state, config = run.state, run.config
    epoch, place = run.position(state.step - 1)
    if state.step % READ_EVERY == 0:
        log_step(run, output, epoch + 1, clock, bar)
    stop = run.signals.exit_code(run.runtime, state.step)
    if place + 1 == run.steps_per_epoch or state.step == state.steps:
        record_epoch(run, epoch + 1, place + 1, clock)
        run.save(_names_after_epoch(run, epoch + 1, place + 1))
    elif stop or (config.save_every_steps and state.step % config.save_every_steps == 0):
        run.save(["last"], unless_bad=not stop)
    if state.step % READ_EVERY == 0 and config.on_collapse == "stop":
        _stop_if_collapsed(run)
    if stop and state.step < state.steps:
        raise Stopped(
            f"stopped after step {state.step} of {state.steps} and saved; resume with the same command and --resume auto", stop
        )


def _names_after_epoch(run: Run, epoch: int, steps: int) -> list[str]:
    """Return the names of the checkpoints to write after an epoch that took this many steps."""
    names = []
    if run.runtime.is_main:
        if is_better(run.metrics, run.best):
            run.best = run.metrics
            names.append("best")
        whole = steps == run.steps_per_epoch  # --max-steps may end within an epoch
        if whole and epoch % run.config.save_every == 0:
            names.append(f"epoch_{epoch:03d}")
        if run.state.step == run.state.steps:
            names.append("final")
    # A resumed run treats the epoch of the last one as finished: so it is written after all others of that epoch.
    return [*names, "last"]


def _stop_if_collapsed(run: Run) -> None:
    """Save and end the run while the collapse alarm is active."""
    since = run.runtime.from_main(run.monitor.alarm.since)
    if since:
        run.save(["last"])
        signs = " and ".join(f"{name} is too low since step {step}" for name, step in since.items())
        raise BadInput(f"collapse: {signs}; stopped after step {run.state.step} and saved. How to fix it: {ADVICE}")


def _endlessly(loader: PretrainLoader) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    while True:
        yield from loader  # type: ignore[misc]  # three tensors


def _views(batches: Iterator[tuple[Tensor, Tensor, Tensor]], count: int, numbers: list[Tensor]) -> Iterator[Views]:
    """Yield the views of the next batches and collect the numbers of their tiles."""
    for view1, view2, tiles in itertools.islice(batches, count):
        numbers.append(tiles)
        yield view1, view2
