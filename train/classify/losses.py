"""Losses of multi-label classification: binary cross entropy, focal and asymmetric, over the known labels.

Each loss maps logits and labels (N, C) to losses (N, C), without reduction. Labels lie in [0, 1]: those of mixup are between 0
and 1, and then both terms of the loss count, each by its share. A label's weight is that of the label itself, 1 or 0; label
smoothing only moves what the logit is compared with, to 1 - s/2 or s/2. If the weight of a positive also multiplied the s/2 of
a smoothed negative, the best probability of a certain negative would be far above s/2. Everything is float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mammostream.common.errors import BadInput

if TYPE_CHECKING:
    from mammostream.train.classify.config import FinetuneConfig

Loss = Callable[[Tensor, Tensor], Tensor]

_LEAST_PROBABILITY = 1e-8  # below it the asymmetric loss of a negative is 0


def bce_loss(logits: Tensor, labels: Tensor, pos_weight: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return ``-(w y log p + (1 - y) log(1 - p))`` with ``p = sigmoid(logits)``; `pos_weight` w is (C,).

    `smoothing` s replaces log p by ``(1 - s/2) log p + s/2 log(1 - p)``, and log(1 - p) likewise.
    """
    log_p, log_q = _smoothed(F.logsigmoid(logits), F.logsigmoid(-logits), smoothing)
    return -(pos_weight * labels * log_p + (1 - labels) * log_q)


def focal_loss(logits: Tensor, labels: Tensor, pos_weight: Tensor, gamma: float, smoothing: float = 0.0) -> Tensor:
    """Return the focal loss (Lin et al. 2017, arXiv:1708.02002): labels that are predicted well count less.

    ``-(w y (1 - p)^gamma log p + (1 - y) p^gamma log(1 - p))``; gamma 0 is :func:`bce_loss`. `pos_weight` w stands for the
    paper's alpha: alpha / (1 - alpha). `smoothing` is that of :func:`bce_loss`.
    """
    log_p, log_q = F.logsigmoid(logits), F.logsigmoid(-logits)
    # Powers through logarithms: their gradient stays finite where p or 1 - p rounds to 0.
    positive, negative = torch.exp(gamma * log_q), torch.exp(gamma * log_p)
    log_p, log_q = _smoothed(log_p, log_q, smoothing)
    return -(pos_weight * labels * positive * log_p + (1 - labels) * negative * log_q)


def asymmetric_loss(
    logits: Tensor,
    labels: Tensor,
    pos_weight: Tensor,
    gamma_positive: float,
    gamma_negative: float,
    margin: float,
    smoothing: float = 0.0,
) -> Tensor:
    """Return the asymmetric loss (Ridnik et al. 2021, arXiv:2009.14119): easy negatives count less than easy positives.

    ``-(w y (1 - p)^gamma_positive log p + (1 - y) q^gamma_negative log(1 - q))`` with ``q = max(p - margin, 0)``: negatives
    predicted below the margin do not count at all. With the gammas equal and no margin it is :func:`focal_loss`. `smoothing` is
    that of :func:`bce_loss`.
    """
    log_p, log_q = F.logsigmoid(logits), F.logsigmoid(-logits)
    shifted = (torch.sigmoid(logits) - margin).clamp(min=_LEAST_PROBABILITY)
    log_shifted = torch.log(shifted) if margin else log_p
    log_rest = torch.log1p(-shifted) if margin else log_q
    positive = torch.exp(gamma_positive * log_q) * _smoothed(log_p, log_q, smoothing)[0]
    negative = torch.exp(gamma_negative * log_shifted) * _smoothed(log_p, log_rest, smoothing)[1]
    return -(pos_weight * labels * positive + (1 - labels) * negative)


def _smoothed(log_p: Tensor, log_q: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """Return the log likelihoods of a positive and of a negative label that are smoothed."""
    half = smoothing / 2
    if not half:
        return log_p, log_q
    return (1 - half) * log_p + half * log_q, half * log_p + (1 - half) * log_q


def positive_weights(
    labels: np.ndarray, wanted: Sequence[str], class_names: Sequence[str], times: np.ndarray | None = None
) -> np.ndarray:
    """Return the weight of a positive label for each class: float32 (C,).

    Parameters
    ----------
    labels
        (N, C) training labels of 1, 0 and NaN for missing.
    wanted
        Empty for no weights, ``("auto",)`` for negatives / positives, or one number per class.
    class_names
        C names.
    times
        (N,) how often an epoch draws each row on average; None: once. ``auto`` counts the labels as they are drawn.

    Raises
    ------
    BadInput
        There are numbers, but not one per class.
    """
    if not wanted:
        return np.ones(len(class_names), np.float32)
    if tuple(wanted) != ("auto",):
        if len(wanted) != len(class_names):
            raise BadInput(
                f"--pos-weight has {len(wanted)} values for {len(class_names)} classes; give one per class, in the order of "
                f"--class-names ({', '.join(class_names)}), or auto"
            )
        return np.array([float(value) for value in wanted], np.float32)
    times = np.ones(len(labels), int) if times is None else times
    positives, negatives = times @ (labels == 1), times @ (labels == 0)
    # A class whose labels are all equal has nothing to balance.
    both = (positives > 0) & (negatives > 0)
    return np.where(both, negatives / np.where(both, positives, 1), 1).astype(np.float32)


def build_loss(config: FinetuneConfig, pos_weight: Tensor) -> Loss:
    """Return the loss that the options select, for logits of any precision and labels (N, C) with NaN for missing.

    It returns float32 losses (N, C), 0 where the label is missing.
    """
    kinds: dict[str, Callable[..., Tensor]] = {
        "bce": bce_loss,
        "focal": partial(focal_loss, gamma=config.focal_gamma),
        "asymmetric": partial(
            asymmetric_loss,
            gamma_positive=config.asymmetric_gamma_positive,
            gamma_negative=config.asymmetric_gamma_negative,
            margin=config.asymmetric_margin,
        ),
    }
    return partial(masked_loss, kind=kinds[config.loss], pos_weight=pos_weight, label_smoothing=config.label_smoothing or 0.0)


def masked_loss(
    logits: Tensor, labels: Tensor, *, kind: Callable[..., Tensor], pos_weight: Tensor, label_smoothing: float
) -> Tensor:
    """Return float32 losses (N, C), 0 where the label is missing (NaN).

    Parameters
    ----------
    logits, labels
        (N, C).
    kind
        One of this module's losses.
    pos_weight
        (C,) weight of a positive label.
    label_smoothing
        s in [0, 1), see :func:`bce_loss`.
    """
    known = ~labels.isnan()
    return kind(logits.float(), labels.nan_to_num(), pos_weight, smoothing=label_smoothing) * known


def mix(tiles: Tensor, labels: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Return tiles and labels blended with those of a random partner (mixup, Zhang et al. 2018, arXiv:1710.09412).

    The weight is drawn from Beta(alpha, alpha), once per batch. A label that is missing in either partner is missing.
    """
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    partner = torch.randperm(len(tiles)).to(tiles.device)
    return tiles.lerp(tiles[partner], 1 - share), labels.lerp(labels[partner], 1 - share)
