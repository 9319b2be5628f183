"""Pre-training: the step, a run's files, and a killed run that continues as if nothing had happened."""

from __future__ import annotations

import copy
import os

import imagecodecs
import numpy as np
import pytest
import torch
import yaml
from runs import small_config

from mammostream.common.errors import BadInput
from mammostream.dali_pipelines import PretrainLoader
from mammostream.dali_pipelines.recipes import views_from_dict
from mammostream.models.backbones import build_backbone
from mammostream.models.byol import MammogramBYOL
from mammostream.models.checkpoints import load_checkpoint
from mammostream.shards import open_shards
from mammostream.train.byol.config import PretrainConfig
from mammostream.train.byol.pretrain import pretrain
from mammostream.train.byol.records import is_better
from mammostream.train.byol.step import TrainingState, train_step
from mammostream.train.run.charts import read_metrics
from mammostream.train.run.runtime import Runtime, make_deterministic, resolve_runtime
from mammostream.train.run.schedules import byol_momenta, learning_rates
from mammostream.train.run.stages import checkpoint_activations

CPU = Runtime(torch.device("cpu"), "fp32")


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
    model = MammogramBYOL(build_backbone("resnet18_narrow"), hidden_dim=32, proj_dim=16).train()
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
        model = MammogramBYOL(build_backbone("resnet18_narrow"), hidden_dim=32, proj_dim=16).train()
        before = model.backbone.conv1.weight.detach().clone()
        # Plain SGD: its step is the gradient, so the step's length tells the clipping.
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0, fused=True)
        state = TrainingState(model, model, optimizer, CPU.scaler(), np.array([1.0]), np.array([1.0]))
        _, norm = train_step(state, CPU, small_config(gradient_clip=clip), [(view1, view2)])
        deltas[clip] = (model.backbone.conv1.weight.detach() - before).norm().item()
    assert norm.item() > 1e-2  # the norm before clipping
    assert deltas[1e-3] < 1e-3
    assert deltas[1e-3] == pytest.approx(deltas[1e9] * 1e-3 / norm.item(), rel=1e-2)


def some_batches(count: int, tiles: int = 4):
    generator = torch.Generator().manual_seed(3)
    size = (tiles, 1, 32, 32)
    return [tuple(torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(2)) for _ in range(count)]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_accumulated_batches_give_the_mean_of_their_gradients_and_see_their_own_statistics(checkpointed):
    batches = some_batches(3)
    torch.manual_seed(0)
    model = MammogramBYOL(build_backbone("resnet18_narrow"), hidden_dim=32, proj_dim=16).double().train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    alone = copy.deepcopy(model)  # one batch after the other through the same weights: its statistics move three times
    losses = [alone(*views).loss for views in batches]
    torch.stack(losses).mean().backward()
    expected = torch.cat([p.grad.flatten() for p in alone.parameters() if p.grad is not None])

    if checkpointed:
        checkpoint_activations(model.backbone)
    optimizer = torch.optim.SGD(parameters, lr=0.0, fused=True)
    state = TrainingState(model, model, optimizer, CPU.scaler(), np.array([1e-9]), np.array([1.0]))
    output, norm = train_step(state, CPU, small_config(accumulate=3, gradient_clip=1e9), iter(batches), 3)
    torch.testing.assert_close(output.loss, torch.stack(losses).mean().detach())
    torch.testing.assert_close(norm, expected.norm(), rtol=1e-5, atol=0)
    got = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-6)
    for name, buffer in alone.named_buffers():
        assert torch.equal(dict(model.named_buffers())[name], buffer), name


def test_the_best_epoch_is_the_probes_where_it_runs_and_never_a_collapsed_one():
    plain, lower = {"loss": -0.5}, {"loss": -0.6}
    assert is_better(plain, None)
    assert is_better(lower, plain)
    assert not is_better(plain, plain)
    assert not is_better(plain, lower)
    assert not is_better({"loss": -1.0, "collapsed": True}, plain)
    assert not is_better({"loss": -1.0, "collapsed": True}, None)
    probed = {"loss": -0.1, "probe": 0.7}
    assert is_better(probed, lower)
    assert not is_better({"loss": -0.9}, probed)
    assert not is_better({"loss": -0.9, "probe": 0.6}, probed)
    assert is_better({"loss": -0.05, "probe": 0.71}, probed)
    assert not is_better({"loss": -0.05, "probe": 0.9, "collapsed": True}, probed)


def test_deterministic_asks_torch_for_deterministic_algorithms(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        make_deterministic()
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)


# ---------------------------------------------------------------- a run's files


def test_a_run_writes_its_checkpoints_metrics_and_pictures(pretrained):
    folder = pretrained.pretrained
    names = sorted(path.name for path in folder.glob("*.pth"))
    assert names == [f"mammogram_byol_{name}.pth" for name in ("best", "epoch_003", "final", "last")]
    final = load_checkpoint(pretrained.byol, "byol")
    tiles = len(open_shards(pretrained.shards).tiles("train"))
    assert (final["epoch"], final["step"], final["arch"]) == (4, 4 * (tiles // 16), "resnet18_narrow")
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


def test_max_steps_ends_the_schedules_and_the_run_within_an_epoch(road, tmp_path):
    config = small_config(limit_tiles=40, epochs=3, max_steps=8, save_every=1)
    pretrain(open_shards(road.shards), tmp_path, config)  # five steps an epoch
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["epoch_mean/epoch"]) for line in lines] == [(5, 1), (8, 2)]
    assert (lines[-1]["epoch_mean/lr"], lines[-1]["epoch_mean/momentum"]) == (0, 1)
    final = load_checkpoint(tmp_path / "mammogram_byol_final.pth", "byol")
    assert (final["step"], final["epoch"]) == (8, 1)  # whole epochs
    assert not (tmp_path / "mammogram_byol_epoch_002.pth").exists()


def test_views_of_a_file_and_of_another_size_are_those_that_are_trained_on(road, tmp_path, monkeypatch):
    views = {"view1": {"brightness": 0.1}, "view2": {"rotation_deg": 90.0}}
    (tmp_path / "views.yaml").write_text(yaml.safe_dump(views))
    config = small_config(views=str(tmp_path / "views.yaml"), view_size=48, mmap=False, batch_size=4)
    seen = []
    forward = MammogramBYOL.forward
    monkeypatch.setattr(MammogramBYOL, "forward", lambda self, *views: seen.append(views) or forward(self, *views))
    pretrain(open_shards(road.shards), tmp_path / "run", config)
    loader = PretrainLoader(
        open_shards(road.shards).shards("train"),
        batch_size=4,
        views=views_from_dict(views, "here"),
        tile_size=road.tile_size,
        view_size=48,
        mean=0.449,
        std=0.226,
        tiles=np.sort(np.random.default_rng(0).permutation(open_shards(road.shards).tiles("train")["tile"])[:16]),
    )
    for ours, (view1, view2, _) in zip(seen, loader, strict=True):
        assert ours[0].shape == (4, 1, 48, 48)
        assert torch.equal(ours[0], view1)
        assert torch.equal(ours[1], view2)
    recorded = load_checkpoint(tmp_path / "run/mammogram_byol_last.pth", "byol")["views"]
    assert views_from_dict(recorded, "checkpoint") == views_from_dict(views, "here")

    (tmp_path / "views.yaml").write_text(yaml.safe_dump(views | {"view2": {"rotation_deg": 45.0}}))
    with pytest.raises(BadInput, match="the saved loader had views"):
        pretrain(open_shards(road.shards), tmp_path / "run", config, resume=tmp_path / "run/mammogram_byol_last.pth")


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
        ("max_steps", 0),
        ("save_every_steps", 0),
        ("view_size", 0),
        ("accumulate", 0),
        ("max_bad_steps", 0),
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
        f"pretrain --shards {road.shards} --output-dir {tmp_path} --arch resnet18_narrow --hidden-dim 32 --proj-dim 16 "
        f"--epochs 1 --batch-size 8 --limit-tiles 16 {road.small} --resume auto"
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
    assert "resume with --resume auto" in outcome.error
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
