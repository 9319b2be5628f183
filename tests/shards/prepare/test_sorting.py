"""A PACS export: what is no mammogram, raw twins, several frames and copies are left out in `prepare`, with their reasons."""

from __future__ import annotations

import io
from collections import Counter

import numpy as np
import pandas as pd
import pydicom
import pytest
from pydicom.dataset import Dataset

from mammostream.common.errors import BadInput
from mammostream.preprocess.mammogram import ReadingConfig
from mammostream.preprocess.reading import read_mammogram
from mammostream.shards.manifest import read_manifest
from mammostream.shards.prepare.films import prepare_films

STORAGE = "1.2.840.10008.5.1.4.1.1."
PIXELS = np.random.default_rng(0).integers(0, 4096, (60, 40)).astype(np.uint16)
RAW = {"SOPClassUID": STORAGE + "1.2.1", "PresentationIntentType": "FOR PROCESSING", "PhotometricInterpretation": "MONOCHROME1"}


@pytest.fixture
def pacs(tmp_path, write_dicom):
    """Two patients' studies as an archive exports them: files without endings in numbered folders, and a DICOMDIR."""
    root = tmp_path / "export"
    number = 0

    def add(pixels=PIXELS, patient="P1", side="L", view="CC", **elements):
        nonlocal number
        number += 1
        study = {"PatientID": patient, "StudyInstanceUID": f"1.2.{patient[1:]}", "Modality": "MG"}
        said = study | {"ImageLaterality": side, "ViewPosition": view, "PresentationIntentType": "FOR PRESENTATION"}
        return write_dicom(root / f"DICOM/ST0/IM{number:06}", pixels, **(said | elements))

    raw = add(SOPInstanceUID="1.9.1", AcquisitionTime="101500", **RAW)
    add(AcquisitionTime="101500")
    add(side="R")
    add(side="R", view="MLO", patient="P2", Modality="CR", SOPClassUID=STORAGE + "1")  # a plate
    add(side="L", view="MLO", patient="P2", SOPClassUID=STORAGE + "7", Modality="OT")  # a digitised film
    add(Modality="US", SOPClassUID=STORAGE + "6.1")
    add(Modality="MR", SOPClassUID=STORAGE + "4")
    for end, modality in (("88.33", "SR"), ("11.1", "PR"), ("104.1", "DOC"), ("88.59", "KO")):
        path = add(None, Modality=modality, SOPClassUID=STORAGE + end)
        path.write_bytes(_without_image(path))
    add(np.tile(PIXELS, (3, 1)), Rows=60, NumberOfFrames=3, SOPClassUID=STORAGE + "13.1.3", patient="P2")
    colour = {"SamplesPerPixel": 3, "PlanarConfiguration": 0, "PhotometricInterpretation": "RGB", "Rows": 20, "Columns": 40}
    add(np.zeros((60, 40), np.uint8), SOPClassUID=STORAGE + "7", **colour)
    write_dicom(root / "DICOMDIR", PIXELS)
    return root, raw


def _without_image(path):
    dataset = pydicom.dcmread(path)
    for name in ("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "SamplesPerPixel"):
        delattr(dataset, name)
    del dataset.PhotometricInterpretation
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def kinds(made):
    return Counter(problem.kind for problem in made.problems)


def test_only_what_a_build_reads_stays(pacs):
    root, _ = pacs
    made = prepare_films("folder", root)
    assert len(made.manifest) == 4
    assert (made.manifest["bits"] > 0).all()
    for path in made.manifest["path"]:
        read_mammogram(path)  # as the build does
    expected = {"US": 1, "MR": 1, "SR": 1, "PR": 1, "DOC": 1, "KO": 1, "for processing": 1, "multi-frame": 1, "colour": 1}
    assert kinds(made) == expected
    by_kind = {problem.kind: problem.message for problem in made.problems}
    assert "is no mammogram: modality SR, Comprehensive SR Storage" in by_kind["SR"]
    assert "has 3 frames (tomosynthesis, perhaps); give --frame" in by_kind["multi-frame"]
    assert "give --allow-for-processing" in by_kind["for processing"]
    assert all(problem.message.startswith(f"image {root}/DICOM/ST0/IM") for problem in made.problems)
    assert any("1 DICOMDIR" in note for note in made.notes)


def test_frame_and_allow_for_processing_take_what_a_build_with_them_takes(pacs):
    root, raw = pacs
    reading = ReadingConfig(frame=2, allow_for_processing=True)
    made = prepare_films("folder", root, reading=reading)
    assert len(made.manifest) == 5
    assert kinds(made)["multi-frame"] == kinds(made)["for processing"] == 0
    (twin,) = [problem.message for problem in made.problems if problem.kind == "raw twin"]
    assert twin == f"image {raw} is raw; its processed version {raw.with_name('IM000002')} is kept"
    for path in made.manifest["path"]:
        read_mammogram(path, reading)


@pytest.mark.parametrize(
    ("raw", "processed", "twin"),
    [
        ({}, {}, True),  # alike in study, side and view, and nothing against it
        ({"AcquisitionTime": "1015"}, {"AcquisitionTime": "1016"}, False),  # a repeated take
        ({"AcquisitionTime": "1015"}, {}, True),
        ({}, {"ViewPosition": "MLO"}, False),
        ({}, {"StudyInstanceUID": "1.3"}, False),
        ({"SOPInstanceUID": "1.9"}, {"ViewPosition": "", "sources": "1.9"}, True),  # named as its source
        ({"ViewPosition": ""}, {"ViewPosition": ""}, False),  # nothing that says so
    ],
)
def test_raw_twins_are_told_by_source_or_by_study_side_view_and_time(tmp_path, write_dicom, raw, processed, twin):
    said = {"PatientID": "P1", "StudyInstanceUID": "1.2", "ImageLaterality": "L", "ViewPosition": "CC"}
    if source := processed.pop("sources", None):
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = STORAGE + "1.2.1", source
        processed = processed | {"SourceImageSequence": [item]}
    write_dicom(tmp_path / "raw.dcm", PIXELS, **(said | RAW | raw))
    write_dicom(tmp_path / "processed.dcm", PIXELS, **(said | processed))
    made = prepare_films("folder", tmp_path, reading=ReadingConfig(allow_for_processing=True))
    assert made.manifest["image_id"].tolist() == (["processed"] if twin else ["processed", "raw"])
    assert kinds(made) == ({"raw twin": 1} if twin else {})


def test_an_export_without_mammograms_is_refused_in_one_line(tmp_path, write_dicom):
    write_dicom(tmp_path / "a.dcm", PIXELS, Modality="US", SOPClassUID=STORAGE + "6.1", PatientID="P1")
    with pytest.raises(BadInput, match="none of the 1 images can be read; the first: .* modality US, Ultrasound Image Storage"):
        prepare_films("folder", tmp_path)
    write_dicom(tmp_path / "a.dcm", PIXELS, Modality="MG", PatientID="P1", **RAW)
    with pytest.raises(BadInput, match="none of the 1 images can be built from; .*give --allow-for-processing"):
        prepare_films("folder", tmp_path)


def copies(folder, write_dicom, count, patients, **elements):
    for number in range(count):
        said = {"PatientID": patients[number % len(patients)], "StudyInstanceUID": "1.2", "SOPInstanceUID": "1.7"}
        write_dicom(folder / f"f{number}.dcm", PIXELS, **(said | elements))


def test_the_same_instance_twice_is_kept_once(tmp_path, write_dicom):
    copies(tmp_path, write_dicom, 3, ["P1"])
    write_dicom(tmp_path / "g.dcm", PIXELS, PatientID="P2", StudyInstanceUID="1.3")
    made = prepare_films("folder", tmp_path)
    assert made.manifest["image_id"].tolist() == ["f0", "g"]
    assert [(p.kind, p.message) for p in made.problems] == [
        ("duplicate", f"image {tmp_path}/f{n}.dcm is the same instance as {tmp_path}/f0.dcm, which is kept") for n in (1, 2)
    ]


def test_the_same_instance_under_two_patients_stops_unless_allowed(tmp_path, write_dicom):
    copies(tmp_path, write_dicom, 2, ["P1", "P2"])
    with pytest.raises(BadInput, match=r"f1.dcm of patient 'P2' is the same instance .* 'P1' .*--allow-leakage"):
        prepare_films("folder", tmp_path)
    made = prepare_films("folder", tmp_path, allow_leakage=True)
    assert len(made.manifest) == 2
    assert any(note.startswith("warning: ") and "same instance" in note for note in made.notes)


def test_an_identifier_that_many_files_share_says_nothing(tmp_path, write_dicom):
    copies(tmp_path, write_dicom, 6, ["P1", "P2"])
    made = prepare_films("folder", tmp_path)
    assert len(made.manifest) == 6
    assert any("SOPInstanceUID '1.7' of 6 files tells nothing" in note for note in made.notes)


def test_the_command_counts_what_it_left_out(pacs, call, tmp_path):
    root, _ = pacs
    code, out, err = call("prepare", "--images-root", root, "--output-dir", tmp_path / "w", "--frame", 1, "--copy")
    assert code == 0, err
    assert "5 images of 2 patients, " in out
    assert "1 US" in out
    assert "1 for processing" in out
    problems = pd.read_csv(tmp_path / "w/problems.csv")
    assert set(problems["kind"]) == {"US", "MR", "SR", "PR", "DOC", "KO", "for processing", "colour"}
    films = read_manifest(tmp_path / "w/manifest.parquet")
    assert films["path"].str.endswith(".png").all()  # the tomosynthesis by its first frame
