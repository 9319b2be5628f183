"""Heads over bags: each tile's features are projected, and the tiles of a bag are pooled in one of several ways."""

from __future__ import annotations

import torch
from torch import Tensor, nn

GATED, MEAN, MAX, TOP = "gated", "mean", "max", "top"
POOLINGS = (GATED, MEAN, MAX, TOP)


class GatedAttention(nn.Module):
    """Weights of the tiles of a bag that add up to 1 (Ilse et al. 2018, arXiv:1802.04712, equation 9).

    ``a_k = softmax_k(w^T (tanh(V h_k) * sigmoid(U h_k)))``, with one ``w`` for all classes or one per class.

    Parameters
    ----------
    dim, gate_dim
        Width of the tiles' features h and of the gate.
    count
        Number of attentions A.
    """

    def __init__(self, dim: int, gate_dim: int, count: int) -> None:
        super().__init__()
        self.v, self.u = nn.Linear(dim, gate_dim), nn.Linear(dim, gate_dim)
        self.w = nn.Linear(gate_dim, count, bias=False)  # a softmax does not see a bias

    def forward(self, h: Tensor, bag: Tensor, bags: int) -> Tensor:
        """Return weights (R, A) of tiles (R, dim) that belong to bags (R,), numbered from 0 to `bags` - 1."""
        scores = self.w(torch.tanh(self.v(h)) * torch.sigmoid(self.u(h)))
        return segment_softmax(scores, bag, bags)


class BagHead(nn.Module):
    """Logits of bags from the features of their tiles.

    ``gated`` classifies the attention-weighted mean of the tiles, ``mean`` their plain mean; ``max`` and ``top`` classify each
    tile and take the highest logit, or the mean of the highest few.

    Parameters
    ----------
    pooling
        One of :data:`POOLINGS`.
    feature_dim, num_classes
        D and C.
    hidden_dim, attention_dim, per_class, top, dropout
        See :class:`mammostream.train.aggregate.config.AggregateConfig`.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        pooling: str,
        feature_dim: int,
        num_classes: int,
        *,
        hidden_dim: int,
        attention_dim: int,
        per_class: bool,
        top: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.pooling, self.top = pooling, top
        self.register_buffer("mean", torch.zeros(feature_dim))
        self.register_buffer("std", torch.ones(feature_dim))
        self.project, self.dropout = nn.Linear(feature_dim, hidden_dim), nn.Dropout(dropout)
        self.classifier = nn.Linear(hidden_dim, num_classes)
        self.attention = (
            GatedAttention(hidden_dim, attention_dim, num_classes if per_class else 1) if pooling == GATED else None
        )

    def forward(self, features: Tensor, bag: Tensor, bags: int) -> tuple[Tensor, Tensor | None]:
        """Return logits (bags, C), and for ``gated`` the weights (R, A), of tiles (R, D).

        Parameters
        ----------
        features
            (R, D) float32.
        bag
            (R,) int64, ascending: the bag of each tile; each bag has at least one.
        bags
            Their number.
        """
        h = self._projected(features)
        if self.attention is not None:
            weights = self.attention(h, bag, bags)
            pooled = segment_sum(weights[:, :, None] * h[:, None, :], bag, bags)  # (bags, A, hidden)
            logits = (pooled * self.classifier.weight).sum(-1) + self.classifier.bias  # an A of 1 serves all classes
            return logits, weights
        if self.pooling == MEAN:
            return self.classifier(segment_sum(h, bag, bags) / _sizes(bag, bags)), None
        return segment_top_mean(self.classifier(h), bag, bags, 1 if self.pooling == MAX else self.top), None

    def _projected(self, features: Tensor) -> Tensor:
        """Return ``dropout(relu(W (x - mean) / std + b))``; mean and std go into the small W and b, not into the large x."""
        weight = self.project.weight / self.std
        bias = self.project.bias - weight @ self.mean
        return self.dropout(torch.relu(nn.functional.linear(features, weight, bias)))


def segment_sum(values: Tensor, bag: Tensor, bags: int) -> Tensor:
    """Return the sums (bags, ...) of the rows of each bag."""
    return values.new_zeros(bags, *values.shape[1:]).index_add(0, bag, values)


def segment_softmax(scores: Tensor, bag: Tensor, bags: int) -> Tensor:
    """Return the softmax of scores (R, A) over the rows of each bag."""
    index = bag[:, None].expand_as(scores)
    highest = scores.new_full((bags, scores.shape[1]), -torch.inf).scatter_reduce(0, index, scores, "amax")
    weights = (scores - highest.detach()[bag]).exp()
    return weights / segment_sum(weights, bag, bags)[bag]


def segment_top_mean(logits: Tensor, bag: Tensor, bags: int, top: int) -> Tensor:
    """Return the mean (bags, C) of the `top` highest logits of each bag and class; of all where a bag has fewer."""
    ordered, order = logits.sort(dim=0, descending=True, stable=True)
    of_bag, by_bag = bag[order].sort(dim=0, stable=True)  # (R, C): within each bag from the highest to the lowest
    starts = torch.searchsorted(bag, torch.arange(bags, device=bag.device))
    rank = torch.arange(len(bag), device=bag.device)[:, None] - starts[of_bag]
    kept = torch.where(rank < top, ordered.gather(0, by_bag), 0.0)
    sums = logits.new_zeros(bags, logits.shape[1]).scatter_add(0, of_bag, kept)
    return sums / _sizes(bag, bags).clamp(max=top)


def _sizes(bag: Tensor, bags: int) -> Tensor:
    """Return the number of tiles of each bag, float32 (bags, 1)."""
    return torch.bincount(bag, minlength=bags)[:, None].float()
