"""Tiles from disk to the model: readers, augmented views, one DALI graph for CPU and GPU, resumable torch loaders.

Examples
--------
Tiles of a shard directory, two views per tile, as torch tensors:

>>> from mammostream.dali_pipelines import RECIPES, PretrainLoader                              # doctest: +SKIP
>>> from mammostream.shards import open_shards                                                  # doctest: +SKIP
>>> loader = PretrainLoader(open_shards("runs/demo/shards").shards("train"), batch_size=32, tile_size=512,
...                         mean=0.449, std=0.226, views=RECIPES["guide"])          # doctest: +SKIP
>>> for view1, view2, numbers in loader: ...                                        # doctest: +SKIP

One tile for a model, normalised as the evaluation pipeline does it:

>>> import numpy as np
>>> from mammostream.dali_pipelines import create_inference_transform
>>> transform = create_inference_transform(mean=0.5, std=0.25)
>>> tile = transform(np.full((64, 64), 65535, dtype=np.uint16))
>>> tuple(tile.shape), float(tile[0, 0, 0])
((1, 64, 64), 2.0)
"""

import os

import lazy_loader

# Without this, the HTJ2K decoder warns for every tile that it has no colour space. It reads the variable when it is loaded.
os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")

# Names are imported when first asked for, so that `mammostream --help` stays fast.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
