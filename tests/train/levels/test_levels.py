"""From tiles to images and breasts: scores, labels, calibrations of each level, and figures from fits on other patients."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit
from sklearn.metrics import roc_auc_score

from mammostream.train.evaluate.metrics import expected_calibration_error
from mammostream.train.levels.aggregation import Groups, aggregate, logits_of, noisy_or_logits, unit_logits
from mammostream.train.levels.calibration import FITTED, Calibration
from mammostream.train.levels.fitting import TileLogits, cross_fitted, fit_levels, judge
from mammostream.train.levels.labels import labels_of_units


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(1, 6), st.integers(1, 3), st.integers(1, 4))
def test_scores_of_many_units_at_once_are_those_of_the_stream(seed, rows, units, classes, top):
    rng = np.random.default_rng(seed)
    unit = np.unique(rng.integers(0, units, rows), return_inverse=True)[1]
    p = rng.choice([0.0, 1e-6, 0.2, 0.5, 0.999, 1.0], (rows, classes))
    names = [f"c{c}" for c in range(classes)]
    tiles = pd.DataFrame({"image_id": unit} | {f"prob:{name}": p[:, c] for c, name in enumerate(names)})
    groups = Groups(["image_id"], names, top)
    for start in range(0, rows, 7):  # in parts
        groups.add(tiles[start : start + 7])
    streamed = groups.table().sort_values("image_id")
    identity = Calibration(np.ones(classes), np.zeros(classes), (None,) * classes, (FITTED,) * classes)
    at_once = unit_logits(p, unit, top)
    calibrated = groups.table(dict.fromkeys(at_once, identity)).sort_values("image_id")
    for score, logits in at_once.items():
        columns = [f"{score}:{name}" for name in names]
        np.testing.assert_allclose(expit(logits), streamed[columns], atol=1e-6)
        np.testing.assert_allclose(calibrated[columns], streamed[columns], atol=1e-6)


def test_noisy_or_tells_images_apart_that_round_to_1():
    tiles = np.array([200, 1000, 5000])
    logits = noisy_or_logits(tiles * np.log1p(-0.3))
    assert (-np.expm1(tiles * np.log1p(-0.3)) == 1).all()
    assert (np.diff(logits) > 0).all()
    assert noisy_or_logits(np.log1p(-np.array([0.25]))) == pytest.approx(logit(0.25))
    assert np.isfinite(noisy_or_logits(np.array([0.0, -np.inf]))).all()
    assert np.isfinite(logits_of(np.array([0.0, 1.0]))).all()


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from([0.0, 1.0, np.nan])), min_size=1, max_size=40))
def test_labels_of_units(parts):
    unit = np.unique([u for u, _ in parts], return_inverse=True)[1]
    labels = np.array([[label] for _, label in parts])
    found = labels_of_units(labels, unit)[:, 0]
    for u, label in enumerate(found):
        own = labels[unit == u, 0]
        if (own == 1).any():
            assert label == 1
        elif np.isnan(own).any():
            assert np.isnan(label)
        else:
            assert label == 0


def tiles_of_films(patients=300, films=2, tiles=40, seed=0):
    """Films of 40 tiles; a tenth of the films have 3 positive tiles. The network's logits are far too high."""
    rng = np.random.default_rng(seed)
    film = np.repeat(np.arange(patients * films), tiles)
    labels = np.zeros(len(film))
    for f in rng.permutation(patients * films)[: patients * films // 10]:
        labels[f * tiles : f * tiles + 3] = 1
    logits = 2.0 * rng.standard_normal(len(film)) + 3.5 * labels + 1.0
    patient = np.char.add("P", (film // films).astype(str))
    breast = np.char.add(patient, np.where(film % 2 == 0, " L", " R"))
    return TileLogits(labels[:, None], logits[:, None], np.char.add("f", film.astype(str)), breast, patient)


def test_each_level_has_probabilities_of_its_own():
    fitted = fit_levels(tiles_of_films(seed=1))
    held_out = tiles_of_films(seed=2)
    judged = judge(held_out, fitted)
    assert set(judged) == {
        ("tile", "prob"),
        *((level, score) for level in ("image", "breast") for score in ("max", "top3", "noisy_or")),
    }
    tile_threshold = fitted["tile"]["prob"].thresholds[0]
    raw = unit_logits(judged["tile", "prob"].probabilities, np.unique(held_out.images, return_inverse=True)[1])
    for (level, score), rows in judged.items():
        y, p = rows.labels[:, 0], rows.probabilities[:, 0]
        assert expected_calibration_error(y, p) < 0.06, (level, score)
        if level == "image":
            assert roc_auc_score(y, p) == pytest.approx(roc_auc_score(y, raw[score][:, 0]))
            normal = y == 0
            # By the tiles' threshold nearly every normal film is found, by the images' own most are not.
            assert (expit(raw["max"][normal, 0]) >= tile_threshold).mean() > 0.9
            assert rows.found[normal, 0].mean() < 0.5
            assert rows.found[~normal, 0].mean() > 0.6
    raw_median = np.median(expit(raw["noisy_or"][judged["image", "max"].labels[:, 0] == 0, 0]))
    assert np.median(judged["image", "noisy_or"].probabilities) < raw_median / 2


def test_figures_from_other_patients_are_less_flattered():
    """Few patients and logits without any information: what the fit finds on its own data is not there on others'."""
    rng = np.random.default_rng(5)
    n = 400
    patients = np.char.add("P", (np.arange(n) // 20).astype(str))
    labels = (rng.random((n, 8)) < 0.3).astype(float)
    tiles = TileLogits(labels, rng.standard_normal((n, 8)), np.arange(n).astype(str), np.full(n, ""), patients)
    own = judge(tiles, fit_levels(tiles))["tile", "prob"]
    crossed, folds = cross_fitted(tiles)
    other = crossed["tile", "prob"]
    assert folds == 5
    assert sorted(map(tuple, other.labels.tolist())) == sorted(map(tuple, own.labels.tolist()))

    def accuracy(rows):
        hits = [rows.found[rows.labels[:, c] == v, c].mean() for c in range(8) for v in (1, 0)]
        return np.mean([(hits[2 * c] + 1 - hits[2 * c + 1]) / 2 for c in range(8)])

    assert accuracy(own) > 0.52
    assert accuracy(other) == pytest.approx(0.5, abs=0.02)


def test_no_patient_is_judged_by_its_own_fit(monkeypatch):
    tiles = tiles_of_films(patients=12)
    seen = []

    def fit(rows):
        seen.append(set(rows.groups))
        return fit_levels(rows)

    monkeypatch.setattr("mammostream.train.levels.fitting.fit_levels", fit)
    crossed, folds = cross_fitted(tiles)
    assert len(seen) == folds == 5
    held_out = [set(tiles.groups) - groups for groups in seen]
    assert sorted(patient for groups in held_out for patient in groups) == sorted(set(tiles.groups))
    assert len(crossed["image", "max"].labels) == len(set(tiles.images))
    assert cross_fitted(tiles.take(tiles.groups == "P0")) == ({}, 0)


def test_tiles_without_films_have_no_levels():
    tiles = tiles_of_films(patients=5)
    nameless = TileLogits(
        tiles.labels, tiles.logits, np.full(len(tiles.labels), ""), np.full(len(tiles.labels), ""), tiles.groups
    )
    assert set(fit_levels(nameless)) == {"tile"}


def test_a_table_is_calibrated_where_there_is_a_calibration():
    tiles = pd.DataFrame({"image_id": ["a", "a", "b"], "prob:mass": [0.5, 0.2, 0.1]})
    shift = Calibration(np.array([1.0]), np.array([-2.0]), (0.3,), (FITTED,))
    raw, calibrated = aggregate(tiles, ["image_id"]), aggregate(tiles, ["image_id"], calibration={"max": shift})
    np.testing.assert_allclose(calibrated["max:mass"], expit(logit(raw["max:mass"]) - 2))
    np.testing.assert_allclose(calibrated["top3:mass"], raw["top3:mass"])
