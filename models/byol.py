"""BYOL (Bootstrap Your Own Latent; Grill et al. 2020, arXiv:2006.07733) for one-channel tiles.

Shapes: N tiles per batch, D features of the backbone, P dimensions of the projection.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mammostream.common.errors import BadInput
from mammostream.models.backbones import encode, feature_dim, with_input_channels
from mammostream.models.classifier import build_classification_head


class BYOLOutput(NamedTuple):
    """Output of a BYOL forward pass: the loss, and the tensors that collapse is measured on, to save a second forward pass."""

    loss: Tensor
    """Scalar float32 in [-1, 1], with gradient."""
    projections: Tensor
    """(N, P) online projections of view 1, detached."""
    features: Tensor
    """(N, D) online backbone features of view 1, detached."""
    projections2: Tensor
    """(N, P) online projections of view 2, detached."""


def byol_loss(p: Tensor, z: Tensor) -> Tensor:
    """Return the mean negative cosine similarity of predictions and targets, a scalar in [-1, 1] of at least float32.

    It is the paper's squared distance of l2-normalised vectors, 2 - 2 cos, without the constants. Half-precision inputs
    are converted to float32: three digits are too few for a loss that settles near -0.98.

    Parameters
    ----------
    p
        (N, P) predictions of the online network.
    z
        (N, P) projections of the target network; the caller must detach them from the graph.
    """
    p, z = (v.to(torch.promote_types(v.dtype, torch.float32)) for v in (p, z))
    return -(F.normalize(p, dim=1) * F.normalize(z, dim=1)).sum(1).mean()


def build_mlp(input_dim: int, hidden_dim: int, output_dim: int) -> nn.Sequential:
    """Return the paper's projector and predictor: Linear, BatchNorm, ReLU, Linear."""
    return nn.Sequential(
        nn.Linear(input_dim, hidden_dim),
        nn.BatchNorm1d(hidden_dim),
        nn.ReLU(inplace=True),
        nn.Linear(hidden_dim, output_dim),
    )


class MammogramBYOL(nn.Module):
    """BYOL's online and target networks, with a classification head on the online backbone.

    The target (``backbone_momentum``, ``projection_head_momentum``) starts as a copy of the online network, never
    gets a gradient, and follows it through :meth:`update_target`. BYOL's loss does not reach the classification
    head: it keeps its initial weights until fine-tuning trains it (pre-training freezes it).

    Parameters
    ----------
    backbone
        Maps (N, 1, H, W), or (N, 3, H, W), to (N, D) or (N, D, 1, 1); see
        :func:`mammostream.models.backbones.build_backbone`. Tiles get as many channels as its first convolution takes.
    input_dim
        D; None takes the backbone's ``num_features``.
    hidden_dim
        Width of the projector's and the predictor's hidden layer.
    proj_dim
        P, the length of projections and predictions.
    num_classes
        Number of labels of the classification head.
    concat_views
        Pass both views through each network in one batch: fewer, larger kernels, but different training, since batch norm
        statistics then cover both views. By default each view passes separately.

    Raises
    ------
    BadInput
        `input_dim` is missing or differs from the backbone's.
    """

    def __init__(
        self,
        backbone: nn.Module,
        input_dim: int | None = None,
        hidden_dim: int = 4096,
        proj_dim: int = 256,
        num_classes: int = 2,
        concat_views: bool = False,
    ) -> None:
        super().__init__()
        self.input_dim = feature_dim(backbone, input_dim)
        self.concat_views = concat_views
        self.backbone = with_input_channels(backbone)
        self.projection_head = build_mlp(self.input_dim, hidden_dim, proj_dim)
        self.prediction_head = build_mlp(proj_dim, hidden_dim, proj_dim)
        self.classification_head = build_classification_head(self.input_dim, num_classes)
        self.backbone_momentum = copy.deepcopy(self.backbone).requires_grad_(False)
        self.projection_head_momentum = copy.deepcopy(self.projection_head).requires_grad_(False)

    def forward(self, view1: Tensor, view2: Tensor) -> BYOLOutput:
        """Return the symmetric loss of two views of the same tiles.

        Unless ``concat_views`` is set, each view passes through each network separately, so that batch norms see one kind of
        augmentation at a time. BYOL's reference code does the same, and it affects the results.

        Parameters
        ----------
        view1, view2
            (N, 1, H, W), normalised; row i of both shows the same tile. In training mode N must be at least 2 for
            the batch norms.
        """
        batches = [torch.cat([view1, view2])] if self.concat_views else [view1, view2]
        features = [encode(self.backbone, batch) for batch in batches]
        projections = [self.projection_head(batch) for batch in features]
        predictions1, predictions2 = _by_view([self.prediction_head(batch) for batch in projections])

        with torch.no_grad():
            targets1, targets2 = _by_view(
                [self.projection_head_momentum(encode(self.backbone_momentum, batch)) for batch in batches]
            )

        loss = (byol_loss(predictions1, targets2) + byol_loss(predictions2, targets1)) / 2
        projections1, projections2 = _by_view(projections)
        return BYOLOutput(loss, projections1.detach(), _by_view(features)[0].detach(), projections2.detach())

    @torch.no_grad()
    def update_target(self, momentum: float, skipped: Tensor | None = None) -> None:
        """Move the target's parameters towards the online network's: ``target = m target + (1 - m) online``.

        Fused calls over all parameters, and nothing waits for the device. Buffers are left alone: they are the batch norms'
        running statistics, and the target collects its own in its forward passes, as in the paper's reference code. The
        online network's statistics describe the online network's activations; averaged into the target's, they would fit
        neither.

        Parameters
        ----------
        momentum
            m in [0, 1]: 1 leaves the target unchanged, 0 copies the online parameters.
        skipped
            A bool scalar on the device: where it is true, the target stays as it is, bit for bit, since the online network's
            step was skipped too. The online parameters must be finite.

        Raises
        ------
        BadInput
            `momentum` is outside [0, 1].
        """
        if not 0 <= momentum <= 1:
            raise BadInput(f"the target's momentum is {momentum}; give one from 0 to 1 (0.996 in the paper)")
        targets: list[Tensor] = [*self.backbone_momentum.parameters(), *self.projection_head_momentum.parameters()]
        onlines: list[Tensor] = [*self.backbone.parameters(), *self.projection_head.parameters()]
        if skipped is None:
            torch._foreach_lerp_(targets, onlines, 1 - momentum)
            return
        differences = torch._foreach_sub(onlines, targets)
        torch._foreach_mul_(differences, torch.where(skipped, 0.0, 1 - momentum).to(targets[0]))
        torch._foreach_add_(targets, differences)

    def get_features(self, x: Tensor) -> Tensor:
        """Return features (N, D) of normalised tiles (N, 1, H, W) or (N, 3, H, W), whichever the backbone takes."""
        return encode(self.backbone, x)

    def classify(self, x: Tensor) -> Tensor:
        """Return logits (N, classes) of normalised tiles (N, 1, H, W) or (N, 3, H, W), whichever the backbone takes."""
        return self.classification_head(self.get_features(x))


def _by_view(batches: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return one tensor per view, from one batch per view or from one batch with the first view's rows first."""
    return batches if len(batches) == 2 else batches[0].chunk(2)
