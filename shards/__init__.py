"""Dataset adapters, the build plan, WebDataset shards with a DALI index, their tables and their checks.

Examples
--------
>>> from mammostream.shards import open_shards                    # doctest: +SKIP
>>> shards = open_shards("runs/demo/shards")          # doctest: +SKIP
>>> shards.tiles("val")[["key", "breast_ratio"]]      # doctest: +SKIP
"""

import lazy_loader

# Names are imported when first asked for, so that `mammostream --help` stays fast.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
