"""One self-contained page of everything a run's folder holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import yaml

from mammostream.common.errors import BadInput
from mammostream.common.files import parquet_facts, write_text
from mammostream.common.machine import versions
from mammostream.shards.reading import SHARDS_JSON, open_shards
from mammostream.train.report.errors import Case, worst_errors
from mammostream.train.report.pictures import (
    PICTURE_BYTES,
    PICTURES_OF_A_FOLDER,
    Picture,
    curves,
    embed,
    folder_pictures,
    heat_map_scores,
)
from mammostream.train.run.charts import read_metrics

_DEPTH = 2
_ROWS = 200  # of a table
_PACKAGES = ("mammostream", "torch", "torchvision", "numpy", "scikit-image", "webdataset")
# Kinds of sections in the order of the pipeline, whatever the folders are called.
_KINDS = (
    *("Films", "Data", "Pre-training", "Probe", "Cross-validation", "Fine-tuning", "Predictions", "Evaluation", "Errors"),
    "Pictures",
)
ERRORS = 5  # films of each class and kind


@dataclass
class _Section:
    """What a folder of the run shows."""

    kind: str
    name: str
    facts: list[tuple[str, str]] = field(default_factory=list)  # name and value, for the top of the page
    alarms: list[str] = field(default_factory=list)
    tables: list[dict[str, Any]] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    left_out: int = 0
    cases: list[Case] = field(default_factory=list)
    note: str = ""
    config: str = ""


def write_report(run_dir: Path, output: Path, errors: int = ERRORS) -> int:
    """Write the page and return how many pictures it holds.

    Each folder of the run (itself and two levels down) becomes a section by what lies in it: ``shards.json``,
    ``metrics.json``, ``metrics.jsonl``, ``probe.json``, ``predictions.parquet``, ``*.png``, ``config.yaml``. Pictures are
    embedded: the page needs no other file and no network. Large ones are shrunk, and of many the last are only counted. Of each
    evaluation the worst `errors` false negatives and false positives of each class are shown, film by film; 0 for none.

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
    sections += _error_sections(run_dir, errors)
    sections.sort(key=lambda section: _KINDS.index(section.kind))
    _bound_pictures(sections)
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html").render(
        title=run_dir.resolve().name,
        sections=sections,
        table_of=table_of,
        simulated=_is_simulated(run_dir),
        versions=versions(_PACKAGES),
    )
    write_text(output, page)
    return sum(len(section.pictures) + sum(case.picture is not None for case in section.cases) for section in sections)


def _folders(run_dir: Path) -> list[Path]:
    found = [run_dir]
    for depth in range(1, _DEPTH + 1):
        found += sorted(p for p in run_dir.glob("/".join("*" * depth)) if p.is_dir())
    return found


def _section(folder: Path, run_dir: Path) -> _Section | None:
    section = _Section("Pictures", folder.relative_to(run_dir).as_posix())
    scores: dict[str, float] = {}
    if (folder / "contact_sheet.png").is_file() or (folder / "contact_sheet_001.png").is_file():
        section.kind = "Films"
    if (folder / "metrics.json").is_file():
        _add_metrics(section, json.loads((folder / "metrics.json").read_text(encoding="utf-8")))
    if (folder / SHARDS_JSON).is_file():
        _add_shards(section, folder)
    if (folder / "image_predictions.parquet").is_file():
        scores = _add_predictions(section, folder)
    if (folder / "folds.json").is_file():
        _add_folds(section, json.loads((folder / "folds.json").read_text(encoding="utf-8")))
    if (folder / "probe.json").is_file():
        _add_probe(section, json.loads((folder / "probe.json").read_text(encoding="utf-8")))
    if (folder / "metrics.jsonl").is_file():
        _add_training(section, read_metrics(folder / "metrics.jsonl"))
    found = folder_pictures(folder, scores)
    section.pictures += [embed(path) for path in found[:PICTURES_OF_A_FOLDER]]
    section.left_out = len(found[PICTURES_OF_A_FOLDER:])
    if not section.tables and not section.pictures:
        return None
    if (folder / "config.yaml").is_file():
        section.config = (folder / "config.yaml").read_text(encoding="utf-8")
    return section


def _error_sections(run_dir: Path, limit: int) -> list[_Section]:
    """Return a section of misjudged films for each evaluation; those of the same predictions and labels share one."""
    sections: list[_Section] = []
    shown: set[tuple[str, ...]] = set()
    for folder in _folders(run_dir) if limit else []:
        if not (folder / "roc.png").is_file() or not (folder / "metrics.json").is_file():
            continue
        found = worst_errors(folder, run_dir, limit)
        if found.source and found.source in shown:
            continue
        shown.add(found.source)
        section = _Section("Errors", folder.relative_to(run_dir).as_posix(), cases=found.cases, note=found.note)
        if found.counts is not None:
            caption = f"Misjudged films; below, the {limit} most confident ones of each class and kind"
            section.tables.append(table_of(caption, found.counts))
        sections.append(section)
    return sections


def _bound_pictures(sections: list[_Section]) -> None:
    """Leave out pictures past the page's limit, from each section's end, so that no section loses its first ones."""
    room = PICTURE_BYTES
    for case in (case for section in sections for case in section.cases):
        picture = case.picture
        if picture is not None and room - picture.size < PICTURE_BYTES // 2:
            case.picture, case.note = None, f"Its heat map, {picture.file}, is left out: the page is full."
        elif picture is not None:
            room -= picture.size
    rank = 0
    while any(len(section.pictures) > rank for section in sections):
        for section in sections:
            if len(section.pictures) > rank:
                room -= section.pictures[rank].size
                if room < 0:
                    section.left_out += len(section.pictures) - rank
                    del section.pictures[rank:]
        rank += 1


def _add_training(section: _Section, lines: list[dict[str, Any]]) -> None:
    """Add the curves of a training, its last epoch, and its alarms."""
    section.pictures += curves(lines)
    readings = [line for line in lines if "collapse" in line]
    rang = [line["step"] for line in readings if line["collapse"]]
    if rang:
        section.alarms.append(f"the collapse alarm rang at {len(rang)} of {len(readings)} readings, first at step {rang[0]}")
    if section.kind == "Pictures":  # without its metrics.json, which a fine-tuning writes at its end
        section.kind = "Fine-tuning" if any("val_loss" in line for line in lines) else "Pre-training"
    if section.kind != "Pre-training":
        return
    last = next((line for line in reversed(lines) if "epoch_mean/loss" in line), None)
    if last is None:
        return
    figures = {name.removeprefix("epoch_mean/"): value for name, value in last.items()}
    section.tables.append(table_of("Last epoch", _pairs(figures)))
    names = {"loss": "BYOL loss", "z_std": "z_std (near 0: collapsed)", "effective_rank": "effective rank"}
    section.facts += [(text, _cell(figures[name])) for name, text in names.items() if figures.get(name) is not None]


def _add_metrics(section: _Section, metrics: dict[str, Any]) -> None:
    rows = []
    for name, figures in metrics["per_class"].items():
        interval = figures["intervals"]["auc"]
        spread = f"{interval[0]:.3f} - {interval[1]:.3f}" if interval else ""
        rows.append(
            {
                "class": name,
                "AUC": figures["auc"],
                "95 % interval": spread,
                "AP": figures["ap"],
                "balanced accuracy": figures.get("balanced_accuracy"),
                "Brier": figures.get("brier"),
                "ECE": figures.get("ece"),
                "positive": figures["positives"],
                "negative": figures["negatives"],
            }
        )
        if figures["auc"] is not None:
            section.facts.append((f"AUC {name}", f"{figures['auc']:.3f}" + (f" ({spread})" if spread else "")))
    frame = pd.DataFrame(rows).dropna(axis="columns", how="all")
    if "epoch" not in metrics:
        section.kind = "Evaluation"
        what = f"{metrics['rows']} {metrics['level']}s of {metrics['patients']} patients"
        section.tables.append(table_of(f"Evaluation of {what}, intervals over patients", frame))
        return
    section.kind = "Fine-tuning"
    caption = (
        f"Validation after the last epoch ({metrics['epoch']}), {metrics['films']} films of {metrics['patients'] or 'unknown'} "
        f"patient(s), intervals over {metrics['intervals_over']}; the last epoch is reported, not the best one on these films"
    )
    section.tables.append(table_of(caption, frame))


def _add_shards(section: _Section, folder: Path) -> None:
    section.kind = "Data"
    shards = open_shards(folder)
    images = shards.images()
    counts = [c for c in images.columns if c.startswith(("candidates", "rejected", "kept", "clusters", "guide"))]
    of_split = images.groupby("split", sort=False)
    failed = images[images["reason"] != ""]
    totals = of_split[counts].sum().astype(int).T
    totals.loc["films"] = of_split.size()
    totals.loc["failed films"] = failed.groupby("split").size().reindex(totals.columns, fill_value=0)
    totals = totals.astype(int).reset_index(names="").replace({"": _COUNTS})
    films = images[["image_id", "split", "side", "segmentation", "pixel_spacing_mm", "candidates", "kept", "flags"]]
    made = {k: v for k, v in shards.preprocessing.items() if v is not None}
    tables = [table_of("Tiles by split: candidates, why they went, which rule kept them", totals)]
    if len(failed):
        tables.append(table_of("Failed films", failed[["image_id", "split", "reason"]]))
    tables += [
        table_of("Films", films[images["reason"] == ""]),
        table_of("How tiles were made", _pairs(made | {f"version of {n}": v for n, v in _versions(shards.meta).items()})),
    ]
    section.tables += tables
    kept = of_split["kept"].sum()
    section.facts += [
        ("films", f"{len(images)}" + (f", {len(failed)} failed" if len(failed) else "")),
        ("tiles", " + ".join(f"{int(n):,} {split}" for split, n in kept.items())),
    ]


_COUNTS = {
    "rejected_intensity": "rejected: too dark",
    "rejected_nonzero": "rejected: too much black",
    "rejected_rules": "rejected: no rule met",
    "rejected_pectoral": "rejected: too much pectoral muscle",
    "rejected_limit": "rejected: over the limit a film",
    "rejected_duplicate": "rejected: the film is a copy of another",
    "kept_breast_only": "kept by the breast rule alone",
    "kept_frequency_only": "kept by the frequency rule alone",
    "kept_both_rules": "kept by both rules",
    "kept_rescue": "rescue tiles, off the grid",
    "clusters": "clusters of specks",
    "clusters_unheld": "clusters that no tile holds",
    "guide_8bit_kept": "would be kept on the plain 8-bit scale",
}


def _versions(meta: Mapping[str, Any]) -> Mapping[str, str]:
    recipe = meta.get("recipe")
    return recipe.get("versions", {}) if isinstance(recipe, Mapping) else {}


def _add_predictions(section: _Section, folder: Path) -> dict[str, float]:
    """Add the table of images, those that failed first; return the heat maps' scores."""
    if section.kind != "Fine-tuning":  # a fold of a cross-validation predicts its test patients
        section.kind = "Predictions"
    path = folder / "image_predictions.parquet"
    images = pd.read_parquet(path)
    tiles = pq.read_metadata(folder / "predictions.parquet").num_rows
    classes = [c.removeprefix("max:") for c in images.columns if c.startswith("max:")]
    failed = images[images["reason"] != ""]
    if len(failed):
        section.tables.append(table_of("Images that failed", failed[["image_id", "reason"]]))
    scores = [c for c in images.columns if c.partition(":")[2] in classes]
    good = images[images["reason"] == ""]
    if classes:
        good = good.sort_values(f"max:{classes[0]}", ascending=False, kind="stable")
    caption = f"Predictions: {tiles} tiles of {len(good)} images, highest first"
    section.tables.append(table_of(caption, good[["image_id", "tiles", *scores]]))
    facts = parquet_facts(path)
    known = {
        name: facts[name] for name in ("model_sha256", "temperature", "thresholds", "precision", "versions") if facts.get(name)
    }
    if known:
        section.tables.append(table_of("Predicted with", _pairs(known)))
    also = f", {len(failed)} failed" if len(failed) else ""
    section.facts.append((f"images predicted in {section.name}", f"{len(good)}{also}"))
    return heat_map_scores(good, classes)


def _add_folds(section: _Section, summary: Mapping[str, Any]) -> None:
    """Add the figures of a cross-validation: of each fold, and of all predictions together."""
    section.kind = "Cross-validation"
    rows = []
    for level, scores in summary["levels"].items():
        for score, found in scores.items():
            for name, pooled in found["pooled"]["per_class"].items():
                auc, ap = (found["folds"]["per_class"][name][figure] for figure in ("auc", "ap"))
                interval = pooled["intervals"]["auc"]
                row = {"level": level, "score": score, "class": name, "AUC, mean of folds": auc["mean"], "sd": auc["sd"]}
                row |= {f"fold {fold}": value for fold, value in enumerate(auc["values"])}
                row |= {"AUC, pooled": pooled["auc"], "95 % interval": "{:.3f} - {:.3f}".format(*interval) if interval else ""}
                row |= {"AP, mean of folds": ap["mean"], "AP, pooled": pooled["ap"]}
                rows.append(row | {"positive": pooled["positives"], "negative": pooled["negatives"]})
    sizes = ", ".join(map(str, summary["patients"]))
    caption = f"Cross-validation, {summary['folds']} folds of {sizes} patients; intervals over patients"
    section.tables.insert(0, table_of(caption, pd.DataFrame(rows)))


def _add_probe(section: _Section, probe: Mapping[str, Any]) -> None:
    section.kind = "Probe"
    rows = pd.DataFrame(probe["rows"])
    columns = ["network", "probe", "level", "class", "share", "auc", "sd", "low", "high", "patients"]
    frame = rows[[c for c in columns if c in rows]].rename(columns={"share": "share of the labels", "auc": "AUC"})
    what = "AUC of probes on frozen features, mean over seeds, 95 % intervals over patients"
    caption = ". ".join([what, *probe.get("notes", ())])
    section.tables.append(table_of(caption, frame))


def table_of(caption: str, frame: pd.DataFrame) -> dict[str, Any]:
    """Return a table as the page's template takes it, of its first rows."""
    if len(frame) > _ROWS:
        caption = f"{caption} (the first {_ROWS} of {len(frame)} rows)"
    figures = [pd.api.types.is_numeric_dtype(column) and column.dtype != bool for _, column in frame.items()]
    rows = [list(zip(map(_cell, row), figures, strict=True)) for row in frame.head(_ROWS).to_numpy(object)]
    return {"caption": caption, "columns": [str(c) for c in frame.columns], "rows": rows}


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_cell(item)}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    if value is None or isinstance(value, float) and pd.isna(value):
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _pairs(mapping: Mapping[str, Any]) -> pd.DataFrame:
    return pd.DataFrame(list(mapping.items()), columns=["", "value"], dtype=object)


def _is_simulated(run_dir: Path) -> bool:
    """Whether the run's truth was planted: then the page says so at the top."""
    for path in run_dir.glob("*/config.yaml"):
        config = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        if any("simulated" in str(name) for name in config.get("class_names") or ()):
            return True
    return False
