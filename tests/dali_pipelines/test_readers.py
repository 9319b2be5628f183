"""Sources: damaged shards are refused before DALI sees them; subsets."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mammostream.common.errors import BadInput
from mammostream.dali_pipelines import LabelledLoader, PretrainLoader
from mammostream.dali_pipelines.readers import open_source, tile_numbers
from mammostream.shards import archive, codecs
from mammostream.shards.archive import read_index, write_index
from mammostream.shards.reading import Shard


def numbers_of(loader):
    return [n for *_, numbers in loader for n in numbers.tolist()]


def load(made, **options):
    return LabelledLoader(made.shards, batch_size=4, tile_size=made.size, mean=0, std=1, **options)


@pytest.fixture
def one(make_shards, tmp_path):
    """A fresh shard of 6 tiles that a test may damage."""
    return make_shards(tmp_path, (6,))


def test_subset_reads_the_tiles_asked_for(tiles):
    everything = list(tiles.pixels)
    wanted = {everything[1], everything[4], everything[-2], everything[-1]}  # none from the middle shard
    loader = load(tiles, tiles=wanted)
    assert loader.tiles == 4
    assert len(loader._source.tars) == 2
    got, numbers = next(iter(loader))
    assert numbers.tolist() == sorted(wanted)
    for tile, number in zip(got[:, 0].numpy(), numbers.tolist(), strict=True):
        np.testing.assert_array_equal(np.rint(tile * 65535.0), tiles.pixels[number])


def test_subset_indexes_are_deleted_with_the_loader(tiles):
    loader = load(tiles, tiles=np.array(list(tiles.pixels)[:3]))
    directory = Path(loader._source.temporary.name)
    assert len(list(directory.iterdir())) == 1
    assert numbers_of(loader) == list(tiles.pixels)[:3]
    del loader
    assert not directory.exists()


def test_numbers_of_an_index_with_gaps(one):
    (shard,) = one.shards
    index = read_index(shard.index)
    everything = list(one.pixels)
    assert tile_numbers(shard.tar, index).tolist() == everything
    write_index(shard.index, index[1:3] + index[4:])
    assert tile_numbers(shard.tar, read_index(shard.index)).tolist() == everything[1:3] + everything[4:]
    assert numbers_of(load(one, tiles=[everything[2], everything[5]])) == [everything[2], everything[5]]


def test_requested_tiles_that_do_not_exist(tiles):
    with pytest.raises(BadInput, match="1 of the 2 tiles wanted are in none of the 3 shards"):
        open_source(tiles.shards, tile_size=tiles.size, tiles=[next(iter(tiles.pixels)), 1])
    with pytest.raises(BadInput, match="no tiles to read"):
        open_source(tiles.shards, tile_size=tiles.size, tiles=[])
    with pytest.raises(BadInput, match="no tiles to read"):
        open_source([], tile_size=tiles.size)


# ---------------------------------------------------------------- damage


def read_twice(tiles):
    """Read two shuffled epochs, as training does."""
    loader = PretrainLoader(tiles.shards, batch_size=2, tile_size=tiles.size, mean=0, std=1, initial_fill=4)
    return [len(numbers_of(loader)) for _ in range(2)]


def cut_tar(tar, index):
    os.truncate(tar, tar.stat().st_size // 2)


def past_the_end(tar, index):
    header, first, *rest = index.read_text().splitlines()
    words = first.split(" ")
    words[1] = str(10**9)
    index.write_text("\n".join([header, " ".join(words), *rest]) + "\n")


def empty_tar(tar, index):
    tar.write_bytes(b"")


def missing_index(tar, index):
    index.unlink()


def missing_tar(tar, index):
    tar.unlink()


def undecodable(tar, index):
    """Overwrite a payload in place; tar and index are unchanged."""
    member = read_index(index)[3][0]
    with tar.open("r+b") as file:
        file.seek(member.offset)
        file.write(b"rubbish" * (member.size // 7))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (cut_tar, "train-000000.tar"),
        (past_the_end, "train-000000.tar"),
        (empty_tar, "train-000000.tar"),
        (missing_index, "train-000000.idx does not exist"),
        (missing_tar, "train-000000.tar does not exist"),
        (undecodable, "tile film%200_y3_"),
    ],
)
def test_damage_ends_the_process_with_one_clear_error(one, in_process, damage, named):
    """In a separate process: exit code 2, no signal and no hang, with prefetching threads and shuffling."""
    (shard,) = one.shards
    assert in_process(read_twice, one)().value == [6, 6]
    damage(shard.tar, shard.index)
    ended = in_process(read_twice, one)()
    assert ended.code == 2
    assert ended.error.startswith(("BadInput: ", "UnreadableTile: "))
    assert named in ended.error
    assert "\n" not in ended.error
    assert "mammostream shards" in ended.error


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["tar", "idx"]), st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=40))
def test_no_damage_crashes_the_process(make_shards, tmp_path, in_process, which, place, rubbish):
    """Random bytes anywhere in tar or index are detected unless they only change pixels, which `shards verify` finds."""
    made = make_shards(tmp_path, (6,))
    path = made.shards[0].tar.with_suffix(f".{which}")
    with path.open("r+b") as file:
        file.seek(int(place * path.stat().st_size))
        file.write(rubbish)
    ended = in_process(read_twice, made)()
    assert ended.code in (0, 2), ended.error


def test_other_tile_size(tiles):
    with pytest.raises(BadInput, match=f"{tiles.size}×{tiles.size} pixels, not 64×64; set --tile-size"):
        open_source(tiles.shards, tile_size=64)


def test_tars_that_are_not_ours(tmp_path):
    archive.write_archive(tmp_path / "a.tar", [("k", [("tif", codecs.encode(np.zeros((8, 8), np.uint8), "tif"))])])
    with pytest.raises(BadInput, match="without .num .*shards build"):
        open_source([Shard(tmp_path / "a.tar", tmp_path / "a.idx", "train", 1)], tile_size=8)


def test_missing_and_empty_images(tmp_path):
    with pytest.raises(BadInput, match="nothing.png does not exist or is empty"):
        open_source([tmp_path / "nothing.png"], tile_size=8)
    (tmp_path / "empty.png").touch()
    with pytest.raises(BadInput, match="empty.png does not exist or is empty"):
        open_source([tmp_path / "empty.png"], tile_size=8)
