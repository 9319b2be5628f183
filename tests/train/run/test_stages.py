"""Stages of every backbone: together they are all of it, and what trains and what is recomputed follows them."""

from __future__ import annotations

import pytest
import torch

from mammostream.models.architectures import ARCHITECTURES
from mammostream.models.backbones import build_backbone
from mammostream.train.run.stages import STAGE_COUNT, checkpoint_activations, stages_of, train_top_stages


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_parameter_is_in_one_stage_in_the_order_of_the_network(arch):
    with torch.device("meta"):
        backbone = build_backbone(arch)
    stages = stages_of(backbone)
    assert len(stages) == STAGE_COUNT
    names = [
        name for stage in stages for part in stage for name, _ in backbone.named_parameters() if name.startswith(f"{part}.")
    ]
    assert names == [name for name, _ in backbone.named_parameters()]


@pytest.mark.parametrize("count", range(STAGE_COUNT + 1))
def test_a_convnexts_top_stages_train(count):
    with torch.device("meta"):
        backbone = build_backbone("convnext_tiny").train()
    train_top_stages(backbone, count)
    for depth, stage in enumerate(reversed(stages_of(backbone))):
        for part in stage:
            module = backbone.get_submodule(part)
            assert {p.requires_grad for p in module.parameters()} == {depth < count}
            assert module.training == (depth < count)


def test_a_checkpointed_convnext_has_the_same_gradients_with_less_memory():
    torch.manual_seed(0)
    backbone = build_backbone("convnext_tiny")
    x = torch.randn(2, 1, 64, 64)
    gradients, kept = [], []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[-1] += tensor.numel()
        return tensor

    for checkpointed in (False, True):
        if checkpointed:
            checkpoint_activations(backbone)
        backbone.zero_grad()
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = backbone(x)
        out.square().mean().backward()
        gradients.append([p.grad.clone() for p in backbone.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    assert kept[1] < kept[0] / 2
