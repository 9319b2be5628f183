"""Reading: PNG, TIFF and PGM as others write them, DICOM by its mark, damaged files of every kind."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import struct
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
import pytest
import tifffile
from dicom_files import RAMP, jpeg2000, write_dicom
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from pydicom.uid import JPEG2000Lossless, JPEGLosslessSV1, JPEGLSLossless

from mammostream.common.errors import BadInput, MachineFault
from mammostream.preprocess.reading import read_header, read_mammogram


def test_header_facts(tmp_path):
    path = write_dicom(
        tmp_path / "film", RAMP, PatientID="P1", StudyInstanceUID="1.2.3", ImageLaterality="R", ViewPosition="MLO"
    )  # without an ending: the mark at byte 128 says that it is DICOM
    header = read_header(path)
    assert header == read_mammogram(path).header
    assert (header.patient_id, header.study_id, header.laterality, header.view) == ("P1", "1.2.3", "R", "MLO")


def test_colour_dicom_is_refused(tmp_path):
    pixels = np.zeros((5, 3, 7), np.uint8)
    elements = {"SamplesPerPixel": 3, "PlanarConfiguration": 0, "photometric": "RGB", "Rows": 5, "Columns": 7, "bits": 8}
    path = write_dicom(tmp_path / "f.dcm", pixels, **elements)
    with pytest.raises(BadInput, match="is RGB, not one grey plane") as caught:
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
    assert mammogram.voi is None


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


# PNG


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write_png(path, width, height, depth, colour, rows, *chunks, interlaced=False):
    """Write a PNG chunk by chunk, for what PNG writers do not offer."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    parts = [png_chunk(b"IHDR", header), *chunks, png_chunk(b"IDAT", zlib.compress(rows)), png_chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


def check_plain(path, expected, bits):
    mammogram = read_mammogram(path)
    np.testing.assert_array_equal(mammogram.pixels, expected)
    assert mammogram.pixels.dtype == (np.uint8 if bits == 8 else np.uint16)
    assert mammogram.header == read_header(path)
    assert mammogram.header.bits == bits


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_png_of_few_bits_is_stretched_to_eight(tmp_path, depth):
    pixels = np.random.default_rng(0).integers(0, 2**depth, (6, 16)).astype(np.uint8)
    bits = np.unpackbits(pixels[..., None], axis=-1)[..., 8 - depth :].reshape(6, -1)
    rows = b"".join(b"\0" + np.packbits(row).tobytes() for row in bits)
    path = write_png(tmp_path / "f.png", 16, 6, depth, 0, rows)
    check_plain(path, pixels * (255 // (2**depth - 1)), 8)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_interlaced_png(tmp_path, dtype):
    pixels = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (19, 21)).astype(dtype)
    rows = b""
    for y, x, dy, dx in (
        (0, 0, 8, 8),
        (0, 4, 8, 8),
        (4, 0, 8, 4),
        (0, 2, 4, 4),
        (2, 0, 4, 2),
        (0, 1, 2, 2),
        (1, 0, 2, 1),
    ):  # Adam7
        rows += b"".join(b"\0" + row.astype(row.dtype.newbyteorder(">")).tobytes() for row in pixels[y::dy, x::dx])
    path = write_png(tmp_path / "f.png", 21, 19, 8 * pixels.itemsize, 0, rows, interlaced=True)
    check_plain(path, pixels, 8 * pixels.itemsize)


@pytest.mark.parametrize("colours", [256, 16])
def test_grey_palette_png_counts_as_grey_and_a_coloured_one_is_refused(tmp_path, colours):
    grey = np.random.default_rng(0).integers(0, colours, (20, 30)).astype(np.uint8)
    image = Image.fromarray(grey, mode="P")
    image.putpalette(np.repeat(np.arange(colours, dtype=np.uint8)[::-1], 3).tobytes())
    image.save(tmp_path / "f.png")
    check_plain(tmp_path / "f.png", colours - 1 - grey, 8)
    image.putpalette(bytes([3, 2, 1] * colours))
    image.save(tmp_path / "g.png")
    with pytest.raises(BadInput, match="is in colour"):
        read_mammogram(tmp_path / "g.png")


def test_grey_png_with_alpha(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 2)).astype(np.uint8)
    (tmp_path / "f.png").write_bytes(imagecodecs.png_encode(pixels))
    check_plain(tmp_path / "f.png", pixels[..., 0], 8)


# TIFF


@pytest.mark.parametrize("bits", [10, 12])
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_tiff_of_packed_bits(tmp_path, bits, photometric):
    pixels = (RAMP >> (12 - bits)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "f.tif", pixels, bitspersample=bits, photometric=photometric)
    check_plain(tmp_path / "f.tif", pixels if photometric == "minisblack" else 2**bits - 1 - pixels, bits)


@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_tiff_of_one_bit(tmp_path, photometric):
    mask = RAMP % 3 > 0
    tifffile.imwrite(tmp_path / "f.tif", mask, photometric=photometric)
    check_plain(tmp_path / "f.tif", np.where(mask ^ (photometric == "miniswhite"), 255, 0), 8)


@pytest.mark.parametrize(
    "options",
    [
        {"tile": (32, 32)},
        {"tile": (48, 16), "compression": "zlib"},
        {"rowsperstrip": 7, "compression": "lzw", "predictor": True},
        {"byteorder": ">"},
        {"byteorder": ">", "tile": (32, 32), "compression": "zlib"},
        {"compression": "jpeg2000"},
        {"bigtiff": True},
    ],
)
def test_tiff_layouts(tmp_path, options):
    tifffile.imwrite(tmp_path / "f.tif", RAMP, photometric="minisblack", **options)
    check_plain(tmp_path / "f.tif", RAMP, 16)


def test_grey_tiff_of_separate_planes_and_of_a_palette(tmp_path):
    grey = (RAMP % 251).astype(np.uint8)
    tifffile.imwrite(tmp_path / "f.tif", np.stack([grey] * 3), photometric="rgb", planarconfig="separate")
    check_plain(tmp_path / "f.tif", grey, 8)
    levels = np.repeat((np.arange(256, dtype=np.uint16) * 257)[None, ::-1], 3, axis=0)
    tifffile.imwrite(tmp_path / "g.tif", grey, photometric="palette", colormap=levels)
    check_plain(tmp_path / "g.tif", 255 - grey, 8)


# PGM


@pytest.mark.parametrize("kind", [2, 5])
@pytest.mark.parametrize(("largest", "bits"), [(255, 8), (200, 8), (1023, 10), (4095, 12), (3000, 12), (65535, 16)])
def test_pgm_keeps_its_values(tmp_path, kind, largest, bits):
    pixels = np.random.default_rng(0).integers(0, largest + 1, (7, 9))
    text = f"P{kind}\n# made by hand\n9 7 # width height\n{largest}\n".encode()
    data = pixels.astype(np.uint8 if largest < 256 else ">u2").tobytes()
    (tmp_path / "f.pgm").write_bytes(text + (data if kind == 5 else b" ".join(b"%d" % v for v in pixels.ravel())))
    check_plain(tmp_path / "f.pgm", pixels, bits)


def test_pgm_of_few_levels_is_stretched_to_eight_bits(tmp_path):
    (tmp_path / "f.pgm").write_bytes(b"P5 3 1 15 \x00\x07\x0f")
    check_plain(tmp_path / "f.pgm", [[0, 119, 255]], 8)


@pytest.mark.parametrize(
    "data", [b"P6 1 1 255 abc", b"P5 2 2 100 aaaa\xff", b"P2 2 2 9 1 2 3 10", b"P2 2 2 9 1 2 x 4", b"P5 2 2 70000 aaaa", b"P5"]
)
def test_pgm_that_breaks_its_own_rules_is_refused(tmp_path, data):
    (tmp_path / "f.pgm").write_bytes(data.replace(b"aaaa\xff", b"aaa\xff"))
    assert_refused(tmp_path / "f.pgm")


# Damage


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


def damaged_kinds():
    """Small files of every kind that is read, as bytes by name."""
    pixels = np.random.default_rng(0).integers(0, 4096, (24, 20)).astype(np.uint16)
    kinds = {}
    for name, options in {"plain": {}, "zip": {"compression": "zlib"}, "tiled": {"tile": (16, 16)}}.items():
        file = io.BytesIO()
        tifffile.imwrite(file, pixels, photometric="minisblack", **options)
        kinds[f"{name}.tif"] = file.getvalue()
    kinds["f.png"] = imagecodecs.png_encode(pixels)
    kinds["binary.pgm"] = b"P5 20 24 4095\n" + pixels.astype(">u2").tobytes()
    kinds["text.pgm"] = b"P2 20 24 4095\n" + b" ".join(b"%d" % v for v in pixels.ravel())
    window = {"WindowCenter": 2000.0, "WindowWidth": 3000.0, "PixelSpacing": [0.07, 0.07], "PixelPaddingValue": 0}
    for name, options in {
        "plain": {},
        "rle": {"rle": True},
        "jpeg": {"syntax": JPEGLosslessSV1, "frames": [imagecodecs.jpeg8_encode(pixels, lossless=True)]},
        "jpeg-ls": {"syntax": JPEGLSLossless, "frames": [imagecodecs.jpegls_encode(pixels)]},
        "jpeg2000": {"syntax": JPEG2000Lossless, "frames": [jpeg2000(pixels, 12)]},
        "htj2k": {"syntax": JPEG2000Lossless, "frames": [imagecodecs.htj2k_encode(pixels, reversible=True)]},
    }.items():
        file = io.BytesIO()
        write_dicom(file, pixels, 12, "MONOCHROME1", **options, **window)
        kinds[f"{name}.dcm"] = file.getvalue()
    return kinds


DAMAGED = damaged_kinds()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", DAMAGED)
@settings(max_examples=60)
@given(data=st.data())
def test_damage_is_refused_by_name_or_read_whole(tmp_path_factory, name, data):
    """Whatever the bytes are: an image that keeps its promises, or BadInput."""
    content = bytearray(DAMAGED[name])
    if data.draw(st.booleans(), "cut off"):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    # Headers are short next to pixels: they get half of the damage.
    places = st.one_of(st.integers(0, max(len(content) - 1, 0)), st.integers(0, min(700, max(len(content) - 1, 0))))
    for place, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), max_size=4), "bytes changed"):
        if content:
            content[place] = value
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content)
    for read in (read_header, read_mammogram):
        try:
            found = read(path)
        except BadInput as error:
            assert str(path) in str(error)  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017
            continue
        if read is read_mammogram:
            assert found.pixels.shape == (found.header.height, found.header.width)
            assert found.pixels.dtype in (np.uint8, np.uint16)
            assert found.voi is None or len(found.voi) > found.pixels.max()


def test_sizes_beyond_any_mammogram_are_refused_before_they_are_decoded(tmp_path):
    pixels = np.zeros((24, 20), np.uint16)
    (tmp_path / "f.pgm").write_bytes(b"P5 60000 60000 255 ")
    write_png(tmp_path / "f.png", 60000, 60000, 8, 0, b"")
    write_dicom(tmp_path / "f.dcm", pixels, 12, Rows=60000, Columns=60000)
    file = bytearray(DAMAGED["jpeg2000.dcm"])
    at = file.index(b"\xff\x4f\xff\x51") + 8
    file[at : at + 4] = (2**30).to_bytes(4)  # the codestream's width alone
    (tmp_path / "g.dcm").write_bytes(file)
    for name in ("f.pgm", "f.png", "f.dcm", "g.dcm"):
        assert_refused(tmp_path / name)


def test_a_machine_without_file_handles_is_not_a_bad_film(tmp_path):
    """Recorded as bad, a film would stay out of the shards for good."""
    Image.fromarray(RAMP.astype(np.uint8)).save(tmp_path / "f.png")
    films = [write_dicom(tmp_path / "f.dcm", RAMP), tmp_path / "f.png"]
    for film in films:
        read_mammogram(film)  # all modules are imported
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len([*Path("/proc/self/fd").iterdir()]) + 20, limits[1]))
        with contextlib.suppress(OSError):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        for film in films:
            for read in (read_header, read_mammogram):
                with pytest.raises(MachineFault, match=rf"{film.name} cannot be read now \(Too many open files\)"):
                    read(film)
    finally:
        for handle in held:
            os.close(handle)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    read_mammogram(films[0])
