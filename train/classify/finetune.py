"""Multi-label fine-tuning of a pre-trained backbone on labelled tiles: the loop over epochs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mammostream.common.errors import BadInput, Stopped
from mammostream.common.files import write_json
from mammostream.common.progress import progress
from mammostream.models.checkpoints import entries_of, load_checkpoint
from mammostream.train.classify.config import FinetuneConfig
from mammostream.train.classify.run import CHECKPOINT_NAME, LabelledData, Run
from mammostream.train.classify.sampling import describe_sampling
from mammostream.train.classify.step import train_step
from mammostream.train.classify.validation import Validation, validate, with_intervals
from mammostream.train.run.charts import draw_curves
from mammostream.train.run.runtime import TRAINING_LOCK, Runtime, only_run, resolve_runtime
from mammostream.train.run.stages import STAGE_COUNT, train_top_stages
from mammostream.train.run.stopping import StopSignals
from mammostream.train.run.tracking import Tracker

SAVE_EVERY = 10
EPOCH_NAME = "classification_epoch_{}.pth"


def finetune(
    checkpoint_path: Path,
    data: LabelledData,
    output_dir: Path,
    config: FinetuneConfig,
    command: Mapping[str, Any] | None = None,
    *,
    resume: Path | None = None,
    runtime: Runtime | None = None,
) -> dict[str, Any]:
    """Fine-tune, and write checkpoints, ``metrics.jsonl``, ``metrics.json`` and curves.

    Parameters
    ----------
    checkpoint_path
        A BYOL checkpoint.
    data
        Tiles and labels to train on and to validate with.
    output_dir
        The run's directory.
    config
        The options.
    command
        The command's own options, recorded next to `config` in ``config.yaml``.
    resume
        A checkpoint of this run to resume from, or None. It may have been saved after any step: the rest of the run is what it
        would have been, on a CPU in fp32 bit for bit.
    runtime
        Device, precision and processes; None resolves them from `config` for one process.

    Returns
    -------
    dict
        The **last** epoch's validation metrics, with 95 % intervals over patients; over films where there are fewer than two
        patients, or not all are known (``intervals_over`` says which). Probabilities are those that inference gives, and
        thresholds those of the checkpoint. Both were fitted on this same validation set: this biases the figures that depend
        on them (balanced accuracy, accuracy, exact match, Brier score, ECE), and no others.

    Raises
    ------
    BadInput
        The checkpoint cannot be used, has another architecture, or was made for tiles of another scale or mapping; the one
        to resume from has other options, labels or tiles; the training diverged.
    Stopped
        SIGTERM, SIGUSR1 or Ctrl-C arrived; the last checkpoint is saved.
    """
    runtime = runtime or resolve_runtime(config)
    torch.manual_seed(config.seed)
    byol = load_checkpoint(checkpoint_path, "byol")
    with entries_of(checkpoint_path, "byol"):
        run = Run.start(byol, checkpoint_path, data, output_dir, config, runtime)
    if runtime.rank:  # the same weights, but different random draws
        torch.manual_seed(int(np.random.SeedSequence([config.seed, runtime.rank]).generate_state(1)[0]))
    if resume is not None:
        with entries_of(resume, "classifier"):
            run.restore(resume)
    found = None
    with (
        only_run(output_dir / TRAINING_LOCK, runtime),
        StopSignals(runtime.is_main) as run.signals,
        _tracker(run, command, resumed=resume is not None) or nullcontext() as tracker,
        _progress(run) as bar,
    ):
        if (report := byol.get("load_report")) and runtime.is_main:
            bar.write("\n".join(report.lines()))
        if config.sampling == "balanced" and runtime.is_main:
            bar.write(describe_sampling(data.train.labels, data.class_names))
        while not run.finished:
            found = _run_epoch(run, tracker, bar)
    if found is None:  # a finished run, resumed
        found = validate(run.state, run.val_loader, data.val, data.class_names, runtime)
    if runtime.is_main:
        run.metrics |= with_intervals(found, data.val, data.class_names)
        write_json(output_dir / "metrics.json", run.metrics)
        names = ["train_loss", "val_loss", "mean_auc", "mean_ap"]
        draw_curves(output_dir / "metrics.jsonl", names, output_dir / "curves.png", "Fine-tuning, validation")
    return runtime.from_main(run.metrics)


def _tracker(run: Run, command: Mapping[str, Any] | None, resumed: bool) -> Tracker | None:
    """Return the run's logger in the main process, else None."""
    if not run.runtime.is_main:
        return None
    config = run.config
    options = dict(command or {}) | asdict(config)
    step = run.state.step if resumed else None
    return Tracker(run.output_dir, config.wandb_project, config.wandb_mode, options, resume_step=step)


def _progress(run: Run) -> Any:
    """Return a progress bar over the tiles of all epochs, which starts at the run's position."""
    tiles = run.train_loader.tiles
    started = len(run.losses) * run.config.batch_size * run.runtime.world_size
    done, total = run.epoch * tiles + min(started, tiles), run.config.epochs * tiles
    return progress(None, f"fine-tuning ({run.runtime})", "tile", total, done, not run.runtime.is_main)


def _run_epoch(run: Run, tracker: Tracker | None, bar: Any) -> Validation:
    """Train for an epoch, validate, log and save."""
    state, data = run.state, run.data
    epoch = run.epoch + 1
    stages = run.stages(epoch)
    train_loss = _train_epoch(run, stages, bar)
    found = validate(state, run.val_loader, data.val, data.class_names, run.runtime)
    _require_finite(train_loss + found.metrics["val_loss"], epoch)
    run.metrics = found.metrics | {"train_loss": train_loss, "epoch": epoch}
    is_best = found.score > state.best
    state.best = max(found.score, state.best)
    all_unfrozen = stages == run.stages(run.config.epochs)
    state.stale = 0 if is_best or not all_unfrozen else state.stale + 1
    if tracker is not None:
        rates = {name: group["lr"] for name, group in zip(("backbone", "head"), state.optimizer.param_groups, strict=True)}
        rates = {"lr_backbone": rates["backbone"] if stages else 0.0, "lr_head": rates["head"]}
        tracker.log(state.step, run.metrics | rates)
    run.save(_names_after_epoch(run, is_best), found)
    if tracker is not None:
        bar.write(_epoch_lines(epoch, run.config.epochs, run.metrics, stages, is_best))
        if run.stopped_early:
            bar.write(f"⏹️ Early stopping: no better validation for {state.stale} epochs")
    stop = run.signals.exit_code(run.runtime, state.step)
    if stop and not run.finished:
        raise _stopped(run, stop)
    return found


def _names_after_epoch(run: Run, is_best: bool) -> list[str]:
    """Return the names of the checkpoints to write after an epoch."""
    names = [CHECKPOINT_NAME.format("best")] if is_best else []
    if run.epoch % SAVE_EVERY == 0:
        names.append(EPOCH_NAME.format(run.epoch))
    if run.finished:
        names.append(CHECKPOINT_NAME.format("final"))
    # A resumed run treats the epoch of the last checkpoint as finished, so that file is written after the epoch's others.
    return [*names, CHECKPOINT_NAME.format("last")]


def _train_epoch(run: Run, stages: int, bar: Any) -> float:
    """Train for an epoch, or for what is left of it, and return its mean loss over steps and processes."""
    state, runtime = run.state, run.runtime
    state.model.train()
    train_top_stages(state.model.backbone, stages)
    network = runtime.parallel(state.model)
    for batch, labels in _batches(run):
        if len(batch) == 1:
            # Batch norm needs more than one tile. This is an epoch's last batch, or all batches are single tiles.
            state.model.backbone.eval()
        run.losses.append(train_step(state, network, runtime, run.config, batch, labels))
        bar.update(len(batch) * runtime.world_size)
        _after_step(run)
    losses, run.losses = run.losses, []
    return float(runtime.total(torch.stack(losses).mean())) / runtime.world_size


def _after_step(run: Run) -> None:
    """Save and stop within the epoch where the step just taken is one to do so after."""
    step, every = run.state.step, run.config.save_every_steps
    stop = run.signals.exit_code(run.runtime, step)
    is_due = every and step % every == 0 and len(run.losses) < run.steps  # the end of an epoch is saved anyway
    if (stop or is_due) and run.can_be_saved:
        _require_finite(float(run.runtime.total(torch.stack(run.losses).sum())), run.epoch + 1)
        run.save([CHECKPOINT_NAME.format("last")], None)
        if stop:
            raise _stopped(run, stop)


def _stopped(run: Run, code: int) -> Stopped:
    steps = run.steps * run.config.epochs
    return Stopped(
        f"stopped after step {run.state.step} of {steps} and saved; resume with the same command and --resume auto", code
    )


def _require_finite(loss: float, epoch: int) -> None:
    if not math.isfinite(loss):
        raise BadInput(f"the loss of epoch {epoch} is not finite; lower --lr-head and --lr-backbone, or use --precision fp32")


def _batches(run: Run) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield an epoch's tiles and labels, the same number of batches in each process."""
    tiles = run.data.train
    all_labels = torch.from_numpy(tiles.labels)
    for batch, numbers in run.train_loader:
        labels = all_labels[tiles.rows(numbers)].to(run.runtime.device, non_blocking=True)
        yield batch, labels
    for _ in range(run.steps - len(run.train_loader)):
        # This process has no more tiles, but the others wait for it: repeat its last ones, with labels that do not count.
        yield batch, torch.full_like(labels, torch.nan)


def _epoch_lines(epoch: int, epochs: int, metrics: dict[str, Any], stages: int, is_best: bool) -> str:
    def figure(name: str) -> str:
        return "undefined" if metrics[name] is None else f"{metrics[name]:.4f}"

    lines = []
    if stages == 0:
        lines.append(f"🧊 Epoch {epoch}: Backbone frozen (training only classification head)")
    elif stages < STAGE_COUNT:
        lines.append(f"🔓 Epoch {epoch}: Backbone partly frozen (training its last {stages} of {STAGE_COUNT} stages)")
    lines += [
        f"Epoch {epoch:3d}/{epochs}:",
        f"  Train Loss: {figure('train_loss')}",
        f"  Val Loss:   {figure('val_loss')}",
        f"  Mean AUC:   {figure('mean_auc')}",
        f"  Mean AP:    {figure('mean_ap')}",
        f"  Exact Match: {figure('exact_match')}",
    ]
    if is_best:
        by = f"Val Loss: {figure('val_loss')}" if metrics["mean_auc"] is None else f"AUC: {figure('mean_auc')}"
        lines.append(f"  ✅ New best model saved ({by})")
    return "\n".join(lines)
