"""Evaluation: the same figures as the training's own validation, and every row that does not fit is counted or refused."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mammostream.common.errors import BadInput
from mammostream.common.files import sha256_file
from mammostream.models.checkpoints import load_checkpoint, save_checkpoint
from mammostream.train.evaluate.doubts import warnings
from mammostream.train.evaluate.evaluate import choose_thresholds
from mammostream.train.evaluate.matching import match_labels
from mammostream.train.evaluate.metrics import evaluate_predictions
from mammostream.train.evaluate.reading import read_predictions, with_model
from mammostream.train.levels.calibration import PROB, TILE, Calibration, plain
from mammostream.train.report.report import write_report

MASS, CALC = "prob:mass", "prob:calc"


def make_tiles(n=24, seed=0):
    """Predictions of tiles of 4 films of 2 patients, and labels that they somewhat agree with."""
    rng = np.random.default_rng(seed)
    film = np.arange(n) % 4
    labels = pd.DataFrame({"mass": rng.integers(0, 2, n), "calc": rng.integers(0, 2, n)}, dtype=float)
    probabilities = 0.3 * labels + 0.7 * rng.random((n, 2))
    tiles = pd.DataFrame(
        {
            "key": [f"film{f}_y{i}_x0" for i, f in enumerate(film)],
            "image_id": [f"film{f}" for f in film],
            "patient_id": [f"P{f // 2}" for f in film],
            MASS: probabilities["mass"],
            CALC: probabilities["calc"],
        }
    )
    labels.insert(0, "tile_path", tiles["key"] + ".png")
    return tiles, labels


@pytest.fixture
def files(tmp_path):
    """Write predictions (by the ending of their name) and labels; return their paths."""

    def write(predictions, labels, name="predictions.parquet", facts=None):
        path = tmp_path / name
        if path.suffix == ".json":
            path.write_text(json.dumps(predictions))
        elif path.suffix == ".csv":
            predictions.to_csv(path, index=False)
        else:
            table = pa.Table.from_pandas(predictions, preserve_index=False)
            pq.write_table(table.replace_schema_metadata({"mammostream": json.dumps(facts or {})}), path)
        labels.to_csv(tmp_path / "labels.csv", index=False)
        return path, tmp_path / "labels.csv"

    return write


def match(paths, **options):
    return match_labels(read_predictions(paths[0], options.get("score", "max")), paths[1], **options)


def assert_rows(matched, labels, probabilities):
    """The matched rows, whatever their order."""
    rows = np.column_stack([matched.labels, matched.probabilities])
    expected = np.column_stack([labels, probabilities])
    assert rows.shape == expected.shape
    np.testing.assert_allclose(sorted(map(tuple, rows)), sorted(map(tuple, expected)))


# ---------------------------------------------------------------- the whole pipeline


def test_evaluation_gives_the_figures_of_the_trainings_own_validation(finetuned, mammostream, run_cli, tmp_path):
    model = finetuned.finetuned / "final_classification_model.pth"
    run_cli(f"infer --model-path {model} --shards {finetuned.shards} --output-dir {tmp_path}/infer --device cpu")
    command = (
        f"evaluate --predictions {tmp_path}/infer/predictions.parquet --labels {finetuned.val_csv} --model-path {model} "
        f"--output-dir {tmp_path}/out"
    )
    outcome = mammostream(command)
    assert outcome.code == 0, outcome.err
    wanted = json.loads((finetuned.finetuned / "metrics.json").read_text())
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    for name in finetuned.classes:
        for figure in wanted["per_class"][name].keys() - {"intervals", "calibration"}:
            assert metrics["per_class"][name][figure] == pytest.approx(wanted["per_class"][name][figure], abs=1e-4), figure
    for figure in ("mean_auc", "mean_ap", "exact_match", "brier", "ece"):
        assert metrics[figure] == pytest.approx(wanted[figure], abs=1e-4), figure
    labels = pd.read_csv(finetuned.val_csv)[finetuned.classes]
    val = int(labels.notna().any(axis=1).sum())
    others = len(pd.read_csv(finetuned.train_csv)) + len(labels) - val
    assert metrics["counts"]["matched"] == metrics["rows"] == val
    assert metrics["counts"]["predictions_without_label"] == others
    assert f"{others} predictions have no label (the first: " in outcome.err
    assert metrics["patients"] == 1
    for name in finetuned.classes:
        assert any(line.startswith(name) for line in outcome.out.splitlines())
    assert f"{metrics['mean_auc']:.3f}" in outcome.out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.yaml",
        "metrics.json",
        "precision_recall.png",
        "reliability.png",
        "roc.png",
    ]
    # Its own record runs it again, and the report takes it.
    assert mammostream(f"evaluate --config {tmp_path}/out/config.yaml --output-dir {tmp_path}/again").code == 0
    assert json.loads((tmp_path / "again/metrics.json").read_text()) == metrics
    assert write_report(tmp_path / "out", tmp_path / "page.html") == 3
    assert f"Evaluation of {val} tiles of 1 patients" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("name", ["p.parquet", "p.csv"])
def test_figures_are_those_of_the_joined_rows(name, files):
    tiles, labels = make_tiles()
    labels.loc[3, "mass"] = np.nan
    shuffled = labels.sample(frac=1, random_state=0)
    matched = match(files(tiles, shuffled, name))
    assert (matched.class_names, matched.level, matched.notes) == (["mass", "calc"], "tile", [])
    keyed = evaluate_predictions(
        labels[["mass", "calc"]].to_numpy(), tiles[[MASS, CALC]].to_numpy(), ["mass", "calc"], tiles["patient_id"].to_numpy()
    )
    found = evaluate_predictions(matched.labels, matched.probabilities, matched.class_names, matched.patients)
    for figures, expected in zip(found["per_class"].values(), keyed["per_class"].values(), strict=True):
        assert figures.pop("intervals") == {k: pytest.approx(v) for k, v in expected.pop("intervals").items()}
        assert figures == pytest.approx(expected)
    assert found["patients"] == 2


# ---------------------------------------------------------------- rows that do not fit


def test_what_does_not_match_is_counted_and_said(files):
    tiles, labels = make_tiles(10)
    tiles.loc[0, MASS] = np.nan  # failed
    tiles = pd.concat([tiles, tiles.iloc[[1, 2]]], ignore_index=True)
    tiles.loc[11, MASS] = 0.123  # the third contradicts itself
    labels = pd.concat([labels, labels.iloc[[3, 4]]], ignore_index=True)
    labels.loc[11, "mass"] = 1 - labels.loc[4, "mass"]  # the fifth contradicts itself
    labels.loc[5, ["mass", "calc"]] = np.nan
    labels.loc[6, "tile_path"] = "elsewhere.png"
    labels, tiles = (pd.concat([f, f.iloc[[9]]], ignore_index=True) for f in (labels, tiles))
    labels.loc[12, "tile_path"] = tiles.loc[12, "key"] = None
    matched = match(files(tiles, labels))
    assert matched.counts == {
        "labels_of_other_splits": 0,
        "labels_without_name": 1,
        "predictions_without_name": 1,
        "rows_without_label": 1,
        "failed_predictions": 1,
        "repeated_labels": 1,
        "combined_labels": 1,
        "repeated_predictions": 1,
        "conflicting_predictions": 1,
        "labels_without_prediction": 3,  # the failed one, the contradictory one, the one elsewhere
        "predictions_without_label": 2,  # of the empty label, of the one renamed
        "matched": 6,
        "unknown_patients": 0,
    }
    keep = [1, 3, 4, 7, 8, 9]
    labels.loc[4, "mass"] = 1  # in one of its two rows
    assert_rows(matched, labels.loc[keep, ["mass", "calc"]], tiles.loc[keep, [MASS, CALC]])
    assert len(matched.notes) == 10
    assert any("3 labels have no prediction (the first: film0_y0_x0)" in note for note in matched.notes)
    lost = {"failed prediction": 0, "conflicting predictions": 2, "no prediction": 6}
    for name in ("mass", "calc"):
        found = matched.left_out[name]
        for reason, row in lost.items():
            value = "positives" if labels.loc[row, name] == 1 else "negatives"
            assert found[value][reason] == 1
        assert sum(sum(reasons.values()) for reasons in found.values()) == 3


def test_one_row_and_degenerate_classes_are_undefined_not_guessed(files, mammostream, tmp_path):
    tiles, labels = make_tiles(6)
    labels["mass"] = 1
    labels["calc"] = [1] + [np.nan] * 5
    paths = files(tiles, labels)
    outcome = mammostream(f"evaluate --predictions {paths[0]} --labels {paths[1]} --output-dir {tmp_path}/out")
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("undefined") >= 6
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["mean_auc"] is metrics["per_class"]["mass"]["auc"] is metrics["per_class"]["calc"]["ap"] is None
    assert metrics["per_class"]["mass"]["brier"] == pytest.approx(((1 - tiles[MASS]) ** 2).mean())
    assert (tmp_path / "out/roc.png").stat().st_size > 1000

    paths = files(tiles.iloc[:1], labels)
    outcome = mammostream(f"evaluate --predictions {paths[0]} --labels {paths[1]}")
    assert outcome.code == 0, outcome.err
    assert "1 tiles of 1 patients" in outcome.out


BAD = {
    "nothing matches": (
        lambda t, y: (t, y.assign(tile_path="x.png")),
        "(the first of each: 'x' and 'film0_y0_x0')",
    ),
    "no common class": (lambda t, y: (t, y[["tile_path"]].assign(cyst=1)), "none of the predicted classes (mass, calc)"),
    "a word for a label": (lambda t, y: (t, y.assign(mass="yes")), "line 2, column 'mass': 'yes' is not 0, 1 or empty"),
    "logits": (lambda t, y: (t.assign(**{MASS: 3.5}), y), "column 'prob:mass': 3.5 is not a probability"),
    "no probabilities": (lambda t, y: (t[["key"]], y), "name no probabilities"),
    "no names": (lambda t, y: (t[[MASS]], y), "name no probabilities of tiles"),
    "labels of nothing": (lambda t, y: (t, y[["mass"]]), "do not name tiles"),
    "labels of breasts": (lambda t, y: (t, y[["mass"]].assign(patient_id="P0", laterality="L")), "do not name tiles"),
    "no labelled row": (lambda t, y: (t, y.assign(mass=np.nan, calc=np.nan)), "; 24 rows of the labels have no label at all"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_line(what, files, mammostream, tmp_path):
    change, message = BAD[what]
    paths = files(*change(*make_tiles()))
    outcome = mammostream(f"evaluate --predictions {paths[0]} --labels {paths[1]} --output-dir {tmp_path}/out")
    assert outcome.code == 2
    assert message in outcome.error
    assert not (tmp_path / "out").exists()


def test_files_that_are_none_are_one_line(files, mammostream, tmp_path):
    paths = files(*make_tiles())
    (tmp_path / "broken.json").write_text('{"images": 3}')
    (tmp_path / "nameless.json").write_text('[{"image_id": {"a": 1}, "probabilities": {"mass": 0.5}}]')
    for predictions, labels in (
        (tmp_path / "gone.parquet", paths[1]),
        (tmp_path / "gone.json", paths[1]),
        (tmp_path / "broken.json", paths[1]),
        (tmp_path / "nameless.json", paths[1]),
        (paths[1], paths[1]),
        (paths[0], tmp_path / "gone.csv"),
        (paths[0], tmp_path / "gone.parquet"),
    ):
        outcome = mammostream(f"evaluate --predictions {predictions} --labels {labels}")
        assert outcome.code == 2
        assert outcome.error


# ---------------------------------------------------------------- levels and names


@pytest.mark.parametrize("score", ["max", "top3"])
def test_labels_of_images_gather_tiles_or_take_the_image_table(score, files):
    tiles, _ = make_tiles()
    labels = pd.DataFrame({"image_id": ["film0", "film1", "film2", "film3"], "label:mass": [0, 1, 0, 1]})
    best = tiles.groupby("image_id")[MASS].apply(lambda p: p.max() if score == "max" else p.nlargest(3).mean())
    matched = match(files(tiles, labels), score=score)
    assert (matched.level, matched.class_names) == ("image", ["mass"])
    assert_rows(matched, labels[["label:mass"]], best.loc[labels["image_id"]].to_numpy()[:, None])
    assert set(matched.patients) == {"patient:P0", "patient:P1"}
    images = pd.DataFrame({"image_id": best.index, "max:mass": best.to_numpy(), "top3:mass": best.to_numpy()})
    again = match(files(images, labels), score=score)
    assert_rows(again, matched.labels, matched.probabilities)


def test_a_manifest_labels_images(files, tmp_path):
    tiles, _ = make_tiles()
    manifest = pd.DataFrame({"image_id": [f"film{i}" for i in range(4)], "label:mass": pd.array([0, 1, None, 1], "Int8")})
    manifest.to_parquet(tmp_path / "manifest.parquet")
    paths = files(tiles, manifest)
    matched = match((paths[0], tmp_path / "manifest.parquet"))
    assert (len(matched.labels), matched.counts["rows_without_label"]) == (3, 1)


def test_breasts_join_by_patient_and_side(files):
    predictions = pd.DataFrame({"patient_id": ["1", "1", "2"], "laterality": ["L", "R", "L"], "max:mass": [0.1, 0.8, 0.6]})
    labels = pd.DataFrame({"patient_id": [1, 1, 1, 2], "laterality": ["L", "R", "R", "L"], "mass": [0, 1, 1, 0]})
    matched = match(files(predictions, labels))
    assert (matched.level, matched.counts["repeated_labels"]) == ("breast", 1)
    assert_rows(matched, [[0], [1], [0]], [[0.1], [0.8], [0.6]])
    assert set(matched.patients) == {"patient:1", "patient:2"}


@pytest.mark.parametrize("ours", [True, False])
def test_json_of_images(ours, files):
    if ours:
        images = [{"image": f"film{i}", "probabilities": {"mass": i / 4}} for i in range(3)]
        predictions = {"threshold": 0.3, "class_names": ["mass"], "images": [*images, {"image": "film3", "error": "cut"}]}
    else:
        predictions = [{"image_path": f"film{i}", "predictions": {"mass": i / 4}} for i in range(3)]
    labels = pd.DataFrame({"image_id": [f"film{i}" for i in range(4)], "mass": [0, 0, 1, 1], "patient_id": list("aabb")})
    paths = files(predictions, labels, "p.json")
    matched = match(paths)
    assert_rows(matched, [[0], [0], [1]], [[0], [0.25], [0.5]])
    assert matched.counts["labels_without_prediction"] == 1
    assert set(matched.patients) == {"patient:a", "patient:b"}
    assert choose_thresholds(read_predictions(paths[0]), ["mass"], "image")[0] == [0.3 if ours else None]


def test_tile_images_join_by_name_and_by_folder_where_names_repeat(files):
    predictions = pd.DataFrame({"key": ["a", "b.c"], "image_id": ["/data/p1/a.png", "/data/p2/b.c.png"], MASS: [0.2, 0.7]})
    labels = pd.DataFrame({"tile_path": ["p1/a.png", "b.c.png"], "mass": [0, 1]})
    assert_rows(match(files(predictions, labels)), [[0], [1]], [[0.2], [0.7]])
    predictions = pd.DataFrame({"key": ["a", "a"], "image_id": ["/data/p1/a.png", "/data/p2/a.png"], MASS: [0.2, 0.7]})
    labels = pd.DataFrame({"tile_path": ["p1/a.png", "p2/a.png"], "mass": [0, 1]})
    matched = match(files(predictions, labels))
    assert_rows(matched, [[0], [1]], [[0.2], [0.7]])
    assert matched.counts["unknown_patients"] == len(set(matched.patients)) == 2


def test_patients_come_from_the_predictions_the_labels_or_are_unknown(files):
    tiles, labels = make_tiles(8)
    nameless = tiles.drop(columns="patient_id")
    assert set(match(files(tiles, labels.assign(patient_id="other"))).patients) == {"patient:P0", "patient:P1"}
    named = labels.assign(woman=["x", "y"] * 4)
    assert set(match(files(nameless, named), patient_column="woman").patients) == {"patient:x", "patient:y"}
    matched = match(files(nameless, labels))
    assert set(matched.patients) == {f"image:film{i}" for i in range(4)}
    assert matched.counts["unknown_patients"] == 8
    assert any("patients of 8 rows are unknown" in note for note in matched.notes)
    # Tiles of a folder: their film is what their names share.
    folder = nameless.assign(image_id="/tiles/" + nameless["key"] + ".png")
    assert set(match(files(folder, labels)).patients) == {f"image:film{i}" for i in range(4)}


# ---------------------------------------------------------------- thresholds


def test_thresholds_are_given_or_the_models_or_the_files_or_half(files, finetuned, tmp_path):
    tiles, labels = make_tiles()
    bare = read_predictions(files(tiles, labels)[0])
    assert choose_thresholds(bare, ["mass", "calc"], "tile") == ([None, None], "none fitted: 0.5")
    for recorded in ({"mass": 0.4, "calc": None}, [0.4, None]):  # by earlier versions
        path, _ = files(tiles, labels, "own.parquet", {"thresholds": recorded, "class_names": ["mass", "calc"]})
        own = read_predictions(path)
        assert choose_thresholds(own, ["calc", "mass"], "tile") == ([None, 0.4], "the predictions")
        assert choose_thresholds(own, ["calc", "mass"], "tile", 0.7)[0] == [0.7, 0.7]
        chosen, why = choose_thresholds(own, ["calc", "mass"], "image")
        assert chosen == [None, None]
        assert "has thresholds of tiles only, which do not hold for images" in why

    checkpoint = load_checkpoint(finetuned.finetuned / "final_classification_model.pth", "classifier")
    model = tmp_path / "model.pth"
    checkpoint |= {"class_names": ["calc", "mass"], "thresholds": [0.2, None], "calibration": None}
    save_checkpoint(model, checkpoint)
    assert choose_thresholds(with_model(own, model), ["mass", "calc"], "tile")[0] == [None, 0.2]
    of_it, _ = files(tiles, labels, "of_it.parquet", {"model_sha256": sha256_file(model)})
    assert choose_thresholds(with_model(read_predictions(of_it), model), ["calc"], "tile")[0] == [0.2]
    # Predictions at another temperature record thresholds that were moved along; the model's own would not fit them.
    for temperature, expected, source in ((1.0, 0.2, str(model)), (2.0, 0.4, "the predictions")):
        calibration = plain({TILE: {PROB: Calibration.of_temperature(temperature, [0.4, None])}})
        facts = {"class_names": ["calc", "mass"], "calibration": calibration, "temperature": temperature}
        hot = with_model(read_predictions(files(tiles, labels, "hot.parquet", facts)[0]), model)
        assert choose_thresholds(hot, ["calc"], "tile") == ([expected], source)
    other, _ = files(tiles, labels, "other.parquet", {"model_sha256": "0" * 64})
    with pytest.raises(BadInput, match="the predictions are not of"):
        with_model(read_predictions(other), model)


def levels_of(**thresholds):
    """Calibrations that leave probabilities as they are at tiles, and halve the odds of images."""
    identity, half = np.zeros(2), np.full(2, np.log(0.5))
    counts = ((9, 9), (9, 9))
    one = Calibration(np.ones(2), identity, (0.3, 0.4), ("fitted",) * 2, *counts)
    image = Calibration(np.ones(2), half, thresholds.get("image", (0.6, 0.7)), ("fitted",) * 2, *counts)
    return {"tile": {"prob": one}, "image": {"max": image, "top3": image}, "breast": {"max": image}}


def test_each_level_has_its_own_thresholds_and_probabilities(files):
    tiles, _ = make_tiles()
    facts = {"calibration": plain(levels_of()), "class_names": ["calc", "mass"], "thresholds": {"calc": 0.3, "mass": 0.4}}
    labels = pd.DataFrame({"image_id": [f"film{i}" for i in range(4)], "mass": [0, 1, 0, 1]})
    path, labels_path = files(tiles, labels, facts=facts)
    predictions = read_predictions(path)
    assert choose_thresholds(predictions, ["mass", "calc"], "tile") == ([0.4, 0.3], "the predictions")
    assert choose_thresholds(predictions, ["mass", "calc"], "image")[0] == [0.7, 0.6]
    assert choose_thresholds(predictions, ["mass"], "breast")[0] == [0.7]
    matched = match_labels(predictions, labels_path)
    best = tiles.groupby("image_id")[MASS].max()
    assert_rows(matched, labels[["mass"]], (best / (2 - best)).to_numpy()[:, None])  # odds halved
    nothing = read_predictions(path, "noisy_or")
    assert choose_thresholds(nothing, ["mass"], "image")[0] == [None]


# ---------------------------------------------------------------- who is counted


def test_a_breast_is_positive_where_one_view_is(files):
    """Of breasts whose two views disagree, all were left out once: 34 of 83 positives, and an AUC of 0.967 for 0.831."""
    rng = np.random.default_rng(0)
    breasts = pd.DataFrame({"patient_id": np.repeat(np.arange(100), 2), "laterality": ["L", "R"] * 100})
    positive = rng.random(200) < 0.4
    both = positive & (rng.random(200) < 0.6)
    views = pd.concat([breasts.assign(view="CC", mass=positive.astype(int)), breasts.assign(view="MLO", mass=both.astype(int))])
    score = np.clip(0.3 * positive + 0.3 * both + 0.5 * rng.random(200), 0, 1)  # one view alone is harder to see
    paths = files(breasts.assign(**{"max:mass": score}), views)
    matched = match(paths)
    assert len(matched.labels) == 200
    assert matched.labels.sum() == positive.sum()
    assert matched.counts["combined_labels"] == (positive & ~both).sum() > 20
    assert matched.left_out == {"mass": {"positives": {}, "negatives": {}}}
    assert warnings(matched) == []
    found = evaluate_predictions(matched.labels, matched.probabilities, ["mass"], matched.patients, bootstrap=0)
    agree = ~(positive & ~both)
    flattered = evaluate_predictions(positive[agree, None].astype(float), score[agree, None], ["mass"], np.arange(agree.sum()))
    assert found["per_class"]["mass"]["auc"] < flattered["per_class"]["mass"]["auc"] - 0.02


def test_a_missing_view_leaves_a_breast_unlabelled_unless_the_other_is_positive(files):
    predictions = pd.DataFrame({"patient_id": ["1", "1"], "laterality": ["L", "R"], "max:mass": [0.1, 0.8]})
    labels = pd.DataFrame({"patient_id": ["1"] * 4, "laterality": ["left", "left", "R", "R"], "mass": [0, None, 1, None]})
    matched = match(files(predictions, labels))
    assert_rows(matched, [[1]], [[0.8]])


def test_what_is_left_out_is_warned_of_by_class_and_reason(files, mammostream, tmp_path):
    tiles, labels = make_tiles(40)
    labels["mass"] = ([1] * 10 + [0] * 30)[: len(labels)]
    tiles.loc[[0, 1], [MASS, CALC]] = np.nan  # two positives cannot be read
    paths = files(tiles.drop(index=30), labels)
    outcome = mammostream(f"evaluate --predictions {paths[0]} --labels {paths[1]} --output-dir {tmp_path}/out")
    first = outcome.out.splitlines()[0]
    assert first.startswith("warning: mass: 2 of 10 positive and 1 of 30 negative tiles are not judged (")
    assert "2 failed prediction" in first
    assert "1 no prediction" in first
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["warnings"][0] == first
    assert metrics["per_class"]["mass"]["left_out"] == {
        "positives": {"failed prediction": 2},
        "negatives": {"no prediction": 1},
    }
    assert any("2 pos., 1 neg." in line for line in outcome.out.splitlines() if line.startswith("mass"))
    few = files(tiles[2:], labels[10:])
    outcome = mammostream(f"evaluate --predictions {few[0]} --labels {few[1]}")
    assert outcome.out.startswith("warning: 8 of 38 predicted tiles have no label and are not judged")


def test_splits_that_nobody_predicted_are_not_missed(files):
    tiles, _ = make_tiles()
    labels = pd.DataFrame(
        {"image_id": [f"film{i}" for i in range(8)], "mass": [0, 1] * 4, "split": ["test"] * 5 + ["train"] * 3}
    )
    matched = match(files(tiles, labels))
    assert matched.counts["labels_of_other_splits"] == 3
    assert matched.left_out["mass"] == {"positives": {}, "negatives": {"no prediction": 1}}  # film4 is of the test split


def test_images_whose_tiles_all_failed_are_failed_predictions(files):
    tiles, _ = make_tiles()
    tiles.loc[tiles["image_id"] == "film2", [MASS, CALC]] = np.nan
    labels = pd.DataFrame({"image_id": [f"film{i}" for i in range(4)], "mass": [0, 1, 1, 1]})
    matched = match(files(tiles, labels))
    assert matched.left_out["mass"] == {"positives": {"failed prediction": 1}, "negatives": {}}


def test_labels_of_tiles_give_those_of_predicted_images(files):
    images = pd.DataFrame({"image_id": ["1.2.840", "b", "c"], "max:mass": [0.1, 0.8, 0.3]})
    labels = pd.DataFrame(
        {
            "tile_path": ["1%2E2%2E840_y0_x0", "1.2.840_y0_x64.png", "b_y0_x0", "b_y0_x64", "c_y0_x0", "c_y0_x64"],
            "mass": [0, 0, 0, 1, 0, None],
        }
    )
    matched = match(files(images, labels))
    assert matched.level == "image"
    assert_rows(matched, [[0], [1]], [[0.1], [0.8]])  # one tile of c might be positive


def test_ids_that_are_spelled_otherwise_join(files):
    predictions = pd.DataFrame({"patient_id": ["10006", "P2"], "laterality": ["L", "R"], "max:mass": [0.1, 0.8]})
    labels = pd.DataFrame({"patient_id": ["10006.0", " P2"], "laterality": ["LEFT", "right"], "mass": [0, 1]})
    assert_rows(match(files(predictions, labels)), [[0], [1]], [[0.1], [0.8]])


def test_patients_that_the_model_knows_are_warned_of(files, mammostream, tmp_path):
    tiles, labels = make_tiles()
    tiles["seen"] = np.where(tiles["patient_id"] == "P0", "trained", "validated")
    paths = files(tiles, labels)
    outcome = mammostream(f"evaluate --predictions {paths[0]} --labels {paths[1]} --output-dir {tmp_path}/out")
    lines = outcome.out.splitlines()
    assert lines[0].startswith(
        "warning: the model was trained on 1 of these 2 patients (12 of 24 tiles): the figures are flattered"
    )
    assert lines[1].startswith("warning: the model was chosen and calibrated on 1 of these 2 patients (12 of 24 tiles)")
    seen = json.loads((tmp_path / "out/metrics.json").read_text())["seen"]
    assert seen["trained"] == seen["validated"] == {"rows": 12, "patients": 1}
    assert seen["pre-trained"] == {"rows": 0, "patients": 0}
    tiles["seen"] = "pre-trained"
    assert warnings(match(files(tiles, labels))) == []


def test_the_threshold_decides_balanced_accuracy_and_exact_match(files, mammostream, tmp_path):
    tiles, labels = make_tiles()
    paths = files(tiles, labels)
    for threshold in (0.2, 0.6):
        run = f"evaluate --predictions {paths[0]} --labels {paths[1]} --threshold {threshold} --output-dir {tmp_path}/out"
        assert mammostream(f"{run} --bootstrap 0").code == 0
        metrics = json.loads((tmp_path / "out/metrics.json").read_text())
        found = (tiles[[MASS, CALC]].to_numpy() >= threshold) == labels[["mass", "calc"]].to_numpy()
        assert metrics["exact_match"] == pytest.approx(found.all(1).mean())
        assert metrics["per_class"]["calc"]["accuracy"] == pytest.approx(found[:, 1].mean())
        assert set(metrics["intervals"].values()) == {None}
