"""Loaders: exact pixels, every tile once, ranks, resume, failures."""

from __future__ import annotations

import io
import subprocess
import sys

import imagecodecs
import numpy as np
import pytest
import torch

from common.errors import BadInput
from dali_pipelines import RECIPES, TRAIN_VIEW, LabelledLoader, PretrainLoader
from shards import archive, codecs
from shards.reading import Shard


def labelled(tiles, batch_size=4, **options):
    return LabelledLoader(tiles.shards, batch_size=batch_size, tile_size=tiles.size, mean=0.449, std=0.226, **options)


def pretrain(tiles, batch_size=4, **options):
    options = {"initial_fill": 6} | options
    return PretrainLoader(tiles.shards, batch_size=batch_size, tile_size=tiles.size, mean=0.449, std=0.226, **options)


def numbers_of(loader):
    return [n for *_, numbers in loader for n in numbers.tolist()]


def copies(batches):
    return [tuple(tensor.clone() for tensor in batch) for batch in batches]


def assert_same(first, second):
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a, b)


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ---------------------------------------------------------------- pixels


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("codec", ["tif", "png"])
def test_evaluation_pixels_are_the_stored_ones(make_shards, tmp_path, codec, dtype):
    tiles = make_shards(tmp_path, (5, 2), codec, dtype)
    seen = 0
    for images, numbers in labelled(tiles):
        assert images.dtype == torch.float32
        for image, number in zip(images[:, 0].double(), numbers.tolist(), strict=True):
            stored = np.rint((image.numpy() * 0.226 + 0.449) * np.iinfo(dtype).max)
            np.testing.assert_array_equal(stored, tiles.pixels[number])
            seen += 1
    assert seen == 7


def test_batches_are_channels_last_without_a_copy(tiles):
    view1, view2, numbers = next(iter(pretrain(tiles)))
    for view in (view1, view2):
        assert view.shape == (4, 1, tiles.size, tiles.size)
        assert view.is_contiguous(memory_format=torch.channels_last)
        assert view.stride() == (tiles.size**2, 1, tiles.size, 1)
    assert numbers.dtype == torch.int64
    assert numbers.shape == (4,)
    assert not torch.equal(view1, view2)


def test_batches_kept_are_not_overwritten(tiles):
    kept, snapshots = [], []
    for batch in pretrain(tiles):
        kept.append(batch)
        snapshots.append(copies([batch])[0])
    assert_same(kept, snapshots)


def test_image_files(film, tmp_path):
    grey16 = np.ascontiguousarray(film[400:448, 500:548])
    grey8 = (grey16 // 256).astype(np.uint8)
    rgb = np.stack([grey8] * 3, axis=-1)
    files = {"a.png": (grey16, "png"), "b.tif": (grey8, "tif"), "c.png": (rgb, None), "d.tif": (film[400:496, 500:596], "tif")}
    for name, (pixels, codec) in files.items():
        data = codecs.encode(pixels, codec) if codec else imagecodecs.png_encode(pixels)
        (tmp_path / name).write_bytes(data)
    paths = [tmp_path / name for name in files]
    images, numbers = next(iter(LabelledLoader(paths, batch_size=8, tile_size=48, mean=0, std=1)))
    assert numbers.tolist() == [0, 1, 2, 3]
    got = np.rint(images[:, 0].double().numpy() * 65535)
    np.testing.assert_array_equal(got[0], grey16)
    np.testing.assert_array_equal(got[1], grey8 * 257.0)
    np.testing.assert_array_equal(got[2], grey8 * 257.0)
    square = film[400:496, 500:596].astype(float)
    assert abs(got[3].mean() - square.mean()) < 0.01 * square.mean()  # resized, not cropped

    subset = LabelledLoader(paths, batch_size=8, tile_size=48, mean=0, std=1, tiles={3, 1})
    assert numbers_of(subset) == [1, 3]
    shuffled = LabelledLoader(paths, batch_size=3, tile_size=48, mean=0, std=1, shuffle=True)
    orders = [numbers_of(shuffled) for _ in range(6)]
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders)
    assert len(set(map(tuple, orders))) > 1
    with pytest.raises(BadInput, match="do not fit the 4 images"):
        LabelledLoader(paths, batch_size=8, tile_size=48, mean=0, std=1, tiles=[4])


# ---------------------------------------------------------------- epochs


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("batch_size", [1, 4, 7, 8, 30])
def test_labelled_gives_every_tile_once_an_epoch(tiles, batch_size, shuffle, world_size):
    loaders = [
        labelled(tiles, batch_size, shuffle=shuffle, rank=rank, world_size=world_size, initial_fill=6)
        for rank in range(world_size)
    ]
    orders = []
    for epoch in range(3):
        order = []
        for loader in loaders:
            assert loader.epoch == epoch
            batches = [numbers.tolist() for _, numbers in loader]
            assert len(batches) == len(loader)
            assert all(len(batch) == batch_size for batch in batches[:-1])
            order += sum(batches, [])
        assert sorted(order) == sorted(tiles.pixels)
        orders.append(order)
    if shuffle:
        assert orders[0] != orders[1]
        assert orders[0] != sorted(orders[0])
    else:
        assert orders[0] == orders[1] == list(tiles.pixels)


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 4), (2, 4), (2, 11), (3, 7)])
def test_pretrain_ranks_share_the_tiles(tiles, world_size, batch_size):
    loaders = [pretrain(tiles, batch_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    for _ in range(3):
        order = []
        for loader in loaders:
            batches = [numbers.tolist() for *_, numbers in loader]
            assert len(batches) == len(loader) == 23 // world_size // batch_size
            assert all(len(batch) == batch_size for batch in batches)
            order += sum(batches, [])
        assert len(order) == len(set(order))
        assert set(order) <= set(tiles.pixels)


def test_ranks_draw_differently(make_shards, tmp_path):
    """Two ranks that read equal tiles give different views."""
    tiles = make_shards(tmp_path, (2,))
    shard = tiles.shards[0]
    pixels = next(iter(tiles.pixels.values()))
    samples = [(f"k{i}", [("tif", codecs.encode(pixels, "tif")), ("num", codecs.encode_number(i))]) for i in range(2)]
    archive.write_archive(shard.tar, samples)
    first, second = (next(iter(pretrain(tiles, 1, rank=rank, world_size=2)))[0] for rank in range(2))
    assert not torch.equal(first, second)


def test_seed_decides_and_threads_do_not(tiles):
    batches = [copies(pretrain(tiles, views=RECIPES["mammo"], num_threads=n, seed=s)) for n, s in ((1, 7), (3, 7), (1, 8))]
    assert_same(batches[0], batches[1])
    assert not torch.equal(batches[0][0][0], batches[2][0][0])


def test_views_differ_between_epochs(tiles):
    loader = pretrain(tiles, 23)
    (first,), (second,) = copies(loader), copies(loader)
    one = dict(zip(first[2].tolist(), first[0], strict=True))
    other = dict(zip(second[2].tolist(), second[0], strict=True))
    assert not any(torch.equal(one[n], other[n]) for n in one)


def test_iterating_again_goes_on_after_a_break(tiles):
    loader, whole = labelled(tiles), numbers_of(labelled(tiles))
    first = [numbers.tolist() for _, (_, numbers) in zip(range(2), loader, strict=False)]
    assert sum(first, []) + numbers_of(loader) == whole
    assert loader.epoch == 1


def test_waiting_is_counted(tiles):
    loader = labelled(tiles)
    assert loader.wait_seconds == 0
    numbers_of(loader)
    assert 0 < loader.wait_seconds < 30


# ---------------------------------------------------------------- resume


@pytest.mark.parametrize("batches", [0, 2, 5])
def test_pretrain_resumes_bit_for_bit(tiles, batches):
    """After an epoch and some batches of the next (5 is the last one), in a fresh loader with another thread count."""
    uninterrupted = pretrain(tiles, seed=1)
    numbers_of(uninterrupted)
    iterator = iter(uninterrupted)
    for _ in range(batches):
        next(iterator)
    state = through_a_file(uninterrupted.state_dict())
    rest = copies(iterator) if batches else copies(uninterrupted)
    rest += copies(uninterrupted)

    resumed = pretrain(tiles, seed=1, num_threads=1)
    resumed.load_state_dict(state)
    assert resumed.epoch == 1
    again = copies(resumed)
    assert len(again) == 5 - batches
    assert resumed.epoch == 2
    assert_same(rest, again + copies(resumed))


def test_resume_with_ranks_and_a_shuffled_labelled_loader(tiles):
    for rank in range(2):
        options = {"view": TRAIN_VIEW, "shuffle": True, "initial_fill": 6, "rank": rank, "world_size": 2}
        loader = labelled(tiles, **options)
        numbers_of(loader)
        state = loader.state_dict()
        rest = copies(loader)
        resumed = labelled(tiles, **options)
        resumed.load_state_dict(state)
        assert_same(rest, copies(resumed))


def test_state_before_the_first_batch(tiles):
    resumed = pretrain(tiles)
    resumed.load_state_dict(through_a_file(pretrain(tiles).state_dict()))
    assert_same(copies(resumed), copies(pretrain(tiles)))


def test_state_is_kept_when_it_was_loaded_but_not_used(tiles):
    loader = pretrain(tiles)
    next(iter(loader))
    resumed = pretrain(tiles)
    resumed.load_state_dict(loader.state_dict())
    assert torch.equal(resumed.state_dict()["pipeline"], loader.state_dict()["pipeline"])


def test_state_of_another_setting_is_refused(tiles):
    with pytest.raises(BadInput, match="batch size 4, this one has 5"):
        pretrain(tiles, 5).load_state_dict(pretrain(tiles, 4).state_dict())
    with pytest.raises(BadInput, match="seed 1, this one has 0.*--seed"):
        pretrain(tiles).load_state_dict(pretrain(tiles, seed=1).state_dict())
    with pytest.raises(BadInput, match="views"):
        pretrain(tiles, views=RECIPES["mammo"]).load_state_dict(pretrain(tiles).state_dict())


def test_damaged_state(tiles):
    loader = pretrain(tiles)
    next(iter(loader))
    resumed = pretrain(tiles)
    resumed.load_state_dict(loader.state_dict() | {"pipeline": torch.zeros(100, dtype=torch.uint8)})
    with pytest.raises(BadInput, match="does not fit this loader"):
        next(iter(resumed))


# ---------------------------------------------------------------- failures


def test_too_few_tiles_for_a_batch(tiles):
    with pytest.raises(BadInput, match="lower --batch-size to 11 or less"):
        pretrain(tiles, 12, world_size=2)


@pytest.mark.parametrize("options", [{"device": "cuda"}, {"rank": 2, "world_size": 2}, {"num_threads": 0}, {"batch_size": 0}])
def test_wrong_settings(tiles, options):
    with pytest.raises(BadInput):
        labelled(tiles, **options)


def test_no_gpu(tiles):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(BadInput, match="--device cpu"):
        labelled(tiles, device="gpu")


@pytest.fixture
def undecodable(make_shards, tmp_path):
    """A shard whose fourth tile is no image; tar and index are sound."""
    tiles = make_shards(tmp_path, (6,))
    (shard,) = tiles.shards
    samples = []
    for i, (number, pixels) in enumerate(tiles.pixels.items()):
        data = b"rubbish" * 20 if i == 3 else codecs.encode(pixels, "tif")
        samples.append((f"k{i}", [("tif", data), ("num", codecs.encode_number(number))]))
    archive.write_archive(shard.tar, samples)
    return tiles


def test_undecodable_tile(undecodable):
    loader = labelled(undecodable, 2)
    batches = iter(loader)
    assert len(next(batches)[1]) == 2
    with pytest.raises(BadInput, match=r"train-000000.tar .*mammostream shards verify"):
        next(batches)
    for again in (lambda: next(iter(loader)), loader.state_dict):
        with pytest.raises(BadInput, match="mammostream shards verify"):
            again()


def test_undecodable_tile_ends_its_process(undecodable):
    """Neither a crash nor a hang, with prefetching threads and the shuffle on."""
    (shard,) = undecodable.shards
    code = f"""
from pathlib import Path
from common.errors import BadInput
from dali_pipelines import PretrainLoader
from shards.reading import Shard
shard = Shard(Path({str(shard.tar)!r}), Path({str(shard.index)!r}), "train", 6)
loader = PretrainLoader([shard], batch_size=2, tile_size={undecodable.size}, mean=0, std=1, initial_fill=4)
try:
    for _ in range(2):
        for batch in loader:
            pass
except BadInput as error:
    raise SystemExit(f"BadInput: {{error}}")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert "BadInput: a tile of" in done.stderr
    assert "Traceback" not in done.stderr


def test_first_tile_undecodable(tmp_path):
    archive.write_archive(tmp_path / "a.tar", [("k", [("tif", b"rubbish"), ("num", codecs.encode_number(0))])])
    with pytest.raises(BadInput, match=r"k.tif of .*a.tar cannot be decoded .*shards verify"):
        LabelledLoader([Shard(tmp_path / "a.tar", tmp_path / "a.idx", "val", 1)], batch_size=1, tile_size=8, mean=0, std=1)


def test_sample_without_an_image(make_shards, tmp_path):
    tiles = make_shards(tmp_path, (2,))
    tif = codecs.encode(next(iter(tiles.pixels.values())), "tif")
    samples = [("a", [("tif", tif), ("num", codecs.encode_number(0))]), ("b", [("num", codecs.encode_number(1))])]
    archive.write_archive(tiles.shards[0].tar, samples)
    with pytest.raises(BadInput, match="train-000000"):
        next(iter(labelled(tiles)))


def test_undecodable_file_is_named(tmp_path):
    for name in "abcd":
        (tmp_path / f"{name}.png").write_bytes(codecs.encode(np.zeros((8, 8), np.uint8), "png"))
    (tmp_path / "c.png").write_bytes(b"rubbish" * 20)
    paths = [tmp_path / f"{name}.png" for name in "abcd"]
    loader = LabelledLoader(paths, batch_size=4, tile_size=8, mean=0, std=1, shuffle=True)
    with pytest.raises(BadInput, match=r"c\.png is no readable image"):
        next(iter(loader))
