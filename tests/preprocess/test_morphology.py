"""Discs by shifted copies are those of the distance transform, and strips of an image give what the whole gives."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from mammostream.preprocess import backend as backends
from mammostream.preprocess.backend import backend_of, by_strips
from mammostream.preprocess.morphology import grown

SPACINGS = st.sampled_from([1.0, 0.1, 0.4, 0.8]) | st.floats(0.05, 3)


@given(st.tuples(st.integers(1, 40), st.integers(1, 40)), st.floats(0, 0.3), SPACINGS, st.data())
def test_what_is_grown_lies_within_the_radius(shape, share, spacing, data):
    # Radii that a distance equals, such as 3 pixels of 0.4 mm, among them.
    radius = data.draw(st.floats(0, 20 * spacing) | st.integers(0, 20).map(lambda pixels: pixels * spacing))
    mask = np.random.default_rng(data.draw(st.integers(0, 99))).random(shape) < share
    before = mask.copy()
    found = grown(backend_of(mask), mask, radius, spacing)
    expected = ndimage.distance_transform_edt(~mask) * spacing <= radius if mask.any() else mask
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(mask, before)


@pytest.mark.parametrize("rows", [1, 5, 64, 97, 200])
def test_strips_give_what_the_whole_gives(monkeypatch, rows):
    image = np.random.default_rng(0).random((97, 30), dtype=np.float32)
    monkeypatch.setattr(backends, "STRIP_BYTES", rows * image[0].nbytes)

    def sums(values):
        return np.add.reduceat(values, np.arange(0, len(values), 4))[:, ::3]

    def blurred(values):
        return ndimage.gaussian_filter(values, 1.0)

    np.testing.assert_array_equal(by_strips(sums, image, height=4), sums(image))
    np.testing.assert_array_equal(by_strips(blurred, image, reach=4), blurred(image))
