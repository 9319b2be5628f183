"""On a GPU the same code gives the same masks, scores and tiles as on the host, and leaves the images there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mammostream.preprocess import tiling
from mammostream.preprocess.backend import Backend, backend_of
from mammostream.preprocess.energy import pixel_energy, speck_response
from mammostream.preprocess.pectoral import pectoral_muscle
from mammostream.preprocess.polarity import upright
from mammostream.preprocess.reading import Header, Mammogram
from mammostream.preprocess.resampling import block_mean, resample
from mammostream.preprocess.segmentation import segment_breast
from mammostream.preprocess.selection import box_means, integral
from mammostream.preprocess.specks import find_specks
from mammostream.preprocess.tiling import TilingConfig, tile_film

pytestmark = pytest.mark.gpu
CONFIG = TilingConfig()


@pytest.fixture(scope="module")
def cupy():
    cupy = pytest.importorskip("cupy")
    if not cupy.cuda.is_available():
        pytest.skip("no GPU")
    return cupy


def to_host(array) -> np.ndarray:
    return backend_of(array).to_host(array)


@pytest.fixture(scope="module")
def native(cupy, films) -> dict[str, Mammogram]:
    """The 8 films at their own 0.05 mm."""
    import pydicom

    found = {}
    for film in films:
        pixels = pydicom.dcmread(film.path).pixel_array
        found[film.name] = Mammogram(pixels, Header(*pixels.shape, bits=16, spacing_mm=0.05))
    return found


def on_device(cupy, mammogram: Mammogram) -> Mammogram:
    return replace(mammogram, pixels=cupy.asarray(mammogram.pixels))


def overlap(a, b) -> float:
    return float((a & b).sum() / max((a | b).sum(), 1))


def test_masks(cupy, native):
    for name, mammogram in native.items():
        host, device = (segment_breast(pixels, 0.05) for pixels in (mammogram.pixels, cupy.asarray(mammogram.pixels)))
        assert isinstance(device.mask, cupy.ndarray)
        assert overlap(to_host(device.mask), host.mask) >= 0.999, name
        assert (device.side, device.method, device.flags, device.factor) == (host.side, host.method, host.flags, host.factor)


def test_inverted_films_are_turned_over(cupy, native):
    for name, mammogram in native.items():
        high = int(mammogram.pixels.max())
        voi = np.linspace(0, 1, high + 1).astype(np.float32)
        turned = replace(mammogram, pixels=high - mammogram.pixels, voi=voi)
        device = replace(on_device(cupy, turned), voi=cupy.asarray(voi))
        host, device = (upright(film, "auto") for film in (turned, device))
        assert isinstance(device.pixels, cupy.ndarray)
        assert isinstance(device.voi, cupy.ndarray)
        assert "inverted" in device.header.flags, name
        np.testing.assert_array_equal(to_host(device.pixels), host.pixels)
        np.testing.assert_array_equal(to_host(device.voi), host.voi)
        assert "inverted" not in upright(on_device(cupy, mammogram), "auto").header.flags


def test_muscles(cupy, native):
    for name, mammogram in native.items():
        segmentation = segment_breast(mammogram.pixels, 0.05)
        coarse = block_mean(mammogram.pixels, segmentation.factor)
        there = replace(segmentation, mask=cupy.asarray(segmentation.mask))
        for view in ("", "MLO"):
            host = pectoral_muscle(coarse, segmentation, view)
            device = pectoral_muscle(cupy.asarray(coarse), there, view)
            assert isinstance(device, cupy.ndarray)
            assert host.any() == bool(device.any()), (name, view)
            assert not host.any() or overlap(to_host(device), host) >= 0.98, (name, view)


def odd_images() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:300, :200]
    breast = (np.clip(1 - ((rows - 150) / 120) ** 2 - (columns / 110) ** 2, 0, 1) * 40000).astype(np.uint16)
    holed = breast.copy()
    holed[100:200:20, 10:60:20] = 0
    return {
        "black": np.zeros((300, 200), np.uint16),
        "white": np.full((300, 200), 255, np.uint8),
        "one pixel": np.ones((1, 1), np.uint16),
        "two by three": np.arange(6, dtype=np.uint8).reshape(2, 3),
        "a line": breast[150:151],
        "noise": rng.integers(0, 65536, (300, 200)).astype(np.uint16),
        "breast": breast,
        "right breast": np.ascontiguousarray(breast[:, ::-1]),
        "not contiguous": breast[:, ::-1],
        "holed": holed,
        "bordered": np.pad(breast, 6, constant_values=60000),
        "all tissue": (30000 + 2000 * rng.random((300, 200))).astype(np.uint16),
        "tissue but for a corner": np.where(rows + columns > 480, 0, 30000 + 20 * rows).astype(np.uint16),
        "floats with nan": np.where(rng.random((300, 200)) < 0.1, np.nan, breast).astype(np.float32),
    }


@pytest.mark.parametrize("name", odd_images())
@pytest.mark.parametrize("spacing", [0.4, 0.2, None])
def test_masks_of_odd_images(cupy, name, spacing):
    image = odd_images()[name]
    host, device = segment_breast(image, spacing), segment_breast(cupy.asarray(image), spacing)
    assert (device.side, device.method, device.flags, device.factor) == (host.side, host.method, host.flags, host.factor)
    assert device.mask.shape == host.mask.shape
    assert (to_host(device.mask) == host.mask).mean() >= 0.999


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, bool])
@pytest.mark.parametrize("factor", [1, 2, 3, 8])
def test_block_means(cupy, dtype, factor):
    image = (np.random.default_rng(0).random((101, 67)) * 255).astype(dtype)
    np.testing.assert_allclose(to_host(block_mean(cupy.asarray(image), factor)), block_mean(image, factor), rtol=1e-6)


@pytest.mark.parametrize("ratio", [0.4, 1, 1.7, 2, 3.3])
def test_resampling(cupy, ratio):
    image = np.random.default_rng(0).random((101, 67)).astype(np.float32)
    host, device = resample(image, ratio), resample(cupy.asarray(image), ratio)
    assert device.dtype == host.dtype
    np.testing.assert_allclose(to_host(device), host, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, bool])
def test_box_means(cupy, dtype):
    rng = np.random.default_rng(0)
    values = (rng.random((61, 43)) * 1.9).astype(dtype)
    top, left = rng.random((2, 50)) * [[60], [42]]
    host, device = (box_means(integral(v), top, left, 7.3, 5.9) for v in (values, cupy.asarray(values)))
    np.testing.assert_allclose(to_host(device), host, rtol=1e-9)


def test_responses_energies_and_specks(cupy, native):
    for name, mammogram in list(native.items())[::3]:
        small = block_mean(mammogram.pixels, 2) / np.float32(65535)
        mask = segment_breast(mammogram.pixels, 0.05).mask
        host = speck_response(small, mask, 0.1)
        device = speck_response(cupy.asarray(small), cupy.asarray(mask), 0.1)
        assert device.dtype == host.dtype
        assert host.max() > 4, name
        np.testing.assert_allclose(to_host(device), host, rtol=1e-4, atol=1e-4, err_msg=name)
        np.testing.assert_allclose(to_host(pixel_energy(device)), pixel_energy(host), rtol=1e-4, atol=2, err_msg=name)
        # Specks of the same response are the same; those of its own may differ where a response lies on the limit.
        np.testing.assert_array_equal(find_specks(cupy.asarray(host), 0.1, 4.0), find_specks(host, 0.1, 4.0))
        own, ours = ({tuple(speck) for speck in find_specks(r, 0.1, 4.0)} for r in (device, host))
        assert len(own ^ ours) <= max(1, 0.01 * len(ours)), name


SCORES = ("breast_ratio", "freq_energy", "mean_intensity", "nonzero_ratio")


def thresholds(config: TilingConfig) -> dict[str, float]:
    return {
        "breast_ratio": config.min_breast_ratio,
        "freq_energy": config.min_freq_energy,
        "mean_intensity": config.intensity_gate,
        "nonzero_ratio": config.min_nonzero,
    }


def assert_same_tiles(host, device, config):
    """The same tiles are kept by the same rules, but for those with a score within 1e-4 of its threshold."""
    ours, theirs = host.selection.candidates, device.selection.candidates
    np.testing.assert_array_equal(theirs.x, ours.x)
    np.testing.assert_array_equal(theirs.y, ours.y)
    limits = thresholds(config)
    near = np.any([np.abs(getattr(ours, name) / limits[name] - 1) < 1e-4 for name in SCORES], axis=0)
    np.testing.assert_array_equal(device.selection.fate[~near], host.selection.fate[~near])
    assert near.sum() <= 2
    if not near.any():
        np.testing.assert_array_equal(device.selection.rule, host.selection.rule)
        np.testing.assert_array_equal(device.tiles.x, host.tiles.x)
        np.testing.assert_array_equal(device.tiles.y, host.tiles.y)
        assert device.selection.counts == host.selection.counts
        assert device.flags == host.flags


def test_scores_and_tiles(cupy, native, monkeypatch):
    """Within the same mask: a pixel of it more or less is what the test of masks allows."""
    for name, mammogram in native.items():
        segmentation = segment_breast(mammogram.pixels, 0.05)
        host = tile_film(mammogram, CONFIG)
        with monkeypatch.context() as patch:
            patch.setattr(tiling, "segment_breast", lambda *_, s=segmentation: replace(s, mask=cupy.asarray(s.mask)))
            device = tile_film(on_device(cupy, mammogram), CONFIG)
        for score in SCORES:
            np.testing.assert_allclose(
                getattr(device.selection.candidates, score),
                getattr(host.selection.candidates, score),
                rtol=1e-4,
                atol=1e-3 if score == "freq_energy" else 1e-6,
                err_msg=f"{name} {score}",
            )
        assert_same_tiles(host, device, CONFIG)
        assert (device.mapping, device.scale, device.guide_8bit_kept) == (host.mapping, host.scale, host.guide_8bit_kept)
        np.testing.assert_allclose(to_host(device.image), host.image, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pixel_spacing": 0.07},
        {"select": "both"},
        {"select": "frequency", "freq_percentile": 70.0, "max_tiles_per_image": 9},
    ],
)
def test_a_film_from_its_pixels_to_its_tiles(cupy, native, options):
    config = TilingConfig(**options)
    mammogram = native["P0_lmlo"]
    host, device = tile_film(mammogram, config), tile_film(on_device(cupy, mammogram), config)
    ours, theirs = ({*zip(f.tiles.x.tolist(), f.tiles.y.tolist(), strict=True)} for f in (host, device))
    assert len(ours ^ theirs) <= 0.03 * len(ours)
    assert host.selection.threshold == pytest.approx(device.selection.threshold, rel=1e-3)
    # The pixels of tiles are those of the host, but for a rounding that falls the other way.
    places = list(zip(host.tiles.x.tolist(), host.tiles.y.tolist(), strict=True))
    for index, place in enumerate(zip(device.tiles.x.tolist(), device.tiles.y.tolist(), strict=True)):
        if place in places:
            for bits in (8, 16):
                got, expected = device.cut(index, 512, bits), host.cut(places.index(place), 512, bits)
                assert isinstance(got, np.ndarray)
                assert got.dtype == expected.dtype
                difference = np.abs(got.astype(int) - expected)
                assert difference.max() <= (1 if options.get("pixel_spacing") is None else 2)
                assert (difference > 0).mean() < 0.05


def test_voi_lut_on_the_device(cupy, native):
    mammogram = replace(native["P1_rcc"], voi=np.clip(np.arange(65536, dtype=np.float32) / 60000, 0, 1))
    moved = replace(on_device(cupy, mammogram), voi=cupy.asarray(mammogram.voi))
    host, device = tile_film(mammogram, CONFIG), tile_film(moved, CONFIG)
    assert device.mapping == host.mapping == "voi"
    np.testing.assert_array_equal(to_host(device.image), host.image)


def test_small_images_are_padded_on_the_device(cupy, native):
    pixels = np.ascontiguousarray(native["P1_rcc"].pixels[2000:2300, -900:])
    mammogram = Mammogram(pixels, Header(*pixels.shape, bits=16, spacing_mm=0.05))
    host, device = tile_film(mammogram, CONFIG), tile_film(on_device(cupy, mammogram), CONFIG)
    assert "padded" in device.flags
    assert device.image.shape == host.image.shape
    assert device.selection.counts == host.selection.counts


def test_images_stay_on_the_device(cupy, native, monkeypatch):
    """Only scores, specks and a few counts go to the host, never a map; a tile does when it is cut."""
    mammogram = on_device(cupy, native["P1_lmlo"])
    moved = []
    to_host_as_it_is = Backend.to_host

    def counting(self, array):
        moved.append(array.nbytes)
        return to_host_as_it_is(self, array)

    monkeypatch.setattr(Backend, "to_host", counting)
    film = tile_film(mammogram, CONFIG)
    for array in (film.image, film.response, film.segmentation.mask):
        assert isinstance(array, cupy.ndarray)
    assert 0 < sum(moved) < 0.01 * mammogram.pixels.nbytes
    assert max(moved) < film.segmentation.mask.nbytes  # no whole map, however coarse
    moved.clear()
    assert film.cut(0, 512, 8).nbytes == sum(moved) == 512 * 512
