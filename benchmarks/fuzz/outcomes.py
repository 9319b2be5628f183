"""What a command came to, for comparison with the clean input's: ``rows``, and ``words`` where its tables have any."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mammostream.common.files import sha256_file


def table(path: Path) -> Any:
    """The rows of a CSV or Parquet table; None where there is none."""
    import pandas as pd

    if not path.is_file():
        return None
    frame = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
    return json.loads(frame.round(4).to_json(orient="records", default_handler=str))


def built(folder: Path) -> Any:
    """Of a build: the films without the pixels themselves (they have no checksum), flags and reasons apart."""
    rows = table(folder / "out/images.parquet") or []
    kept = ("height", "width", "bits", "pixel_spacing_mm", "mapping", "pixels_hash", "kept")
    return {"rows": [{k: r[k] for k in kept} for r in rows], "words": [f"{r['flags']} {r['reason']}" for r in rows]}


def predicted(folder: Path) -> Any:
    """Of a prediction: probabilities of tiles; reasons apart."""
    rows = table(folder / "out/predictions.parquet") or []
    return {"rows": [{k: v for k, v in r.items() if k != "reason"} for r in rows], "words": [str(r["reason"]) for r in rows]}


def printed(folder: Path) -> Any:
    """Stdout, without paths."""
    return {"rows": (folder / "stdout").read_text(errors="replace").replace(str(folder), "")}


def files(folder: Path) -> Any:
    """Hashes of the files of ``out``."""
    return {"rows": {str(p.relative_to(folder)): sha256_file(p) for p in sorted((folder / "out").rglob("*")) if p.is_file()}}


def merged(folder: Path) -> Any:
    """The merged tables of a shard directory."""
    return {"rows": [table(folder / f"shards/{name}.parquet") for name in ("tiles", "images")]}


def content(folder: Path) -> Any:
    """Of ``verify``: everything that it has checked, as read by others."""
    shards = folder / "shards"
    tables = [table(p) for p in sorted(shards.glob("*.parquet"))]
    texts = [json.loads((shards / "shards.json").read_bytes())]
    return {"rows": [tables, texts, [sha256_file(p) for p in sorted(shards.glob("*.tar")) + sorted(shards.glob("*.idx"))]]}


def labels(folder: Path) -> Any:
    """A CSV of labels."""
    return {"rows": table(folder / "out.csv")}


def manifest(folder: Path) -> Any:
    """What ``prepare`` wrote."""
    return {"rows": table(folder / "out/manifest.parquet"), "words": table(folder / "out/problems.csv") or []}


def trained(folder: Path) -> Any:
    """The figures of a training but for its speed."""
    path = folder / "out/metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return {"rows": [{k: v for k, v in line.items() if not re.search("second|wait|time", k)} for line in lines]}


def evaluated(folder: Path) -> Any:
    """``metrics.json`` without paths; its counts of what was left out or repeated apart."""
    path = folder / "out/metrics.json"
    found = json.loads(path.read_text().replace(str(folder), "")) if path.is_file() else {}
    return {"words": found.pop("counts", None), "rows": found}
