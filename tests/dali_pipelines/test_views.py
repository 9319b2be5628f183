"""Views against references that share no code with DALI."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from nvidia.dali import pipeline_def
from scipy.ndimage import gaussian_filter, map_coordinates

from common.errors import BadInput
from dali_pipelines import RECIPES, TRAIN_VIEW, LabelledLoader, View, views
from dali_pipelines.pipelines import read_tiles
from dali_pipelines.readers import open_source

FULL = 65535
ALL_VIEWS = [*RECIPES["guide"], *RECIPES["mammo"], TRAIN_VIEW]
ALL_NAMES = ["guide1", "guide2", "mammo1", "mammo2", "train"]


def apply(tiles, view, **options):
    """Return (views, originals) of all tiles on the stored scale: float64 (N, H, W) each."""
    loader = LabelledLoader(tiles.shards, view=view, batch_size=32, tile_size=tiles.size, mean=0, std=1, **options)
    batch, numbers = next(iter(loader))
    originals = np.stack([tiles.pixels[n] for n in numbers.tolist()])
    return batch[:, 0].numpy().astype(float) * FULL, originals.astype(float)


def homographies(view, size, count=64):
    """Return `count` drawn homographies: float64 (count, 3, 3)."""

    @pipeline_def
    def graph():
        return views.draw_homography(view, size)

    (out,) = graph(batch_size=count, num_threads=1, device_id=None, seed=5).run()
    return np.array(out.as_tensor()).astype(float)


def parts(matrices, size):
    """Take homographies apart: zoom with sign (N, 2), angle in degrees, offset (N, 2) and tilt (N, 2) from the centre."""
    to, fro = np.eye(3), np.eye(3)
    to[:2, 2], fro[:2, 2] = -size / 2, size / 2
    centred = to @ matrices @ fro
    offset, tilt = centred[:, :2, 2], centred[:, 2, :2]
    np.testing.assert_allclose(centred[:, 2, 2], 1, atol=1e-5)
    linear = centred[:, :2, :2] - offset[:, :, None] * tilt[:, None, :]
    zoom = np.linalg.norm(linear, axis=1)
    # A rotation within ±90° has a positive diagonal, so a column's sign is its flip.
    sign = np.sign(linear[:, [0, 1], [0, 1]])
    rotation = linear / (zoom * sign)[:, None, :]
    np.testing.assert_allclose(rotation @ rotation.transpose(0, 2, 1), np.broadcast_to(np.eye(2), rotation.shape), atol=1e-4)
    return zoom * sign, np.degrees(np.arctan2(rotation[:, 1, 0], rotation[:, 0, 0])), offset, tilt


@pytest.mark.parametrize("view", ALL_VIEWS, ids=ALL_NAMES)
def test_drawn_geometry_fills_its_ranges(view):
    size = 512
    zoom, angle, offset, tilt = parts(homographies(view, size, 400), size)

    assert np.abs(angle).max() <= view.rotation_deg + 1e-3
    assert angle.max() > 0.9 * view.rotation_deg
    assert angle.min() < -0.9 * view.rotation_deg
    np.testing.assert_allclose(np.abs(zoom[:, 0]), np.abs(zoom[:, 1]), rtol=1e-4)
    smallest_crop = 1 if view.crop_area is None else view.crop_area[0] ** 0.5
    assert np.abs(zoom).max() <= 1 / view.scale[0] + 1e-4
    assert np.abs(zoom).min() >= smallest_crop / view.scale[1] - 1e-4
    for axis, probability in enumerate((view.horizontal_flip, view.vertical_flip)):
        assert np.mean(zoom[:, axis] < 0) == pytest.approx(probability, abs=0.1)
    reach = view.translation * size + (1 - smallest_crop) * size / 2
    assert np.abs(offset).max() <= reach + 1e-2
    assert np.abs(offset).max() >= 0.8 * reach
    assert np.abs(tilt).max() <= view.perspective / (size / 2) + 1e-6
    assert np.abs(tilt).max() >= 0.9 * view.perspective / (size / 2) - 1e-6


def test_crop_stays_inside_the_tile():
    size = 100
    matrices = homographies(View(crop_area=(0.25, 0.25)), size)
    corners = np.array([[0, 0, 1], [size, size, 1]], float).T
    source = (matrices @ corners)[:, :2]
    assert source.min() >= -1e-3
    assert source.max() <= size + 1e-3
    np.testing.assert_allclose(source[:, :, 1] - source[:, :, 0], size / 2, rtol=1e-4)


@pytest.mark.parametrize("view", ALL_VIEWS, ids=ALL_NAMES)
def test_resampling_equals_scipy(tiles, view, monkeypatch):
    """One linear resample with mirrored borders, half-pixel centres, destination to source."""
    drawn = []
    draw = views.draw_homography

    source = open_source(tiles.shards, tile_size=tiles.size)

    @pipeline_def(enable_conditionals=True)
    def graph():
        tile, _ = read_tiles(source, tiles.size, "cpu", shuffle=False, initial_fill=1)
        geometry = replace(view, brightness=0, contrast=0, blur_probability=0)
        return tile, views.apply_view(tile, geometry, tile_size=tiles.size, mean=0, std=1), drawn[0]

    monkeypatch.setattr(views, "draw_homography", lambda *args: drawn.append(draw(*args)) or drawn[-1])
    originals, warped, matrices = (
        np.array(out.as_tensor()).astype(float) for out in graph(batch_size=16, num_threads=2, device_id=None, seed=3).run()
    )
    assert len(drawn) == 1
    y, x = np.mgrid[: tiles.size, : tiles.size] + 0.5
    for original, got, matrix in zip(originals[..., 0], warped[..., 0] * FULL, matrices, strict=True):
        sx, sy, weight = np.einsum("ij,jyx->iyx", matrix, np.stack([x, y, np.ones_like(x)]))
        expected = map_coordinates(original, [sy / weight - 0.5, sx / weight - 0.5], order=1, mode="mirror")
        # Steep edges magnify float32's rounding of coordinates: a few of 65535 levels.
        np.testing.assert_allclose(got, expected, atol=8)


def test_identity_leaves_the_tile_unchanged(tiles):
    assert not View().moves_pixels
    got, originals = apply(tiles, View())
    np.testing.assert_array_equal(np.rint(got), originals)


def test_resampling_without_movement_is_exact(tiles):
    """A flip that never falls still goes through the resampler."""
    view = View(horizontal_flip=1e-9)
    assert view.moves_pixels
    got, originals = apply(tiles, view)
    np.testing.assert_array_equal(np.rint(got), originals)


@pytest.mark.parametrize(
    ("view", "axis"), [(View(horizontal_flip=1), 2), (View(vertical_flip=1), 1)], ids=["horizontal", "vertical"]
)
def test_flips_are_exact(tiles, view, axis):
    got, originals = apply(tiles, view)
    np.testing.assert_array_equal(np.rint(got), np.flip(originals, axis))


def test_scale_magnifies(tiles):
    """At twice the scale, each pixel near the centre covers two."""
    got, originals = apply(tiles, View(scale=(2, 2)))
    half, quarter = tiles.size // 2, tiles.size // 4
    means = got.reshape(len(got), half, 2, half, 2).mean(axis=(2, 4))
    centre = originals[:, quarter:-quarter, quarter:-quarter]
    # The mean of four linear samples at ±1/4 weighs the neighbours by 1/8 along each axis.
    weights = np.array([0.125, 0.75, 0.125])
    expected = sum(
        weights[i]
        * weights[j]
        * originals[:, quarter - 1 + i : half + quarter - 1 + i, quarter - 1 + j : half + quarter - 1 + j]
        for i in range(3)
        for j in range(3)
    )
    assert means.shape == centre.shape
    np.testing.assert_allclose(means, expected, atol=2)


def test_brightness_multiplies_without_clipping(tiles):
    got, originals = apply(tiles, View(brightness=0.3))
    bright = originals > 1000
    factors = [(g[b] / o[b]) for g, o, b in zip(got, originals, bright, strict=True)]
    for factor in factors:
        np.testing.assert_allclose(factor, factor[0], rtol=1e-5)
    means = np.array([f[0] for f in factors])
    assert 0.7 <= means.min() < 0.85
    assert 1.15 < means.max() <= 1.3
    assert got.max() > FULL * 1.1


def test_contrast_turns_about_the_tiles_mean_without_clipping(tiles):
    got, originals = apply(tiles, View(contrast=0.4))
    means = originals.mean(axis=(1, 2))
    np.testing.assert_allclose(got.mean(axis=(1, 2)), means, rtol=1e-4)
    factors = (got.std(axis=(1, 2)) / originals.std(axis=(1, 2)))[:, None, None]
    np.testing.assert_allclose(got - means[:, None, None], (originals - means[:, None, None]) * factors, atol=3)
    assert 0.6 <= factors.min() < 0.8
    assert 1.2 < factors.max() <= 1.4
    assert got.min() < 0
    assert got.max() > FULL


def test_brightness_then_contrast(tiles):
    """Together: the mean moves with brightness alone."""
    got, originals = apply(tiles, View(brightness=0.3, contrast=0.3))
    factor = got.mean(axis=(1, 2)) / originals.mean(axis=(1, 2))
    assert np.all((factor > 0.69) & (factor < 1.31))
    turned = got.std(axis=(1, 2)) / (originals.std(axis=(1, 2)) * factor)
    assert np.all((turned > 0.69) & (turned < 1.31))
    assert turned.std() > 0.05


def test_blur_equals_scipy(tiles):
    got, originals = apply(tiles, View(blur_probability=1, blur_sigma=(1.5, 1.5)))
    expected = gaussian_filter(originals, (0, 1.5, 1.5), mode="mirror", radius=5)
    np.testing.assert_allclose(got, expected, atol=2)


def test_blur_falls_on_some_tiles_only(tiles):
    got, originals = apply(tiles, View(blur_probability=0.5, blur_sigma=(1, 2)))
    blurred = np.abs(got - originals).max(axis=(1, 2)) > 1
    assert 4 <= blurred.sum() <= 19


def test_noise_has_the_deviation_asked_for(tiles):
    got, originals = apply(tiles, View(noise=0.05))
    deviation = (got - originals).std(axis=(1, 2)) / FULL
    assert deviation.max() <= 0.055
    assert deviation.max() > 0.035


@pytest.mark.parametrize(
    "wrong",
    [
        {"rotation_deg": -1},
        {"scale": (1.2, 0.8)},
        {"scale": (0, 1)},
        {"horizontal_flip": 1.5},
        {"crop_area": (0.5, 1.1)},
        {"perspective": 0.5},
        {"brightness": 1.1},
        {"blur_sigma": (0, 1)},
        {"noise": -0.1},
    ],
    ids=str,
)
def test_ranges_are_checked(wrong):
    with pytest.raises(BadInput, match=next(iter(wrong))):
        View(**wrong)
