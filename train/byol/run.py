"""A pre-training in progress: what its steps, its records and its checkpoints share, and how it is saved and restored."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mammostream.common.errors import BadInput
from mammostream.common.files import second_name
from mammostream.common.normalisation import MEAN, STD
from mammostream.dali_pipelines import PretrainLoader, views_to_dict
from mammostream.models.checkpoints import save_checkpoint
from mammostream.models.tensors import load_state
from mammostream.shards.identity import clean_patients, subject_hashes
from mammostream.shards.reading import ShardSet
from mammostream.train.byol.assembly import chosen_views, steps_per_epoch
from mammostream.train.byol.bad_steps import BadSteps
from mammostream.train.byol.config import PretrainConfig
from mammostream.train.byol.monitoring import Monitor
from mammostream.train.byol.step import TrainingState
from mammostream.train.run.resuming import check_same_options, load_to_resume, random_state, set_random_state
from mammostream.train.run.runtime import Runtime
from mammostream.train.run.stopping import StopSignals
from mammostream.train.run.tracking import Tracker

if TYPE_CHECKING:
    from mammostream.train.probe.compare import OnlineProbe

CHECKPOINT_NAME = "mammogram_byol_{}.pth"
PRINTED = ("loss", "z_std", "pairs_per_second", "data_wait_percent")
"""Of the last epoch's metrics, what the command prints at the end."""
# What may change between the two halves of a run without changing its result, or on purpose. The file of views may move: the
# loader compares its content.
_FREE = {"num_workers", "wandb_project", "wandb_mode", "save_every", "save_every_steps", "device", "precision", "compile"}
_FREE |= {"cuda_graphs", "mmap", "views", "gradient_checkpointing", "deterministic", "max_bad_steps", "on_collapse"}


@dataclass
class Run:
    """What the steps, the records and the checkpoints of a pre-training share."""

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
    origin: tuple[int, int] = (0, 0)  # finished epochs and steps when the run was begun with this number of processes
    subjects: list[str] = field(init=False)  # hashes of the patients that the network sees

    def __post_init__(self) -> None:
        tiles = self.shards.tiles("train")
        self.subjects = np.unique(subject_hashes(clean_patients(tiles["patient_id"]), tiles["image_id"])).tolist()

    @property
    def steps_per_epoch(self) -> int:
        """Steps of a whole epoch."""
        return steps_per_epoch(self.config, len(self.loader))

    def position(self, step: int) -> tuple[int, int]:
        """Return the epoch of a step and its place in it, all counted from 0."""
        epochs, first = self.origin
        since, place = divmod(step - first, self.steps_per_epoch)
        return epochs + since, place

    def batches_before(self, step: int) -> int:
        """Return how many batches a process takes before a step, counted from 0; an epoch's last step takes those left."""
        epoch, place = self.position(step)
        return epoch * len(self.loader) + place * self.config.accumulate

    def save(self, names: Sequence[str], unless_bad: bool = False) -> None:
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
                "views": views_to_dict(chosen_views(config, self.shards.preprocessing)),
                "epoch": self.position(state.step)[0],
                "step": state.step,
                "metrics": self.metrics,
                "preprocessing": self.shards.preprocessing
                | {"mean": MEAN, "std": STD}
                | ({"view_size": config.view_size} if config.view_size else {}),
                "subjects": self.subjects,
                "resume": {
                    "scaler": state.scaler.state_dict(),
                    "best": self.best,
                    "origin": list(self.origin),
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
        """Put the run back where a checkpoint left it.

        With another number of processes the next epoch is dealt out among them; the rest of the schedules is that of a run with
        as many from the start, and the steps are counted on.

        Raises
        ------
        BadInput
            The checkpoint has other options or tiles, or was saved within an epoch by another number of processes.
        """
        checkpoint = load_to_resume(path, "byol")
        saved, state, runtime = checkpoint["resume"], self.state, self.runtime
        before = len(saved["processes"])
        moves = before != runtime.world_size
        # With more processes, or fewer, another --accumulate can keep the effective batch.
        check_same_options(path, checkpoint["config"], self.config, _FREE | ({"accumulate"} if moves else set()))
        if checkpoint["preprocessing"]["shard_config_hash"] != self.shards.preprocessing["shard_config_hash"]:
            raise BadInput(f"checkpoint {path} was trained on other --shards than {self.shards.directory}; resume with them")
        epochs, first = saved.get("origin", (0, 0))  # version 0.1.0 has none
        self.origin = (epochs, first)
        if moves:
            self.origin = (_finished_epochs(path, checkpoint), checkpoint["step"])
            state.chosen["resumed"] = (
                f"epoch {self.origin[0] + 1} is dealt out anew, since {_processes(before)} trained the epochs before and now "
                f"there are {runtime.world_size}: {self.steps_per_epoch} steps an epoch"
            )
        self._continue_schedules()
        load_state(state.model, checkpoint["model_state_dict"], f"checkpoint {path}")
        state.optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
        if saved["scaler"]:  # empty where the first half needed no scaler
            state.scaler.load_state_dict(saved["scaler"])
        state.step = checkpoint["step"]
        self.metrics, self.best = checkpoint["metrics"], saved["best"]
        for name in PRINTED if self.metrics else ():
            float(self.metrics[name])  # at the end of the run it would be too late to notice
        self.bad_steps.load_state_dict(saved["bad_steps"])
        self.monitor.load_state_dict(saved["monitor"])
        mine = saved["processes"][0 if moves else runtime.rank]
        if moves:
            self.loader.load_state_dict(mine["loader"] | {"epoch": self.origin[0], "batch": 0})
            draws = np.random.SeedSequence([self.config.seed, runtime.rank, state.step]).generate_state(1)
            torch.manual_seed(int(draws[0]))
            return
        state.sums.copy_(torch.tensor(mine["sums"], dtype=torch.float64))
        self.loader.load_state_dict(mine["loader"])
        set_random_state(mine["random"], runtime.device)

    def _continue_schedules(self) -> None:
        """Let the schedules' ends follow on the steps that were taken with another number of processes."""
        epochs, steps = self.origin
        if not steps:
            return
        left = (self.config.epochs - epochs) * self.steps_per_epoch
        if self.config.max_steps is not None:
            left = min(left, self.config.max_steps - steps)
        taken = np.full(steps, np.nan)  # nobody asks again
        state = self.state
        state.lrs, state.momenta = (np.append(taken, s[len(s) - max(left, 0) :]) for s in (state.lrs, state.momenta))


def _finished_epochs(path: Path, checkpoint: Mapping[str, Any]) -> int:
    """Return how many epochs a checkpoint's run has finished.

    Raises
    ------
    BadInput
        It was saved within an epoch: that one cannot be dealt out anew without showing some of its tiles twice.
    """
    if not _place(checkpoint):
        return checkpoint["epoch"]
    processes = _processes(len(checkpoint["resume"]["processes"]))
    older = []
    for other in path.parent.glob(CHECKPOINT_NAME.format("*")):
        with suppress(BadInput):
            found = load_to_resume(other, "byol")
            if not _place(found) and found["step"] < checkpoint["step"]:
                older.append((found["step"], str(other)))
    instead = f"; or, from the end of an epoch, with --resume {max(older)[1]}" if older else ""
    raise BadInput(
        f"checkpoint {path} was saved within epoch {checkpoint['epoch'] + 1} by {processes}, among whom the epoch's tiles are "
        f"dealt out; resume with {processes} until the epoch's end{instead}"
    )


def _place(checkpoint: Mapping[str, Any]) -> int:
    """Return how many steps of its current epoch a checkpoint's run had taken."""
    loader, (_, first) = checkpoint["resume"]["processes"][0]["loader"], checkpoint["resume"].get("origin", (0, 0))
    batches = loader["tiles"] // loader["world_size"] // loader["batch_size"]
    return (checkpoint["step"] - first) % math.ceil(batches / checkpoint["config"]["accumulate"])


def _processes(count: int) -> str:
    return f"{count} process" + ("es" if count > 1 else "")
