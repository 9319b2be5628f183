"""Watching a pre-training without labels: what tells learning from collapse, and an alarm for the latter.

BYOL's loss falls when the network collapses, that is when it gives every tile the same answer. So other things are watched:
the spread of the projections and of the features, the number of directions that the features use, and whether a tile's two
views find each other.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
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
"""Readings over whose average the alarm judges: single batches are noisy."""
RETRIEVAL_WINDOW = 20
"""The same for the view retrieval, the noisiest measure: it counts hits among few tiles."""
FIRST_READINGS = 10
"""Readings from the start of the run, those of the warm-up too, that tell the view retrieval's first value."""
POOL_ROWS = 512
"""Features of at most so many tiles, of the last batches, are pooled for a reading."""
NOISE = 1e-4
"""A direction with a smaller share of the features' energy is noise: tiles differ there by less than 1 % of their length."""


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


def energy_shares(batches: Sequence[Tensor]) -> Tensor:
    """Return how the differences between tiles are spread over directions, as shares of the features' energy.

    A direction's share is its squared singular value, of the centred features, divided by the sum of squares of the features as
    they are. So the shares do not depend on the scale; they sum to 0 where all features are equal and to 1 where their mean is
    0. Each batch is centred by itself: the network moves between two batches, and a moving point is not a direction. Batches
    that are not finite are left out. Waits for the device.

    Parameters
    ----------
    batches
        Features (N, D) each.

    Returns
    -------
    Tensor
        float64, ascending, on the device: one share for each row or dimension, whichever are fewer; NaN without a finite batch.
    """
    finite = [batch.double() for batch in batches if batch.isfinite().all()]
    if not finite:
        return torch.full((1,), math.nan)
    energy = torch.cat(finite).square().sum()
    centred = torch.cat([batch - batch.mean(0) for batch in finite])
    # Squared singular values; much cheaper than the singular values, and double precision makes up for squaring.
    gram = centred @ centred.T if len(centred) < centred.shape[1] else centred.T @ centred
    return torch.linalg.eigvalsh(gram).clamp(min=0) / energy.clamp(min=torch.finfo(energy.dtype).tiny)


def effective_rank(shares: Tensor) -> Tensor:
    """Return the effective rank: the exponential of the entropy of the singular values (Roy and Vetterli 2007).

    About how many directions the features use. RankMe (Garrido et al. 2023, arXiv:2210.02885) takes the features as they are.
    Here they are centred, see :func:`energy_shares`, and directions below :data:`NOISE` are left out. Otherwise features that
    are one vector plus noise would have a high rank: each of the hundreds of directions of the noise has a singular value.

    0 where the shares sum to less than :data:`NOISE`, as in a collapse to a point; 1 where the features lie on a line; never
    more than the number of directions above :data:`NOISE`. A scalar tensor, NaN where a share is.

    Parameters
    ----------
    shares
        See :func:`energy_shares`.
    """
    singular = shares.sqrt() * (shares >= NOISE)
    p = singular / singular.sum()
    rank = torch.exp(-torch.special.xlogy(p, p).sum())
    return torch.where((shares < NOISE).all(), torch.zeros_like(rank), rank)


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
    window: int = WINDOW
    """Readings over whose average it is judged."""
    average: str = "median"
    """``median``, or ``mean``, which is less noisy where no reading can be far off."""

    def judge(self, first: Sequence[float]) -> tuple[float, str]:
        """Return the limit and what is healthy, given the run's first :data:`FIRST_READINGS` readings, or those there are."""
        return self.limit, self.healthy


@dataclass(frozen=True)
class FallSign(Sign):
    """A measure between 0 and 1 that counts hits among tiles, and by which collapse shows when it falls.

    Below `limit` it is a sign of collapse in any case.
    """

    tiles: int = 1
    """Tiles in a batch."""

    def judge(self, first: Sequence[float]) -> tuple[float, str]:
        """Return the limit: 3/4 of the first value, or less where so few tiles cannot tell it from noise.

        The first value is the mean of the first readings, of as many as give the highest limit. A reading counts the hits among
        ``tiles * READ_EVERY``, which gives the difference of two means a binomial standard deviation; a fall by less than 4 of
        them may be noise. With large batches a single reading tells what the network could do before it collapsed.
        """
        limit, start = self.limit, math.nan
        for count in range(1, len(first) + 1):
            mean = fmean(first[:count])
            noise = math.sqrt(mean * (1 - mean) / (self.tiles * READ_EVERY) * (1 / count + 1 / self.window))
            if (lower := min(0.75 * mean, mean - 4 * noise)) > limit:
                limit, start = lower, mean
        return limit, self.healthy if math.isnan(start) else f"{self.healthy}, {start:.4g}"


class CollapseAlarm:
    """Rings while the average of a measure over its last readings (:attr:`Sign.window`) is below its limit.

    Parameters
    ----------
    signs
        What to watch.
    first_step
        Readings of earlier steps are not judged: while the learning rate rises, the measures swing.
    """

    def __init__(self, signs: Sequence[Sign], first_step: int = 0) -> None:
        self._signs = signs
        self._first_step = first_step
        self._readings: dict[str, list[tuple[int, float]]] = {sign.measure: [] for sign in signs}
        self._first: dict[str, list[float]] = {sign.measure: [] for sign in signs}  # those of the warm-up, too
        self.since: dict[str, int] = {}
        """Measure -> the first step of those below the limit, while it rings."""

    def feed(self, step: int, values: Mapping[str, float]) -> list[str]:
        """Take in a reading and return a line for each measure that has begun to ring."""
        lines = []
        for sign in self._signs:
            value = values.get(sign.measure, math.nan)
            if not math.isfinite(value):
                continue
            first = self._first[sign.measure]
            if len(first) < FIRST_READINGS:
                first.append(value)
            if step <= self._first_step:
                continue
            readings = [*self._readings[sign.measure], (step, value)][-sign.window :]
            self._readings[sign.measure] = readings
            middle = (fmean if sign.average == "mean" else median)([v for _, v in readings])
            limit, healthy = sign.judge(first)
            steps = sign.window * READ_EVERY
            if len(readings) < sign.window or middle >= limit:
                self.since.pop(sign.measure, None)
            elif sign.measure not in self.since:
                self.since[sign.measure] = next(s for s, v in readings if v < limit)
                lines.append(
                    f"collapse: {sign.measure} is {middle:.4g} ({sign.average} of the last {steps} steps, below {limit:.4g} "
                    f"since step {self.since[sign.measure]}); healthy is {healthy}: {sign.meaning}"
                )
        return lines

    def state_dict(self) -> dict[str, Any]:
        """Return the readings in the window, the first ones and what rings, as plain types."""
        readings = {name: [list(reading) for reading in readings] for name, readings in self._readings.items()}
        first = {name: list(values) for name, values in self._first.items()}
        return {"readings": readings, "first": first, "since": dict(self.since)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; the first readings that an old checkpoint lacks are those that follow."""
        self._readings |= {name: [tuple(reading) for reading in readings] for name, readings in state["readings"].items()}
        self._first |= {name: list(values) for name, values in state.get("first", {}).items()}
        self.since = dict(state["since"])


def collapse_alarm(dimension: int, first_step: int, tiles: int) -> CollapseAlarm:
    """Return the alarm of a pre-training.

    DOC

    Parameters
    ----------
    dimension
        Of the projections.
    first_step
        The end of the warm-up.
    tiles
        In a batch.
    """
    spread = dimension**-0.5
    return CollapseAlarm(
        [
            Sign("z_std", spread / 2, f"about {spread:.4g} (1 / sqrt({dimension}))", "all tiles look alike to the network"),
            Sign("feature_spread", 0.01, "above 0.1", "the features of all tiles are nearly equal"),
            Sign("effective_rank", 1.5, "well above 2", "the features of all tiles lie on one line"),
            FallSign(
                "view_retrieval",
                1.1 / tiles,
                f"well above chance ({1 / tiles:.4g}) and not far below its first value",
                "the two views of a tile find each other less and less",
                RETRIEVAL_WINDOW,
                "mean",
                tiles,
            ),
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
        self._pool: deque[Tensor] = deque()  # features (N, D) of the last batches, on the device
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
        # A copy, since CUDA graphs overwrite their outputs; of no more steps than lie between two readings.
        self._pool.append(output.features[:POOL_ROWS].detach().clone())
        while len(self._pool) > READ_EVERY or (len(self._pool) > 1 and sum(map(len, self._pool)) > POOL_ROWS):
            self._pool.popleft()

    def read(self, step: int) -> tuple[dict[str, float], list[str]]:
        """Return the means since the last reading, with the measures of the pooled features, and the alarm's new lines.

        This is the one wait for the device in :data:`READ_EVERY` steps.
        """
        self._drain()
        means = {name: _mean([s[name] for s in self._steps]) for name in (self._steps[0] if self._steps else ())}
        means |= self._feature_measures()
        self._steps = []
        lines = self.alarm.feed(step, means)
        self._rang |= bool(self.alarm.since)
        return means, lines

    def end_epoch(self) -> tuple[dict[str, float], bool]:
        """Return the means over the epoch, the measures of the pooled features, and whether the alarm rang in the epoch.

        The next epoch starts again.
        """
        self._drain()
        means = {name: total / count for name, (total, count) in self._epoch.items()}
        means |= self._feature_measures()
        rang, self._epoch, self._rang = self._rang, {}, bool(self.alarm.since)
        return means, rang

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to report the same, as plain types and tensors; waits for the device."""
        self._drain()
        steps = [dict(step) for step in self._steps]
        epoch = {name: list(sums) for name, sums in self._epoch.items()}
        pool = [batch.cpu() for batch in self._pool]
        return {"alarm": self.alarm.state_dict(), "steps": steps, "epoch": epoch, "rang": self._rang, "pool": pool}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.alarm.load_state_dict(state["alarm"])
        self._on_device, self._ratios_seen = [], []
        self._steps = [dict(step) for step in state["steps"]]
        self._epoch = {name: list(sums) for name, sums in state["epoch"].items()}
        self._rang = state["rang"]
        self._pool = deque(state.get("pool", []))  # version 0.1.0 pooled nothing

    def _feature_measures(self) -> dict[str, float]:
        """Return the measures of the pooled features; waits for the device."""
        shares = energy_shares([batch.to(self._pool[-1].device) for batch in self._pool])  # resumed ones lie on the host
        return {"effective_rank": float(effective_rank(shares)), "feature_spread": float(shares.sum())}

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
