"""Pre-training that is resumed with more or fewer processes: at an epoch's start it goes on, within one it says how."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import assert_same_tree, torchrun_to_end
from runs import end_of, lines_without_timing, small_config

from mammostream.common.errors import BadInput, Stopped
from mammostream.models.checkpoints import load_checkpoint
from mammostream.shards import open_shards
from mammostream.train.byol import pretrain as loop
from mammostream.train.byol.pretrain import pretrain
from mammostream.train.run.charts import read_metrics
from mammostream.train.run.schedules import byol_momenta, learning_rates

# One process: nine batches and five steps an epoch; two: four batches each and two steps.
OPTIONS = {"batch_size": 3, "accumulate": 2, "limit_tiles": 28, "epochs": 3, "save_every": 1, "lr": 1e-3}

TWO = f"""
import os, sys, torch
from pathlib import Path
from runs import small_config
from mammostream.common.errors import BadInput
from mammostream.shards import open_shards
from mammostream.train.byol.pretrain import pretrain
from mammostream.train.run.runtime import join_processes

torch.set_num_threads(1)
config, (shards, within, start, folder) = small_config(**{OPTIONS!r}), sys.argv[1:]
with join_processes(config) as runtime:
    try:
        pretrain(open_shards(Path(shards)), Path(folder), config, resume=Path(within), runtime=runtime)
    except BadInput as error:
        if runtime.is_main:
            print(error, flush=True)
    pretrain(open_shards(Path(shards)), Path(folder), config, resume=Path(start), runtime=runtime)
os._exit(0)  # see test_torchrun.py
"""


def name(kind: str) -> str:
    return f"mammogram_byol_{kind}.pth"


def stopped_after(step: int, *arguments, **options) -> None:
    """Pre-train until this process gets a signal after a step."""

    def step_and_signal(state, *rest):
        result = train_step(state, *rest)
        if state.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    train_step = loop.train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", step_and_signal)
        with pytest.raises(Stopped, match=f"stopped after step {step} of "):
            pretrain(*arguments, **options)


@pytest.fixture(scope="module")
def one(road, tmp_path_factory) -> Path:
    """A run of one process, stopped within its second epoch."""
    folder = tmp_path_factory.mktemp("one")
    stopped_after(7, open_shards(road.shards), folder, small_config(**OPTIONS))
    return folder


def test_from_one_process_to_two_and_back(road, one, single_thread_environment, tmp_path):
    shards, config = open_shards(road.shards), small_config(**OPTIONS)
    two, again = (tmp_path / folder for folder in ("two", "again"))
    two.mkdir()
    shutil.copy(one / "metrics.jsonl", two)
    (tmp_path / "two.py").write_text(TWO)
    arguments = [str(path) for path in (road.shards, one / name("last"), one / name("epoch_001"), two)]
    said = torchrun_to_end([str(tmp_path / "two.py"), *arguments], single_thread_environment)
    assert "was saved within epoch 2 by 1 process, among whom" in said
    assert "resume with 1 process until the epoch's end; or, from the end of an epoch, with --resume" in said
    assert f"--resume {one}/mammogram_byol_" in said
    assert "resumed: epoch 2 is dealt out anew, since 1 process trained the epochs before and now there are 2: 2 steps" in said

    epochs = [line for line in read_metrics(two / "metrics.jsonl") if "epoch_mean/epoch" in line]
    assert [(line["step"], line["epoch_mean/epoch"]) for line in epochs] == [(5, 1), (7, 2), (9, 3)]
    assert load_checkpoint(two / name("final"), "byol")["epoch"] == 3
    # The rest of the schedules is that of a run of two processes: six steps, of which two are an epoch.
    lrs, momenta = learning_rates(1e-3, 6, round(min(config.warmup_epochs * 2, 0.6))), byol_momenta(config.momentum, 6)
    np.testing.assert_allclose([line["epoch_mean/lr"] for line in epochs[1:]], lrs[[3, 5]], atol=1e-12)
    np.testing.assert_allclose([line["epoch_mean/momentum"] for line in epochs[1:]], momenta[[3, 5]])

    # Back to one process, which keeps the effective batch; stopped there within the epoch, it goes on bit for bit.
    again.mkdir()
    for folder, source in ((again, two), (tmp_path / "stopped", two)):
        folder.mkdir(exist_ok=True)
        shutil.copy(source / "metrics.jsonl", folder)
    config = small_config(**(OPTIONS | {"accumulate": 4}))
    pretrain(shards, again, config, resume=two / name("epoch_002"))
    assert [line["step"] for line in read_metrics(again / "metrics.jsonl") if "epoch_mean/epoch" in line] == [5, 7, 10]
    stopped_after(8, shards, tmp_path / "stopped", config, resume=two / name("epoch_002"))
    pretrain(shards, tmp_path / "stopped", config, resume=tmp_path / "stopped" / name("last"))
    assert lines_without_timing(tmp_path / "stopped") == lines_without_timing(again)
    assert_same_tree(end_of(tmp_path / "stopped", "final"), end_of(again, "final"))


def test_a_checkpoint_from_before_the_number_could_change_goes_on(road, one, tmp_path):
    """One of two processes, made of one of one: what decides is what it says of itself."""
    shards, config = open_shards(road.shards), small_config(**OPTIONS)
    path: Path = tmp_path / name("last")
    checkpoint = load_checkpoint(one / name("epoch_001"), "byol")
    del checkpoint["resume"]["origin"]
    (process,) = checkpoint["resume"]["processes"]
    process["loader"]["world_size"] = 2
    checkpoint["resume"]["processes"] *= 2
    torch.save(checkpoint | {"step": 4, "epoch": 2}, path)
    metrics = pretrain(shards, tmp_path, config, resume=path)
    assert (metrics["epoch"], load_checkpoint(path, "byol")["step"]) == (3, 9)
    torch.save(checkpoint | {"step": 3, "epoch": 1}, path)
    with pytest.raises(BadInput, match=r"within epoch 2 by 2 processes.*resume with 2 processes until the epoch's end"):
        pretrain(shards, tmp_path, config, resume=path)
