"""Watching a pre-training without labels: what tells learning from collapse, and an alarm for the latter.

BYOL's loss falls when the network collapses, that is when it gives every tile the same answer. So other things are watched:
the spread of the projections, the number of directions they use, and whether a tile's two views find each other.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mammostream.models.byol import BYOLOutput, MammogramBYOL

ADVICE = (
    "lower --lr, raise --momentum towards 0.996 or the --batch-size, and look at views.png: views that differ too much, or too "
    "little, teach nothing; the best checkpoint is of an epoch before it"
)
READ_EVERY = 10
"""Steps between two readings: reading waits for the device."""
WINDOW = 5
"""Readings over whose median the alarm judges: single batches are noisy."""


def z_std(projections: Tensor) -> Tensor:
    """Return the mean over dimensions of the standard deviation of l2-normalised rows (Chen and He 2021, SimSiam).

    Near 0 says that the rows have collapsed to one point, which the loss does not show; healthy rows, spread over
    the sphere, have about ``1 / sqrt(d)``. A scalar float32 tensor on the same device: reading it is the caller's
    choice, since that waits for the GPU.

    Parameters
    ----------
    projections
        (N, d), N of at least 2.
    """
    return F.normalize(projections.float(), dim=1).std(0, correction=0).mean()


def effective_rank(features: Tensor) -> Tensor:
    """Return the effective rank: the exponential of the entropy of the singular values (Roy and Vetterli 2007).

    About how many directions the rows use: 1 when all are multiples of one vector, at most min(N, d). Computed as RankMe does
    (Garrido et al. 2023, arXiv:2210.02885). NaN where a feature is not finite, so that watching a diverged run does not end
    it. A scalar float32 tensor; computing it waits for the GPU.

    Parameters
    ----------
    features
        (N, d); N well above d for an estimate that the number of rows does not limit.
    """
    features = features.float()
    if not features.isfinite().all():
        return features.new_tensor(float("nan"))
    epsilon = 1e-7  # the paper's
    singular = torch.linalg.svdvals(features)
    p = singular / (singular.sum() + epsilon) + epsilon
    return torch.exp(-(p * p.log()).sum())


def retrieval_accuracy(one: Tensor, other: Tensor) -> Tensor:
    """Return the share of rows of `one` whose nearest row of `other`, by cosine, is the row of the same number.

    Chance is 1 / N, also where all rows are equal. A scalar float32 tensor on the same device.

    Parameters
    ----------
    one, other
        (N, d) projections of the two views; row i of both shows the same tile.
    """
    similarity = F.normalize(one.float(), dim=1) @ F.normalize(other.float(), dim=1).T
    return (similarity.argmax(1) == torch.arange(len(one), device=one.device)).float().mean()


@torch.no_grad()
def target_distance(model: MammogramBYOL) -> Tensor:
    """Return how far the target's parameters are from the online network's, as a share of the latter's length.

    A scalar tensor on the device. The nearer the momentum is to 1, the further the target lags behind; at 0 it is a copy.
    """
    target: list[Tensor] = [*model.backbone_momentum.parameters(), *model.projection_head_momentum.parameters()]
    online: list[Tensor] = [*model.backbone.parameters(), *model.projection_head.parameters()]
    apart = torch.stack(torch._foreach_norm(list(torch._foreach_sub(target, online)))).norm()
    return apart / torch.stack(torch._foreach_norm(online)).norm()


def device_figures(device: torch.device) -> dict[str, float]:
    """Return the GPU's peak memory so far in GiB and its utilisation in percent, where there is one that tells."""
    if device.type != "cuda":
        return {}
    figures = {"gpu_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30}
    with contextlib.suppress(Exception):  # NVML or its Python package is missing, or a container may not ask
        figures["gpu_utilisation_percent"] = float(torch.cuda.utilization(device))
    return figures


@dataclass(frozen=True)
class Sign:
    """One measure by which collapse shows."""

    measure: str
    limit: float
    """Values below it are a sign of collapse."""
    healthy: str
    meaning: str


class CollapseAlarm:
    """Rings while the median of a measure over the last :data:`WINDOW` readings is below its limit.

    Parameters
    ----------
    signs
        What to watch.
    first_step
        Readings of earlier steps do not count: while the learning rate rises, the measures swing.
    """

    def __init__(self, signs: Sequence[Sign], first_step: int = 0) -> None:
        self._signs = signs
        self._first_step = first_step
        self._readings: dict[str, list[tuple[int, float]]] = {sign.measure: [] for sign in signs}
        self.since: dict[str, int] = {}
        """Measure -> the first step of those below the limit, while it rings."""

    def feed(self, step: int, values: Mapping[str, float]) -> list[str]:
        """Take in a reading and return a line for each measure that has begun to ring."""
        lines = []
        for sign in self._signs:
            value = values.get(sign.measure, math.nan)
            if step <= self._first_step or not math.isfinite(value):
                continue
            readings = [*self._readings[sign.measure], (step, value)][-WINDOW:]
            self._readings[sign.measure] = readings
            middle = median(v for _, v in readings)
            if len(readings) < WINDOW or middle >= sign.limit:
                self.since.pop(sign.measure, None)
            elif sign.measure not in self.since:
                self.since[sign.measure] = next(s for s, v in readings if v < sign.limit)
                lines.append(
                    f"collapse: {sign.measure} is {middle:.4g} (median of the last {WINDOW * READ_EVERY} steps, below "
                    f"{sign.limit:.4g} since step {self.since[sign.measure]}); healthy is {sign.healthy}: {sign.meaning}"
                )
        return lines

    def state_dict(self) -> dict[str, Any]:
        """Return the readings in the window and what rings, as plain types."""
        readings = {name: [list(reading) for reading in readings] for name, readings in self._readings.items()}
        return {"readings": readings, "since": dict(self.since)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self._readings |= {name: [tuple(reading) for reading in readings] for name, readings in state["readings"].items()}
        self.since = dict(state["since"])


def collapse_alarm(dimension: int, first_step: int) -> CollapseAlarm:
    """Return the alarm of a pre-training whose projections have so many dimensions, and whose warm-up ends after a step.

    Two signs. ``z_std`` below half of ``1 / sqrt(d)``: the length of the mean of unit vectors is about
    ``sqrt(1 - d z_std ** 2)``, so that two tiles' projections then have a cosine above 3/4 on average. An effective rank of
    the features below 2: they all but lie on one line. On real films (benchmarks/pretrain_films.py) runs that learn stay
    well above both, and runs made to collapse fall below.
    """
    spread = dimension**-0.5
    return CollapseAlarm(
        [
            Sign("z_std", spread / 2, f"about {spread:.4g} (1 / sqrt({dimension}))", "all tiles look alike to the network"),
            Sign("effective_rank", 2.0, "well above 2", "the features of all tiles lie on one line"),
        ],
        first_step,
    )


class Monitor:
    """Gathers the measures of each step on the device and reads them when asked: no step waits for the device.

    Parameters
    ----------
    alarm
        What judges the readings.
    tiles, breast_ratios
        (N,) tile numbers, ascending, and the share of each that is breast.
    """

    _MEASURES = ("grad_norm", "z_std", "view_retrieval")

    def __init__(self, alarm: CollapseAlarm, tiles: np.ndarray, breast_ratios: np.ndarray) -> None:
        self.alarm = alarm
        self._tiles, self._ratios = tiles, breast_ratios
        self._on_device: list[Tensor] = []  # (measures,) a step, not read yet
        self._ratios_seen: list[float] = []  # the same steps'
        self._steps: list[dict[str, float]] = []  # read, not reported yet
        self._epoch: dict[str, list[float]] = {}  # measure -> sum and count over the epoch
        self._rang = False  # in this epoch

    def record(self, output: BYOLOutput, norm: Tensor, numbers: Tensor) -> None:
        """Take in a step's output, its gradient norm, and the tile numbers (N,) on the CPU; waits for nothing."""
        one, other = output.projections, output.projections2
        values = (norm, z_std(one), retrieval_accuracy(one, other))
        self._on_device.append(torch.stack([value.detach().float() for value in values]))
        self._ratios_seen.append(float(self._ratios[np.searchsorted(self._tiles, numbers.numpy())].mean()))

    def read(self, step: int, features: Tensor) -> tuple[dict[str, float], list[str]]:
        """Return the means since the last reading, with the effective rank of `features` (N, D), and the alarm's new lines.

        This is the one wait for the device in :data:`READ_EVERY` steps.
        """
        self._drain()
        means = {name: _mean([s[name] for s in self._steps]) for name in (self._steps[0] if self._steps else ())}
        means["effective_rank"] = float(effective_rank(features))
        self._steps = []
        lines = self.alarm.feed(step, means)
        self._rang |= bool(self.alarm.since)
        return means, lines

    def end_epoch(self, features: Tensor) -> tuple[dict[str, float], bool]:
        """Return the means over the epoch, the effective rank of `features`, and whether the alarm rang in the epoch.

        The next epoch starts again.
        """
        self._drain()
        means = {name: total / count for name, (total, count) in self._epoch.items()}
        means["effective_rank"] = float(effective_rank(features))
        rang, self._epoch, self._rang = self._rang, {}, bool(self.alarm.since)
        return means, rang

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to report the same, as plain types; waits for the device."""
        self._drain()
        steps = [dict(step) for step in self._steps]
        epoch = {name: list(sums) for name, sums in self._epoch.items()}
        return {"alarm": self.alarm.state_dict(), "steps": steps, "epoch": epoch, "rang": self._rang}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.alarm.load_state_dict(state["alarm"])
        self._on_device, self._ratios_seen = [], []
        self._steps = [dict(step) for step in state["steps"]]
        self._epoch = {name: list(sums) for name, sums in state["epoch"].items()}
        self._rang = state["rang"]

    def _drain(self) -> None:
        """Bring what lies on the device to the host, in one transfer."""
        if not self._on_device:
            return
        for values, ratio in zip(torch.stack(self._on_device).tolist(), self._ratios_seen, strict=True):
            step = dict(zip(self._MEASURES, values, strict=True)) | {"breast_ratio": ratio}
            self._steps.append(step)
            for name, value in step.items():
                if math.isfinite(value):  # a step that was skipped has no say
                    total, count = self._epoch.get(name, (0.0, 0))
                    self._epoch[name] = [total + value, count + 1]
        self._on_device, self._ratios_seen = [], []


def _mean(values: Sequence[float]) -> float:
    """Return the mean of the finite values, NaN without any."""
    finite = [value for value in values if math.isfinite(value)]
    return fmean(finite) if finite else math.nan
