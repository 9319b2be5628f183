"""Metrics: against scikit-learn, and None instead of a number where there is none."""

import json
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from train.metrics import bootstrap_auc, classification_metrics, effective_rank, z_std


def test_metrics_agree_with_sklearn_and_skip_missing_labels():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (200, 3)).astype(float)
    probabilities = np.clip(0.3 * labels + 0.7 * rng.random((200, 3)), 0, 1)
    labels[rng.random((200, 3)) < 0.2] = np.nan
    result = classification_metrics(labels, probabilities, ["a", "b", "c"])
    aucs, aps = [], []
    for c, name in enumerate("abc"):
        known = ~np.isnan(labels[:, c])
        aucs.append(roc_auc_score(labels[known, c], probabilities[known, c]))
        aps.append(average_precision_score(labels[known, c], probabilities[known, c]))
        assert result["per_class"][name] == {
            "auc": aucs[-1],
            "ap": aps[-1],
            "positives": int(np.nansum(labels[:, c])),
            "negatives": int((labels[:, c] == 0).sum()),
        }
    assert result["mean_auc"] == pytest.approx(np.mean(aucs))
    assert result["mean_ap"] == pytest.approx(np.mean(aps))
    rows = ~np.isnan(labels).any(1)
    assert result["exact_match"] == pytest.approx(
        np.mean([((p >= 0.5) == (y == 1)).all() for p, y in zip(probabilities[rows], labels[rows], strict=True)])
    )


def test_classes_without_both_values_have_no_auc_and_never_a_guess():
    labels = np.array([[1, 1, 0, np.nan, 1], [0, 1, 0, np.nan, 0], [1, 1, 0, np.nan, 0]], float)
    probabilities = np.full((3, 5), 0.5)
    probabilities[:, 0] = [0.9, 0.1, 0.8]
    probabilities[0, 4] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = classification_metrics(labels, probabilities, ["both", "ones", "zeros", "missing", "diverged"])
    aucs = {name: m["auc"] for name, m in result["per_class"].items()}
    assert aucs == {"both": 1.0, "ones": None, "zeros": None, "missing": None, "diverged": None}
    assert result["per_class"]["missing"] == {"auc": None, "ap": None, "positives": 0, "negatives": 0}
    assert result["mean_auc"] == result["mean_ap"] == 1.0
    assert result["exact_match"] is None
    json.dumps(result, allow_nan=False)


def test_no_rows_give_no_metrics():
    result = classification_metrics(np.zeros((0, 2)), np.zeros((0, 2)), ["a", "b"])
    assert (result["mean_auc"], result["mean_ap"], result["exact_match"]) == (None, None, None)


def test_arrays_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="2 classes"):
        classification_metrics(np.zeros((4, 3)), np.zeros((4, 3)), ["a", "b"])
    with pytest.raises(ValueError, match="0, 1 or NaN"):
        classification_metrics(np.full((4, 1), 2.0), np.zeros((4, 1)), ["a"])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 40), st.integers(2, 8), st.integers(1, 20))
def test_bootstrap_agrees_with_resampling_rows_for_sklearn(seed, n, groups, levels):
    rng = np.random.default_rng(seed)
    labels, group = rng.integers(0, 2, n).astype(float), rng.integers(0, groups, n)
    probabilities = rng.integers(0, levels, n) / levels  # with ties
    result = bootstrap_auc(labels, probabilities, group, n=20, seed=seed)

    names = np.unique(group)
    draws, aucs = np.random.default_rng(seed), []
    for _ in range(20):
        rows = np.concatenate([np.flatnonzero(group == names[i]) for i in draws.integers(len(names), size=len(names))])
        if len(set(labels[rows])) == 2:
            aucs.append(roc_auc_score(labels[rows], probabilities[rows]))
    if len(names) < 2 or len(set(labels)) < 2 or not aucs:
        assert result is None
    else:
        assert result == pytest.approx(tuple(np.percentile(aucs, (2.5, 97.5))))


def test_bootstrap_of_groups_is_wider_than_of_rows():
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(20), 30)
    labels = np.repeat(rng.integers(0, 2, 20), 30).astype(float)
    probabilities = np.repeat(rng.random(20), 30) + 0.3 * labels + 0.05 * rng.random(600)
    labels[::7] = np.nan
    low, high = bootstrap_auc(labels, probabilities, group.astype(str), n=300, seed=1)
    narrow = bootstrap_auc(labels, probabilities, np.arange(600), n=300, seed=1)
    known = ~np.isnan(labels)
    assert low < roc_auc_score(labels[known], probabilities[known]) < high
    assert high - low > 2 * (narrow[1] - narrow[0])
    assert bootstrap_auc(labels, probabilities, group.astype(str), n=300, seed=1) == (low, high)


def test_bootstrap_is_none_where_undefined():
    y, p = np.array([0, 1, 0, 1.0]), np.array([0.1, 0.9, 0.4, 0.3])
    assert bootstrap_auc(y, p, np.zeros(4)) is None
    assert bootstrap_auc(np.ones(4), p, np.arange(4)) is None
    assert bootstrap_auc(np.full(4, np.nan), p, np.arange(4)) is None
    assert bootstrap_auc(y, np.array([0.1, np.nan, 0.4, 0.3]), np.arange(4)) is None
    assert bootstrap_auc(np.zeros(0), np.zeros(0), np.zeros(0)) is None


def test_z_std_tells_spread_from_collapse():
    torch.manual_seed(0)
    healthy = z_std(torch.randn(4096, 256))
    assert healthy.item() == pytest.approx(1 / 16, rel=0.01)
    assert z_std(torch.randn(1, 256).expand(64, -1)).item() == pytest.approx(0, abs=1e-6)
    assert z_std(100 * torch.randn(4096, 256)).item() == pytest.approx(healthy.item(), rel=0.01)
    assert z_std(torch.randn(8, 4).bfloat16()).dtype == torch.float32


def test_effective_rank_counts_directions():
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(32, 32)).Q
    assert effective_rank(basis).item() == pytest.approx(32, rel=1e-3)
    assert effective_rank(torch.cat([basis[:5]] * 8)).item() == pytest.approx(5, rel=1e-2)
    assert effective_rank(torch.randn(1, 16).expand(64, -1)).item() == pytest.approx(1, rel=1e-2)
    assert 1 <= effective_rank(torch.zeros(8, 16)).item() < 1.01
    assert effective_rank(torch.tensor([[1.0, float("inf")]])).isnan()
    # By hand: singular values 3 and 1 are shares 3/4 and 1/4.
    expected = np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))).item() == pytest.approx(expected, rel=1e-4)
