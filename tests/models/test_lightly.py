"""A training step compared with one built from lightly: the same weights and views give the same step."""

import copy

import pytest
import torch
from torch import nn

from mammostream.models.backbones import build_backbone
from mammostream.models.byol import MammogramBYOL

DIM = 64
HIDDEN, PROJECTED, LR, DECAY, MOMENTUM = 24, 12, 1e-2, 0.1, 0.97


def backbone() -> nn.Module:
    """A ResNet's stem and first stage: the rest adds nothing new and is slow in float64."""
    return nn.Sequential(*list(build_backbone("resnet18").children())[:5], nn.AdaptiveAvgPool2d(1))


class LightlyBYOL(nn.Module):
    """BYOL as in lightly's example."""

    def __init__(self, backbone: nn.Module, dim: int) -> None:
        from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
        from lightly.models.utils import deactivate_requires_grad

        super().__init__()
        self.backbone = backbone
        self.projection_head = BYOLProjectionHead(dim, HIDDEN, PROJECTED)
        self.prediction_head = BYOLPredictionHead(PROJECTED, HIDDEN, PROJECTED)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)

    def forward(self, x):
        return self.prediction_head(self.projection_head(self.backbone(x).flatten(start_dim=1)))

    def forward_momentum(self, x):
        return self.projection_head_momentum(self.backbone_momentum(x).flatten(start_dim=1)).detach()


def lightly_name(name: str) -> str | None:
    """Return lightly's name for one of our tensors; None if lightly does not have it.

    Its heads have no bias before a batch norm, which would cancel it. Its example has no classification head.
    """
    if name.startswith("classification_head") or name.endswith("_head.0.bias") or name.endswith("_head_momentum.0.bias"):
        return None
    head, _, rest = name.partition(".")
    return f"{head}.layers.{rest}" if "_head" in head else name


def test_two_steps_equal_those_of_lightly():
    """Loss, gradients, weights after AdamW and the updated target agree for two steps; the second builds on the first."""
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.utils import update_momentum

    torch.manual_seed(0)
    ours = MammogramBYOL(backbone(), DIM, hidden_dim=HIDDEN, proj_dim=PROJECTED).double().train()
    with torch.no_grad():  # a target that differs, as later in training
        for part in (ours.backbone_momentum, ours.projection_head_momentum):
            for parameter in part.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    theirs = LightlyBYOL(backbone(), DIM).double().train()
    names = {name: lightly_name(name) for name in ours.state_dict() if lightly_name(name)}
    for name, parameter in ours.named_parameters():  # a bias before a batch norm only moves its running mean
        if name.endswith(("_head.0.bias", "_head_momentum.0.bias")):
            nn.init.zeros_(parameter)
    theirs.load_state_dict({there: ours.state_dict()[name].clone() for name, there in names.items()})  # strict: all are used

    shared = [p for name, p in ours.named_parameters() if p.requires_grad and name in names]
    optimizer = torch.optim.AdamW(shared, lr=LR, weight_decay=DECAY)
    other = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=LR, weight_decay=DECAY)
    criterion = NegativeCosineSimilarity()
    for _ in range(2):
        view1, view2 = (torch.randn(4, 1, 32, 32, dtype=torch.float64) for _ in range(2))
        optimizer.zero_grad()
        out = ours(view1, view2)
        out.loss.backward()
        optimizer.step()
        ours.update_target(MOMENTUM)

        other.zero_grad()
        p1, p2 = theirs(view1), theirs(view2)
        z1, z2 = theirs.forward_momentum(view1), theirs.forward_momentum(view2)
        loss = 0.5 * (criterion(p1, z2) + criterion(p2, z1))
        loss.backward()
        other.step()
        update_momentum(theirs.backbone, theirs.backbone_momentum, m=MOMENTUM)
        update_momentum(theirs.projection_head, theirs.projection_head_momentum, m=MOMENTUM)

        assert out.loss.item() == pytest.approx(loss.item(), abs=1e-12)
        gradients = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.requires_grad}
        largest = max(gradient.abs().max().item() for gradient in gradients.values())
        for name, parameter in ours.named_parameters():
            if parameter.requires_grad and name in names:
                torch.testing.assert_close(parameter.grad, gradients[names[name]], rtol=1e-8, atol=1e-10 * largest)
        for name, there in names.items():
            torch.testing.assert_close(ours.state_dict()[name], theirs.state_dict()[there], rtol=1e-7, atol=1e-8, msg=name)
