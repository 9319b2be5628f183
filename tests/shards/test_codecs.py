"""Codecs lose nothing, Pillow reads the same, and the CRC is of the pixels."""

from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from mammostream.shards.codecs import CODECS, decode, decode_number, decode_sample, encode, encode_number, pixel_crc32

edges = st.integers(1, 40)
tiles = st.tuples(st.sampled_from([np.uint8, np.uint16]), edges).flatmap(lambda t: arrays.arrays(t[0], (t[1], t[1])))
LOSSLESS = sorted(name for name, codec in CODECS.items() if codec.lossless)
codecs = st.sampled_from(LOSSLESS)


def independent_decoder(data: bytes, codec: str, tile: np.ndarray) -> np.ndarray:
    """Pillow, or NumPy for raw pixels."""
    if codec == "raw":
        return np.frombuffer(data, tile.dtype.newbyteorder("<")).reshape(tile.shape)
    return np.asarray(Image.open(io.BytesIO(data)))


@given(tile=tiles, codec=codecs)
def test_round_trip_and_an_independent_decoder(tile, codec):
    data = encode(tile, codec)
    assert data == encode(tile, codec)
    for got in (decode(data, codec), independent_decoder(data, codec, tile), decode_sample(f".{codec}", data)):
        assert got.dtype == tile.dtype
        np.testing.assert_array_equal(got, tile)


@pytest.mark.parametrize("codec", LOSSLESS)
def test_a_view_is_stored_as_what_it_shows(codec):
    image = np.arange(10_000, dtype=np.uint16).reshape(100, 100)
    for view in (image[::2, -1:49:-1], image.T, image[10:50, 7:47]):
        np.testing.assert_array_equal(decode(encode(view, codec), codec), view)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [(1, 1), (1024, 1024), (700, 333), (3, 40_000)])
def test_tiffs_of_one_strip_and_of_many(shape, dtype):
    tile = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)
    data = encode(tile, "tif")
    np.testing.assert_array_equal(decode(data, "tif"), tile)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), tile)


@pytest.mark.parametrize("codec", [name for name in LOSSLESS if name != "raw"])
def test_real_tissue_gets_smaller(films, codec):
    tile = films[1].pixels[400:656, 50:306]
    data = encode(tile, codec)
    assert len(data) < 0.9 * tile.nbytes
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), tile)


def test_jpeg_stays_close_and_small(films):
    tile = (films[1].pixels[400:656, 50:306] >> 8).astype(np.uint8)
    data = encode(tile, "jpg")
    assert len(data) < 0.5 * tile.nbytes
    difference = np.abs(decode(data, "jpg").astype(int) - tile)
    assert 0 < difference.max() <= 8
    assert difference.mean() < 2


@pytest.mark.parametrize("size", [3, 17, 511 * 512, 2 * 511 * 512])
def test_raw_bytes_that_are_no_square_tile_are_refused(size):
    with pytest.raises(ValueError, match="no square tile"):
        decode(bytes(size), "raw")


@given(tile=tiles)
def test_crc_is_of_little_endian_pixels(tile):
    expected = zlib.crc32(tile.astype(tile.dtype.newbyteorder("<")).tobytes())
    assert pixel_crc32(tile) == expected
    assert pixel_crc32(tile.astype(tile.dtype.newbyteorder(">"))) == expected
    assert pixel_crc32(np.asfortranarray(tile)) == expected


@given(tile=tiles, data=st.data())
def test_crc_sees_every_changed_pixel(tile, data):
    changed = tile.copy()
    place = tuple(data.draw(st.integers(0, n - 1)) for n in tile.shape)
    changed[place] ^= data.draw(st.integers(1, np.iinfo(tile.dtype).max))
    assert pixel_crc32(changed) != pixel_crc32(tile)


@given(st.integers(0, 2**63 - 1))
def test_number_round_trip(number):
    data = encode_number(number)
    assert data == number.to_bytes(8, "little")
    assert decode_number(data) == decode_sample("num", data) == number


def test_foreign_members_are_left_alone():
    assert decode_sample(".json", b"{}") is None
    assert decode_sample("txt", b"x") is None
