"""Other forms of the first convolution give the same results."""

import copy

import pytest
import torch
from torch import nn

from mammostream.models.backbones import build_backbone
from mammostream.models.stems import PaddedStem, SpaceToDepthStem


@pytest.mark.parametrize("stem", [PaddedStem, SpaceToDepthStem])
@pytest.mark.parametrize("size", [(32, 32), (18, 46)])
def test_a_stem_is_the_convolution_and_so_are_its_gradients(stem, size):
    torch.manual_seed(0)
    conv = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False).double()
    other = stem(copy.deepcopy(conv))
    x = torch.randn(3, 1, *size, dtype=torch.float64, requires_grad=True)
    x2 = x.detach().clone().requires_grad_()
    expected, result = conv(x), other(x2)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (result * weights).sum().backward()
    torch.testing.assert_close(other.weight.grad, conv.weight.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(x2.grad, x.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("stem", [PaddedStem, SpaceToDepthStem])
def test_a_backbone_keeps_its_state_dict(stem):
    backbone = build_backbone("resnet18")
    state = backbone.state_dict()
    backbone.conv1 = stem(backbone.conv1)
    assert backbone.state_dict().keys() == state.keys()
    backbone.load_state_dict(state)
    assert backbone.conv1.weight.shape == (64, 1, 7, 7)


def test_another_convolution_is_refused():
    with pytest.raises(ValueError, match="not a 7 x 7 convolution"):
        SpaceToDepthStem(nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False))
