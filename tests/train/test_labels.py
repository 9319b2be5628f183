"""Labels: what a CSV may say, and which tile a label belongs to."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from common.errors import BadInput
from dali_pipelines import TRAIN_VIEW, LabelledLoader
from shards import open_shards
from train.labels import join_folder, join_shards, read_labels, refuse_leakage


@pytest.fixture
def write_csv(tmp_path):
    def write(text: str, name: str = "labels.csv"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_cells_become_one_zero_and_nan_and_rows_without_a_label_go(write_csv):
    path = write_csv("tile_path,mass,calc,unused\na.png,1,,7\nb.png,,0,7\nc.png,,,7\nd.png,0,1,7\n")
    frame = read_labels(path, ["calc", "mass"])
    assert frame["tile_path"].tolist() == ["a.png", "b.png", "d.png"]
    assert frame.columns.tolist() == ["tile_path", "calc", "mass"]
    np.testing.assert_array_equal(frame[["calc", "mass"]].to_numpy(np.float32), [[np.nan, 1], [0, np.nan], [1, 0]])
    assert read_labels(path, ["mass"])["tile_path"].tolist() == ["a.png", "d.png"]
    assert read_labels(path, ["calc", "mass"], 2)["tile_path"].tolist() == ["a.png", "b.png"]


def test_a_missing_class_is_named_with_the_nearest(write_csv):
    path = write_csv("tile_path,mass,calcification\na.png,1,0\n")
    with pytest.raises(BadInput, match=r"no class 'calcifications' \(did you mean 'calcification'\?\).*mass, calcification"):
        read_labels(path, ["mass", "calcifications"])
    with pytest.raises(BadInput, match="no class 'tile_path'"):
        read_labels(path, ["tile_path"])
    with pytest.raises(BadInput, match="no column 'tile_path'"):
        read_labels(write_csv("tile,mass\na.png,1\n"), ["mass"])


@pytest.mark.parametrize("cell", ["2", "-1", "0.5", "yes", "inf"])
def test_a_cell_that_is_no_label_is_named_by_line_and_column(write_csv, cell):
    path = write_csv(f"tile_path,mass,calc\na.png,1,0\nb.png,,1\nc.png,0,{cell}\nd.png,1,0\n")
    with pytest.raises(BadInput, match=rf"line 4, column 'calc': '{cell}(\.0)?' is not 0, 1 or empty"):
        read_labels(path, ["mass", "calc"])
    assert len(read_labels(path, ["mass"])) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tile_path,mass\na.png,1\nb.png,0\na.png,0\n", "line 4: tile 'a.png' stands there twice"),
        ("tile_path,mass\na.png,1\n,0\n", "line 3.*tile_path"),
        ("tile_path,mass\na.png,\nb.png,\n", "no row with a label of: mass"),
        ("tile_path,mass\n", "no rows"),
    ],
)
def test_a_csv_that_means_nothing_sure_is_refused(write_csv, text, message):
    with pytest.raises(BadInput, match=message):
        read_labels(write_csv(text), ["mass"])


def test_a_class_named_twice_is_refused(write_csv):
    with pytest.raises(BadInput, match="'mass'.*twice"):
        read_labels(write_csv("tile_path,mass\na.png,1\nb.png,0\n"), ["mass", "mass"])


def test_labels_join_the_tiles_of_shards_by_key(road):
    shards = open_shards(road.shards)
    frame = read_labels(road.train_csv, road.classes)
    spelled = frame.assign(tile_path=["somewhere/" + key + ".png" for key in frame["tile_path"]])
    joined = join_shards(spelled, shards, "train.csv")

    truth = shards.tiles().set_index("key")
    assert (np.diff(joined.numbers) > 0).all()
    np.testing.assert_array_equal(joined.numbers, truth.loc[joined.keys, "tile"])
    np.testing.assert_array_equal(joined.labels, frame.set_index("tile_path").loc[joined.keys, road.classes])
    np.testing.assert_array_equal(joined.groups, truth.loc[joined.keys, "image_id"])
    np.testing.assert_array_equal(joined.patients, truth.loc[joined.keys, "patient_id"])
    assert joined.labels.dtype == np.float32
    assert np.isnan(joined.labels).any()
    assert {shard.split for shard in joined.source} == {"train"}


def test_rows_find_each_number(road):
    joined = join_shards(read_labels(road.val_csv, road.classes), open_shards(road.shards), "val.csv")
    order = torch.randperm(len(joined.numbers), generator=torch.Generator().manual_seed(0))
    assert joined.numbers[0] >= 2**20  # the second shard's tiles: numbers are no positions
    assert torch.equal(joined.rows(torch.from_numpy(joined.numbers)[order]), order)


def test_each_tile_that_the_loader_gives_finds_its_row_of_the_csv(road):
    """Shuffled and augmented, through three processes: the label of a number is the CSV's for that tile's key."""
    shards = open_shards(road.shards)
    joined = join_shards(read_labels(road.train_csv, road.classes), shards, "train.csv")
    keys = shards.tiles().set_index("tile")["key"]
    csv = pd.read_csv(road.train_csv).set_index("tile_path")[road.classes]
    seen = 0
    for rank in range(3):
        loader = LabelledLoader(
            joined.source,
            batch_size=16,
            tile_size=shards.preprocessing["tile_size"],
            mean=0.449,
            std=0.226,
            view=TRAIN_VIEW,
            shuffle=True,
            tiles=joined.numbers,
            rank=rank,
            world_size=3,
        )
        for _, numbers in loader:
            labels = joined.labels[joined.rows(numbers).numpy()]
            np.testing.assert_array_equal(labels, csv.loc[keys.loc[numbers.numpy()]].to_numpy(np.float32))
            seen += len(numbers)
    assert seen == len(joined.numbers)


def test_tiles_that_the_shards_do_not_hold_are_refused(road):
    shards = open_shards(road.shards)
    key = shards.tiles()["key"].iloc[0]
    frame = pd.DataFrame({"tile_path": [key, "nowhere_y0_x0.png", "nor_here.png"], "mass": np.float32([1, 0, 1])})
    with pytest.raises(BadInput, match=r"my\.csv: tile 'nowhere_y0_x0' \(2 such\) is not in .*shards"):
        join_shards(frame, shards, "my.csv")


def test_one_tile_by_two_paths_is_refused(road):
    shards = open_shards(road.shards)
    key = shards.tiles()["key"].iloc[0]
    frame = pd.DataFrame({"tile_path": [f"a/{key}.png", f"b/{key}.tif"], "mass": np.float32([1, 0])})
    with pytest.raises(BadInput, match=f"tile '{key}'.*twice"):
        join_shards(frame, shards, "my.csv")


def test_labels_join_tile_files_by_place(road, tmp_path):
    for name in ("b.png", "sub/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    frame = pd.DataFrame({"tile_path": ["sub/a.png", "b.png"], "mass": np.float32([1, np.nan]), "calc": np.float32([0, 1])})
    joined = join_folder(frame, tmp_path, "my.csv")
    assert joined.source == [tmp_path / "sub/a.png", tmp_path / "b.png"]
    np.testing.assert_array_equal(joined.numbers, [0, 1])
    np.testing.assert_array_equal(joined.labels, [[1, 0], [np.nan, 1]])
    missing = pd.concat([frame, pd.DataFrame({"tile_path": ["gone.png"], "mass": [1.0], "calc": [0.0]})])
    with pytest.raises(BadInput, match=r"my\.csv: tile .*gone\.png does not exist; correct tile_path or --tiles-dir"):
        join_folder(missing, tmp_path, "my.csv")
    with pytest.raises(BadInput, match="nofolder does not exist; check --tiles-dir"):
        join_folder(frame, tmp_path / "nofolder", "my.csv")


def test_a_patient_or_a_tile_on_both_sides_is_refused(road, tmp_path):
    shards = open_shards(road.shards)
    tiles = shards.tiles("train")
    patient = tiles["patient_id"].iloc[0]

    def part(rows: slice):
        frame = pd.DataFrame({"tile_path": tiles["key"][rows], "mass": np.float32(1)})
        return join_shards(frame, shards, "csv")

    val = join_shards(read_labels(road.val_csv, road.classes), shards, "val.csv")
    refuse_leakage(part(slice(0, 10)), val)
    # Other tiles of the same patient are as bad as the same tiles.
    with pytest.raises(BadInput, match=rf"patient '{patient}' is in both --train-csv and --val-csv"):
        refuse_leakage(part(slice(0, 10)), part(slice(10, 20)))

    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / name).write_bytes(b"x")
    folder = [
        join_folder(pd.DataFrame({"tile_path": names, "mass": np.float32([1, 0])}), tmp_path, "csv")
        for names in (["a.png", "b.png"], ["b.png", "c.png"])
    ]
    with pytest.raises(BadInput, match=r"tile 'b\.png' is in both --train-csv and --val-csv \(1 such\)"):
        refuse_leakage(*folder)
