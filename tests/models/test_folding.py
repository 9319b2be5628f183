"""Folded batch norms: the same function for every architecture, and nothing is folded that must not be."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mammostream.models.architectures import ARCHITECTURES
from mammostream.models.backbones import build_backbone
from mammostream.models.folding import fold_batch_norms


def settle(module: nn.Module) -> nn.Module:
    """Give batch norms statistics and factors that differ from the defaults."""
    torch.manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, std=0.2)
            nn.init.normal_(part.running_mean, std=0.2)
            nn.init.uniform_(part.running_var, 0.5, 2)
    return module.eval()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_folded_backbone_is_the_same_function(arch):
    backbone = settle(build_backbone(arch))
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    folded = fold_batch_norms(backbone)
    tiles = torch.randn(2, 1, 64, 64)
    with torch.inference_mode():
        expected, found = backbone(tiles), folded(tiles)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert not any(isinstance(part, nn.BatchNorm2d) for part in folded.modules())
    assert type(folded) is type(backbone)
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items()), "the original changed"


class Shared(nn.Module):
    """A convolution whose output is used elsewhere as well as in its batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return self.norm(y) + y


def test_a_convolution_that_feeds_something_else_too_is_left_alone():
    module = settle(Shared())
    folded = fold_batch_norms(module)
    tiles = torch.randn(2, 1, 8, 8)
    assert isinstance(folded.norm, nn.BatchNorm2d)
    assert torch.equal(folded(tiles), module(tiles))
