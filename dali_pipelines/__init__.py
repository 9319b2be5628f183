"""Tiles from disk to the model: readers, augmented views, one DALI graph for CPU and GPU, torch loaders with their state.

Examples
--------
Tiles of a shard directory, two views a tile, as torch tensors:

>>> from dali_pipelines import RECIPES, PretrainLoader                              # doctest: +SKIP
>>> from shards import open_shards                                                  # doctest: +SKIP
>>> loader = PretrainLoader(open_shards("runs/demo/shards").shards("train"), batch_size=32, tile_size=512,
...                         mean=0.449, std=0.226, views=RECIPES["guide"])          # doctest: +SKIP
>>> for view1, view2, numbers in loader: ...                                        # doctest: +SKIP

One tile for a model, normalised as the evaluation pipeline does it:

>>> import numpy as np
>>> from dali_pipelines import create_inference_transform
>>> transform = create_inference_transform(mean=0.5, std=0.25)
>>> tile = transform(np.full((64, 64), 65535, dtype=np.uint16))
>>> tuple(tile.shape), float(tile[0, 0, 0])
((1, 64, 64), 2.0)
"""

from __future__ import annotations

from typing import Any

_EXPORTS = {
    "LabelledLoader": "dali_pipelines.loaders",
    "PretrainLoader": "dali_pipelines.loaders",
    "RECIPES": "dali_pipelines.views",
    "TRAIN_VIEW": "dali_pipelines.views",
    "View": "dali_pipelines.views",
    "create_inference_transform": "dali_pipelines.inference",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, so that ``mammostream --help`` stays fast."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'dali_pipelines' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_EXPORTS[name]), name)
