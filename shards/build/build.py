"""Building shards: one shard is a pure function of the plan; the directory is whatever shards are finished."""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

import numpy as np

from mammostream.common.errors import BadInput, first_line
from mammostream.common.files import make_folder, sha256_file, writing
from mammostream.common.progress import progress
from mammostream.common.temporaries import spool_file
from mammostream.shards.archive import write_archive
from mammostream.shards.build.film_tiles import FilmTiles, cut_film, image_row, read_film
from mammostream.shards.build.launch import ALONE, Launcher
from mammostream.shards.build.plan import TILES_PER_SHARD_LIMIT, BuildPlan, ShardPlan, library_versions
from mammostream.shards.codecs import (
    CODECS,
    META_EXTENSION,
    NUMBER_EXTENSION,
    check_encoded,
    decode,
    encode,
    encode_number,
    pixel_crc32,
)
from mammostream.shards.lock import lock_shards
from mammostream.shards.tables import read_shard_metadata, write_shard_table


@dataclass(frozen=True)
class ShardSummary:
    """What one shard came to."""

    ordinal: int
    images: int
    bad_images: int
    tiles: int


@dataclass(frozen=True)
class _Spooled:
    """A tile waiting to be written: its table row, and where its encoded bytes lie in the spool."""

    row: dict[str, Any]
    offset: int
    size: int


# What a film may be to blame for. Others, such as too little memory or a lost GPU, would recur with every film.
_FILM_FAULTS = (BadInput, ArithmeticError, LookupError, OSError, TypeError, ValueError)

Read = Callable[[dict[str, Any]], Any]

Cut = Callable[[BuildPlan, ShardPlan, dict[str, Any], Any], FilmTiles]


def build_shard(plan: BuildPlan, ordinal: int, *, threads: int = 1, check_every: int = 1) -> ShardSummary:
    """Build one shard of a plan: tar, index, and last the table that marks it as finished.

    The same plan, device kind and library versions give the same bytes, whoever runs it. A finished shard is left as it is.

    Parameters
    ----------
    plan
        The plan, or a part of it with this shard.
    ordinal
        Which shard.
    threads
        1 does everything in turn. More overlap it: this thread computes, one reads the next film, the others encode.
    check_every
        Decode every this many tiles with another library than encoded them, and compare, before anything is renamed.

    Raises
    ------
    BadInput
        The directory cannot be written, or holds this shard built with other options (the option is named); this process
        has other library versions than the plan.
    """
    return write_shard(plan, ordinal, partial(read_film, plan=plan), cut_film, threads=threads, check_every=check_every)


def write_shard(plan: BuildPlan, ordinal: int, read: Read, cut: Cut, *, threads: int = 1, check_every: int = 1) -> ShardSummary:
    """Write one shard of a plan whose films are read and cut by given functions; see :func:`build_shard`.

    Parameters
    ----------
    plan, ordinal, threads, check_every
        As for :func:`build_shard`.
    read
        Takes a film's row and returns what `cut` needs; may run in another thread, ahead of time. What it raises becomes
        the film's reason.
    cut
        Takes the plan, the shard, a film's row and what was read; returns the film's image row and its tiles. May raise
        likewise.
    """
    finished = finished_shard(plan, ordinal)
    if finished:
        return finished
    device = plan.recipe["options"]["device"]
    if difference := _first_difference(plan.recipe["versions"], library_versions(device)):
        raise BadInput(f"this worker has {difference[0]} {difference[2]}, the plan was made with {difference[1]}; install that")
    (shard,) = (s for s in plan.shards if s.ordinal == ordinal)
    make_folder(plan.output_dir)
    with (
        writing(plan.output_dir),
        # Encoded tiles wait on disk, not in memory: they are written in shuffled order, which is known only at the end.
        spool_file(plan.output_dir / shard.name) as spool,
        ThreadPoolExecutor(threads - 1) if threads > 1 else _InlineExecutor() as pool,
    ):
        tiles, images = _spool_films(plan, shard, read, cut, spool, pool, check_every)
        return _write_files(plan, shard, tiles, images, spool)


def _spool_films(
    plan: BuildPlan, shard: ShardPlan, read: Read, cut: Cut, spool: IO[bytes], pool: Executor, check_every: int
) -> tuple[list[_Spooled], list[dict[str, Any]]]:
    """Read, cut and encode a shard's films; return their tiles, whose bytes lie in the spool, and their image rows."""
    tiles: list[_Spooled] = []
    images: list[dict[str, Any]] = []
    count = 0
    encoding: list[tuple[dict[str, Any], Future[_Encoded]]] = []
    for row, reading in _ahead(pool, read, shard.rows):
        try:
            image, cut_tiles = cut(plan, shard, row, reading.result())
        except _FILM_FAULTS as error:
            said = str(error) if isinstance(error, BadInput) else f"{type(error).__name__}: {first_line(error)}"
            # By its id, not its path: where the data lies is no part of a shard, and folders may name patients.
            reason = said.replace(str(row["path"]), row["image_id"])
            image, cut_tiles = image_row(row, shard) | {"reason": reason}, []
        images.append(image)
        # The tiles of the film before were encoded while this one was computed.
        tiles += _spool(encoding, spool)
        encoding = []
        for record, pixels in cut_tiles:
            encoding.append((record, pool.submit(_encode, pixels, plan.config.codec, count % check_every == 0)))
            count += 1
    return tiles + _spool(encoding, spool), images


def _ahead(pool: Executor, function: Read, rows: tuple[dict[str, Any], ...]) -> Iterator[tuple[dict[str, Any], Future[Any]]]:
    """Yield each row with the future of ``function(row)``, the next one's already under way."""
    following = None
    for row, after in itertools.zip_longest(rows, rows[1:]):
        current = following or pool.submit(function, row)
        following = pool.submit(function, after) if after else None
        yield row, current


class _InlineExecutor(Executor):
    """Runs what is submitted at once, in the caller's thread."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


@dataclass(frozen=True)
class _Encoded:
    """A tile's bytes, and what its row tells of them."""

    data: bytes
    checksums: dict[str, int]


def _encode(pixels: np.ndarray, codec: str, check: bool) -> _Encoded:
    data = encode(pixels, codec)
    stored = pixels if CODECS[codec].lossless else decode(data, codec)
    if check:
        check_encoded(data, codec, stored)
    return _Encoded(data, {"crc32": pixel_crc32(stored), "payload_crc32": zlib.crc32(data)})


def _spool(encoding: list[tuple[dict[str, Any], Future[_Encoded]]], spool: IO[bytes]) -> list[_Spooled]:
    spooled = []
    for record, future in encoding:
        encoded = future.result()
        spooled.append(_Spooled(record | encoded.checksums, spool.tell(), len(encoded.data)))
        spool.write(encoded.data)
    return spooled


def _write_files(
    plan: BuildPlan, shard: ShardPlan, tiles: list[_Spooled], images: list[dict[str, Any]], spool: IO[bytes]
) -> ShardSummary:
    if len(tiles) > TILES_PER_SHARD_LIMIT:
        raise BadInput(
            f"shard {shard.name} has {len(tiles)} tiles, more than {TILES_PER_SHARD_LIMIT}; deal fewer films to each"
        )
    # DALI shuffles through a buffer only, so neighbours of one film must not lie together.
    order = np.random.default_rng((plan.config.seed, shard.ordinal)).permutation(len(tiles))
    first = shard.ordinal * TILES_PER_SHARD_LIMIT
    rows = [tiles[index].row | {"tile": first + position} for position, index in enumerate(order)]
    summary = ShardSummary(shard.ordinal, len(images), sum(bool(i["reason"]) for i in images), len(rows))
    metadata = {
        "config_hash": plan.config_hash,
        "recipe": plan.recipe,
        "ordinal": shard.ordinal,
        "split": shard.split,
        "counts": list(plan.counts.items()),
        "codec": plan.config.codec,
        "bits": plan.bits,
        "preprocessing": plan.preprocessing,
        "tiles": summary.tiles,
        "images": summary.images,
        "bad_images": summary.bad_images,
    }
    tar_path = plan.output_dir / f"{shard.name}.tar"
    if tiles:
        write_archive(tar_path, _samples(rows, [tiles[index] for index in order], spool, plan.config.codec))
        metadata["tar_sha256"] = sha256_file(tar_path)
        metadata["idx_sha256"] = sha256_file(tar_path.with_suffix(".idx"))
        metadata["tar_bytes"] = tar_path.stat().st_size
    else:
        for suffix in (".tar", ".idx"):  # of an earlier build whose table was deleted
            tar_path.with_suffix(suffix).unlink(missing_ok=True)
    write_shard_table(tar_path.with_suffix(".parquet"), rows, images, metadata)
    return summary


def finished_shard(plan: BuildPlan, ordinal: int) -> ShardSummary | None:
    """Return what a finished shard came to, or None where it is not finished.

    Raises
    ------
    BadInput
        It was built with other options, films or library versions.
    """
    (shard,) = (s for s in plan.shards if s.ordinal == ordinal)
    path = plan.output_dir / f"{shard.name}.parquet"
    if not path.is_file():
        return None
    metadata = read_shard_metadata(path)
    if metadata["config_hash"] != plan.config_hash:
        raise BadInput(
            f"{path} was built with {_difference(metadata['recipe'], plan.recipe)}; use the same, or another --output-dir"
        )
    return ShardSummary(ordinal, metadata["images"], metadata["bad_images"], metadata["tiles"])


def build_all(
    plan: BuildPlan,
    launcher: Launcher = ALONE,
    *,
    check_every: int = 1,
    build: Callable[..., ShardSummary] = build_shard,
) -> list[ShardSummary]:
    """Build every shard of a plan, or of a part of it, that is not finished; return the summaries in their order.

    Locks the shards against other builds and shows a progress bar.

    Parameters
    ----------
    plan
        The plan; :meth:`BuildPlan.select` gives a part of it.
    launcher
        Who builds.
    check_every
        See :func:`build_shard`.
    build
        What builds a shard; takes what :func:`build_shard` takes.

    Raises
    ------
    BadInput
        As :func:`build_shard`; or another build is at one of these shards.
    """
    if not plan.shards:
        return []
    make_folder(plan.output_dir)
    summaries: dict[int, ShardSummary] = {}
    with lock_shards(plan.output_dir, range(plan.shards[0].ordinal, plan.shards[-1].ordinal + 1)):
        for shard in plan.shards:
            if finished := finished_shard(plan, shard.ordinal):
                summaries[shard.ordinal] = finished
        # A task holds its own shard's films only: a whole plan with every task would take hours to send.
        todo = [plan.select(ordinals=range(s.ordinal, s.ordinal + 1)) for s in plan.shards if s.ordinal not in summaries]
        one = partial(_build_only_shard, build=build, threads=launcher.threads, check_every=check_every)
        films = sum(len(s.rows) for s in plan.shards)
        with progress(None, "building shards", "film", total=films, initial=sum(s.images for s in summaries.values())) as bar:
            tiles = 0
            for summary in launcher.run(one, todo):
                summaries[summary.ordinal] = summary
                tiles += summary.tiles
                bar.set_postfix_str(
                    f"{tiles / max(bar.format_dict['elapsed'], 1e-9):.0f} tiles/s, {tiles} tiles", refresh=False
                )
                bar.update(summary.images)
    return [summaries[ordinal] for ordinal in sorted(summaries)]


def _build_only_shard(part: BuildPlan, *, build: Callable[..., ShardSummary], threads: int, check_every: int) -> ShardSummary:
    return build(part, part.shards[0].ordinal, threads=threads, check_every=check_every)


def _samples(
    rows: list[dict[str, Any]], tiles: list[_Spooled], spool: IO[bytes], codec: str
) -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    for row, tile in zip(rows, tiles, strict=True):
        spool.seek(tile.offset)
        yield (
            row["key"],
            [
                (codec, spool.read(tile.size)),
                (NUMBER_EXTENSION, encode_number(row["tile"])),
                (META_EXTENSION, encode_meta(row)),
            ],
        )


def encode_meta(row: dict[str, Any]) -> bytes:
    """Encode what a tar tells of a tile, for readers that have no table."""
    return json.dumps({name: row[name] for name in ("tile", "key", "image_id", "x", "y", "size")}, sort_keys=True).encode()


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Name the first thing in which two recipes differ."""
    if found := _first_difference(old["options"], new["options"]):
        return f"--{found[0].replace('_', '-')} {found[1]}, not {found[2]}"
    if found := _first_difference(old["versions"], new["versions"]):
        return "{} {}, not {}".format(*found)
    return "another manifest" if old["manifest"] != new["manifest"] else "another version of the shard format"


def _first_difference(old: dict[str, Any], new: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """Return the first name of `new` whose value differs, with both values."""
    return next(((name, old.get(name), value) for name, value in new.items() if old.get(name) != value), None)
