"""Films laid out as PNG files by split: ``prepare --copy``."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pandas as pd

from mammostream.common.errors import BadInput
from mammostream.common.files import make_folder, whole_file
from mammostream.common.parallel import map_processes
from mammostream.preprocess.mammogram import ReadingConfig
from mammostream.preprocess.reading import AS_IT_COMES, read_header, read_mammogram
from mammostream.shards.annotations.annotations import Problem
from mammostream.shards.archive import escape_id, short_name
from mammostream.shards.manifest import SPLITS


def copy_films(
    films: pd.DataFrame, output_dir: Path, workers: int, reading: ReadingConfig = AS_IT_COMES
) -> tuple[pd.DataFrame, list[Problem], list[str]]:
    """Lay readable films out as ``<output_dir>/<split>/<study>_<image>.png``, 8 or 16 bits, brighter = denser.

    Copies that are there are left as they are; one in another split's folder is moved. Copies hold stored values: a DICOM
    file's VOI LUT or window does not travel, its spacing does.

    Returns
    -------
    films, problems, notes
        `films` with the copies' paths and bits where there is a copy, what could not be copied, and what else lies there.

    Raises
    ------
    BadInput
        Two films have the same name there, or the folder cannot be written.
    """
    # A study's UID is full of dots, which harm no file.
    names = pd.Series(
        [
            short_name("_".join(escape_id(part).replace("%2E", ".") for part in (study, image) if part)) + ".png"
            for study, image in zip(films["study_id"], films["image_id"], strict=True)
        ],
        films.index,
        dtype=str,
    )
    twice = names.duplicated()
    if twice.any():
        raise BadInput(f"two films would be copied to the name {names[twice].iloc[0]}; give them other image ids or study ids")
    targets = pd.Series([output_dir / split / name for split, name in zip(films["split"], names, strict=True)], films.index)
    for split in films["split"].unique():
        make_folder(output_dir / split)
    for target in targets:
        if not target.exists():
            strays = [p for split in SPLITS if (p := output_dir / split / target.name) != target and p.exists()]
            if strays:
                strays[0].replace(target)
    readable = films["bits"] > 0
    jobs = list(zip(films.loc[readable, "path"], targets[readable], strict=True))
    done = map_processes(partial(copy_film, reading=reading), jobs, workers, "copying", "film", chunk=1)
    copied = pd.Series(done, films.index[readable], dtype=object)
    failed = copied.map(lambda bits: isinstance(bits, str)).astype(bool)
    problems = [Problem("not copied", reason) for reason in copied[failed]]
    copied = copied[~failed]
    films = films.copy()
    films.loc[copied.index, "bits"] = copied.astype(int)
    films.loc[copied.index, "path"] = targets[copied.index].map(str)
    return films, problems, _foreign_copies(output_dir, set(targets))


def copy_film(job: tuple[str, Path], reading: ReadingConfig = AS_IT_COMES) -> int | str:
    """Write one film as PNG and return its bits per pixel, or why it cannot be read."""
    import imagecodecs

    source, target = job
    if target.exists():
        return read_header(target).bits
    try:
        pixels = read_mammogram(source, reading).pixels
    except BadInput as error:
        return str(error)
    try:
        with whole_file(target) as temporary:
            temporary.write_bytes(imagecodecs.png_encode(pixels, level=1))
    except OSError as error:
        raise BadInput(f"cannot write {target}: {error.strerror}; make room, or choose another output directory") from error
    return 8 * pixels.dtype.itemsize


def _foreign_copies(output_dir: Path, targets: set[Path]) -> list[str]:
    """Say so where the folders of the splits hold images that are none of these films: an old run's, perhaps."""
    others = [path for split in SPLITS for path in (output_dir / split).glob("*.png") if path not in targets]
    if not others:
        return []
    return [f"{len(others)} images next to the copies are not of this manifest, such as {others[0]}; remove them"]
