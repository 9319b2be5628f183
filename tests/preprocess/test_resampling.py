"""Changing the pixel spacing: block means are exact, resampling keeps what it can and aliases nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mammostream.preprocess.resampling import block_mean, resample

SHAPES = st.tuples(st.integers(1, 13), st.integers(1, 13))


def brute_mean(image, factor):
    padded = np.pad(image, [(0, -n % factor) for n in image.shape], mode="edge").astype(np.float64)
    rows, columns = (n // factor for n in padded.shape)
    return np.array(
        [
            [padded[r * factor : (r + 1) * factor, c * factor : (c + 1) * factor].mean() for c in range(columns)]
            for r in range(rows)
        ]
    )


@given(st.sampled_from(["u1", "u2", "i2", "i4", "f4", "f8", "?"]), SHAPES, st.integers(1, 7), st.integers(0, 999))
def test_block_means_are_those_of_brute_force(dtype, shape, factor, seed):
    rng = np.random.default_rng(seed)
    limits = {"b": (0, 2), "u": (0, 256), "i": (-9000, 9000), "f": (-1e4, 1e4)}[np.dtype(dtype).kind]
    image = rng.uniform(*limits, shape).astype(dtype)
    before = image.copy()
    found, expected = block_mean(image, factor), brute_mean(image, factor)
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    np.testing.assert_array_equal(image, before)
    exact = image.dtype.kind in "bu"
    scale = np.abs(image.astype(np.float64)).max()
    np.testing.assert_allclose(found, expected, rtol=3e-7 if exact else 1e-6, atol=0 if exact else 1e-6 * scale)


def test_large_blocks_of_the_brightest_values_do_not_overflow():
    assert (block_mean(np.full((300, 400), 65535, np.uint16), 100) == 65535).all()
    assert (block_mean(np.full((64, 64), 255, np.uint8), 64) == 255).all()


@given(
    arrays.arrays(np.float32, st.tuples(st.integers(2, 30), st.integers(2, 30)), elements=st.floats(0, 1, width=32)),
    st.floats(0.3, 5),
)
def test_any_ratio_gives_the_shape_and_stays_in_range(image, ratio):
    found = resample(image, ratio)
    assert found.dtype == np.float32
    whole = ratio >= 1 and abs(ratio - round(ratio)) < 1e-3
    expected = [-(-n // round(ratio)) if whole else max(1, round(n / ratio)) for n in image.shape]
    assert found.shape == tuple(expected)
    assert image.min() - 1e-5 <= found.min() <= found.max() <= image.max() + 1e-5


def test_whole_ratios_average_blocks_and_one_changes_nothing():
    image = np.random.default_rng(0).random((7, 10)).astype(np.float32)
    np.testing.assert_array_equal(resample(image, 3), block_mean(image, 3))
    np.testing.assert_array_equal(resample(image, 3.0001), block_mean(image, 3))
    np.testing.assert_array_equal(resample(image, 1), image)


@pytest.mark.parametrize("ratio", [0.37, 0.8, 1.4, 2.7])
def test_a_smooth_image_keeps_its_shape(ratio):
    def wave(shape, step):
        rows, columns = ((np.arange(n) + 0.5) * step for n in shape)  # pixel centres
        return np.cos(rows / 31)[:, None] * np.sin(columns / 23)[None, :]

    image = wave((270, 189), 1)
    found = resample(image, ratio)
    steps = [n / m for n, m in zip(image.shape, found.shape, strict=True)]
    assert np.ptp(steps) < 0.02
    assert np.abs(found - wave(found.shape, np.mean(steps)))[5:-5, 5:-5].max() < 0.05


def test_what_is_finer_than_the_new_pixels_is_averaged_out():
    stripes = np.tile([0.0, 1.0], (90, 45)).astype(np.float32)
    assert np.ptp(resample(stripes, 2.5)[:, 3:-3]) < 0.15  # sampled without a filter: 1
    np.testing.assert_allclose(resample(np.full((9, 9), 0.3), 1.7), 0.3, rtol=1e-6)
