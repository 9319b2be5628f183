"""What the headers of films say, next to what the annotations say of them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd

from mammostream.common.errors import BadInput
from mammostream.common.parallel import map_processes
from mammostream.preprocess.mammogram import PIXELS_MISSING, PLAUSIBLE_SPACING_MM, ReadingConfig
from mammostream.preprocess.objects import OtherObject, why_left_out
from mammostream.preprocess.plain import seems_cut
from mammostream.preprocess.reading import AS_IT_COMES, Header, is_dicom, read_header, read_mammogram
from mammostream.shards.annotations.annotations import Problem
from mammostream.shards.manifest import OPTIONAL_COLUMNS
from mammostream.shards.prepare.views import with_normal_views

UNREADABLE = "unreadable"


def with_headers(
    films: pd.DataFrame, workers: int, reading: ReadingConfig, problems: list[Problem], notes: list[str]
) -> pd.DataFrame:
    """Fill in what the annotations leave open from the files' headers; a file that cannot be read has 0 bits.

    DICOM objects that are no mammograms are left out.
    """
    headers, faults = zip(*read_headers(list(films["path"]), workers, reading), strict=True)
    if all(faults):
        raise BadInput(f"none of the {len(films)} images can be read; the first: {faults[0].message}")
    problems += [fault for fault in faults if fault]
    taken = [fault is None or fault.kind == UNREADABLE for fault in faults]
    films = films[taken].reset_index(drop=True)
    used = [header for header, take in zip(headers, taken, strict=True) if take]
    known = pd.DataFrame(used)
    films = films.assign(
        path=films["path"].map(str),
        bits=known["bits"],
        file_height=known["height"],
        file_width=known["width"],
        facts=known["facts"],
    )
    for column in ("patient_id", "study_id", "laterality", "view", "split", *OPTIONAL_COLUMNS):
        given = films[column].fillna("") if column in films else pd.Series("", films.index)
        films[column] = given.where(given != "", known.get(column, "")).astype(str)
    films = with_normal_views(films, notes)
    spacing = known["spacing_mm"].astype(float)
    ignored = [header.flags["spacing_ignored"] for header in used if "spacing_ignored" in header.flags]
    if ignored:
        notes.append(f"the pixel spacing of {len(ignored)} files counts as unknown, such as {ignored[0]}")
    if "pixel_spacing_mm" in films:
        given = films["pixel_spacing_mm"].astype(float)
        given = given.where(~_implausible(given, films, notes))
        films["spacing_source"] = films["spacing_source"].where(given.notna(), known["spacing_source"])
        films["pixel_spacing_mm"] = given.fillna(spacing)
    else:
        films["spacing_source"], films["pixel_spacing_mm"] = known["spacing_source"], spacing
    return films


def _implausible(spacings: pd.Series, films: pd.DataFrame, notes: list[str]) -> pd.Series:
    """Tell which spacings of the annotations no film has; another unit than mm, mostly."""
    low, high = PLAUSIBLE_SPACING_MM
    wrong = spacings.notna() & ~spacings.between(low, high)
    if wrong.any():
        notes.append(
            f"warning: {wrong.sum()} pixel spacings of the annotations are outside {low:g}-{high:g} mm and count as unknown, "
            f"such as {spacings[wrong].iloc[0]:g} of image '{films.loc[wrong, 'image_id'].iloc[0]}'; pixel_spacing_mm is in mm"
        )
    return wrong


def fill_in_spacing(films: pd.DataFrame, spacing_mm: float | None) -> None:
    """Give films whose pixel size is unknown one that the user assumes."""
    if spacing_mm is not None:
        unknown = films["pixel_spacing_mm"].isna()
        films.loc[unknown, "pixel_spacing_mm"] = spacing_mm
        films.loc[unknown, "spacing_source"] = "assumed"


def read_headers(
    paths: list[Path], workers: int = 1, reading: ReadingConfig = AS_IT_COMES
) -> list[tuple[Header, Problem | None]]:
    """Return the header of each image, and None or why it cannot be used (then it has 0 bits), with a progress bar.

    Next to the header it is looked at whether the file is whole, without decoding it.
    """
    # Below that, starting processes takes longer than reading.
    workers = workers if len(paths) > 1000 else 1
    return map_processes(partial(_read_whole_header, reading=reading), paths, workers, "reading headers", "file", chunk=32)


def _read_whole_header(path: Path, reading: ReadingConfig) -> tuple[Header, Problem | None]:
    header = Header(0, 0, bits=0)
    try:
        header = read_header(path)
        if not why_left_out(header.facts, reading) and _seems_torn(path, header):
            read_mammogram(path, reading)  # knows for certain, and says why
    except OtherObject as error:
        return header, Problem(error.kind, str(error))
    except BadInput as error:
        return replace(header, bits=0), Problem(UNREADABLE, str(error))
    except OSError as error:
        reason = f"image {path} cannot be read ({error.strerror}); check its permissions"
        return replace(header, bits=0), Problem(UNREADABLE, reason)
    return header, None


def _seems_torn(path: Path, header: Header) -> bool:
    """Tell at a glance whether a file may lack pixels: never wrongly False for a PNG that was cut or a DICOM without any."""
    if is_dicom(path):
        return PIXELS_MISSING in header.flags
    return seems_cut(path)
