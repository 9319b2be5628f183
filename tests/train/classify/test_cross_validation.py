"""Cross-validation: who trains, validates and tests, what is written, and runs that are killed, divided or changed."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import sys
from pathlib import Path

import imagecodecs
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from processes import Child, assert_same_tree, torchrun_to_end
from scipy.special import expit
from shard_sets import read_tiles, write_set
from sklearn.metrics import average_precision_score, balanced_accuracy_score, brier_score_loss, roc_auc_score
from test_finetune_survival import signals_at  # noqa: F401

from mammostream.dali_pipelines import LabelledLoader
from mammostream.models.checkpoints import load_checkpoint, restore_classifier
from mammostream.shards import open_shards
from mammostream.shards.identity import seen_by
from mammostream.train.levels.calibration import stored_calibrations

CLASSES = ["bright", "left"]
FOLDS = 3
TABLES = ("predictions.parquet", "image_predictions.parquet", "breast_predictions.parquet")
RUN = "--epochs 2 --batch-size 16 --freeze-backbone-epochs 1 --lr-backbone 1e-3 --lr-head 1e-2"


class Cohort:
    """Shards of 7 patients with 14 different tiles each, left and right, and their labels in two CSVs."""

    def __init__(self, road, folder: Path) -> None:
        rng = np.random.default_rng(0)
        source = open_shards(road.shards)
        tiles = read_tiles(source)
        counts = (7,) * 14  # write_set takes tile 7 * shard + position: each once
        scale = rng.permutation(np.linspace(0.2, 1.0, sum(counts)))
        unique = [
            np.clip(tiles[i % len(tiles)] * factor + rng.integers(0, 99, tiles[0].shape), 0, 65535).astype(np.uint16)
            for i, factor in enumerate(scale)
        ]
        self.shards = folder / "shards"
        write_set(source, self.shards, counts, tiles=unique)
        table = open_shards(self.shards).tiles()
        mean = [float(tile.mean()) for tile in read_tiles(open_shards(self.shards))]
        labels = pd.DataFrame({"tile_path": table["key"], "bright": np.array(mean) > np.median(mean)})
        labels["left"] = table["image_id"].str.endswith("L").to_numpy()
        labels = labels.astype(dict.fromkeys(CLASSES, float))
        labels.loc[rng.random(len(labels)) < 0.1, "bright"] = np.nan
        labels.loc[::11, CLASSES] = np.nan  # tiles without any label
        self.table, self.labels = table, labels
        self.first, self.second, self.all = folder / "first.csv", folder / "second.csv", folder / "all.csv"
        labels[:50].to_csv(self.first, index=False)
        labels[50:].to_csv(self.second, index=False)
        labels.to_csv(self.all, index=False)
        self.byol, self.small = road.byol, road.small

    def command(self, folder: Path, more: str = "") -> str:
        return (
            f"finetune --byol-checkpoint {self.byol} --train-csv {self.first} --val-csv {self.second} --shards {self.shards} "
            f"--class-names {' '.join(CLASSES)} {RUN} {self.small} --output-dir {folder} --folds {FOLDS} {more}"
        )


@pytest.fixture(scope="module")
def cohort(pretrained, tmp_path_factory) -> Cohort:
    return Cohort(pretrained, tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="module")
def whole(cohort, run_cli, tmp_path_factory) -> Path:
    """An uninterrupted cross-validation."""
    folder = tmp_path_factory.mktemp("whole")
    run_cli(cohort.command(folder))
    return folder


def assert_same_folds(ours: Path, theirs: Path) -> None:
    """The same in all but the files of models: those of a resumed run have other bytes, and so other hashes."""
    for name in ("folds.json", "folds.parquet"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    for fold in range(FOLDS):
        trees = [load_checkpoint(f / f"fold-{fold}/final_classification_model.pth", "classifier") for f in (ours, theirs)]
        for tree in trees:
            del tree["config"]["save_every_steps"]
        assert_same_tree(*trees)
    for name in (*TABLES, *(f"fold-{fold}/{table}" for fold in range(FOLDS) for table in TABLES)):
        pd.testing.assert_frame_equal(pd.read_parquet(ours / name), pd.read_parquet(theirs / name))


# ---------------------------------------------------------------- who does what


def test_each_patient_is_tested_once_by_a_model_that_never_saw_it(cohort, whole):
    plan = pd.read_parquet(whole / "folds.parquet").set_index("patient")
    oof = pd.read_parquet(whole / "predictions.parquet")
    assert len(oof) == oof["key"].nunique() == len(cohort.table)
    assert set(oof["key"]) == set(cohort.table["key"])
    assert (plan.loc[oof["patient_id"], "fold"].to_numpy() == oof["fold"]).all()
    patients = {fold: set(plan.index[plan["fold"] == fold]) for fold in range(FOLDS)}
    assert sum(map(len, patients.values())) == 7
    assert sorted(map(len, patients.values())) == [2, 2, 3]
    for fold in range(FOLDS):
        checkpoint = load_checkpoint(whole / f"fold-{fold}/final_classification_model.pth", "classifier")
        roles = {"trained": (fold + 2) % FOLDS, "validated": (fold + 1) % FOLDS, "": fold}
        for purpose, its in roles.items():
            found = seen_by(checkpoint["fitted_on"], patients[its], [""] * len(patients[its]))
            assert set(found) == {purpose}
    assert set(oof["seen"]) == {""}


def test_predictions_are_those_of_the_folds_last_model(cohort, whole):
    """From the loader on with nothing of the code that wrote them; images and breasts from their highest tile."""
    shards = open_shards(cohort.shards)
    oof = pd.read_parquet(whole / "predictions.parquet").set_index("key")
    images = pd.read_parquet(whole / "image_predictions.parquet").set_index("image_id")
    breasts = pd.read_parquet(whole / "breast_predictions.parquet").set_index(["patient_id", "laterality"])
    assert len(images) == 28
    assert len(breasts) == 14
    keys = shards.tiles().set_index("tile")["key"]
    for fold in range(FOLDS):
        path = whole / f"fold-{fold}/final_classification_model.pth"
        checkpoint = load_checkpoint(path, "classifier")
        assert checkpoint["epoch"] == 2
        model = restore_classifier(checkpoint, path)
        record = checkpoint["preprocessing"]
        loader = LabelledLoader(shards.shards(), batch_size=16, tile_size=32, mean=record["mean"], std=record["std"])
        logits = {
            keys[n]: row for batch, ns in loader for n, row in zip(ns.tolist(), model.classify(batch).detach(), strict=True)
        }
        mine = oof[oof["fold"] == fold]
        found = np.stack([logits[key].numpy() for key in mine.index]).astype(float)
        calibrations = stored_calibrations(checkpoint)
        fit = calibrations["tile"]["prob"]
        p = expit(fit.slope * found + fit.intercept)
        np.testing.assert_allclose(mine[[f"prob:{name}" for name in CLASSES]], p, atol=1e-5)
        scores = mine[[f"prob:{name}" for name in CLASSES]].astype(float)
        sides = pd.MultiIndex.from_arrays([mine["patient_id"], mine["image_id"].str[-1]])
        for level, table, by in (("image", images, mine["image_id"].to_numpy()), ("breast", breasts, sides)):
            highest = scores.groupby(by).max()
            fit = calibrations[level]["max"]
            values = highest.to_numpy()
            expected = expit(fit.slope * np.log(values / (1 - values)) + fit.intercept)
            np.testing.assert_allclose(table.loc[highest.index, [f"max:{name}" for name in CLASSES]], expected, atol=1e-6)
    # Positions for FROC.
    assert (oof["y"] == cohort.table.set_index("key").loc[oof.index, "y"]).all()
    assert set(oof["split"]) == {"val"}


# ---------------------------------------------------------------- figures


def thresholds_of(whole: Path, fold: int, level: str, score: str) -> np.ndarray:
    facts = json.loads(pq.read_schema(whole / f"fold-{fold}/predictions.parquet").metadata[b"mammostream"])
    return np.array([0.5 if t is None else t for t in facts["calibration"][level][score]["thresholds"]])


def test_gathered_figures_are_those_of_scikit_learn(cohort, whole):
    summary = json.loads((whole / "folds.json").read_text())
    oof = pd.read_parquet(whole / "predictions.parquet")
    labels = cohort.labels.set_index("tile_path").loc[oof["key"]]
    level = summary["levels"]["tile"]["prob"]
    decided = np.zeros((len(oof), 2), bool)
    for fold in range(FOLDS):
        mine = (oof["fold"] == fold).to_numpy()
        decided[mine] = oof.loc[mine, [f"prob:{name}" for name in CLASSES]] >= thresholds_of(whole, fold, "tile", "prob")
    for c, name in enumerate(CLASSES):
        known = labels[name].notna().to_numpy()
        y, p, found = labels[name][known].to_numpy(), oof[f"prob:{name}"][known].to_numpy(float), decided[known, c]
        pooled = level["pooled"]["per_class"][name]
        assert pooled["auc"] == pytest.approx(roc_auc_score(y, p))
        assert pooled["ap"] == pytest.approx(average_precision_score(y, p))
        assert pooled["brier"] == pytest.approx(brier_score_loss(y, p))
        assert pooled["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(y, found))
        assert pooled["positives"] == y.sum()
        low, high = pooled["intervals"]["auc"]
        assert low < pooled["auc"] < high
        folds = oof["fold"][known].to_numpy()
        aucs = [roc_auc_score(y[folds == fold], p[folds == fold]) for fold in range(FOLDS)]
        spread = level["folds"]["per_class"][name]["auc"]
        assert spread["values"] == pytest.approx(aucs)
        assert spread["mean"] == pytest.approx(np.mean(aucs))
        assert spread["sd"] == pytest.approx(np.std(aucs, ddof=1))
    assert level["pooled"]["patients"] == 7
    complete = labels.notna().all(axis=1).to_numpy()
    assert level["pooled"]["exact_match"] == pytest.approx((decided == (labels == 1).to_numpy())[complete].all(1).mean())

    # Images: positive if a tile is, negative if all are, missing otherwise.
    images = pd.read_parquet(whole / "image_predictions.parquet")
    of_tiles = cohort.labels.set_index("tile_path")["bright"].groupby(cohort.table.set_index("key")["image_id"])
    truth = of_tiles.max().where((of_tiles.max() == 1) | (of_tiles.count() == of_tiles.size())).loc[images["image_id"]]
    known = truth.notna().to_numpy()
    figures = summary["levels"]["image"]["top3"]["pooled"]["per_class"]["bright"]
    assert figures["positives"] == truth.sum()
    assert figures["negatives"] == (truth == 0).sum()
    assert figures["auc"] == pytest.approx(roc_auc_score(truth[known], images["top3:bright"][known]))
    assert set(summary["levels"]["breast"]) == {"max", "top3", "noisy_or"}


@pytest.mark.parametrize(("table", "level"), [("predictions", "tile"), ("image_predictions", "image")])
def test_evaluate_takes_the_table_and_finds_the_same(cohort, whole, mammostream, tmp_path, table, level):
    outcome = mammostream(
        f"evaluate --predictions {whole}/{table}.parquet --labels {cohort.all} --output-dir {tmp_path} --bootstrap 200"
    )
    assert outcome.code == 0, outcome.err
    assert "flattered; judge it on" not in outcome.out + outcome.err
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    score = "prob" if level == "tile" else "max"
    pooled = json.loads((whole / "folds.json").read_text())["levels"][level][score]["pooled"]
    for name in CLASSES:
        for figure in ("auc", "ap", "brier"):
            ours, theirs = pooled["per_class"][name][figure], metrics["per_class"][name][figure]
            assert ours == theirs or ours == pytest.approx(theirs), (name, figure)
    assert metrics["patients"] == 7


def test_the_console_says_mean_and_pooled_figure(cohort, whole, mammostream):
    """Run again, everything is finished: nothing is trained, the same is said and written."""
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*.pth")}
    outcome = mammostream(cohort.command(whole, "--resume auto"))
    assert outcome.code == 0, outcome.err
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*.pth")} == before
    assert "fine-tuning" not in outcome.err
    level = json.loads((whole / "folds.json").read_text())["levels"]["tile"]["prob"]
    folds, pooled = level["folds"]["per_class"]["bright"]["auc"], level["pooled"]["per_class"]["bright"]
    low, high = pooled["intervals"]["auc"]
    assert (
        f"tiles, bright: AUC {folds['mean']:.3f} ± {folds['sd']:.3f}, pooled {pooled['auc']:.3f} ({low:.3f}-{high:.3f}); AP"
        in outcome.out
    )
    assert "breasts, bright: AUC undefined in 3 of 3 folds, pooled undefined; AP" in outcome.out  # all are positive
    assert "mean ± standard deviation over 3 folds; pooled with 95 % intervals over patients" in outcome.out


def test_the_report_shows_folds_and_pooled_figures(whole, mammostream, tmp_path):
    outcome = mammostream(f"report {whole} --output {tmp_path}/page.html")
    assert outcome.code == 0, outcome.err
    page = (tmp_path / "page.html").read_text()
    figures = json.loads((whole / "folds.json").read_text())["levels"]["tile"]["prob"]
    low, high = figures["pooled"]["per_class"]["left"]["intervals"]["auc"]
    mean = figures["folds"]["per_class"]["left"]["auc"]["mean"]
    for text in (f"{mean:.4g}", f"{low:.3f} - {high:.3f}", "<h2>Cross-validation"):
        assert text in page
    assert page.count("<h2>Fine-tuning") == FOLDS


# ---------------------------------------------------------------- interruptions


def test_folds_as_tasks_in_any_order_give_the_same(cohort, whole, mammostream, tmp_path):
    """One CSV instead of two, and the last task to finish gathers."""
    one = cohort.command(tmp_path).replace(f"--train-csv {cohort.first} --val-csv {cohort.second}", f"--train-csv {cohort.all}")
    for fold, left in ((2, "0, 1"), (0, "1")):
        outcome = mammostream(f"{one} --fold {fold}")
        assert outcome.code == 0, outcome.err
        assert f"folds left: {left}; run each with --fold, or all of them without it" in outcome.out
        assert not (tmp_path / "folds.json").exists()
    assert "out-of-fold predictions and folds.json" in mammostream(f"{one} --fold 1").out
    assert_same_folds(tmp_path, whole)
    again = mammostream(f"{one} --fold 1")
    assert again.code == 2
    assert "is there already; resume with --resume auto" in again.error


def test_a_killed_cross_validation_goes_on_within_and_between_folds(
    cohort,
    whole,
    run_cli,
    single_thread_environment,
    tmp_path,
):
    """SIGKILL within the first fold, then between its checkpoint and its predictions, then within the second."""
    script = [Path(sys.executable).with_name("mammostream")]
    command = [*script, *shlex.split(cohort.command(tmp_path, "--save-every-steps 1 --resume auto"))]
    steps = (
        lambda: (tmp_path / "fold-0/last_classification_model.pth").exists(),
        lambda: (tmp_path / "fold-0/final_classification_model.pth").exists(),
        lambda: (tmp_path / "fold-1/last_classification_model.pth").exists(),
    )
    for number, reached in enumerate(steps):
        with Child(command, tmp_path / f"log{number}", single_thread_environment) as child:
            child.wait_until(reached)
            child.process.send_signal(signal.SIGKILL)
            child.end()
        assert not (tmp_path / "folds.json").exists()
    kept = tmp_path / "fold-0/final_classification_model.pth"
    finished = (tmp_path / "fold-0/predictions.parquet").exists()
    before = kept.stat().st_mtime_ns
    run_cli(cohort.command(tmp_path, "--resume auto"))
    assert finished
    assert kept.stat().st_mtime_ns == before  # a finished fold is not run again
    assert_same_folds(tmp_path, whole)


def test_a_stopped_fold_says_how_to_go_on(cohort, whole, mammostream, signals_at, tmp_path):  # noqa: F811
    signals_at[1] = signal.SIGTERM
    outcome = mammostream(cohort.command(tmp_path))
    assert outcome.code == 75
    assert "resume with the same command and --resume auto" in outcome.err
    assert mammostream(cohort.command(tmp_path, "--resume auto")).code == 0
    assert_same_folds(tmp_path, whole)


def test_two_processes_give_one_table(cohort, single_thread_environment, tmp_path):
    command = ["-m", "mammostream", *shlex.split(cohort.command(tmp_path))]
    said = torchrun_to_end(command, single_thread_environment)
    assert said.count("mean ± standard deviation over 3 folds") == 1
    oof = pd.read_parquet(tmp_path / "predictions.parquet")
    assert sorted(oof["key"]) == sorted(cohort.table["key"])
    assert oof[[f"prob:{name}" for name in CLASSES]].notna().all().all()


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("--folds 4", "were made with --folds 3, not 4"),
        ("--seed 1", "were made with --seed 0, not 1"),
        ("--lr-head 0.02", "were made with --lr-head 0.01, not 0.02"),
        ("--class-names bright", "were made with --class-names bright left, not bright"),
        ("--train-csv {other}", "were made with other labels"),
        ("--byol-checkpoint {byol}", "were made with other --byol-checkpoint"),
        ("--sampling balanced", "were made with --sampling natural, not balanced"),
    ],
)
def test_changed_inputs_are_refused_by_name(cohort, whole, mammostream, tmp_path, change, said):
    labels = pd.read_csv(cohort.first)
    row = labels["bright"].notna().idxmax()
    labels.loc[row, "bright"] = 1 - labels.loc[row, "bright"]
    labels.to_csv(tmp_path / "other.csv", index=False)
    byol = cohort.byol.with_name("mammogram_byol_epoch_003.pth")
    command = cohort.command(whole, "--resume auto")
    if "--class-names" in change:
        command = command.replace(f"--class-names {' '.join(CLASSES)}", "")
    outcome = mammostream(f"{command} {change.format(other=tmp_path / 'other.csv', byol=byol)}")
    assert outcome.code == 2
    assert said in outcome.error


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("--folds 2", "--folds 2: give 3 or more"),
        ("--folds 8", "--folds 8: there are 7 patients only"),
        ("--fold 3", "--fold 3 is none of the 3 folds; give 0 to 2"),
        ("--seeds 1 2", "--folds and --seeds both train several times"),
        ("--resume x.pth", "with --folds use --resume auto"),
        ("--val-csv {first}", "is in both --train-csv and --val-csv; keep it in one"),
    ],
)
def test_options_that_do_not_fit_are_refused(cohort, mammostream, tmp_path, change, said):
    outcome = mammostream(f"{cohort.command(tmp_path / 'run')} {change.format(first=cohort.first)}")
    assert outcome.code == 2
    assert said in outcome.error
    assert not (tmp_path / "run").exists()


def test_without_folds_there_must_be_validation(cohort, mammostream, tmp_path):
    plain = cohort.command(tmp_path / "run").replace(f"--val-csv {cohort.second}", "")
    assert "--fold 1 is one of --folds" in mammostream(plain.replace("--folds 3", "--fold 1")).error
    assert "give --val-csv, or --folds for a cross-validation" in mammostream(plain.replace("--folds 3", "")).error


def test_what_failed_before_a_fold_began_binds_nothing(cohort, mammostream, tmp_path):
    outcome = mammostream(f"{cohort.command(tmp_path)} --byol-checkpoint {tmp_path}/gone.pth")
    assert outcome.code == 2
    assert "gone.pth does not exist" in outcome.error
    assert not (tmp_path / "folds.parquet").exists()
    outcome = mammostream(f"{cohort.command(tmp_path)} --pos-weight 1 2 3")
    assert "--pos-weight has 3 values for 2 classes" in outcome.error
    assert mammostream(f"{cohort.command(tmp_path)} --fold 0").code == 0
    outcome = mammostream(f"{cohort.command(tmp_path)} --fold 1 --pos-weight auto")
    assert "were made with --pos-weight its default, not auto" in outcome.error


def test_a_finished_fold_of_another_run_is_not_taken(cohort, whole, mammostream, tmp_path):
    shutil.copytree(whole / "fold-1", tmp_path / "fold-1")
    outcome = mammostream(cohort.command(tmp_path, "--seed 5 --resume auto"))
    assert outcome.code == 2
    assert "fold-1/predictions.parquet is of other folds than" in outcome.error


def test_a_folder_of_tiles_with_copies_across_patients(cohort, mammostream, run_cli, tmp_path):
    """Patients come from --patient-regex; a tile of two patients is refused, or recorded; there are no breasts."""
    shards = open_shards(cohort.shards)
    frame = shards.tiles()
    names = []
    for tile, row in zip(read_tiles(shards), frame.itertuples(), strict=True):
        names.append(f"{row.patient_id}_{row.image_id}_tile_{row.y}.png")
        (tmp_path / names[-1]).write_bytes(imagecodecs.png_encode(tile))
    labels = cohort.labels.assign(tile_path=names)
    labels.to_csv(tmp_path / "labels.csv", index=False)
    command = (
        f"finetune --byol-checkpoint {cohort.byol} --train-csv {tmp_path}/labels.csv --tiles-dir {tmp_path} "
        f"--class-names bright --patient-regex ^p[0-9]+ {RUN} --epochs 1 {cohort.small} --folds 3"
    )
    assert mammostream(f"{command} --output-dir {tmp_path}/run").code == 0
    oof = pd.read_parquet(tmp_path / "run/predictions.parquet")
    assert oof["patient_id"].nunique() == 7
    assert not (tmp_path / "run/breast_predictions.parquet").exists()
    outcome = mammostream(
        f"evaluate --predictions {tmp_path}/run/predictions.parquet --labels {tmp_path}/labels.csv --bootstrap 50"
    )
    assert outcome.code == 0, outcome.err

    plan = pd.read_parquet(tmp_path / "run/folds.parquet").set_index("patient")["fold"]
    one, other = (next(n for n in names if plan[n[:2]] == fold) for fold in (0, 1))
    shutil.copy(tmp_path / one, tmp_path / other)
    outcome = mammostream(f"{command} --output-dir {tmp_path}/copies")
    assert outcome.code == 2
    assert f"patients of different folds share 1 tile ({other} (= {one})), so folds would be tested on" in outcome.error
    assert not (tmp_path / "copies").exists()
    run_cli(f"{command} --output-dir {tmp_path}/copies --allow-leakage")
    checkpoint = load_checkpoint(tmp_path / "copies/fold-0/final_classification_model.pth", "classifier")
    assert checkpoint["leakage"] == {"tiles": [f"{other} (= {one})"]}
