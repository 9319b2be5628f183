"""JPEG, JPEG 2000, BMP and WebP as films: pixels as Pillow decodes them, whether they are lossy, and what is refused."""

from __future__ import annotations

import io

import imagecodecs
import numpy as np
import pydicom
import pytest
import tifffile
from dicom_files import RAMP, jpeg2000, write_dicom
from PIL import Image
from pydicom.uid import JPEG2000, JPEG2000Lossless, JPEGBaseline8Bit

from mammostream.common.errors import BadInput
from mammostream.preprocess.plain import seems_cut
from mammostream.preprocess.reading import IMAGE_SUFFIXES, is_dicom, may_be_image, read_header, read_mammogram


@pytest.fixture(scope="module")
def grey(films):
    """A part of a real film with skin line and tissue, 8 bits."""
    pixels = films[0].pixels[300:700, :301]
    return np.rint(pixels * (255 / pixels.max())).astype(np.uint8)


def saved(path, image, **options):
    Image.fromarray(image).save(path, **options)
    return path


def decoded(path):
    with Image.open(path) as image:
        pixels = np.asarray(image)
    return pixels if pixels.ndim == 2 else pixels[..., 0]


KINDS = [
    (".jpg", {"quality": 90}, True),
    (".JPEG", {"quality": 40, "progressive": True}, True),
    (".jfif", {"format": "jpeg", "quality": 75, "exif": b"Exif\0\0" + bytes(60000)}, True),
    (".bmp", {}, False),
    (".BMP", {}, False),
    (".webp", {"quality": 80}, True),
    (".WebP", {"lossless": True}, False),
    (".jp2", {}, False),
    (".J2K", {"irreversible": True, "quality_mode": "dB", "quality_layers": [50]}, True),
]


@pytest.mark.parametrize("colours", [1, 3])
@pytest.mark.parametrize(("suffix", "options", "lossy"), KINDS)
def test_image_files_are_read_as_pillow_reads_them(tmp_path, grey, suffix, options, lossy, colours):
    stored = grey if colours == 1 else np.stack([grey] * 3, axis=-1)
    path = saved(tmp_path / f"film{suffix}", stored, **options)
    mammogram = read_mammogram(path)
    # A lossy JPEG 2000 is decoded by OpenJPEG in both; JPEG decoders differ by a level.
    assert np.abs(mammogram.pixels.astype(int) - decoded(path)).max() <= (1 if suffix.lower().startswith(".j") else 0)
    assert mammogram.pixels.dtype == np.uint8
    assert np.abs(mammogram.pixels.astype(int) - grey).mean() < 3
    if not lossy:
        np.testing.assert_array_equal(mammogram.pixels, grey)
    header = read_header(path)
    assert (header.height, header.width, header.bits, header.lossy) == (*grey.shape, 8, lossy)
    assert header == mammogram.header
    assert may_be_image(path)
    assert not is_dicom(path)


def test_bmp_of_one_bit_and_of_a_palette(tmp_path, grey):
    bits = grey > 100
    np.testing.assert_array_equal(read_mammogram(saved(tmp_path / "f.bmp", bits)).pixels, bits * np.uint8(255))
    with Image.fromarray(grey) as image:
        image.convert("P").save(tmp_path / "p.bmp")
    np.testing.assert_array_equal(read_mammogram(tmp_path / "p.bmp").pixels, grey)


@pytest.mark.parametrize("bits", [12, 16])
@pytest.mark.parametrize("kind", ["jp2", "j2k"])
def test_jpeg2000_of_more_than_eight_bits(tmp_path, bits, kind):
    pixels = (RAMP << (bits - 12)).astype(np.uint16)
    path = tmp_path / f"f.{kind}"
    path.write_bytes(imagecodecs.jpeg2k_encode(pixels, codecformat=kind, bitspersample=bits, reversible=True))
    mammogram = read_mammogram(path)
    np.testing.assert_array_equal(mammogram.pixels, pixels)
    assert (mammogram.header.bits, mammogram.header.lossy) == (bits, False)


def test_colour_is_refused_in_every_format(tmp_path, grey):
    colour = np.stack([grey, grey, 255 - grey], axis=-1)
    for suffix in (".jpg", ".bmp", ".webp", ".jp2"):
        with pytest.raises(BadInput, match=rf"f{suffix} is in colour; convert it to grey"):
            read_mammogram(saved(tmp_path / f"f{suffix}", colour))


def test_cmyk_is_refused(tmp_path, grey):
    with Image.fromarray(grey) as image:
        image.convert("CMYK").save(tmp_path / "f.jpg")
    with pytest.raises(BadInput, match="has 4 channels"):
        read_mammogram(tmp_path / "f.jpg")


@pytest.mark.parametrize("suffix", [".jpg", ".bmp", ".webp", ".jp2", ".j2k"])
def test_cut_files_are_refused_and_seen_at_a_glance(tmp_path, grey, suffix):
    path = saved(tmp_path / f"f{suffix}", grey)
    assert not seems_cut(path)
    data = path.read_bytes()
    for share in (0.98, 0.5, 0.001):
        path.write_bytes(data[: int(share * len(data))])
        with pytest.raises(BadInput, match=rf"f{suffix} cannot be read") as caught:
            read_mammogram(path)
        assert "\n" not in str(caught.value)


def test_a_jpeg_with_bytes_behind_its_end_is_whole(tmp_path, grey):
    path = saved(tmp_path / "f.jpg", grey)
    expected = read_mammogram(path).pixels
    with path.open("ab") as file:
        file.write(bytes(500))
    np.testing.assert_array_equal(read_mammogram(path).pixels, expected)


def test_an_ending_of_another_format_is_named(tmp_path, grey):
    path = saved(tmp_path / "f.jpg", grey).rename(tmp_path / "f.bmp")
    with pytest.raises(BadInput, match=r"its content is JPEG; rename it to f\.jpg"):
        read_mammogram(path)


def test_every_ending_of_the_list_is_read(tmp_path, grey):
    formats = {".jpe": "jpeg", ".jfif": "jpeg", ".j2c": "jpeg2000", ".j2k": "jpeg2000", ".pgm": "ppm"}
    for suffix in IMAGE_SUFFIXES:
        path = tmp_path / f"f{suffix}"
        if suffix in (".dcm", ".dicom", ".ima"):
            write_dicom(path, RAMP)
        elif suffix in (".j2k", ".j2c"):
            path.write_bytes(imagecodecs.jpeg2k_encode(grey, codecformat="j2k", reversible=True))
        else:
            buffer = io.BytesIO()
            Image.fromarray(grey).save(buffer, formats.get(suffix) or Image.registered_extensions()[suffix])
            path.write_bytes(buffer.getvalue())
        assert read_mammogram(path).pixels.ndim == 2


@pytest.mark.parametrize(
    ("compression", "lossy"), [("jpeg", True), ("zlib", False), ("jpeg2000", False), ("webp", False), (None, False)]
)
def test_a_tiff_says_whether_its_pixels_are_lossy(tmp_path, grey, compression, lossy):
    options = {"level": 100, "reversible": True} if compression == "jpeg2000" else {}
    stored = np.stack([grey] * 3, axis=-1) if compression == "webp" else grey
    options = {"lossless": True} if compression == "webp" else options
    tifffile.imwrite(tmp_path / "f.tif", stored, compression=compression, compressionargs=options)
    assert read_header(tmp_path / "f.tif").lossy is lossy


@pytest.mark.parametrize(
    ("syntax", "declared", "lossy"),
    [
        (JPEG2000Lossless, None, False),
        (JPEG2000, None, None),
        (JPEG2000, "00", False),
        (JPEG2000, "01", True),
        (JPEG2000Lossless, "01", True),  # lossless now, lossy before
    ],
)
def test_dicom_says_whether_its_pixels_are_lossy(tmp_path, syntax, declared, lossy):
    said = {} if declared is None else {"LossyImageCompression": declared}
    path = write_dicom(tmp_path / "f.dcm", RAMP, syntax=syntax, frames=[jpeg2000(RAMP, 12)], **said)
    assert read_header(path).lossy is lossy
    assert read_mammogram(path).header.lossy is lossy


def test_a_jpeg_baseline_dicom_is_lossy(tmp_path, grey):
    frame = imagecodecs.jpeg8_encode(grey, level=95)
    path = write_dicom(tmp_path / "f.dcm", grey, bits=8, syntax=JPEGBaseline8Bit, frames=[frame])
    assert read_header(path).lossy is True
    np.testing.assert_array_equal(read_mammogram(path).pixels, imagecodecs.jpeg8_decode(frame))


@pytest.mark.parametrize("name", ["IM000001", "1.2.840.113619.2.66", "film.IMA", "film.DICOM", "IM.Right CC", "I.12345678901"])
def test_dicom_is_found_whatever_its_ending(tmp_path, name):
    path = write_dicom(tmp_path / name, RAMP)
    assert may_be_image(path)
    np.testing.assert_array_equal(read_mammogram(path).pixels, RAMP)


def test_other_files_without_an_ending_are_no_images(tmp_path, grey):
    (tmp_path / "README").write_text("about these films")
    saved(tmp_path / "film.png", grey).rename(tmp_path / "film")
    (tmp_path / "empty").write_bytes(b"")
    assert not any(may_be_image(tmp_path / name) for name in ("README", "film", "empty"))


@pytest.mark.parametrize("implicit", [True, False])
def test_a_data_set_without_preamble_is_found_by_its_first_element(tmp_path, implicit):
    path = write_dicom(tmp_path / "f.dcm", RAMP)
    dataset = pydicom.dcmread(path)
    dataset.preamble = None
    del dataset.file_meta
    bare = tmp_path / "IM0001"
    dataset.save_as(bare, implicit_vr=implicit, little_endian=True, enforce_file_format=False)
    assert bare.read_bytes()[128:132] != b"DICM"
    assert may_be_image(bare)
    assert is_dicom(bare)
