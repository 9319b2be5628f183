"""Metrics: against scikit-learn, and None instead of a number where there is none."""

import json
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    brier_score_loss,
    roc_auc_score,
)

from mammostream.train.evaluate.metrics import (
    CALIBRATION_BINS,
    classification_metrics,
    evaluate_predictions,
    reliability,
)

PER_CLASS = ("auc", "ap", "sensitivity_at_90_specificity", "balanced_accuracy", "accuracy", "brier", "ece")


def reference(y, p, threshold):
    """A class's figures, by scikit-learn where it has them, else by hand; None where undefined."""
    figures = dict.fromkeys(PER_CLASS)
    if len(y):
        figures["accuracy"] = accuracy_score(y, p >= threshold)
        figures["brier"] = brier_score_loss(y, p, pos_label=1)
        edges = np.arange(CALIBRATION_BINS + 1) / CALIBRATION_BINS
        error = 0.0
        for low, high in zip(edges[:-1], edges[1:], strict=True):
            held = (p > low) & (p <= high) | (low == 0) & (p == 0)
            if held.any():
                error += held.sum() * abs(p[held].mean() - y[held].mean())
        figures["ece"] = error / len(y)
    if len(set(y)) == 2:
        figures["auc"] = roc_auc_score(y, p)
        figures["ap"] = average_precision_score(y, p)
        figures["balanced_accuracy"] = balanced_accuracy_score(y, p >= threshold)
        cuts = [t for t in (*set(p), np.inf) if 10 * (p[y == 0] >= t).sum() <= (y == 0).sum()]
        figures["sensitivity_at_90_specificity"] = max(np.mean(p[y == 1] >= t) for t in cuts)
    return figures


def exact_match(labels, probabilities, thresholds):
    rows = [((p >= thresholds) == (y == 1)).all() for p, y in zip(probabilities, labels, strict=True) if not np.isnan(y).any()]
    return np.mean(rows) if rows else None


def reference_all(labels, probabilities, thresholds):
    columns = [(labels[~np.isnan(labels[:, c]), c], probabilities[~np.isnan(labels[:, c]), c]) for c in range(labels.shape[1])]
    classes = [reference(y, p, t) for (y, p), t in zip(columns, thresholds, strict=True)]
    overall = {"exact_match": exact_match(labels, probabilities, thresholds)}
    for name, figure in {"mean_auc": "auc", "mean_ap": "ap", "brier": "brier", "ece": "ece"}.items():
        defined = [c[figure] for c in classes if c[figure] is not None]
        overall[name] = np.mean(defined) if defined else None
    return classes, overall


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 3), st.integers(1, 30), st.floats(0, 1))
def test_metrics_agree_with_sklearn_and_skip_missing_labels(seed, n, classes, levels, rate):
    rng = np.random.default_rng(seed)
    labels = (rng.random((n, classes)) < rate).astype(float)
    probabilities = rng.integers(0, levels + 1, (n, classes)) / levels  # with ties, 0 and 1
    labels[rng.random((n, classes)) < 0.2] = np.nan
    thresholds = rng.random(classes)
    names = [f"class {c}" for c in range(classes)]
    result = classification_metrics(labels, probabilities, names, thresholds)
    expected, overall = reference_all(labels, probabilities, thresholds)
    for c, name in enumerate(names):
        figures = dict(result["per_class"][name])
        assert figures.pop("positives") == np.nansum(labels[:, c])
        assert figures.pop("negatives") == (labels[:, c] == 0).sum()
        assert figures.pop("threshold") == thresholds[c]
        assert figures == {k: v if v is None else pytest.approx(v) for k, v in expected[c].items()}
    assert {k: result[k] for k in overall} == {k: v if v is None else pytest.approx(v) for k, v in overall.items()}
    assert result["rows"] == n
    json.dumps(result, allow_nan=False)


def test_without_thresholds_half_is_positive():
    result = classification_metrics(np.array([[1.0], [0.0]]), np.array([[0.5], [0.49]]), ["a"])
    assert result["per_class"]["a"]["threshold"] == 0.5
    assert result["per_class"]["a"]["balanced_accuracy"] == result["exact_match"] == 1


def test_classes_without_both_values_have_no_ranking_and_never_a_guess():
    labels = np.array([[1, 1, 0, np.nan, 1], [0, 1, 0, np.nan, 0], [1, 1, 0, np.nan, 0]], float)
    probabilities = np.full((3, 5), 0.5)
    probabilities[:, 0] = [0.9, 0.1, 0.8]
    probabilities[0, 4] = np.nan
    names = ["both", "ones", "zeros", "missing", "diverged"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = evaluate_predictions(labels, probabilities, names, np.arange(3), bootstrap=20)
    for figure in ("auc", "ap", "balanced_accuracy", "sensitivity_at_90_specificity"):
        values = {name: m[figure] for name, m in result["per_class"].items()}
        assert values == {"both": 1.0, "ones": None, "zeros": None, "missing": None, "diverged": None}
    for figure in ("accuracy", "brier", "ece"):
        assert [name for name, m in result["per_class"].items() if m[figure] is None] == ["missing", "diverged"]
    assert result["per_class"]["ones"]["brier"] == 0.25
    for figures in (*result["per_class"].values(), result):
        for name, interval in figures["intervals"].items():
            assert (interval is None) == (figures[name] is None), name
    assert result["mean_auc"] == result["mean_ap"] == 1.0
    assert result["exact_match"] is None
    json.dumps(result, allow_nan=False)


def test_one_row_has_what_one_row_defines():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = evaluate_predictions(np.array([[1.0, np.nan]]), np.array([[0.75, 0.5]]), ["a", "b"], np.array(["p"]))
    figures = result["per_class"]["a"]
    assert (figures["auc"], figures["balanced_accuracy"], figures["accuracy"], figures["brier"]) == (None, None, 1.0, 0.0625)
    assert figures["ece"] == 0.25
    assert set(figures["intervals"].values()) == set(result["intervals"].values()) == {None}
    assert result["patients"] == 1


def test_no_rows_give_no_metrics():
    result = classification_metrics(np.zeros((0, 2)), np.zeros((0, 2)), ["a", "b"])
    assert (result["mean_auc"], result["mean_ap"], result["exact_match"]) == (None, None, None)


def test_arrays_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="2 classes"):
        classification_metrics(np.zeros((4, 3)), np.zeros((4, 3)), ["a", "b"])
    with pytest.raises(ValueError, match="0, 1 or NaN"):
        classification_metrics(np.full((4, 1), 2.0), np.zeros((4, 1)), ["a"])
    with pytest.raises(ValueError, match="thresholds"):
        classification_metrics(np.zeros((4, 1)), np.zeros((4, 1)), ["a"], np.zeros(2))
    with pytest.raises(ValueError, match="patients"):
        evaluate_predictions(np.zeros((4, 1)), np.zeros((4, 1)), ["a"], np.zeros(3))


@settings(max_examples=12)
@given(st.integers(0, 2**32 - 1), st.integers(2, 40), st.integers(2, 8), st.integers(1, 20))
def test_intervals_agree_with_resampling_rows_for_sklearn(seed, n, groups, levels):
    rng = np.random.default_rng(seed)
    labels, group = rng.integers(0, 2, (n, 2)).astype(float), rng.integers(0, groups, n)
    labels[rng.random((n, 2)) < 0.1] = np.nan
    probabilities = rng.integers(0, levels + 1, (n, 2)) / levels  # with ties
    thresholds = rng.random(2)
    result = evaluate_predictions(labels, probabilities, ["a", "b"], group, thresholds, 20, seed)

    names = np.unique(group)
    draws, drawn = np.random.default_rng(seed), []
    for _ in range(20):
        rows = np.concatenate([np.flatnonzero(group == names[i]) for i in draws.integers(len(names), size=len(names))])
        drawn.append(reference_all(labels[rows], probabilities[rows], thresholds))
    points = [*result["per_class"].values(), result]
    for place, point in enumerate(points):
        resampled = [overall if place == 2 else classes[place] for classes, overall in drawn]
        assert set(point["intervals"]) == set(resampled[0])
        for name, interval in point["intervals"].items():
            values = [r[name] for r in resampled if r[name] is not None]
            if len(names) < 2 or point[name] is None or not values:
                assert interval is None, name
            else:
                assert interval == pytest.approx(np.percentile(values, (2.5, 97.5))), name
    assert result["patients"] == len(names)


def test_resamples_in_parts_are_the_same(monkeypatch):
    rng = np.random.default_rng(0)
    labels, probabilities = rng.integers(0, 2, (90, 2)).astype(float), rng.random((90, 2))
    whole = evaluate_predictions(labels, probabilities, ["a", "b"], np.arange(90) // 3, bootstrap=50)
    monkeypatch.setattr("mammostream.train.evaluate.metrics._CELLS", 500)
    assert evaluate_predictions(labels, probabilities, ["a", "b"], np.arange(90) // 3, bootstrap=50) == whole


def test_no_bootstrap_no_intervals():
    labels, probabilities = np.array([[0.0], [1.0]]), np.array([[0.2], [0.9]])
    result = evaluate_predictions(labels, probabilities, ["a"], np.array(["p", "q"]), bootstrap=0)
    assert result["mean_auc"] == 1
    assert set(result["intervals"].values()) == {None}


def test_bootstrap_of_groups_is_wider_than_of_rows():
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(20), 30)
    labels = np.repeat(rng.integers(0, 2, 20), 30).astype(float)
    probabilities = np.clip((np.repeat(rng.random(20), 30) + 0.3 * labels + 0.05 * rng.random(600)) / 1.35, 0, 1)
    labels[::7] = np.nan

    def interval(groups: np.ndarray) -> list[float]:
        result = evaluate_predictions(labels[:, None], probabilities[:, None], ["a"], groups, bootstrap=300, seed=1)
        return result["per_class"]["a"]["intervals"]["auc"]

    low, high = interval(group.astype(str))
    narrow = interval(np.arange(600))
    known = ~np.isnan(labels)
    assert low < roc_auc_score(labels[known], probabilities[known]) < high
    assert high - low > 2 * (narrow[1] - narrow[0])
    assert interval(group.astype(str)) == [low, high]


def test_reliability_bins_hold_every_row_once():
    y, p = np.array([0, 1, 1, 0, 1.0]), np.array([0.0, 1.0, 0.5, 0.5, 0.51])
    mean, share, count = reliability(y, p)
    assert count.tolist() == [1, 3, 1]
    assert mean == pytest.approx([0, 1.51 / 3, 1])
    assert share == pytest.approx([0, 2 / 3, 1])
