"""Secondary captures: the picture's own pixels, in the film's study, valid when read again; identity nowhere else."""

from __future__ import annotations

import shutil
import warnings

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.uid import UID

from mammostream.common.errors import BadInput
from mammostream.train.predict.secondary_capture import check_sources, write_secondary_captures

MODEL = "0123456789ab" + "c" * 52
# What PS3.3 asks of a Secondary Capture Image with colours: modules Patient, General Study, General Series, General Equipment,
# General Image, Image Pixel, SC Equipment, SOP Common. Type 1: there with a value; type 2: there.
TYPE_1 = (
    *(
        "StudyInstanceUID",
        "SeriesInstanceUID",
        "SOPInstanceUID",
        "SOPClassUID",
        "Modality",
        "ConversionType",
        "Rows",
        "Columns",
    ),
    *("SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
    *("Columns", "PlanarConfiguration", "PixelData", "SpecificCharacterSet", "InstanceNumber"),
)
TYPE_2 = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "ReferringPhysicianName"),
    *("StudyID", "AccessionNumber", "SeriesNumber", "Manufacturer", "PatientOrientation"),
)


@pytest.fixture
def pictures(tmp_path):
    """Two small heat maps."""
    rng = np.random.default_rng(0)
    paths = {}
    for name in ("mass", "Verkalkung ä"):
        path = tmp_path / f"heatmap_{len(paths)}.png"
        Image.fromarray(rng.integers(0, 256, (31, 23, 3), dtype=np.uint8)).save(path)
        paths[name] = path
    return paths


@pytest.fixture
def film(tmp_path, films):
    """A real film's header, with a patient whose name is no ASCII."""
    path = tmp_path / "film.dcm"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = pydicom.dcmread(films[0].path, stop_before_pixels=True)
        dataset.SpecificCharacterSet = "ISO_IR 100"
        dataset.PatientName, dataset.PatientID, dataset.PatientSex = "Müller^Änne", "4711", "F"
        dataset.PatientBirthDate, dataset.PatientAge, dataset.StudyDescription = "19600102", "055Y", "Früherkennung"
        dataset.LossyImageCompression, dataset.LossyImageCompressionRatio = "01", "7.5"
        dataset.save_as(path)
    return path


def test_captures_hold_the_pictures_and_stand_in_the_films_study(film, pictures):
    paths = write_secondary_captures(film, pictures, MODEL)
    assert paths == [path.with_suffix(".dcm") for path in pictures.values()]
    source, captures = pydicom.dcmread(film), [pydicom.dcmread(path) for path in paths]
    for capture, (name, picture) in zip(captures, pictures.items(), strict=True):
        np.testing.assert_array_equal(capture.pixel_array, np.asarray(Image.open(picture)))
        assert (capture.PhotometricInterpretation, capture.SamplesPerPixel, capture.BitsAllocated) == ("RGB", 3, 8)
        for keyword in ("StudyInstanceUID", "StudyID", "StudyDate", "StudyTime", "PatientID", "PatientBirthDate", "PatientSex"):
            assert capture[keyword].value == source[keyword].value, keyword
        assert str(capture.PatientName) == "Müller^Änne"
        assert (capture.PatientAge, capture.StudyDescription) == ("055Y", "Früherkennung")
        assert (capture.LossyImageCompression, capture.LossyImageCompressionRatio) == ("01", 7.5)  # once lossy, always lossy
        assert "0123456789ab" in capture.SeriesDescription
        assert MODEL in capture.DerivationDescription
        assert name in capture.DerivationDescription
        for text in (capture.SeriesDescription, capture.DerivationDescription):
            assert "not for diagnostic use" in text.lower()
        assert capture.BurnedInAnnotation == "YES"
        assert list(capture.ImageType[:2]) == ["DERIVED", "SECONDARY"]
        (reference,) = capture.SourceImageSequence
        assert reference.ReferencedSOPInstanceUID == source.SOPInstanceUID
        assert capture.ReferencedSeriesSequence[0].SeriesInstanceUID == source.SeriesInstanceUID
    first, second = captures
    assert first.SeriesInstanceUID == second.SeriesInstanceUID != source.SeriesInstanceUID
    assert [c.InstanceNumber for c in captures] == [1, 2]


def test_captures_are_valid_files(film, pictures):
    """What the standard asks of the object is there, and pydicom finds no value that a type does not allow."""
    with pydicom.config.strict_reading():
        for path in write_secondary_captures(film, pictures, MODEL):
            capture = pydicom.dcmread(path)
            assert capture.file_meta.MediaStorageSOPInstanceUID == capture.SOPInstanceUID
            assert capture.SOPClassUID == pydicom.uid.SecondaryCaptureImageStorage
            assert not capture.file_meta.TransferSyntaxUID.is_encapsulated
            for keyword in TYPE_1:
                assert capture[keyword].value not in (None, "", b""), keyword
            for keyword in TYPE_2:
                assert keyword in capture, keyword
            assert len(capture.SeriesDescription) <= 64
            assert len(capture.PixelData) % 2 == 0
            for element in capture.iterall():
                if element.VR == "UI":
                    assert UID(element.value).is_valid


def test_each_capture_is_an_object_of_its_own(film, pictures):
    uids = []
    for _ in range(2):
        uids += [pydicom.dcmread(path).SOPInstanceUID for path in write_secondary_captures(film, pictures, MODEL)]
    assert len(set(uids)) == 4


def test_the_patients_name_is_not_printed(film, pictures, capfd, recwarn):
    dataset = pydicom.dcmread(film)
    dataset.PatientName = "Mass-Test"  # one component, of which the library would warn
    dataset.save_as(film)
    recwarn.clear()
    write_secondary_captures(film, pictures, MODEL)
    assert "Mass-Test" not in "".join(capfd.readouterr())
    assert not [w for w in recwarn if "Mass-Test" in str(w.message)]


@pytest.mark.parametrize("keyword", ["StudyInstanceUID", "SOPInstanceUID", "SeriesInstanceUID"])
def test_a_film_that_names_no_study_is_refused(film, pictures, keyword):
    dataset = pydicom.dcmread(film)
    del dataset[keyword]
    dataset.save_as(film, enforce_file_format=False)
    with pytest.raises(BadInput, match=f"has no {keyword}"):
        write_secondary_captures(film, pictures, MODEL)
    assert not list(film.parent.glob("heatmap*.dcm"))


def test_a_film_with_a_value_that_no_file_may_hold_is_refused(film, pictures):
    dataset = pydicom.dcmread(film)
    dataset.PatientSex = "X"
    dataset.save_as(film)
    with pytest.raises(BadInput, match="gives no valid secondary capture"):
        write_secondary_captures(film, pictures, MODEL)


def test_other_files_than_dicom_are_refused_before_the_work(film, pictures, cropped_films):
    check_sources([film])
    with pytest.raises(BadInput, match=r"DICOM films only: .*heatmap_0.png is none, nor are 1 others"):
        check_sources([film, *pictures.values()])


@pytest.fixture(scope="module")
def predicted(sharp_classifier, finetuned, run_cli, tmp_path_factory):
    """Two DICOM films predicted with captures, one of which names no study."""
    folder = tmp_path_factory.mktemp("captures")
    shutil.copytree(finetuned.films, folder / "films")
    bad = folder / "films/1-280.dcm"
    dataset = pydicom.dcmread(bad)
    del dataset.StudyInstanceUID
    dataset.save_as(bad)
    run_cli(
        f"infer --model-path {sharp_classifier} --images-dir {folder}/films --assume-spacing 0.2 --device cpu "
        f"--output-dir {folder}/out --secondary-capture --sheet-tiles 3"
    )
    return folder


def test_infer_writes_captures_of_its_heat_maps_and_goes_on_where_it_cannot(predicted, finetuned):
    out = predicted / "out"
    captures, pictures = sorted(out.glob("*.dcm")), sorted(out.glob("heatmap*.png"))
    assert len(pictures) == 4  # two films, two classes
    assert [path.stem for path in captures] == [path.stem for path in pictures if "1-130" in path.stem]
    for path in captures:
        capture = pydicom.dcmread(path)
        np.testing.assert_array_equal(capture.pixel_array, np.asarray(Image.open(path.with_suffix(".png")).convert("RGB")))
        assert capture.PatientID == pydicom.dcmread(finetuned.films / "1-130.dcm").PatientID


def test_identity_is_in_the_captures_alone(predicted, finetuned):
    identity = str(pydicom.dcmread(finetuned.films / "1-130.dcm").PatientID).encode()
    assert len(identity) > 5
    holding = {path.suffix for path in (predicted / "out").rglob("*") if path.is_file() and identity in path.read_bytes()}
    assert holding == {".dcm"}


def test_captures_of_anything_but_dicom_films_are_refused(mammostream, sharp_classifier, finetuned, cropped_films, tmp_path):
    infer = f"infer --model-path {sharp_classifier} --device cpu --secondary-capture"
    outcome = mammostream(f"{infer} --shards {finetuned.shards} --output-dir {tmp_path}/a")
    assert outcome.code == 2
    assert "give films and --output-dir" in outcome.error
    outcome = mammostream(f"{infer} --images-dir {cropped_films} --assume-spacing 0.4 --output-dir {tmp_path}/b")
    assert outcome.code == 2
    assert "DICOM films only" in outcome.error
    assert not (tmp_path / "b").exists()
