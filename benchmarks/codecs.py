"""The tile codecs side by side on real 512 x 512 tiles: bytes, encoding, decoding, exactness. Prints a Markdown table.

Run it as ``python benchmarks/codecs.py [--layouts]`` with the folder of this project on ``PYTHONPATH``. Every round measures
every codec once, so that a busy moment hits them alike; the table has the medians. Encoding runs on one thread, as it does in a
build with ``--threads 1``; DALI decodes on all cores, and on the GPU where there is one.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO

import click
import numpy as np
from tiles import TILE, real_tiles

from mammostream.common.machine import describe
from mammostream.shards.codecs import CODECS, Codec


@dataclass
class Result:
    """What the rounds gave for one codec at one depth."""

    payloads: list[bytes]
    exact: bool
    encode: list[float] = field(default_factory=list)  # tiles per second, a value a round
    decode: list[float] = field(default_factory=list)
    dali: dict[str, list[float]] = field(default_factory=dict)
    dali_exact: bool = True


def tiff_layouts() -> dict[str, Codec]:
    """Return other ways to lay out a TIFF, written by tifffile: by zstd's level, strips or tiles, and without compression."""
    import tifffile

    def write(pixels: np.ndarray, **layout: object) -> bytes:
        file = BytesIO()
        tifffile.imwrite(file, pixels, photometric="minisblack", metadata=None, software=False, maxworkers=1, **layout)
        return file.getvalue()

    zstd = {"compression": "zstd", "predictor": True}
    layouts: dict[str, dict[str, object]] = {
        f"zstd {level}, {name}": zstd | {"compressionargs": {"level": level}} | shape
        for level in (1, 3)
        for name, shape in (("strips of 256 rows", {"rowsperstrip": 256}), ("tiles of 256", {"tile": (256, 256)}))
    }
    layouts["uncompressed"] = {"rowsperstrip": TILE}
    return {name: Codec(partial(write, **layout), CODECS["tif"].decode) for name, layout in layouts.items()}


def decoder(codec: str, bits: int, device: str, batch_size: int, threads: int) -> Callable[[list[bytes]], np.ndarray]:
    """Return a function that decodes a batch of payloads with DALI to (N, 512, 512) on the host."""
    from nvidia.dali import Pipeline, fn, types

    kind = types.UINT8 if bits == 8 else types.UINT16
    batch: list[np.ndarray] = []
    pipeline = Pipeline(batch_size=batch_size, num_threads=threads, device_id=0 if device == "gpu" else None)
    with pipeline:
        raw = fn.external_source(lambda: batch, batch=True)
        if codec == "raw":
            tile = fn.reinterpret(raw, shape=[TILE, TILE, 1], dtype=kind)
            tile = tile.gpu() if device == "gpu" else tile
        else:
            where = "mixed" if device == "gpu" else "cpu"
            tile = fn.decoders.image(raw, device=where, output_type=types.GRAY, dtype=kind)
        pipeline.set_outputs(tile)
    pipeline.build()

    def decode(payloads: list[bytes]) -> np.ndarray:
        batch[:] = [np.frombuffer(p, np.uint8) for p in payloads]
        (out,) = pipeline.run()
        out = out.as_cpu() if device == "gpu" else out
        return out.as_array()[..., 0]

    return decode


def rate(function: Callable[[], object], count: int) -> float:
    """Return how many of `count` items a second `function` deals with."""
    start = time.perf_counter()
    function()
    return count / (time.perf_counter() - start)


@click.command()
@click.option("--tiles", "count", default=96, help="Real tiles, evenly from the 8 films.")
@click.option("--rounds", default=5, help="Rounds; the table has the medians.")
@click.option("--threads", default=0, help="DALI's threads; 0 = one per core.")
@click.option("--layouts", is_flag=True, help="Layouts of TIFF instead of the codecs.")
def main(count: int, rounds: int, threads: int, layouts: bool) -> None:
    """Measure every codec at 8 and 16 bits."""
    os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")  # DALI warns of each HTJ2K tile

    from mammostream.dali_pipelines.pipelines import types  # noqa: F401  DALI itself, before the clock starts
    from mammostream.shards.build.plan import resolve_device

    threads = threads or len(os.sched_getaffinity(0))
    devices = ["cpu", "gpu"] if resolve_device("auto") == "cuda" else ["cpu"]
    batch_size = 32
    sixteen = real_tiles(count // batch_size * batch_size)
    tiles = {8: (sixteen >> 8).astype(np.uint8), 16: sixteen}
    codecs = {"tif": CODECS["tif"]} | tiff_layouts() if layouts else CODECS
    results: dict[tuple[int, str], Result] = {}
    dali = {}
    for bits, stack in tiles.items():
        for name, codec in codecs.items():
            if bits > codec.bits:
                continue
            payloads = [codec.encode(tile) for tile in stack]
            exact = all((codec.decode(p) == tile).all() for p, tile in zip(payloads, stack, strict=True))
            results[bits, name] = Result(payloads, exact)
            for device in devices:
                dali[bits, name, device] = decoder(name, bits, device, batch_size, threads)
                first = dali[bits, name, device](payloads[:batch_size])  # warm-up
                results[bits, name].dali_exact &= bool((first == stack[:batch_size]).all())
    for _ in range(rounds):
        for (bits, name), result in results.items():
            stack, codec = tiles[bits], codecs[name]
            result.encode.append(rate(lambda stack=stack, codec=codec: [codec.encode(t) for t in stack], len(stack)))
            payloads = result.payloads
            result.decode.append(rate(lambda p=payloads, codec=codec: [codec.decode(d) for d in p], len(stack)))
            batches = [payloads[i : i + batch_size] for i in range(0, len(payloads), batch_size)] * 4
            for device in devices:
                run = dali[bits, name, device]
                rates = result.dali.setdefault(device, [])
                rates.append(rate(lambda run=run, batches=batches: [run(b) for b in batches], batch_size * len(batches)))

    median = statistics.median
    click.echo(f"{describe()}\n\n{len(sixteen)} tiles of {TILE}×{TILE}, {rounds} rounds, DALI with {threads} threads.\n")
    heads = [f"DALI {d.upper()} decode, tiles/s" for d in devices]
    click.echo(f"| bits | codec | bytes per tile | of raw | encode, tiles/s | decode, tiles/s | {' | '.join(heads)} | exact |")
    click.echo("|" + "---|" * (7 + len(devices)))
    for (bits, name), r in results.items():
        size = sum(map(len, r.payloads)) / len(r.payloads)
        speeds = [median(r.encode), median(r.decode), *(median(r.dali[d]) for d in devices)]
        exact = "yes" if r.exact and r.dali_exact else "no (lossy)" if not codecs[name].lossless else "NO"
        cells = " | ".join(f"{s:,.0f}" for s in speeds)
        click.echo(f"| {bits} | {name} | {size:,.0f} | {size / (TILE * TILE * bits / 8):.0%} | {cells} | {exact} |")


if __name__ == "__main__":
    main()
