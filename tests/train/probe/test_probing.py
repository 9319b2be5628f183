"""Probes: references for each part, no patient on both sides, and the command on real shards."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import imagecodecs
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from mammostream.common.errors import BadInput
from mammostream.models.backbones import build_backbone
from mammostream.models.checkpoints import load_checkpoint, save_checkpoint
from mammostream.shards import open_shards
from mammostream.train.levels.aggregation import PROBABILITY, aggregate
from mammostream.train.probe.command import _short_names
from mammostream.train.probe.compare import OnlineProbe
from mammostream.train.probe.config import ProbeConfig
from mammostream.train.probe.features import extract_features, random_network
from mammostream.train.probe.labelled import (
    Fold,
    ProbeSet,
    describe_folds,
    draw_share,
    for_choosing,
    make_folds,
    read_probe_set,
)
from mammostream.train.probe.scores import LEVELS, PROBES, SHARES, auc_of, count_pairs, gather, knn_scores, score_tiles
from mammostream.train.run.labels import LabelledTiles
from mammostream.train.run.runtime import resolve_runtime

CPU = ProbeConfig(device="cpu", num_workers=2)
SMALL = "--device cpu --num-workers 2"


def probe_set(patients, labels, splits="train"):
    """Labelled tiles without pixels: one film per patient."""
    patients, labels = np.asarray(patients), np.asarray(labels, np.float32).reshape(len(patients), -1)
    names = np.array([f"P{p}" for p in patients])
    keys = np.array([f"tile{i}" for i in range(len(patients))])
    units = {"tile": keys, "image": names, "breast": np.full(len(patients), "")}
    tiles = LabelledTiles([], np.arange(len(patients)), labels, keys, names, names, keys, np.full(len(keys), ""))
    numbers = np.unique(patients, return_inverse=True)[1]
    classes = [f"c{c}" for c in range(labels.shape[1])]
    shards = SimpleNamespace(shards=lambda split: [split])
    return ProbeSet(shards, tiles, classes, units, numbers, np.full(len(patients), splits), [])


# ---------------------------------------------------------------- patients


@given(st.lists(st.integers(0, 12), min_size=2, max_size=60).filter(lambda p: len(set(p)) > 1), st.integers(0, 99))
def test_no_patient_is_ever_on_both_sides_and_every_tile_is_scored_once(patients, seed):
    found = probe_set(patients, np.zeros(len(patients)))
    scored = []
    for fold in make_folds(found, seed):
        assert len(fold.fit)
        assert not set(found.patients[fold.fit]) & set(found.patients[fold.score])
        scored += fold.score.tolist()
    assert sorted(scored) == list(range(len(patients)))


def test_the_splits_decide_where_both_sides_have_labels():
    found = probe_set([0, 0, 1, 2, 3], np.zeros(5), np.array(["train", "train", "train", "val", "test"]))
    (fold,) = make_folds(found, 0)
    assert fold.fit.tolist() == [0, 1, 2]
    assert fold.score.tolist() == [3]
    (fold,) = make_folds(probe_set([0, 1], np.zeros(2), np.array(["train", "test"])), 0)
    assert fold.score.tolist() == [1]
    assert len(make_folds(probe_set([0, 1], np.zeros(2), "val"), 0)) == 2


SPLIT_SETS = st.lists(st.sampled_from(["train", "val", "test"]), min_size=2, max_size=12)


@given(SPLIT_SETS, st.integers(1, 4))
def test_what_chooses_a_checkpoint_sees_nothing_of_the_test_split(split_of_patient, tiles):
    patients = np.repeat(np.arange(len(split_of_patient)), tiles)
    found = probe_set(patients, patients % 2, np.repeat(split_of_patient, tiles))
    allowed = {patient for patient, split in enumerate(split_of_patient) if split != "test"}
    if len(allowed) < 2:
        with pytest.raises(BadInput, match="--probe-csv: "):
            for_choosing(found)
        return
    chosen = for_choosing(found)
    assert {int(name[1:]) for name in chosen.tiles.patients} == allowed
    assert chosen.tiles.keys.tolist() == [f"tile{i}" for i in np.flatnonzero(np.isin(patients, list(allowed)))]
    assert sorted(set(chosen.tiles.source)) == sorted({split_of_patient[patient] for patient in allowed})
    folds = make_folds(chosen, 0)
    assert all(len(fold.fit) and len(fold.score) for fold in folds)
    if {"train", "val"} <= set(split_of_patient):
        (fold,) = folds
        assert set(chosen.splits[fold.fit]) == {"train"}
        assert set(chosen.splits[fold.score]) == {"val"}
    else:
        assert sorted(np.concatenate([fold.score for fold in folds])) == list(range(len(chosen.splits)))


def online_probe(splits, monkeypatch):
    """An online probe of 3 tiles a patient, and the rows of its probe set that it fits on and scores, as tiles' keys."""
    patients = np.repeat(np.arange(len(splits)), 3)
    found = probe_set(patients, np.tile([0, 1, 0], len(splits)), np.repeat(splits, 3))
    used = {"fit": set(), "score": set(), "extracted": set()}

    def features(backbone, probe_set, *_, **__):
        used["extracted"] |= set(probe_set.tiles.keys)
        return np.random.default_rng(0).normal(size=(len(probe_set.tiles.keys), 4))

    def score(features, probe_set, folds, probe):
        for fold in folds:
            used["fit"] |= set(probe_set.tiles.keys[fold.fit])
            used["score"] |= set(probe_set.tiles.keys[fold.score])
        return score_tiles(features, probe_set, folds, probe)

    monkeypatch.setattr("mammostream.train.probe.compare.extract_features", features)
    monkeypatch.setattr("mammostream.train.probe.compare.score_tiles", score)
    online = OnlineProbe(found, resolve_runtime(CPU), CPU)
    online(None)
    return online, used


@pytest.mark.parametrize(
    ("splits", "fit", "score", "about"),
    [
        (
            ["train", "train", "val", "test"],
            {0, 1},
            {2},
            "fitted on train, scored on val (3 labelled tiles of test are left out)",
        ),
        (
            ["train", "train", "test", "test"],
            {0, 1},
            {0, 1},
            "2-fold cross-validation by patient over the labelled tiles of train (6 labelled tiles of test are left out)",
        ),
        (
            ["val", "test", "val", "val"],
            {0, 2, 3},
            {0, 2, 3},
            "3-fold cross-validation by patient over the labelled tiles of val (3 labelled tiles of test are left out)",
        ),
        (["train", "val"], {0}, {1}, "fitted on train, scored on val"),
    ],
)
def test_the_online_probe_neither_fits_on_nor_scores_the_test_split(splits, fit, score, about, monkeypatch):
    online, used = online_probe(splits, monkeypatch)
    assert used["fit"] == {f"tile{3 * p + i}" for p in fit for i in range(3)}
    assert used["score"] == {f"tile{3 * p + i}" for p in score for i in range(3)}
    assert used["extracted"] == used["fit"] | used["score"]
    assert online.about == about


def test_labels_of_the_test_split_alone_allow_no_online_probe(monkeypatch):
    with pytest.raises(BadInput, match="--probe-csv: all 6 labelled tiles are of the split 'test'.*label tiles of 'train' or"):
        online_probe(["test", "test"], monkeypatch)
    with pytest.raises(BadInput, match="--probe-csv: the 3 labelled tiles of train are of one patient; the probe needs two"):
        online_probe(["train", "test"], monkeypatch)


def test_a_probe_says_which_splits_it_was_fitted_on_and_scored_on():
    def words(*splits):
        found = probe_set(range(len(splits)), np.zeros(len(splits)), np.array(splits))
        return describe_folds(found, make_folds(found, 0))

    assert words("train", "val", "test") == "fitted on train, scored on val"
    assert words("train", "test") == "fitted on train, scored on test"
    assert words("test", "val", "val") == "3-fold cross-validation by patient over the labelled tiles of val and test"
    assert words("train", "train") == "2-fold cross-validation by patient over the labelled tiles of train"


@given(st.integers(0, 2**32 - 1), st.integers(1, 200), st.integers(1, 30), st.sampled_from(SHARES))
def test_a_share_is_of_whole_patients_where_there_are_enough(seed, n, count, share):
    rng = np.random.default_rng(seed)
    patients, labels = rng.integers(0, count, n), rng.choice([0.0, 1.0, np.nan], n)
    rows = np.sort(rng.permutation(n)[: n // 2 + 1])
    drawn, unit = draw_share(rows, labels, patients, share, rng)
    known = rows[~np.isnan(labels[rows])]
    assert np.isin(drawn, known).all()
    assert (np.diff(drawn) > 0).all()
    if share == 1 and len(known):
        assert drawn.tolist() == known.tolist()
    if unit == "patients":
        assert set(known[np.isin(patients[known], patients[drawn])]) == set(drawn)
        assert len(set(patients[drawn])) == round(share * len(set(patients[known])))
    else:
        assert share * len(set(patients[known])) < 1
        for value in (0, 1):
            assert (labels[drawn] == value).sum() == np.ceil(share * (labels[known] == value).sum())


def test_features_that_only_name_the_patient_are_worth_nothing():
    """Each patient has one label and its own direction: a probe fitted on the patient would know the label."""
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(40), 10)
    features = rng.normal(size=(40, 64))[patients] + 0.01 * rng.normal(size=(400, 64))
    labels = rng.permutation(np.repeat([0, 1], 20))[patients]
    found = probe_set(patients, labels)
    for probe in PROBES:
        scores, _ = score_tiles(features.astype(np.float32), found, make_folds(found, 0), probe)
        assert 0.25 < roc_auc_score(labels, scores[:, 0]) < 0.75
        leaking = [Fold(np.arange(0, 400, 2), np.arange(1, 400, 2))]
        scores, _ = score_tiles(features.astype(np.float32), found, leaking, probe)
        assert roc_auc_score(labels[1::2], scores[1::2, 0]) > 0.99


# ---------------------------------------------------------------- scores


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(2, 40), st.integers(1, 15))
def test_neighbours_vote_as_a_loop_over_them_does(seed, n, m):
    rng = np.random.default_rng(seed)
    fit, labels, score = rng.normal(size=(n, 6)), rng.integers(0, 2, n).astype(float), rng.normal(size=(m, 6))
    for row, found in zip(score, knn_scores(fit, labels, score), strict=True):
        cosine = [float(row @ f / np.linalg.norm(row) / np.linalg.norm(f)) for f in fit]
        near = sorted(range(n), key=lambda i: -cosine[i])[:20]
        weights = [np.exp(cosine[i] / 0.07) for i in near]
        assert found == pytest.approx(sum(w * labels[i] for w, i in zip(weights, near, strict=True)) / sum(weights))


@given(st.integers(0, 2**32 - 1), st.sampled_from([("max", 1), ("top3", 3)]))
def test_tiles_gather_as_inference_gathers_them(seed, kind):
    rng = np.random.default_rng(seed)
    name, top = kind
    images, labels, scores = rng.integers(0, 5, 30).astype(str), rng.choice([0.0, 1.0, np.nan], 30), rng.random(30)
    images[rng.random(30) < 0.1] = ""
    scores[rng.random(30) < 0.1] = np.nan
    found, gathered, patients, _ = gather(labels, scores, images, images.astype("U8") == "1", np.zeros(30), top)
    kept = (images != "") & ~np.isnan(scores)
    table = pd.DataFrame({"image": images, PROBABILITY + "c": scores, "label": labels})[kept]
    label = table.groupby("image")["label"].agg(lambda own: 1.0 if (own == 1).any() else own.sum(skipna=False)).dropna()
    wanted = aggregate(table[table["image"].isin(label.index)], ["image"]).sort_values("image")
    assert gathered.tolist() == pytest.approx(wanted[f"{name}:c"].tolist())
    assert found.tolist() == label.tolist()
    assert patients.tolist() == (wanted["image"] == "1").tolist()


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 6), st.integers(1, 3))
def test_pairs_give_sklearns_auc_also_of_patients_drawn_several_times(seed, n, count, folds):
    rng = np.random.default_rng(seed)
    patients, labels, scores = rng.integers(0, count, n), rng.integers(0, 2, n), rng.integers(0, 6, n) / 6
    of_row = patients % folds
    draws = rng.integers(0, 3, (4, count))
    draws[0] = 1
    for draw, found in zip(draws, auc_of(count_pairs(labels, scores, patients, of_row), draws.astype(float)), strict=True):
        total = weight = 0.0
        for fold in range(folds):
            rows = np.repeat(np.arange(n), draw[patients])
            rows = rows[of_row[rows] == fold]
            positives = int(labels[rows].sum())
            pairs = positives * (len(rows) - positives)
            if pairs:
                total, weight = total + pairs * roc_auc_score(labels[rows], scores[rows]), weight + pairs
        assert found == pytest.approx(total / weight) if weight else np.isnan(found)


def test_what_cannot_be_learnt_is_undefined():
    rng = np.random.default_rng(0)
    patients = np.repeat([0, 1, 2, 3], 5)
    one_value, rare = np.zeros(20), (np.arange(20) == 3).astype(float)
    found = probe_set(patients, np.stack([one_value, rare, np.full(20, np.nan)], 1))
    features = rng.normal(size=(20, 4)).astype(np.float32)
    scores, _ = score_tiles(features, found, make_folds(found, 0), "linear")
    assert np.isnan(scores[:, 0]).all()
    assert np.isnan(scores[:5, 1]).all()  # the fold that scores the only positive has none to fit on
    assert not np.isnan(scores[5:, 1]).any()
    assert np.isnan(scores[:, 2]).all()
    features[0, 0] = np.inf  # a diverged network
    assert np.isnan(score_tiles(features, found, make_folds(found, 0), "linear")[0]).all()


# ---------------------------------------------------------------- real shards


@pytest.fixture(scope="module")
def labels_csv(road, tmp_path_factory):
    """Labels of both patients, with one column that is not a label and one with a single value."""
    path = tmp_path_factory.mktemp("labels") / "labels.csv"
    table = pd.concat([pd.read_csv(road.train_csv), pd.read_csv(road.val_csv)], ignore_index=True)
    table["quality"] = np.arange(len(table)) / 7
    table["never"] = 0
    table.to_csv(path, index=False)
    return path


def test_labels_are_the_columns_of_zeros_and_ones(road, labels_csv):
    found = read_probe_set(labels_csv, (), open_shards(road.shards))
    assert found.class_names == ["simulated_calcification", "bright", "never"]
    assert sorted(set(found.splits)) == ["train", "val"]
    assert set(found.units["breast"]) == {f"{p} L" for p in set(found.tiles.patients)}
    assert any("2 patients only" in note for note in found.notes)
    few, again = (for_choosing(found, max_tiles=20) for _ in range(2))
    assert len(few.tiles.numbers) == 20
    assert few.tiles.numbers.tolist() == again.tiles.numbers.tolist()
    assert (np.diff(few.tiles.numbers) > 0).all()


def test_labels_that_allow_no_probe_are_named(road, labels_csv, tmp_path):
    shards, table, path = open_shards(road.shards), pd.read_csv(labels_csv), tmp_path / "labels.csv"
    table.head(1).to_csv(path, index=False)
    with pytest.raises(BadInput, match="tiles of 1 patient; a probe needs two"):
        read_probe_set(path, ["never"], shards)
    table.assign(tile_path=["nowhere_y1_x2", *table["tile_path"][1:]]).to_csv(path, index=False)
    with pytest.raises(BadInput, match="nowhere_y1_x2.*is not in"):
        read_probe_set(path, ["never"], shards)
    table[["tile_path", "quality"]].to_csv(path, index=False)
    with pytest.raises(BadInput, match="no column of 0 and 1"):
        read_probe_set(path, (), shards)


def test_features_are_the_networks_own_and_leave_it_as_it_was(road, labels_csv):
    found = read_probe_set(labels_csv, ["bright"], open_shards(road.shards))
    backbone = build_backbone("resnet18").train()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    rng = torch.get_rng_state()
    features = extract_features(backbone, found, resolve_runtime(CPU), CPU)
    assert backbone.training
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())
    # Tile by tile from the tars, decoded by WebDataset: the rows are in the order of the labels.
    import webdataset

    from mammostream.shards import decode_sample

    tiles = {}
    for shard in found.shards.shards():
        for sample in webdataset.WebDataset(str(shard.tar), shardshuffle=False).decode(decode_sample):
            pixels = next(value for value in sample.values() if isinstance(value, np.ndarray) and value.ndim == 2)
            tiles[sample["__key__"]] = pixels
    backbone.eval()
    for row in (0, 7, len(features) - 1):
        pixels = tiles[found.tiles.keys[row]]
        tile = (torch.as_tensor(pixels.astype(np.float32)) / np.iinfo(pixels.dtype).max - 0.449) / 0.226
        with torch.no_grad():
            wanted = backbone(tile[None, None])[0].numpy()
        np.testing.assert_allclose(features[row], wanted, rtol=1e-3, atol=1e-4)


def test_the_online_probe_gives_each_class_and_their_mean(road, labels_csv):
    found = read_probe_set(labels_csv, (), open_shards(road.shards))
    online = OnlineProbe(found, resolve_runtime(CPU), CPU)
    backbone = random_network("resnet18").build(0)
    figures = online(backbone)
    assert figures == online(backbone)
    for aucs in figures.values():
        assert aucs["never"] is None
        assert aucs["mean"] == pytest.approx((aucs["bright"] + aucs["simulated_calcification"]) / 2)
        assert 0 <= aucs["mean"] <= 1
    assert figures["linear"]["bright"] > 0.6  # even random weights keep a tile's mean


def two_checkpoints(road):
    return f"{road.byol} {road.pretrained}/mammogram_byol_epoch_003.pth"


@pytest.fixture(scope="module")
def probed(pretrained, labels_csv, run_cli, tmp_path_factory):
    """The command's output folder: two checkpoints, and a file in place of the ImageNet weights."""
    folder = tmp_path_factory.mktemp("probe")
    torch.manual_seed(1)
    torch.save(build_backbone("resnet18_narrow").state_dict(), folder / "imagenet.pth")
    run_cli(
        f"probe --checkpoint {two_checkpoints(pretrained)} --shards {pretrained.shards} --labels {labels_csv} "
        f"--weights-file {folder}/imagenet.pth --seeds 0 1 --bootstrap 50 --output-dir {folder}/out {SMALL}"
    )
    yield folder
    (folder / "imagenet.pth").unlink()


def test_the_command_sets_networks_side_by_side(probed):
    result = json.loads((probed / "out/probe.json").read_text())
    rows = pd.DataFrame(result["rows"])
    names = [
        "pretrain/mammogram_byol_final",
        "pretrain/mammogram_byol_epoch_003",
        "random resnet18_narrow",
        "ImageNet resnet18_narrow",
    ]
    assert list(rows["network"].unique()) == names
    assert len(rows) == len(names) * 3 * len(PROBES) * len(SHARES) * len(LEVELS)
    assert rows.loc[rows["class"] == "never", "auc"].isna().all()
    # One film on the scored side: an image's label has one value.
    assert rows.loc[rows["level"] != "tile", "auc"].isna().all()
    tiles = rows[(rows["level"] == "tile") & (rows["class"] == "bright")]
    assert tiles["auc"].between(0, 1).all()
    assert set(tiles.loc[tiles["share"] == 1, "drawn_by"]) == {"patients"}
    assert set(tiles.loc[tiles["share"] < 1, "drawn_by"]) == {"tiles"}  # a tenth of one patient
    full = tiles[tiles["share"] == 1].set_index(["network", "probe"])["aucs"]
    assert full[names[0], "linear"][0] == full[names[0], "linear"][1]  # the same features, labels and split
    assert full[names[2], "linear"][0] != full[names[2], "linear"][1]  # other random weights
    assert len(pd.read_csv(probed / "out/probe.csv")) == len(rows)
    picture = imagecodecs.png_decode((probed / "out/probe.png").read_bytes())
    assert picture[..., :3].std() > 10
    assert any("2 patients only" in note for note in result["notes"])
    assert result["folds"] == "fitted on train, scored on val"


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["best.pth"], ["best"]),
        (["a.pth", "b.pth"], ["a", "b"]),
        (["a.pth", "runs/1/a.pth", "runs/2/a.pth"], ["a", "1/a", "2/a"]),
        (["x/1/a.pth", "y/1/a.pth"], ["x/1/a", "y/1/a"]),
    ],
)
def test_checkpoints_are_named_by_as_many_folders_as_tell_them_apart(paths, names):
    assert _short_names([Path(path) for path in paths]) == names


def test_features_are_computed_once(probed, pretrained, labels_csv, mammostream):
    before = {path.name: path.stat().st_mtime_ns for path in (probed / "out/features").iterdir()}
    assert len(before) == 5  # two checkpoints, two random networks, one file
    figures = (probed / "out/probe.json").read_text()
    outcome = mammostream(
        f"probe --checkpoint {two_checkpoints(pretrained)} --shards {pretrained.shards} --labels {labels_csv} "
        f"--weights-file {probed}/imagenet.pth --seeds 0,1 --bootstrap 50 --output-dir {probed}/out {SMALL}"
    )
    assert outcome.code == 0
    assert "**bright**, by tile" in outcome.out
    assert "| random resnet18_narrow | kNN |" in outcome.out
    assert "undefined" in outcome.out
    assert {path.name: path.stat().st_mtime_ns for path in (probed / "out/features").iterdir()} == before
    assert (probed / "out/probe.json").read_text() == figures
    outcome = mammostream(
        f"probe --checkpoint {pretrained.byol} --shards {pretrained.shards} --labels {labels_csv} --class-names bright "
        f"--seeds 0 --bootstrap 0 --output-dir {probed}/out {SMALL}"
    )
    assert outcome.code == 0
    assert "without ImageNet: there are no ImageNet weights of resnet18_narrow" in outcome.err
    rows = json.loads((probed / "out/probe.json").read_text())["rows"]
    assert {row["network"] for row in rows} == {"pretrain/mammogram_byol_final", "random resnet18_narrow"}


def test_checkpoints_of_other_tiles_are_refused(pretrained, labels_csv, mammostream, tmp_path):
    checkpoint = load_checkpoint(pretrained.byol, "byol")
    checkpoint["preprocessing"]["pixel_spacing_mm"] = 0.05
    save_checkpoint(tmp_path / "other.pth", checkpoint)
    rest = f"--shards {pretrained.shards} --labels {labels_csv} --output-dir {tmp_path}/out"
    outcome = mammostream(f"probe --checkpoint {tmp_path}/other.pth {rest}")
    assert outcome.code == 2
    assert "pixel_spacing_mm 0.05" in outcome.error
    outcome = mammostream(f"probe --checkpoint {pretrained.byol} {rest} --seeds 0 x")
    assert outcome.code == 2
    assert "--seeds 0 x: give different whole numbers" in outcome.error
