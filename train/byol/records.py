"""What a pre-training logs: single steps, whole epochs, its speed; and which epoch is the best."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

import torch

from mammostream.common.errors import BadInput
from mammostream.dali_pipelines import PretrainLoader
from mammostream.models.byol import BYOLOutput
from mammostream.train.byol.flops import mfu
from mammostream.train.byol.measures import device_figures, target_distance
from mammostream.train.byol.run import Run


def log_step(run: Run, output: BYOLOutput, epoch: int, clock: Clock, bar: Any) -> None:
    """Log the step; here the host waits for the device."""
    run.bad_steps.read()
    loss = float(run.runtime.total(output.loss)) / run.runtime.world_size
    if run.tracker is None:
        return
    step, model = run.state.step, run.state.model
    lr, momentum = float(run.state.lrs[step - 1]), float(run.state.momenta[step - 1])
    measures, alarms = run.monitor.read(step)
    figures = {"loss": loss} | measures | {"lr": lr, "momentum": momentum}
    figures |= {"target_distance": float(target_distance(model)), "collapse": int(bool(run.monitor.alarm.since))}
    figures |= {"bad_steps": run.bad_steps.total, "epoch": epoch} | device_figures(run.runtime.device)
    run.tracker.log(step, figures)
    for line in alarms:
        bar.write(f"warning: step {step}: {line}", file=sys.stderr)
    wait = clock.figures()["data_wait_percent"]
    bar.set_postfix(
        epoch=epoch, loss=f"{loss:.3f}", lr=f"{lr:.1e}", momentum=f"{momentum:.4f}", data_wait=f"{wait:.0f}%", refresh=False
    )


def record_epoch(run: Run, epoch: int, steps: int, clock: Clock) -> None:
    """Put together and log the metrics of an epoch, in the main process, and start the next epoch's sums in all of them.

    Parameters
    ----------
    epoch
        Its number, from 1.
    steps
        The steps that it took.
    clock
        What timed it; it is restarted.

    Raises
    ------
    BadInput
        The gradients of more than half of the steps were not finite.
    """
    run.bad_steps.read()
    loss, good = (run.runtime.total(run.state.sums) / run.runtime.world_size).tolist()
    if 2 * good < steps:
        raise BadInput(
            f"the gradients of {steps - round(good)} of the {steps} steps of epoch {epoch} were not finite; lower --lr, or "
            f"use --precision fp32 (their tiles: {run.bad_steps.path})"
        )
    speeds = run.runtime.gather(clock.figures())
    clock.restart()
    run.state.sums.zero_()
    if run.tracker is None:
        return
    measures, collapsed = run.monitor.end_epoch()
    step = run.state.step
    run.metrics = {
        "loss": loss / good,
        **measures,
        "collapsed": collapsed,
        "lr": float(run.state.lrs[step - 1]),
        "momentum": float(run.state.momenta[step - 1]),
        "pairs_per_second": sum(speed["pairs_per_second"] for speed in speeds),
        "data_wait_percent": max(speed["data_wait_percent"] for speed in speeds),
        **({"mfu_percent": sum(s["mfu_percent"] for s in speeds) / len(speeds)} if "mfu_percent" in speeds[0] else {}),
        "bad_steps": run.bad_steps.total,
        "epoch": epoch,
    }
    if run.probe is not None and (epoch % run.config.probe_every == 0 or step == run.state.steps):
        aucs = run.probe(run.state.model.backbone)
        run.tracker.log(step, {"probe": aucs})
        run.metrics["probe"] = aucs["linear"]["mean"]
    ranks = {"rank": dict(enumerate(speeds))} if len(speeds) > 1 else {}
    run.tracker.log(step, {"epoch_mean": run.metrics | ranks})


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


class Clock:
    """Speed and waiting since the epoch began, or since this process took it up."""

    def __init__(self, loader: PretrainLoader, device: torch.device, flops: int | None) -> None:
        self._loader, self._device, self._flops = loader, device, flops
        self.restart()

    def restart(self) -> None:
        """Count from now on."""
        self.pairs = 0
        self._started, self._waited = time.perf_counter(), self._loader.wait_seconds

    def figures(self) -> dict[str, float]:
        """Return this process's pairs per second, its wait for data and, where a peak is known, its MFU, both in percent."""
        elapsed = max(time.perf_counter() - self._started, 1e-9)
        waited = self._loader.wait_seconds - self._waited
        figures = {"pairs_per_second": self.pairs / elapsed, "data_wait_percent": 100 * waited / elapsed}
        if self._flops is not None and (share := mfu(figures["pairs_per_second"], self._flops, self._device)) is not None:
            figures["mfu_percent"] = 100 * share
        return figures
