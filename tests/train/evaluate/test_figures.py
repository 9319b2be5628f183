"""Figures on request: the probabilistic F1 score and partial AUCs against references, whole and resampled."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from mammostream.train.evaluate.figures import PartialAUC, Point, ProbabilisticF1
from mammostream.train.evaluate.metrics import evaluate_predictions, extra_value


def pf1(labels, probabilities):
    """As the challenge's page defines it: the harmonic mean of pPrecision and pRecall."""
    true = sum(p for y, p in zip(labels, probabilities, strict=True) if y)
    false = sum(p for y, p in zip(labels, probabilities, strict=True) if not y)
    if true == 0:
        return 0.0
    precision, recall = true / (true + false), true / sum(labels)
    return 2 * precision * recall / (precision + recall)


def partial(labels, probabilities, point):
    if point.kind == "sensitivity":
        labels, probabilities = 1 - labels, -probabilities
    return roc_auc_score(labels, probabilities, max_fpr=1 - point.value)


POINTS = [Point("specificity", 0.9), Point("specificity", 0.35), Point("sensitivity", 0.8), Point("sensitivity", 0.05)]


@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 12), st.sampled_from([3, 1000]))
@settings(max_examples=25, deadline=None)
def test_values_are_those_of_the_references(seed, positives, negatives, levels):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat([1.0, 0.0], [positives, negatives]))
    probabilities = rng.integers(levels, size=len(labels)) / levels
    assert extra_value(ProbabilisticF1(), labels, probabilities) == pytest.approx(pf1(labels, probabilities))
    for point in POINTS:
        found = extra_value(PartialAUC(point), labels, probabilities)
        assert found == pytest.approx(partial(labels, probabilities, point), abs=1e-9), point


def test_intervals_are_over_patients_drawn_one_by_one():
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 2, 40).astype(float)
    labels[:4] = np.nan
    probabilities = np.clip(0.3 * np.nan_to_num(labels) + 0.7 * rng.random(40), 0, 1).round(1)
    group = np.arange(40) // 4
    figures = [ProbabilisticF1(), *map(PartialAUC, POINTS)]
    result = evaluate_predictions(labels[:, None], probabilities[:, None], ["a"], group, None, 30, 5, figures)["per_class"]["a"]
    rng = np.random.default_rng(5)
    drawn = {figure.name: [] for figure in figures}
    for patients in rng.integers(10, size=(30, 10)):
        rows = np.concatenate([np.flatnonzero(group == patient) for patient in patients])
        rows = rows[~np.isnan(labels[rows])]
        for figure, point in zip(figures, [None, *POINTS], strict=True):
            y, p = labels[rows], probabilities[rows]
            drawn[figure.name].append(partial(y, p, point) if point else pf1(y, p))
    for name, values in drawn.items():
        assert result["intervals"][name] == pytest.approx(np.percentile(values, (2.5, 97.5)).tolist()), name


def test_one_value_only_is_undefined():
    for labels in (np.zeros(3), np.ones(3), np.full(3, np.nan)):
        assert extra_value(PartialAUC(POINTS[0]), labels, np.array([0.1, 0.2, 0.3])) is None
    assert extra_value(ProbabilisticF1(), np.zeros(3), np.array([0.1, 0.2, 0.3])) is None
    assert extra_value(ProbabilisticF1(), np.ones(2), np.array([0.0, 0.0])) == 0


def test_the_command_gives_them_on_request(mammostream, tmp_path):
    labels = pd.DataFrame({"image_id": list("abcdef"), "mass": [0, 1, 0, 1, 0, 1]})
    labels.to_csv(tmp_path / "labels.csv", index=False)
    scores = [0.1, 0.9, 0.4, 0.3, 0.2, 0.8]
    pd.DataFrame({"image_id": labels["image_id"], "max:mass": scores}).to_csv(tmp_path / "p.csv", index=False)
    command = f"evaluate --predictions {tmp_path}/p.csv --labels {tmp_path}/labels.csv"
    outcome = mammostream(f"{command} --pf1 --partial-auc specificity=0.5,sensitivity=0.8")
    assert outcome.code == 0, outcome.err
    y, p = labels["mass"].to_numpy(), np.array(scores)
    heading, figures = (line.split("  ") for line in outcome.out.splitlines()[:2])
    assert {"pF1", "pAUC spec. >= 0.5", "pAUC sens. >= 0.8"} <= {cell.strip() for cell in heading}
    for value in (pf1(y, p), partial(y, p, Point("specificity", 0.5)), partial(y, p, Point("sensitivity", 0.8))):
        assert any(cell.strip().startswith(f"{value:.3f} (") for cell in figures)
    for wrong in ("specificity=1", "sensitivity=1.2", "spec=0.9", "specificity=x"):
        outcome = mammostream(f"{command} --partial-auc {wrong}")
        assert outcome.code == 2
        assert f"--partial-auc {wrong} is not a sensitivity or specificity" in outcome.error
