"""Class-balanced sampling: the draws against their definition, and runs that sample: resumed, in two processes, and natural."""

from __future__ import annotations

import json
import shlex
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from processes import assert_same_tree, torchrun_to_end
from test_finetune_survival import assert_same_run, command_of, signals_at, uninterrupted  # noqa: F401

from mammostream.models.checkpoints import load_checkpoint
from mammostream.shards import open_shards
from mammostream.train.classify import run as run_module
from mammostream.train.classify.losses import positive_weights
from mammostream.train.classify.sampling import balanced_numbers, describe_sampling, expected_draws, strata_of
from mammostream.train.run.labels import join_shards, read_labels

LABELS = arrays(
    np.float32,
    st.tuples(st.integers(1, 40), st.integers(1, 3)),
    elements=st.sampled_from([0.0, 0.0, 0.0, 1.0, np.nan]),
)

# ---------------------------------------------------------------- the definition


@given(LABELS, st.integers(0, 5), st.integers(0, 5))
@settings(max_examples=300, deadline=None)
def test_strata_get_equal_draws_and_tiles_of_a_stratum_too(labels, seed, epoch):
    """Draws of strata that do not overlap can be counted: they differ by one at most, and so do those of their tiles."""
    drawn = balanced_numbers(np.arange(len(labels)), labels, seed, epoch)
    assert len(drawn) == len(labels)
    times = np.bincount(drawn, minlength=len(labels))
    strata = [rows for rows in strata_of(labels) if len(rows)]
    assert set(np.concatenate(strata)) == set(range(len(labels)))
    assert all(np.isin(np.flatnonzero(labels[:, c] == 1), rows).all() for c, rows in enumerate(strata_of(labels)[:-1]))
    share = len(labels) / len(strata)
    if sum(map(len, strata)) == len(labels):
        for rows in strata:
            assert abs(times[rows].sum() - share) < 1
            assert times[rows].max() - times[rows].min() <= 1
    for rows in strata:  # a tile in several strata has at least the draws of each
        assert times[rows].min() >= (int(share) // len(rows) if len(strata) > 1 else 1)
    np.testing.assert_array_equal(drawn, balanced_numbers(np.arange(len(labels)), labels, seed, epoch))


@given(LABELS)
@settings(max_examples=20, deadline=None)
def test_expected_draws_are_the_mean_of_many_epochs(labels):
    epochs = 400
    drawn = np.concatenate([balanced_numbers(np.arange(len(labels)), labels, 1, epoch) for epoch in range(epochs)])
    times = np.bincount(drawn, minlength=len(labels)) / epochs
    expected = expected_draws(labels)
    assert expected.sum() == pytest.approx(len(labels))
    # Of each stratum a tile's draws vary by less than 1 within an epoch, or the stratum's own by at most 1.
    np.testing.assert_allclose(times, expected, atol=6 * len(strata_of(labels)) * 0.5 / np.sqrt(epochs))


def test_two_percent_positives_become_a_half():
    labels = np.zeros((5000, 1), np.float32)
    labels[::50] = 1  # 100
    epochs = [balanced_numbers(np.arange(5000), labels, 0, epoch) for epoch in range(2)]
    for drawn in epochs:
        counts = Counter(drawn.tolist())
        assert {counts[n] for n in range(0, 5000, 50)} == {25}
        assert sum(counts.values()) == 5000
        assert max(counts[n] for n in range(5000) if n % 50) == 1
    negatives = [set(drawn[drawn % 50 > 0].tolist()) for drawn in epochs]
    assert len(negatives[0]) == len(negatives[1]) == 2500
    assert negatives[0] != negatives[1]
    assert list(epochs[0]) != sorted(epochs[0])
    assert describe_sampling(labels, ["cancer"]) == (
        "balanced sampling, 5000 draws an epoch, about 2500 from each of: cancer (100 tiles, 25 times each), "
        "positive in no class (4900 tiles, 0.51 times each)"
    )


def test_the_automatic_weight_counts_labels_as_they_are_drawn():
    rng = np.random.default_rng(3)
    labels = (rng.random((400, 2)) < [0.05, 0.2]).astype(np.float32)
    labels[rng.random((400, 2)) < 0.1] = np.nan
    weights = positive_weights(labels, ("auto",), ["a", "b"], expected_draws(labels))
    drawn = np.concatenate([labels[balanced_numbers(np.arange(400), labels, 0, epoch)] for epoch in range(200)])
    np.testing.assert_allclose(weights, (drawn == 0).sum(0) / (drawn == 1).sum(0), rtol=0.01)
    one = labels[:, :1]
    np.testing.assert_allclose(positive_weights(np.nan_to_num(one), ("auto",), ["a"], expected_draws(np.nan_to_num(one))), 1)
    natural = positive_weights(labels, ("auto",), ["a", "b"])
    np.testing.assert_allclose(natural, (labels == 0).sum(0) / (labels == 1).sum(0), rtol=1e-6)


# ---------------------------------------------------------------- runs


@pytest.fixture
def read(monkeypatch) -> list[list[int]]:
    """The numbers of each batch that a run trains on."""
    batches: list[list[int]] = []

    class Recording(run_module.LabelledLoader):
        def __iter__(self):
            for images, numbers in super().__iter__():
                if self._reader["shuffle"]:
                    batches.append(numbers.tolist())
                yield images, numbers

    monkeypatch.setattr(run_module, "LabelledLoader", Recording)
    return batches


def labels_by_number(road) -> tuple[np.ndarray, np.ndarray]:
    found = join_shards(read_labels(road.train_csv, road.classes), open_shards(road.shards), "")
    return found.numbers, found.labels


def test_a_run_reads_the_draws_of_its_seed_and_resumes_bit_for_bit(
    pretrained,
    mammostream,
    run_cli,
    signals_at,  # noqa: F811
    read,
    tmp_path,
):
    run = f"{command_of(pretrained, tmp_path)} --sampling balanced --max-samples 2000 --batch-size 16 --seed 3"
    whole = run.replace(str(tmp_path), f"{tmp_path}/whole")
    outcome = mammostream(whole)
    assert outcome.code == 0, outcome.err
    numbers, labels = labels_by_number(pretrained)
    assert "balanced sampling, " in outcome.out + outcome.err
    steps = len(read) // 2
    epochs = [[n for batch in half for n in batch] for half in (read[:steps], read[steps:])]
    for epoch, its in enumerate(epochs):
        assert Counter(its) == Counter(balanced_numbers(numbers, labels, 3, epoch).tolist())
    assert epochs[0] != epochs[1]
    batches = list(read)
    read.clear()

    stops = {1: signal.SIGTERM, steps: signal.SIGUSR1, steps + 2: signal.SIGTERM}
    for step, number in stops.items():
        signals_at[step] = number
        assert mammostream(f"{run} --resume auto").code == 75
        assert load_checkpoint(tmp_path / "last_classification_model.pth", "classifier")["step"] == step
    assert mammostream(f"{run} --resume auto").code == 0
    assert read == batches
    assert_same_run(tmp_path, tmp_path / "whole")
    # Validation tiles are not sampled.
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    known = pd.read_csv(pretrained.val_csv)[pretrained.classes]
    for name in pretrained.classes:
        figures = metrics["per_class"][name]
        assert (figures["positives"], figures["negatives"]) == ((known[name] == 1).sum(), (known[name] == 0).sum())

    outcome = mammostream(f"{run.replace('--sampling balanced', '--sampling natural')} --resume auto")
    assert "was trained with --sampling balanced, not natural; resume with it" in outcome.error


def test_natural_sampling_is_the_run_without_the_option(pretrained, uninterrupted, run_cli, mammostream, tmp_path):  # noqa: F811
    """And a checkpoint of an earlier version, which knows no such option, goes on."""
    run_cli(f"{command_of(pretrained, tmp_path / 'named')} --sampling natural")
    assert_same_run(tmp_path / "named", uninterrupted)
    path = tmp_path / "named/last_classification_model.pth"
    checkpoint = load_checkpoint(path, "classifier")
    del checkpoint["config"]["sampling"]
    torch.save(checkpoint, path)
    run_cli(f"{command_of(pretrained, tmp_path / 'named')} --resume auto")
    outcome = mammostream(f"{command_of(pretrained, tmp_path / 'named')} --resume auto --sampling balanced")
    assert "was trained with --sampling natural, not balanced" in outcome.error


def test_nothing_to_balance_is_refused(pretrained, mammostream, tmp_path):
    for value, said in ((0, "no training tile is positive"), (1, "all training tiles are positive")):
        labels = pd.read_csv(pretrained.train_csv).assign(bright=value)
        labels.to_csv(tmp_path / "labels.csv", index=False)
        options = pretrained.finetune_options.replace(" ".join(pretrained.classes), "bright")
        outcome = mammostream(
            f"finetune {options} --train-csv {tmp_path}/labels.csv --output-dir {tmp_path}/run --sampling balanced"
        )
        assert outcome.code == 2
        assert f"--sampling balanced: {said} (classes: bright), so there is nothing to balance" in outcome.error
        assert not (tmp_path / "run").exists()


TWO = """
import json, os, shlex, sys
from pathlib import Path
import torch
from mammostream.shards import open_shards
from mammostream.train.classify import run as run_module
from mammostream.train.classify.command import finetune as command

torch.set_num_threads(1)
read = []
class Recording(run_module.LabelledLoader):
    def __iter__(self):
        for images, numbers in super().__iter__():
            if self._reader["shuffle"]:
                read.append(numbers.tolist())
            yield images, numbers
run_module.LabelledLoader = Recording
command.main(sys.argv[2:], standalone_mode=False)
Path(sys.argv[1], os.environ["RANK"] + ".json").write_text(json.dumps(read))
os._exit(0)  # see test_torchrun.py
"""


def test_two_processes_share_an_epochs_draws(pretrained, single_thread_environment, tmp_path):
    (tmp_path / "two.py").write_text(TWO)
    options = command_of(pretrained, tmp_path / "run").removeprefix("finetune ")
    arguments = f"{options} --sampling balanced --max-samples 33 --batch-size 4"
    torchrun_to_end([str(tmp_path / "two.py"), str(tmp_path), *shlex.split(arguments)], single_thread_environment)
    numbers, labels = labels_by_number(pretrained)
    labelled = ~np.isnan(labels).all(1)
    frame = pd.read_csv(pretrained.train_csv)
    first = frame[frame[pretrained.classes].notna().any(axis=1)].head(33)["tile_path"]
    tiles = open_shards(pretrained.shards).tiles("train").set_index("key").loc[first]["tile"]
    chosen = np.isin(numbers, tiles) & labelled
    assert chosen.sum() == 33
    shares = [json.loads(Path(tmp_path, f"{rank}.json").read_text()) for rank in (0, 1)]
    for epoch in range(2):
        mine = [[n for batch in half[epoch * len(half) // 2 : (epoch + 1) * len(half) // 2] for n in batch] for half in shares]
        assert [len(share) for share in mine] == [16, 17]
        expected = balanced_numbers(numbers[chosen], labels[chosen], 0, epoch)
        assert Counter(mine[0] + mine[1]) == Counter(expected.tolist())
    final = load_checkpoint(tmp_path / "run/final_classification_model.pth", "classifier")
    assert final["step"] == 10
    assert_same_tree(final["class_names"], pretrained.classes)
