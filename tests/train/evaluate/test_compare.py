"""Comparison of two predictions: DeLong's test against its definition, differences against resamples drawn one by one."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from mammostream.train.evaluate.compare import delong
from mammostream.train.evaluate.further import Asked, look_further
from mammostream.train.evaluate.matching import match_labels
from mammostream.train.evaluate.metrics import classification_metrics
from mammostream.train.evaluate.pictures import draw_comparison
from mammostream.train.evaluate.reading import read_predictions

FIGURES = {"auc", "ap", "sensitivity_at_90_specificity", "balanced_accuracy", "accuracy", "brier", "ece"}


def by_definition(labels, first, second):
    """DeLong et al. 1988: the structural components from all pairs of a positive and a negative."""
    v10, v01 = [], []
    for scores in (first, second):
        pairs = [[(p > n) + 0.5 * (p == n) for n in scores[labels == 0]] for p in scores[labels == 1]]
        v10.append(np.mean(pairs, 1))
        v01.append(np.mean(pairs, 0))
    s10, s01 = np.cov(v10), np.cov(v01)
    s = s10 / len(v10[0]) + s01 / len(v01[0])
    return v10[0].mean() - v10[1].mean(), s[0, 0] + s[1, 1] - 2 * s[0, 1]


@given(st.integers(0, 10**6), st.integers(2, 12), st.integers(2, 12), st.sampled_from([3, 1000]))
@settings(max_examples=30, deadline=None)
def test_delong_follows_its_definition(seed, positives, negatives, levels):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat([1.0, 0.0], [positives, negatives]))
    first, second = rng.integers(levels, size=(2, len(labels))) / levels
    difference, variance = by_definition(labels, first, second)
    found = delong(labels, first, second)
    if variance < 1e-12:
        assert found is None if abs(difference) > 1e-9 else found.p == 1
        return
    assert (found.difference, found.standard_error) == pytest.approx((difference, np.sqrt(variance)))
    assert found.p == pytest.approx(2 * (1 - norm.cdf(abs(difference) / np.sqrt(variance))), abs=1e-12)
    assert delong(labels, second, first).z == pytest.approx(-found.z)


def test_delong_says_nothing_where_the_variance_is_unknown():
    labels = np.array([1.0, 0, 0, 0])
    assert delong(labels, np.arange(4.0), np.arange(4.0)) is None  # one positive
    labels = np.array([1.0, 1, 0, 0])
    assert delong(labels, labels, -labels) is None  # 1 against 0
    same = delong(labels, np.array([0.3, 0.1, 0.2, 0.0]), np.array([0.6, 0.2, 0.4, 0.0]))
    assert (same.difference, same.z, same.p) == (0, 0, 1)


def make(n=60, seed=0):
    """Labels of images of n / 3 patients, and two predictions of them."""
    rng = np.random.default_rng(seed)
    labels = pd.DataFrame({"image_id": [f"i{i:02}" for i in range(n)], "mass": rng.integers(0, 2, n)})
    first, second = (
        pd.DataFrame(
            {
                "image_id": labels["image_id"],
                "patient_id": [f"P{i // 3}" for i in range(n)],
                "max:mass": np.clip(weight * labels["mass"] + (1 - weight) * rng.random(n), 0, 1).round(2),
            }
        )
        for weight in (0.4, 0.15)
    )
    return labels, first, second


@pytest.fixture
def command(tmp_path):
    """Write tables; return the command that evaluates the first predictions."""

    def write(labels, first, second):
        for name, frame in (("labels", labels), ("first", first), ("second", second)):
            frame.to_csv(tmp_path / f"{name}.csv", index=False)
        return f"evaluate --predictions {tmp_path}/first.csv --labels {tmp_path}/labels.csv"

    return write


@pytest.fixture
def compared(command, tmp_path):
    """Compare two predictions; return what it says and the part of metrics.json."""

    def run(labels, first, second, **options):
        command(labels, first, second)
        paths = tmp_path / "first.csv", tmp_path / "labels.csv"
        predictions = read_predictions(paths[0])
        matched = match_labels(predictions, paths[1])
        asked = Asked.read(*paths, compare_with=tmp_path / "second.csv", **options)
        further = look_further(asked, predictions, matched, [options.get("threshold")])
        return "\n".join(further.lines), further.sections["comparison"]

    return run


def test_differences_are_of_the_same_resampled_patients(compared):
    labels, first, second = make()
    said, comparison = compared(labels, first, second.sample(frac=1, random_state=1), bootstrap=30, threshold=0.4, pf1=True)
    found = comparison["per_class"]["mass"]
    assert set(found) == FIGURES | {"pf1"}
    _, code = np.unique(first["patient_id"], return_inverse=True)
    y, scores = labels[["mass"]].to_numpy(float), [f[["max:mass"]].to_numpy() for f in (first, second)]
    rng = np.random.default_rng(0)
    differences = {name: [] for name in FIGURES}
    for drawn in rng.integers(20, size=(30, 20)):
        rows = np.concatenate([np.flatnonzero(code == patient) for patient in drawn])
        one, two = (classification_metrics(y[rows], p[rows], ["mass"], [0.4])["per_class"]["mass"] for p in scores)
        for name in FIGURES:
            differences[name].append(one[name] - two[name])
    for name in FIGURES:
        low, high = np.percentile(differences[name], (2.5, 97.5))
        assert found[name]["interval"] == pytest.approx([low, high]), name
        sides = [sum(d <= 1e-12 for d in differences[name]), sum(d >= -1e-12 for d in differences[name])]
        assert found[name]["p"] == pytest.approx(min(1, 2 * (min(sides) + 1) / 31)), name
        one, two = (classification_metrics(y, p, ["mass"], [0.4])["per_class"]["mass"][name] for p in scores)
        assert found[name]["difference"] == pytest.approx(one - two)
        assert (found[name]["first"], found[name]["second"]) == pytest.approx((one, two))
    assert found["auc"]["delong"]["p"] == pytest.approx(delong(y[:, 0], scores[0][:, 0], scores[1][:, 0]).p)
    assert comparison["overall"]["mean_auc"]["interval"] == found["auc"]["interval"]
    assert comparison["overall"]["exact_match"]["difference"] == found["accuracy"]["difference"]
    assert f"{found['auc']['delong']['p']:.2g}" in said
    assert "trust the bootstrap over patients" in said
    assert comparison["patients"] == 20


def test_cases_of_one_file_only_are_named_and_counted(compared):
    labels, first, second = make()
    said, found = compared(labels, first.iloc[2:], second.iloc[:59], bootstrap=0)
    assert found["rows"] == 57
    assert found["only_in_first"] == {"count": 1, "names": ["i59"]}
    assert found["only_in_second"] == {"count": 2, "names": ["i00", "i01"]}
    assert "2 judged in" in said
    assert "(i00, i01)" in said
    assert found["per_class"]["mass"]["auc"]["delong"]["p"] <= 1
    assert found["per_class"]["mass"]["ap"]["p"] is None  # no resamples


def test_what_was_not_asked_for_changes_nothing(command, mammostream, tmp_path):
    line = command(*make()) + " --bootstrap 20"
    outcome = mammostream(f"{line} --compare-with {tmp_path}/second.csv")
    assert outcome.code == 0, outcome.err
    assert "DeLong" in outcome.out
    plain = mammostream(f"{line} --output-dir {tmp_path}/plain")
    assert "DeLong" not in plain.out
    assert plain.out.splitlines()[:4] == outcome.out.splitlines()[:4]
    metrics = json.loads((tmp_path / "plain/metrics.json").read_text())
    overall = {"per_class", "exact_match", "rows", "mean_auc", "mean_ap", "brier", "ece", "intervals", "patients", "bootstrap"}
    assert set(metrics) == overall | {"level", "counts", "warnings", "seen"}
    about = {"positives", "negatives", "threshold", "intervals", "left_out"}
    assert set(metrics["per_class"]["mass"]) == FIGURES | about
    assert set(metrics["per_class"]["mass"]["intervals"]) == FIGURES
    assert not {"compare_with", "by", "at", "pf1"} & {row.split(":")[0] for row in (tmp_path / "plain/config.yaml").open()}
    assert not {"comparison.png", "froc.png", "subgroups.png"} & {path.name for path in (tmp_path / "plain").iterdir()}


def test_both_curves_are_drawn(tmp_path):
    labels, *predictions = make()
    scores = [frame[["max:mass"]].to_numpy() for frame in predictions]
    draw_comparison(labels[["mass"]].to_numpy(float), *scores, ["mass"], tmp_path / "c.png")
    assert (tmp_path / "c.png").stat().st_size > 1000


BAD = {
    "nothing in common": (lambda f, s: (f.iloc[:30], s.iloc[30:]), "judges no case of"),
    "another class": (
        lambda f, s: (f, s.rename(columns={"max:mass": "max:calc"})),
        "have none of the predicted classes (calc)",
    ),
    "unlabelled": (lambda f, s: (f, s.assign(image_id="x" + s["image_id"])), "no label of"),
    "not predictions": (lambda f, s: (f, s[["image_id"]]), "name no probabilities"),
}


@pytest.mark.parametrize("what", BAD)
def test_another_file_that_does_not_fit_is_one_line(what, command, mammostream, tmp_path):
    labels, first, second = make()
    change, message = BAD[what]
    line = command(labels, *change(first, second))
    outcome = mammostream(f"{line} --compare-with {tmp_path}/second.csv --output-dir {tmp_path}/out")
    assert outcome.code == 2
    assert "--compare-with" in outcome.error
    assert message in outcome.error
    assert not (tmp_path / "out").exists()
