"""Pre-training: the step, a run's files, and a killed run that goes on as if nothing had happened."""

from __future__ import annotations

import imagecodecs
import numpy as np
import pytest
import torch

from common.errors import BadInput
from dali_pipelines import PretrainLoader
from models.backbones import build_backbone
from models.byol import MammogramBYOL
from models.checkpoints import load_checkpoint
from shards import open_shards
from train.config import PretrainConfig
from train.pictures import read_metrics
from train.pretrain import TrainingState, pretrain, train_step
from train.runtime import Runtime, resolve_runtime
from train.schedules import byol_momenta, learning_rates

CPU = Runtime(torch.device("cpu"), "fp32")


def small_config(**options):
    small = {"arch": "resnet18", "hidden_dim": 32, "proj_dim": 16, "batch_size": 8, "limit_tiles": 16, "epochs": 1}
    return PretrainConfig(**(small | {"device": "cpu", "num_workers": 2, "wandb_mode": "disabled"} | options))


def assert_equal_states(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


# ---------------------------------------------------------------- the step


def test_a_step_trains_the_online_network_and_moves_the_target_after_it(road):
    torch.manual_seed(0)
    config = small_config()
    loader = PretrainLoader(
        open_shards(road.shards).shards("train"), batch_size=8, tile_size=road.tile_size, mean=0.449, std=0.226
    )
    model = MammogramBYOL(build_backbone("resnet18"), hidden_dim=32, proj_dim=16).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, fused=True)
    lrs, momenta = learning_rates(1e-2, 4, 1), byol_momenta(0.9, 4)
    state = TrainingState(model, model, optimizer, CPU.scaler(), lrs, momenta)
    online = [*model.backbone.parameters(), *model.projection_head.parameters()]
    target = [*model.backbone_momentum.parameters(), *model.projection_head_momentum.parameters()]
    for step, (view1, view2, _) in zip(range(3), loader, strict=False):
        online_before, target_before = ([p.detach().clone() for p in part] for part in (online, target))
        output, norm = train_step(state, CPU, config, [(view1, view2)])
        assert -1 <= output.loss.item() <= 1
        assert output.projections.shape == (8, 16)
        assert norm.item() > 0
        assert not output.loss.requires_grad
        assert state.step == step + 1
        assert optimizer.param_groups[0]["lr"] == lrs[step]
        moved = [not torch.equal(a, b) for a, b in zip(online, online_before, strict=True)]
        assert all(moved)
        m = float(momenta[step])
        for now, before, towards in zip(target, target_before, online, strict=True):
            torch.testing.assert_close(now, m * before + (1 - m) * towards, rtol=1e-5, atol=1e-7)
        assert not torch.equal(target[0], target_before[0])


def test_a_step_clips_the_gradient(road):
    loader = PretrainLoader(
        open_shards(road.shards).shards("train"), batch_size=8, tile_size=road.tile_size, mean=0.449, std=0.226
    )
    view1, view2, _ = next(iter(loader))
    deltas = {}
    for clip in (1e-3, 1e9):
        torch.manual_seed(0)
        model = MammogramBYOL(build_backbone("resnet18"), hidden_dim=32, proj_dim=16).train()
        before = model.backbone.conv1.weight.detach().clone()
        # Plain SGD: its step is the gradient, so the step's length tells the clipping.
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0, fused=True)
        state = TrainingState(model, model, optimizer, CPU.scaler(), np.array([1.0]), np.array([1.0]))
        _, norm = train_step(state, CPU, small_config(gradient_clip=clip), [(view1, view2)])
        deltas[clip] = (model.backbone.conv1.weight.detach() - before).norm().item()
    assert norm.item() > 1e-2  # the norm before clipping
    assert deltas[1e-3] < 1e-3
    assert deltas[1e-3] == pytest.approx(deltas[1e9] * 1e-3 / norm.item(), rel=1e-2)


# ---------------------------------------------------------------- a run's files


def test_a_run_writes_its_checkpoints_metrics_and_pictures(pretrained):
    folder = pretrained.pretrained
    names = sorted(path.name for path in folder.glob("*.pth"))
    assert names == [f"mammogram_byol_{name}.pth" for name in ("best", "epoch_003", "final", "last")]
    final = load_checkpoint(pretrained.byol, "byol")
    tiles = len(open_shards(pretrained.shards).tiles("train"))
    assert (final["epoch"], final["step"], final["arch"]) == (4, 4 * (tiles // 16), "resnet18")
    assert load_checkpoint(folder / "mammogram_byol_epoch_003.pth", "byol")["epoch"] == 3
    assert_equal_states(
        final["model_state_dict"], load_checkpoint(folder / "mammogram_byol_last.pth", "byol")["model_state_dict"]
    )
    assert final["preprocessing"] == open_shards(pretrained.shards).preprocessing | {"mean": 0.449, "std": 0.226}

    epochs = [line for line in read_metrics(folder / "metrics.jsonl") if "epoch_mean/loss" in line]
    losses = [line["epoch_mean/loss"] for line in epochs]
    assert [line["epoch_mean/epoch"] for line in epochs] == [1, 2, 3, 4]
    assert all(-1 <= loss <= 1 for loss in losses)
    assert all(line["epoch_mean/z_std"] > 0.01 for line in epochs)
    best = load_checkpoint(folder / "mammogram_byol_best.pth", "byol")
    assert best["metrics"]["loss"] == min(losses) == final["resume"]["best"]["loss"]
    assert best["epoch"] == 1 + losses.index(min(losses))
    assert epochs[-1]["step"] == final["step"]

    for name in ("views.png", "curves.png"):
        picture = imagecodecs.png_decode((folder / name).read_bytes())
        assert picture.ndim == 3
        assert picture[..., :3].std() > 10
    assert "limit_tiles: null" in (folder / "config.yaml").read_text()
    assert not list(folder.glob(".*.tmp"))


def test_limit_tiles_reads_that_many_and_never_validation_tiles(road, tmp_path):
    shards = open_shards(road.shards)
    metrics = pretrain(shards, tmp_path, small_config(limit_tiles=19, epochs=1))
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] == 19 // 8
    assert load_checkpoint(tmp_path / "mammogram_byol_final.pth", "byol")["resume"]["processes"][0]["loader"]["tiles"] == 19
    assert metrics["epoch"] == 1
    with pytest.raises(BadInput, match="7 tiles over 1 processes fill no batch of 8"):
        pretrain(shards, tmp_path, small_config(limit_tiles=7))
    # More than there are is all there are, of the training split alone.
    everything = len(shards.tiles("train"))
    with pytest.raises(BadInput, match=f"^{everything} tiles over"):
        pretrain(shards, tmp_path, small_config(limit_tiles=10**6, batch_size=everything + 1))


def test_a_diverged_run_ends_with_what_to_change_and_without_a_checkpoint(road, tmp_path):
    with pytest.raises(BadInput, match="gradients of 3 of the 4 steps of epoch 1 were not finite; lower --lr"):
        pretrain(open_shards(road.shards), tmp_path, small_config(limit_tiles=32, lr=1e35, warmup_epochs=0.0))
    assert not list(tmp_path.glob("*.pth"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("batch_size", 1),
        ("num_workers", 0),
        ("momentum", 1.5),
        ("save_every", 0),
        ("limit_tiles", 0),
        ("limit_tiles", -3),
        ("hidden_dim", 0),
        ("proj_dim", 0),
        ("weight_decay", -1e-4),
        ("gradient_clip", 0.0),
        ("warmup_epochs", -1.0),
        ("seed", -1),
    ],
)
def test_options_out_of_range_are_refused_before_anything_starts(name, value):
    with pytest.raises(BadInput, match=f"--{name.replace('_', '-')} {value}"):
        small_config(**{name: value})


# ---------------------------------------------------------------- going on


def test_a_run_that_ended_between_two_checkpoints_of_an_epoch_writes_both_on_resuming(road, mammostream, tmp_path):
    """The last checkpoint says that the epoch is done: so it must be written after all others of that epoch."""
    command = (
        f"pretrain --shards {road.shards} --output-dir {tmp_path} --arch resnet18 --hidden-dim 32 --proj-dim 16 --epochs 1 "
        f"--batch-size 8 --limit-tiles 16 {road.small} --resume auto"
    )
    final = tmp_path / "mammogram_byol_final.pth"
    (final / "in_the_way").mkdir(parents=True)
    with pytest.raises(OSError, match="mammogram_byol_final"):  # a folder in the checkpoint's place: no file replaces it
        mammostream(command)
    (final / "in_the_way").rmdir()
    final.rmdir()
    assert mammostream(command).code == 0
    assert load_checkpoint(final, "byol")["epoch"] == 1
    # The first try's lines went: an epoch that comes again is logged once.
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [2]


def test_a_finished_run_resumes_to_nothing(pretrained, mammostream):
    before = {path.name: path.stat().st_mtime_ns for path in pretrained.pretrained.glob("*.pth")}
    record = (pretrained.pretrained / "metrics.jsonl").read_text()
    command = f"pretrain --shards {pretrained.shards} --output-dir {pretrained.pretrained} {pretrained.pretrain_options}"
    outcome = mammostream(f"{command} --resume auto")
    assert outcome.code == 0
    assert {path.name: path.stat().st_mtime_ns for path in pretrained.pretrained.glob("*.pth")} == before
    assert (pretrained.pretrained / "metrics.jsonl").read_text() == record


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("--lr 0.5", "--lr None, not 0.5"),
        ("--epochs 5", "--epochs 4, not 5"),
        ("--proj-dim 8", "--proj-dim 16, not 8"),
        ("--recipe mammo", "--recipe guide, not mammo"),
        ("--batch-size 8", "batch"),
    ],
)
def test_resuming_with_other_options_names_the_option(pretrained, mammostream, other, message):
    record = (pretrained.pretrained / "config.yaml").read_text()
    outcome = mammostream(
        f"pretrain --shards {pretrained.shards} --output-dir {pretrained.pretrained} {pretrained.pretrain_options} "
        f"--resume auto {other}"
    )
    assert outcome.code == 2
    assert message in outcome.error
    # What was refused is not the run's record.
    assert (pretrained.pretrained / "config.yaml").read_text() == record


def test_resuming_on_other_shards_is_refused(pretrained, run_cli, mammostream, tmp_path):
    """As many tiles, dealt by another seed: the rest of the epoch would be of other tiles."""
    run_cli(f"shards build --manifest {pretrained.manifest} --output-dir {tmp_path}/shards {pretrained.tiling} --seed 1")
    outcome = mammostream(
        f"pretrain --shards {tmp_path}/shards --output-dir {pretrained.pretrained} {pretrained.pretrain_options} --resume auto"
    )
    assert outcome.code == 2
    assert "--shards" in outcome.error


def test_a_run_is_never_overwritten(pretrained, mammostream):
    command = f"pretrain --shards {pretrained.shards} --output-dir {pretrained.pretrained} {pretrained.pretrain_options}"
    outcome = mammostream(command)
    assert outcome.code == 2
    assert "go on with --resume auto" in outcome.error
    outcome = mammostream(f"{command} --resume {pretrained.root}/gone.pth")
    assert outcome.code == 2
    assert "gone.pth does not exist" in outcome.error


def test_auto_is_the_cpu_in_fp32_where_there_is_no_gpu():
    runtime = resolve_runtime(PretrainConfig())
    if torch.cuda.is_available():
        assert runtime.device.type == "cuda"
    else:
        assert (str(runtime), runtime.precision) == ("cpu, fp32", "fp32")
        with pytest.raises(BadInput, match="torch sees no GPU"):
            resolve_runtime(PretrainConfig(device="cuda"))
