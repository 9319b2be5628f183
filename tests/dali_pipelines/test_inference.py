"""The transform for single images gives the same as the evaluation pipeline."""

from __future__ import annotations

import doctest
import subprocess
import sys

import imagecodecs
import numpy as np
import pytest
import torch
from PIL import Image

from mammostream import dali_pipelines
from mammostream.common.errors import BadInput
from mammostream.dali_pipelines import LabelledLoader, create_inference_transform, inference
from mammostream.shards import codecs


def evaluate(path, size):
    loader = LabelledLoader([path], batch_size=1, tile_size=size, mean=0.449, std=0.226)
    return next(iter(loader))[0][0].clone()


@pytest.fixture(scope="module")
def pictures(film, tmp_path_factory):
    """Paths and pixels of a tile in 16 bits, 8 bits and colour."""
    directory = tmp_path_factory.mktemp("pictures")
    grey16 = np.ascontiguousarray(film[400:496, 500:596])
    grey8 = (grey16 // 256).astype(np.uint8)
    rgb = np.stack([grey8, 255 - grey8, grey8 // 2], axis=-1)
    arrays = {"grey16.png": grey16, "grey8.png": grey8, "grey16.tif": grey16, "rgb.png": rgb}
    for name, pixels in arrays.items():
        data = codecs.encode(pixels, "tif") if name.endswith("tif") else imagecodecs.png_encode(pixels)
        (directory / name).write_bytes(data)
    return {name: (directory / name, pixels) for name, pixels in arrays.items()}


@pytest.mark.parametrize("name", ["grey16.png", "grey8.png", "grey16.tif", "rgb.png"])
def test_parity_at_the_stored_size(pictures, name):
    path, pixels = pictures[name]
    expected = evaluate(path, 96)
    # Colours: libraries differ by one level of the stored depth in rounding.
    tolerance = 1.01 / 255 / 0.226 if name == "rgb.png" else 1e-6
    for image in (pixels, Image.open(path)):
        got = create_inference_transform()(image)
        assert got.dtype == torch.float32
        assert got.shape == (1, 96, 96)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=tolerance)


@pytest.mark.parametrize("size", [48, 150])
def test_parity_when_resized(pictures, size):
    path, pixels = pictures["grey16.png"]
    got, expected = create_inference_transform(size)(pixels), evaluate(path, size)
    assert got.shape == (1, size, size)
    # Inside, both filters are the same; at the edge DALI repeats the border and torch renormalises.
    torch.testing.assert_close(got[:, 3:-3, 3:-3], expected[:, 3:-3, 3:-3], rtol=0, atol=1e-4)
    torch.testing.assert_close(got, expected, rtol=0, atol=0.1)


def test_shapes_and_modes():
    transform = create_inference_transform(mean=0, std=1)
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    expected = transform(grey)
    assert expected.min() == 0
    assert expected.max() == 1
    alpha = np.full((16, 16), 7, np.uint8)
    same = [
        grey[..., None],
        np.stack([grey] * 3, -1),
        np.stack([grey] * 3 + [alpha], -1),
        Image.fromarray(grey),
        Image.fromarray(grey).convert("RGB"),
        Image.fromarray(grey).convert("P"),
        Image.fromarray(grey.astype(np.uint16) * 257),
        Image.fromarray(grey.astype(np.int32) * 257),
    ]
    for image in same:
        torch.testing.assert_close(transform(image), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4)),
        np.zeros((4, 4), np.int16),
        np.zeros((4,), np.uint8),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((0, 4), np.uint8),
        "tile.png",
        Image.fromarray(np.full((4, 4), 70000, np.int32)),
    ],
    ids=["float", "int16", "line", "two channels", "empty", "path", "beyond 16 bits"],
)
def test_input_that_is_not_a_tile(image):
    with pytest.raises(BadInput):
        create_inference_transform()(image)


def test_std_must_be_positive():
    with pytest.raises(BadInput, match="std 0"):
        create_inference_transform(std=0)


@pytest.mark.parametrize("module", [dali_pipelines, inference])
def test_examples_run(module):
    results = doctest.testmod(module)
    assert results.attempted > 0
    assert results.failed == 0


def test_import_is_light():
    code = "import sys, dali_pipelines; sys.exit('torch' in sys.modules or 'nvidia.dali' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    with pytest.raises(AttributeError, match="nothing"):
        dali_pipelines.nothing  # noqa: B018
