"""Views compared with other libraries: OpenCV and scipy for geometry, NumPy and scipy for intensities."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
from nvidia.dali import fn, pipeline_def
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.stats import binom

from mammostream.dali_pipelines import RECIPES, TRAIN_VIEW, LabelledLoader, View, baselines, views
from mammostream.dali_pipelines.intensity import ImageFormat

FULL = 65535
ALL_VIEWS = [*RECIPES["guide"], *RECIPES["mammo"], TRAIN_VIEW]
ALL_NAMES = ["guide1", "guide2", "mammo1", "mammo2", "train"]


def apply(tiles, view, **options):
    """Return (views, originals) of all tiles on the stored scale: float64 (N, H, W) each."""
    loader = LabelledLoader(tiles.shards, view=view, batch_size=32, tile_size=tiles.size, mean=0, std=1, **options)
    batch, numbers = next(iter(loader))
    originals = np.stack([tiles.pixels[n] for n in numbers.tolist()])
    return batch[:, 0].numpy().astype(float) * FULL, originals.astype(float)


def homographies(view, size, count=64, view_size=None):
    """Return `count` drawn homographies: float64 (count, 3, 3)."""

    @pipeline_def
    def graph():
        return views.draw_homography(view, size, view_size or size)

    (out,) = graph(batch_size=count, num_threads=1, device_id=None, seed=5).run()
    return np.array(out.as_tensor()).astype(float)


def parts(matrices, size):
    """Decompose homographies: zoom with sign (N, 2), angle in degrees, offset (N, 2) and tilt (N, 2) from the centre."""
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


def assert_as_often_as(probability, happened):
    """Check a count against binomial bounds; a correct one fails once in a million."""
    low, high = binom.interval(1 - 1e-6, len(happened), probability)
    assert low <= np.sum(happened) <= high


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
        assert_as_often_as(probability, zoom[:, axis] < 0)
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


def warp(tiles, view, monkeypatch, size=None, seed=3):
    """Return `view`'s geometry of each tile, and its homography: float64 (N, size, size) on the stored scale, (N, 3, 3)."""
    drawn = []
    draw = views.draw_homography
    monkeypatch.setattr(views, "draw_homography", lambda *args: drawn.append(draw(*args)) or drawn[-1])
    edge = tiles.shape[1]
    geometry = replace(view, brightness=0, contrast=0, blur_probability=0)

    @pipeline_def(enable_conditionals=True)
    def graph():
        tile = fn.reshape(fn.external_source(lambda: list(tiles[..., None])), layout="HWC")
        return views.apply_view(tile, geometry, edge, ImageFormat(size or edge, 0, 1)), drawn[0]

    warped, matrices = graph(batch_size=len(tiles), num_threads=2, device_id=None, seed=seed).run()
    monkeypatch.undo()
    assert len(drawn) == 1  # every view resamples exactly once
    return np.array(warped.as_tensor())[..., 0].astype(float) * FULL, np.array(matrices.as_tensor()).astype(float)


def cut(film, size, count):
    """Return `count` tiles of a film with both ends of the scale in them: uint16 (count, size, size)."""
    rng = np.random.default_rng(size)
    y, x = (rng.integers(0, edge - size, count) for edge in film.shape)
    cuts = np.stack([film[a : a + size, b : b + size] for a, b in zip(y, x, strict=True)])
    cuts[:, 0, :2] = 0, FULL
    return cuts


@pytest.mark.parametrize("size", [None, 32, 96])
@pytest.mark.parametrize("view", ALL_VIEWS, ids=ALL_NAMES)
def test_resampling_equals_scipy(film, view, size, monkeypatch):
    """One linear resample with mirrored borders, half-pixel centres, destination to source, for any view size."""
    originals = cut(film, 48, 8)
    warped, matrices = warp(originals, view, monkeypatch, size)
    edge = size or 48
    y, x = np.mgrid[:edge, :edge] + 0.5
    for original, got, matrix in zip(originals.astype(float), warped, matrices, strict=True):
        assert got.shape == (edge, edge)
        sx, sy, weight = np.einsum("ij,jyx->iyx", matrix, np.stack([x, y, np.ones_like(x)]))
        expected = map_coordinates(original, [sy / weight - 0.5, sx / weight - 0.5], order=1, mode="mirror")
        # Steep edges magnify float32's rounding of coordinates: a few of 65535 levels.
        np.testing.assert_allclose(got, expected, atol=8)


@pytest.mark.parametrize("view", ALL_VIEWS, ids=ALL_NAMES)
def test_resampling_equals_opencv_on_whole_tiles(film, view, monkeypatch):
    originals = cut(film, 512, 3)
    warped, matrices = warp(originals, view, monkeypatch)
    to_corner = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])  # OpenCV counts from the centre of the first pixel
    for original, got, matrix in zip(originals, warped, matrices, strict=True):
        homography = np.linalg.inv(to_corner) @ matrix @ to_corner
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        expected = cv2.warpPerspective(original, homography, (512, 512), flags=flags, borderMode=cv2.BORDER_REFLECT_101)
        difference = np.abs(got - expected)
        assert difference.max() <= 64  # of 65535, at the two planted pixels
        assert difference.mean() < 0.5


@pytest.mark.parametrize("view_size", [100, 48])
@pytest.mark.parametrize("view", ALL_VIEWS, ids=ALL_NAMES)
def test_homographies_are_those_that_the_benchmark_draws_with_numpy(view, view_size):
    """No moment of any coefficient differs: OpenCV is timed with the same views that DALI makes."""
    drawn = homographies(view, 100, 1500, view_size)
    rng = np.random.default_rng(1)
    to_corner = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
    other = np.stack([baselines.draw_homography(view, 100, view_size, rng) for _ in range(1500)])
    other = to_corner @ other @ np.linalg.inv(to_corner)
    # The coefficients of the two parametrisations differ by a factor that is 1 only at the tile's centre.
    drawn, other = (matrices / matrices[:, 2:, 2:] for matrices in (drawn, other))
    spread = np.maximum(other.std(axis=0), 1e-6)
    np.testing.assert_allclose(drawn.mean(axis=0) / spread, other.mean(axis=0) / spread, atol=0.2)
    np.testing.assert_allclose(drawn.std(axis=0) / spread, other.std(axis=0) / spread, atol=0.1)


def test_a_view_without_a_draw_shows_the_whole_tile_at_its_own_size():
    matrices = homographies(View(), 512, 1, view_size=256)
    np.testing.assert_allclose(matrices[0], np.diag([2, 2, 1]), atol=1e-6)


def test_fine_specks_survive_the_geometry(film, monkeypatch):
    """A speck of 0.3 mm at 0.05 mm per pixel keeps at least 90 % of its peak contrast in view 1 of the guide."""
    spacing, diameter, amplitude = 0.05, 0.3, 2000.0
    plain = np.stack([film[300:812, 200:712]] * 6)
    rng = np.random.default_rng(4)
    centres = np.stack(np.meshgrid(*[np.arange(40, 480, 40.0)] * 2), -1).reshape(-1, 2) + rng.uniform(0, 1, (121, 2))
    y, x = np.mgrid[:512, :512] + 0.5
    specks = np.zeros((512, 512))
    for cx, cy in centres:
        specks = np.maximum(specks, amplitude * np.clip(diameter / spacing / 2 - np.hypot(y - cy, x - cx) + 0.5, 0, 1))
    planted = (plain + np.rint(specks)).astype(np.uint16)
    view = RECIPES["guide"][0]
    # The same seed draws the same geometry, so the difference is the specks alone, on the background of a real film.
    (with_specks, matrices), (without, same) = (warp(tiles, view, monkeypatch) for tiles in (planted, plain))
    np.testing.assert_array_equal(matrices, same)
    difference = with_specks - without
    found = 0
    for image, matrix in zip(difference, np.linalg.inv(matrices), strict=True):
        u, v, weight = matrix @ np.vstack([centres.T, np.ones(len(centres))])
        for column, row in zip((u / weight).astype(int), (v / weight).astype(int), strict=True):
            if 6 <= column < 506 and 6 <= row < 506:
                found += 1
                assert image[row - 5 : row + 6, column - 5 : column + 6].max() >= 0.9 * amplitude
    assert found > 400


@pytest.mark.parametrize("view", ALL_VIEWS, ids=ALL_NAMES)
def test_no_black_wedges(view, monkeypatch):
    """A tile that is bright everywhere stays bright: the outside is mirrored."""
    warped, _ = warp(np.full((32, 64, 64), 40000, np.uint16), view, monkeypatch)
    np.testing.assert_array_equal(np.rint(warped), 40000)


def test_identity_leaves_the_tile_unchanged(tiles):
    assert not View().moves_pixels
    got, originals = apply(tiles, View())
    np.testing.assert_array_equal(np.rint(got), originals)


def test_resampling_without_movement_is_exact(tiles):
    """A flip that never happens still goes through the resampler."""
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
    # The mean of four linear samples at ±1/4 weights the neighbours by 1/8 along each axis.
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


@pytest.mark.parametrize("probability", [0.5, 0.9])
def test_blur_is_as_frequent_as_requested(tiles, probability):
    loader = LabelledLoader(
        tiles.shards, view=View(blur_probability=probability, blur_sigma=(1, 2)), batch_size=8, tile_size=48, mean=0, std=1
    )
    blurred = []
    for _ in range(10):
        for batch, numbers in loader:
            originals = np.stack([tiles.pixels[n] for n in numbers.tolist()])
            blurred += (np.abs(batch[:, 0].numpy() * FULL - originals).max(axis=(1, 2)) > 1).tolist()
    assert len(blurred) == 230
    assert_as_often_as(probability, np.array(blurred))


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_equals_opencv(tiles, sigma):
    got, originals = apply(tiles, View(blur_probability=1, blur_sigma=(sigma, sigma)))
    window = 2 * int(np.ceil(3 * sigma)) + 1
    for image, original in zip(got, originals, strict=True):
        expected = cv2.GaussianBlur(original, (window, window), sigma, borderType=cv2.BORDER_REFLECT_101)
        np.testing.assert_allclose(image, expected, atol=1)


def test_contrast_turns_about_the_whole_tiles_mean_in_a_crop_too(film):
    """Half of the tile is dark, half is bright: two grey levels in a crop determine the gain and its fixed point."""
    tile = np.full((64, 64), 10000, np.uint16)
    tile[:, 40:] = 50000
    form = ImageFormat(64, 0, 1)

    @pipeline_def(enable_conditionals=True)
    def graph():
        node = fn.reshape(fn.external_source(lambda: [tile[..., None]] * 32), layout="HWC")
        return views.apply_view(node, View(contrast=0.4, crop_area=(0.5, 1.0)), 64, form)

    (out,) = graph(batch_size=32, num_threads=1, device_id=None, seed=1).run()
    turned = 0
    for image in np.array(out.as_tensor())[..., 0].astype(float) * FULL:
        dark, bright = image.min(), image.max()
        gain = (bright - dark) / 40000
        if abs(gain - 1) > 0.02:
            turned += 1
            assert (dark - gain * 10000) / (1 - gain) == pytest.approx(tile.mean(), rel=1e-3)
    assert turned > 20


def test_noise_has_the_requested_deviation(tiles):
    got, originals = apply(tiles, View(noise=0.05))
    deviation = (got - originals).std(axis=(1, 2)) / FULL
    assert deviation.max() <= 0.055
    assert deviation.max() > 0.035
