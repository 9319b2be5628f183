"""Labels: what a CSV may say, and which tile a label belongs to."""

from __future__ import annotations

import imagecodecs
import numpy as np
import pandas as pd
import pytest
import torch

from mammostream.common.errors import BadInput
from mammostream.dali_pipelines import TRAIN_VIEW, LabelledLoader
from mammostream.shards import open_shards
from mammostream.train.run.labels import describe_leakage, find_leakage, join_folder, join_shards, read_labels


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
        ("tile_path,mass\na.png,1\nb.png,0\na.png,0\n", "line 4: tile 'a.png' occurs twice"),
        ("tile_path,mass\na.png,1\na.png,1\n", "line 3: tile 'a.png' occurs twice"),
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
    with pytest.raises(
        BadInput, match=r"my\.csv: tile .*gone\.png \(1 such\) does not exist; correct tile_path or --tiles-dir"
    ):
        join_folder(missing, tmp_path, "my.csv")
    with pytest.raises(BadInput, match="nofolder does not exist; check --tiles-dir"):
        join_folder(frame, tmp_path / "nofolder", "my.csv")


def test_what_is_on_both_sides_is_found(road):
    shards = open_shards(road.shards)
    tiles = shards.tiles("train")
    patient, film = tiles["patient_id"].iloc[0], tiles["image_id"].iloc[0]

    def part(rows: slice):
        frame = pd.DataFrame({"tile_path": tiles["key"][rows], "mass": np.float32(1)})
        return join_shards(frame, shards, "csv")

    val = join_shards(read_labels(road.val_csv, road.classes), shards, "val.csv")
    assert find_leakage(part(slice(0, 10)), val) == {}
    # Other tiles of the same patient are as bad as the same tiles.
    assert find_leakage(part(slice(0, 10)), part(slice(10, 20))) == {"patients": [patient], "images": [film]}
    both = find_leakage(part(slice(0, 12)), part(slice(7, 20)))
    assert both["tiles"] == sorted(tiles["key"][7:12])
    line = describe_leakage(both)
    assert (
        f"1 patient ({patient}), 1 image ({film}), 5 tiles ({', '.join(sorted(tiles['key'][7:12])[:3])}, … and 2 more)" in line
    )


@pytest.fixture
def write_tiles(tmp_path):
    def write(names: dict[str, int]):
        """Write flat tiles, each of its grey value, and return a join of some of them."""
        for name, value in names.items():
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True, parents=True)
            path.write_bytes(_encode(np.full((8, 8), value, np.uint16), path.suffix))

        def join(*chosen: str, regex: str | None = None, **columns):
            return join_folder(pd.DataFrame({"tile_path": chosen, "mass": np.float32(1), **columns}), tmp_path, "csv", regex)

        return join

    return write


def _encode(pixels: np.ndarray, suffix: str) -> bytes:
    return imagecodecs.png_encode(pixels) if suffix == ".png" else imagecodecs.tiff_encode(pixels, photometric="minisblack")


def test_tiles_of_a_folder_are_compared_by_their_pixels(write_tiles):
    join = write_tiles({"a.png": 1, "b.png": 2, "sub/c.tif": 1, "d.png": 4})
    assert find_leakage(join("a.png", "b.png"), join("d.png")) == {}
    assert find_leakage(join("a.png", "b.png"), join("sub/c.tif", "d.png")) == {"tiles": ["sub/c.tif (= a.png)"]}
    assert find_leakage(join("a.png"), join("a.png", "b.png")) == {"images": ["a.png"], "tiles": ["a.png"]}


def test_a_folders_tiles_tell_their_film_and_patient(write_tiles):
    names = ["patient1_tile_001.png", "patient1_tile_002.png", "x/F1_y0_x0.png", "y/F1_y0_x64.png", "P1/7.png", "P2/7.png"]
    join = write_tiles({name: value for value, name in enumerate(names)})
    assert find_leakage(join(names[0]), join(names[1])) == {"images": ["patient1"]}
    assert find_leakage(join(names[2]), join(names[3])) == {"images": ["F1"]}
    assert find_leakage(join(names[4]), join(names[5])) == {}  # a mere number is no film's name
    for regex in (r"patient\d+", r"(patient1)_"):
        found = find_leakage(join(names[0], regex=regex), join(names[1], regex=regex))
        assert found == {"patients": ["patient1"], "images": ["patient1"]}
    with pytest.raises(BadInput, match=r"csv: --patient-regex 'patient.*' does not match 'P1/7\.png'"):
        join(names[0], names[4], regex=r"patient\d+")
    with pytest.raises(BadInput, match=r"--patient-regex '\(' is not a regular expression"):
        join(names[0], regex="(")
    described = [
        join(names[0], patient_id=["p"], image_id=["one"]),
        join(names[4], names[1], patient_id=["p", "q"], image_id=["two", np.nan]),
    ]
    assert find_leakage(*described) == {"patients": ["p"]}
    assert described[1].groups.tolist() == ["two", "patient1"]


def test_a_csv_may_name_patients_and_films(write_csv):
    path = write_csv("tile_path,mass,patient_id,image_id,site\na.png,1,007,f,3\nb.png,0,8,,3\n")
    frame = read_labels(path, ["mass"])
    assert frame.columns.tolist() == ["tile_path", "mass", "image_id", "patient_id"]
    assert frame["patient_id"].tolist() == ["007", "8"]
    assert frame["image_id"].isna().tolist() == [False, True]


@pytest.mark.parametrize("film", ["patient1", "patient1.left", "1.2.840.113681.2230565232.954.3504553964.79", "Müller, Ä. (2)"])
@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_a_film_on_both_sides_is_found_whatever_its_name(write_tiles, film, ending):
    names = [f"{film}_tile_{n:03d}{ending}" for n in (1, 2)] + [f"{film}_y0_x64{ending}", f"{film}2_tile_001{ending}"]
    join = write_tiles({name: value for value, name in enumerate(names)})
    assert find_leakage(join(names[0]), join(names[1])) == {"images": [film]}
    assert find_leakage(join(names[0]), join(names[2])) == {"images": [film]}
    assert find_leakage(join(names[0]), join(names[3])) == {}


def test_a_patient_on_both_sides_is_found_whatever_the_spelling(write_tiles):
    names = [f"{n}.png" for n in range(8)]
    join = write_tiles({name: value for value, name in enumerate(names)})

    def leakage(train, val):
        sides = join(*names[: len(train)], patient_id=train), join(*names[4 : 4 + len(val)], patient_id=val)
        return find_leakage(*sides)

    assert leakage(["10006", "P7 "], ["10006.0", "P7"]) == {"patients": ["10006", "P7"]}
    assert leakage(["P1", "0012"], ["p1", "12"]) == {"patients": ["12 (= 0012)", "p1 (= P1)"]}
    assert leakage(["removed", "P1"], ["removed", "P2"]) == {}  # nobody is no patient
    assert join(*names[:2], patient_id=["removed", None]).patients.tolist() == ["", ""]


def test_labels_join_packed_tiles_by_their_file_names(road, monkeypatch):
    """The key of '1.2.840_y0_x0.png' is escaped; the CSV may name the file."""
    shards = open_shards(road.shards)
    tiles = shards.tiles().assign(key=lambda t: [f"1%2E2%2E{n}_y0_x0" for n in range(len(t))])
    monkeypatch.setattr(type(shards), "tiles", lambda self, split=None: tiles)
    frame = pd.DataFrame({"tile_path": ["a/1.2.3_y0_x0.png", "1%2E2%2E4_y0_x0"], "mass": np.float32(1)})
    assert sorted(join_shards(frame, shards, "csv").keys) == ["1%2E2%2E3_y0_x0", "1%2E2%2E4_y0_x0"]
