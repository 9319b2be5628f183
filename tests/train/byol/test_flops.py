"""Counting a step's arithmetic: against sums by hand, and untouched by what changes no arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mammostream.models.backbones import build_backbone
from mammostream.models.byol import MammogramBYOL
from mammostream.train.byol.flops import flops_per_pair, mfu, peak_by_name
from mammostream.train.run.stages import checkpoint_activations


def test_a_small_network_by_hand():
    backbone = nn.Sequential(nn.Conv2d(1, 6, 3, bias=False), nn.AdaptiveAvgPool2d(1))
    model = MammogramBYOL(backbone, input_dim=6, hidden_dim=8, proj_dim=5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    conv = 2 * 6 * 9 * 10 * 10  # twelve pixels less two
    projector, predictor = 2 * (6 * 8 + 8 * 5), 2 * (5 * 8 + 8 * 5)
    # Online: forward, gradient of the weights, and of the input but the image's; target: forward.
    by_view = (2 * conv + 3 * (projector + predictor)) + (conv + projector)
    assert flops_per_pair(model.eval(), 12) == 2 * by_view
    assert not model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_resnet50_at_512_pixels_agrees_with_the_literature():
    with torch.device("meta"):
        model = MammogramBYOL(build_backbone("resnet50"))
    # 4.1 multiply-adds at 224 pixels (He et al. 2016), of which the first layer's input gradient and two channels fall away.
    expected = 2 * 4.1e9 * (512 / 224) ** 2 * (3 + 1) * 2
    assert flops_per_pair(model, 512) == pytest.approx(expected, rel=0.05)


def test_what_checkpointing_computes_twice_is_not_counted():
    model = MammogramBYOL(build_backbone("resnet18"), hidden_dim=8, proj_dim=4)
    expected = flops_per_pair(model, 64)
    checkpoint_activations(model.backbone)
    assert flops_per_pair(model, 64) == expected
    block = model.backbone.layer1[0]
    assert "forward" in vars(block)  # still checkpointed


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("Tesla V100-SXM2-16GB", 125),
        ("Tesla T4", 65),
        ("NVIDIA A10G", 70),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peaks_by_the_drivers_names(name, tera):
    assert peak_by_name(name) == (None if tera is None else tera * 1e12)


def test_there_is_no_utilisation_of_an_unknown_peak():
    assert mfu(100.0, 10**12, torch.device("cpu")) is None
