"""Folds of patients: what always holds, how well they are stratified, what is refused, and the record of a plan."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

from mammostream.common.errors import BadInput
from mammostream.train.run.folds import FoldPlan, _check_folds, plan_folds, record_plan


@st.composite
def cohorts(draw):
    """Patients of 1 to 4 rows, with labels of two classes of which some are missing."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=3, max_size=30))
    people = np.repeat([f"p{i}" for i in range(len(sizes))], sizes)
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    labels = (rng.random((len(people), 2)) < draw(st.sampled_from([0.2, 0.5]))).astype(np.float32)
    labels[rng.random(labels.shape) < 0.1] = np.nan
    return people, labels


def plan_or_why_not(people, labels, count, seed) -> FoldPlan | str:
    try:
        return plan_folds(people, labels, ["a", "b"], count, seed)
    except BadInput as error:
        return str(error)


@given(cohorts(), st.integers(3, 5), st.integers(0, 3))
@settings(max_examples=200, deadline=None)
def test_folds_share_no_patient_cover_everyone_once_and_have_all_labels(cohort, count, seed):
    people, labels = cohort
    there = pd.DataFrame({"p": people, **{f"{k}{c}": labels[:, c] == k for k in (0, 1) for c in (0, 1)}})
    if there.groupby("p").any().sum().min() < count:
        with pytest.raises(BadInput, match=f"--folds {count}: "):
            plan_folds(people, labels, ["a", "b"], count, seed)
        return
    plan = plan_or_why_not(people, labels, count, seed)
    if isinstance(plan, str):  # two classes cannot always be spread
        event("refused")
        assert "came out without" in plan
        return
    folds = plan.of(people)
    assert set(folds) == set(range(count))
    patients = pd.DataFrame({"p": people, "f": folds}).groupby("p")["f"].nunique()
    assert (patients == 1).all()
    for fold in range(count):
        for c in range(2):
            assert {0, 1} <= set(labels[folds == fold, c])
        roles = plan.roles(fold)
        assert sorted(sum(roles.values(), [])) == list(range(count))
        assert roles["test"] == [fold]
        assert len(roles["val"]) == 1
    assert sorted(plan.roles(fold)["val"][0] for fold in range(count)) == list(range(count))
    table = plan.table
    assert table["rows"].sum() == len(people)
    assert table["positive:a"].sum() == (labels[:, 0] == 1).sum()
    # The order of the rows does not matter.
    order = np.random.default_rng(seed).permutation(len(people))
    again = plan_folds(people[order], labels[order], ["a", "b"], count, seed)
    assert again.folds == plan.folds
    pd.testing.assert_frame_equal(again.table, table)


@given(st.integers(3, 40), st.integers(3, 40), st.integers(0, 5), st.integers(3, 5), st.integers(0, 9))
@settings(max_examples=100, deadline=None)
def test_folds_of_one_class_differ_by_one_patient_of_each_label(positive, negative, unlabelled, count, seed):
    assume(min(positive, negative) >= count)
    marks = np.array([1.0] * positive + [0.0] * negative + [np.nan] * unlabelled)
    # Positive patients have negative tiles, too.
    people = [f"p{i}" for i in range(len(marks))] + [f"p{i}" for i in range(positive)]
    labels = np.concatenate([marks, np.zeros(positive)])[:, None]
    plan = plan_folds(np.array(people), labels, ["a"], count, seed)
    fold = np.array([plan.folds[f"p{i}"] for i in range(len(marks))])
    for chosen in (marks == 1, marks == 0, np.ones(len(marks), bool)):
        counts = np.bincount(fold[chosen], minlength=count)
        assert counts.max() - counts.min() <= 1


def test_rare_classes_and_rows_are_spread_evenly():
    """Four classes of 0.5 to 20 % of the patients: each within one or two patients of its share; rows within 2 %."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 60, 2000)
    people = np.repeat([f"p{i}" for i in range(2000)], sizes)
    shares = [0.005, 0.02, 0.08, 0.2]
    patient = rng.random((2000, 4)) < shares
    patient[:, 1] |= patient[:, 0] & (rng.random(2000) < 0.5)
    labels = np.repeat(patient, sizes, 0) & (rng.random((len(people), 4)) < 0.5)
    labels[np.cumsum(sizes) - sizes] = patient  # the first tile of each
    plan = plan_folds(people, labels.astype(float), list("abcd"), 5, 3)
    found = plan.table.groupby("fold")
    assert found.size().max() - found.size().min() <= 2
    rows = found["rows"].sum()
    assert rows.max() < 1.02 * rows.min()
    for name, slack in zip("abcd", (1, 1, 2, 2), strict=True):
        counts = found[f"positive:{name}"].agg(lambda column: (column > 0).sum())
        assert counts.max() - counts.min() <= slack, name
    assert plan_folds(people, labels.astype(float), list("abcd"), 5, 4).folds != plan.folds


def test_spellings_of_one_patient_stay_together():
    people = np.array(["P1", "p01", "P1", "p2", "P3", "p4"])
    labels = np.array([[1], [0], [0], [1], [1], [0]], float)
    labels = np.concatenate([labels, 1 - labels])
    plan = plan_folds(np.concatenate([people, people]), labels, ["a"], 4, 0)
    assert plan.folds["P1"] == plan.folds["p01"]
    assert plan.table["patient"].tolist() == ["P1 = p01", "p2", "P3", "p4"]


@pytest.mark.parametrize(
    ("people", "labels", "count", "said"),
    [
        (6, [1, 0] * 3, 2, "--folds 2: give 3 or more, since one fold tests, one validates and the others train"),
        (4, [1, 0] * 2, 5, "--folds 5: there are 4 patients only; give fewer folds"),
        (
            8,
            [1] * 3 + [0] * 5,
            4,
            "3 patients have positive labels of 'a', so a fold would have none; give --folds 3 or fewer",
        ),
        (8, [1] * 7 + [0], 4, "1 patient has negative labels of 'a', so a fold would have none; leave the class out"),
        (8, [0] * 8, 4, "0 patients have positive labels of 'a'"),
    ],
)
def test_what_cannot_be_folded_is_refused_in_one_line(people, labels, count, said):
    with pytest.raises(BadInput) as error:
        plan_folds(np.array([f"p{i}" for i in range(people)]), np.array(labels, float)[:, None], ["a"], count, 0)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_fold_without_a_class_is_refused():
    there = np.zeros((3, 2, 1), bool)
    there[:, 0] = [[True], [True], [False]]
    there[:, 1] = True
    with pytest.raises(BadInput, match="--folds 3: fold 2 came out without positive labels of 'a'; try another --seed"):
        _check_folds(there, np.array([0, 1, 2]), ["a"], 3)


def test_the_record_refuses_other_inputs_by_name(tmp_path):
    people, labels = np.array([f"p{i}" for i in range(12)]), np.array([1.0, 0.0] * 6)[:, None]
    facts = {"--lr-head": 0.1, "--byol-checkpoint": "a" * 64}
    plan = plan_folds(people, labels, ["a"], 3, 0)
    digest = record_plan(tmp_path, plan, facts)
    before = (tmp_path / "folds.parquet").read_bytes()
    assert record_plan(tmp_path, plan_folds(people, labels, ["a"], 3, 0), facts) == digest
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "folds.parquet"), plan.table)
    flipped = labels.copy()
    flipped[:2] = flipped[:2][::-1]
    changes = {
        "--folds 3, not 4": (plan_folds(people, labels, ["a"], 4, 0), facts),
        "--class-names a, not b": (plan_folds(people, labels, ["b"], 3, 0), facts),
        "--lr-head 0.1, not 0.2": (plan, facts | {"--lr-head": 0.2}),
        "other --byol-checkpoint": (plan, facts | {"--byol-checkpoint": "b" * 64}),
        "other patients or labels": (plan_folds(people, flipped, ["a"], 3, 0), facts),
        "other folds": (plan_folds(people, labels, ["a"], 3, 1), facts),
    }
    for said, (other, its_facts) in changes.items():
        with pytest.raises(BadInput, match=f"folds.parquet were made with {said}; give the same"):
            record_plan(tmp_path, other, its_facts)
    assert (tmp_path / "folds.parquet").read_bytes() == before
    assert record_plan(tmp_path, plan, facts | {"--lr-head": 0.2}, begun=False) != digest
    assert (tmp_path / "folds.parquet").read_bytes() != before
    assert record_plan(tmp_path / "other", plan, facts, write=False) == digest
    assert not (tmp_path / "other").exists()
