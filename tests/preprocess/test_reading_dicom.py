"""DICOM: transfer syntaxes, display tables, padding, spacing, frames; each file written here and read back."""

from __future__ import annotations

import imagecodecs
import numpy as np
import pydicom
import pytest
from dicom_files import RAMP, jpeg2000, write_dicom
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.pixels import apply_rescale, apply_voi_lut
from pydicom.sequence import Sequence
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from mammostream.common.errors import BadInput
from mammostream.preprocess import dicom, dicom_pixels
from mammostream.preprocess.reading import ReadingConfig, read_header, read_mammogram

NATIVE = [ImplicitVRLittleEndian, ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian]


def lossless_jpeg(predictor):
    return lambda p, bits: imagecodecs.jpeg8_encode(p, lossless=True, predictor=predictor, bitspersample=bits)


LOSSLESS = {
    "sv1": (JPEGLosslessSV1, lossless_jpeg(1)),
    "process14-4": (JPEGLossless, lossless_jpeg(4)),
    "process14-2": (JPEGLossless, lossless_jpeg(2)),
    "jpeg-ls": (JPEGLSLossless, lambda p, bits: imagecodecs.jpegls_encode(p)),
    "jpeg2000": (JPEG2000Lossless, jpeg2000),
    # In a JP2 file, as some archives have it against the standard.
    "jp2": (JPEG2000Lossless, lambda p, bits: imagecodecs.jpeg2k_encode(p, reversible=True, codecformat="jp2")),
    "htj2k": (HTJ2KLossless, lambda p, bits: imagecodecs.htj2k_encode(p, reversible=True)),
    "htj2k-rpcl": (HTJ2KLosslessRPCL, lambda p, bits: imagecodecs.htj2k_encode(p, reversible=True, tlm=True)),
}
LOSSY = {  # syntax, encoder, largest difference in 1/4096 of the range
    "baseline": (JPEGBaseline8Bit, 8, lambda p: imagecodecs.jpeg8_encode(p, level=98), 64),
    "extended-8": (JPEGExtended12Bit, 8, lambda p: imagecodecs.jpeg8_encode(p, level=98), 64),
    "extended-12": (JPEGExtended12Bit, 12, lambda p: imagecodecs.jpeg8_encode(p, level=98, bitspersample=12), 12),
    "jpeg-ls-near": (JPEGLSNearLossless, 12, lambda p: imagecodecs.jpegls_encode(p, level=3), 3),
    "jpeg2000": (JPEG2000, 12, lambda p: imagecodecs.jpeg2k_encode(p, level=90, codecformat="j2k"), 12),
    "htj2k": (HTJ2K, 12, lambda p: imagecodecs.htj2k_encode(p, level=0.0002, reversible=False), 32),
}


@pytest.fixture(scope="module")
def crop(films):
    """200 x 151 native pixels across the skin line of a real film: uint16, both below and above half of the range."""
    pixels = pydicom.dcmread(films[4].path).pixel_array
    row = len(pixels) // 2
    skin = np.flatnonzero(np.diff(pixels[row] > 20000))[0]
    pixels = pixels[row : row + 200, skin - 75 : skin + 76]
    assert pixels.min() < 2**13
    assert pixels.max() > 2**15
    return pixels


def at_depth(pixels, bits):
    return (pixels >> (16 - bits)).astype(np.uint8 if bits <= 8 else np.uint16)


def as_pixels(stored):
    """How stored values should come: moved up where they go below 0."""
    return stored.astype(int) - min(int(stored.min()), 0)


def to_signed(pixels, bits):
    return (pixels.astype(np.int32) - (1 << (bits - 1))).astype(f"i{pixels.dtype.itemsize}")


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("syntax", [*NATIVE, RLELossless])
def test_uncompressed_and_rle_are_read_bit_for_bit(tmp_path, crop, syntax, bits, signed):
    stored = to_signed(at_depth(crop, bits), bits) if signed else at_depth(crop, bits)
    rle = syntax == RLELossless
    path = write_dicom(tmp_path / "f.dcm", stored, bits, rle=rle, syntax=ExplicitVRLittleEndian if rle else syntax)
    mammogram = read_mammogram(path)
    assert mammogram.pixels.dtype == (np.uint8 if bits == 8 else np.uint16)
    np.testing.assert_array_equal(mammogram.pixels, as_pixels(stored))
    assert mammogram.header.bits == bits
    assert mammogram.header == read_header(path)


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_syntaxes_are_read_bit_for_bit(tmp_path, crop, name, bits):
    syntax, encode = LOSSLESS[name]
    stored = at_depth(crop, bits)
    path = write_dicom(tmp_path / "f.dcm", stored, bits, syntax=syntax, frames=[encode(stored, bits)])
    mammogram = read_mammogram(path)
    assert mammogram.pixels.dtype == stored.dtype
    np.testing.assert_array_equal(mammogram.pixels, stored)


@pytest.mark.parametrize("name", LOSSY)
def test_lossy_syntaxes_are_read_within_their_loss(tmp_path, crop, name):
    syntax, bits, encode, largest = LOSSY[name]
    stored = at_depth(crop, bits)
    frame = encode(stored)
    path = write_dicom(tmp_path / "f.dcm", stored, bits, syntax=syntax, frames=[frame])
    pixels = read_mammogram(path).pixels
    assert pixels.dtype == stored.dtype
    loss = np.abs(pixels.astype(int) - stored) * 4096 // 2**bits
    assert 0 < loss.max() <= largest
    assert len(frame) < stored.nbytes


@pytest.mark.parametrize(
    ("syntax", "encode"),
    [
        # JPEG and JPEG-LS know no sign: they carry the bits of two's complement.
        (JPEGLosslessSV1, lambda p: imagecodecs.jpeg8_encode(p.view(np.uint16), lossless=True)),
        (JPEGLosslessSV1, lambda p: imagecodecs.jpeg8_encode(p.view(np.uint16) & 0xFFF, lossless=True, bitspersample=12)),
        (JPEGLSLossless, lambda p: imagecodecs.jpegls_encode(p.view(np.uint16))),
        (JPEGLSLossless, lambda p: imagecodecs.jpegls_encode(p.view(np.uint16) & 0xFFF)),
        (JPEG2000Lossless, lambda p: jpeg2000(p, None)),
        (JPEG2000Lossless, lambda p: jpeg2000(p.view(np.uint16) & 0xFFF, 12)),  # the sign missing from the codestream
    ],
)
def test_compressed_signed_values_keep_their_sign(tmp_path, crop, syntax, encode):
    stored = to_signed(at_depth(crop, 12), 12)
    assert stored.min() < 0 < stored.max()
    path = write_dicom(tmp_path / "f.dcm", stored, 12, syntax=syntax, frames=[encode(stored)])
    np.testing.assert_array_equal(read_mammogram(path).pixels, as_pixels(stored))


def test_unused_bits_are_cut_off_and_lossy_overshoot_is_clipped(tmp_path):
    # Overlays used to live in the unused high bits.
    path = write_dicom(tmp_path / "f.dcm", RAMP | 0x8000, 12)
    np.testing.assert_array_equal(read_mammogram(path).pixels, RAMP)
    beyond = RAMP + np.uint16(10)
    path = write_dicom(tmp_path / "g.dcm", RAMP, 12, syntax=JPEG2000, frames=[jpeg2000(beyond, 16)])
    np.testing.assert_array_equal(read_mammogram(path).pixels, np.minimum(beyond, 4095))


def test_codestreams_are_told_by_themselves(tmp_path):
    # The syntax names another codec than the frame's.
    path = write_dicom(tmp_path / "f.dcm", RAMP, 12, syntax=JPEG2000Lossless, frames=[imagecodecs.jpegls_encode(RAMP)])
    np.testing.assert_array_equal(read_mammogram(path).pixels, RAMP)


def test_unknown_syntax_and_another_size_are_refused(tmp_path):
    path = write_dicom(tmp_path / "f.dcm", RAMP, 12, syntax="1.2.840.10008.1.2.4.102", frames=[b"\0\0\0\x18ftypmp42" * 9])
    with pytest.raises(BadInput, match="MPEG-4.*not supported; convert it to uncompressed"):
        read_mammogram(path)
    path = write_dicom(tmp_path / "g.dcm", RAMP, 12, syntax=JPEG2000Lossless, frames=[jpeg2000(RAMP[:32], 12)])
    with pytest.raises(BadInput, match="32 x 64 pixels, its header 64 x 64"):
        read_mammogram(path)


def cut_off(frame):
    return frame[: len(frame) * 6 // 10]


@pytest.mark.parametrize("name", [*LOSSLESS, *LOSSY])
def test_codestream_that_is_cut_off_is_refused(tmp_path, crop, name):
    if name in LOSSLESS:
        syntax, encode = LOSSLESS[name]
        stored, bits = at_depth(crop, 12), 12
        frame = encode(stored, bits)
    else:
        syntax, bits, encode, _ = LOSSY[name]
        stored = at_depth(crop, bits)
        frame = encode(stored)
    path = write_dicom(tmp_path / "f.dcm", stored, bits, syntax=syntax, frames=[cut_off(bytes(frame))])
    with pytest.raises(BadInput, match="cannot be read") as caught:
        read_mammogram(path)
    assert str(path) in str(caught.value)


def by_pydicom(path):
    """The display of the whole image as pydicom computes it, scaled to [0, 1] by the range of its output."""
    dataset = pydicom.dcmread(path)
    shown = apply_voi_lut(apply_rescale(dataset.pixel_array.astype(np.int32), dataset), dataset).astype(float)
    if dataset.get("VOILUTSequence"):
        low, high = 0, 2 ** dataset.VOILUTSequence[0].LUTDescriptor[2] - 1
    else:
        ends = np.array([-2048, 2047] if dataset.PixelRepresentation else [0, 4095], float)
        low, high = ends * dataset.get("RescaleSlope", 1) + dataset.get("RescaleIntercept", 0)
    shown = np.clip((shown - low) / (high - low), 0, 1)
    return 1 - shown if dataset.PhotometricInterpretation == "MONOCHROME1" else shown


def check_display(path):
    mammogram = read_mammogram(path)
    assert mammogram.voi.dtype == np.float32
    assert mammogram.voi.min() >= 0
    assert mammogram.voi.max() <= 1
    assert int(mammogram.pixels.max()) < len(mammogram.voi) <= 65536
    display = mammogram.voi[mammogram.pixels]
    np.testing.assert_allclose(display, by_pydicom(path), atol=1e-6)
    assert np.ptp(display) > 0.3
    return display


@pytest.mark.parametrize("rescale", [{}, {"RescaleSlope": 2.0, "RescaleIntercept": -1000.0}])
@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID", None])
@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
@pytest.mark.parametrize("signed", [False, True])
def test_window_gives_the_display(tmp_path, signed, photometric, function, rescale):
    stored = to_signed(RAMP, 12) if signed else RAMP
    centre = (-500.0 if signed else 1500.0) * rescale.get("RescaleSlope", 1) + rescale.get("RescaleIntercept", 0)
    named = {} if function is None else {"VOILUTFunction": function}
    elements = {"WindowCenter": centre, "WindowWidth": 1001.0} | rescale | named
    check_display(write_dicom(tmp_path / "f.dcm", stored, 12, photometric, **elements))


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_window_is_the_standards(tmp_path, function):
    path = write_dicom(tmp_path / "f.dcm", RAMP, WindowCenter=1500.0, WindowWidth=1000.0, VOILUTFunction=function)
    x = RAMP.astype(float)
    expected = {  # PS3.3 C.11.2.1.2 and C.11.2.1.3
        "LINEAR": np.clip((x - 1499.5) / 999 + 0.5, 0, 1),
        "LINEAR_EXACT": np.clip((x - 1500) / 1000 + 0.5, 0, 1),
        "SIGMOID": 1 / (1 + np.exp(-4 * (x - 1500) / 1000)),
    }[function]
    mammogram = read_mammogram(path)
    np.testing.assert_allclose(mammogram.voi[mammogram.pixels], expected, atol=1e-6)


def test_the_first_of_several_windows_counts(tmp_path):
    path = write_dicom(tmp_path / "f.dcm", RAMP, WindowCenter=[1500.0, 100.0], WindowWidth=[1000.0, 20.0])
    one = write_dicom(tmp_path / "g.dcm", RAMP, WindowCenter=1500.0, WindowWidth=1000.0)
    np.testing.assert_array_equal(read_mammogram(path).voi, read_mammogram(one).voi)


def voi_lut(depth, entries=4096, first=0, words=False, vr="US"):
    table = (np.sqrt(np.linspace(0, 1, entries)) * (2**depth - 1)).astype(np.uint16)
    lut = Dataset()
    lut.add_new("LUTDescriptor", vr, [entries, first, depth])
    lut.add_new("LUTData", "OW" if words else "US", table.astype("<u2").tobytes() if words else table.tolist())
    return lut, table


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian])
@pytest.mark.parametrize("words", [False, True])
@pytest.mark.parametrize(("first", "signed"), [(0, False), (700, False), (-1500, True)])
@pytest.mark.parametrize("depth", [8, 10, 16])
@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
def test_voi_lut_gives_the_display(tmp_path, photometric, depth, first, signed, words, syntax):
    stored = to_signed(RAMP, 12) if signed else RAMP
    lut, table = voi_lut(depth, 3000, first, words, "SS" if signed else "US")
    # A window next to it counts for nothing.
    path = write_dicom(
        tmp_path / "f.dcm",
        stored,
        12,
        photometric,
        syntax=syntax,
        VOILUTSequence=Sequence([lut, voi_lut(16)[0]]),
        WindowCenter=10.0,
        WindowWidth=5.0,
    )
    mammogram = read_mammogram(path)
    display = mammogram.voi[mammogram.pixels]
    expected = table[np.clip(stored.astype(int) - first, 0, 2999)] / (2**depth - 1)
    np.testing.assert_allclose(display, 1 - expected if photometric == "MONOCHROME1" else expected, atol=1e-6)
    if depth > 8:  # pydicom loses its way in 8-bit LUTs of more than 256 entries
        check_display(path)


def test_voi_lut_counts_in_rescaled_units_and_modality_lut_comes_first(tmp_path):
    lut, table = voi_lut(12, 4096, 0, vr="SS")
    elements = {"VOILUTSequence": Sequence([lut]), "RescaleSlope": 1.0, "RescaleIntercept": -300.0}
    mammogram = read_mammogram(write_dicom(tmp_path / "f.dcm", RAMP, **elements))
    np.testing.assert_allclose(
        mammogram.voi[mammogram.pixels], table[np.clip(RAMP.astype(int) - 300, 0, 4095)] / 4095, atol=1e-6
    )
    modality, table = voi_lut(16)
    modality.ModalityLUTType = "US"
    path = write_dicom(
        tmp_path / "g.dcm", RAMP, ModalityLUTSequence=Sequence([modality]), WindowCenter=30000.0, WindowWidth=50000.0
    )
    mammogram = read_mammogram(path)
    expected = np.clip((table[RAMP] - 29999.5) / 49999 + 0.5, 0, 1)
    np.testing.assert_allclose(mammogram.voi[mammogram.pixels], expected, atol=1e-6)


def test_display_of_compressed_and_of_real_films(tmp_path, crop):
    stored = at_depth(crop, 12)
    window = {"WindowCenter": float(np.median(stored)), "WindowWidth": float(np.ptp(stored))}
    for name in ("sv1", "jpeg2000"):
        syntax, encode = LOSSLESS[name]
        path = write_dicom(
            tmp_path / f"{name}.dcm", stored, 12, "MONOCHROME1", syntax=syntax, frames=[encode(stored, 12)], **window
        )
        plain = write_dicom(tmp_path / "plain.dcm", stored, 12, "MONOCHROME1", **window)
        np.testing.assert_array_equal(read_mammogram(path).voi, read_mammogram(plain).voi)
        np.testing.assert_array_equal(read_mammogram(path).pixels, read_mammogram(plain).pixels)
        check_display(plain)


@pytest.mark.parametrize(
    "elements",
    [
        {"WindowWidth": None, "WindowCenter": None},
        {"WindowWidth": 100.0},
        {"VOILUTSequence": Sequence([])},
        {"VOILUTSequence": Sequence([Dataset()])},
        {"RescaleSlope": 1.0, "RescaleIntercept": 0.0},
    ],
)
def test_elements_without_a_value_are_no_display(tmp_path, elements):
    assert read_mammogram(write_dicom(tmp_path / "f.dcm", RAMP, **elements)).voi is None


def test_empty_function_and_rescale_count_as_absent(tmp_path):
    window = {"WindowCenter": 1500.0, "WindowWidth": 1000.0}
    full = write_dicom(tmp_path / "f.dcm", RAMP, **window)
    empty = write_dicom(tmp_path / "g.dcm", RAMP, **window, VOILUTFunction="", RescaleSlope=None, RescaleIntercept=None)
    np.testing.assert_array_equal(read_mammogram(empty).voi, read_mammogram(full).voi)


@pytest.mark.parametrize(
    ("elements", "message"),
    [
        ({"BitsAllocated": 32}, "12 of 32 bits"),
        ({"BitsAllocated": 1, "BitsStored": 1, "HighBit": 0}, "1 of 1 bits"),
        ({"photometric": "PALETTE COLOR"}, "is PALETTE COLOR, not one grey plane"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_shown_is_refused(tmp_path, elements, message):
    path = write_dicom(tmp_path / "f.dcm", RAMP, **elements)
    with pytest.raises(BadInput, match=message) as caught:
        read_mammogram(path)
    assert str(path) in str(caught.value)


# Padding: a film of 100..3000 with a strip of padding down one side


def padded_film(value, dtype=np.uint16):
    film = np.linspace(100, 3000, 40 * 50).reshape(40, 50).astype(dtype)
    film[:, :8] = value
    return film


@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
@pytest.mark.parametrize("value", [0, 50, 3500, 4095])
def test_padding_becomes_background_and_leaves_the_film_alone(tmp_path, value, photometric):
    film = padded_film(value)
    path = write_dicom(
        tmp_path / "f.dcm", film, 12, photometric, PixelPaddingValue=value, WindowCenter=1500.0, WindowWidth=3001.0
    )
    mammogram = read_mammogram(path)
    pixels = mammogram.pixels.astype(int)
    assert (pixels[:, :8] == 0).all()
    tissue = film[:, 8:].astype(int)
    np.testing.assert_array_equal(pixels[:, 8:], tissue.max() - tissue if photometric == "MONOCHROME1" else tissue)
    display = mammogram.voi[mammogram.pixels]
    np.testing.assert_allclose(display[:, 8:], by_pydicom(path)[:, 8:], atol=1e-6)
    assert display[:, :8].max() <= display[:, 8:].min()


@pytest.mark.parametrize("value", [-3, 300, 65535])
def test_padding_that_the_stored_type_cannot_hold_is_none(tmp_path, value):
    film = np.tile(np.arange(256, dtype=np.uint8), (40, 1))
    bare = read_mammogram(write_dicom(tmp_path / "bare.dcm", film, 8))
    dataset = pydicom.dcmread(tmp_path / "bare.dcm")
    dataset.add_new("PixelPaddingValue", "SS" if value < 0 else "US", value)
    dataset.save_as(tmp_path / "padded.dcm")
    np.testing.assert_array_equal(read_mammogram(tmp_path / "padded.dcm").pixels, bare.pixels)


@pytest.mark.parametrize("order", [1, -1])
def test_padding_range(tmp_path, order):
    film = padded_film(4000)
    film[::2, :8] = 4050
    ends = [3990, 4060][::order]
    path = write_dicom(tmp_path / "f.dcm", film, 12, PixelPaddingValue=ends[0], PixelPaddingRangeLimit=ends[1])
    pixels = read_mammogram(path).pixels
    assert (pixels[:, :8] == 0).all()
    np.testing.assert_array_equal(pixels[:, 8:], film[:, 8:])


@pytest.mark.parametrize(("vr", "written"), [("SS", -2000), ("US", 63536)])
def test_signed_padding_even_where_it_is_written_unsigned(tmp_path, vr, written):
    film = padded_film(-2000, np.int16)
    value = Dataset()
    value.add_new("PixelPaddingValue", vr, written)
    path = write_dicom(tmp_path / "f.dcm", film, 16)
    dataset = pydicom.dcmread(path)
    dataset.update(value)
    dataset.save_as(path)
    pixels = read_mammogram(path).pixels
    assert (pixels[:, :8] == 0).all()
    np.testing.assert_array_equal(pixels[:, 8:], film[:, 8:])


def test_tissue_that_has_the_padding_value_stays(tmp_path):
    film = padded_film(3000)
    film[20:25, 20:25] = 3000  # a dense spot of the very value, away from the border
    pixels = read_mammogram(write_dicom(tmp_path / "f.dcm", film, 12, PixelPaddingValue=3000)).pixels
    assert (pixels[:, :8] == 0).all()
    np.testing.assert_array_equal(pixels[1:-1, 8:-1], film[1:-1, 8:-1])
    film[:, :8] = 100  # no padding at the border at all
    film[-1] = 200
    film[:, -1] = 200
    path = write_dicom(tmp_path / "g.dcm", film, 12, PixelPaddingValue=3000)
    np.testing.assert_array_equal(read_mammogram(path).pixels, film)


def test_film_of_padding_alone_is_read(tmp_path):
    path = write_dicom(tmp_path / "f.dcm", np.full((20, 30), 77, np.uint16), 12, PixelPaddingValue=77)
    assert np.ptp(read_mammogram(path).pixels) == 0


@given(
    stored=st.integers(0, 2**32 - 1).map(
        lambda seed: np.random.default_rng(seed).choice([-32768, -2000, -1, 0, 5, 900, 32767], (9, 11)).astype(np.int16)
    ),
    photometric=st.sampled_from(["MONOCHROME1", "MONOCHROME2"]),
    padding=st.sampled_from([None, -32768, -2000, 0, 900, 32767]),
)
def test_signed_films_keep_their_order_over_the_whole_range(tmp_path_factory, stored, photometric, padding):
    path = tmp_path_factory.getbasetemp() / "signed.dcm"
    elements = {} if padding is None else {"PixelPaddingValue": padding}
    write_dicom(path, stored, 16, photometric, WindowCenter=0.0, WindowWidth=65536.0, **elements)
    mammogram = read_mammogram(path)
    pixels = mammogram.pixels.astype(int)
    assert mammogram.pixels.dtype == np.uint16
    kept = stored != padding if padding is not None else np.ones(stored.shape, bool)
    if kept.any():
        wide = stored.astype(int) * (-1 if photometric == "MONOCHROME1" else 1)
        assert np.ptp((pixels - wide)[kept]) == 0  # a shift alone
        np.testing.assert_allclose(mammogram.voi[mammogram.pixels][kept], by_pydicom_16(path)[kept], atol=1e-6)
    assert len(mammogram.voi) > pixels.max()


def by_pydicom_16(path):
    dataset = pydicom.dcmread(path)
    shown = (apply_voi_lut(dataset.pixel_array, dataset) + 32768) / 65535
    return 1 - shown if dataset.PhotometricInterpretation == "MONOCHROME1" else shown


# Spacing


@pytest.mark.parametrize(
    ("elements", "spacing", "source"),
    [
        ({"PixelSpacing": [0.07, 0.07]}, 0.07, "dicom:PixelSpacing"),
        ({"ImagerPixelSpacing": [0.1, 0.1]}, 0.1, "dicom:ImagerPixelSpacing"),
        ({"PixelSpacing": [0.07, 0.07], "ImagerPixelSpacing": [0.1, 0.1]}, 0.07, "dicom:PixelSpacing"),
        ({"PixelSpacing": [0, 0], "ImagerPixelSpacing": [0.1, 0.1]}, 0.1, "dicom:ImagerPixelSpacing"),
        ({"PixelSpacing": [0.07], "ImagerPixelSpacing": [0.1, 0.1]}, 0.1, "dicom:ImagerPixelSpacing"),
        ({"ImagerPixelSpacing": [0.1, 0.1], "EstimatedRadiographicMagnificationFactor": 1.05}, 0.1, "dicom:ImagerPixelSpacing"),
        ({"PixelSpacing": [0.0700, 0.0702]}, 0.07, "dicom:PixelSpacing"),
        ({"PixelSpacing": None}, None, ""),
        ({"PixelAspectRatio": [1, 1]}, None, ""),
        ({}, None, ""),
    ],
)
def test_spacing_and_where_it_came_from(tmp_path, elements, spacing, source):
    path = write_dicom(tmp_path / "f.dcm", RAMP, **elements)
    for header in (read_header(path), read_mammogram(path).header):
        assert header.spacing_mm == (None if spacing is None else pytest.approx(spacing))
        assert header.spacing_source == source


@pytest.mark.parametrize(
    "elements", [{"PixelSpacing": [0.1, 0.05]}, {"ImagerPixelSpacing": [0.05, 0.1]}, {"PixelAspectRatio": [2, 1]}]
)
def test_pixels_that_are_not_square_are_refused(tmp_path, elements):
    path = write_dicom(tmp_path / "f.dcm", RAMP, **elements)
    for read in (read_header, read_mammogram):
        with pytest.raises(BadInput, match="not square; resample it") as caught:
            read(path)
        assert str(path) in str(caught.value)


# Frames and raw data


def three_frames(tmp_path, kind):
    frames = np.stack([RAMP, RAMP[::-1], RAMP.T])
    path = tmp_path / f"{kind}.dcm"
    if kind == "jpeg2000":
        return write_dicom(
            path, frames, syntax=JPEG2000Lossless, frames=[jpeg2000(f, 12) for f in frames], NumberOfFrames=3
        ), frames
    return write_dicom(path, frames, rle=kind == "rle", NumberOfFrames=3), frames


@pytest.mark.parametrize("kind", ["plain", "rle", "jpeg2000"])
def test_a_frame_of_several_is_read_where_asked(tmp_path, kind):
    path, frames = three_frames(tmp_path, kind)
    with pytest.raises(BadInput, match="has 3 frames; give --frame N"):
        read_mammogram(path)
    for number, frame in enumerate(frames, 1):
        np.testing.assert_array_equal(read_mammogram(path, ReadingConfig(frame=number)).pixels, frame)
    with pytest.raises(BadInput, match="has 3 frames and no frame 4"):
        read_mammogram(path, ReadingConfig(frame=4))
    assert (read_header(path).height, read_header(path).width) == (64, 64)


def test_the_frames_own_facts_are_read(tmp_path):
    def item(**elements):
        dataset = Dataset()
        for name, value in elements.items():
            setattr(dataset, name, value)
        return dataset

    shared = item(PixelMeasuresSequence=Sequence([item(PixelSpacing=[0.09, 0.09])]))
    shared.FrameAnatomySequence = Sequence([item(FrameLaterality="L")])
    windows = [item(FrameVOILUTSequence=Sequence([item(WindowCenter=c, WindowWidth=500.0)])) for c in (1000.0, 2000.0)]
    path = write_dicom(
        tmp_path / "f.dcm",
        np.stack([RAMP, RAMP]),
        NumberOfFrames=2,
        SharedFunctionalGroupsSequence=Sequence([shared]),
        PerFrameFunctionalGroupsSequence=Sequence(windows),
    )
    for number, centre in ((1, 1000), (2, 2000)):
        mammogram = read_mammogram(path, ReadingConfig(frame=number))
        assert mammogram.header.spacing_mm == pytest.approx(0.09)
        assert mammogram.header.laterality == "L"
        assert np.searchsorted(mammogram.voi, 0.5) == pytest.approx(centre, abs=1)
    assert read_header(path) == mammogram.header


def test_a_frame_asked_of_a_single_film_is_that_film(tmp_path):
    path = write_dicom(tmp_path / "f.dcm", RAMP)
    np.testing.assert_array_equal(read_mammogram(path, ReadingConfig(frame=5)).pixels, RAMP)
    with pytest.raises(BadInput, match="--frame 0"):
        ReadingConfig(frame=0)


@pytest.mark.parametrize(
    "elements", [{"PresentationIntentType": "FOR PROCESSING"}, {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.1.2.1"}]
)
def test_raw_data_are_refused_unless_asked_for(tmp_path, elements):
    path = write_dicom(tmp_path / "f.dcm", RAMP, 12, "MONOCHROME1", WindowCenter=5.0, WindowWidth=9.0, **elements)
    with pytest.raises(BadInput, match="FOR PROCESSING.*--allow-for-processing"):
        read_mammogram(path)
    assert read_header(path).bits == 12
    mammogram = read_mammogram(path, ReadingConfig(allow_for_processing=True))
    np.testing.assert_array_equal(mammogram.pixels, RAMP.max() - RAMP)
    assert mammogram.voi is None


# nvImageCodec


@pytest.fixture(scope="module")
def host_nvimagecodec():
    """nvImageCodec with its host codecs: the same calls and options as on a GPU."""
    nvimgcodec = pytest.importorskip("nvidia.nvimgcodec")
    return nvimgcodec.Decoder(
        device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY, backends=[nvimgcodec.Backend(nvimgcodec.CPU_ONLY)]
    )


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("name", ["sv1", "jpeg2000", "htj2k"])
def test_nvimagecodec_gives_the_stored_values(host_nvimagecodec, crop, name, bits):
    stored = at_depth(crop, bits)
    image = dicom_pixels._nvimagecodec_decode(host_nvimagecodec, bytes(LOSSLESS[name][1](stored, bits)))
    if image is None:
        pytest.skip("not among nvImageCodec's host codecs")
    np.testing.assert_array_equal(np.asarray(image)[..., 0], stored)


def test_nvimagecodec_leaves_what_it_cannot_decode_to_the_host(host_nvimagecodec, crop):
    frame = bytes(imagecodecs.jpegls_encode(crop))
    assert dicom_pixels._nvimagecodec_decode(host_nvimagecodec, frame) is None
    assert dicom_pixels._nvimagecodec_decode(host_nvimagecodec, b"\xff\xd8\xff no image") is None


@pytest.mark.gpu
@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("name", [*LOSSLESS, "rle", "plain"])
def test_gpu_reads_as_the_host_does(tmp_path, crop, name, bits, photometric):
    cupy = pytest.importorskip("cupy")
    if not cupy.cuda.is_available():
        pytest.skip("no GPU")
    stored = at_depth(crop, bits)
    elements = {"WindowCenter": 2.0 ** (bits - 1), "WindowWidth": 2.0**bits, "PixelPaddingValue": int(stored[0, 0])}
    if name in LOSSLESS:
        syntax, encode = LOSSLESS[name]
        elements |= {"syntax": syntax, "frames": [encode(stored, bits)]}
    path = write_dicom(tmp_path / "f.dcm", stored, bits, photometric, rle=name == "rle", **elements)
    host, device = read_mammogram(path), read_mammogram(path, device="cuda")
    assert isinstance(device.pixels, cupy.ndarray)
    assert device.pixels.dtype == host.pixels.dtype
    np.testing.assert_array_equal(device.pixels.get(), host.pixels)
    np.testing.assert_array_equal(device.voi.get(), host.voi)
    assert device.header == host.header


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["baseline", "sv1", "jpeg2000", "htj2k"])
def test_gpu_decodes_the_jpeg_family_itself(crop, name):
    cupy = pytest.importorskip("cupy")
    if not cupy.cuda.is_available():
        pytest.skip("no GPU")
    bits = 16 if name == "sv1" else 8  # nvJPEG's decoder of lossless JPEG takes 16-bit samples only; the host decodes others
    stored = at_depth(crop, bits)
    frame = LOSSLESS[name][1](stored, bits) if name in LOSSLESS else LOSSY[name][2](stored)
    pixels = dicom_pixels._decode_on_device(bytes(frame))
    assert pixels is not None
    assert np.abs(pixels.get().astype(int) - stored).max() <= (0 if name in LOSSLESS else 4)


def test_without_a_gpu_the_host_decodes(tmp_path, crop, monkeypatch):
    monkeypatch.setattr(dicom_pixels, "_device_decoder", lambda: None)
    stored = at_depth(crop, 12)
    path = write_dicom(tmp_path / "f.dcm", stored, 12, syntax=JPEG2000Lossless, frames=[jpeg2000(stored, 12)])
    pixels = dicom.read_dicom(path, ReadingConfig(), "cuda").pixels
    np.testing.assert_array_equal(pixels, stored)
