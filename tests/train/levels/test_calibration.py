"""Calibration: what a score means as a probability, for losses that do not output probabilities; thresholds."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score

from mammostream.train.evaluate.metrics import expected_calibration_error
from mammostream.train.levels.calibration import (
    AT_BOUND,
    FEW,
    FITTED,
    GIVEN,
    SHIFTED,
    UNFITTED,
    Calibration,
    calibrations_of,
    doubts,
    fit_calibration,
    fit_thresholds,
    plain,
    stored_calibrations,
)

PREVALENCE = 0.025
POS_WEIGHT = (1 - PREVALENCE) / PREVALENCE


def tiles_of_low_prevalence(count=100_000):
    """True probabilities with a mean of 2.5 %, and labels drawn from them."""
    rng = np.random.default_rng(0)
    evidence = 2 * rng.standard_normal(count)
    probabilities = expit(evidence + brentq(lambda shift: expit(evidence + shift).mean() - PREVALENCE, -20, 5))
    return probabilities, (rng.random(count) < probabilities).astype(float)


def optimum(probabilities, loss):
    """Return the logits at which a network's expected loss is lowest, for each true probability."""
    grid = np.linspace(-14, 14, 2801)
    known = np.quantile(probabilities, np.linspace(0, 1, 400))
    best = [grid[np.argmin(p * loss(grid, 1.0) + (1 - p) * loss(grid, 0.0))] for p in known]
    return np.interp(probabilities, known, best)


def weighted_smoothed(z, y, weight=POS_WEIGHT, smoothing=0.1):
    """Binary cross entropy with a weight for positives and smoothed labels, as 'finetune' had it."""
    target = y * (1 - smoothing) + smoothing / 2
    return weight * target * np.logaddexp(0, -z) + (1 - target) * np.logaddexp(0, z)


def asymmetric(z, y):
    shifted = np.maximum(expit(z) - 0.05, 1e-8)
    return y * np.logaddexp(0, -z) - (1 - y) * shifted**4 * np.log1p(-shifted)


@pytest.mark.parametrize(
    ("loss", "raw"),
    [
        (weighted_smoothed, 0.5),
        (lambda z, y: weighted_smoothed(z, y, smoothing=0.0), 0.2),
        (asymmetric, 0.09),
        (lambda z, y: weighted_smoothed(z, y, weight=1.0, smoothing=0.0), 0.0),
    ],
)
def test_any_loss_gives_probabilities(loss, raw):
    """One temperature left an ECE of 0.487, 0.226 and 0.097: it cannot move a logit of 0 away from 0.5."""
    probabilities, labels = tiles_of_low_prevalence()
    logits = optimum(probabilities, loss)
    half = len(labels) // 2
    fitted = fit_calibration(labels[:half, None], logits[:half, None])
    assert fitted.fits == (FITTED,)
    assert expected_calibration_error(labels[half:], expit(logits[half:])) >= raw
    assert expected_calibration_error(labels[half:], fitted(logits[half:, None])[:, 0]) < 0.008


def test_the_fit_is_that_of_a_logistic_regression():
    probabilities, labels = tiles_of_low_prevalence(20_000)
    logits = 3 * logit(probabilities) + 7
    fitted = fit_calibration(labels[:, None], logits[:, None])
    expected = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(logits[:, None], labels)
    assert fitted.slope[0] == pytest.approx(expected.coef_[0, 0], rel=0.02)  # Platt's targets are not quite 0 and 1
    assert fitted.intercept[0] == pytest.approx(expected.intercept_[0], rel=0.02)
    assert fitted.slope[0] == pytest.approx(1 / 3, rel=0.1)


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 120), st.integers(1, 3), st.floats(-30, 30), st.floats(0.01, 30))
def test_order_is_kept_and_no_row_is_lost(seed, rows, classes, centre, spread):
    rng = np.random.default_rng(seed)
    labels = rng.choice([0.0, 1.0, np.nan], (rows, classes))
    logits = centre + spread * rng.standard_normal((rows, classes))
    fitted = fit_calibration(labels, logits)
    probabilities = fitted(logits)
    assert np.isfinite(probabilities).all()
    assert (fitted.slope > 0).all()
    for c in range(classes):
        assert (np.diff(probabilities[np.argsort(logits[:, c]), c]) >= 0).all()
        known = ~np.isnan(labels[:, c])
        if fitted.fits[c] == SHIFTED:
            assert probabilities[known, c].mean() == pytest.approx(labels[known, c].mean(), abs=1e-6)
        assert (fitted.positives[c], fitted.negatives[c]) == ((labels[:, c] == 1).sum(), (labels[:, c] == 0).sum())


def test_weak_fits_are_flagged():
    rng = np.random.default_rng(0)
    z = rng.standard_normal(200)
    few = np.zeros(200)
    few[: FEW - 1] = 1
    reversed_order = (z < 0).astype(float)
    labels = np.stack([few, np.zeros(200), np.full(200, np.nan), reversed_order, (z > 0).astype(float)], 1)
    fitted = fit_calibration(labels, np.repeat(z[:, None], 5, 1))
    assert fitted.fits[:4] == (SHIFTED, UNFITTED, UNFITTED, AT_BOUND)
    assert fitted.fits[4] in (FITTED, AT_BOUND)
    lines = doubts(fitted, list("abcde"), "tile")
    assert lines[0].startswith("tile a: fewer than 10 positives or negatives")
    assert lines[3].endswith("hit the end of its range (" + f"{(z < 0).sum()} positive, {(z >= 0).sum()} negative)")
    constant = fit_calibration((rng.random((100, 1)) < 0.3).astype(float), np.full((100, 1), 5.0))
    assert constant.fits == (SHIFTED,)
    with pytest.raises(ValueError, match="labels"):
        fit_calibration(np.ones((3, 2)), np.ones((3, 1)))


def test_a_calibration_is_stored_as_plain_types():
    _, labels = tiles_of_low_prevalence(2000)
    fitted = {"tile": {"prob": fit_calibration(labels[:, None], np.arange(2000.0)[:, None])}}
    stored = json.loads(json.dumps(plain(fitted)))
    again = calibrations_of(stored)["tile"]["prob"]
    assert plain({"tile": {"prob": again}}) == stored
    assert stored_calibrations({"class_names": ["a"], "calibration": stored})["tile"]["prob"].thresholds == again.thresholds


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("slope", [1.0]),
        ("slope", [1.0, 0.0]),
        ("slope", [1.0, float("nan")]),
        ("intercept", "x"),
        ("intercept", [[0.0], [0.0]]),
        ("thresholds", [0.5, 2.0]),
        ("thresholds", [0.5, "x"]),
        ("fits", ["fitted"]),
        ("positives", [1, 2, 3]),
    ],
)
def test_a_stored_calibration_that_is_none_is_refused(field, value):
    good = plain({"tile": {"prob": Calibration.of_temperature(2.0, (0.3, None))}})
    assert stored_calibrations({"class_names": ["a", "b"], "calibration": good})
    damaged = {"tile": {"prob": good["tile"]["prob"] | {field: value}}}
    with pytest.raises((ValueError, TypeError)):
        stored_calibrations({"class_names": ["a", "b"], "calibration": damaged})
    for names, calibration in ((["a"], good), (["a", "b"], {"image": good["tile"]})):
        with pytest.raises((ValueError, KeyError)):
            stored_calibrations({"class_names": names, "calibration": calibration})


def test_an_old_checkpoint_keeps_its_temperature():
    found = stored_calibrations({"class_names": ["a", "b"], "temperature": 2.5, "thresholds": [0.3, None]})
    assert found.keys() == {"tile"}
    tile = found["tile"]["prob"]
    np.testing.assert_allclose(tile(np.array([[5.0, -5.0]])), expit([[2.0, -2.0]]))
    assert tile.thresholds == (0.3, None)
    assert tile.fits == (GIVEN, GIVEN)
    plainest = stored_calibrations({"class_names": ["a"]})["tile"]["prob"]
    assert (plainest.slope[0], plainest.thresholds) == (1.0, (None,))
    assert isinstance(plainest, Calibration)


# ---------------------------------------------------------------- thresholds


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(2, 30), st.integers(1, 12))
def test_no_threshold_is_better_balanced_than_the_fitted_one(seed, n, levels):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, (n, 1)).astype(float)
    probabilities = (rng.integers(0, levels, (n, 1)) + labels) / levels  # up to 1, with ties
    labels[rng.random((n, 1)) < 0.1] = np.nan
    (threshold,) = fit_thresholds(labels, probabilities)
    known = ~np.isnan(labels[:, 0])
    y, p = labels[known, 0], probabilities[known, 0]
    if len(set(y)) < 2:
        assert threshold is None
        return
    scores = {t: balanced_accuracy_score(y, p >= t) for t in (*set(p), 2.0)}
    best = max(scores.values())
    if best <= 0.5:
        assert threshold is None
        return
    assert balanced_accuracy_score(y, p >= threshold) == pytest.approx(best)
    assert np.abs(p - threshold).min() > 0  # not on a probability, which rounding could move
    assert not (p >= threshold).all()
    higher = [t for t, score in scores.items() if score > best - 1e-9]
    assert (p >= threshold).sum() == (p >= max(higher)).sum()


def test_thresholds_are_fitted_class_by_class():
    labels = np.array([[0, 0, 1, np.nan], [0, 1, 1, np.nan], [1, 1, 1, np.nan]], float)
    probabilities = np.array([[0.1, 0.6, 0.9, 0.5], [0.2, 0.8, 0.9, 0.5], [0.3, 0.9, 0.9, 0.5]])
    assert fit_thresholds(labels, probabilities) == [pytest.approx(0.25), pytest.approx(0.7), None, None]
    probabilities[0, 0] = np.nan
    assert fit_thresholds(labels, probabilities)[0] is None
    with pytest.raises(ValueError, match="probabilities"):
        fit_thresholds(labels, probabilities[:, :2])
