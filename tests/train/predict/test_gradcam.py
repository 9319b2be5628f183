"""Grad-CAM: the paper's sums by hand, and a map that peaks where the answer comes from."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from mammostream.models.backbones import build_backbone
from mammostream.models.classifier import MammogramClassifier, build_classification_head
from mammostream.train.predict.gradcam import grad_cam


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    backbone = build_backbone("resnet18")
    return MammogramClassifier(backbone, build_classification_head(512, 3)).eval()


def test_the_maps_are_the_papers_sums(resnet):
    """The last stage by hand, each class's gradient by finite differences of each channel."""
    resnet = copy.deepcopy(resnet).double()
    tiles, b = torch.randn(2, 1, 96, 64, dtype=torch.float64), resnet.backbone
    with torch.no_grad():
        x = b.maxpool(b.relu(b.bn1(b.conv1(tiles))))
        activation = b.layer4(b.layer3(b.layer2(b.layer1(x))))  # (2, 512, 3, 2)

        def logit(a):
            return resnet.classification_head(a.mean((2, 3)))

        for c in range(3):
            # Every position of a channel counts alike in a mean, so its gradient is that of the channel's mean, spread out.
            slopes = torch.empty(2, 512, dtype=torch.float64)
            for channel in range(512):
                up, down = activation.clone(), activation.clone()
                up[:, channel] += 1e-4
                down[:, channel] -= 1e-4
                slopes[:, channel] = (logit(up) - logit(down))[:, c] / 2e-4 / 6
            expected = torch.einsum("nk,nkhw->nhw", slopes, activation).clamp(min=0)
            found = grad_cam(resnet, tiles, c)
            assert found.shape == (2, 96, 64)
            for one, other in zip(found, expected, strict=True):
                enlarged = torch.nn.functional.interpolate(other[None, None], size=(96, 64), mode="bilinear")[0, 0]
                np.testing.assert_allclose(one, enlarged / enlarged.max(), atol=1e-5)


class _Spots(nn.Module):
    """A network that sees bright spots (channel 0) and dark ones (channel 1), and nothing else."""

    def __init__(self):
        super().__init__()
        self.blocks, self.avgpool = nn.AvgPool2d(8), nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        mean = self.blocks(x)
        return self.avgpool(torch.cat([mean.clamp(min=0), (-mean).clamp(min=0)], 1)).flatten(1)


def test_the_map_peaks_where_the_answer_comes_from():
    head = nn.Linear(2, 2)
    head.weight.data, head.bias.data = torch.eye(2), torch.zeros(2)
    model = MammogramClassifier(_Spots(), head).eval()
    tiles = torch.zeros(2, 1, 64, 64)
    tiles[0, 0, 8:24, 40:56] = 1  # bright, upper right
    tiles[0, 0, 48:56, 8:16] = -1  # dark, lower left
    bright, dark = (grad_cam(model, tiles, c) for c in range(2))
    assert divmod(int(bright[0].argmax()), 64) == (pytest.approx(16, abs=8), pytest.approx(48, abs=8))
    assert divmod(int(dark[0].argmax()), 64) == (pytest.approx(52, abs=4), pytest.approx(12, abs=4))
    assert bright[0, 44:60, 4:20].max() == 0  # nothing there speaks for it
    assert bright[0].max() == 1
    assert not bright[1].any()  # an empty tile: nothing anywhere, and no division by 0


def test_a_map_leaves_the_model_and_gradients_as_they_were(resnet):
    before = {name: tensor.clone() for name, tensor in resnet.state_dict().items()}
    for parameter in resnet.parameters():
        parameter.requires_grad_(False)  # as a deployed model may be
    with torch.no_grad():
        first = grad_cam(resnet, torch.ones(1, 1, 64, 64), 0)
        assert not torch.is_grad_enabled()
        resnet.classify(torch.zeros(1, 1, 64, 64))
    assert torch.is_grad_enabled()
    assert all(torch.equal(tensor, before[name]) for name, tensor in resnet.state_dict().items())
    assert all(parameter.grad is None for parameter in resnet.parameters())
    assert not resnet.backbone.avgpool._forward_pre_hooks
    with torch.no_grad():
        torch.testing.assert_close(grad_cam(resnet, torch.ones(1, 1, 64, 64), 0), first)
