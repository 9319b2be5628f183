"""From annotation files and images to a manifest: what the command ``prepare`` does, step by step."""

from __future__ import annotations

import mmap
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from mammostream.common.errors import BadInput
from mammostream.common.files import make_folder, whole_file
from mammostream.common.parallel import map_processes
from mammostream.preprocess.reading import Header, is_dicom, read_header, read_mammogram
from mammostream.shards.annotations.annotations import Annotations, Problem
from mammostream.shards.annotations.columns import ColumnMap
from mammostream.shards.annotations.datasets import describe
from mammostream.shards.annotations.names import FileNames
from mammostream.shards.annotations.tree import ImageTree
from mammostream.shards.archive import escape_id
from mammostream.shards.manifest import (
    FINDING_COLUMNS,
    LABEL_PREFIX,
    MANIFEST_COLUMNS,
    SPLITS,
    check_manifest,
    split_by_patient,
)
from mammostream.shards.prepare.patients import compile_regex, film_patients
from mammostream.shards.prepare.view_names import with_named_views

_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_PIXEL_DATA_TAGS = (b"\xe0\x7f\x10\x00", b"\x7f\xe0\x00\x10")  # (7FE0,0010), little and big endian


@dataclass(frozen=True)
class Prepared:
    """A described data set.

    Attributes
    ----------
    manifest
        Its films, with paths that begin as `images_root` does; :func:`mammostream.shards.manifest.write_manifest` takes it.
    findings
        Its boxes, inside their films, or None where the data set has none.
    problems
        What was left out, and why.
    notes
        What was repaired, and what the user should know.
    """

    manifest: pd.DataFrame
    findings: pd.DataFrame | None
    problems: list[Problem]
    notes: list[str]


def prepare_films(
    dataset: str,
    images_root: Path,
    csv_paths: tuple[Path, ...] = (),
    findings_csv: Path | None = None,
    *,
    columns: ColumnMap | None = None,
    assume_spacing: float | None = None,
    patient_regex: str | None = None,
    patient_from: str | None = None,
    val_fraction: float = 0.1,
    test_fraction: float = 0.0,
    seed: int = 0,
    workers: int = 1,
    skip: Path | None = None,
) -> Prepared:
    """Describe a data set's films: annotations, headers, boxes, splits.

    Parameters
    ----------
    dataset
        One of :data:`mammostream.shards.annotations.datasets.DATASETS`.
    images_root
        The folder of its images.
    csv_paths, findings_csv
        Its annotation files.
    columns
        Which columns of a plain folder's tables hold what.
    assume_spacing
        Pixel size in mm of films that neither the annotations nor the files tell one of.
    patient_regex
        What part of the patient id, or of the path if the id is missing or does not match, names the patient of a plain
        folder's film: the first group, else the whole match.
    patient_from
        ``folder``: the first folder below `images_root` is the patient of a plain folder's film, whatever else says.
    val_fraction
        Share of the training patients for validation, 0-1, where the data set has no validation split.
    test_fraction
        Share of the training patients to hold out for the test split, 0-1, where the data set has none; those are drawn first.
    seed
        Seed of these choices.
    workers
        Processes that read headers and masks.
    skip
        A folder below `images_root` that is none of the data set's.

    Raises
    ------
    BadInput
        The annotations or the folder are at fault, none of the films can be read, or a patient is in two splits or unknown.
    """
    pattern = compile_regex(patient_regex, dataset, patient_from)
    tree = ImageTree.scan(images_root, skip)
    said = describe(dataset, tree, csv_paths, findings_csv, columns)
    problems = [*tree.problems, *said.problems]
    notes = list(said.notes)
    if tree.ignored:
        endings = ", ".join(f"{count} {ending}" for ending, count in tree.ignored.most_common(8))
        notes.append(
            f"{tree.ignored.total()} files below {images_root} are left out, being no images by their endings: {endings}"
        )

    films = _with_headers(_present(said.films, tree, problems), workers, problems)
    if dataset == "folder":
        films = with_named_views(films, images_root, notes)
    missing = [problem.message for problem in problems if problem.kind == "missing"]
    films["patient_id"] = film_patients(films, images_root, pattern, notes, patient_from=patient_from, missing=missing)
    # An unreadable file's patient would have stood in its header.
    films = films[films["patient_id"] != ""].reset_index(drop=True)
    if said.label_films is not None:
        films = said.label_films(films)
    if assume_spacing is not None:
        films.loc[films["pixel_spacing_mm"].isna(), ["pixel_spacing_mm", "spacing_source"]] = assume_spacing, "assumed"
    findings = _boxes(said, films, workers, problems, notes)
    films["split"] = _with_test(films, test_fraction, seed, notes)
    films["split"] = _with_validation(films, val_fraction, seed)
    labels = [column for column in films if column.startswith(LABEL_PREFIX)]
    films = films[[*MANIFEST_COLUMNS, *labels]]
    check_manifest(films, f"the data set of {', '.join(map(str, csv_paths)) or images_root}")
    return Prepared(films, findings, problems, notes)


def _present(films: pd.DataFrame, tree: ImageTree, problems: list[Problem]) -> pd.DataFrame:
    """Return the films whose file is there."""
    missing = films["path"].isna()
    if missing.all():
        row = films.iloc[0]
        raise BadInput(
            f"none of the {len(films)} images that the annotations name is below {tree.root}, such as '{row['image_id']}' "
            f"({row['where']}){FileNames(tree).hint(row['image_id'])}; check --images-root"
        )
    problems += [
        Problem("missing", f"{row.where}: no file for the image '{row.image_id}' below {tree.root}")
        for row in films[missing].itertuples()
    ]
    return films[~missing].reset_index(drop=True)


def _with_headers(films: pd.DataFrame, workers: int, problems: list[Problem]) -> pd.DataFrame:
    """Fill in what the annotations leave open from the files' headers; a file that cannot be read has 0 bits."""
    headers, reasons = zip(*read_headers(list(films["path"]), workers), strict=True)
    if all(reasons):
        raise BadInput(f"none of the {len(films)} images can be read; the first: {reasons[0]}")
    problems += [Problem("unreadable", reason) for reason in reasons if reason]
    known = pd.DataFrame(headers)
    films = films.assign(
        path=films["path"].map(str),
        bits=known["bits"],
        file_height=known["height"],
        file_width=known["width"],
    )
    for column in ("patient_id", "study_id", "laterality", "view", "split"):
        given = films[column].fillna("") if column in films else pd.Series("", films.index)
        films[column] = given.where(given != "", known.get(column, "")).astype(str)
    side = films["laterality"].str.strip().str.upper().str[:1]
    films["laterality"] = side.where(side.isin(["L", "R"]), "")
    spacing = known["spacing_mm"].astype(float)
    if "pixel_spacing_mm" in films:
        given = films["pixel_spacing_mm"].astype(float)
        films["spacing_source"] = films["spacing_source"].where(given.notna(), known["spacing_source"])
        films["pixel_spacing_mm"] = given.fillna(spacing)
    else:
        films["spacing_source"], films["pixel_spacing_mm"] = known["spacing_source"], spacing
    return films


def read_headers(paths: list[Path], workers: int = 1) -> list[tuple[Header, str]]:
    """Return the header of each image, and "" or why it cannot be read (then it has 0 bits), with a progress bar.

    Next to the header it is looked at whether the file is whole, without decoding it.
    """
    # Below that, starting processes takes longer than reading.
    return map_processes(_read_whole_header, paths, workers if len(paths) > 1000 else 1, "reading headers", "file", chunk=32)


def _read_whole_header(path: Path) -> tuple[Header, str]:
    header = Header(0, 0, bits=0)
    try:
        header = read_header(path)
        if _seems_torn(path, header):
            read_mammogram(path)  # knows for certain, and says why
    except BadInput as error:
        return replace(header, bits=0), str(error)
    except OSError as error:
        return replace(header, bits=0), f"image {path} cannot be read ({error.strerror}); check its permissions"
    return header, ""


def _seems_torn(path: Path, header: Header) -> bool:
    """Tell at a glance whether a file may lack pixels: never wrongly False for a PNG that was cut or a DICOM without any."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if is_dicom(path):
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return all(data.find(tag) < 0 for tag in _PIXEL_DATA_TAGS)
        if path.suffix.lower() == ".png":
            file.seek(-min(size, len(_PNG_END)), 2)
            return file.read() != _PNG_END
    return path.suffix.lower() == ".pgm" and size < header.height * header.width * header.bits // 8


def _boxes(
    said: Annotations, films: pd.DataFrame, workers: int, problems: list[Problem], notes: list[str]
) -> pd.DataFrame | None:
    """Return the boxes of the films, inside them, from the annotations or from files; None where the data set has none."""
    findings = said.findings
    if said.read_boxes is not None:
        findings, faults = said.read_boxes(films.assign(height=films["file_height"], width=films["file_width"]), workers)
        problems += faults
    return None if findings is None else _inside_films(findings, films, problems, notes)


def _inside_films(findings: pd.DataFrame, films: pd.DataFrame, problems: list[Problem], notes: list[str]) -> pd.DataFrame:
    """Return the boxes of the films, clipped to them."""
    sizes = films.set_index("image_id")
    findings = findings[findings["image_id"].isin(sizes.index)].reset_index(drop=True).astype(FINDING_COLUMNS)
    sizes = sizes.reindex(findings["image_id"])
    readable = (sizes["bits"] > 0).to_numpy()
    extent = {}
    for said, read in (("width", "file_width"), ("height", "file_height")):
        extent[said] = sizes[read].to_numpy(float)
        if said in sizes:
            asked = sizes[said].to_numpy(float)
            differ = readable & (asked != extent[said]) & ~np.isnan(asked)
            if differ.any():
                row = sizes[differ].iloc[0]
                raise BadInput(
                    f"image {row['path']} is {row['file_width']} x {row['file_height']} pixels, but its boxes are for "
                    f"{row['width']:g} x {row['height']:g} ({sizes.index[differ].nunique()} such images); give images of their "
                    "own size"
                )
            extent[said] = np.where(readable, extent[said], asked)
    clipped = findings.copy()
    for axis, size in (("x", "width"), ("y", "height")):
        limit = np.where(np.isnan(extent[size]) | (extent[size] <= 0), np.inf, extent[size])
        for side in ("min", "max"):
            clipped[axis + side] = np.clip(findings[axis + side], 0, limit)
    empty = (clipped["xmin"] >= clipped["xmax"]) | (clipped["ymin"] >= clipped["ymax"])
    problems += [
        Problem(
            "no box",
            f"a box of '{row.label}' in image '{row.image_id}' is empty or outside it: "
            f"{row.xmin:g}, {row.ymin:g}, {row.xmax:g}, {row.ymax:g}",
        )
        for row in findings[empty].itertuples()
    ]
    sides = ["xmin", "ymin", "xmax", "ymax"]
    changed = (clipped[sides] != findings[sides]).any(axis=1) & ~empty
    if changed.any():
        notes.append(f"{changed.sum()} boxes reach out of their film and are clipped to it")
    return clipped[~empty].reset_index(drop=True)


def _with_test(films: pd.DataFrame, test_fraction: float, seed: int, notes: list[str]) -> pd.Series:
    """Return the splits, with training patients dealt to ``test`` where no film is of that split."""
    splits = films["split"]
    if not test_fraction:
        return splits
    if (splits == "test").any():
        notes.append("the data set has a test split of its own: --test-fraction is not used")
        return splits
    training = splits.isin(["", "train"])
    dealt = films.loc[training, "patient_id"].map(split_by_patient(films.loc[training, "patient_id"], test_fraction, seed))
    held_out = dealt.index[dealt == "val"]
    return splits.mask(splits == "", "train").mask(splits.index.isin(held_out), "test")


def _with_validation(films: pd.DataFrame, val_fraction: float, seed: int) -> pd.Series:
    """Return the splits, with training patients dealt to ``val`` where no film is of that split."""
    splits = films["split"]
    if (splits == "").all():
        splits = pd.Series("train", films.index)
    if (splits == "val").any():
        return splits
    training = splits == "train"
    dealt = films.loc[training, "patient_id"].map(split_by_patient(films.loc[training, "patient_id"], val_fraction, seed))
    return dealt.reindex(films.index).fillna(splits)


def copy_films(films: pd.DataFrame, output_dir: Path, workers: int) -> tuple[pd.DataFrame, list[Problem], list[str]]:
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
            "_".join(escape_id(part).replace("%2E", ".") for part in (study, image) if part) + ".png"
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
    done = map_processes(copy_film, jobs, workers, "copying", "film", chunk=1)
    copied = pd.Series(done, films.index[readable], dtype=object)
    failed = copied.map(lambda bits: isinstance(bits, str)).astype(bool)
    problems = [Problem("not copied", reason) for reason in copied[failed]]
    copied = copied[~failed]
    films = films.copy()
    films.loc[copied.index, "bits"] = copied.astype(int)
    films.loc[copied.index, "path"] = targets[copied.index].map(str)
    return films, problems, _foreign_copies(output_dir, set(targets))


def copy_film(job: tuple[str, Path]) -> int | str:
    """Write one film as PNG and return its bits per pixel, or why it cannot be read."""
    import imagecodecs

    source, target = job
    if target.exists():
        return read_header(target).bits
    try:
        pixels = read_mammogram(source).pixels
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
