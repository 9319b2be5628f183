"""Loaders: exact pixels, every tile once, ranks, resume, failures."""

from __future__ import annotations

import io
import resource
import warnings
from itertools import islice

import imagecodecs
import numpy as np
import pytest
import torch
from batches import assert_same, copies, numbers_of

from mammostream.common.errors import BadInput
from mammostream.dali_pipelines import RECIPES, TRAIN_VIEW, LabelledLoader, PretrainLoader, View
from mammostream.dali_pipelines.readers import DIRECTORY_STRIDE
from mammostream.shards import archive, codecs
from mammostream.shards.reading import Shard


def labelled(tiles, batch_size=4, **options):
    return LabelledLoader(tiles.shards, batch_size=batch_size, tile_size=tiles.size, mean=0.449, std=0.226, **options)


def pretrain(tiles, batch_size=4, **options):
    options = {"initial_fill": 6} | options
    return PretrainLoader(tiles.shards, batch_size=batch_size, tile_size=tiles.size, mean=0.449, std=0.226, **options)


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ---------------------------------------------------------------- pixels


LOSSLESS = [name for name, codec in codecs.CODECS.items() if codec.lossless]


def stored(image, dtype, mean=0.449, std=0.226):
    """Return the stored pixels that a normalised (1, H, W) image came from."""
    return np.rint((image[0].double().numpy() * std + mean) * np.iinfo(dtype).max).astype(dtype)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("codec", LOSSLESS)
def test_every_lossless_codec_is_read_bit_for_bit(make_shards, tmp_path, codec, dtype):
    """Compared by the checksum of each tile in the shards' table, so without any rounding in the test."""
    tiles = make_shards(tmp_path, (5, 2), codec, dtype)
    checksums = {number: codecs.pixel_crc32(pixels) for number, pixels in tiles.pixels.items()}
    seen = {}
    for images, numbers in labelled(tiles):
        assert images.dtype == torch.float32
        for image, number in zip(images, numbers.tolist(), strict=True):
            seen[number] = codecs.pixel_crc32(stored(image, dtype))
            exact = tiles.pixels[number].astype(np.float64) / np.iinfo(dtype).max
            np.testing.assert_allclose(image[0].numpy(), (exact - 0.449) / 0.226, rtol=0, atol=5e-7)
    assert seen == checksums


def test_lossy_jpeg_is_read_as_its_own_decoder_reads_it(make_shards, tmp_path):
    tiles = make_shards(tmp_path, (5,), "jpg", np.uint8)
    for images, numbers in labelled(tiles):
        for image, number in zip(images, numbers.tolist(), strict=True):
            expected = codecs.decode(codecs.encode(tiles.pixels[number], "jpg"), "jpg").astype(int)
            assert np.abs(stored(image, np.uint8).astype(int) - expected).max() <= 1  # decoders round differently


@pytest.mark.parametrize("codec", codecs.CODECS)
def test_every_codec_gives_two_views(make_shards, tmp_path, codec):
    tiles = make_shards(tmp_path, (4,), codec, np.uint8)
    view1, view2, numbers = next(iter(pretrain(tiles)))
    assert sorted(numbers.tolist()) == sorted(tiles.pixels)
    assert view1.isfinite().all()
    assert view2.isfinite().all()


def test_numbers_stay_with_their_tiles(tiles):
    """Shuffled and augmented: a tile that is always mirrored is identified by its pixels."""
    loader = labelled(tiles, view=View(horizontal_flip=1), shuffle=True, initial_fill=6)
    for _ in range(2):
        for images, numbers in loader:
            for image, number in zip(images, numbers.tolist(), strict=True):
                np.testing.assert_array_equal(stored(image, np.uint16)[:, ::-1], tiles.pixels[number])


def test_evaluation_is_the_training_path_without_randomness(tiles):
    (trained,), (evaluated,) = copies(labelled(tiles, 23, view=View())), copies(labelled(tiles, 23))
    assert_same([trained], [evaluated])


@pytest.mark.parametrize("size", [None, 24])
def test_batches_run_channels_last_without_a_copy(tiles, size):
    """The first convolution uses them as they are: torch neither clones nor copies."""
    view1, view2, numbers = next(iter(pretrain(tiles, view_size=size)))
    edge = size or tiles.size
    convolution = torch.nn.Conv2d(1, 8, 7, 2, 3).to(memory_format=torch.channels_last)
    for view in (view1, view2):
        assert view.shape == (4, 1, edge, edge)
        assert view.stride() == (edge**2, 1, edge, 1)
        assert "aten::copy_" not in operations(convolution, view)
        assert convolution(view).is_contiguous(memory_format=torch.channels_last)
    gaps = torch.zeros(4, edge, edge, 2)[..., :1].permute(0, 3, 1, 2)
    assert "aten::copy_" in operations(convolution, gaps)  # what a copy would look like
    assert numbers.dtype == torch.int64
    assert numbers.shape == (4,)
    assert not torch.equal(view1, view2)


def operations(module, batch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, torch.no_grad():
            module(batch)
    return {event.name for event in profile.events()}


def test_half_precision(tiles):
    singles, halves = copies(pretrain(tiles)), copies(pretrain(tiles, dtype="float16"))
    for single, half in zip(singles, halves, strict=True):
        assert half[0].dtype == half[1].dtype == torch.float16
        for view in (0, 1):
            # DALI and torch round ties differently.
            torch.testing.assert_close(half[view].float(), single[view], rtol=1e-3, atol=1e-4)
        assert torch.equal(single[2], half[2])
    with pytest.raises(BadInput, match="'bfloat16' is neither float32 nor float16"):
        pretrain(tiles, dtype="bfloat16")


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


# ---------------------------------------------------------------- several directories


def test_several_directories_read_as_one(make_shards, tmp_path):
    """Their tile numbers are the same, so the directory's position becomes part of the number."""
    first, second = (make_shards(tmp_path / name, (3, 4), seed=seed) for seed, name in enumerate("ab"))
    assert first.pixels.keys() == second.pixels.keys()
    expected = dict(first.pixels) | {DIRECTORY_STRIDE + number: pixels for number, pixels in second.pixels.items()}
    shards = first.shards + second.shards
    options = {"batch_size": 4, "tile_size": first.size, "mean": 0.449, "std": 0.226}
    for shuffle in (False, True):
        seen = []
        for images, numbers in LabelledLoader(shards, shuffle=shuffle, initial_fill=5, **options):
            for image, number in zip(images, numbers.tolist(), strict=True):
                np.testing.assert_array_equal(stored(image, np.uint16), expected[number])
                seen.append(number)
        assert sorted(seen) == sorted(expected)
    assert [divmod(n, DIRECTORY_STRIDE)[0] for n in numbers_of(LabelledLoader(shards, **options))] == [0] * 7 + [1] * 7

    wanted = [list(first.pixels)[1], DIRECTORY_STRIDE + list(second.pixels)[5]]
    assert numbers_of(LabelledLoader(shards, tiles=wanted, **options)) == wanted
    views = PretrainLoader(shards, **options | {"batch_size": 7})
    assert sorted(numbers_of(views)) == sorted(expected)


def test_directories_of_several_codecs(make_shards, tmp_path):
    tif, png, raw, byte = (
        make_shards(tmp_path / str(i), (2,), codec, dtype)
        for i, (codec, dtype) in enumerate([("tif", np.uint16), ("png", np.uint8), ("raw", np.uint16), ("raw", np.uint8)])
    )
    options = {"batch_size": 4, "tile_size": tif.size, "mean": 0, "std": 1}
    assert len(numbers_of(LabelledLoader(tif.shards + png.shards, **options))) == 4
    for mixed in (tif.shards + raw.shards, raw.shards + byte.shards):
        with pytest.raises(BadInput, match="raw tiles cannot be read together"):
            LabelledLoader(mixed, **options)


# ---------------------------------------------------------------- epochs


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("batch_size", [1, 4, 7, 8, 30])
def test_labelled_gives_every_tile_once_per_epoch(tiles, batch_size, shuffle, world_size):
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


def share_of_a_rank(shards, size, rank, store):
    """Return this rank's numbers of two epochs, with the ranks of torch.distributed."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    loader = LabelledLoader(shards, batch_size=4, tile_size=size, mean=0, std=1, shuffle=True, initial_fill=6)
    return numbers_of(loader), numbers_of(loader), loader.tiles


def test_ranks_come_from_torch_distributed(tiles, tmp_path, in_process):
    waits = [in_process(share_of_a_rank, tiles.shards, tiles.size, rank, tmp_path / "store") for rank in range(2)]
    first, second = (wait() for wait in waits)
    assert first.code == second.code == 0
    assert first.value[2] == second.value[2] == 23
    for epoch in (0, 1):
        assert sorted(first.value[epoch] + second.value[epoch]) == sorted(tiles.pixels)


def test_reading_without_memory_maps_gives_the_same(tiles):
    assert_same(copies(pretrain(tiles)), copies(pretrain(tiles, mmap=False)))
    paused, resumed = pretrain(tiles), pretrain(tiles, mmap=False)
    next(iter(paused))
    resumed.load_state_dict(paused.state_dict())
    assert_same(copies(paused), copies(resumed))


def allow_few_files(tiles, soft, hard):
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return len(numbers_of(labelled(tiles, mmap=False)))


def test_shards_held_open_need_a_limit_that_allows_them(tiles, in_process):
    raised = in_process(allow_few_files, tiles, 40, 4096)()
    assert (raised.code, raised.value) == (0, 23)
    refused = in_process(allow_few_files, tiles, 40, 40)()
    assert refused.code == 2
    assert "the system allows 40" in refused.error


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


def test_iterating_again_continues_after_a_break(tiles):
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


def finish_epoch(tiles, state_bytes):
    loader = pretrain(tiles, views=RECIPES["mammo"])
    loader.load_state_dict(torch.load(io.BytesIO(state_bytes), weights_only=True))
    return [[tensor.numpy() for tensor in batch] for batch in loader]


def test_resume_in_a_fresh_process_is_bit_equal(tiles, in_process):
    loader = pretrain(tiles, views=RECIPES["mammo"])
    list(islice(loader, 2))
    file = io.BytesIO()
    torch.save(loader.state_dict(), file)
    ended = in_process(finish_epoch, tiles, file.getvalue())()
    assert ended.code == 0
    assert_same(copies(loader), [[torch.from_numpy(array) for array in batch] for batch in ended.value])


def test_another_number_of_processes_restarts_the_epoch_with_a_warning(tiles):
    loader = pretrain(tiles)
    numbers_of(loader)
    list(islice(loader, 2))
    state = through_a_file(loader.state_dict())
    moved = [pretrain(tiles, 3, rank=rank, world_size=2, initial_fill=4) for rank in range(2)]
    for one in moved:
        with pytest.warns(UserWarning, match="saved by 1 processes but is loaded by 2: epoch 2 restarts .*2 of its"):
            one.load_state_dict(state)
        assert one.epoch == 1
    shares = [numbers_of(one) for one in moved]
    assert len(shares[0]) == len(shares[1]) == 9
    assert len(set(shares[0] + shares[1])) == 18
    # Neither the order nor the draws of the first epoch are repeated.
    fresh = pretrain(tiles, 3, rank=0, world_size=2, initial_fill=4)
    assert numbers_of(fresh) != shares[0]

    again = pretrain(tiles, 3, rank=0, world_size=2, initial_fill=4)
    again.load_state_dict(through_a_file(moved[0].state_dict()))
    assert again.epoch == 2
    assert_same(copies(again), copies(moved[0]))


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
    for other in ({"views": RECIPES["mammo"]}, {"view_size": 24}, {"dtype": "float16"}):
        with pytest.raises(BadInput, match="views"):
            pretrain(tiles, **other).load_state_dict(pretrain(tiles).state_dict())
    with pytest.raises(BadInput, match="initial fill 6, this one has 7"):
        pretrain(tiles, initial_fill=7).load_state_dict(pretrain(tiles).state_dict())


def test_a_state_of_a_version_that_did_not_read_headers_first_goes_on_bit_for_bit(tiles):
    """DALI's checkpoint names the operators, so such a run keeps its graph; a new epoch order starts with the new one."""
    older = pretrain(tiles, views=RECIPES["mammo"])
    older._checked = False
    expected = copies(pretrain(tiles, views=RECIPES["mammo"]))
    first = [tuple(tensor.clone() for tensor in batch) for batch in islice(older, 2)]
    state = through_a_file(older.state_dict())
    del state["checked"]
    resumed = pretrain(tiles, views=RECIPES["mammo"])
    resumed.load_state_dict(state)
    assert_same([*first, *copies(resumed)], expected)
    assert not resumed.state_dict()["checked"]


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


def with_bad_tile(make_shards, directory, codec, damage):
    """A shard whose fourth of six tiles is damaged; tar and index are intact."""
    tiles = make_shards(directory, (6,), codec)
    samples = []
    for i, (number, pixels) in enumerate(tiles.pixels.items()):
        data = codecs.encode(pixels, codec)
        samples.append((f"k{i}", [(codec, damage(data) if i == 3 else data), ("num", codecs.encode_number(number))]))
    archive.write_archive(tiles.shards[0].tar, samples)
    return tiles


DAMAGES = {"rubbish": lambda data: b"rubbish" * 20, "cut": lambda data: data[: len(data) // 2], "zeros": lambda data: bytes(90)}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("codec", ["tif", "png", "jhc"])
def test_a_bad_tile_is_named_with_its_shard_and_how_to_fix_it(make_shards, tmp_path, codec, damage):
    bad = with_bad_tile(make_shards, tmp_path, codec, DAMAGES[damage])
    loader = labelled(bad, 2)
    batches = iter(loader)
    assert len(next(batches)[1]) == 2
    message = rf"tile k3 of shard {bad.shards[0].tar} cannot .*'mammostream shards verify --quarantine {tmp_path}'"
    with pytest.raises(BadInput, match=message):
        next(batches)
    for again in (lambda: next(iter(loader)), loader.state_dict):
        with pytest.raises(BadInput, match="tile k3"):
            again()
    shuffled = labelled(bad, 1, shuffle=True, initial_fill=4)
    with pytest.raises(BadInput, match=message):
        numbers_of(shuffled)


def read_with_rubbish(tiles, codec):
    """Read two batches of 64 tiles of which the first 20 are rubbish; return the error."""
    samples = []
    for i, (number, pixels) in enumerate(tiles.pixels.items()):
        data = codecs.encode(pixels, codec)
        samples.append((f"k{i}", [(codec, bytes(len(data)) if 0 < i < 20 else data), ("num", codecs.encode_number(number))]))
    archive.write_archive(tiles.shards[0].tar, samples)
    with pytest.raises(BadInput) as caught:
        numbers_of(labelled(tiles, 64))
    return str(caught.value)


@pytest.mark.parametrize("codec", ["tif", "png"])
def test_rubbish_in_a_large_batch_is_an_error_and_does_not_end_the_process(make_shards, tmp_path, in_process, codec):
    tiles = make_shards(tmp_path, (128,), codec)
    for _ in range(3):  # it is a race in DALI
        ended = in_process(read_with_rubbish, tiles, codec)()
        assert ended.code == 0
        assert "cannot be decoded" in ended.value


def test_a_bad_tile_among_several_shards_and_directories(make_shards, tmp_path):
    sound = make_shards(tmp_path / "sound", (5, 4))
    bad = with_bad_tile(make_shards, tmp_path / "bad", "tif", DAMAGES["rubbish"])
    options = {"batch_size": 3, "tile_size": bad.size, "mean": 0, "std": 1}
    for only in (None, [n + DIRECTORY_STRIDE for n in list(bad.pixels)[2:5]]):
        with pytest.raises(BadInput, match="tile k3 of shard .*/bad/train-000000.tar"):
            numbers_of(LabelledLoader(sound.shards + bad.shards, tiles=only, **options))


@pytest.mark.parametrize("damage", [b"", b"\0" * 100], ids=["empty", "short"])
def test_a_raw_tile_of_another_size_is_found_before_the_start(make_shards, tmp_path, damage):
    bad = with_bad_tile(make_shards, tmp_path, "raw", lambda data: damage)
    with pytest.raises(BadInput, match=rf"k3.raw of shard .* has {len(damage)} bytes.*--quarantine {tmp_path}"):
        labelled(bad)


def test_first_tile_undecodable(tmp_path):
    archive.write_archive(tmp_path / "a.tar", [("k", [("tif", b"rubbish"), ("num", codecs.encode_number(0))])])
    with pytest.raises(BadInput, match=r"tile k of shard .*a.tar cannot be decoded .*shards verify"):
        LabelledLoader([Shard(tmp_path / "a.tar", tmp_path / "a.idx", "val", 1)], batch_size=1, tile_size=8, mean=0, std=1)


def test_sample_without_an_image(make_shards, tmp_path):
    tiles = make_shards(tmp_path, (2,))
    tif = codecs.encode(next(iter(tiles.pixels.values())), "tif")
    samples = [("a", [("tif", tif), ("num", codecs.encode_number(0))]), ("b", [("num", codecs.encode_number(1))])]
    archive.write_archive(tiles.shards[0].tar, samples)
    with pytest.raises(BadInput, match=r"train-000000.tar has a sample without .tif"):
        labelled(tiles)


def test_undecodable_file_is_named(tmp_path):
    for name in "abcd":
        (tmp_path / f"{name}.png").write_bytes(codecs.encode(np.zeros((8, 8), np.uint8), "png"))
    (tmp_path / "c.png").write_bytes(b"rubbish" * 20)
    paths = [tmp_path / f"{name}.png" for name in "abcd"]
    loader = LabelledLoader(paths, batch_size=4, tile_size=8, mean=0, std=1, shuffle=True)
    with pytest.raises(BadInput, match=r"c\.png is not a readable image"):
        next(iter(loader))
