"""Images and breasts have probabilities and thresholds of their own: in tables, JSON, on the console; who was fitted on."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit, logit

from mammostream.models.checkpoints import load_checkpoint, save_checkpoint
from mammostream.shards import open_shards
from mammostream.shards.identity import subject_hashes
from mammostream.train.levels.calibration import Calibration, plain

SLOPE, SHIFT = np.array([0.7, 1.3]), np.array([-1.5, 0.5])
TILE_THRESHOLDS, IMAGE_THRESHOLDS, BREAST_THRESHOLDS = (0.3, 0.3), (0.99, 0.9998), (0.4, 0.6)


@pytest.fixture(scope="module")
def levels_model(sharp_classifier, finetuned, tmp_path_factory):
    """A classifier with calibrations of all levels, trained on one of the two patients."""

    def one(thresholds, slope=SLOPE, shift=SHIFT):
        return Calibration(slope, shift, thresholds, ("fitted",) * 2, (50, 50), (50, 50))

    calibrations = {
        "tile": {"prob": one(TILE_THRESHOLDS, slope=np.array([1.0, 2.0]), shift=np.array([0.5, -0.5]))},
        "image": {score: one(IMAGE_THRESHOLDS) for score in ("max", "top3", "noisy_or")},
        "breast": {score: one(BREAST_THRESHOLDS, shift=SHIFT - 1) for score in ("max", "top3", "noisy_or")},
    }
    train = open_shards(finetuned.shards).tiles("train")
    fitted_on = {"trained": np.unique(subject_hashes(train["patient_id"], train["image_id"])).tolist(), "validated": []}
    path = tmp_path_factory.mktemp("levels") / "model.pth"
    checkpoint = load_checkpoint(sharp_classifier, "classifier")
    save_checkpoint(path, checkpoint | {"calibration": plain(calibrations), "fitted_on": fitted_on})
    return path


@pytest.fixture(scope="module")
def predicted(levels_model, finetuned, run_cli, tmp_path_factory):
    folder = tmp_path_factory.mktemp("predicted")
    run_cli(
        f"infer --model-path {levels_model} --shards {finetuned.shards} --output-dir {folder} --output-json {folder}/i.json "
        "--device cpu --sheet-tiles 0"
    )
    return folder


def table(folder, name):
    return pd.read_parquet(folder / f"{name}.parquet")


def test_scores_of_images_and_breasts_are_calibrated(predicted, sharp_classifier, finetuned, run_cli, tmp_path):
    predict = f"infer --model-path {sharp_classifier} --shards {finetuned.shards} --device cpu --sheet-tiles 0"
    run_cli(f"{predict} --output-dir {tmp_path}")
    tiles, plain_tiles = table(predicted, "predictions"), table(tmp_path, "predictions")
    for c, name in enumerate(finetuned.classes):
        expected = expit([1.0, 2.0][c] * logit(plain_tiles[f"prob:{name}"].astype(float)) + [0.5, -0.5][c])
        np.testing.assert_allclose(tiles[f"prob:{name}"], expected, atol=1e-5)
    for kind, by, shift in (("image", "image_id", SHIFT), ("breast", "patient_id", SHIFT - 1)):
        rows = table(predicted, f"{kind}_predictions").set_index(by)
        for c, name in enumerate(finetuned.classes):
            for unit, p in tiles.groupby(by)[f"prob:{name}"]:
                p = p.astype(float)
                raw = {"max": p.max(), "top3": p.nlargest(3).mean()}
                for score, value in raw.items():
                    assert rows.loc[unit, f"{score}:{name}"] == pytest.approx(
                        expit(SLOPE[c] * logit(value) + shift[c]), abs=1e-4
                    )
                none = np.log1p(-p).sum()
                noisy = SLOPE[c] * (np.log(-np.expm1(none)) - none) + shift[c]
                assert rows.loc[unit, f"noisy_or:{name}"] == pytest.approx(expit(noisy), abs=1e-4)


def test_decisions_are_the_levels_own(predicted, levels_model, finetuned, mammostream, tmp_path):
    images = table(predicted, "image_predictions").set_index("image_id")
    answers = {image["image"]: image for image in json.loads((predicted / "i.json").read_text())["images"]}
    decided = {
        image_id: [n for n, t in zip(finetuned.classes, IMAGE_THRESHOLDS, strict=True) if row[f"max:{n}"] >= t]
        for image_id, row in images.iterrows()
    }
    assert {image_id: answer["positive"] for image_id, answer in answers.items()} == decided
    by_tiles = [row[f"max:{n}"] >= 0.3 for _, row in images.iterrows() for n in finetuned.classes]
    assert sum(map(len, decided.values())) != sum(by_tiles)  # the tiles' thresholds decide otherwise
    film = next(finetuned.films.glob("*.dcm"))
    predict = f"infer --model-path {levels_model} --image-path {film} --assume-spacing 0.2 --device cpu"
    outcome = mammostream(f"{predict} --output-json {tmp_path}/film.json")
    (answer,) = json.loads((tmp_path / "film.json").read_text())["images"]
    marks = {
        line.split()[1].rstrip(":"): line.split()[0] for line in outcome.out.splitlines() if line.strip()[:1] in ("✅", "❌")
    }
    assert marks == {n: "✅" if n in answer["positive"] else "❌" for n in finetuned.classes}
    assert answer["positive"] == [
        n for n, t in zip(finetuned.classes, IMAGE_THRESHOLDS, strict=True) if answer["probabilities"][n] >= t
    ]


def test_evaluation_takes_the_levels_own(predicted, levels_model, finetuned, mammostream, tmp_path):
    images = table(predicted, "image_predictions")
    labels = images[["image_id", "patient_id", "laterality"]].assign(**dict.fromkeys(finetuned.classes, 0))
    labels.loc[0, finetuned.classes] = 1
    labels.to_csv(tmp_path / "labels.csv", index=False)
    expected = {"predictions": IMAGE_THRESHOLDS, "image_predictions": IMAGE_THRESHOLDS, "breast_predictions": BREAST_THRESHOLDS}
    for name, thresholds in expected.items():
        for model in ("", f" --model-path {levels_model}"):
            paths = f"--predictions {predicted}/{name}.parquet --labels {tmp_path}/labels.csv --output-dir {tmp_path}/e"
            outcome = mammostream(f"evaluate {paths}{model}")
            assert outcome.code == 0, outcome.err
            metrics = json.loads((tmp_path / "e/metrics.json").read_text())
            assert [metrics["per_class"][n]["threshold"] for n in finetuned.classes] == list(thresholds)
            assert metrics["seen"]["trained"] == {"rows": 1, "patients": 1}
            assert outcome.out.startswith("warning: the model was trained on 1 of these 2 patients (1 of 2")


def test_tables_say_whom_the_model_was_fitted_on(predicted, finetuned):
    train = set(open_shards(finetuned.shards).tiles("train")["patient_id"])
    for name in ("predictions", "image_predictions", "breast_predictions"):
        rows = table(predicted, name)
        assert (rows["seen"] == np.where(rows["patient_id"].isin(train), "trained", "")).all()
        assert set(rows["seen"]) == {"trained", ""}


def test_tile_images_are_judged_as_tiles(levels_model, finetuned, run_cli, tmp_path):
    run_cli(f"shards unpack {finetuned.shards} --split val --output-dir {tmp_path}/tiles")
    run_cli(
        f"infer --model-path {levels_model} --images-dir {tmp_path}/tiles --images-are tiles --output-json {tmp_path}/t.json "
        f"--output-dir {tmp_path}/out --device cpu --sheet-tiles 0"
    )
    tiles, images = table(tmp_path / "out", "predictions"), table(tmp_path / "out", "image_predictions")
    for name in finetuned.classes:
        np.testing.assert_allclose(images[f"max:{name}"], tiles[f"prob:{name}"], atol=1e-6)
    answers = json.loads((tmp_path / "t.json").read_text())["images"]
    assert [a["positive"] for a in answers] == [
        [n for n in finetuned.classes if row[f"max:{n}"] >= 0.3] for _, row in images.iterrows()
    ]


def test_given_thresholds_hold_at_all_levels_and_a_temperature_ends_calibration(
    levels_model, finetuned, run_cli, capfd, tmp_path
):
    predict = f"infer --model-path {levels_model} --shards {finetuned.shards} --device cpu --sheet-tiles 0"
    run_cli(f"{predict} --threshold 0.9 --output-dir {tmp_path}/threshold")
    assert "no calibration" not in capfd.readouterr().err
    facts = json.loads((tmp_path / "threshold/infer.json").read_text())
    assert {t for scores in facts["calibration"].values() for c in scores.values() for t in c["thresholds"]} == {0.9}
    capfd.readouterr()
    run_cli(f"{predict} --temperature 2 --output-dir {tmp_path}/temperature")
    warned = capfd.readouterr().err
    images = table(tmp_path / "temperature", "image_predictions")
    median = images[f"noisy_or:{finetuned.classes[0]}"].median()
    assert f"median noisy_or of 2 images: {finetuned.classes[0]} {median:.2f}" in warned
    facts = json.loads((tmp_path / "temperature/infer.json").read_text())
    assert facts["calibration"].keys() == {"tile"}
    tiles, images = (table(tmp_path / "temperature", name) for name in ("predictions", "image_predictions"))
    name = finetuned.classes[0]
    assert images.set_index("image_id")[f"max:{name}"].to_dict() == pytest.approx(
        tiles.groupby("image_id")[f"prob:{name}"].max().to_dict()
    )
