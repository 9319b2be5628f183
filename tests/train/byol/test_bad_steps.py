"""Steps whose gradients are not finite: nothing of them stays, they are counted, and too many end the run."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from processes import assert_same_tree
from runs import small_config

from mammostream.common.errors import BadInput
from mammostream.dali_pipelines import PretrainLoader
from mammostream.models.backbones import build_backbone
from mammostream.models.byol import MammogramBYOL
from mammostream.models.checkpoints import load_checkpoint
from mammostream.shards import open_shards
from mammostream.train.byol.bad_steps import BadSteps
from mammostream.train.byol.pretrain import pretrain
from mammostream.train.byol.step import TrainingState, train_step
from mammostream.train.run.runtime import Runtime

CPU = Runtime(torch.device("cpu"), "fp32")


def small_state():
    torch.manual_seed(0)
    model = MammogramBYOL(build_backbone("resnet18_narrow"), hidden_dim=32, proj_dim=16).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, fused=True)
    return TrainingState(model, model, optimizer, CPU.scaler(), [1e-3] * 4, [0.9] * 4)


def views(poisoned):
    """Two batches of views; of the second, one pixel is not a number."""
    generator = torch.Generator().manual_seed(0)
    pairs = [[torch.randn(4, 1, 32, 32, generator=generator) for _ in range(2)] for _ in range(2)]
    if poisoned:
        pairs[1][0][2, 0, 5, 5] = float("nan")
    return [tuple(pair) for pair in pairs]


def test_a_bad_step_leaves_weights_optimizer_and_statistics():
    state = small_state()
    train_step(state, CPU, small_config(), iter(views(False)), 2)  # so that the optimizer has something to lose
    weights = copy.deepcopy({n: t for n, t in state.model.state_dict().items() if "num_batches" not in n})
    optimizer, sums = copy.deepcopy(state.optimizer.state_dict()["state"]), state.sums.clone()
    assert sums[1] == 1

    output, norm = train_step(state, CPU, small_config(), iter(views(True)), 2)
    assert not norm.isfinite()
    assert not output.loss.isfinite()
    assert_same_tree(state.optimizer.state_dict()["state"], optimizer)
    for name, tensor in weights.items():
        now = state.model.state_dict()[name]
        assert torch.equal(now, tensor), name
    assert torch.equal(state.sums, sums)
    assert state.step == 2

    output, norm = train_step(state, CPU, small_config(), iter(views(False)), 2)
    assert norm.isfinite()
    assert not torch.equal(state.model.state_dict()["backbone.conv1.weight"], weights["backbone.conv1.weight"])
    assert torch.equal(state.sums, sums + torch.tensor([output.loss.double(), 1]))


def test_overflowing_gradients_are_skipped_until_the_scale_fits():
    """The scaler of fp16 starts too high, here for fp32: it halves its scale in each bad step, and then the run continues."""
    state = small_state()
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    state.lrs, state.momenta = [1e-3] * 30, [0.9] * 30
    before = state.model.backbone.conv1.weight.detach().clone()
    small = [tuple(view[:2, :, :16, :16] for view in views(False)[0])]
    good = False
    while not good:
        output, norm = train_step(state, CPU, small_config(), iter(small), 1)
        good = bool(norm.isfinite())
        assert output.loss.isfinite()
        assert torch.equal(state.model.backbone.conv1.weight, before) != good
    assert state.step > 1
    assert state.scaler.get_scale() == 2.0 ** (127 - (state.step - 1))
    assert state.sums[1] == 1


def test_the_target_rests_while_the_scaler_skips_and_then_follows_with_the_momentum_of_its_step():
    """Gradients that really overflow, from a state in which target and online network differ."""
    state = small_state()
    small = [tuple(view[:2, :, :16, :16] for view in views(False)[0])]
    train_step(state, CPU, small_config(), iter(small), 1)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-4)
    state.lrs, state.momenta = [1e-3] * 40, [0.9 + step / 1000 for step in range(40)]
    target, online = state.model.projection_head_momentum[0].weight, state.model.projection_head[0].weight
    assert not torch.equal(target, online)
    skipped = 0
    while True:
        before, momentum = target.detach().clone(), state.momenta[state.step]
        good = train_step(state, CPU, small_config(), iter(small), 1)[1].isfinite()
        if good:
            break
        skipped += 1
        assert torch.equal(target, before)
    assert skipped >= 2
    torch.testing.assert_close(target, momentum * before + (1 - momentum) * online, atol=1e-8, rtol=1e-6)
    assert not torch.equal(target, before)


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99999, 1.0])
def test_a_target_that_is_not_to_be_skipped_moves_as_without_the_question(momentum):
    asked, unasked = small_state().model, small_state().model
    for model in (asked, unasked):
        with torch.no_grad():
            for parameter in model.projection_head.parameters():
                parameter.add_(0.5)
    asked.update_target(momentum, skipped=torch.tensor(False))
    unasked.update_target(momentum)
    for ours, theirs in zip(asked.parameters(), unasked.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-6)


def test_bad_steps_are_counted_and_named_with_their_tiles(tmp_path):
    path = tmp_path / "bad_batches.jsonl"
    bad_steps = BadSteps(path, 3, CPU)
    bad_steps.read()
    finite, bad = torch.tensor(1.0), torch.tensor(float("nan"))
    for step, norm in enumerate([finite, bad, torch.tensor(float("inf")), finite, bad], start=1):
        bad_steps.note(step, norm, [torch.tensor([step, 100]), torch.tensor([200 + step])])
    assert not path.exists()  # nobody has looked
    bad_steps.read()
    assert (bad_steps.total, bad_steps.ongoing) == (3, True)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": step, "tiles": [step, 100, 200 + step]} for step in (2, 3, 5)]

    # A row continues over a checkpoint.
    later = BadSteps(path, 3, CPU)
    later.load_state_dict(bad_steps.state_dict())
    later.note(6, bad, [torch.tensor([6])])
    later.read()
    later.note(7, bad, [torch.tensor([7])])
    later.note(8, finite, [torch.tensor([8])])
    with pytest.raises(BadInput, match=f"3 steps in a row, up to step 7, were not finite; .* {path}$"):
        later.read()
    assert json.loads(path.read_text().splitlines()[-1]) == {"step": 7, "tiles": [7]}


def test_a_run_whose_weights_explode_stops_and_names_the_tiles(road, tmp_path):
    config = small_config(limit_tiles=48, batch_size=4, lr=1e35, warmup_epochs=0.0, max_bad_steps=8, save_every_steps=2)
    with pytest.raises(BadInput, match=r"8 steps in a row, up to step 9, were not finite; lower --lr.*bad_batches\.jsonl$"):
        pretrain(open_shards(road.shards), tmp_path, config)
    lines = [json.loads(line) for line in (tmp_path / "bad_batches.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(2, 10)]
    everything = open_shards(road.shards).tiles("train")["tile"].to_numpy()
    loader = PretrainLoader(
        open_shards(road.shards).shards("train"),
        batch_size=4,
        tile_size=road.tile_size,
        mean=0.449,
        std=0.226,
        tiles=np.sort(np.random.default_rng(0).permutation(everything)[:48]),
    )
    batches = [numbers.tolist() for _, _, numbers in loader]
    assert [line["tiles"] for line in lines] == batches[1:9]
    assert not list(tmp_path.glob("*.pth"))  # none of weights that exploded


def test_single_bad_steps_are_in_the_metrics_and_their_statistics_stay_finite(road, tmp_path, monkeypatch):
    """A network that gives NaN in its third step: the run continues, the epoch's loss is that of the others."""
    forward, calls = MammogramBYOL.forward, []

    def failing(self, view1, view2):
        calls.append(1)
        return forward(self, view1 * (float("nan") if len(calls) == 3 else 1), view2)

    monkeypatch.setattr(MammogramBYOL, "forward", failing)
    metrics = pretrain(open_shards(road.shards), tmp_path, small_config(limit_tiles=48, batch_size=4, epochs=1))
    assert len(calls) == 12
    assert metrics["bad_steps"] == 1
    assert -1 <= metrics["loss"] <= 1
    state = load_checkpoint(tmp_path / "mammogram_byol_final.pth", "byol")["model_state_dict"]
    assert all(tensor.isfinite().all() for tensor in state.values())
