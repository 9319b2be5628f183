"""Backbones, BYOL, the classifier and checkpoint files; no training logic.

Examples
--------
>>> import torch
>>> from models import MammogramBYOL, build_backbone
>>> model = MammogramBYOL(build_backbone("resnet18"), num_classes=2).eval()
>>> tiles = torch.zeros(4, 1, 64, 64)                     # normalised: (x - MEAN) / STD, x in [0, 1]
>>> model.get_features(tiles).shape
torch.Size([4, 512])
>>> model.classify(tiles).shape                           # logits; torch.sigmoid gives probabilities
torch.Size([4, 2])

>>> from models import load_classifier
>>> model, class_names, config = load_classifier("best_classification_model.pth", "cuda")      # doctest: +SKIP
"""

from __future__ import annotations

from typing import Any

_EXPORTS = {
    "MammogramBYOL": "models.byol",
    "MammogramClassifier": "models.classifier",
    "build_backbone": "models.backbones",
    "load_byol": "models.checkpoints",
    "load_classifier": "models.checkpoints",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, so that importing the package does not import torch."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'models' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_EXPORTS[name]), name)
