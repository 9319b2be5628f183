"""Mammograms in, tiles out, shards on disk, a GPU that never waits.

The names below are imported when first used, so that ``import mammostream`` and ``mammostream --help`` stay fast.

Examples
--------
>>> import mammostream
>>> film = mammostream.read_mammogram("film.dcm")                                    # doctest: +SKIP
>>> tiles = mammostream.tile_film(film, mammostream.TilingConfig())                  # doctest: +SKIP
>>> shards = mammostream.open_shards("work/shards")                                  # doctest: +SKIP
>>> model, class_names, config = mammostream.load_classifier("model.pth", "cuda")    # doctest: +SKIP
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
