"""Verify names every damage: a flipped byte anywhere, a cut or missing file, a damaged index or table."""

from __future__ import annotations

import numpy as np
import pytest

from shards.archive import read_index
from shards.verify import verify_shards


def flip(path, position, bits=0x01):
    data = bytearray(path.read_bytes())
    data[position] ^= bits
    path.write_bytes(data)


@pytest.fixture
def shard(copied):
    """The first shard of a copy that may be damaged."""
    return copied.shards()[0]


def test_a_good_directory_has_no_faults(built):
    assert verify_shards(built.shards) == []


@pytest.mark.parametrize("seed", range(12))
def test_a_flipped_byte_of_a_tile_names_its_sample(copied, seed):
    rng = np.random.default_rng(seed)
    shards = copied.shards()
    shard = shards[rng.integers(len(shards))]
    index = read_index(shard.index)
    sample = index[rng.integers(len(index))]
    image = sample[0]
    assert image.extension == "tif"
    # The ends of the payload are what a careless check would miss.
    position = {0: 0, 1: image.size - 1}.get(seed, int(rng.integers(image.size)))
    flip(shard.tar, image.offset + position, 1 << rng.integers(8))
    faults = verify_shards(copied)
    key = image.name.partition(".")[0]
    assert len(faults) == 1
    assert shard.tar.stem in faults[0]
    assert f"sample {key}:" in faults[0]


def test_a_flipped_byte_of_a_number_names_its_sample(copied, shard):
    for position in range(8):
        member = read_index(shard.index)[position][1]
        flip(shard.tar, member.offset + position)
    faults = verify_shards(copied)
    assert len(faults) == 8
    assert all("tile number differs" in fault for fault in faults)


def test_two_damaged_samples_are_both_named(copied, shard):
    index = read_index(shard.index)
    for sample in (index[1], index[-1]):
        flip(shard.tar, sample[0].offset + 10)
    faults = verify_shards(copied)
    assert [f"sample {s[0].name.partition('.')[0]}:" in f for s, f in zip((index[1], index[-1]), faults, strict=True)] == [
        True
    ] * 2


@pytest.mark.parametrize("seed", range(6))
def test_a_flipped_byte_anywhere_in_a_tar_is_seen(copied, shard, seed):
    size = shard.tar.stat().st_size
    flip(shard.tar, {0: 0, 1: size - 1}.get(seed, int(np.random.default_rng(seed).integers(size))))
    faults = verify_shards(copied)
    assert len(faults) == 1
    assert shard.tar.stem in faults[0]


def test_pixels_are_checked_even_where_the_bytes_pass(copied, shard):
    """Another tile's payload with a right CRC of its bytes, as a broken encoder would write it."""
    from shards.tables import read_shard_table, write_shard_table

    table = shard.tar.with_suffix(".parquet")
    tiles, images, metadata = read_shard_table(table)
    rows = tiles.to_pylist()
    rows[3]["crc32"] ^= 1
    write_shard_table(table, rows, images.to_pylist(), metadata)
    (fault,) = verify_shards(copied)
    assert f"sample {rows[3]['key']}: its pixels changed" in fault


def test_truncated_tar(copied, shard):
    shard.tar.write_bytes(shard.tar.read_bytes()[:-20_000])
    (fault,) = verify_shards(copied)
    assert shard.tar.name in fault
    assert "cut short" in fault


@pytest.mark.parametrize("suffix", [".tar", ".idx", ".parquet"])
def test_missing_file(copied, shard, suffix):
    shard.tar.with_suffix(suffix).unlink()
    (fault,) = verify_shards(copied)
    assert shard.tar.stem in fault


def test_every_damaged_index_is_named_and_none_ends_the_check(copied, shard):
    whole = shard.index.read_bytes()
    number_size = whole.index(b" 8 ") + 1
    # The header with its count, the size of a tile number, and bytes anywhere; bit 6 makes letters of digits.
    places = [*range(8), number_size, *np.random.default_rng(0).integers(len(whole), size=8).tolist()]
    for n, position in enumerate(places):
        shard.index.write_bytes(whole)
        flip(shard.index, position, 0x01 if n % 2 == 0 else 0x40)
        faults = verify_shards(copied)
        assert faults, position
        assert all(fault.startswith(f"{shard.tar.stem}: ") for fault in faults)


def test_index_of_fewer_samples(copied, shard):
    lines = shard.index.read_text().splitlines()
    count = len(lines) - 1
    shard.index.write_text("\n".join([f"v1.2 {count - 1}", *lines[1:-1]]) + "\n")
    faults = verify_shards(copied)
    assert any(f"the index has {count - 1} samples, the table {count} tiles" in fault for fault in faults)


def test_swapped_samples_of_an_index(copied, shard):
    lines = shard.index.read_text().splitlines()
    lines[1], lines[2] = lines[2], lines[1]
    shard.index.write_text("\n".join(lines) + "\n")
    faults = verify_shards(copied)
    assert "is not the index that was written" in faults[0]
    assert sum("in its place" in fault for fault in faults) == 2


def test_damaged_table(copied, shard):
    table = shard.tar.with_suffix(".parquet")
    whole = table.read_bytes()
    for data in (b"", b"PAR1 no table", whole[: len(whole) // 2]):
        table.write_bytes(data)
        (fault,) = verify_shards(copied)
        assert "is no shard table" in fault
        assert "\n" not in fault


def test_shard_of_another_build(copied, shard, build_at, tmp_path):
    other = build_at(tmp_path / "other", stride=64)
    for suffix in (".tar", ".idx", ".parquet"):
        shard.tar.with_suffix(suffix).write_bytes((other.shards.directory / f"{shard.tar.stem}{suffix}").read_bytes())
    (fault,) = verify_shards(copied)
    assert "other options" in fault
