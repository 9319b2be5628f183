"""Subgroups: the figures of each value are those of its rows alone, and too few cases have none."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from mammostream.train.evaluate.matching import match_labels
from mammostream.train.evaluate.metrics import evaluate_predictions
from mammostream.train.evaluate.reading import read_predictions
from mammostream.train.evaluate.subgroups import groups_of, judge_subgroups, read_columns


def make(n=120, seed=0):
    """Images of n / 4 patients, both views of both breasts, and a manifest of them."""
    rng = np.random.default_rng(seed)
    numbers = np.arange(n)
    manifest = pd.DataFrame(
        {
            "image_id": [f"i{i:03}" for i in numbers],
            "patient_id": [f"P{i // 4}" for i in numbers],
            "laterality": np.where(numbers // 2 % 2, "L", "R"),
            "view": np.where(numbers % 2, "CC", "MLO"),
            "label:mass": rng.integers(0, 2, n),
            "label:calc": (numbers % 20 == 0).astype(int),
        }
    )
    scores = 0.3 * manifest[["label:mass", "label:calc"]].to_numpy() + 0.7 * rng.random((n, 2))
    predictions = manifest[["image_id", "patient_id"]].assign(**{"max:mass": scores[:, 0], "max:calc": scores[:, 1]})
    return manifest, predictions


@pytest.fixture
def divided(tmp_path):
    """Divide matched predictions; return them and the groups."""

    def run(manifest, predictions, by, table=None):
        manifest.to_parquet(tmp_path / "labels.parquet")
        predictions.to_parquet(tmp_path / "p.parquet")
        if table is not None:
            table.to_csv(tmp_path / "table.csv", index=False)
        matched = match_labels(read_predictions(tmp_path / "p.parquet"), tmp_path / "labels.parquet")
        path = tmp_path / ("labels.parquet" if table is None else "table.csv")
        return matched, groups_of(matched, path, read_columns(by))

    return run


def test_each_value_has_the_figures_of_its_rows(mammostream, tmp_path):
    manifest, predictions = make()
    manifest.to_parquet(tmp_path / "labels.parquet")
    predictions.to_parquet(tmp_path / "p.parquet")
    pd.DataFrame({"patient_id": [f"P{i}" for i in range(30)], "site": ["x"] * 26 + ["y"] * 4}).to_csv(tmp_path / "sites.csv")
    command = f"evaluate --predictions {tmp_path}/p.parquet --labels {tmp_path}/labels.parquet --bootstrap 30"
    outcome = mammostream(f"{command} --by view --output-dir {tmp_path}/out --pf1")
    assert outcome.code == 0, outcome.err
    found = json.loads((tmp_path / "out/metrics.json").read_text())["subgroups"]["view"]
    assert [(g["value"], g["rows"], g["patients"]) for g in found["values"]] == [("CC", 60, 30), ("MLO", 60, 30)]
    for group in found["values"]:
        rows = (manifest["view"] == group["value"]).to_numpy()
        alone = evaluate_predictions(
            manifest.loc[rows, ["label:mass"]].to_numpy(float),
            predictions.loc[rows, ["max:mass"]].to_numpy(),
            ["mass"],
            manifest.loc[rows, "patient_id"].to_numpy(str),
            bootstrap=30,
        )["per_class"]["mass"]
        mine = group["per_class"]["mass"]
        assert mine["pf1"] > 0
        for name in ("auc", "ap", "balanced_accuracy", "brier", "positives", "negatives"):
            assert mine[name] == pytest.approx(alone[name])
        assert mine["intervals"]["auc"][0] < mine["auc"] < mine["intervals"]["auc"][1]
        few = group["per_class"]["calc"]
        assert few["too_few"] == f"no figures: {few['positives']} positives, fewer than 10"
        assert "auc" not in few
        assert f"{mine['auc']:.3f}" in outcome.out
    assert "no figures: 6 positives, fewer than 10" in outcome.out
    assert (tmp_path / "out/subgroups.png").stat().st_size > 1000
    outcome = mammostream(f"{command} --by site --by-table {tmp_path}/sites.csv")
    assert outcome.code == 0, outcome.err
    assert any(line.split()[:3] == ["x", "104", "26"] for line in outcome.out.splitlines())


def test_intervals_are_over_the_subgroups_patients(divided):
    matched, groups = divided(*make(), ["view"])
    found = judge_subgroups(matched, groups, [None, None], 40)["view"]["values"][0]["per_class"]["mass"]
    rows = groups["view"][0] == "CC"
    alone = evaluate_predictions(
        matched.labels[rows], matched.probabilities[rows], matched.class_names, matched.patients[rows], None, 40
    )
    assert found == alone["per_class"]["mass"]


def test_a_table_joins_by_what_it_has_and_gaps_are_missing(divided):
    manifest, predictions = make()
    by_image = pd.DataFrame({"image_id": manifest["image_id"], "density": ["A", "B", None, "A"] * 30})
    _, groups = divided(manifest, predictions, ["density"], by_image.iloc[:-4])
    values, order, _ = groups["density"]
    assert (order, values[:4].tolist(), values[-4:].tolist()) == (
        ["A", "B", "missing"],
        ["A", "B", "missing", "A"],
        ["missing"] * 4,
    )
    by_patient = pd.DataFrame({"patient_id": [f"P{i}" for i in range(30)], "site": list("xy") * 15})
    _, groups = divided(manifest, predictions, ["site"], by_patient)
    assert groups["site"][0].tolist() == np.repeat(list("xy") * 15, 4).tolist()


def test_a_breast_whose_views_differ_has_several(divided):
    manifest, _ = make()
    breasts = manifest.drop_duplicates(["patient_id", "laterality"])[["patient_id", "laterality"]].assign(**{"max:mass": 0.5})
    manifest["density"] = ["A", "A", "B", "C"] * 30
    _, groups = divided(manifest, breasts, ["view", "density", "laterality"])
    assert set(groups["view"][0]) == {"several"}
    assert groups["density"][1] == ["A", "several"]
    assert groups["laterality"][1] == ["L", "R"]


def test_tiles_have_the_values_of_their_image(divided):
    manifest, _ = make(8)
    tiles = pd.DataFrame(
        [(f"{i}_y0_x{x}", i, f"{i}_y0_x{x}.png", x) for i in manifest["image_id"] for x in (0, 5)],
        columns=["key", "image_id", "t", "x"],
    )
    labels = tiles[["t"]].rename(columns={"t": "tile_path"}).assign(mass=[0, 1] * 8)
    _, groups = divided(labels, tiles[["key", "image_id"]].assign(**{"prob:mass": 0.5}), ["view"], manifest)
    assert groups["view"][0].tolist() == np.repeat(manifest["view"], 2).tolist()
    _, groups = divided(labels, tiles[["key"]].assign(**{"prob:mass": 0.5}), ["view"], manifest)  # the film is in the key
    assert groups["view"][0].tolist() == np.repeat(manifest["view"], 2).tolist()


def test_labels_of_one_thing_are_its_values(divided):
    manifest, predictions = make(16)
    for i, name in enumerate("abcd"):
        manifest[f"label:density_{name}"] = pd.array((np.arange(16) % 4 == i).astype(int), "Int8")
    manifest.loc[4, [f"label:density_{name}" for name in "abcd"]] = pd.NA
    _, groups = divided(manifest, predictions, ["density", "density_a"])
    assert groups["density"][0].tolist() == [*"abcd", "missing", *"bcd", *"abcd" * 2]
    assert groups["density"][1] == [*"abcd", "missing"]
    assert groups["density_a"][1] == ["0", "1", "missing"]


def test_numbers_come_in_bands(divided):
    manifest, predictions = make(120)
    ages = 38.5 + np.arange(120) // 4
    manifest["age"] = ages
    manifest["PatientAge"] = [f"{int(age):03}Y" for age in ages]
    manifest["dose"] = np.arange(120) / 100
    manifest["birads"] = np.arange(120) % 3
    by = ["age", "age_band", "age:45/60", "PatientAge", "dose", "birads"]
    _, groups = divided(manifest, predictions, by)
    tens = ["< 40", "40 to < 50", "50 to < 60", ">= 60"]
    for name in ("age", "age_band"):
        values, order, how = groups[name]
        assert (order, how) == (tens, "bands of ten")
        assert values.tolist() == [tens[int(np.clip(age // 10 - 3, 0, 3))] for age in ages]
    values, order, how = groups["age:45/60"]
    assert (order, how) == (["< 45", "45 to < 60", ">= 60"], "bands as given")
    assert [(values == name).sum() for name in order] == [
        (ages < 45).sum(),
        ((ages >= 45) & (ages < 60)).sum(),
        (ages >= 60).sum(),
    ]
    values, order, how = groups["dose"]
    assert how == "quartiles"
    assert [(values == name).sum() for name in order] == [30, 30, 30, 30]
    assert groups["birads"][1:] == (["0", "1", "2"], "")
    assert groups["PatientAge"][1:] == (tens, "bands of ten")


BAD = {
    "no such column": ("--by densty", "has no column 'densty' (did you mean 'density'?); its columns are: image_id"),
    "too many values": ("--by image_id", "has 120 different values, more than 50"),
    "words in bands": ("--by density:1/2", "column 'density' of", "holds 'A', which is no number"),
    "edges in disorder": ("--by age:60/40", "the edges of bands are ascending numbers"),
    "a table alone": ("--by-table x.csv", "--by-table x.csv serves --by"),
    "a table that is none": ("--by age --by-table {0}/gone.csv", "gone.csv does not exist"),
    "a table of others": (
        "--by age --by-table {0}/others.csv",
        "has no row of a judged image (the first of each: 'j0' and 'i000')",
    ),
    "a table of nothing": ("--by age --by-table {0}/nothing.csv", "does not name images; give image_id"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_columns_and_tables_are_one_line(what, mammostream, tmp_path):
    manifest, predictions = make()
    manifest["density"] = list("ABCD") * 30
    manifest.to_parquet(tmp_path / "labels.parquet")
    predictions.to_parquet(tmp_path / "p.parquet")
    pd.DataFrame({"image_id": ["j0"], "age": [50]}).to_csv(tmp_path / "others.csv", index=False)
    pd.DataFrame({"age": [50]}).to_csv(tmp_path / "nothing.csv", index=False)
    options, *messages = BAD[what]
    command = f"evaluate --predictions {tmp_path}/p.parquet --labels {tmp_path}/labels.parquet --output-dir {tmp_path}/out"
    outcome = mammostream(f"{command} {options.format(tmp_path)}")
    assert outcome.code == 2
    for message in messages:
        assert message in outcome.error
    assert not (tmp_path / "out").exists()
