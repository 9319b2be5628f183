"""A film read and cut into tiles for a shard: their rows, their pixels, and what is recorded of the film."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pandas as pd

from mammostream.preprocess.backend import backend_of
from mammostream.preprocess.reading import Mammogram, read_mammogram
from mammostream.preprocess.tiling import Film, tile_film
from mammostream.shards.archive import tile_key
from mammostream.shards.build.plan import BuildPlan, ShardPlan

# A film's row of images.parquet, and its tiles: their rows of tiles.parquet, and their pixels (H, W) uint8 or uint16.
FilmTiles = tuple[dict[str, Any], list[tuple[dict[str, Any], np.ndarray]]]


def read_film(row: dict[str, Any], plan: BuildPlan) -> Mammogram:
    """Read a film with the view and the spacing of its row in the manifest, onto the GPU where the build runs there."""
    mammogram = read_mammogram(row["path"], plan.film_config, plan.recipe["options"]["device"]).with_view(row["view"])
    if pd.isna(row["pixel_spacing_mm"]):
        return mammogram
    return mammogram.with_spacing(float(row["pixel_spacing_mm"]), row["spacing_source"])


def cut_film(plan: BuildPlan, shard: ShardPlan, row: dict[str, Any], mammogram: Mammogram) -> FilmTiles:
    """Segment a film and cut its tiles."""
    film = tile_film(mammogram, plan.film_config)
    size = plan.film_config.tile_size
    tiles = []
    for index in range(len(film.tiles.x)):
        x, y, native_size = film.native_box(index, size)
        record = {
            "key": tile_key(row["image_id"], y, x),
            "shard": shard.name,
            "image_id": row["image_id"],
            "patient_id": row["patient_id"],
            "split": shard.split,
            "x": x,
            "y": y,
            "size": native_size,
            "breast_ratio": film.tiles.breast_ratio[index],
            "freq_energy": film.tiles.freq_energy[index],
            "mean_intensity": film.tiles.mean_intensity[index],
            "nonzero_ratio": film.tiles.nonzero_ratio[index],
            "pectoral_ratio": film.tiles.pectoral_ratio[index],
            "rule": film.selection.rule[index],
        }
        tiles.append((record, film.cut(index, size, plan.bits)))
    return image_row(row, shard) | _film_facts(row, mammogram, film), tiles


def image_row(row: dict[str, Any], shard: ShardPlan) -> dict[str, Any]:
    """Return what images.parquet tells of a film before it is read."""
    spacing = row["pixel_spacing_mm"]
    return {
        **{name: row[name] for name in ("image_id", "patient_id", "split", "laterality", "view", "spacing_source")},
        "pixel_spacing_mm": None if pd.isna(spacing) else spacing,
        "shard": shard.name,
        "reason": "",
        "flags": "",
        "remarks": "",
        "kept": 0,
        "rejected_duplicate": 0,
    }


def _film_facts(row: dict[str, Any], mammogram: Mammogram, film: Film) -> dict[str, Any]:
    header, segmentation = mammogram.header, film.segmentation
    flags = list(film.flags)
    if row["laterality"] and segmentation.side and row["laterality"] != segmentation.side:
        flags.append("side_disagrees")
    reason = "" if film.selection.counts["kept"] else "no tile passed the gates and rules"
    return {
        "height": header.height,
        "width": header.width,
        "bits": header.bits,
        "pixel_spacing_mm": header.spacing_mm,
        "spacing_source": header.spacing_source,
        "mapping": film.mapping,
        "side": segmentation.side,
        "segmentation": segmentation.method,
        "breast_area_mm2": segmentation.area_mm2,
        "plausibility": segmentation.plausibility,
        "fog_mm2": segmentation.fog_mm2,
        "pectoral_area_mm2": film.pectoral_area_mm2,
        "guide_8bit_kept": film.guide_8bit_kept,
        "lossy": header.lossy,
        "pixels_hash": pixels_hash(mammogram.pixels),
        "flags": " ".join(flags),
        "remarks": "; ".join(f"{flag}: {particulars}" for flag, particulars in film.remarks.items()),
        "reason": "no breast found" if "no_breast" in flags else reason,
    } | film.selection.counts


def pixels_hash(pixels: Any) -> str:
    """Return a hash of decoded pixels, (H, W) uint8 or uint16 in NumPy or CuPy: the same for all files that hold them."""
    values = np.ascontiguousarray(backend_of(pixels).to_host(pixels))
    digest = hashlib.sha256(f"{values.shape} {values.dtype.itemsize}".encode())  # processors have instructions for it
    digest.update(values.data)
    return digest.hexdigest()[:32]
