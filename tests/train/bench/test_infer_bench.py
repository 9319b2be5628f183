"""``mammostream bench infer``: the plain loop has the same network."""

from __future__ import annotations

import pytest
import torch

from mammostream.models import MammogramClassifier, build_backbone
from mammostream.models.classifier import build_classification_head
from mammostream.shards import open_shards
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


def test_measuring_prediction(finetuned, sharp_classifier, mammostream, tmp_path):
    outcome = mammostream(
        f"bench infer --model-path {sharp_classifier} --shards {finetuned.shards} --split val --manifest {finetuned.manifest} "
        f"--rounds 1 --device cpu --output {tmp_path}/page.md"
    )
    assert outcome.code == 0, outcome.err
    page = (tmp_path / "page.md").read_text()
    tiles = sum(shard["tiles"] for shard in open_shards(finetuned.shards).meta["shards"] if shard["split"] == "val")
    assert f"{tiles} tiles" in page
    assert page.count("| mammostream") + page.count("| ours") >= 1, page
