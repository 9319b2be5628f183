"""One self-contained page of everything a run's folder holds."""

from __future__ import annotations

import base64
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from common.errors import BadInput
from common.files import write_text
from shards.reading import SHARDS_JSON, open_shards
from train.infer import PROBABILITY
from train.pictures import read_metrics

_DEPTH = 2
_PICTURES, _ROWS = 24, 200  # of a folder and of a table: a page of thousands opens nowhere
_PACKAGES = ("mammostream", "torch", "torchvision", "numpy", "scikit-image", "webdataset")


def write_report(run_dir: Path, output: Path) -> int:
    """Write the page and return how many pictures it holds.

    Each folder of the run (itself and two levels down) becomes a section by what lies in it: ``shards.json``,
    ``metrics.json``, ``metrics.jsonl``, ``predictions.parquet``, ``*.png``, ``config.yaml``. Pictures are embedded: the page
    needs no other file and no network.

    Raises
    ------
    BadInput
        The folder is missing or holds nothing of a run.
    """
    if not run_dir.is_dir():
        raise BadInput(f"run folder {run_dir} does not exist; give the --output-dir of a command")
    sections = [section for folder in _folders(run_dir) if (section := _section(folder, run_dir))]
    if not sections:
        raise BadInput(f"{run_dir} holds nothing of a run (no shards.json, metrics or pictures); give a command's --output-dir")
    # Along the road, whatever the folders are called; pictures first, since people would rather look than read.
    sections.sort(key=lambda s: s["order"])
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    page = environment.get_template("report.html").render(
        title=run_dir.resolve().name, sections=sections, simulated=_is_simulated(run_dir), versions=versions
    )
    write_text(output, page)
    return sum(len(section["pictures"]) for section in sections)


def _folders(run_dir: Path) -> list[Path]:
    found = [run_dir]
    for depth in range(1, _DEPTH + 1):
        found += sorted(p for p in run_dir.glob("/".join("*" * depth)) if p.is_dir())
    return found


def _section(folder: Path, run_dir: Path) -> dict[str, Any] | None:
    tables: list[dict[str, Any]] = []
    order = 9
    if (folder / "metrics.json").is_file():
        tables.append(_metrics_table(json.loads((folder / "metrics.json").read_text(encoding="utf-8"))))
        order = 4
    if (folder / SHARDS_JSON).is_file():
        tables += _shard_tables(folder)
        order = 2
    if (folder / "image_predictions.parquet").is_file():
        tables.append(_prediction_table(folder))
        order = 5
    if (folder / "metrics.jsonl").is_file() and not tables:
        last = [line for line in read_metrics(folder / "metrics.jsonl") if "epoch_mean/loss" in line][-1:]
        tables += [_table("Last epoch", _pairs({k.removeprefix("epoch_mean/"): v for k, v in line.items()})) for line in last]
        order = 3
    found = sorted(folder.glob("*.png"))
    pictures = [{"name": path.stem, "data": base64.b64encode(path.read_bytes()).decode()} for path in found[:_PICTURES]]
    if not tables and not pictures:
        return None
    config = folder / "config.yaml"
    return {
        "name": folder.relative_to(run_dir).as_posix(),
        "order": order if tables else 1,
        "tables": tables,
        "pictures": pictures,
        "left_out": len(found) - len(pictures),
        "config": config.read_text(encoding="utf-8") if config.is_file() else "",
    }


def _table(caption: str, frame: pd.DataFrame) -> dict[str, Any]:
    if len(frame) > _ROWS:
        caption = f"{caption} (the first {_ROWS} of {len(frame)} rows)"
    rows = [[_cell(value) for value in row] for row in frame.head(_ROWS).to_numpy(object)]
    return {"caption": caption, "columns": [str(c) for c in frame.columns], "rows": rows}


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if pd.isna(value) else f"{value:.4g}"
    return str(value)


def _pairs(mapping: dict[str, Any]) -> pd.DataFrame:
    return pd.DataFrame(list(mapping.items()), columns=["", "value"])


def _metrics_table(metrics: dict[str, Any]) -> dict[str, Any]:
    rows = []
    for name, figures in metrics["per_class"].items():
        interval = figures["intervals"]["auc"]
        rows.append(
            {
                "class": name,
                "AUC": figures["auc"],
                "95 % interval": f"{interval[0]:.3f} - {interval[1]:.3f}" if interval else "",
                "AP": figures["ap"],
                "positive": figures["positives"],
                "negative": figures["negatives"],
            }
        )
    frame = pd.DataFrame(rows)
    if "epoch" not in metrics:
        what = f"{metrics['rows']} {metrics['level']}s of {metrics['patients']} patients"
        return _table(f"Evaluation of {what}, intervals over patients", frame)
    caption = (
        f"Validation after the last epoch ({metrics['epoch']}), {metrics['films']} films of {metrics['patients'] or 'unknown'} "
        f"patient(s), intervals over {metrics['intervals_over']}; the last epoch is reported, not the best one on these films"
    )
    return _table(caption, frame)


def _shard_tables(folder: Path) -> list[dict[str, Any]]:
    shards = open_shards(folder)
    images = shards.images()
    counts = [c for c in images.columns if c.startswith(("candidates", "rejected", "kept", "guide"))]
    totals = images.groupby("split", sort=False)[counts].sum().astype(int).T.reset_index(names="tiles")
    films = images[["image_id", "split", "side", "segmentation", "pixel_spacing_mm", "kept", "flags", "reason"]]
    made = {k: v for k, v in shards.preprocessing.items() if v is not None}
    return [
        _table("Tiles by split: candidates, why they went, which rule kept them", totals),
        _table("Films", films),
        _table("How tiles were made", _pairs(made)),
    ]


def _prediction_table(folder: Path) -> dict[str, Any]:
    images = pd.read_parquet(folder / "image_predictions.parquet")
    tiles = pd.read_parquet(folder / "predictions.parquet")
    classes = [c.removeprefix(PROBABILITY) for c in tiles.columns if c.startswith(PROBABILITY)]
    columns = ["image_id", "tiles", *(f"max:{c}" for c in classes), *(f"top3:{c}" for c in classes), "reason"]
    return _table(f"Predictions: {len(tiles)} tiles of {len(images)} images", images[columns])


def _is_simulated(run_dir: Path) -> bool:
    """Whether the run's truth was planted: then the page says so at the top."""
    for path in run_dir.glob("*/config.yaml"):
        config = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        if any("simulated" in str(name) for name in config.get("class_names") or ()):
            return True
    return False
