"""Bags hold the tiles and labels of their films, and what is in none has its reason."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from planted_set import DIM, planted_tiles, write_features

from mammostream.common.errors import BadInput
from mammostream.train.aggregate.bags import POSITIONS, check_labels, make_bags
from mammostream.train.aggregate.features import open_features

CPU = torch.device("cpu")


def film(image_id, patient="P", side="L", split="train", **labels):
    known = {"image_id": image_id, "patient_id": patient, "laterality": side, "split": split}
    return known | {f"label:{name}": value for name, value in labels.items()}


def bags_of(tmp_path, films, level, names=("a",), split="train", tiles=None):
    frame = pd.DataFrame(films)
    rows = planted_tiles(frame.assign(**{"label:lesion": 0}))
    write_features(tmp_path / "f.parquet", rows if tiles is None else tiles(rows))
    return make_bags(open_features(tmp_path / "f.parquet"), frame, level, names, split)


@pytest.mark.parametrize(("level", "count"), [("image", 120 * 2), ("breast", 120), ("patient", 60)])
def test_bags_hold_every_tile_of_their_films_once(planted, level, count):
    features, films = planted.open(), planted.films()
    bags, problems = make_bags(features, films, level, ["lesion"], "train")
    assert len(bags) == count
    assert problems.empty
    tiles = features.tiles[features.tiles["split"] == "train"]
    assert sorted(bags.order) == tiles.index.tolist()
    label_of = films.set_index("image_id")["label:lesion"]
    by = {"image": ["image_id"], "breast": ["patient_id", "laterality"], "patient": ["patient_id"]}[level]
    sides = films.set_index("image_id")["laterality"]
    for n in range(0, count, 7):
        mine = features.tiles.iloc[bags.order[bags.starts[n] : bags.starts[n + 1]]]
        named = mine.assign(laterality=mine["image_id"].map(sides))[by].drop_duplicates()
        assert named.astype(str).to_dict("list") == bags.names.loc[[n], by].astype(str).to_dict("list")
        assert bags.labels[n, 0] == mine["image_id"].map(label_of).max()


def test_a_batch_is_the_features_of_its_bags(planted):
    features = planted.open()
    bags, _ = make_bags(features, planted.films(), "breast", ["lesion"], "val")
    chosen = np.array([5, 0, 9])
    values, bag, labels = bags.batch(chosen, CPU)
    assert values.dtype == torch.float32
    assert torch.bincount(bag).tolist() == bags.sizes[chosen].tolist()
    for place, n in enumerate(chosen):
        rows = bags.order[bags.starts[n] : bags.starts[n + 1]]
        np.testing.assert_array_equal(values[bag == place], features.values[rows].astype(np.float32))
        assert labels[place, 0] == bags.labels[n, 0]
    part = bags.take(chosen)
    torch.testing.assert_close(part.batch(np.arange(3), CPU)[0], values)
    assert part.names["patient_id"].tolist() == bags.names["patient_id"][chosen].tolist()


def test_labels_of_films_become_those_of_breasts(tmp_path):
    films = [
        film("1", a=1, b=0),
        film("2", a=0, b=np.nan),
        film("3", side="R", a=0, b=0),
        film("4", side="R", a=0, b=0),
        film("5", "Q", a=np.nan, b=1),
    ]
    bags, problems = bags_of(tmp_path, films, "breast", ("a", "b"))
    assert problems.empty
    found = {
        (p, s): labels for (p, s), labels in zip(bags.names[["patient_id", "laterality"]].to_numpy(), bags.labels, strict=True)
    }
    np.testing.assert_array_equal(found["P", "L"], [1, np.nan])
    np.testing.assert_array_equal(found["P", "R"], [0, 0])
    np.testing.assert_array_equal(found["Q", "L"], [np.nan, 1])
    assert bags.disagreeing == 1


def test_films_in_no_bag_have_their_reason(tmp_path):
    films = [film("good", a=1), film("no side", side="", a=1), film("empty", side="R", a=1), film("broken", "Q", a=0)]

    def damage(tiles):
        tiles = tiles[tiles["image_id"] != "empty"].copy()
        broken = tiles["image_id"] == "broken"
        tiles.loc[broken, "reason"] = "cannot be decoded"
        tiles["features"] = [None if bad else row for bad, row in zip(broken, tiles["features"], strict=True)]
        return tiles

    bags, problems = bags_of(tmp_path, films, "breast", tiles=damage)
    assert bags.names["patient_id"].tolist() == ["P"]
    reasons = problems.set_index("image_id")["reason"]
    assert "of no breast" in reasons["no side"]
    assert "no tile in the features" in reasons["empty"]
    assert reasons["broken"] == "cannot be decoded"
    assert len(reasons) == 3


def test_what_cannot_be_learnt_is_one_line(tmp_path, planted):
    features, films = planted.open(), planted.films()
    train, _ = make_bags(features, films, "breast", ["lesion"], "train")
    val, _ = make_bags(features, films, "breast", ["lesion"], "val")
    assert check_labels(train, val, ["lesion"]) == []
    positive = train.take(train.labels[:, 0] == 1)
    with pytest.raises(BadInput, match=f"class 'lesion' has {len(positive)} positive and 0 negative bags of split 'train'"):
        check_labels(positive, val, ["lesion"])
    (line,) = check_labels(train, val.take(val.labels[:, 0] == 0), ["lesion"])
    assert "its AUC is undefined" in line
    unknown = replace(val, labels=np.full_like(val.labels, np.nan))
    with pytest.raises(BadInput, match="no bag of split 'val' has a label of class 'lesion'"):
        check_labels(train, unknown, ["lesion"])
    with pytest.raises(BadInput, match="no bag of split 'val' has tiles"):
        check_labels(train, val.take(np.zeros(len(val), bool)), ["lesion"])
    with pytest.raises(BadInput, match=r"no label 'lesoin' \(did you mean 'lesion'"):
        make_bags(features, films, "breast", ["lesoin"], "train")


def test_features_are_copied_once_and_anew_when_the_table_changes(tmp_path, planted):
    frame = pd.DataFrame([film("1", a=1), film("2", "Q", a=0)]).assign(**{"label:lesion": 0})
    path, array = tmp_path / "f.parquet", tmp_path / "f.parquet.f16.npy"
    rows = planted_tiles(frame)
    write_features(path, rows)
    first = open_features(path)
    np.testing.assert_array_equal(first.values, np.stack(rows["features"]).astype(np.float16))
    assert (first.values.dtype, first.dim) == (np.float16, DIM)
    made = array.stat().st_mtime_ns
    open_features(path)
    assert array.stat().st_mtime_ns == made
    other = planted_tiles(frame, seed=3)
    write_features(path, other)
    np.testing.assert_array_equal(open_features(path).values, np.stack(other["features"]).astype(np.float16))
    array.write_bytes(array.read_bytes()[:-5])  # a copy of the folder that was cut short
    np.testing.assert_array_equal(open_features(path).values, np.stack(other["features"]).astype(np.float16))


def test_a_table_that_is_none_or_too_large_is_one_line(tmp_path, planted):
    with pytest.raises(BadInput, match="does not exist; make it with 'mammostream embed'"):
        open_features(tmp_path / "nothing.parquet")
    with pytest.raises(BadInput, match="is no table of features"):
        open_features(planted.manifest)
    (tmp_path / "junk.parquet").write_bytes(b"junk")
    with pytest.raises(BadInput, match="is no table of features"):
        open_features(tmp_path / "junk.parquet")
    rows = planted_tiles(pd.DataFrame([film("1", a=1)]).assign(**{"label:lesion": 0}))
    rows["features"] = [row * 1e6 for row in rows["features"]]
    write_features(tmp_path / "large.parquet", rows)
    with pytest.raises(BadInput, match="do not fit float16"):
        open_features(tmp_path / "large.parquet")
    assert not list(tmp_path.glob("large.parquet.f16*"))


def test_a_table_whose_reasons_contradict_its_features_is_refused(tmp_path):
    rows = planted_tiles(pd.DataFrame([film("1", a=1)]).assign(**{"label:lesion": 0}))
    rows["features"] = [None, *rows["features"][1:]]
    write_features(tmp_path / "f.parquet", rows)
    with pytest.raises(BadInput, match=f"features of {len(rows) - 1} tiles, but {len(rows)} without a reason"):
        open_features(tmp_path / "f.parquet")
    rows = planted_tiles(pd.DataFrame([film("1", a=1)]).assign(**{"label:lesion": 0}))
    write_features(tmp_path / "f.parquet", rows.assign(reason=["", *["cannot be decoded"] * (len(rows) - 1)]))
    with pytest.raises(BadInput, match="have a reason to have none"):
        open_features(tmp_path / "f.parquet")
    assert not list(tmp_path.glob("f.parquet.f16*"))


def test_positions_are_those_of_the_tiles_and_films(tmp_path):
    films = [
        film("1", a=1) | {"view": "CC", "pixel_spacing_mm": 0.1},
        film("2", side="R", a=0) | {"view": "MLO", "pixel_spacing_mm": 0.5},
        film("3", "Q", side="", a=0) | {"view": "", "pixel_spacing_mm": np.nan},
    ]
    frame = pd.DataFrame(films)
    write_features(tmp_path / "f.parquet", planted_tiles(frame.assign(**{"label:lesion": 0})))
    features = open_features(tmp_path / "f.parquet")
    plain, _ = make_bags(features, frame, "image", ["a"], "train")
    bags, _ = make_bags(features, frame, "image", ["a"], "train", position=True)
    assert (plain.dim, bags.dim) == (DIM, DIM + len(POSITIONS))
    values, bag, _ = bags.batch(np.arange(3), CPU)
    torch.testing.assert_close(values[:, :DIM], plain.batch(np.arange(3), CPU)[0])
    for number, (spacing, rest) in enumerate([(0.1, [1, 0, 1, 0]), (0.5, [0, 1, 0, 1]), (None, [0, 0, 0, 0])]):
        for n, found in enumerate(values[bag == number, DIM:].tolist()):
            # tiles of 64 pixels, the n-th 64 n below the corner; units of 100 mm
            centre = [1, 32 * spacing / 100, (64 * n + 32) * spacing / 100] if spacing else [0, 0, 0]
            assert found == pytest.approx(centre + rest)
