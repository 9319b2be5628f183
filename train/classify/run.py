"""A fine-tuning run in progress: its data, loaders and state, and how it is saved and restored."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mammostream.common.errors import BadInput
from mammostream.dali_pipelines import TRAIN_VIEW, LabelledLoader, LoaderConfig
from mammostream.models.checkpoints import restore_byol, save_checkpoint
from mammostream.models.classifier import MammogramClassifier
from mammostream.models.tensors import load_state
from mammostream.shards.reading import check_same_pixels, view_size_of
from mammostream.train.classify.config import FinetuneConfig
from mammostream.train.classify.losses import positive_weights
from mammostream.train.classify.sampling import balanced_numbers, check_strata, expected_draws
from mammostream.train.classify.step import TrainingState, build_state
from mammostream.train.classify.validation import Validation
from mammostream.train.levels.calibration import PROB, TILE, plain
from mammostream.train.run.labels import LabelledTiles
from mammostream.train.run.resuming import check_same_options, load_to_resume, random_state, set_random_state
from mammostream.train.run.runtime import Runtime
from mammostream.train.run.schedules import trainable_stages
from mammostream.train.run.stages import STAGE_COUNT
from mammostream.train.run.stopping import StopSignals

CHECKPOINT_NAME = "{}_classification_model.pth"
# Options that may differ when a run is resumed: they do not change its result, or are changed on purpose.
FREE = {"num_workers", "wandb_project", "wandb_mode", "device", "precision", "gradient_checkpointing", "save_every_steps"}
_DEFAULTS = {"sampling": "natural"}  # of options that checkpoints of earlier versions do not have


@dataclass(frozen=True)
class LabelledData:
    """The data of a fine-tuning run.

    Attributes
    ----------
    train, val
        Tiles and labels. Validation chooses ``best_classification_model.pth``, stops the run early if requested, and
        decides each checkpoint's ``calibration`` and its thresholds; nothing else.
    class_names
        C names, in the order of the labels' columns.
    preprocessing
        How the tiles were made (from their shards), or None for a folder of tiles: then the pre-training's record applies.
    leakage
        What :func:`mammostream.train.run.labels.find_leakage` found and the user allowed; written into the checkpoints.
    """

    train: LabelledTiles
    val: LabelledTiles
    class_names: Sequence[str]
    preprocessing: dict[str, Any] | None
    leakage: Mapping[str, list[str]] = field(default_factory=dict)

    def fingerprint(self) -> str:
        """Return a hash of the classes, tiles and labels, which decide a run."""
        digest = hashlib.sha256("\0".join(self.class_names).encode())
        for side in (self.train, self.val):
            labelled = ~np.isnan(side.labels).all(1)  # the others do not decide anything that a run continues from
            digest.update("\0".join(side.keys[labelled]).encode())
            digest.update(side.labels[labelled].tobytes())
        return digest.hexdigest()


@dataclass
class Run:
    """What the epochs and the checkpoints of a fine-tuning run share."""

    data: LabelledData
    arch: str
    preprocessing: dict[str, Any]  # how the tiles were made, and the normalisation that the backbone learnt with
    config: FinetuneConfig
    runtime: Runtime
    output_dir: Path
    train_loader: LabelledLoader
    val_loader: LabelledLoader
    steps: int  # per epoch, the same in each process
    state: TrainingState
    pretrained_on: Sequence[str]  # hashes of the patients that the backbone saw without labels
    metrics: dict[str, Any] = field(default_factory=dict)  # of the last epoch
    signals: StopSignals = field(default_factory=StopSignals)
    losses: list[Tensor] = field(default_factory=list)  # of the steps of the current epoch, in this process

    @classmethod
    def start(
        cls, byol: Mapping[str, Any], path: Path, data: LabelledData, output_dir: Path, config: FinetuneConfig, runtime: Runtime
    ) -> Run:
        """Put a new head on a pre-trained backbone and open the tiles.

        Parameters
        ----------
        byol
            The checkpoint that `path` holds.

        Raises
        ------
        BadInput
            The checkpoint has another architecture than `config`, or was made for tiles of another scale or mapping.
        """
        learnt = byol["preprocessing"]
        network = restore_byol(byol, path, config.arch)
        if data.preprocessing is not None:
            # A ResNet averages over its feature map: it accepts tiles of any size, as long as a pixel means the same.
            check_same_pixels(learnt, data.preprocessing, "the labelled tiles' directory", any_tile_size=True)
        record = (data.preprocessing or learnt) | {"mean": learnt["mean"], "std": learnt["std"]}
        if view_size := view_size_of(learnt, record["tile_size"]):
            record["view_size"] = view_size
        reading = loader_config(record, config, runtime)
        train, draw, times = data.train, None, None
        if config.sampling == "balanced":
            check_strata(train.labels, data.class_names)
            draw = partial(balanced_numbers, train.numbers, train.labels, config.seed)
            times = expected_draws(train.labels)
        train_loader = LabelledLoader(train.source, reading, view=TRAIN_VIEW, shuffle=True, tiles=train.numbers, draw=draw)
        val_loader = LabelledLoader(data.val.source, reading, tiles=data.val.numbers)
        # The process with the most tiles decides how many steps all of them take.
        steps = math.ceil(math.ceil(train_loader.tiles / runtime.world_size) / config.batch_size)
        model = MammogramClassifier.from_byol(network, len(data.class_names), config.dropout)
        weights = positive_weights(train.labels, config.pos_weight, data.class_names, times)
        state = build_state(model, config, runtime, steps * config.epochs, weights)
        pretrained_on = byol.get("subjects", ())
        loaders = train_loader, val_loader
        return cls(data, byol["arch"], record, config, runtime, output_dir, *loaders, steps, state, pretrained_on)

    @property
    def epoch(self) -> int:
        """Number of finished epochs."""
        return self.train_loader.epoch

    @property
    def stopped_early(self) -> bool:
        """Whether the validation has not improved for as many epochs as ``--early-stopping`` allows."""
        return 0 < self.config.early_stopping <= self.state.stale

    @property
    def finished(self) -> bool:
        """Whether no epoch is left to train."""
        return self.epoch >= self.config.epochs or self.stopped_early

    @property
    def can_be_saved(self) -> bool:
        """Whether the rest of the epoch can be had from here on, bit for bit.

        At the end of an epoch some of several processes repeat their last tiles, which nobody could read again.
        """
        return len(self.losses) <= self.steps - (2 if self.runtime.world_size > 1 else 0)

    def stages(self, epoch: int) -> int:
        """Return how many stages of the backbone, from the last on, train in an epoch (from 1)."""
        config = self.config
        return trainable_stages(epoch, config.freeze_backbone_epochs, config.unfreeze_every, STAGE_COUNT)

    def save(self, names: Iterable[str], found: Validation | None) -> None:
        """Write the checkpoint under each of the names; the processes leave together.

        Parameters
        ----------
        names
            File names.
        found
            The validation of the epoch just finished; None within an epoch.
        """
        mine = {
            "loader": self.train_loader.state_dict(),
            "random": random_state(self.runtime.device),
            "losses": torch.stack(self.losses).cpu() if self.losses else None,
            # Each process has its own statistics of batch norms, and the main one's are the model's.
            "buffers": dict(self.state.model.named_buffers()) if self.runtime.rank else None,
        }
        processes = self.runtime.gather(mine)
        if self.runtime.is_main:
            checkpoint = self._checkpoint(processes, found)
            for name in names:
                save_checkpoint(self.output_dir / name, checkpoint)
        self.runtime.wait()

    def _checkpoint(self, processes: list[dict[str, Any]], found: Validation | None) -> dict[str, Any]:
        state = self.state
        decisions: dict[str, Any] = {"unvalidated": True}
        if found is not None:
            decisions = {
                "calibration": plain(found.calibrations),
                "thresholds": list(found.calibrations[TILE][PROB].thresholds),
            }
        return {
            "kind": "classifier",
            "arch": self.arch,
            "model_state_dict": state.evaluated.state_dict(),
            "optimizer_state_dict": state.optimizer.state_dict(),
            "config": asdict(self.config),
            "class_names": list(self.data.class_names),
            "epoch": self.epoch,
            "step": state.step,
            "metrics": self.metrics,
            "preprocessing": self.preprocessing,
            **decisions,
            "fitted_on": {
                "trained": self.data.train.subjects,
                "validated": self.data.val.subjects,
                "pre-trained": list(self.pretrained_on),
            },
            "leakage": dict(self.data.leakage),
            "resume": {
                "weights": state.model.state_dict() if state.average else None,  # the weights behind the average
                "scaler": state.scaler.state_dict(),
                "best": state.best,
                "stale": state.stale,
                "data": self.data.fingerprint(),
                "processes": processes,
            },
        }

    def restore(self, path: Path) -> None:
        """Restore the run to the state in a checkpoint.

        Raises
        ------
        BadInput
            The checkpoint has other options, labels or tiles, or another number of processes.
        """
        checkpoint = load_to_resume(path, "classifier")
        saved, state, runtime = checkpoint["resume"], self.state, self.runtime
        check_same_options(path, _DEFAULTS | checkpoint["config"], self.config, FREE)
        if saved["data"] != self.data.fingerprint():
            raise BadInput(f"checkpoint {path} was trained with other classes, labels or tiles; resume with the same CSVs")
        if len(saved["processes"]) != runtime.world_size:
            raise BadInput(f"checkpoint {path} was trained by {len(saved['processes'])} processes; resume with as many")
        what = f"checkpoint {path}"
        load_state(state.model, saved["weights"] or checkpoint["model_state_dict"], what)
        if state.average:
            load_state(state.average.model, checkpoint["model_state_dict"], what)
        state.optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
        if saved["scaler"]:  # empty if the run so far needed no scaler
            state.scaler.load_state_dict(saved["scaler"])
        state.step, state.best, state.stale = checkpoint["step"], saved["best"], saved["stale"]
        mine = saved["processes"][runtime.rank]
        self.train_loader.load_state_dict(mine["loader"])
        if mine.get("losses") is not None:
            self.losses = list(mine["losses"].to(runtime.device))
        if mine.get("buffers") is not None:
            load_state(state.model, state.model.state_dict() | mine["buffers"], what)
        set_random_state(mine["random"], runtime.device)
        self.metrics = checkpoint["metrics"]


def loader_config(record: Mapping[str, Any], config: FinetuneConfig, runtime: Runtime) -> LoaderConfig:
    """Return how this process reads tiles that were made as `record`, a checkpoint's ``preprocessing``, says."""
    return LoaderConfig(
        batch_size=config.batch_size,
        tile_size=record["tile_size"],
        view_size=record.get("view_size"),
        mean=record["mean"],
        std=record["std"],
        seed=config.seed,
        device="gpu" if runtime.device.type == "cuda" else "cpu",
        num_threads=config.num_workers,
        rank=runtime.rank,
        world_size=runtime.world_size,
    )
