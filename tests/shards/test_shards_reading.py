"""What a model learnt from and what it is used on must be the same kind of tiles."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mammostream.common.errors import BadInput
from mammostream.shards.reading import check_same_pixels, open_shards

LEARNT = {"tile_size": 512, "pixel_spacing_mm": None, "mapping": "m", "native_spacing_mm": [0.05, 0.05]}


@pytest.mark.parametrize(
    "given",
    [{"tile_size": 256}, {"pixel_spacing_mm": 0.1}, {"mapping": "n"}, {"native_spacing_mm": [0.05, 0.07]}],
)
def test_other_pixels_are_refused(given):
    with pytest.raises(BadInput, match="the model learnt from"):
        check_same_pixels(LEARNT, LEARNT | given, "these shards")


@pytest.mark.parametrize(
    "given", [{}, {"native_spacing_mm": [0.045, 0.055]}, {"native_spacing_mm": None}, {"min_intensity": 3}]
)
def test_the_same_pixels_pass(given):
    check_same_pixels(LEARNT, LEARNT | given, "these shards")


def test_resampled_tiles_may_come_from_any_film():
    learnt = LEARNT | {"pixel_spacing_mm": 0.1}
    check_same_pixels(learnt, learnt | {"native_spacing_mm": [0.2, 0.2]}, "these shards")


def test_what_a_model_does_not_say_is_not_compared():
    """Checkpoints of other programs know their mean and std, and the size that they resize any tile to."""
    check_same_pixels({"mean": 0.5, "std": 0.5, "tile_size": 256}, LEARNT, "these shards")


TILES = ["tile", "key", "x"]


def test_rows_of_a_shard_are_those_of_the_whole_table_whatever_its_row_groups(copied):
    every = copied.tiles()
    images = copied.images()
    for rows in (None, 7, len(every)):
        if rows is not None:
            path = copied.directory / "tiles.parquet"
            pq.write_table(pq.read_table(path), path, row_group_size=rows)
        for entry in copied.meta["shards"]:
            tiles, its_images = copied.rows_of(entry["name"], TILES, ["image_id", "kept"])
            mine = every[every["shard"] == entry["name"]].sort_values("tile")
            assert tiles.to_dict("list") == mine[TILES].to_dict("list")
            assert its_images["image_id"].tolist() == images.loc[images["shard"] == entry["name"], "image_id"].tolist()


def _replaced(table: pa.Table, column: str, values: pa.Array) -> pa.Table:
    return table.set_column(table.schema.get_field_index(column), column, values)


DAMAGES = {
    "missing file": (lambda table: None, "does not exist"),
    "missing column": (lambda table: table.drop_columns(["key"]), "key"),
    "junk in a number": (lambda table: _replaced(table, "tile", pa.array(["junk"] * len(table))), "is damaged"),
    "lists": (lambda table: _replaced(table, "tile", pa.array([[1]] * len(table))), "is damaged"),
    "nothing": (lambda table: _replaced(table, "key", pa.nulls(len(table), pa.string())), "'key' has rows without a value"),
    "no UTF-8": (
        lambda table: _replaced(table, "key", pa.array([b"\xff"] * len(table), pa.binary()).cast(pa.string(), safe=False)),
        "is damaged",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_table_is_one_line_that_says_how_to_make_it_again(copied, damage):
    change, message = DAMAGES[damage]
    path = copied.directory / "tiles.parquet"
    table = change(pq.read_table(path))
    path.unlink() if table is None else pq.write_table(table, path)
    shards = open_shards(copied.directory)
    for read in (shards.tiles, lambda: shards.rows_of("train-000000", TILES, [])):
        with pytest.raises(BadInput, match=f"{path} .*{message}.*mammostream shards finish") as caught:
            read()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("shards",), {}),
        (("shards", 0), 1),
        (("shards", 0, "tiles"), "many"),
        (("shards", 0, "split"), 3),
        (("shards", 0, "images"), None),
        (("shards", 0, "tar_bytes"), None),
        (("codec",), "gif"),
        (("preprocessing",), []),
        (("preprocessing", "tile_size"), 0),
        (("preprocessing", "pixel_spacing_mm"), "wide"),
    ],
)
def test_a_damaged_shards_json_is_one_line(copied, place, value):
    path = copied.directory / "shards.json"
    meta = json.loads(path.read_text())
    *outer, last = place
    holder = meta
    for name in outer:
        holder = holder[name]
    holder[last] = value
    path.write_text(json.dumps(meta))
    with pytest.raises(BadInput, match=f"{path} is damaged .*mammostream shards finish {copied.directory}"):
        open_shards(copied.directory)
