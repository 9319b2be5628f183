"""Dataset adapters, the build plan, WebDataset shards with a DALI index, their tables and their checks.

Examples
--------
>>> from shards import open_shards                    # doctest: +SKIP
>>> shards = open_shards("runs/demo/shards")          # doctest: +SKIP
>>> shards.tiles("val")[["key", "breast_ratio"]]      # doctest: +SKIP
"""

from __future__ import annotations

from typing import Any

_EXPORTS = {
    "build_shard": "shards.build",
    "decode_sample": "shards.codecs",
    "make_plan": "shards.plan",
    "open_shards": "shards.reading",
    "read_manifest": "shards.manifest",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, so that ``mammostream --help`` stays fast."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'shards' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_EXPORTS[name]), name)
