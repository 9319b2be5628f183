"""Reading: DICOM as pydicom writes it, PNG, TIFF and PGM as others write them, damaged files."""

from __future__ import annotations

import imagecodecs
import numpy as np
import pydicom
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, RLELossless, generate_uid

from common.errors import BadInput
from preprocess.reading import read_header, read_mammogram

RAMP = np.arange(4096, dtype=np.uint16).reshape(64, 64)


def write_dicom(path, pixels, bits=12, photometric="MONOCHROME2", rle=False, **elements):
    """Write a DICOM film: `pixels` as they are stored."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1.2"
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid()
    dataset.Modality = "MG"
    dataset.Rows, dataset.Columns = pixels.shape[-2:]
    dataset.BitsAllocated = 8 * pixels.dtype.itemsize
    dataset.BitsStored, dataset.HighBit = bits, bits - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = photometric
    dataset.PixelData = pixels.tobytes()
    for name, value in elements.items():
        setattr(dataset, name, value)
    if rle:
        dataset.compress(RLELossless)
    dataset.save_as(path, enforce_file_format=True)
    return path


@pytest.mark.parametrize("rle", [False, True])
@pytest.mark.parametrize(("dtype", "bits"), [(np.uint8, 8), (np.uint16, 12), (np.uint16, 16)])
def test_dicom_gives_the_stored_pixels(tmp_path, rle, dtype, bits):
    pixels = np.random.default_rng(0).integers(0, 2**bits, (33, 47)).astype(dtype)
    mammogram = read_mammogram(write_dicom(tmp_path / "f.dcm", pixels, bits, rle=rle))
    assert mammogram.pixels.dtype == dtype
    np.testing.assert_array_equal(mammogram.pixels, pixels)
    assert mammogram.display is None
    assert (mammogram.header.height, mammogram.header.width, mammogram.header.bits) == (33, 47, bits)


@pytest.mark.parametrize("rle", [False, True])
def test_monochrome1_is_turned_over(tmp_path, rle):
    mammogram = read_mammogram(write_dicom(tmp_path / "f.dcm", RAMP, photometric="MONOCHROME1", rle=rle))
    np.testing.assert_array_equal(mammogram.pixels, RAMP.max() - RAMP)


def test_signed_pixels_keep_their_differences(tmp_path):
    stored = (RAMP.astype(np.int16) - 2048).astype(np.int16)
    mammogram = read_mammogram(write_dicom(tmp_path / "f.dcm", stored))
    assert mammogram.pixels.dtype == np.uint16
    np.testing.assert_array_equal(mammogram.pixels, RAMP)


@pytest.mark.parametrize("function", ["LINEAR", "SIGMOID"])
@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
def test_window_gives_the_display(tmp_path, function, photometric):
    centre, width = 1500.0, 1000.0
    path = write_dicom(
        tmp_path / "f.dcm", RAMP, photometric=photometric, WindowCenter=centre, WindowWidth=width, VOILUTFunction=function
    )
    display = read_mammogram(path).display
    x = RAMP.astype(float)
    # DICOM PS3.3 C.11.2.1.2 and C.11.2.1.3, output range [0, 1].
    if function == "LINEAR":
        expected = np.clip((x - (centre - 0.5)) / (width - 1) + 0.5, 0, 1)
    else:
        expected = 1 / (1 + np.exp(-4 * (x - centre) / width))
    expected = 1 - expected if photometric == "MONOCHROME1" else expected
    assert display.dtype == np.float32
    assert display.min() >= 0
    assert display.max() <= 1
    np.testing.assert_allclose(display, expected, atol=2e-6)


def test_window_counts_in_rescaled_units(tmp_path):
    path = write_dicom(
        tmp_path / "f.dcm", RAMP, RescaleSlope=2.0, RescaleIntercept=-1000.0, WindowCenter=2000.0, WindowWidth=2000.0
    )
    expected = np.clip((2.0 * RAMP - 1000 - 1999.5) / 1999 + 0.5, 0, 1)
    np.testing.assert_allclose(read_mammogram(path).display, expected, atol=2e-6)


@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
def test_voi_lut_gives_the_display(tmp_path, photometric):
    table = (np.sqrt(np.linspace(0, 1, 4096)) * 1023).astype(np.uint16)
    lut = Dataset()
    lut.add_new("LUTDescriptor", "US", [4096, 0, 10])
    lut.add_new("LUTData", "US", table.tolist())
    path = write_dicom(tmp_path / "f.dcm", RAMP, photometric=photometric, VOILUTSequence=Sequence([lut]))
    expected = table[RAMP] / 1023
    expected = 1 - expected if photometric == "MONOCHROME1" else expected
    np.testing.assert_allclose(read_mammogram(path).display, expected, atol=1e-6)


@pytest.mark.parametrize("elements", [{"WindowWidth": None, "WindowCenter": None}, {"VOILUTSequence": Sequence([])}])
def test_elements_without_a_value_are_no_display(tmp_path, elements):
    assert read_mammogram(write_dicom(tmp_path / "f.dcm", RAMP, **elements)).display is None


@pytest.mark.parametrize(
    ("elements", "spacing", "source"),
    [
        ({"PixelSpacing": [0.07, 0.07]}, 0.07, "dicom:PixelSpacing"),
        ({"ImagerPixelSpacing": [0.1, 0.1]}, 0.1, "dicom:ImagerPixelSpacing"),
        ({"PixelSpacing": [0.07, 0.07], "ImagerPixelSpacing": [0.1, 0.1]}, 0.07, "dicom:PixelSpacing"),
        ({"PixelSpacing": [0, 0], "ImagerPixelSpacing": [0.1, 0.1]}, 0.1, "dicom:ImagerPixelSpacing"),
        ({"PixelSpacing": None}, None, ""),
        ({}, None, ""),
    ],
)
def test_spacing_and_where_it_came_from(tmp_path, elements, spacing, source):
    path = write_dicom(tmp_path / "f.dcm", RAMP, **elements)
    for header in (read_header(path), read_mammogram(path).header):
        assert header.spacing_mm == (None if spacing is None else pytest.approx(spacing))
        assert header.spacing_source == source


def test_header_facts(tmp_path):
    path = write_dicom(
        tmp_path / "film", RAMP, PatientID="P1", StudyInstanceUID="1.2.3", ImageLaterality="R", ViewPosition="MLO"
    )  # without an ending: the mark at byte 128 says that it is DICOM
    header = read_header(path)
    assert header == read_mammogram(path).header
    assert (header.patient_id, header.study_id, header.laterality, header.view) == ("P1", "1.2.3", "R", "MLO")


@pytest.mark.parametrize(
    ("pixels", "elements", "message"),
    [
        (np.stack([RAMP, RAMP]), {"NumberOfFrames": 2}, "has 2 frames"),
        (RAMP, {"PresentationIntentType": "FOR PROCESSING"}, "FOR PROCESSING"),
        (
            np.zeros((5, 3, 7), np.uint8),
            {"SamplesPerPixel": 3, "PlanarConfiguration": 0, "photometric": "RGB", "Rows": 5, "Columns": 7, "bits": 8},
            "not one grey plane",
        ),
    ],
)
def test_dicom_that_is_no_single_film_is_refused(tmp_path, pixels, elements, message):
    path = write_dicom(tmp_path / "f.dcm", pixels, **elements)
    with pytest.raises(BadInput, match=message) as caught:
        read_mammogram(path)
    assert str(path) in str(caught.value)


def test_real_films_equal_pydicom(films):
    film = films[0]
    mammogram = read_mammogram(film.path)
    np.testing.assert_array_equal(mammogram.pixels, pydicom.dcmread(film.path).pixel_array)
    assert (mammogram.header.laterality, mammogram.header.view) == ("R", "CC")
    assert mammogram.header.patient_id == "Mass-Test_P_00173_RIGHT_CC"
    assert mammogram.header.spacing_mm is None


PLAIN = st.sampled_from([np.uint8, np.uint16]).flatmap(
    lambda kind: arrays.arrays(kind, st.tuples(st.integers(1, 12), st.integers(1, 12)))
)


@given(pixels=PLAIN, suffix=st.sampled_from([".png", ".tif", ".tiff", ".pgm", ".PNG"]))
def test_plain_files_round_trip(tmp_path_factory, pixels, suffix):
    path = tmp_path_factory.getbasetemp() / f"round{suffix}"
    Image.fromarray(pixels).save(path)
    mammogram = read_mammogram(path)
    assert mammogram.pixels.dtype == pixels.dtype
    np.testing.assert_array_equal(mammogram.pixels, pixels)
    assert mammogram.header == read_header(path)
    assert mammogram.header.bits == 8 * pixels.dtype.itemsize
    assert mammogram.display is None


@pytest.mark.parametrize("compression", [None, "zlib", "lzw", "zstd"])
def test_compressed_tiff(tmp_path, compression):
    tifffile.imwrite(tmp_path / "f.tif", RAMP, compression=compression, predictor=compression is not None)
    np.testing.assert_array_equal(read_mammogram(tmp_path / "f.tif").pixels, RAMP)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_tiff_where_zero_is_white_is_turned_over(tmp_path, dtype):
    stored = (RAMP % 256).astype(dtype)
    tifffile.imwrite(tmp_path / "f.tif", stored, photometric="miniswhite")
    np.testing.assert_array_equal(read_mammogram(tmp_path / "f.tif").pixels, np.iinfo(dtype).max - stored)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("channels", [3, 4])
def test_grey_in_rgb_counts_as_grey_and_colour_is_refused(tmp_path, suffix, channels):
    grey = np.random.default_rng(0).integers(0, 256, (20, 30)).astype(np.uint8)
    stack = np.stack([grey] * 3 + [np.full_like(grey, 255)] * (channels - 3), axis=-1)
    path = tmp_path / f"f{suffix}"
    Image.fromarray(stack).save(path)
    np.testing.assert_array_equal(read_mammogram(path).pixels, grey)
    stack[3, 4, 1] ^= 1
    Image.fromarray(stack).save(path)
    with pytest.raises(BadInput, match="is in colour") as caught:
        read_mammogram(path)
    assert str(path) in str(caught.value)


def test_tiff_of_several_pages_is_refused(tmp_path):
    # Black left columns as of a right breast: a stack must not pass for grey channels.
    pages = np.zeros((5, 40, 50), np.uint16)
    pages[:, :, 10:] = 7
    tifffile.imwrite(tmp_path / "f.tif", pages, photometric="minisblack")
    with pytest.raises(BadInput, match="not one plane"):
        read_mammogram(tmp_path / "f.tif")


def test_unsuitable_pixels_are_refused(tmp_path):
    tifffile.imwrite(tmp_path / "f.tif", RAMP.astype(np.float32))
    with pytest.raises(BadInput, match="float32 pixels"):
        read_mammogram(tmp_path / "f.tif")


def write_any(path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 4096, (64, 64)).astype(np.uint16)
    if path.suffix == ".dcm":
        write_dicom(path, pixels, rle="rle" in path.stem)
    elif path.suffix == ".tif":
        tifffile.imwrite(path, pixels, compression="zstd" if "zstd" in path.stem else None)
    else:
        Image.fromarray(pixels).save(path)
    return path


KINDS = ["plain.dcm", "rle.dcm", "plain.tif", "zstd.tif", "f.png", "f.pgm"]


def assert_refused(path):
    with pytest.raises(BadInput) as caught:
        read_mammogram(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message


@pytest.mark.filterwarnings("ignore:End of file reached:UserWarning")
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.7, 0.98])
def test_truncated_file_is_refused_by_name(tmp_path, name, share):
    path = write_any(tmp_path / name)
    read_mammogram(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    assert_refused(path)


@pytest.mark.parametrize("name", ["f.png", "f.tif", "f.pgm", "f.dcm"])
def test_text_is_refused_by_name(tmp_path, name):
    (tmp_path / name).write_text("no image at all\n" * 20)
    assert_refused(tmp_path / name)
    with pytest.raises(BadInput, match=name):
        read_header(tmp_path / name)


@pytest.mark.parametrize(("written", "named"), [("f.png", "g.tif"), ("f.tif", "g.png"), ("f.png", "g.dcm")])
def test_wrong_ending_is_refused_by_name(tmp_path, written, named):
    assert_refused(write_any(tmp_path / written).rename(tmp_path / named))


def test_dicom_is_known_whatever_it_is_called(tmp_path):
    path = write_dicom(tmp_path / "f.png", RAMP)
    np.testing.assert_array_equal(read_mammogram(path).pixels, RAMP)


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "nowhere.png", tmp_path):
        for read in (read_mammogram, read_header):
            with pytest.raises(BadInput, match=f"image {path} does not exist"):
                read(path)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_the_header_tells_the_depth_of_grey_rgb_files(tmp_path, suffix, dtype):
    pixels = np.repeat(np.arange(60, dtype=dtype).reshape(6, 10, 1), 3, axis=2)
    path = tmp_path / f"x.{suffix}"
    if suffix == "png":
        path.write_bytes(imagecodecs.png_encode(pixels))
    else:
        tifffile.imwrite(path, pixels, photometric="rgb")
    assert read_header(path).bits == read_mammogram(path).header.bits == 8 * pixels.dtype.itemsize
