"""The GPU graph gives the same as the CPU graph, and its batches stay valid while they are read."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mammostream.dali_pipelines import RECIPES, TRAIN_VIEW, LabelledLoader, PretrainLoader, View, views
from mammostream.shards import codecs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def batches(tiles, device, **options):
    loader = LabelledLoader(tiles.shards, batch_size=8, tile_size=tiles.size, mean=0.449, std=0.226, device=device, **options)
    return [(images.cpu(), numbers) for images, numbers in loader]


def assert_close(got, expected, atol):
    assert len(got) == len(expected) > 0
    for (images, numbers), (other_images, other_numbers) in zip(got, expected, strict=True):
        assert torch.equal(numbers, other_numbers)
        torch.testing.assert_close(images, other_images, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("codec", [name for name, codec in codecs.CODECS.items() if codec.lossless])
def test_decoding_is_exact(make_shards, tmp_path, codec, dtype):
    made = make_shards(tmp_path, (5, 4), codec, dtype)
    assert_close(batches(made, "gpu"), batches(made, "cpu"), atol=1e-6)


@pytest.mark.parametrize("view", [*RECIPES["guide"], *RECIPES["mammo"], TRAIN_VIEW, View(noise=0.0, contrast=0.4)])
@pytest.mark.parametrize("blurred", [0, 1])
def test_views_are_the_same(tiles, view, blurred, monkeypatch):
    """With every draw fixed away from its centre, since random draws differ between devices."""
    monkeypatch.setattr(views, "_uniform", lambda low, high: low + 0.8 * (high - low))
    monkeypatch.setattr(views, "_sign", lambda probability: -1.0 if probability else 1.0)
    view = View(**{**vars(view), "blur_probability": float(blurred)})
    # At steep edges a resampled pixel may differ by a few of 65535 levels.
    assert_close(batches(tiles, "gpu", view=view), batches(tiles, "cpu", view=view), atol=16 / 65535 / 0.226)


def test_batches_are_on_the_device_and_channels_last(tiles):
    loader = PretrainLoader(
        tiles.shards, batch_size=4, tile_size=tiles.size, mean=0.449, std=0.226, device="gpu", view_size=24, dtype="float16"
    )
    for view1, view2, numbers in loader:
        for view in (view1, view2):
            assert view.is_cuda
            assert view.dtype == torch.float16
            assert view.stride() == (24 * 24, 1, 24, 1)
        assert not numbers.is_cuda


def test_resume_is_bit_equal(tiles):
    def make():
        return PretrainLoader(tiles.shards, batch_size=4, tile_size=tiles.size, mean=0.449, std=0.226, device="gpu")

    loader, resumed = make(), make()
    next(iter(loader))
    resumed.load_state_dict(loader.state_dict())
    for (a1, a2, an), (b1, b2, bn) in zip(loader, resumed, strict=True):
        assert torch.equal(a1, b1)
        assert torch.equal(a2, b2)
        assert torch.equal(an, bn)


def test_a_slow_kernel_on_a_side_stream_reads_unchanged_data(tiles):
    """The batch is freed and five more are made before the kernel that reads it has started."""
    loader = PretrainLoader(tiles.shards, batch_size=2, tile_size=tiles.size, mean=0.449, std=0.226, device="gpu")
    expected = [view1.clone() for view1, _, _ in loader]  # one epoch; the same seed gives the same views
    again = PretrainLoader(tiles.shards, batch_size=2, tile_size=tiles.size, mean=0.449, std=0.226, device="gpu")
    with torch.cuda.stream(torch.cuda.Stream()):
        iterator = iter(again)
        view1, view2, _ = next(iterator)
        torch.cuda._sleep(2_000_000_000)  # about a second
        late = view1 * 1.0
        del view1, view2
        for _ in range(5):
            next(iterator)
        assert not torch.cuda.current_stream().query()  # the kernel still waits
    torch.cuda.synchronize()
    assert torch.equal(late, expected[0])
