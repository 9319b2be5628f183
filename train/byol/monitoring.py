"""Watching a pre-training without labels: what tells learning from collapse, and an alarm for the latter.

BYOL's loss falls when the network collapses, that is when it gives every tile the same answer. So other things are watched:
the spread of the projections and of the features, the number of directions that the features use, and whether a tile's two
views find each other.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mammostream.models.byol import BYOLOutput
from mammostream.train.byol.measures import effective_rank, energy_shares, retrieval_accuracy, z_std

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
    """Return the alarm of a pre-training, with four signs.

    - ``z_std`` below half of ``1 / sqrt(d)``: the length of the mean of unit vectors is about ``sqrt(1 - d z_std ** 2)``, so
      that two tiles' projections then have a cosine above 3/4 on average.
    - ``feature_spread``, the sum of :func:`mammostream.train.byol.measures.energy_shares`, below 0.01: a tile's features differ
      from the mean by less than a tenth of their length.
    - ``effective_rank`` below 1.5: the features all but lie on one line (1), or in one point (0).
    - ``view_retrieval`` well below its first value, or no more than chance, see :class:`FallSign`.

    What was seen with ResNet-18 on tiles of 8 films (benchmarks/results/2026-11-27-collapse-alarm.md), d = 128, batches of 32
    (chance: 0.031), medians over the last 50 steps, retrieval as a mean over the first 100 and the last 200:

    ======================================  =====  ======  ====  ==============  ==============
    run                                     z_std  spread  rank  retrieval       alarm
    ======================================  =====  ======  ====  ==============  ==============
    healthy                                 0.076  0.69    19.3  0.093 -> 0.125  silent
    no predictor                            0.019  0.77    13.5  0.102 -> 0.129  z_std, step 80
    no predictor, momentum 0                0.001  0.81    6.5   0.087 -> 0.079  z_std, step 70
    learning rate 1                         0.033  0.48    3.1   0.062 -> 0.077  z_std, step 70
    learning rate 0.1                       0.048  0.55    3.6   0.071 -> 0.086  silent
    views with almost nothing in common     0.067  0.84    3.8   0.043 -> 0.048  z_std, step 70
    ======================================  =====  ======  ====  ==============  ==============

    So in short runs it is the projector that collapses, not the features behind a ResNet's batch norms, and ``z_std`` tells.
    The two signs of the features are for a collapse that reaches them. The rank's limit is low because a healthy ConvNeXt had a
    rank of 4.6 within 82 steps, and an untrained one has 2.5 on enlarged tiles. In the last two runs the retrieval fell within
    20 steps, from 0.10 and 0.06: with batches of 32, too little was read before to tell that from noise.

    The retrieval's noise, simulated as binomial for batches of 32 to 256 and first values of 1.5 to 6 times chance: of runs of
    10000 steps that stay at their first value, at most 0.4 % ring; after a fall to 55 %, at least 95 % ring within 200 steps.
    Real readings vary no more than that: 0.5 to 1.3 times the binomial variance.

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
