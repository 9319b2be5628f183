"""Schedules as arrays indexed by step: what a step will use is known, plotted and tested before training starts."""

from __future__ import annotations

import numpy as np

from mammostream.common.errors import BadInput


def learning_rates(base: float, total_steps: int, warmup_steps: int = 0, final: float = 0.0) -> np.ndarray:
    """Return a linear warm-up followed by a half cosine (Loshchilov and Hutter 2017, arXiv:1608.03983).

    Step t of the warm-up has ``base (t + 1) / (warmup_steps + 1)``: the first step already learns, and step
    `warmup_steps` is the first and only one with `base` (if the run has more). From there the cosine falls to `final`
    at the last step. A run shorter than its warm-up ends on the ramp.

    Parameters
    ----------
    base
        The peak, > 0.
    total_steps
        Steps of the run, at least 1.
    warmup_steps
        Steps of the ramp, 0 or more.
    final
        The last step's rate, from 0 to `base`.

    Returns
    -------
    np.ndarray
        (total_steps,) float64 in [0, base].

    Raises
    ------
    BadInput
        A value is outside its range.
    """
    _require_steps(total_steps)
    if not (np.isfinite(base) and base > 0):
        raise BadInput(f"the learning rate is {base}; give one above 0")
    if not 0 <= final <= base:
        raise BadInput(f"the final learning rate is {final}; give one from 0 to the learning rate {base}")
    if warmup_steps < 0:
        raise BadInput(f"the warm-up is {warmup_steps} steps; give 0 or more")
    ramp = base * np.arange(1, warmup_steps + 1) / (warmup_steps + 1)
    fall = final + (base - final) * _half_cosine(max(total_steps - warmup_steps, 1))
    return np.concatenate([ramp, fall])[:total_steps]


def byol_momenta(base: float, total_steps: int, exponent: float = 1.0) -> np.ndarray:
    """Return the target's momentum, ``1 - (1 - base) (cos(pi t / T) + 1) / 2`` (Grill et al. 2020, "Implementation details").

    T is the last step, so that the first has `base` and the last 1 (the paper stops a step short of 1).

    Parameters
    ----------
    base
        The first step's momentum in [0, 1]; 0.996 in the paper.
    total_steps
        Steps of the run, at least 1; a run of one step has `base`.
    exponent
        Each momentum is raised to it: by the EMA scaling rule the batch over the one that `base` is for (Busbridge et al.
        2023, arXiv:2307.13813).

    Returns
    -------
    np.ndarray
        (total_steps,) float64, rising from ``base ** exponent`` to 1.

    Raises
    ------
    BadInput
        A value is outside its range.
    """
    _require_steps(total_steps)
    if not 0 <= base <= 1:
        raise BadInput(f"the target's momentum is {base}; give one from 0 to 1 (0.996 in the paper)")
    return (1 - (1 - base) * _half_cosine(total_steps)) ** exponent


def trainable_stages(epoch: int, frozen_epochs: int, every: int, stages: int) -> int:
    """Return how many of the backbone's `stages`, from the output down, train in an epoch.

    Parameters
    ----------
    epoch
        From 1 on.
    frozen_epochs
        First epochs in which none does.
    every
        Epochs from one stage's unfreezing to the next one's; 0 unfreezes all at once.
    """
    since = epoch - frozen_epochs
    if since <= 0:
        return 0
    return min(stages, 1 + (since - 1) // every) if every else stages


def _half_cosine(steps: int) -> np.ndarray:
    """Return (steps,) values falling from 1 to 0 along half a cosine; [1] for one step."""
    return (np.cos(np.pi * np.arange(steps) / max(steps - 1, 1)) + 1) / 2


def _require_steps(total_steps: int) -> None:
    if total_steps < 1:
        raise BadInput(f"the run has {total_steps} steps; give more tiles, more epochs or a smaller batch")
