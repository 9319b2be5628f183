"""Frequency energy: specks raise it, exposure does not, and outside the breast there is none."""

from __future__ import annotations

import numpy as np
import pytest

from preprocess.energy import SKIN_MARGIN_MM, bright_response, excess_energy
from preprocess.segmentation import segment_breast

SPACING = 0.2


@pytest.fixture(scope="module")
def film(films):
    found = films[1]
    return found.pixels.astype(np.float32) / 65535, segment_breast(found.pixels, SPACING)


def tile_energy(image, segmentation, top, left, size=100):
    response, spacing = bright_response(image, segmentation.mask, SPACING, segmentation.spacing_mm)
    assert spacing == SPACING  # coarser than 0.1 mm: filtered as it is
    return float(np.sqrt(excess_energy(response)[top : top + size, left : left + size].mean()))


def with_specks(image, top, left, size, contrast, count=12):
    rng = np.random.default_rng(3)
    planted = image.copy()
    for y, x in rng.integers(20, size - 20, (count, 2)):
        planted[top + y : top + y + 2, left + x : left + x + 2] += contrast
    return planted


def test_specks_raise_the_energy_of_their_tile_alone(film):
    image, segmentation = film
    top, left, far = 480, 100, 700
    before, elsewhere = (tile_energy(image, segmentation, t, left) for t in (top, far))
    energies = [tile_energy(with_specks(image, top, left, 100, c), segmentation, top, left) for c in (0.05, 0.1, 0.2)]
    assert [before, *energies] == sorted([before, *energies])
    assert energies[0] > 1.5 * before
    assert energies[2] > 5 * before
    changed = tile_energy(with_specks(image, top, left, 100, 0.2), segmentation, far, left)
    assert changed == pytest.approx(elsewhere, rel=0.02, abs=0.005)


def test_dark_specks_count_little(film):
    image, segmentation = film
    bright = tile_energy(with_specks(image, 480, 100, 100, 0.1), segmentation, 480, 100)
    dark = tile_energy(with_specks(image, 480, 100, 100, -0.1), segmentation, 480, 100)
    assert dark < bright / 3


@pytest.mark.parametrize("scale", [0.25, 3.0])
@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_exposure_changes_nothing(film, scale, offset):
    image, segmentation = film
    first, _ = bright_response(image, segmentation.mask, SPACING, segmentation.spacing_mm)
    second, _ = bright_response(image * scale + offset, segmentation.mask, SPACING, segmentation.spacing_mm)
    assert first.max() > 3  # something stands out
    np.testing.assert_allclose(second, first, rtol=0.02, atol=0.05)


def test_nothing_outside_the_breast_or_at_the_skin(film):
    image, segmentation = film
    rng = np.random.default_rng(0)
    image = image + (rng.random(image.shape) < 0.01)  # specks everywhere
    response, _ = bright_response(image, segmentation.mask, SPACING, segmentation.spacing_mm)
    mask = np.kron(segmentation.mask, np.ones((2, 2), bool))[: image.shape[0], : image.shape[1]]
    assert response.dtype == np.float32
    assert response[mask].max() > 10
    assert (response[~mask] == 0).all()
    from scipy.ndimage import distance_transform_edt

    depth = distance_transform_edt(np.pad(mask, 1, mode="edge"))[1:-1, 1:-1] * SPACING
    assert (response[depth < SKIN_MARGIN_MM - 0.4] == 0).all()
    assert (response[depth > SKIN_MARGIN_MM + 0.4] > 0).mean() > 0.3


def test_fine_images_are_filtered_at_a_tenth_of_a_millimetre(film):
    image, segmentation = film
    fine = np.kron(image[400:800, 50:350], np.ones((4, 4), np.float32))  # 0.05 mm
    mask = np.ones((fine.shape[0] // 8, fine.shape[1] // 8), bool)
    response, spacing = bright_response(fine, mask, 0.05, 0.4)
    assert spacing == 0.1
    assert response.shape == (fine.shape[0] // 2, fine.shape[1] // 2)
    assert response.max() > 3


def test_no_breast_no_energy():
    image = np.random.default_rng(0).random((100, 80)).astype(np.float32)
    response, spacing = bright_response(image, np.zeros((50, 40), bool), SPACING, 0.4)
    assert response.shape == (100, 80)
    assert spacing == SPACING
    assert not response.any()


def test_energy_is_the_squared_excess_over_three_deviations():
    response = np.array([0, 2.9, 3, 4, 6], np.float32)
    np.testing.assert_allclose(excess_energy(response), [0, 0, 0, 1, 9])
