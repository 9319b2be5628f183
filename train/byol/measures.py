"""What is measured to tell learning from collapse, and how far the target lags behind."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mammostream.models.byol import MammogramBYOL

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
