"""EMBED, the Emory Breast Imaging Dataset: a table of files, and one of findings.

Jeong et al. 2023, doi:10.1148/ryai.220047; form and codes from its repository Emory-HITI/EMBED_Open_Data (README, and
``references/AWS_Open_Data_Clinical_Legend.csv``). ``EMBED_OpenData_metadata.csv`` has a row a file,
``EMBED_OpenData_clinical.csv`` a row a finding. Films lie in ``<cohort>/<patient>/<study>/<SOPInstanceUID>.dcm``. A finding
belongs to the films of its exam (``acc_anon``) whose ``ImageLateralityFinal`` is its ``side``; a side of B or none stands
for both. Regions are ``[[ymin, xmin, ymax, xmax], ...]``: what a radiologist circled, without saying which finding it is.
Tables with ``DCM_ROI_coords`` and ``PNG_ROI_coords`` tell them for DICOM and for the mirrored PNG; whether ``ROI_coords``
of the first release hold for mirrored films is not documented there.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

import pandas as pd

from mammostream.common.errors import BadInput
from mammostream.shards.annotations.annotations import Annotations, Problem, findings_frame
from mammostream.shards.annotations.csv_rows import (
    DENSITIES,
    birads_labels,
    coded,
    density_labels,
    filled,
    fold,
    four_categories,
    leniently_coded,
    numbers,
    read_rows,
    refuse_duplicates,
    table_headers,
)
from mammostream.shards.annotations.tree import ImageTree, name_without_ending
from mammostream.shards.manifest import LABEL_PREFIX

COLUMNS = ("empi_anon", "acc_anon", "anon_dicom_path", "FinalImageType", "ImageLateralityFinal", "ViewPosition")
CLINICAL_COLUMNS = ("empi_anon", "acc_anon", "numfind", "side", "asses", "tissueden", "massshape", "calcfind", "path_severity")
# What no other data set's table has.
OWN_COLUMNS = ("empi_anon", "acc_anon")
_REGIONS = ("DCM_ROI_coords", "ROI_coords")
# A 2D mammogram, and one made from a tomosynthesis.
_TYPES = {"2d": 0, "cview": 1}
_BIRADS = {"A": "0", "N": "1", "B": "2", "P": "3", "S": "4", "M": "5", "K": "6", "X": ""}
_SHAPES = {
    **dict.fromkeys("GROX", "mass"),
    "A": "architectural_distortion",
    **dict.fromkeys("SV", "asymmetry"),
    "F": "focal_asymmetry",
    "B": "global_asymmetry",
}
# Questioned distortion, ducts and lymph nodes are no class of their own.
_OTHER_SHAPES = dict.fromkeys("QTNY", "")
# The worst result of a specimen, which stands with the finding that it was taken of.
_RESULTS = ("malignant", "malignant", "high_risk", "high_risk", "benign", "benign", "")
_SEVERITIES = {text: result for n, result in enumerate(_RESULTS) for text in (str(n), f"{n}.0")}
# 5 is a man's breast.
_DENSITIES = four_categories("5", "5.0")


def embed_films(tree: ImageTree, csv_paths: tuple[Path, ...]) -> Annotations:
    """Return EMBED's 2D and synthetic films, all for training, with labels of their breast's findings and boxes of regions.

    ``label:synthetic`` and ``label:special_view`` tell C-views and spot or magnification views. Labels of pathology are
    missing where nothing was biopsied.

    Raises
    ------
    BadInput
        There is no metadata, or a table lacks a column or holds a value that the data set does not know, or a file twice.
    """
    images, findings = _read(csv_paths)
    refuse_duplicates(images, "anon_dicom_path")
    problems: list[Problem] = []
    kind = images["FinalImageType"].str.lower().str.replace(r"\W|_", "", regex=True)
    other = ~kind.isin(_TYPES)
    for name, count in images.loc[other, "FinalImageType"].value_counts().items():
        problems.append(Problem("left out", f"{count} files of the type '{name}', which are neither 2D nor C-view"))
    images, kind = images[~other].reset_index(drop=True), kind[~other].reset_index(drop=True)
    parts = [PurePosixPath(text.replace("\\", "/")).parts for text in filled(images, "anon_dicom_path")]
    stems = [name_without_ending(PurePosixPath(names[-1])) for names in parts]
    films = pd.DataFrame(
        {
            "image_id": stems,
            "path": [
                tree.find((f"{study}/{stem}", f"{patient}/{stem}", stem), where)
                for study, patient, stem, where in zip(
                    images["acc_anon"], images["empi_anon"], stems, images["where"], strict=True
                )
            ],
            "where": images["where"],
            "patient_id": filled(images, "empi_anon"),
            "study_id": images["acc_anon"],
            "laterality": coded(images, "ImageLateralityFinal", {"L": "L", "R": "R"}),
            "view": images["ViewPosition"],
            "split": "train",
            LABEL_PREFIX + "synthetic": kind.map(_TYPES).astype("Int8"),
        }
    )
    if "spot_mag" in images:
        films[LABEL_PREFIX + "special_view"] = numbers(images, "spot_mag").fillna(0).ne(0).astype("Int8")
    if findings is not None:
        films = films.join(_labels(findings, films, problems))
    boxes = _boxes(images, films, problems)
    return Annotations(films, boxes, problems=problems)


def _read(csv_paths: tuple[Path, ...]) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    """Return the rows of files and those of findings."""
    images, findings = [], []
    for path in csv_paths:
        have = {fold(name) for header in table_headers(path) for name in header}
        if fold("anon_dicom_path") in have:
            images.append(read_rows(path, COLUMNS, known=(*_REGIONS, "spot_mag"), keep_all=False))
        else:
            findings.append(read_rows(path, CLINICAL_COLUMNS, known=("bside",), keep_all=False))
    if not images:
        raise BadInput("EMBED's films stand in EMBED_OpenData_metadata.csv; give it after --csv-path too")
    return pd.concat(images, ignore_index=True).fillna(""), pd.concat(findings, ignore_index=True).fillna(
        ""
    ) if findings else None


def _labels(findings: pd.DataFrame, films: pd.DataFrame, problems: list[Problem]) -> pd.DataFrame:
    """Return the labels of each film: those of the findings of its exam and side."""
    findings = findings.assign(
        birads=leniently_coded(findings, "asses", _BIRADS, problems),
        density=leniently_coded(findings, "tissueden", _DENSITIES, problems),
        shape=leniently_coded(findings, "massshape", _SHAPES | _OTHER_SHAPES, problems),
        severity=leniently_coded(findings, "path_severity", _SEVERITIES, problems),
        side=leniently_coded(findings, "side", {"L": "L", "R": "R", "B": ""}, problems),
    )
    labels = birads_labels(findings, "birads", range(7))
    labels = labels.join(density_labels(findings, "density", {d: d for d in DENSITIES}))
    for name in dict.fromkeys(_SHAPES.values()):
        labels[LABEL_PREFIX + name] = (findings["shape"] == name).astype("Int8")
    labels[LABEL_PREFIX + "calcification"] = (findings["calcfind"] != "").astype("Int8")
    result = findings["severity"]
    outcomes = dict.fromkeys(name for name in _SEVERITIES.values() if name)
    pathology = pd.DataFrame({LABEL_PREFIX + name: (result == name).astype("Int8").mask(result == "") for name in outcomes})
    # A specimen's side is its own.
    taken = findings["side"]
    if "bside" in findings:
        taken = findings["bside"].where(findings["bside"].isin(["L", "R"]), taken)
    exams = findings["acc_anon"]
    return _of_films(labels, exams, findings["side"], films).join(_of_films(pathology, exams, taken, films))


def _of_films(labels: pd.DataFrame, exams: pd.Series, sides: pd.Series, films: pd.DataFrame) -> pd.DataFrame:
    """Return labels of rows as labels of films: 1 if one of the rows of the film's exam and side, or of no side, says so."""
    both = sides == ""
    rows = pd.concat([labels, labels[both]], ignore_index=True)
    keys = [
        pd.concat([exams, exams[both]], ignore_index=True).rename("exam"),
        pd.concat([sides.mask(both, "L"), sides[both].mask(sides[both] == "", "R")], ignore_index=True).rename("side"),
    ]
    known = rows.groupby(keys).max()
    wanted = pd.MultiIndex.from_arrays([films["study_id"], films["laterality"]])
    return known.reindex(wanted).set_index(films.index)


def _boxes(images: pd.DataFrame, films: pd.DataFrame, problems: list[Problem]) -> pd.DataFrame:
    """Return the regions as boxes of the label ``roi``, and mark their films; one without is not known to be clean."""
    column = next((name for name in _REGIONS if name in images), None)
    boxes: list[tuple] = []
    if column is not None:
        for image_id, text, where in zip(films["image_id"], images[column], images["where"], strict=True):
            values = [int(float(number)) for number in re.findall(r"-?\d+(?:\.\d+)?", text)]
            if len(values) % 4:
                problems.append(
                    Problem("no box", f"{where}, column '{column}': '{text}' is no list of [ymin, xmin, ymax, xmax]")
                )
                continue
            for y1, x1, y2, x2 in zip(*(values[n::4] for n in range(4)), strict=True):
                boxes.append((image_id, "roi", x1, y1, x2, y2))
        marked = films["image_id"].isin({box[0] for box in boxes})
        films[LABEL_PREFIX + "roi"] = marked.astype("Int8").where(marked)
    return findings_frame(boxes)
