"""Packing tile images into shards, and unpacking: the same pixels, keys and labels; what does not fit is told."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from mammostream.common.errors import BadInput
from mammostream.shards.build.build import build_all
from mammostream.shards.build.launch import Launcher
from mammostream.shards.build.merge import finish
from mammostream.shards.build.pack import make_pack_plan, pack_shard, read_tile_csvs, unpack_shards, write_packed_csvs
from mammostream.shards.build.plan import PackConfig
from mammostream.shards.build.verify import verify_shards
from mammostream.shards.reading import check_same_pixels, open_shards


def pack(csvs, tiles_dir, output_dir, splits=(), workers=1, **options):
    tiles = read_tile_csvs(csvs, splits, tiles_dir)
    plan = make_pack_plan(tiles, tiles_dir, output_dir, PackConfig(**options))
    build_all(plan, Launcher(workers), build=pack_shard)
    finish(output_dir)
    return open_shards(output_dir), tiles


@pytest.fixture(scope="session")
def unpacked(built, tmp_path_factory):
    """The small films' tiles as PNG files with their CSV."""
    folder = tmp_path_factory.mktemp("unpacked")
    assert unpack_shards(built.shards, folder) == len(built.shards.tiles())
    return folder


def test_unpacked_tiles_are_the_shards_pixels(built, unpacked):
    from mammostream.shards.codecs import pixel_crc32

    tiles = built.shards.tiles()
    table = pd.read_csv(unpacked / "tiles.csv")
    assert table["tile_path"].tolist() == [f"{key}.png" for key in tiles["key"]]
    for name in ("image_id", "patient_id", "split", "x", "y", "size"):
        assert table[name].tolist() == tiles[name].tolist()
    for name, crc in zip(table["tile_path"], tiles["crc32"], strict=True):
        with Image.open(unpacked / name) as image:
            assert pixel_crc32(np.asarray(image).astype(np.uint16)) == crc


def test_tiles_of_8_bits_are_what_other_programs_can_read(built, unpacked, tmp_path):
    """PIL's convert('RGB'), as in the guide, clips 16-bit tiles to white."""
    folder = tmp_path / "narrow"
    assert unpack_shards(built.shards, folder, bits=8) == len(built.shards.tiles())
    for name in pd.read_csv(folder / "tiles.csv")["tile_path"]:
        with Image.open(folder / name) as narrow, Image.open(unpacked / name) as wide:
            assert narrow.mode == "L"
            shown, stored = np.asarray(narrow.convert("RGB")).astype(float), np.asarray(wide).astype(float)
        assert np.abs(shown - stored[..., None] / 257).max() <= 0.5
    packed, _ = pack([folder / "tiles.csv"], folder, tmp_path / "s")
    assert verify_shards(packed) == []
    assert (packed.meta["bits"], packed.preprocessing["bits"]) == (8, 8)
    assert packed.preprocessing["mapping"] == built.shards.preprocessing["mapping"]
    again = tmp_path / "again"
    unpack_shards(packed, again)
    for path in folder.glob("*.png"):
        with Image.open(path) as one, Image.open(again / path.name) as other:
            np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    with pytest.raises(BadInput, match=r"holds tiles of 8 bits, .* leave out --bits 16"):
        unpack_shards(packed, tmp_path / "wide", bits=16)


def test_packing_what_was_unpacked_gives_the_same_tiles(built, unpacked, tmp_path):
    packed, _ = pack([unpacked / "tiles.csv"], unpacked, tmp_path / "s", tiles_per_shard=40)
    assert verify_shards(packed) == []
    columns = ["key", "crc32", "image_id", "patient_id", "split", "x", "y"]
    ours, theirs = (s.tiles()[columns].sort_values("key", ignore_index=True) for s in (packed, built.shards))
    pd.testing.assert_frame_equal(ours, theirs, check_dtype=False)
    check_same_pixels(built.shards.preprocessing, packed.preprocessing, "it")
    assert packed.preprocessing["mapping"] == built.shards.preprocessing["mapping"]
    # Films stay together, in shards of at most 40 tiles where their films allow it.
    by_film = packed.tiles().groupby("image_id")
    assert (by_film["shard"].nunique() == 1).all()
    most = packed.tiles().groupby("shard").size().max()
    assert most <= max(40, by_film.size().max())
    assert packed.meta["recipe"]["options"]["tiles_per_shard"] == 40


def test_packing_twice_and_by_two_workers_gives_the_same_bytes(unpacked, contents, tmp_path):
    folders = [tmp_path / name for name in "ab"]
    for workers, folder in enumerate(folders, start=1):
        pack([unpacked / "tiles.csv"], unpacked, folder, workers=workers, tiles_per_shard=60)
    assert contents(folders[0]) == contents(folders[1])


def test_unpacking_refuses_a_damaged_tile(copied, tmp_path):
    from mammostream.shards.archive import read_index

    shard = copied.shards()[0]
    member = read_index(shard.index)[3][0]
    data = bytearray(shard.tar.read_bytes())
    data[member.offset + member.size // 2] ^= 1
    shard.tar.write_bytes(data)
    with pytest.raises(BadInput, match=f"tile {member.name.partition('.')[0]} of .* is damaged"):
        unpack_shards(copied, tmp_path / "out")
    assert not (tmp_path / "out/tiles.csv").exists()


def tile(folder, name, value=7, size=32, dtype=np.uint8):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size, size), value, dtype)).save(path)
    return name


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "tiles"


def guide_csv(path, rows):
    path.write_text("tile_path,mass,normal\n" + "".join(f"{row}\n" for row in rows))
    return path


def test_the_guides_layout(folder, tmp_path):
    """Names without a place, a label left empty, two CSVs for two splits."""
    names = [tile(folder, f"patient{p}_tile_{t:03d}.png", value=40 * p + t) for p in (1, 2) for t in range(3)]
    train = guide_csv(tmp_path / "train_labels.csv", [f"{n},1,0" for n in names[:2]] + [f"{names[2]},,1"])
    val = guide_csv(tmp_path / "val_labels.csv", [f"{n},0,1.0" for n in names[3:]])
    packed, tiles = pack([train, val], folder, tmp_path / "s", splits=("train", "val"))
    assert verify_shards(packed) == []
    assert packed.splits == ["train", "val"]
    table = packed.tiles()
    assert sorted(table["key"]) == [name.removesuffix(".png") for name in names]
    assert table["image_id"].tolist() == [key.partition("_tile")[0] for key in table["key"]]
    assert table["x"].isna().all()
    assert packed.preprocessing["tile_size"] == 32
    assert packed.preprocessing["mapping"] is None
    written = write_packed_csvs([train, val], tiles, table, packed.directory)
    assert [path.name for path in written] == ["train_labels.csv", "val_labels.csv"]
    assert written[0].read_text() == train.read_text().replace(".png", "")
    assert written[1].read_text() == val.read_text().replace(".png", "")


def test_labels_of_packed_tiles_join(folder, tmp_path):
    from mammostream.train.run.labels import join_shards, read_labels

    names = [tile(folder, f"{case}/tile 1.5.png", value) for case, value in (("a", 1), ("b", 2))]  # the same name twice
    csv = guide_csv(tmp_path / "labels.csv", [f"{n},{i},0" for i, n in enumerate(names)])
    packed, tiles = pack([csv], folder, tmp_path / "s", splits=("train",))
    assert sorted(tiles["key"]) == ["a%2Ftile%201%2E5", "b%2Ftile%201%2E5"]
    (written,) = write_packed_csvs([csv], tiles, packed.tiles(), packed.directory)
    joined = join_shards(read_labels(written, ["mass"]), packed, "it")
    by_key = dict(zip(joined.keys, joined.labels[:, 0], strict=True))
    assert by_key == {"a%2Ftile%201%2E5": 0, "b%2Ftile%201%2E5": 1}


def test_a_model_of_other_films_takes_packed_tiles_of_its_size(built, folder, tmp_path):
    csv = guide_csv(tmp_path / "l.csv", [f"{tile(folder, 'a.png', size=64)},1,0"])
    packed, _ = pack([csv], folder, tmp_path / "s", splits=("train",))
    check_same_pixels(built.shards.preprocessing, packed.preprocessing, "it")
    with pytest.raises(BadInput, match="tile_size 32"):
        check_same_pixels(built.shards.preprocessing | {"tile_size": 32}, packed.preprocessing, "it")


def test_tiles_that_do_not_fit_are_rows_with_their_reason(folder, tmp_path):
    names = [tile(folder, "good.png"), tile(folder, "large.png", size=40), tile(folder, "deep.png", dtype=np.uint16)]
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:40])
    (folder / "empty.png").touch()
    csv = guide_csv(tmp_path / "l.csv", [f"{n},1,0" for n in [*names, "cut.png", "empty.png", "nowhere.png"]])
    packed, tiles = pack([csv], folder, tmp_path / "s", splits=("train",))
    assert verify_shards(packed) == []
    assert packed.tiles()["key"].tolist() == ["good"]
    reasons = packed.images().set_index("image_id")["reason"]
    assert reasons["good"] == ""
    assert "has 40×40 pixels of 8 bits, not 32×32 of 8" in reasons["large"]
    assert "32×32 pixels of 16 bits" in reasons["deep"]
    assert "cannot be read" in reasons["cut"]
    assert "cannot be read" in reasons["empty"]
    assert "does not exist" in reasons["nowhere"]
    assert not reasons.str.contains(str(tmp_path)).any()
    (written,) = write_packed_csvs([csv], tiles, packed.tiles(), packed.directory)
    assert written.read_text() == "tile_path,mass,normal\ngood,1,0\n"


def test_bad_csvs(folder, tmp_path):
    name = tile(folder, "a.png")
    other = tmp_path / "other"
    other.mkdir()
    csvs = {
        "one": guide_csv(tmp_path / "one.csv", [f"{name},1,0"]),
        "same": guide_csv(other / "one.csv", [f"{name},1,0"]),
        "again": guide_csv(tmp_path / "again.csv", [f"{name},1,0"]),
        "nameless": guide_csv(tmp_path / "nameless.csv", [",1,0"]),
        "empty": guide_csv(tmp_path / "empty.csv", []),
    }
    patient = tmp_path / "p.csv"
    patient.write_text(f"tile_path,patient_id,split\n{name},7,train\n{tile(folder, 'b.png')},7,val\n")
    strange = tmp_path / "strange.csv"
    strange.write_text(f"tile_path,split\n{name},traain\n")
    for chosen, splits, message in [
        (["one"], (), "has no column 'split'"),
        (["one", "again"], ("train",), "1 values for 2 CSVs"),
        (["one", "same"], ("train", "val"), "the same name"),
        (["one", "again"], ("train", "val"), "occurs twice"),
        (["nameless"], ("train",), "line 2: tile_path is empty"),
        (["empty"], ("train",), "has no rows"),
    ]:
        with pytest.raises(BadInput, match=message):
            read_tile_csvs([csvs[c] for c in chosen], splits, folder)
    with pytest.raises(BadInput, match="patient_id '7' is in two splits"):
        read_tile_csvs([patient], (), folder)
    with pytest.raises(BadInput, match="a split is none of train, val, test"):
        read_tile_csvs([strange], (), folder)
    with pytest.raises(BadInput, match="nowhere does not exist"):
        read_tile_csvs([csvs["one"]], ("train",), tmp_path / "nowhere")
    nowhere = read_tile_csvs([csvs["one"]], ("train",), other)
    with pytest.raises(BadInput, match="none of the 1 tiles can be read"):
        make_pack_plan(nowhere, other, tmp_path / "s", PackConfig())
    csv = guide_csv(tmp_path / "deep.csv", [f"{tile(folder, 'deep.png', dtype=np.uint16)},1,0"])
    deep = read_tile_csvs([csv], ("train",), folder)
    with pytest.raises(BadInput, match="--codec jpg holds 8 bits"):
        make_pack_plan(deep, folder, tmp_path / "s", PackConfig(codec="jpg"))
