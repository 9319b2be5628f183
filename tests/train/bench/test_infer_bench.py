"""``mammostream bench infer``: the plain loop has the same network."""

from __future__ import annotations

import pytest
import torch

from mammostream.models import MammogramClassifier, build_backbone
from mammostream.models.classifier import build_classification_head
from mammostream.train.bench.infer_command import plain_network


@pytest.mark.parametrize("arch", ["resnet18", "convnext_tiny"])
def test_the_plain_network_answers_alike_for_grey_images(arch):
    torch.manual_seed(0)
    backbone = build_backbone(arch)
    model = MammogramClassifier(backbone, build_classification_head(backbone.num_features, 2)).eval()
    tiles = torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        plain = plain_network(model, torch.device("cpu"))(tiles.expand(-1, 3, -1, -1))
        torch.testing.assert_close(plain, model.classify(tiles), rtol=1e-4, atol=1e-5)
