"""Building shards: one shard is a pure function of the plan; the directory is whatever shards are finished."""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from common.errors import BadInput
from common.files import make_folder, sha256_file, write_json, write_parquet
from common.progress import progress
from preprocess.reading import Mammogram, ReadingConfig, read_mammogram
from preprocess.tiling import Film, tile_film
from shards.archive import tile_key, write_archive
from shards.codecs import META_EXTENSION, NUMBER_EXTENSION, encode, encode_number, pixel_crc32
from shards.plan import TILES_PER_SHARD_LIMIT, BuildPlan, ShardPlan
from shards.reading import FORMAT_VERSION, SHARDS_JSON
from shards.tables import read_shard_table, write_shard_table


@dataclass(frozen=True)
class ShardSummary:
    """What one shard came to."""

    ordinal: int
    images: int
    bad_images: int
    tiles: int


@dataclass(frozen=True)
class _Tile:
    """A tile waiting to be written: its table row, and where its encoded bytes lie in the spool."""

    row: dict[str, Any]
    offset: int
    size: int


def build_shard(plan: BuildPlan, ordinal: int) -> ShardSummary:
    """Build one shard of a plan: tar, index, and last the table that marks it as finished.

    The same plan, device kind and library versions give the same bytes, whoever runs it. A finished shard is left as it is.

    Raises
    ------
    BadInput
        The directory cannot be written, or holds this shard built with other options (the option is named).
    """
    shard = plan.shards[ordinal]
    table_path = plan.output_dir / f"{shard.name}.parquet"
    finished = finished_shard(plan, ordinal)
    if finished:
        return finished
    make_folder(plan.output_dir)
    tiles: list[_Tile] = []
    images: list[dict[str, Any]] = []
    # Encoded tiles wait on disk, not in memory: they are written in shuffled order, which is known only at the end.
    with tempfile.TemporaryFile(dir=plan.output_dir) as spool:
        for row in shard.rows:
            try:
                mammogram = _load(row, plan.config, plan.recipe["options"]["device"])
                film = tile_film(mammogram, plan.config)
            except BadInput as error:
                # By its id, not its path: where the data lies is no part of a shard, and folders may name patients.
                reason = str(error).replace(str(row["path"]), row["image_id"])
                images.append(_image_row(row, shard) | {"reason": reason})
                continue
            images.append(_image_row(row, shard) | _film_facts(row, mammogram, film))
            tiles += _spool_tiles(plan, shard, row, film, spool)
        if len(tiles) > TILES_PER_SHARD_LIMIT:
            raise BadInput(
                f"shard {shard.name} has {len(tiles)} tiles, more than {TILES_PER_SHARD_LIMIT}; lower --images-per-shard"
            )
        # DALI shuffles through a buffer only, so neighbours of one film must not lie together.
        order = np.random.default_rng((plan.config.seed, ordinal)).permutation(len(tiles))
        rows = []
        for position, index in enumerate(order):
            rows.append(tiles[index].row | {"tile": ordinal * TILES_PER_SHARD_LIMIT + position})
        metadata = {"config_hash": plan.config_hash, "recipe": plan.recipe, "ordinal": ordinal, "split": shard.split}
        if tiles:
            tar_path = plan.output_dir / f"{shard.name}.tar"
            spooled = [tiles[index] for index in order]
            write_archive(tar_path, _samples(rows, spooled, spool, plan.config.codec))
            metadata["tar_sha256"] = sha256_file(tar_path)
            metadata["idx_sha256"] = sha256_file(tar_path.with_suffix(".idx"))
            metadata["tar_bytes"] = tar_path.stat().st_size
    write_shard_table(table_path, rows, images, metadata)
    return ShardSummary(ordinal, len(images), sum(bool(i["reason"]) for i in images), len(rows))


def finished_shard(plan: BuildPlan, ordinal: int) -> ShardSummary | None:
    """Return what a finished shard came to, or None where it is not finished.

    Raises
    ------
    BadInput
        It was built with other options, films or library versions.
    """
    path = plan.output_dir / f"{plan.shards[ordinal].name}.parquet"
    if not path.is_file():
        return None
    tiles, images, metadata = read_shard_table(path)
    if metadata["config_hash"] != plan.config_hash:
        raise BadInput(
            f"{path} was built with {_difference(metadata['recipe'], plan.recipe)}; use the same, or another --output-dir"
        )
    bad = pc.sum(pc.not_equal(images.column("reason"), "")).as_py() or 0
    return ShardSummary(ordinal, len(images), bad, len(tiles))


def build_all(plan: BuildPlan, workers: int, split: str | None = None) -> list[ShardSummary]:
    """Build every shard (of a split) that is not finished, with a progress bar; return summaries in shard order."""
    shards = [shard for shard in plan.shards if split in (None, shard.split)]
    summaries: dict[int, ShardSummary] = {}
    for shard in shards:
        if finished := finished_shard(plan, shard.ordinal):
            summaries[shard.ordinal] = finished
    todo = [shard.ordinal for shard in shards if shard.ordinal not in summaries]
    bar = progress(None, "building shards", "film", total=sum(len(s.rows) for s in shards))
    bar.update(sum(s.images for s in summaries.values()))
    with bar:
        for summary in _run(plan, todo, workers):
            summaries[summary.ordinal] = summary
            bar.update(summary.images)
            bar.set_postfix(tiles=sum(s.tiles for s in summaries.values()))
    return [summaries[ordinal] for ordinal in sorted(summaries)]


def _run(plan: BuildPlan, ordinals: Sequence[int], workers: int) -> Iterator[ShardSummary]:
    if workers <= 1 or len(ordinals) <= 1:
        yield from (build_shard(plan, ordinal) for ordinal in ordinals)
        return
    # Fresh interpreters: a forked child of a process with threads or a CUDA context may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(ordinals)), mp_context=context) as pool:
        try:
            for future in as_completed([pool.submit(build_shard, plan, ordinal) for ordinal in ordinals]):
                yield future.result()
        except BrokenProcessPool:
            # The pool overlooks a worker that was starting when the other died, and would wait for it for ever.
            for child in multiprocessing.active_children():
                child.terminate()
            raise BadInput(
                "a worker process was killed, perhaps for want of memory; run the same command again, with fewer --workers: "
                "finished shards are kept"
            ) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def finish(plan: BuildPlan, split: str | None = None) -> dict[str, Any]:
    """Merge the shards' tables into ``tiles.parquet``, ``images.parquet`` and ``shards.json``; return the latter.

    With a split, shards of other splits are merged where they are finished and left out where they are not.

    Raises
    ------
    BadInput
        A shard (of the split) is not finished.
    """
    tables, shards = [], []
    for shard in plan.shards:
        path = plan.output_dir / f"{shard.name}.parquet"
        if not path.is_file() and split not in (None, shard.split):
            continue
        if not path.is_file():
            raise BadInput(f"shard {shard.name} is not finished; run the same 'mammostream shards build' again")
        tiles, images, metadata = read_shard_table(path)
        tables.append((tiles, images))
        facts = {key: metadata.get(key) for key in ("tar_sha256", "idx_sha256", "tar_bytes")}
        shards.append({"name": shard.name, "split": shard.split, "tiles": len(tiles), "images": len(images)} | facts)
    write_parquet(plan.output_dir / "tiles.parquet", pa.concat_tables([t for t, _ in tables]))
    write_parquet(plan.output_dir / "images.parquet", pa.concat_tables([i for _, i in tables]))
    meta = {
        "format_version": FORMAT_VERSION,
        "codec": plan.config.codec,
        "bits": plan.bits,
        "preprocessing": plan.preprocessing | {"shard_config_hash": plan.config_hash},
        "recipe": plan.recipe,
        "shards": shards,
    }
    write_json(plan.output_dir / SHARDS_JSON, meta)
    return meta


def _load(row: dict[str, Any], config: ReadingConfig, device: str) -> Mammogram:
    """Read a film with the manifest's spacing, onto the GPU where the build runs there."""
    mammogram = read_mammogram(row["path"], config, device)
    if not pd.isna(row["pixel_spacing_mm"]):
        mammogram = mammogram.with_spacing(float(row["pixel_spacing_mm"]), row["spacing_source"])
    return mammogram


def _spool_tiles(plan: BuildPlan, shard: ShardPlan, row: dict[str, Any], film: Film, spool: IO[bytes]) -> list[_Tile]:
    """Cut and encode a film's tiles into the spool and return their rows."""
    size = plan.config.tile_size
    spooled = []
    for index in range(len(film.tiles.x)):
        pixels = film.cut(index, size, plan.bits)
        data = encode(pixels, plan.config.codec)
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
            "rule": film.selection.rule[index],
            "crc32": pixel_crc32(pixels),
            "payload_crc32": zlib.crc32(data),
        }
        spooled.append(_Tile(record, spool.tell(), len(data)))
        spool.write(data)
    return spooled


def _samples(
    rows: list[dict[str, Any]], tiles: list[_Tile], spool: IO[bytes], codec: str
) -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    for row, tile in zip(rows, tiles, strict=True):
        spool.seek(tile.offset)
        meta = {name: row[name] for name in ("tile", "key", "image_id", "x", "y", "size")}
        yield (
            row["key"],
            [
                (codec, spool.read(tile.size)),
                (NUMBER_EXTENSION, encode_number(row["tile"])),
                (META_EXTENSION, json.dumps(meta, sort_keys=True).encode()),
            ],
        )


def _image_row(row: dict[str, Any], shard: ShardPlan) -> dict[str, Any]:
    spacing = row["pixel_spacing_mm"]
    return {
        **{name: row[name] for name in ("image_id", "patient_id", "split", "laterality", "view", "spacing_source")},
        "pixel_spacing_mm": None if pd.isna(spacing) else spacing,
        "shard": shard.name,
        "reason": "",
        "flags": "",
        "kept": 0,
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
        "guide_8bit_kept": film.guide_8bit_kept,
        "flags": " ".join(flags),
        "reason": "no breast found" if "no_breast" in flags else reason,
    } | film.selection.counts


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Name the first thing in which two recipes differ."""
    for name, value in new["options"].items():
        if old["options"].get(name) != value:
            return f"--{name.replace('_', '-')} {old['options'].get(name)}, not {value}"
    for name, value in new["versions"].items():
        if old["versions"].get(name) != value:
            return f"{name} {old['versions'].get(name)}, not {value}"
    return "another manifest" if old["manifest"] != new["manifest"] else "another version of the shard format"
