"""Verify names every damage: a flipped byte anywhere, a cut or missing file, a damaged index or table."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mammostream.common.errors import BadInput
from mammostream.shards.archive import read_index
from mammostream.shards.build import leave_out, verify
from mammostream.shards.build.launch import Launcher
from mammostream.shards.build.verify import quarantine
from mammostream.shards.reading import open_shards
from mammostream.shards.tables import read_shard_table, write_shard_table


def verify_shards(shards, **options):
    """Return the faults in words."""
    return [str(fault) for fault in verify.verify_shards(shards, **options)]


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
    table = shard.tar.with_suffix(".parquet")
    tiles, images, metadata = read_shard_table(table)
    rows = tiles.to_pylist()
    rows[3]["crc32"] ^= 1
    write_shard_table(table, rows, images.to_pylist(), metadata)
    merged, fault = verify_shards(copied)
    assert "tiles.parquet says otherwise" in merged
    assert f"sample {rows[3]['key']}: its pixels changed" in fault
    assert verify_shards(copied, decoding=False) == [merged]


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
    assert "is not the index that was written" in faults[0]
    assert "the index does not have it" in faults[1]
    assert len(faults) == 2


def test_swapped_samples_of_an_index(copied, shard):
    lines = shard.index.read_text().splitlines()
    lines[1], lines[2] = lines[2], lines[1]
    shard.index.write_text("\n".join(lines) + "\n")
    (fault,) = verify_shards(copied)  # any order is a right index of the tar, but this one was not written
    assert "is not the index that was written" in fault


def test_an_entry_that_points_elsewhere(copied, shard):
    """To another tile's place, and with that tile's size: only the tar's own header tells."""
    lines = shard.index.read_text().splitlines()
    words, others = lines[1].split(" "), lines[2].split(" ")
    words[1:3] = others[1:3]
    lines[1] = " ".join(words)
    shard.index.write_text("\n".join(lines) + "\n")
    faults = verify_shards(copied)
    assert len(faults) == 2
    assert f"the tar does not have {words[3]} where the index says" in faults[1]


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
    faults = verify_shards(copied)
    assert faults[0].startswith(f"{shard.tar.stem}: was built with other options")
    assert all(shard.tar.stem in fault for fault in faults)


@pytest.mark.parametrize("name", ["tiles.parquet", "images.parquet"])
@pytest.mark.parametrize("how", ["missing", "damaged", "fewer rows", "another value"])
def test_merged_tables_are_compared_with_the_shards_own(copied, name, how):
    path = copied.directory / name
    table = pq.read_table(path)
    if how == "missing":
        path.unlink()
    elif how == "damaged":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "fewer rows":
        pq.write_table(table.slice(0, len(table) - 1), path)
    else:
        column = "x" if name == "tiles.parquet" else "kept"
        values = table.column(column).to_pylist()
        values[3] += 1
        place = table.schema.get_field_index(column)
        pq.write_table(
            table.set_column(place, table.schema.field(place), pa.array(values, pa.int32())), path, row_group_size=33
        )
    faults = verify_shards(copied)
    assert faults
    assert any(name in fault for fault in faults)


def test_shards_json_is_compared_with_the_shards_own(copied):
    path = copied.directory / "shards.json"
    meta = json.loads(path.read_text())
    meta["shards"][1]["tar_sha256"] = meta["shards"][0]["tar_sha256"]
    path.write_text(json.dumps(meta))
    (fault,) = verify_shards(open_shards(copied.directory))
    assert fault.startswith("train-000001: shards.json disagrees")


@pytest.mark.parametrize("place", [("preprocessing", "frame"), ("recipe", "options", "max_pectoral_ratio"), ("recipe",)])
def test_shards_json_says_of_all_shards_what_they_say(copied, place):
    path = copied.directory / "shards.json"
    meta = json.loads(path.read_text())
    *outer, last = place
    holder = meta
    for name in outer:
        holder = holder[name]
    del holder[last]
    path.write_text(json.dumps(meta))
    (fault,) = verify_shards(open_shards(copied.directory))
    assert fault == f"shards.json: says otherwise than the shards' own tables of: {place[0]}"


@pytest.mark.parametrize("name", ["tiles.parquet", "images.parquet", "train-000000.parquet"])
@pytest.mark.parametrize("how", ["text", "order"])
def test_columns_of_another_type_or_order_are_seen(copied, name, how):
    path = copied.directory / name
    table = pq.read_table(path)
    if how == "text":
        column = "kept" if name == "images.parquet" else "x"
        place = table.schema.get_field_index(column)
        table = table.set_column(place, column, table.column(column).cast(pa.string()))
    else:
        table = table.select([*table.column_names[1:], table.column_names[0]])
    pq.write_table(table, path)
    (fault,) = verify_shards(copied)
    assert "other columns" in fault
    assert path.stem in fault


def test_something_in_a_cell_that_is_empty_is_seen(copied, shard):
    path = shard.tar.with_suffix(".parquet")
    table = pq.read_table(path)
    place = table.schema.get_field_index("segmentation")
    values = table.column("segmentation").to_pylist()
    assert table.column("row")[0].as_py() == "tile"
    values[0] = "a tile has none"
    pq.write_table(table.set_column(place, table.schema.field(place), pa.array(values, pa.string())), path)
    (fault,) = verify_shards(copied)
    assert "cells that are empty" in fault


def test_two_workers_find_the_same(copied):
    for shard in copied.shards()[1:3]:
        flip(shard.tar, read_index(shard.index)[5][0].offset + 20)
    alone = verify_shards(copied)
    assert len(alone) == 2
    assert verify_shards(copied, launcher=Launcher(workers=2)) == alone


def test_a_stopped_check_goes_on(copied, monkeypatch):
    """Stopped after two shards; the second of them is damaged, and the first changes before the check continues."""
    shards = copied.shards()
    flip(shards[1].tar, read_index(shards[1].index)[5][0].offset + 20)
    checked = []
    real = verify._check_shard

    def check(job):
        if len(checked) == 2:
            raise KeyboardInterrupt
        checked.append(job.shard["name"])
        return real(job)

    monkeypatch.setattr(verify, "_check_shard", check)
    with pytest.raises(KeyboardInterrupt):
        verify_shards(copied)
    record = copied.directory / ".verify.jsonl"
    record.write_text(record.read_text() + '{"shard": "val-0000')  # as a power cut leaves it
    flip(shards[0].tar, read_index(shards[0].index)[3][0].offset + 20)
    monkeypatch.setattr(verify, "_check_shard", lambda job: checked.append(job.shard["name"]) or real(job))
    faults = verify_shards(copied)
    assert checked == ["train-000000", "train-000001", "train-000000", "val-000000", "val-000001"]
    assert [fault.partition(":")[0] for fault in faults] == ["train-000000", "train-000001"]
    assert not record.exists()
    checked.clear()
    verify_shards(copied)
    assert len(checked) == 4  # a finished check is no excuse not to look again


def test_a_check_without_decoding_does_not_stand_for_one_with(copied, monkeypatch):
    real = verify._check_shard
    jobs = []

    def check(job):
        jobs.append(job)
        if len(jobs) == 2:
            raise KeyboardInterrupt
        return real(job)

    monkeypatch.setattr(verify, "_check_shard", check)
    with pytest.raises(KeyboardInterrupt):
        verify_shards(copied, decoding=False)
    verify_shards(copied)
    assert [job.decoding for job in jobs] == [False, False] + [True] * 4


def read_by_dali(shards):
    """Return the numbers of the tiles that a loader reads."""
    from mammostream.dali_pipelines import LabelledLoader

    size = shards.preprocessing["tile_size"]
    loader = LabelledLoader(shards.shards(), batch_size=16, tile_size=size, mean=0.5, std=0.5, view=None)
    return [number for _, numbers in loader for number in numbers.tolist()]


def test_quarantine_leaves_whole_samples(copied, built):
    first, second = copied.shards()[:2]
    bad = [read_index(first.index)[i] for i in (0, 4, 5)] + [read_index(second.index)[-1]]
    for sample in bad[:3]:
        flip(first.tar, sample[0].offset + 10)
    second.tar.write_bytes(second.tar.read_bytes()[: bad[3][0].offset + 100])  # cut in the last tile
    before = {path: path.read_bytes() for path in (first.tar, second.tar)}
    left_out = quarantine(copied, verify.verify_shards(copied))
    keys = {sample[0].name.partition(".")[0] for sample in bad}
    assert {fault.key for fault in left_out} == keys
    assert {path: path.read_bytes() for path in before} == before
    mended = open_shards(copied.directory)
    assert verify_shards(mended) == []
    expected = built.shards.tiles()
    expected = expected[~expected["key"].isin(keys)].reset_index(drop=True)
    pd.testing.assert_frame_equal(mended.tiles(), expected)
    assert sorted(read_by_dali(mended)) == expected["tile"].tolist()
    images = mended.images().set_index("image_id")["flags"]
    films = set(built.shards.tiles().set_index("key").loc[list(keys), "image_id"])
    assert set(images.index[images.str.contains("quarantined")]) == films
    assert [entry["quarantined"] for entry in mended.meta["shards"]] == [3, 1, 0, 0]
    assert quarantine(mended, []) == []


def test_quarantine_of_a_directory_without_faults_of_samples_changes_no_shard(copied, contents):
    before = contents(copied.directory)
    (copied.directory / "images.parquet").unlink()
    assert quarantine(copied, verify.verify_shards(copied)) == []
    assert contents(copied.directory) == before


@pytest.mark.parametrize("damage", ["missing", "cut", "garbled"])
def test_quarantine_makes_a_damaged_index_anew(copied, shard, built, damage):
    whole = shard.index.read_bytes()
    if damage == "missing":
        shard.index.unlink()
    else:
        shard.index.write_bytes(whole[: len(whole) // 2] if damage == "cut" else whole.replace(b"tif", b"gif", 3))
    assert quarantine(copied, verify.verify_shards(copied)) == []
    assert shard.index.read_bytes() == whole
    assert verify_shards(open_shards(copied.directory)) == []


def test_quarantine_of_a_missing_tar_leaves_the_other_shards(copied, shard):
    shard.tar.unlink()
    left_out = quarantine(copied, verify.verify_shards(copied))
    assert len(left_out) == shard.tiles
    mended = open_shards(copied.directory)
    assert verify_shards(mended) == []
    assert [s.tar.name for s in mended.shards()] == ["train-000001.tar", "val-000000.tar", "val-000001.tar"]
    assert sorted(read_by_dali(mended)) == mended.tiles()["tile"].tolist()


def test_quarantine_cannot_do_without_a_shards_table(copied, shard, contents):
    flip(copied.shards()[1].tar, 5000)
    shard.tar.with_suffix(".parquet").write_bytes(b"nothing")
    before = contents(copied.directory)
    with pytest.raises(BadInput, match="train-000000.parquet is no shard table"):
        quarantine(copied, verify.verify_shards(copied))
    assert contents(copied.directory) == before


def test_a_quarantine_killed_half_way_is_done_by_the_next(copied, shard, monkeypatch):
    sample = read_index(shard.index)[2]
    flip(shard.tar, sample[0].offset + 10)
    faults = verify.verify_shards(copied)

    def killed(*_, **__):
        raise KeyboardInterrupt

    # Right after the index was written; after the shard's own table was.
    for module, name in ((leave_out, "write_shard_table"), (verify, "merge_tables")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, killed)
            with pytest.raises(KeyboardInterrupt):
                quarantine(copied, faults)
    quarantine(copied, verify.verify_shards(copied))
    mended = open_shards(copied.directory)
    assert verify_shards(mended) == []
    assert len(read_index(shard.index)) == shard.tiles - 1
