"""Backbones, BYOL, the classifier and checkpoint files; no training logic.

Examples
--------
>>> import torch
>>> from mammostream.models import MammogramBYOL, build_backbone
>>> model = MammogramBYOL(build_backbone("resnet18"), num_classes=2).eval()
>>> tiles = torch.zeros(4, 1, 64, 64)                     # normalised: (x - MEAN) / STD, x in [0, 1]
>>> model.get_features(tiles).shape
torch.Size([4, 512])
>>> model.classify(tiles).shape                           # logits; torch.sigmoid gives probabilities
torch.Size([4, 2])

>>> from mammostream.models import load_classifier
>>> model, class_names, config = load_classifier("best_classification_model.pth", "cuda")      # doctest: +SKIP
"""

import lazy_loader

# Names are imported when first asked for, so that `mammostream --help` stays fast.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
