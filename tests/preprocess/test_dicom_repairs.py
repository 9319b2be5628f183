"""DICOM as old exports, converters and faulty writers leave it: what is read, what it is flagged with, what stays refused."""

from __future__ import annotations

import re
import tracemalloc

import imagecodecs
import numpy as np
import pydicom
import pytest
from dicom_files import RAMP, jpeg2000, write_dicom
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.tag import Tag
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from mammostream.common.errors import BadInput
from mammostream.preprocess.reading import ReadingConfig, read_header, read_mammogram
from mammostream.preprocess.tiling import TilingConfig, tile_film

WINDOW = {"WindowCenter": 2000.0, "WindowWidth": 4000.0}


@pytest.fixture(scope="module")
def crop(films):
    """240 x 200 native pixels across the skin line of a real film: uint16, over nearly the whole range."""
    pixels = pydicom.dcmread(films[4].path).pixel_array
    row = len(pixels) // 2
    skin = np.flatnonzero(np.diff(pixels[row] > 20000))[0]
    return pixels[row : row + 240, skin - 100 : skin + 100]


def check(path, stored, flags, header_flags=None):
    """Check the pixels, what they are flagged with, and that the header alone says the same of the film."""
    mammogram = read_mammogram(path)
    np.testing.assert_array_equal(mammogram.pixels, stored)
    assert set(mammogram.header.flags) == set(flags)
    header = read_header(path)
    assert (header.height, header.width) == stored.shape
    if header_flags is not None:
        assert set(header.flags) == set(header_flags)
    return mammogram.header.flags


# Where the data set begins, and how it is encoded


def without_element(data, tag):
    """Cut a short-form element out of the file meta information, and correct the group's length."""
    at = data.index(tag)
    length = int.from_bytes(data[at + 6 : at + 8], "little")
    data = data[:at] + data[at + 8 + length :]
    group = int.from_bytes(data[140:144], "little") - 8 - length
    return data[:140] + group.to_bytes(4, "little") + data[144:]


def data_set_of(path):
    data = path.read_bytes()
    return data[144 + int.from_bytes(data[140:144], "little") :]


SYNTAX = b"\x02\x00\x10\x00UI"


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian])
@pytest.mark.parametrize("what", ["no preamble", "no meta", "preamble without its mark", "no syntax", "no meta and preamble"])
def test_files_without_preamble_or_meta_are_read(tmp_path, crop, syntax, what):
    stored = crop >> 4
    path = write_dicom(tmp_path / "whole.dcm", stored, syntax=syntax, PixelSpacing=[0.07, 0.07], PatientID="P1", **WINDOW)
    whole = read_mammogram(path)
    data = path.read_bytes()
    changed = {
        "no preamble": data[132:],
        "no meta": data_set_of(path),
        "preamble without its mark": data[:128] + data[132:],
        "no syntax": without_element(data, SYNTAX),
        "no meta and preamble": bytes(128) + data_set_of(path),
    }[what]
    path = tmp_path / "f.dcm"
    path.write_bytes(changed)
    expected = set() if what == "no syntax" else {"no_preamble"}
    if what in ("no meta", "no syntax", "no meta and preamble"):
        expected.add("transfer_syntax_assumed")
    check(path, stored, expected, expected)
    again = read_mammogram(path)
    np.testing.assert_array_equal(again.voi, whole.voi)
    assert (again.header.patient_id, again.header.spacing_mm, again.header.bits) == ("P1", 0.07, 12)


def test_compressed_pixels_without_a_syntax_are_read(tmp_path):
    path = write_dicom(tmp_path / "f.dcm", RAMP, syntax=JPEG2000Lossless, frames=[jpeg2000(RAMP, 12)])
    path.write_bytes(data_set_of(path))
    check(path, RAMP, {"no_preamble", "transfer_syntax_assumed"})


@pytest.mark.parametrize("content", [b"", b"no DICOM at all, but some text " * 20, bytes(4000), b"\x08\x00\x05\x00CS\x0a\x00"])
def test_what_is_no_dicom_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "f.dcm"
    path.write_bytes(content)
    for read in (read_header, read_mammogram):
        with pytest.raises(BadInput, match=r"no DICOM file|holds no image") as caught:
            read(path)
        assert "force" not in str(caught.value)


def rename_syntax(path, syntax):
    """Name another transfer syntax in a file."""
    data = path.read_bytes()
    at = data.index(SYNTAX)
    length = int.from_bytes(data[at + 6 : at + 8], "little")
    new = syntax.encode() + b"\0" * (len(syntax) % 2)
    group = int.from_bytes(data[140:144], "little") + len(new) - length
    meta = data[144 : at + 6] + len(new).to_bytes(2, "little") + new
    path.write_bytes(data[:140] + group.to_bytes(4, "little") + meta + data[at + 8 + length :])
    return path


@pytest.mark.parametrize(
    ("true", "said"),
    [
        (ExplicitVRLittleEndian, JPEGLosslessSV1),
        (ExplicitVRLittleEndian, JPEG2000Lossless),
        (ExplicitVRLittleEndian, RLELossless),
        (ExplicitVRLittleEndian, ExplicitVRBigEndian),
        (ImplicitVRLittleEndian, ExplicitVRBigEndian),
        (ExplicitVRBigEndian, ExplicitVRLittleEndian),
        (ExplicitVRBigEndian, ImplicitVRLittleEndian),
        (ExplicitVRLittleEndian, ImplicitVRLittleEndian),
        (ImplicitVRLittleEndian, ExplicitVRLittleEndian),
        (ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian),
        (DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian),
    ],
)
@pytest.mark.filterwarnings("ignore:Expected")
def test_native_pixels_under_a_wrong_syntax_are_read(tmp_path, crop, true, said):
    stored = crop >> 4
    path = rename_syntax(write_dicom(tmp_path / "f.dcm", stored, syntax=true), said)
    check(path, stored, {"transfer_syntax_corrected"}, {"transfer_syntax_corrected"})


@pytest.mark.parametrize("said", [ExplicitVRLittleEndian, RLELossless, JPEGLSLossless])
def test_compressed_pixels_under_a_wrong_syntax_are_read(tmp_path, said):
    path = write_dicom(tmp_path / "f.dcm", RAMP, syntax=JPEG2000Lossless, frames=[jpeg2000(RAMP, 12)])
    check(rename_syntax(path, said), RAMP, {"transfer_syntax_corrected"} if said == ExplicitVRLittleEndian else set())
    path = rename_syntax(write_dicom(tmp_path / "g.dcm", RAMP, rle=True), said)
    check(path, RAMP, {"transfer_syntax_corrected"} if said == ExplicitVRLittleEndian else set())


def test_a_codestream_without_fragments_is_read(tmp_path, crop):
    stored = crop >> 4
    dataset = pydicom.dcmread(write_dicom(tmp_path / "f.dcm", stored))
    dataset.PixelData = jpeg2000(stored, 12) + b"\0" * (len(jpeg2000(stored, 12)) % 2)
    dataset.save_as(tmp_path / "g.dcm")
    check(tmp_path / "g.dcm", stored, {"not_encapsulated", "transfer_syntax_corrected"})


# Ends


def ends_of(frame):
    """A whole codestream with ends that some writers give it."""
    return {"end mark and zeros": frame + bytes(200), "no end mark": frame[:-2], "zeros for the mark": frame[:-2] + bytes(200)}


CODECS = {
    "jpeg": (JPEGBaseline8Bit, 8, lambda p: imagecodecs.jpeg8_encode(p, level=98), imagecodecs.jpeg8_decode),
    "ljpeg": (JPEGLosslessSV1, 12, lambda p: imagecodecs.ljpeg_encode(p, bitspersample=12), imagecodecs.ljpeg_decode),
    "jpeg-ls": (JPEGLSLossless, 12, lambda p: imagecodecs.jpegls_encode(p), imagecodecs.jpegls_decode),
    "jpeg2000": (JPEG2000Lossless, 12, lambda p: jpeg2000(p, 12), imagecodecs.jpeg2k_decode),
    "htj2k": (JPEG2000Lossless, 12, lambda p: imagecodecs.htj2k_encode(p, reversible=True), imagecodecs.jpeg2k_decode),
}


@pytest.mark.parametrize("end", ["end mark and zeros", "no end mark", "zeros for the mark"])
@pytest.mark.parametrize("name", CODECS)
def test_whole_codestreams_are_read_whatever_their_end(tmp_path, crop, name, end):
    syntax, bits, encode, decode = CODECS[name]
    stored = (crop >> (16 - bits)).astype(np.uint8 if bits == 8 else np.uint16)
    frame = bytes(encode(stored))
    path = write_dicom(tmp_path / "f.dcm", stored, bits, syntax=syntax, frames=[ends_of(frame)[end]])
    check(path, decode(frame), set() if end == "end mark and zeros" else {"no_end_mark"})


def test_a_lossless_jpeg_that_ends_in_background_is_read_without_its_mark(tmp_path, crop):
    stored = crop >> 4
    stored[120:] = 0
    frame = bytes(imagecodecs.ljpeg_encode(stored, bitspersample=12))[:-2]
    assert frame.endswith(bytes(9))  # pixels, not padding
    check(write_dicom(tmp_path / "f.dcm", stored, syntax=JPEGLosslessSV1, frames=[frame]), stored, {"no_end_mark"})


@pytest.mark.parametrize("fill", [b"", bytes(500), bytes(60000)])
@pytest.mark.parametrize("share", [0.6, 0.99])
@pytest.mark.parametrize("name", CODECS)
def test_codestreams_that_lack_pixels_stay_refused(tmp_path, crop, name, share, fill):
    syntax, bits, encode, _ = CODECS[name]
    stored = (crop >> (16 - bits)).astype(np.uint8 if bits == 8 else np.uint16)
    frame = bytes(encode(stored))
    path = write_dicom(tmp_path / "f.dcm", stored, bits, syntax=syntax, frames=[frame[: int(len(frame) * share)] + fill])
    with pytest.raises(BadInput, match="cut off|cannot be read"):
        read_mammogram(path)


@pytest.mark.parametrize("name", CODECS)
def test_a_missing_sequence_delimiter_costs_nothing(tmp_path, crop, name):
    syntax, bits, encode, decode = CODECS[name]
    stored = (crop >> (16 - bits)).astype(np.uint8 if bits == 8 else np.uint16)
    frame = bytes(encode(stored))
    path = write_dicom(tmp_path / "f.dcm", stored, bits, syntax=syntax, frames=[frame])
    data = path.read_bytes()
    assert data.endswith(b"\xfe\xff\xdd\xe0\0\0\0\0")
    path.write_bytes(data[:-8])
    check(path, decode(frame), {"no_sequence_delimiter"})


@pytest.mark.parametrize("missing", [1, 2, 40])
def test_pixels_a_few_bytes_short_are_filled_from_the_row_above(tmp_path, crop, missing):
    stored = crop >> 4
    path = write_dicom(tmp_path / "f.dcm", stored)
    path.write_bytes(path.read_bytes()[:-missing])
    mammogram = read_mammogram(path)
    assert f"{missing} of {stored.nbytes} bytes" in mammogram.header.flags["pixels_short"]
    lost = -(-missing // 2)
    np.testing.assert_array_equal(mammogram.pixels.ravel()[:-lost], stored.ravel()[:-lost])
    if missing % 2 == 0:
        np.testing.assert_array_equal(mammogram.pixels[-1, -lost:], stored[-2, -lost:])


def test_pixels_that_lack_a_row_are_refused_and_the_header_knows(tmp_path, crop):
    path = write_dicom(tmp_path / "f.dcm", crop >> 4)
    path.write_bytes(path.read_bytes()[: -crop.shape[1] * 2])
    assert "pixels_missing" in read_header(path).flags
    with pytest.raises(BadInput, match="cut off: 400 of 96000 bytes"):
        read_mammogram(path)


# Bits


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless])
@pytest.mark.parametrize("said", [10, 12])
@pytest.mark.parametrize("bits", [13, 14, 16])
def test_image_content_above_bits_stored_is_read_whole(tmp_path, crop, bits, said, syntax):
    stored = crop >> (16 - bits)
    rle = syntax == RLELossless
    path = write_dicom(tmp_path / "f.dcm", stored, said, rle=rle, syntax=ExplicitVRLittleEndian if rle else syntax)
    check(path, stored, {"bits_exceed_stored"})
    assert read_mammogram(path).header.bits == int(stored.max()).bit_length()


@pytest.mark.parametrize("name", ["jpeg2000", "ljpeg", "jpeg-ls"])
def test_a_codestream_of_more_bits_than_the_header_is_read_whole(tmp_path, crop, name):
    syntax, _, encode, _ = CODECS[name]
    stored = crop >> 4
    check(write_dicom(tmp_path / "f.dcm", stored, 10, syntax=syntax, frames=[encode(stored)]), stored, {"bits_exceed_stored"})


def test_signed_content_above_bits_stored_is_read_whole(tmp_path, crop):
    stored = ((crop >> 2).astype(np.int32) - 8192).astype(np.int16)
    check(write_dicom(tmp_path / "f.dcm", stored, 12), stored.astype(int) - stored.min(), {"bits_exceed_stored"})


@pytest.mark.parametrize("plane", [12, 13, 15])
def test_overlays_in_high_bits_are_cut_off(tmp_path, crop, plane):
    stored = crop >> 4
    drawn = stored.copy()
    drawn[30:60, 20:180] |= 1 << plane  # a box
    drawn[100:200:7, 50:150] |= 1 << plane  # lines
    check(write_dicom(tmp_path / "f.dcm", drawn), stored, set())


def test_left_justified_values_are_moved(tmp_path, crop):
    stored = crop >> 4
    check(write_dicom(tmp_path / "f.dcm", stored << 4, HighBit=15), stored, {"left_justified"})
    signed = (stored.astype(np.int32) - 2048).astype(np.int16)
    check(write_dicom(tmp_path / "g.dcm", signed << 4, HighBit=15), signed.astype(int) - signed.min(), {"left_justified"})
    check(write_dicom(tmp_path / "h.dcm", stored << 2, HighBit=13), stored, {"left_justified"})
    # Overlays may lie in the low bits then.
    drawn = stored << 4
    drawn[30:60, 20:180] |= 1
    check(write_dicom(tmp_path / "i.dcm", drawn, HighBit=15), stored, {"left_justified"})


def test_a_high_bit_that_the_values_belie_is_passed_over(tmp_path, crop):
    stored = crop >> 4
    check(write_dicom(tmp_path / "f.dcm", stored, HighBit=15), stored, {"high_bit_ignored"})
    check(write_dicom(tmp_path / "g.dcm", stored, HighBit=7), stored, {"high_bit_ignored"})
    check(write_dicom(tmp_path / "h.dcm", crop, HighBit=15), crop, {"bits_exceed_stored"})


# Windows


def ignored(path):
    mammogram = read_mammogram(path)
    assert mammogram.voi is None
    return mammogram.header.flags["window_ignored"]


@pytest.mark.parametrize(
    ("elements", "numbers"),
    [
        ({"WindowCenter": 2048.0, "WindowWidth": 0.0}, "WindowCenter 2048.*WindowWidth 0"),
        ({"WindowCenter": 2048.0, "WindowWidth": -400.0}, "-400"),
        ({"WindowCenter": 0.456, "WindowWidth": 0.913, "RescaleSlope": 0.000244, "RescaleIntercept": 0.0}, "0.913"),
        ({"WindowCenter": 20.0, "WindowWidth": 0.0, "VOILUTFunction": "SIGMOID"}, "WindowWidth 0"),
        ({"WindowCenter": 5.0, "WindowWidth": 9.0, "RescaleSlope": 0.0, "RescaleIntercept": 0.0}, "RescaleSlope 0"),
    ],
)
def test_an_invalid_window_is_passed_over(tmp_path, elements, numbers):
    path = write_dicom(tmp_path / "f.dcm", RAMP, **elements)
    np.testing.assert_array_equal(read_mammogram(path).pixels, RAMP)
    assert re.search(numbers, ignored(path))


def with_text(path, keyword, written):
    """Write an element of text as some other program would, valid or not."""
    dataset = pydicom.dcmread(path)
    tag = Tag(keyword)
    raw = written.encode() + b" " * (len(written) % 2)
    dataset[tag] = RawDataElement(tag, pydicom.datadict.dictionary_VR(tag), len(raw), raw, 0, False, True)
    dataset.save_as(path)
    return path


def test_text_in_a_window_is_no_fault_of_the_film(tmp_path):
    path = with_text(write_dicom(tmp_path / "f.dcm", RAMP, **WINDOW), "WindowWidth", "wide")
    assert "wide" in ignored(path)
    path = with_text(write_dicom(tmp_path / "g.dcm", RAMP, **WINDOW), "WindowWidth", "4000,0")
    np.testing.assert_array_equal(read_mammogram(path).voi, read_mammogram(write_dicom(tmp_path / "h.dcm", RAMP, **WINDOW)).voi)


@pytest.fixture(scope="module")
def breast(films):
    """A whole film at about 0.2 mm, 12 bits."""
    return np.ascontiguousarray(pydicom.dcmread(films[4].path).pixel_array[::4, ::4] >> 4)


SMALL = {"tile_size": 128, "stride": 128}


def tiled(path, **options):
    config = TilingConfig(**SMALL, **options)
    return tile_film(read_mammogram(path, config), config)


@pytest.mark.parametrize("window", [(0, 1), (-1000, 10), (30000, 60000), (2048, 1), (60000, 100)])
def test_a_window_that_leaves_the_breast_without_contrast_is_passed_over(tmp_path, breast, window):
    spacing = {"PixelSpacing": [0.2, 0.2]}
    bare = tiled(write_dicom(tmp_path / "bare.dcm", breast, **spacing))
    path = write_dicom(tmp_path / "f.dcm", breast, WindowCenter=window[0], WindowWidth=window[1], **spacing)
    film = tiled(path)
    assert film.mapping == bare.mapping
    np.testing.assert_array_equal(film.image, bare.image)
    assert f"window {window[0]}/{window[1]}" in film.remarks["window_ignored"]
    assert "window_ignored" in film.flags


def test_a_good_window_stays_and_the_mapping_can_be_chosen(tmp_path, breast):
    path = write_dicom(tmp_path / "f.dcm", breast, PixelSpacing=[0.2, 0.2], **WINDOW)
    film = tiled(path)
    assert film.mapping == "voi"
    assert "window_ignored" not in film.flags
    np.testing.assert_allclose(film.image, np.clip((breast - 1999.5) / 3999 + 0.5, 0, 1), atol=1e-6)
    bare = tiled(write_dicom(tmp_path / "bare.dcm", breast, PixelSpacing=[0.2, 0.2]))
    percentile = tiled(path, mapping="percentile")
    assert percentile.mapping == bare.mapping
    np.testing.assert_array_equal(percentile.image, bare.image)
    full = tiled(path, mapping="full")
    assert full.mapping == "full 0..4095"
    np.testing.assert_allclose(full.image, breast / 4095, atol=1e-6)


@pytest.mark.parametrize(("said", "held"), [(16, 12), (16, 10), (12, 16), (8, 12)])
def test_a_voi_lut_of_other_bits_than_it_says_counts_by_its_largest_entry(tmp_path, said, held):
    table = np.sqrt(np.linspace(0, 1, 4096)) * (2**held - 1)
    lut = Dataset()
    lut.LUTDescriptor, lut.LUTData = [4096, 0, said], table.astype("<u2").tobytes()
    mammogram = read_mammogram(write_dicom(tmp_path / "f.dcm", RAMP, VOILUTSequence=Sequence([lut])))
    np.testing.assert_allclose(mammogram.voi[mammogram.pixels], table[RAMP].astype(int) / (2**held - 1), atol=1e-6)
    assert str(2**held - 1) in mammogram.header.flags["voi_lut_bits"]


def test_a_voi_lut_of_bytes_and_a_torn_one(tmp_path):
    lut = Dataset()
    lut.LUTDescriptor, lut.LUTData = [4096, 0, 8], (np.arange(4096) >> 4).astype(np.uint8).tobytes()
    mammogram = read_mammogram(write_dicom(tmp_path / "f.dcm", RAMP, VOILUTSequence=Sequence([lut])))
    np.testing.assert_allclose(mammogram.voi[mammogram.pixels], (RAMP >> 4) / 255, atol=1e-6)
    lut.LUTData = lut.LUTData[:1000]
    assert "no table" in ignored(write_dicom(tmp_path / "g.dcm", RAMP, VOILUTSequence=Sequence([lut])))
    # The window next to it counts then.
    path = write_dicom(tmp_path / "h.dcm", RAMP, VOILUTSequence=Sequence([lut]), **WINDOW)
    np.testing.assert_array_equal(read_mammogram(path).voi, read_mammogram(write_dicom(tmp_path / "i.dcm", RAMP, **WINDOW)).voi)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_a_falling_rescale_turns_the_film(tmp_path, photometric):
    falling = {"RescaleSlope": -1.0, "RescaleIntercept": 4095.0}
    dense = RAMP if photometric == "MONOCHROME1" else RAMP.max() - RAMP
    mammogram = read_mammogram(write_dicom(tmp_path / "f.dcm", RAMP, 12, photometric, **falling))
    np.testing.assert_array_equal(mammogram.pixels, dense)
    mammogram = read_mammogram(write_dicom(tmp_path / "g.dcm", RAMP, 12, photometric, **falling, **WINDOW))
    shown = np.clip((4095.0 - RAMP - 1999.5) / 3999 + 0.5, 0, 1)
    shown = 1 - shown if photometric == "MONOCHROME1" else shown
    np.testing.assert_allclose(mammogram.voi[mammogram.pixels], shown, atol=1e-6)
    assert (np.diff(mammogram.voi) >= 0).all()


# Attributes


@pytest.mark.parametrize(
    "names",
    [
        ("PhotometricInterpretation",),
        ("SamplesPerPixel",),
        ("PixelRepresentation",),
        ("BitsStored",),
        ("BitsStored", "HighBit"),
        ("BitsAllocated",),
        ("BitsAllocated", "BitsStored", "HighBit"),
        ("PhotometricInterpretation", "SamplesPerPixel", "PixelRepresentation", "BitsAllocated", "BitsStored", "HighBit"),
    ],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_attributes_left_out_are_assumed(tmp_path, crop, names, compressed):
    stored = crop >> 4
    how = {"syntax": JPEG2000Lossless, "frames": [jpeg2000(stored, 12)]} if compressed else {}
    dataset = pydicom.dcmread(write_dicom(tmp_path / "f.dcm", stored, **how))
    for name in names:
        delattr(dataset, name)
    dataset.save_as(tmp_path / "f.dcm")
    said = check(tmp_path / "f.dcm", stored, {"attributes_assumed"}, {"attributes_assumed"})["attributes_assumed"]
    assert all(name in said for name in names if name != "HighBit")


@pytest.mark.parametrize(
    ("written", "spacing"),
    [
        ("0,143\\0,143", 0.143),
        ("0.143,0.143", None),
        ("0.2 mm\\0.2 mm", None),
        ("0.2", None),
        ("\\", None),
        ("unknown", None),
        ("1\\1", None),
        ("70\\70", None),
        ("0.0001\\0.0001", None),
        ("nan\\nan", None),
    ],
)
def test_a_spacing_that_is_none_is_unknown_and_the_film_is_read(tmp_path, written, spacing):
    path = with_text(write_dicom(tmp_path / "f.dcm", RAMP, PixelSpacing=[0.1, 0.1]), "PixelSpacing", written)
    for header in (read_header(path), read_mammogram(path).header):
        assert header.spacing_mm == spacing
        assert ("spacing_ignored" in header.flags) == (spacing is None)
    np.testing.assert_array_equal(read_mammogram(path).pixels, RAMP)
    dataset = pydicom.dcmread(path)
    dataset.ImagerPixelSpacing = [0.07, 0.07]
    dataset.save_as(path)
    if spacing is None:
        assert read_header(path).spacing_source == "dicom:ImagerPixelSpacing"


def test_a_film_larger_than_any_detector_is_doubted(tmp_path, breast):
    assert "cm" in tiled(write_dicom(tmp_path / "f.dcm", breast, PixelSpacing=[0.4, 0.4])).remarks["spacing_doubtful"]
    assert "spacing_doubtful" not in tiled(write_dicom(tmp_path / "g.dcm", breast, PixelSpacing=[0.2, 0.2])).flags


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"PixelData": None, "FloatPixelData": np.ones((64, 64), "<f4").tobytes()}, "FloatPixelData.*convert it to integers"),
        ({"PixelData": None, "DoubleFloatPixelData": np.ones((64, 64)).tobytes()}, "DoubleFloatPixelData"),
        ({"PixelData": None}, "has no pixel data .modality MG"),
        ({"Rows": None, "PixelData": None}, "holds no image"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "PALETTE COLOR, not one grey plane"),
        ({"PhotometricInterpretation": "YBR_FULL"}, "YBR_FULL, not one grey plane"),
        ({"BitsAllocated": 32}, "12 of 32 bits"),
        ({"BitsAllocated": 12}, "12 of 12 bits"),
        ({"NumberOfFrames": 5}, "has 5 frames"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_oddities_are_refused_in_one_line(tmp_path, change, message):
    dataset = pydicom.dcmread(write_dicom(tmp_path / "f.dcm", RAMP))
    for name, value in change.items():
        if value is None:
            delattr(dataset, name)
        else:
            setattr(dataset, name, value)
    dataset.save_as(tmp_path / "f.dcm")
    with pytest.raises(BadInput, match=message) as caught:
        read_mammogram(tmp_path / "f.dcm")
    assert "attribute" not in str(caught.value)
    assert "\n" not in str(caught.value)


# Frames


def slices(count, shape=(64, 64)):
    """Noise, a bright spot in another place in each slice."""
    frames = np.random.default_rng(0).integers(100, 900, (count, *shape)).astype(np.uint16)
    for number, frame in enumerate(frames):
        frame[number, number] = 4000
    return frames


@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
@pytest.mark.parametrize("kind", ["plain", "rle", "jpeg2000"])
def test_middle_and_maximum_of_several_frames(tmp_path, kind, photometric):
    frames = slices(5)
    frames = frames if photometric == "MONOCHROME2" else 4095 - frames
    how = {"rle": kind == "rle"}
    if kind == "jpeg2000":
        how = {"syntax": JPEG2000Lossless, "frames": [jpeg2000(f, 12) for f in frames]}
    path = write_dicom(tmp_path / "f.dcm", frames, 12, photometric, NumberOfFrames=5, **how)

    def read(frame):
        return read_mammogram(path, ReadingConfig(frame=frame)).pixels.astype(int)

    np.testing.assert_array_equal(read("middle"), read(3))
    np.testing.assert_array_equal(read("3"), read(3))
    dense = frames.astype(int) if photometric == "MONOCHROME2" else 4095 - frames.astype(int)
    projection = dense.max(axis=0) - (0 if photometric == "MONOCHROME2" else dense.max(axis=0).min())
    np.testing.assert_array_equal(read("max"), projection)
    single = write_dicom(tmp_path / "g.dcm", RAMP)
    for frame in ("middle", "max"):
        np.testing.assert_array_equal(read_mammogram(single, ReadingConfig(frame=frame)).pixels, RAMP)


@pytest.mark.parametrize("frame", ["0", "-1", "first", "1.5", "max imum"])
def test_other_frames_are_refused(frame):
    with pytest.raises(BadInput, match="'middle' or 'max'"):
        ReadingConfig(frame=frame)


@pytest.mark.parametrize("kind", ["plain", "jpeg2000"])
def test_a_projection_holds_few_frames_in_memory(tmp_path, kind):
    frames = slices(40, (512, 512))
    how = {"syntax": JPEG2000Lossless, "frames": [jpeg2000(f, 12) for f in frames]} if kind == "jpeg2000" else {}
    path = write_dicom(tmp_path / "f.dcm", frames, NumberOfFrames=40, **how)
    read_mammogram(path, ReadingConfig(frame="max"))  # imports
    tracemalloc.start()
    pixels = read_mammogram(path, ReadingConfig(frame="max")).pixels
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    np.testing.assert_array_equal(pixels, frames.max(axis=0))
    assert peak < 8 * frames[0].nbytes


# Views and what else the header says


def item(value, meaning="", scheme="SRT", **more):
    dataset = Dataset()
    dataset.CodeValue, dataset.CodingSchemeDesignator, dataset.CodeMeaning = value, scheme, meaning
    for name, inside in more.items():
        setattr(dataset, name, inside)
    return dataset


@pytest.mark.parametrize(
    ("code", "modifiers", "view", "names"),
    [
        (("R-10242", "cranio-caudal"), [], "CC", ""),
        (("399368009", "", "SCT"), [], "MLO", ""),
        (("R-10224", "", "SNM3"), ["R-102D6"], "ML", "magnification"),
        (("399162004", "", "SCT"), ["399055006", "399163009"], "CC", "magnification spot"),
        (("R-10226",), ["R-102D5"], "MLO", "implant_displaced"),
        (("R-10226",), ["R-102D1"], "AT", "axillary_tail"),
        (("Y-X1770",), [], "XCCL", ""),
        (("12345", "Medio-Lateral Oblique", "99LOCAL"), [], "MLO", ""),
    ],
)
def test_view_codes_are_read(tmp_path, code, modifiers, view, names):
    sequence = Sequence([item(*code, ViewModifierCodeSequence=Sequence([item(m) for m in modifiers]))])
    path = write_dicom(tmp_path / "f.dcm", RAMP, ViewCodeSequence=sequence, ImageLaterality="L", ViewPosition="ML")
    header = read_header(path)
    assert (header.view, header.view_modifiers, header.laterality) == (view, names, "L")


def test_the_header_says_what_films_may_be_left_out_for(tmp_path):
    said = {"BreastImplantPresent": "YES", "PartialView": "NO", "Manufacturer": "HOLOGIC, Inc.", "ManufacturerModelName": "Dim"}
    path = write_dicom(tmp_path / "f.dcm", RAMP, PresentationIntentType="FOR PRESENTATION", ViewPosition="rmlo", **said)
    header = read_header(path)
    assert (header.implant, header.partial_view, header.intent) == ("YES", "NO", "FOR PRESENTATION")
    assert (header.manufacturer, header.model) == ("HOLOGIC, Inc.", "Dim")
    assert (header.view, header.laterality) == ("MLO", "R")
    assert read_mammogram(path).header == header
    raw = write_dicom(tmp_path / "g.dcm", RAMP, SOPClassUID="1.2.840.10008.5.1.4.1.1.1.2.1")
    assert read_header(raw).intent == "FOR PROCESSING"


def test_text_in_the_files_own_character_set(tmp_path):
    path = write_dicom(tmp_path / "f.dcm", RAMP, SpecificCharacterSet="ISO_IR 192", PatientID="Zoë", Manufacturer="Müller")
    header = read_header(path)
    assert (header.patient_id, header.manufacturer) == ("Zoë", "Müller")


def test_fragments_of_one_frame_are_joined(tmp_path, crop):
    stored = crop >> 4
    frame = jpeg2000(stored, 12)
    path = write_dicom(tmp_path / "f.dcm", stored, syntax=JPEG2000Lossless, frames=[frame])
    dataset = pydicom.dcmread(path)
    dataset.PixelData = encapsulate([frame], fragments_per_frame=3)
    dataset.save_as(path)
    check(path, stored, set())
