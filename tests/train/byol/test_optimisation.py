"""Recipes' rates and scalings, which parameters decay, and LARS against the paper's formula one parameter at a time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mammostream.models.backbones import build_backbone
from mammostream.models.byol import MammogramBYOL
from mammostream.train.byol.assembly import build_state
from mammostream.train.byol.config import PretrainConfig
from mammostream.train.byol.optimisation import LARS, build_optimizer, resolve_optimisation, split_parameters
from mammostream.train.run.runtime import Runtime


def resolve(batch: int = 32, **options):
    return resolve_optimisation(PretrainConfig(**options), batch)


# ---------------------------------------------------------------- recipes


@pytest.mark.parametrize("batch", [16, 32, 128])
def test_the_guide_takes_its_rate_as_it_stands(batch):
    plan = resolve(batch, recipe="guide")
    assert (plan.optimizer, plan.lr, plan.decays_all, plan.momentum_exponent) == ("adamw", 2e-3, True, 1.0)
    config = PretrainConfig(recipe="guide")
    assert (config.epochs, config.warmup_epochs, config.gradient_clip, config.momentum) == (100, 10.0, 1.0, 0.996)
    assert config.batch_size == 32


def test_mammo_scales_the_rate_by_the_root_and_the_momentum_by_the_batch():
    assert resolve(32, recipe="mammo").lr == pytest.approx(3e-4)
    plan = resolve(128, recipe="mammo")
    assert (plan.lr, plan.momentum_exponent, plan.decays_all) == (pytest.approx(6e-4), 4.0, False)
    assert "peak lr 0.0006 (0.0003 at a batch of 32, sqrt scaling) for an effective batch of 128" in str(plan)


@pytest.mark.parametrize("recipe", ["guide", "mammo"])
def test_lars_has_the_papers_rate_linear_in_the_batch(recipe):
    plan = resolve(512, recipe=recipe, optimizer="lars")
    assert (plan.lr, plan.weight_decay, plan.decays_all) == (pytest.approx(0.4), 1.5e-6, False)


def test_options_win_over_recipes():
    plan = resolve(128, recipe="mammo", lr=0.1, weight_decay=0.2)
    assert (plan.lr, plan.weight_decay, plan.why) == (0.1, 0.2, "as given")
    assert resolve(32, recipe="guide", weight_decay=0.0).weight_decay == 0


@pytest.mark.parametrize("arch", ["resnet18", "convnext_tiny"])
def test_norms_biases_and_layer_scales_do_not_decay(arch):
    with torch.device("meta"):
        model = MammogramBYOL(build_backbone(arch), hidden_dim=8, proj_dim=4)
    decaying, others = split_parameters(model)
    names = {id(p): name for name, p in model.named_parameters()}
    modules = dict(model.named_modules())

    def decays(name: str) -> bool:
        owner, _, kind = name.rpartition(".")
        return kind == "weight" and isinstance(modules[owner], (nn.Conv2d, nn.Linear))

    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert {names[id(p)] for p in decaying} == {name for name in trained if decays(name)}
    assert {names[id(p)] for p in others} == {name for name in trained if not decays(name)}
    assert len(decaying) + len(others) == len(trained)


def test_one_adamw_step_decays_what_the_recipe_says():
    """Where the gradient is 0, the decay alone moves a parameter."""
    for recipe in ("guide", "mammo"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        optimizer = build_optimizer(model, resolve(recipe=recipe, weight_decay=0.5))
        before = [p.detach().clone() for p in model.parameters()]
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        for p, old in zip(model.parameters(), before, strict=True):
            decays = recipe == "guide" or p.ndim > 1
            torch.testing.assert_close(p.detach(), old * (0.95 if decays else 1.0))


def test_options_reach_the_training():
    """The effective batch is batch x processes x accumulated: here 64 x 1 x 4, eight times the recipe's."""
    config = PretrainConfig(
        recipe="mammo", arch="resnet18", hidden_dim=8, proj_dim=4, batch_size=64, accumulate=4, epochs=20, concat_views=True
    )
    runtime = Runtime(torch.device("cpu"), "fp32")
    state = build_state(config, runtime, 40)
    assert state.model.concat_views
    assert max(state.lrs) == pytest.approx(3e-4 * np.sqrt(8))
    assert state.momenta[0] == pytest.approx(0.996**8)
    assert len(state.lrs) == 20 * 10
    assert [group["weight_decay"] for group in state.optimizer.param_groups] == [1e-4, 0.0]
    lars = build_state(replace(config, optimizer="lars", lr=0.7), runtime, 40)
    assert isinstance(lars.optimizer, LARS)
    assert max(lars.lrs) == pytest.approx(0.7)


# ---------------------------------------------------------------- LARS


def reference_lars(w, v, g, lr, momentum, decay, trust, adapts):
    """One parameter's step in float64, as the paper writes it."""
    rate = 1.0
    length, slope = np.sqrt((w**2).sum()), np.sqrt((g**2).sum())
    if adapts and length > 0 and slope > 0:
        rate = trust * length / (slope + decay * length)
    v = momentum * v + lr * rate * (g + decay * w)
    return w - v, v


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    lr=st.floats(1e-3, 10),
    momentum=st.floats(0, 0.99),
    decay=st.sampled_from([0.0, 1.5e-6, 0.1]),
    trust=st.floats(1e-3, 1),
)
def test_lars_is_the_papers_formula(seed, lr, momentum, decay, trust):
    rng = np.random.default_rng(seed)
    shapes = [(3, 4), (2, 3, 3, 3), (5,), (4, 1), (2, 2)]
    values = [rng.normal(size=shape) for shape in shapes]
    values[-1][:] = 0  # its norm is 0
    adapts = [True, True, False, True, True]
    weights = [nn.Parameter(torch.tensor(v)) for v in values]
    groups = [
        {"params": [w for w, a in zip(weights, adapts, strict=True) if a]},
        {"params": [w for w, a in zip(weights, adapts, strict=True) if not a], "weight_decay": 0.0, "adapts": False},
    ]
    optimizer = LARS(groups, lr=lr, momentum=momentum, weight_decay=decay, trust=trust)
    velocities = [np.zeros(shape) for shape in shapes]
    for step in range(3):
        gradients = [rng.normal(size=shape) for shape in shapes]
        if step == 1:
            gradients[0][:] = 0
        for w, g in zip(weights, gradients, strict=True):
            w.grad = torch.tensor(g)
        optimizer.step()
        for i, (g, a) in enumerate(zip(gradients, adapts, strict=True)):
            values[i], velocities[i] = reference_lars(values[i], velocities[i], g, lr, momentum, decay if a else 0.0, trust, a)
            np.testing.assert_allclose(weights[i].detach().numpy(), values[i], rtol=1e-10, atol=1e-12)


def test_lars_goes_on_from_its_state_and_leaves_what_has_no_gradient():
    def parameters():
        return [nn.Parameter(torch.arange(1.0, 7).reshape(2, 3)), nn.Parameter(torch.ones(2))]

    def steps(optimizer, weights, count):
        for i in range(count):
            weights[0].grad = torch.full((2, 3), 0.5 + i)
            optimizer.step()

    one, other = parameters(), parameters()
    whole = LARS(one, lr=0.3)
    steps(whole, one, 1)
    first = LARS(other, lr=0.3)
    steps(first, other, 1)
    second = LARS(other, lr=0.3)
    second.load_state_dict(first.state_dict())
    for optimizer, weights in ((whole, one), (second, other)):
        steps(optimizer, weights, 2)
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], torch.ones(2))


@pytest.mark.parametrize("optimizer", ["adamw", "lars"])
def test_a_step_that_is_told_to_skip_changes_nothing(optimizer):
    """However bad the gradients are: this is how a step is skipped without the host's knowing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    trained = build_optimizer(model, resolve(recipe="mammo", optimizer=optimizer, weight_decay=0.1))
    for group in trained.param_groups:
        group["lr"] = 0.1

    def step(gradient: float, bad: float) -> list[torch.Tensor]:
        for p in model.parameters():
            p.grad = torch.full_like(p, gradient)
        trained.found_inf = torch.tensor(bad)
        trained.step()
        states = [v for state in trained.state.values() for name, v in state.items() if name != "step"]
        return [v.detach().clone() for v in [*model.parameters(), *states]]

    before = step(0.5, 0.0)
    for gradient in (float("nan"), float("inf"), 3.0):
        after = step(gradient, 1.0)
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    moved = step(0.5, 0.0)
    assert not any(torch.equal(a, b) for a, b in zip(moved, before, strict=True))


def test_lars_lowers_the_loss_of_a_byol_step():
    torch.manual_seed(0)
    model = MammogramBYOL(build_backbone("resnet18"), hidden_dim=16, proj_dim=8)
    optimizer = build_optimizer(model, resolve(256, optimizer="lars"))
    assert isinstance(optimizer, LARS)
    views = torch.randn(8, 1, 32, 32), torch.randn(8, 1, 32, 32)
    losses = []
    for _ in range(8):
        for group in optimizer.param_groups:
            group["lr"] = 0.5
        optimizer.zero_grad()
        loss = model(*views).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
