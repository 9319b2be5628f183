"""Writes a classifier with random weights that fits a shard directory: speed does not depend on what the weights know.

python benchmarks/random_classifier.py SHARDS MODEL.pth [ARCH]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from mammostream.common.normalisation import MEAN, STD
from mammostream.models.backbones import build_backbone
from mammostream.models.checkpoints import save_checkpoint
from mammostream.models.classifier import MammogramClassifier, build_classification_head
from mammostream.shards.reading import open_shards


def write_random_classifier(shards: Path, path: Path, arch: str = "resnet50") -> None:
    """Write the checkpoint: four classes, the shards' own preprocessing."""
    torch.manual_seed(0)
    backbone = build_backbone(arch)
    model = MammogramClassifier(backbone, build_classification_head(backbone.num_features, 4))
    record = open_shards(shards).preprocessing | {"mean": MEAN, "std": STD}
    checkpoint = {"kind": "classifier", "arch": arch, "config": {}, "class_names": list("abcd"), "preprocessing": record}
    save_checkpoint(path, checkpoint | {"model_state_dict": model.state_dict()})


if __name__ == "__main__":
    write_random_classifier(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:4])
