"""Epochs that repeat some tiles and leave out others: what is read, by whom, in which order, and from where it goes on."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from batches import assert_same, copies, numbers_of

from mammostream.dali_pipelines import TRAIN_VIEW, LabelledLoader, draws
from mammostream.dali_pipelines.draws import drawn_source
from mammostream.dali_pipelines.readers import DIRECTORY_STRIDE, open_source
from mammostream.shards import codecs
from mammostream.shards.archive import read_index

ALL = 23


class Drawing:
    """Draws from some tiles with repetition, other ones each epoch; remembers what it was asked for."""

    def __init__(self, numbers) -> None:
        self.numbers, self.asked = np.array(sorted(numbers)), []

    def __call__(self, epoch: int) -> np.ndarray:
        self.asked.append(epoch)
        return np.random.default_rng([5, epoch]).choice(self.numbers, len(self.numbers))


def loader_of(tiles, draw, chosen=None, batch_size=4, **options):
    options = {"shuffle": True, "initial_fill": 6, "view": TRAIN_VIEW} | options
    chosen = list(tiles.pixels) if chosen is None else chosen
    normal = {"tile_size": tiles.size, "mean": 0.449, "std": 0.226}
    return LabelledLoader(tiles.shards, batch_size=batch_size, tiles=chosen, draw=draw, **normal, **options)


def test_an_epoch_reads_what_is_drawn_for_it(tiles):
    """All tiles, and a choice of tiles of which one shard holds none; the pixels are those of the number."""
    for chosen in (list(tiles.pixels), [n for n in tiles.pixels if n // 2**20 != 5][1::2]):
        draw = Drawing(chosen)
        loader = loader_of(tiles, draw, chosen, view=None)
        orders = []
        for epoch in range(3):
            order = []
            for images, numbers in loader:
                for image, number in zip(images, numbers.tolist(), strict=True):
                    exact = tiles.pixels[number].astype(np.float64) / 65535
                    np.testing.assert_allclose(image[0].numpy(), (exact - 0.449) / 0.226, rtol=0, atol=5e-7)
                    order.append(number)
            assert Counter(order) == Counter(draw(epoch).tolist())
            orders.append(order)
        assert max(Counter(orders[0]).values()) > 1
        assert loader.epoch == 3
        assert orders[0] != orders[1]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_draws(tiles, world_size):
    """Each draw is read by one rank: together they read what one alone does, in as many batches as without draws."""
    draw = Drawing(tiles.pixels)
    loaders = [loader_of(tiles, draw, rank=rank, world_size=world_size) for rank in range(world_size)]
    plain = [loader_of(tiles, None, rank=rank, world_size=world_size) for rank in range(world_size)]
    for epoch in range(2):
        shares = [numbers_of(one) for one in loaders]
        assert Counter(sum(shares, [])) == Counter(draw(epoch).tolist())
        assert [len(share) for share in shares] == [len(numbers_of(one)) for one in plain]
        assert [len(one) for one in loaders] == [len(one) for one in plain]


@pytest.mark.parametrize("batches", [0, 1, 5, 6])
def test_it_resumes_bit_for_bit(tiles, batches):
    """Between epochs, within one and after its last batch (6), in a loader of its own with other threads."""
    for rank, world_size in ((0, 1), (1, 2)):
        options = {"rank": rank, "world_size": world_size, "batch_size": 4 // world_size}
        uninterrupted = loader_of(tiles, Drawing(tiles.pixels), **options)
        numbers_of(uninterrupted)
        iterator = iter(uninterrupted)
        kept = list(islice(iterator, batches))
        state = uninterrupted.state_dict()
        rest = copies(iterator) if batches else copies(uninterrupted)
        rest += copies(uninterrupted)
        draw = Drawing(tiles.pixels)
        resumed = loader_of(tiles, draw, num_threads=1, **options)
        resumed.load_state_dict(state)
        again = copies(resumed)
        again += copies(resumed)
        if batches != 6:
            assert len(again) + len(kept) == 12
            assert draw.asked == [1, 2]
        assert_same(rest, again)


def test_the_same_seed_gives_the_same_order_and_another_one_another(tiles):
    one, same, other = (numbers_of(loader_of(tiles, Drawing(tiles.pixels), seed=seed)) for seed in (1, 1, 2))
    assert one == same != other
    assert Counter(one) == Counter(other)  # the draws are not the loader's


def test_batches_outlive_the_epoch_that_read_them(tiles):
    """The pipeline of an epoch goes with it; its batches do not."""
    loader = loader_of(tiles, Drawing(tiles.pixels))
    kept = [batch for _ in range(2) for batch in loader]
    assert_same(kept, copies(kept))
    again = loader_of(tiles, Drawing(tiles.pixels))
    assert_same(kept, [batch for _ in range(2) for batch in copies(again)])


def test_copies_of_a_tile_spread_over_the_epoch(tiles, monkeypatch):
    """Each part of the draws has indexes of its own, which the reader shuffles."""
    monkeypatch.setattr(draws, "_LEAST_PER_PART", 4)
    monkeypatch.setattr(draws, "_PER_INDEX", 1)
    drawn = np.resize([min(tiles.pixels), max(tiles.pixels)], ALL)
    source = open_source(tiles.shards, tile_size=tiles.size, tiles=tiles.pixels)
    parts = drawn_source(source, drawn)
    assert len(parts.tars) == 2 * (ALL // 4)
    assert sum(len(read_index(Path(index))) for index in parts.indexes) == parts.count == ALL
    order = numbers_of(loader_of(tiles, lambda epoch: drawn, initial_fill=1))
    assert Counter(order) == Counter(drawn.tolist())
    runs = 1 + np.count_nonzero(np.diff(order))
    assert runs > 2  # two indexes would give two runs


def test_files_and_several_directories(make_shards, tmp_path):
    first, second = (make_shards(tmp_path / name, (3, 4), seed=seed) for seed, name in enumerate("ab"))
    pixels = first.pixels | {DIRECTORY_STRIDE + number: tile for number, tile in second.pixels.items()}
    draw, normal = Drawing(pixels), {"batch_size": 4, "tile_size": first.size, "mean": 0, "std": 1}
    loader = LabelledLoader(first.shards + second.shards, shuffle=True, tiles=list(pixels), draw=draw, **normal)
    paths = []
    for number, tile in first.pixels.items():
        paths.append(tmp_path / f"{number}.png")
        paths[-1].write_bytes(codecs.encode(tile, "png"))
    positions = [0, 2, 3, 6]
    of_files = Drawing(positions)
    files = LabelledLoader(paths, shuffle=True, tiles=positions, draw=of_files, **normal)
    tile_of_file = dict(enumerate(first.pixels.values()))
    for epoch in range(2):
        for each, drawing, expected in ((loader, draw, pixels), (files, of_files, tile_of_file)):
            seen = []
            for images, numbers in each:
                for image, number in zip(images, numbers.tolist(), strict=True):
                    np.testing.assert_array_equal(np.rint(image[0].double().numpy() * 65535), expected[number])
                    seen.append(number)
            assert Counter(seen) == Counter(drawing(epoch).tolist())


def test_a_damaged_tile_is_named(make_shards, tmp_path):
    tiles = make_shards(tmp_path, (5, 4))
    shard = tiles.shards[1]
    sample = read_index(shard.index)[2]
    with shard.tar.open("r+b") as file:
        file.seek(sample[0].offset)
        file.write(bytes(sample[0].size))
    loader = loader_of(tiles, lambda epoch: np.full(9, max(tiles.pixels) - 1))
    with pytest.raises(Exception, match=f"tile {sample[0].name.partition('.')[0]} of shard {shard.tar} cannot be decoded"):
        numbers_of(loader)


def test_draws_that_do_not_fit_are_a_fault_of_the_caller(tiles):
    with pytest.raises(ValueError, match="22 draws for 23 tiles"):
        numbers_of(loader_of(tiles, lambda epoch: np.array(list(tiles.pixels))[1:]))
    with pytest.raises(ValueError, match="tile 7 is not in the source"):
        numbers_of(loader_of(tiles, lambda epoch: np.full(ALL, 7)))
    with pytest.raises(ValueError, match="a choice of tiles, a shuffle and memory maps"):
        loader_of(tiles, Drawing(tiles.pixels), shuffle=False)
