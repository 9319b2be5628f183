"""Frequency energy: as defined; specks raise it, lines, exposure and depth do not; outside the breast there is none."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import ndimage

from mammostream.preprocess.energy import (
    EDGE_MARGIN_MM,
    EXCESS_ABOVE,
    EXCESS_LIMIT,
    NOISE_CAP,
    NOISE_FLOOR,
    NOISE_WINDOW_MM,
    SIGMA_MM,
    pixel_energy,
    speck_response,
)
from mammostream.preprocess.resampling import block_mean
from mammostream.preprocess.segmentation import segment_breast

SPACING = 0.1
TOP, LEFT, SIZE = 400, 300, 256  # a tile in the middle of the breast


@pytest.fixture(scope="module")
def film(films):
    """The middle of a film at 0.1 mm, float64 in [0, 1], and its mask: the chest wall at the left, background at the right."""
    import pydicom

    film = films[1]
    pixels = block_mean(pydicom.dcmread(film.path).pixel_array, 2).astype(np.float64) / 65535
    return pixels[500:1500, :800], segment_breast(film.pixels, 0.2).mask[125:375, :200]


def tile_energy(image, mask, top=TOP, left=LEFT, size=SIZE):
    response = speck_response(image.astype(np.float32), mask, SPACING)
    return float(pixel_energy(response)[top : top + size, left : left + size].mean())


def slow_response(image, mask, spacing):
    """The definition, step by step: eigenvalues of each pixel's Hessian, windows cut out one by one."""
    sigma = SIGMA_MM / spacing
    radius = int(4 * sigma + 0.5)
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    smooth = np.pad(image.astype(np.float64), radius + 2, mode="symmetric")
    for axis in (0, 1):
        smooth = np.apply_along_axis(np.convolve, axis, smooth, kernel, mode="same")
    smooth = smooth[radius:-radius, radius:-radius]  # one pixel more on each side than twice the image's own
    smooth = np.pad(smooth[2:-2, 2:-2], 1, mode="symmetric")
    inner = smooth[1:-1, 1:-1]
    hessian = np.empty((*inner.shape, 2, 2))
    hessian[..., 0, 0] = smooth[2:, 1:-1] - 2 * inner + smooth[:-2, 1:-1]
    hessian[..., 1, 1] = smooth[1:-1, 2:] - 2 * inner + smooth[1:-1, :-2]
    hessian[..., 0, 1] = (smooth[2:, 2:] - smooth[2:, :-2] - smooth[:-2, 2:] + smooth[:-2, :-2]) / 4
    hessian[..., 1, 0] = hessian[..., 0, 1]
    curvature = -np.linalg.eigvalsh(hessian)[..., -1]

    inside = np.zeros(image.shape, bool)
    scale = image.shape[0] / mask.shape[0]
    outside = np.argwhere(~np.pad(mask, 1)) - 1
    for y, x in np.ndindex(image.shape):
        row, column = int(y / scale), int(x / scale)
        distance = np.hypot(*(outside - (row, column)).T).min()
        inside[y, x] = distance * scale * spacing > EDGE_MARGIN_MM
    deviation = np.sqrt(np.pi / 2)  # a normal distribution's, from its mean absolute value
    typical = deviation * np.abs(curvature[inside]).mean()
    window = round(NOISE_WINDOW_MM / spacing)
    before, after = window // 2, window - window // 2 - 1
    weight, capped = (
        np.pad(values, (before, after))
        for values in (inside.astype(float), np.where(inside, np.minimum(np.abs(curvature), NOISE_CAP * typical), 0))
    )
    response = np.zeros(image.shape)
    for y, x in np.argwhere(inside):
        cut = np.s_[y : y + window, x : x + window]
        noise = deviation * capped[cut].sum() / weight[cut].sum()
        response[y, x] = curvature[y, x] / max(noise, NOISE_FLOOR * typical)
    return response


@pytest.mark.parametrize("spacing", [0.1, 0.15])
def test_response_is_what_the_definition_says(film, spacing):
    image, mask = film
    image, mask = image[700:840, :120].astype(np.float32), mask[175:210, :30]
    image[60:63, 40:43] += 0.3  # a speck must not raise the noise that it is measured by
    mask = mask & (np.arange(35)[:, None] < 30)
    expected = slow_response(image, mask, spacing)
    response = speck_response(image, mask, spacing)
    assert response.dtype == np.float32
    assert expected.max() > 2
    np.testing.assert_allclose(response, expected, rtol=1e-4, atol=1e-4)


@given(arrays.arrays(np.float32, st.tuples(st.integers(1, 20), st.integers(1, 20)), elements=st.floats(-1e6, 1e6, width=32)))
def test_energy_of_a_pixel_is_what_exceeds_two_deviations_and_bounded(response):
    energy = pixel_energy(response)
    assert energy.dtype == np.float32
    assert ((energy >= 0) & (energy <= 20_000)).all()
    expected = [min(max(float(r) - EXCESS_ABOVE, 0), EXCESS_LIMIT) * 1e4 for r in response.ravel()]
    np.testing.assert_allclose(energy.ravel(), expected, rtol=1e-5, atol=1e-2)


def test_energy_of_a_tile_adds_up_from_its_parts_per_area(film):
    """The mean over a tile is the sum over its specks by its area in cm²: independent of the tile's size."""
    image, mask = film
    energy = pixel_energy(speck_response(image.astype(np.float32), mask, SPACING)).astype(np.float64)
    parts = [
        energy[TOP + y : TOP + y + 64, LEFT + x : LEFT + x + 64].mean() for y in range(0, 256, 64) for x in range(0, 256, 64)
    ]
    assert np.mean(parts) == pytest.approx(energy[TOP : TOP + 256, LEFT : LEFT + 256].mean())
    alone = np.zeros((300, 300), np.float32)
    alone[100, 100] = 3.0  # one pixel of 0.01 mm² that exceeds by one deviation: an excess of 1 pixel a tile
    for size in (128, 256):
        area = (size * SPACING / 10) ** 2
        assert pixel_energy(alone)[:size, :size].mean() * area == pytest.approx(1.0)


def with_specks(image, contrast, count=12, top=TOP, left=LEFT):
    rng = np.random.default_rng(3)
    planted = image.copy()
    for y, x in rng.integers(20, SIZE - 20, (count, 2)):
        planted[top + y : top + y + 3, left + x : left + x + 3] += contrast
    return planted


def test_specks_raise_the_energy_of_their_tile_alone(film):
    image, mask = film
    before = tile_energy(image, mask)
    energies = [tile_energy(with_specks(image, c), mask) for c in (0.02, 0.04, 0.08)]
    assert energies == sorted(energies)
    assert energies[0] > before + 1
    assert energies[2] > before + 15
    far = TOP - 300
    assert tile_energy(with_specks(image, 0.05), mask, far) == pytest.approx(tile_energy(image, mask, far), rel=0.02)


def test_many_specks_count_more_than_one_bright_one(film):
    image, mask = film
    before = tile_energy(image, mask)
    one, bright, many = (
        tile_energy(with_specks(image, contrast, count), mask) - before for contrast, count in ((0.05, 1), (0.5, 1), (0.05, 12))
    )
    assert bright < 4 * one  # ten times as bright
    assert many > 6 * one


def test_a_bright_speck_does_not_raise_the_noise_that_others_are_measured_by(film):
    image, mask = film
    lit = image.copy()
    lit[500:503, 400:403] += 0.5
    before, after = (speck_response(i.astype(np.float32), mask, SPACING) for i in (image, lit))
    assert after[501, 401] > 50
    around = np.ones((80, 80), bool)
    around[30:53, 30:53] = False  # but for the speck itself
    ratio = (after[460:540, 360:440] / before[460:540, 360:440])[around]
    assert np.median(ratio) > 0.97


def test_dark_specks_count_little(film):
    image, mask = film
    before = tile_energy(image, mask)
    bright, dark = (tile_energy(with_specks(image, c), mask) - before for c in (0.05, -0.05))
    assert dark < bright / 3


@pytest.mark.parametrize("angle", [0.0, 0.3, np.pi / 4, 1.2, np.pi / 2])
def test_lines_count_little(film, angle):
    """A scratch 0.3 mm wide across the tile covers more pixels than 12 specks of 0.3 mm, and counts much less."""
    image, mask = film
    before = tile_energy(image, mask)
    scratched = image.copy()
    rows, columns = np.mgrid[:SIZE, :SIZE] - SIZE / 2
    line = np.clip(2 - np.abs(rows * np.cos(angle) - columns * np.sin(angle)), 0, 1)
    scratched[TOP : TOP + SIZE, LEFT : LEFT + SIZE] += 0.05 * line
    assert line.sum() > 2 * 12 * 9
    scratch, specks = tile_energy(scratched, mask) - before, tile_energy(with_specks(image, 0.05), mask) - before
    assert scratch < specks / 5


@pytest.mark.parametrize("scale", [0.25, 3.0])
@pytest.mark.parametrize("offset", [0.0, 0.5, -0.2])
def test_exposure_changes_nothing(film, scale, offset):
    image, mask = film
    first = speck_response(image.astype(np.float32), mask, SPACING)
    second = speck_response((image * scale + offset).astype(np.float32), mask, SPACING)
    assert first.max() > 5  # something stands out
    np.testing.assert_allclose(second, first, rtol=1e-4, atol=2e-4)
    energies = [tile_energy(i, mask) for i in (image, image * scale + offset)]
    assert energies[1] == pytest.approx(energies[0], rel=1e-4)


def test_8_bits_give_nearly_the_same_energies(films):
    """Of the native pixels; at 0.1 mm four of them are averaged."""
    import pydicom

    film = films[1]
    pixels = pydicom.dcmread(film.path).pixel_array
    mask = segment_breast(film.pixels, 0.2).mask
    maps = [block_mean(values, 2) / top for values, top in ((pixels, 65535), (pixels >> 8, 255))]
    energies = [
        block_mean(pixel_energy(speck_response(image.astype(np.float32), mask, SPACING)), SIZE)[2:6, :2].ravel()
        for image in maps
    ]
    assert energies[0].min() > 1
    assert np.median(np.abs(energies[1] / energies[0] - 1)) < 0.1
    assert np.corrcoef(*energies)[0, 1] > 0.98


def test_nothing_outside_the_breast_or_at_its_edge(film):
    image, mask = film
    rng = np.random.default_rng(0)
    response = speck_response((image + (rng.random(image.shape) < 0.01)).astype(np.float32), mask, SPACING)  # specks everywhere
    whole = np.kron(mask, np.ones((4, 4), bool))[: image.shape[0], : image.shape[1]]
    depth = ndimage.distance_transform_edt(np.pad(whole, 1))[1:-1, 1:-1] * SPACING  # the film's edge is an edge
    assert (response[depth < EDGE_MARGIN_MM - 0.4] == 0).all()
    assert (response[depth > EDGE_MARGIN_MM + 0.4] != 0).mean() > 0.999
    assert response.max() > 10


def test_no_breast_no_energy():
    image = np.random.default_rng(0).random((100, 80)).astype(np.float32)
    response = speck_response(image, np.zeros((50, 40), bool), SPACING)
    assert response.shape == (100, 80)
    assert response.dtype == np.float32
    assert not response.any()


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_flat_tissue_has_no_energy(value):
    """No noise to divide by: rounding must not be treated as specks."""
    response = speck_response(np.full((200, 160), value, np.float32), np.ones((50, 40), bool), SPACING)
    assert np.isfinite(response).all()
    assert not pixel_energy(response).any()
