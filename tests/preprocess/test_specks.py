"""Specks and clusters: against brute force, and what a cluster is."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mammostream.preprocess.specks import find_clusters, find_specks

SPECKS = st.integers(0, 60).flatmap(
    # Pixel centres, as specks are: many equal distances and equal counts, where the order of choices shows.
    lambda n: arrays.arrays(np.float64, (n, 2), elements=st.integers(0, 80).map(lambda half: half / 2))
)


def brute_force(specks, diameter, least):
    """Take the fullest circle about a speck, again and again; also return the members of each cluster."""
    free = set(range(len(specks)))
    near = [
        {j for j in range(len(specks)) if ((specks[j] - specks[i]) ** 2).sum() <= (diameter / 2) ** 2}
        for i in range(len(specks))
    ]
    members = []
    while near:
        fullest = max(range(len(specks)), key=lambda i: len(near[i] & free))
        if len(near[fullest] & free) < least:
            break
        members.append(near[fullest] & free)
        free -= members[-1]
    return members, free, near


def box_of(points):
    return [*points.min(axis=0), *points.max(axis=0)]


@given(SPECKS, st.sampled_from([3.0, 8.0, 10.0, 25.0]), st.integers(1, 8))
def test_clusters_are_those_of_brute_force(specks, diameter, least):
    found = find_clusters(specks, diameter, least)
    assert found.shape[1:] == (4,)
    members, free, near = brute_force(specks, diameter, least)
    # By the definition: each has enough specks within a circle, and no circle has enough left.
    assert all(len(cluster) >= least for cluster in members)
    assert all(len(around & free) < least for around in near)
    assert found.tolist() == [box_of(specks[sorted(cluster)]) for cluster in members]


@given(SPECKS, st.floats(1, 30), st.integers(1, 8))
def test_clusters_have_their_size_and_their_specks(specks, diameter, least):
    found = find_clusters(specks, diameter, least)
    for xmin, ymin, xmax, ymax in found:
        assert max(xmax - xmin, ymax - ymin) <= diameter * (1 + 1e-9)
        inside = (specks >= [xmin, ymin]).all(axis=1) & (specks <= [xmax, ymax]).all(axis=1)
        assert inside.sum() >= least
    np.testing.assert_array_equal(find_clusters(specks, diameter, least), found)  # the same each time
    fuller = find_clusters(specks, diameter, least + 1)
    np.testing.assert_array_equal(found[: len(fuller)], fuller)  # the densest come first


@given(SPECKS)
def test_each_speck_is_in_a_cluster_where_one_is_enough(specks):
    found = find_clusters(specks, 5.0, 1)
    for x, y in specks:
        assert ((found[:, :2] <= (x, y)) & (found[:, 2:] >= (x, y))).all(axis=1).any()


def test_five_specks_within_a_centimetre_are_a_cluster_and_four_are_none():
    five = np.array([[0, 0], [4, 0], [-4, 0], [0, 4], [0, -4]], float) + 20
    assert find_clusters(five, 10.0, 5).tolist() == [[16, 16, 24, 24]]
    assert len(find_clusters(five[1:], 10.0, 5)) == 0
    assert len(find_clusters(five * 2, 10.0, 5)) == 0  # twice as far apart
    apart = np.concatenate([five, five + [30, 0]])
    assert find_clusters(apart, 10.0, 5).tolist() == [[16, 16, 24, 24], [46, 16, 54, 24]]


def test_no_specks_no_clusters():
    assert find_clusters(np.zeros((0, 2)), 10.0, 5).shape == (0, 4)
    assert find_clusters(np.zeros((4, 2)), 10.0, 5).shape == (0, 4)


def test_thousands_of_specks_take_seconds_at_most():
    """A film full of noise must not stop a build."""
    specks = np.random.default_rng(0).random((20_000, 2)) * [2300, 1400]
    start = time.process_time()
    found = find_clusters(specks, 100.0, 5)
    assert time.process_time() - start < 20  # about one; brute force would take hours
    assert len(found) > 100


@given(
    arrays.arrays(np.float32, st.tuples(st.integers(1, 12), st.integers(1, 12)), elements=st.integers(-3, 9).map(float)),
    st.sampled_from([0.1, 0.2, 0.5]),
    st.sampled_from([0.5, 4.0]),
)
def test_specks_are_the_highest_around_and_high_enough(response, spacing, least):
    found = find_specks(response, spacing, least)
    reach = max(1, round(0.25 / spacing))
    expected = [
        [x + 0.5, y + 0.5]
        for y, x in np.ndindex(response.shape)
        if response[y, x] >= least
        and response[y, x] == response[max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1].max()
    ]
    assert found.dtype == np.float64
    assert found.tolist() == expected


@pytest.mark.parametrize("spacing", [0.05, 0.1, 0.2])
def test_one_bright_blob_is_one_speck(spacing):
    rows, columns = np.mgrid[:60, :80] * spacing
    response = 9 * np.exp(-((rows - 20.3 * spacing) ** 2 + (columns - 33.4 * spacing) ** 2) / 2 / 0.2**2)
    assert find_specks(response.astype(np.float32), spacing, 4.0).tolist() == [[33.5, 20.5]]
    assert len(find_specks(response.astype(np.float32), spacing, 10.0)) == 0
