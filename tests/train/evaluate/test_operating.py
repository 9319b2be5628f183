"""Operating points: thresholds by their definition, chosen where the output says, judged on other rows where there are any."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mammostream.train.evaluate.figures import Point
from mammostream.train.evaluate.further import Asked, look_further
from mammostream.train.evaluate.matching import match_labels
from mammostream.train.evaluate.operating import threshold_at
from mammostream.train.evaluate.reading import read_predictions


@given(st.integers(0, 10**6), st.integers(1, 15), st.integers(1, 15), st.sampled_from([0.05, 0.5, 0.8, 0.9, 1.0]))
@settings(max_examples=40, deadline=None)
def test_thresholds_reach_what_is_asked_and_no_more(seed, positives, negatives, value):
    rng = np.random.default_rng(seed)
    labels = np.repeat([1.0, 0.0, np.nan], [positives, negatives, 2])
    scores = rng.integers(6, size=len(labels)) / 6
    known = scores[:-2]
    candidates = [*sorted(set(known)), 2.0]  # above all

    def reached(kind, cut):
        right = (scores >= cut) if kind == "sensitivity" else (scores < cut)
        return right[labels == (kind == "sensitivity")].mean()

    found = threshold_at(labels, scores, Point("sensitivity", value))
    assert found == max(t for t in candidates if reached("sensitivity", t) >= value - 1e-9)
    found = threshold_at(labels, scores, Point("specificity", value))
    wanted = min(t for t in candidates if reached("specificity", t) >= value - 1e-9)
    assert found == wanted if wanted <= 1 else known.max() < found < 1.01
    assert threshold_at(labels[labels != 1], scores[labels != 1], Point("sensitivity", value)) is None


def make(n, seed, prefix):
    rng = np.random.default_rng(seed)
    labels = pd.DataFrame({"image_id": [f"{prefix}{i}" for i in range(n)], "mass": rng.integers(0, 2, n)})
    predictions = pd.DataFrame(
        {
            "image_id": labels["image_id"],
            "patient_id": [f"{prefix}P{i // 2}" for i in range(n)],
            "max:mass": (0.4 * labels["mass"] + 0.6 * rng.random(n)).round(2),
        }
    )
    return labels, predictions


@pytest.fixture
def command(tmp_path):
    """Write tables; return the command that evaluates them."""

    def write(labels, predictions):
        labels.to_csv(tmp_path / "labels.csv", index=False)
        predictions.to_csv(tmp_path / "p.csv", index=False)
        return f"evaluate --predictions {tmp_path}/p.csv --labels {tmp_path}/labels.csv"

    return write


@pytest.fixture
def evaluated(command, tmp_path):
    """Look for operating points; return what is said and the part of metrics.json."""

    def run(labels, predictions, *at, **options):
        command(labels, predictions)
        paths = tmp_path / "p.csv", tmp_path / "labels.csv"
        read = read_predictions(paths[0])
        further = look_further(Asked.read(*paths, at=at, **options), read, match_labels(read, paths[1]), [None])
        return "\n".join(further.lines), further.sections["operating_points"]

    return run


def achieved(y, p, cut):
    found = p >= cut
    return {
        "sensitivity": found[y == 1].mean(),
        "specificity": (~found)[y == 0].mean(),
        "ppv": (y == 1)[found].mean(),
        "npv": (y == 0)[~found].mean(),
    }


def test_thresholds_come_from_validation_predictions(evaluated, tmp_path):
    labels, predictions = make(40, 0, "t")
    val_labels, val = make(30, 1, "v")
    val.to_csv(tmp_path / "val.csv", index=False)
    val_labels.to_csv(tmp_path / "val_labels.csv", index=False)
    other = {"choose_on": tmp_path / "val.csv", "choose_labels": tmp_path / "val_labels.csv"}
    said, found = evaluated(labels, predictions, "sensitivity=0.9", "specificity=0.8", bootstrap=25, **other)
    y, p = labels["mass"].to_numpy(), predictions["max:mass"].to_numpy()
    for text, point in (("sensitivity=0.9", Point("sensitivity", 0.9)), ("specificity=0.8", Point("specificity", 0.8))):
        figures = found["points"][text]["mass"]
        cut = threshold_at(val_labels["mass"].to_numpy(float), val["max:mass"].to_numpy(), point)
        assert figures["threshold"] == cut
        wanted = achieved(y, p, cut)
        assert {name: figures[name] for name in wanted} == pytest.approx(wanted)
        assert figures["chosen"][point.kind] >= point.value
        _, code = np.unique(predictions["patient_id"], return_inverse=True)
        drawn = []
        for patients in np.random.default_rng(0).integers(20, size=(25, 20)):
            rows = np.concatenate([np.flatnonzero(code == patient) for patient in patients])
            drawn.append(list(achieved(y[rows], p[rows], cut).values()))
        for name, values in zip(wanted, np.transpose(drawn), strict=True):
            assert figures["intervals"][name] == pytest.approx(np.percentile(values, (2.5, 97.5)).tolist()), name
    assert found["chosen_on"] == f"30 images of {tmp_path}/val.csv"
    assert found["warning"] is None
    assert f"thresholds chosen on 30 images of {tmp_path}/val.csv" in said
    assert "at sensitivity=0.9: threshold" in said


def test_thresholds_come_from_the_validation_split(evaluated):
    labels, predictions = make(60, 2, "t")
    labels["split"] = ["val"] * 20 + ["test"] * 40
    said, found = evaluated(labels, predictions, "sensitivity=0.9", bootstrap=0)
    y, p = labels["mass"].to_numpy(float), predictions["max:mass"].to_numpy()
    figures = found["points"]["sensitivity=0.9"]["mass"]
    assert figures["threshold"] == threshold_at(y[:20], p[:20], Point("sensitivity", 0.9))
    assert figures["sensitivity"] == pytest.approx(achieved(y[20:], p[20:], figures["threshold"])["sensitivity"])
    assert figures["positives"] + figures["negatives"] == 40
    assert "chosen on the 20 images of split 'val', and judged on the other 40" in said


def test_choosing_on_the_judged_rows_is_warned_of(command, evaluated, mammostream, tmp_path):
    labels, predictions = make(40, 0, "t")
    outcome = mammostream(command(labels, predictions) + " --at specificity=0.9 sensitivity=0.9 --bootstrap 0")
    assert outcome.code == 0, outcome.err
    assert "mass at sensitivity=0.9: threshold" in outcome.out
    assert "warning: the thresholds of --at are chosen on the same rows that they are judged on" in outcome.out
    predictions.iloc[:10].to_csv(tmp_path / "some.csv", index=False)
    said, _ = evaluated(labels, predictions, "specificity=0.9", bootstrap=0, choose_on=tmp_path / "some.csv")
    assert "warning: 5 of the 20 judged patients are among those that the thresholds of --at were chosen on" in said


def test_without_positives_a_sensitivity_is_undefined(evaluated):
    labels, predictions = make(20, 0, "t")
    said, found = evaluated(labels.assign(mass=0), predictions, "sensitivity=0.9", "specificity=1", bootstrap=0)
    assert found["points"]["sensitivity=0.9"]["mass"]["threshold"] is None
    assert "mass at sensitivity=0.9: undefined, no positive to choose by" in said
    figures = found["points"]["specificity=1"]["mass"]
    assert (figures["specificity"], figures["sensitivity"], figures["ppv"]) == (1, None, None)


def test_bad_options_are_one_line(command, mammostream, tmp_path):
    labels, predictions = make(20, 0, "t")
    other = predictions.rename(columns={"max:mass": "max:calc"})
    other.to_csv(tmp_path / "other.csv", index=False)
    make(20, 1, "v")[1].to_csv(tmp_path / "val.csv", index=False)
    line = command(labels, predictions)
    for options, message in (
        ("--at sensitivity=90", "--at sensitivity=90 is not a sensitivity or specificity between 0 and 1"),
        (f"--choose-on {tmp_path}/val.csv", "serves --at; give that, too"),
        (f"--at sensitivity=0.9 --choose-labels {tmp_path}/labels.csv", "serves --choose-on"),
        (f"--at sensitivity=0.9 --choose-on {tmp_path}/val.csv", "--choose-on: no label of"),
        (f"--at sensitivity=0.9 --choose-on {tmp_path}/gone.csv", "gone.csv does not exist"),
        (f"--at sensitivity=0.9 --choose-on {tmp_path}/other.csv", "none of the predicted classes (calc)"),
    ):
        outcome = mammostream(f"{line} {options}")
        assert outcome.code == 2, options
        assert message in outcome.error, outcome.error
