"""Monitoring: the measures against NumPy, the alarm, and a state that changes nothing."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import assert_same_tree

from mammostream.common.errors import BadInput
from mammostream.models.backbones import build_backbone
from mammostream.models.byol import MammogramBYOL
from mammostream.models.checkpoints import load_checkpoint
from mammostream.shards import open_shards
from mammostream.train.byol.config import PretrainConfig
from mammostream.train.byol.flops import flops_per_pair
from mammostream.train.byol.measures import (
    NOISE,
    effective_rank,
    energy_shares,
    retrieval_accuracy,
    target_distance,
    z_std,
)
from mammostream.train.byol.monitoring import (
    FIRST_READINGS,
    POOL_ROWS,
    RETRIEVAL_WINDOW,
    WINDOW,
    CollapseAlarm,
    Monitor,
    Sign,
    collapse_alarm,
)
from mammostream.train.byol.pretrain import pretrain
from mammostream.train.run.charts import read_metrics

SIGNS = [Sign("z_std", 0.1, "about 0.5", "all tiles look alike"), Sign("effective_rank", 2.0, "above 4", "one direction")]


def rows(seed, n, d):
    return torch.as_tensor(np.random.default_rng(seed).normal(size=(n, d)), dtype=torch.float32)


# ---------------------------------------------------------------- measures


def test_z_std_tells_spread_from_collapse():
    torch.manual_seed(0)
    healthy = z_std(torch.randn(4096, 256))
    assert healthy.item() == pytest.approx(1 / 16, rel=0.01)
    assert z_std(torch.randn(1, 256).expand(64, -1)).item() == pytest.approx(0, abs=1e-6)
    assert z_std(100 * torch.randn(4096, 256)).item() == pytest.approx(healthy.item(), rel=0.01)
    assert z_std(torch.randn(8, 4).bfloat16()).dtype == torch.float32


def rank_and_spread(*batches):
    shares = energy_shares(batches)
    return effective_rank(shares).item(), shares.sum().item()


def test_effective_rank_counts_directions():
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(32, 32)).Q
    both_ways = torch.cat([basis, -basis])  # of mean 0
    for scale in (1e-6, 1.0, 1e6):
        assert rank_and_spread(scale * both_ways) == pytest.approx((32, 1), rel=1e-3)
        assert rank_and_spread(scale * both_ways[[*range(5), *range(32, 37)]]) == pytest.approx((5, 1), rel=1e-3)
    # By hand: singular values 3 and 1 are shares 3/4 and 1/4; the mean has as much energy as both.
    square = torch.tensor([[3.0, 0], [-3.0, 0], [0, 1.0], [0, -1.0]])
    expected = np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))
    assert rank_and_spread(square) == pytest.approx((expected, 1), rel=1e-4)
    shifted = torch.cat([square, torch.full((4, 1), 5**0.5)], 1)
    assert rank_and_spread(shifted) == pytest.approx((expected, 0.5), rel=1e-4)


def test_features_that_collapse_have_no_direction_however_many_their_noise_has():
    """One vector plus noise: centred, the noise has full rank; uncentred, its many singular values outweigh its energy."""
    torch.manual_seed(0)
    for noise in (0.0, 1e-4, 3e-3, 3e-2):
        for scale in (1e-3, 1e3):
            point = torch.rand(1, 512) + 0.5
            collapsed = [scale * (point + noise * point.norm() / 512**0.5 * torch.randn(64, 512)) for _ in range(5)]
            rank, spread = rank_and_spread(*collapsed)
            assert rank == 0
            assert spread == pytest.approx(noise**2, rel=0.1, abs=1e-9)
    plain = torch.linalg.svdvals(torch.cat(collapsed).double())
    p = plain / plain.sum()
    assert torch.exp(-(p * p.log()).sum()) > 5  # what RankMe says of it

    line = point + torch.randn(64, 1) * torch.randn(1, 512) + 1e-3 * torch.randn(64, 512)
    rank, spread = rank_and_spread(line)
    assert rank == pytest.approx(1)
    assert spread > 0.1


def test_a_point_that_moves_between_batches_is_still_a_point():
    torch.manual_seed(0)
    moving = [torch.randn(1, 64).expand(16, -1) + 1e-3 * torch.randn(16, 64) for _ in range(8)]
    rank, spread = rank_and_spread(*moving)
    assert rank == 0
    assert spread < 1e-5
    # Batches of a few tiles each show together what none shows alone.
    directions = torch.randn(8, 4, 64)
    assert rank_and_spread(*directions)[0] > 20
    assert max(rank_and_spread(batch)[0] for batch in directions) <= 3


def test_features_that_are_not_finite_are_left_out():
    good, bad = rows(0, 8, 5), torch.full((8, 5), math.inf)
    assert rank_and_spread(good, bad) == rank_and_spread(good)
    assert all(map(math.isnan, rank_and_spread(bad)))
    assert rank_and_spread(torch.zeros(8, 16)) == (0, 0)


@given(st.integers(0, 2**32 - 1), st.integers(2, 20), st.integers(1, 12))
def test_measures_agree_with_numpy(seed, n, d):
    one, other = rows(seed, n, d).double().numpy(), rows(seed + 1, n, d).double().numpy()
    unit, unit_other = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (one, other))
    assert z_std(torch.as_tensor(one)).item() == pytest.approx(unit.std(0).mean(), abs=1e-5)
    centred = np.linalg.svd(np.concatenate([x - x.mean(0) for x in (one, other)]), compute_uv=False)
    energy = (one**2).sum() + (other**2).sum()
    rank, spread = rank_and_spread(torch.as_tensor(one), torch.as_tensor(other))
    assert spread == pytest.approx((centred**2).sum() / energy)
    if (abs(centred**2 / energy / NOISE - 1) > 1e-6).all():  # rounding decides no direction
        singular = centred[centred**2 >= NOISE * energy]
        share = singular / singular.sum()
        assert rank == pytest.approx(np.exp(-(share * np.log(share)).sum()) if len(share) else 0)
    distance = np.linalg.norm(unit[:, None] - unit_other[None], axis=2)
    margin = np.sort(distance, axis=1)
    if n > 1 and (margin[:, 1] - margin[:, 0]).min() > 1e-4:  # rounding decides no tie
        found = (distance.argmin(1) == np.arange(n)).mean()
        assert retrieval_accuracy(torch.as_tensor(one), torch.as_tensor(other)).item() == pytest.approx(found)


def test_retrieval_is_chance_where_all_rows_are_equal_and_one_where_views_agree():
    views = rows(0, 16, 8)
    assert retrieval_accuracy(views, 3 * views).item() == 1
    assert retrieval_accuracy(views[:1].expand(16, -1), views[:1].expand(16, -1)).item() == pytest.approx(1 / 16)
    assert retrieval_accuracy(views, views.roll(1, 0)).item() == 0


def test_target_distance_is_a_share_of_the_online_networks_length():
    model = MammogramBYOL(build_backbone("resnet18_narrow"), hidden_dim=8, proj_dim=4)
    assert target_distance(model).item() == 0
    with torch.no_grad():
        for parameter in (*model.backbone_momentum.parameters(), *model.projection_head_momentum.parameters()):
            parameter *= 0.9
    assert target_distance(model).item() == pytest.approx(0.1, rel=1e-4)


# ---------------------------------------------------------------- the alarm


def feed(alarm, values, first=10, name="z_std"):
    return [alarm.feed(first + 10 * i, {name: value}) for i, value in enumerate(values)]


def test_the_alarm_rings_once_with_its_evidence():
    alarm = CollapseAlarm(SIGNS)
    lines = feed(alarm, [0.5, 0.5, 0.05, 0.04, 0.03, 0.02, 0.02])
    assert [len(found) for found in lines] == [0, 0, 0, 0, 1, 0, 0]
    (line,) = lines[4]
    for part in ("z_std is 0.05", "below 0.1 since step 30", "healthy is about 0.5", "all tiles look alike"):
        assert part in line
    assert alarm.since == {"z_std": 30}
    # It stops where the median is back, and rings again.
    feed(alarm, [0.5] * WINDOW, first=80)
    assert alarm.since == {}
    assert sum(map(len, feed(alarm, [0.01] * WINDOW, first=200))) == 1


def test_one_noisy_reading_rings_nothing_and_neither_do_those_of_the_warm_up():
    alarm = CollapseAlarm(SIGNS)
    assert not any(feed(alarm, [0.5, 0.5, 0.0, 0.5, 0.5, 0.0, 0.5, 0.0, 0.5, 0.5]))
    alarm = CollapseAlarm(SIGNS, first_step=100)
    lines = feed(alarm, [0.0] * 15)
    assert [i for i, found in enumerate(lines) if found] == [9 + WINDOW]  # the first after it is of step 110
    assert not any(feed(CollapseAlarm(SIGNS), [math.nan] * 10))  # a diverged run has its own message


def test_each_measure_rings_for_itself():
    alarm = CollapseAlarm(SIGNS)
    lines = [alarm.feed(10 * i, {"z_std": 0.5, "effective_rank": 1.2}) for i in range(1, 8)]
    assert sum(map(len, lines)) == 1
    assert alarm.since == {"effective_rank": 10}


def noisy_retrieval(seed, tiles, *parts):
    """Readings of the retrieval by chance alone, one array each: a true value, and the number of readings with it."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.binomial(10 * tiles, value, count) / (10 * tiles) for value, count in parts])


@pytest.mark.parametrize("tiles", [32, 64, 128, 256])
def test_retrieval_that_falls_rings_and_its_noise_does_not(tiles, monkeypatch):
    """20 runs each of 5000 steps at 3 and 6 times chance; then a fall to 55 % of the first value, and to chance."""
    monkeypatch.setattr("mammostream.train.byol.monitoring.READ_EVERY", 10)
    for seed in range(20):
        value = (3 + 3 * (seed % 2)) / tiles
        alarm = collapse_alarm(128, first_step=200, tiles=tiles)
        assert not any(feed(alarm, noisy_retrieval(seed, tiles, (value, 500)), name="view_retrieval"))
        for fallen in (0.55 * value, 1 / tiles):
            alarm = collapse_alarm(128, first_step=200, tiles=tiles)
            readings = noisy_retrieval(seed, tiles, (value, FIRST_READINGS), (fallen, 2 * RETRIEVAL_WINDOW + 20))
            assert any(feed(alarm, readings, name="view_retrieval"))


def test_large_batches_tell_a_collapse_within_the_first_readings(monkeypatch):
    monkeypatch.setattr("mammostream.train.byol.monitoring.READ_EVERY", 10)
    for seed in range(10):
        alarm = collapse_alarm(128, first_step=100, tiles=256)
        assert any(feed(alarm, noisy_retrieval(seed, 256, (0.089, 2), (0.058, 50)), name="view_retrieval"))


def test_retrieval_at_chance_from_the_start_rings():
    alarm = collapse_alarm(128, first_step=0, tiles=32)
    lines = [line for found in feed(alarm, noisy_retrieval(0, 32, (1 / 32, 60)), name="view_retrieval") for line in found]
    assert "view_retrieval is 0.03" in lines[0]
    assert "healthy is well above chance (0.03125)" in lines[0]


def test_the_first_readings_are_those_of_the_warm_up_and_survive_a_resumed_run(monkeypatch):
    """A network that collapses while the learning rate rises is judged by what it could before."""
    monkeypatch.setattr("mammostream.train.byol.monitoring.READ_EVERY", 10)
    falling = noisy_retrieval(1, 32, (0.2, 12), (0.1, 60))
    whole = collapse_alarm(128, first_step=300, tiles=32)
    lines = feed(whole, falling, name="view_retrieval")
    ((at, line),) = [(i, found[0]) for i, found in enumerate(lines) if found]
    assert at == 29 + RETRIEVAL_WINDOW  # the first reading that counts is of step 310
    assert "(mean of the last 200 steps, below 0.1" in line
    assert "not far below its first value, 0.2" in line
    cut = collapse_alarm(128, first_step=300, tiles=32)
    feed(cut, falling[:20], name="view_retrieval")
    resumed = collapse_alarm(128, first_step=300, tiles=32)
    resumed.load_state_dict(cut.state_dict())
    assert feed(resumed, falling[20:], first=210, name="view_retrieval") == lines[20:]
    assert resumed.state_dict() == whole.state_dict()


def test_a_state_of_version_0_1_0_still_loads():
    alarm = collapse_alarm(16, first_step=0, tiles=8)
    alarm.load_state_dict({"readings": {"z_std": [[10, 0.1]], "effective_rank": [[10, 5.0]]}, "since": {"z_std": 10}})
    assert alarm.since == {"z_std": 10}
    assert not alarm.feed(20, {"z_std": 0.25, "effective_rank": 5.0, "feature_spread": 0.5, "view_retrieval": 0.5})
    monitor = new_monitor()
    old = {name: value for name, value in monitor.state_dict().items() if name != "pool"}
    del old["alarm"]["first"]
    monitor.load_state_dict(old)
    assert len(watch(monitor, 1, 3)) == 1


# ---------------------------------------------------------------- the monitor


def output(seed, spread=1.0):
    base, noise = rows(0, 1, 8), rows(seed, 6, 8)
    one = base + spread * noise
    return SimpleNamespace(projections=one, projections2=one + 0.1 * rows(seed + 1, 6, 8), features=rows(seed, 6, 5))


def watch(monitor, first, last, spread=1.0):
    """Record steps and read every third; return what was reported."""
    found = []
    for step in range(first, last + 1):
        monitor.record(output(step, spread), torch.tensor(float(step)), torch.tensor([3, 3, 9, 20, 20, 9]))
        if step % 3 == 0:
            found.append(monitor.read(step))
        if step % 7 == 0:
            found.append(monitor.end_epoch())
    return found


def new_monitor():
    return Monitor(CollapseAlarm(SIGNS), np.array([3, 9, 20]), np.array([0.2, 0.5, 0.9]))


def test_a_reading_holds_the_means_since_the_last_one():
    monitor = new_monitor()
    found = watch(monitor, 1, 7)
    (first, _), (second, _), (epoch, rang) = found
    assert first["grad_norm"] == 2
    assert second["grad_norm"] == 5
    assert first["breast_ratio"] == pytest.approx((0.2 * 2 + 0.5 * 2 + 0.9 * 2) / 6)
    assert second["z_std"] == pytest.approx(np.mean([z_std(output(s).projections).item() for s in (4, 5, 6)]))
    # The features are those of all batches in the pool, also those before the last reading.
    assert (second["effective_rank"], second["feature_spread"]) == rank_and_spread(*(rows(s, 6, 5) for s in range(2, 7)))
    assert epoch["effective_rank"] == rank_and_spread(*(rows(s, 6, 5) for s in range(3, 8)))[0]
    # The epoch ends between two readings: its means are over all of its steps.
    assert epoch["grad_norm"] == pytest.approx(4)
    assert rang is False
    assert watch(monitor, 8, 9)[0][0]["grad_norm"] == 8  # steps 7 to 9


def test_a_step_whose_gradients_are_not_finite_has_no_say():
    monitor = new_monitor()
    for norm in (1.0, math.nan, math.inf, 3.0):
        monitor.record(output(1), torch.tensor(norm), torch.tensor([3]))
    assert monitor.read(3)[0]["grad_norm"] == 2
    assert monitor.end_epoch()[0]["grad_norm"] == 2


@pytest.mark.parametrize(("size", "kept"), [(2, 5), (200, 2), (512, 1), (700, 1)])
def test_the_pool_is_bounded_and_does_not_share_the_networks_memory(size, kept):
    """Of at most READ_EVERY batches (5 here) and 512 tiles; CUDA graphs write each output into the same memory."""
    monitor, features = new_monitor(), torch.empty(size, 3)
    for step in range(8):
        features.copy_(rows(step, size, 3))
        step_output = output(step)
        step_output.features = features
        monitor.record(step_output, torch.tensor(1.0), torch.tensor([3]))
    wanted = [rows(step, size, 3)[:POOL_ROWS] for step in range(8 - kept, 8)]
    assert_same_tree(monitor.state_dict()["pool"], wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_recording_waits_for_nothing_and_the_measures_are_the_cpus():
    monitor, host = new_monitor(), new_monitor()
    norm = torch.tensor(1.0)
    on_device = [SimpleNamespace(**{name: t.cuda() for name, t in vars(output(step)).items()}) for step in range(12)]
    device_norm = norm.cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(12):
            monitor.record(on_device[step], device_norm, torch.tensor([3]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for step in range(12):
        host.record(output(step), norm, torch.tensor([3]))
    assert monitor.read(12)[0] == pytest.approx(host.read(12)[0], rel=1e-4)


def test_an_epoch_in_which_the_alarm_rang_says_so():
    monitor = new_monitor()
    found = [rang for _, rang in watch(monitor, 1, 28, spread=1e-3) if isinstance(rang, bool)]
    assert found == [False, False, True, True]  # 5 readings are full at step 15


@pytest.mark.parametrize("at", [1, 4, 6, 7, 16, 20])
def test_a_resumed_monitor_reports_what_an_uninterrupted_one_does(at):
    """Bit for bit, wherever the run was cut: between readings, between epochs, while the alarm rings."""
    whole = new_monitor()
    wanted = watch(whole, 1, at, 1e-3) + watch(whole, at + 1, 30, 1e-3)
    cut = new_monitor()
    found = watch(cut, 1, at, 1e-3)
    resumed = new_monitor()
    resumed.load_state_dict(cut.state_dict())
    assert found + watch(resumed, at + 1, 30, 1e-3) == wanted
    assert_same_tree(resumed.state_dict(), whole.state_dict())


# ---------------------------------------------------------------- real training


@pytest.fixture(scope="module", autouse=True)
def _read_often():
    """Readings every 5 steps instead of 10, so that short runs fill the alarm's window."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mammostream.train.byol.monitoring.READ_EVERY", 5)
        patch.setattr("mammostream.train.byol.pretrain.READ_EVERY", 5)
        yield


def train(road, folder, resume=None, **options):
    """A tiny run; return its lines."""
    small = {"arch": "resnet18_narrow", "hidden_dim": 32, "proj_dim": 16, "batch_size": 8, "limit_tiles": 40, "epochs": 100}
    small |= {"device": "cpu", "num_workers": 2, "wandb_mode": "disabled", "lr": 1e-3, "warmup_epochs": 0.0}
    config = PretrainConfig(**(small | {"max_steps": 40, "momentum": 0.99, "save_every": 1000} | options))
    pretrain(open_shards(road.shards), folder, config, resume)
    return read_metrics(folder / "metrics.jsonl")


class WithoutPredictor(MammogramBYOL):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.prediction_head = torch.nn.Identity()


@pytest.fixture(scope="module")
def labels_csv(road, tmp_path_factory):
    path = tmp_path_factory.mktemp("labels") / "labels.csv"
    pd.concat([pd.read_csv(road.train_csv), pd.read_csv(road.val_csv)]).to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def healthy(road, tmp_path_factory, labels_csv):
    """The folder and lines of a run that learns, with the online probe."""
    folder = tmp_path_factory.mktemp("healthy")
    options = {"probe_csv": str(labels_csv), "probe_class_names": ("bright",), "probe_every": 5}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mammostream.train.byol.flops.peak_flops", lambda device: 1e12)
        patch.setattr("mammostream.train.byol.assembly.peak_flops", lambda device: 1e12)
        yield folder, train(road, folder, **options), options


def test_a_run_that_learns_is_silent_and_logs_every_measure(road, healthy):
    _, lines, _ = healthy
    steps = [line for line in lines if "loss" in line]
    assert [line["collapse"] for line in steps] == [0] * 8
    ratios = open_shards(road.shards).tiles("train")["breast_ratio"]
    for line in steps:
        assert {
            "grad_norm",
            "z_std",
            "effective_rank",
            "feature_spread",
            "view_retrieval",
            "target_distance",
            "momentum",
            "lr",
        } <= line.keys()
        assert ratios.min() <= line["breast_ratio"] <= ratios.max()
        assert 0 <= line["view_retrieval"] <= 1
    epochs = [line for line in lines if "epoch_mean/loss" in line]
    assert all(line["epoch_mean/collapsed"] == 0 for line in epochs)
    with torch.device("meta"):
        flops = flops_per_pair(MammogramBYOL(build_backbone("resnet18_narrow"), hidden_dim=32, proj_dim=16), road.tile_size)
    for line in epochs:
        assert line["epoch_mean/mfu_percent"] == pytest.approx(100 * line["epoch_mean/pairs_per_second"] * flops / 1e12)


def test_the_online_probe_decides_which_epoch_is_best_and_changes_no_weight(road, healthy, tmp_path):
    folder, lines, _ = healthy
    probed = {line["epoch_mean/epoch"]: line["epoch_mean/probe"] for line in lines if "epoch_mean/probe" in line}
    assert list(probed) == [5, 8]  # the last, too
    figures = [line for line in lines if "probe/linear/bright" in line]
    assert [line["probe/linear/mean"] for line in figures] == list(probed.values())
    assert "online probe: fitted on train, scored on val" in (folder / "config.yaml").read_text()
    assert all(0 <= line["probe/kNN/bright"] <= 1 for line in figures)
    best = load_checkpoint(folder / "mammogram_byol_best.pth", "byol")
    assert probed[best["epoch"]] == max(probed.values())

    train(road, tmp_path)
    one, other = (load_checkpoint(place / "mammogram_byol_final.pth", "byol") for place in (tmp_path, folder))
    assert all(torch.equal(tensor, other["model_state_dict"][name]) for name, tensor in one["model_state_dict"].items())


def test_a_run_cut_between_readings_goes_on_with_the_same_record(road, healthy, tmp_path, monkeypatch):
    folder, lines, options = healthy
    with monkeypatch.context() as patch:
        patch.setattr("mammostream.train.byol.monitoring.Monitor.record", _cut_at(28))
        with pytest.raises(Cut):
            train(road, tmp_path, **options)
    last = tmp_path / "mammogram_byol_last.pth"
    assert load_checkpoint(last, "byol")["step"] == 25  # after an epoch of 5 steps
    resumed = train(road, tmp_path, last, **options)
    assert without_speed(resumed) == without_speed(lines)
    one, other = (load_checkpoint(place / "mammogram_byol_final.pth", "byol") for place in (tmp_path, folder))
    assert all(torch.equal(tensor, other["model_state_dict"][name]) for name, tensor in one["model_state_dict"].items())
    assert_same_tree(one["resume"]["monitor"], other["resume"]["monitor"])


class Cut(Exception):
    """What ends a run as a power cut would: nothing is saved any more."""


def _cut_at(step):
    record, count = Monitor.record, iter(range(1, 1000))

    def cut(self, *args):
        if next(count) == step:
            raise Cut
        record(self, *args)

    return cut


def without_speed(lines):
    names = ("epoch_mean/pairs_per_second", "epoch_mean/data_wait_percent", "epoch_mean/mfu_percent")
    return [{name: value for name, value in line.items() if name not in names} for line in lines]


def test_a_collapsing_run_warns_with_the_evidence_and_stops_if_asked_to(road, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("mammostream.train.byol.assembly.MammogramBYOL", WithoutPredictor)
    options = {"lr": 2e-3, "max_steps": 50, "save_every": 8}
    lines = train(road, tmp_path, **options)
    err = capfd.readouterr().err
    assert err.count("collapse: z_std is 0.") == 1
    assert "healthy is about 0.25 (1 / sqrt(16)): all tiles look alike" in err
    steps = [line for line in lines if "loss" in line]
    assert steps[-1]["collapse"] == 1
    assert steps[-1]["z_std"] < 0.125
    # The loss alone would have chosen an epoch of the collapse.
    collapsed = {line["epoch_mean/epoch"] for line in lines if line.get("epoch_mean/collapsed")}
    losses = {line["epoch_mean/epoch"]: line["epoch_mean/loss"] for line in lines if "epoch_mean/loss" in line}
    best = load_checkpoint(tmp_path / "mammogram_byol_best.pth", "byol")["epoch"]
    assert best == min(losses.keys() - collapsed, key=losses.get)
    assert min(losses, key=losses.get) in collapsed

    with pytest.raises(BadInput, match=r"z_std is too low since step \d+; stopped after step 45 and saved.*lower --lr"):
        train(road, tmp_path, tmp_path / "mammogram_byol_epoch_008.pth", **options, on_collapse="stop")
    assert load_checkpoint(tmp_path / "mammogram_byol_last.pth", "byol")["step"] == 45
