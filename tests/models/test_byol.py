"""BYOL: the loss against an independent reference, the target's isolation and its update."""

import doctest

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mammostream import models
from mammostream.common.errors import BadInput
from mammostream.models.backbones import build_backbone
from mammostream.models.byol import MammogramBYOL, byol_loss


def small_byol() -> MammogramBYOL:
    """A BYOL model that runs in milliseconds, with a target that differs from the online network."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    model = MammogramBYOL(backbone, input_dim=6, hidden_dim=8, proj_dim=5, num_classes=3)
    with torch.no_grad():
        for parameter in [*model.backbone_momentum.parameters(), *model.projection_head_momentum.parameters()]:
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def pairs(model: MammogramBYOL) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [
        *zip(model.backbone_momentum.parameters(), model.backbone.parameters(), strict=True),
        *zip(model.projection_head_momentum.parameters(), model.projection_head.parameters(), strict=True),
    ]


def numpy_loss(p: np.ndarray, z: np.ndarray) -> float:
    cosines = [float(a @ b / np.sqrt((a @ a) * (b @ b))) for a, b in zip(p, z, strict=True)]
    return -sum(cosines) / len(cosines)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 33), st.floats(1e-3, 1e3))
def test_loss_agrees_with_float64_and_stays_in_range(seed, n, d, scale):
    rng = np.random.default_rng(seed)
    p, z = (rng.normal(size=(n, d)).astype(np.float32) for _ in range(2))
    loss = byol_loss(torch.from_numpy(p * np.float32(scale)), torch.from_numpy(z))
    assert loss.item() == pytest.approx(numpy_loss(p.astype(np.float64), z.astype(np.float64)), abs=1e-5)
    assert -1 - 1e-6 <= loss.item() <= 1 + 1e-6


def test_loss_has_its_extremes_and_is_float32():
    z = torch.randn(4, 8)
    assert byol_loss(z, 3 * z).item() == pytest.approx(-1)
    assert byol_loss(z, -z).item() == pytest.approx(1)
    p, z = torch.randn(64, 8).bfloat16(), z.repeat(16, 1).bfloat16()
    loss = byol_loss(p, z)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(numpy_loss(p.double().numpy(), z.double().numpy()), abs=1e-6)


def numpy_batch_norm(x: np.ndarray, norm: nn.modules.batchnorm._BatchNorm) -> np.ndarray:
    axes = (0, 2, 3) if x.ndim == 4 else (0,)
    x = (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + norm.eps)
    w, b = (v.detach().double().numpy().reshape((1, -1) + (1,) * (x.ndim - 2)) for v in (norm.weight, norm.bias))
    return x * w + b


def numpy_head(x: np.ndarray, head: nn.Sequential) -> np.ndarray:
    first, norm, _, last = head
    w1, b1, w2, b2 = (v.detach().double().numpy() for v in (first.weight, first.bias, last.weight, last.bias))
    return np.maximum(numpy_batch_norm(x @ w1.T + b1, norm), 0) @ w2.T + b2


def numpy_backbone(x: np.ndarray, backbone: nn.Sequential) -> np.ndarray:
    conv, norm = backbone[0], backbone[1]
    w, b = conv.weight.detach().double().numpy(), conv.bias.detach().double().numpy()
    windows = np.lib.stride_tricks.sliding_window_view(x[:, 0], (3, 3), axis=(1, 2))
    y = np.einsum("nhwij,oij->nohw", windows, w[:, 0]) + b[:, None, None]
    return np.maximum(numpy_batch_norm(y, norm), 0).mean((2, 3))


def test_forward_is_the_symmetric_loss_with_batch_norm_per_view():
    model = small_byol()
    view1, view2 = torch.randn(4, 1, 9, 9), 2 * torch.randn(4, 1, 9, 9) + 1
    out = model(view1, view2)
    h, z, p, t = [], [], [], []
    for view in (view1, view2):
        x = view.double().numpy()
        h.append(numpy_backbone(x, model.backbone))
        z.append(numpy_head(h[-1], model.projection_head))
        p.append(numpy_head(z[-1], model.prediction_head))
        t.append(numpy_head(numpy_backbone(x, model.backbone_momentum), model.projection_head_momentum))
    expected = (numpy_loss(p[0], t[1]) + numpy_loss(p[1], t[0])) / 2
    assert out.loss.shape == ()
    assert out.loss.item() == pytest.approx(expected, abs=1e-5)
    np.testing.assert_allclose(out.projections.numpy(), z[0], atol=1e-4)
    np.testing.assert_allclose(out.projections2.numpy(), z[1], atol=1e-4)
    np.testing.assert_allclose(out.features.numpy(), h[0], atol=1e-4)
    assert model(view2, view1).loss.item() == pytest.approx(expected, abs=1e-5)


def test_concatenated_views_share_their_batch_norm_statistics():
    """The same as passing each view separately through networks whose batch norms use the statistics of both."""
    model = small_byol()
    model.concat_views = True
    view1, view2 = torch.randn(4, 1, 9, 9), 2 * torch.randn(4, 1, 9, 9) + 1
    out = model(view1, view2)
    h = numpy_backbone(torch.cat([view1, view2]).double().numpy(), model.backbone)
    z = numpy_head(h, model.projection_head)
    p = numpy_head(z, model.prediction_head)
    t = numpy_head(
        numpy_backbone(torch.cat([view1, view2]).double().numpy(), model.backbone_momentum), model.projection_head_momentum
    )
    expected = (numpy_loss(p[:4], t[4:]) + numpy_loss(p[4:], t[:4])) / 2
    assert out.loss.item() == pytest.approx(expected, abs=1e-5)
    np.testing.assert_allclose(out.projections.numpy(), z[:4], atol=1e-4)
    np.testing.assert_allclose(out.projections2.numpy(), z[4:], atol=1e-4)
    np.testing.assert_allclose(out.features.numpy(), h[:4], atol=1e-4)
    assert model.backbone[1].num_batches_tracked == 1
    model.concat_views = False
    assert abs(model(view1, view2).loss.item() - expected) > 1e-3


def test_gradients_reach_the_online_network_alone():
    model = small_byol()
    out = model(torch.randn(4, 1, 9, 9), torch.randn(4, 1, 9, 9))
    out.loss.backward()
    for name, parameter in model.named_parameters():
        online = name.split(".")[0] in ("backbone", "projection_head", "prediction_head")
        assert (parameter.grad is not None) == online, name
        assert parameter.requires_grad != name.split(".")[0].endswith("_momentum"), name
    assert not out.projections.requires_grad
    assert not out.features.requires_grad


def test_targets_carry_no_graph_even_where_the_views_do():
    model, targets = small_byol(), []
    model.projection_head_momentum.register_forward_hook(lambda module, args, output: targets.append(output))
    model(torch.randn(4, 1, 9, 9, requires_grad=True), torch.randn(4, 1, 9, 9, requires_grad=True))
    assert [target.requires_grad for target in targets] == [False, False]


def test_loss_under_autocast_is_float32_and_close():
    model = small_byol()
    views = torch.randn(16, 1, 9, 9), torch.randn(16, 1, 9, 9)
    exact = model(*views).loss
    with torch.autocast("cpu", torch.bfloat16):
        out = model(*views)
    assert out.loss.dtype == torch.float32
    assert out.loss.item() == pytest.approx(exact.item(), abs=0.05)


def test_momentum_one_leaves_zero_copies_and_between_interpolates():
    model = small_byol()
    before = [target.clone() for target, _ in pairs(model)]
    model.update_target(1.0)
    assert all(torch.equal(target, old) for (target, _), old in zip(pairs(model), before, strict=True))
    model.update_target(0.9)
    for (target, online), old in zip(pairs(model), before, strict=True):
        torch.testing.assert_close(target, 0.9 * old + 0.1 * online)
    model.update_target(0.0)
    assert all(torch.equal(target, online) for target, online in pairs(model))
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(BadInput, match="from 0 to 1"):
            model.update_target(bad)


def test_the_target_gathers_its_own_batch_statistics():
    model = small_byol()
    model(torch.randn(4, 1, 9, 9), torch.randn(4, 1, 9, 9))
    before = {k: v.clone() for k, v in model.named_buffers() if "_momentum." in k}
    model.update_target(0.0)
    after = dict(model.named_buffers())
    assert before
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not torch.equal(model.backbone_momentum[1].running_mean, model.backbone[1].running_mean)


def test_default_dimensions_are_the_guides_and_start_equal():
    model = MammogramBYOL(build_backbone("resnet50"))
    names = [name for name, _ in model.named_children()]
    assert names == [
        "backbone",
        "projection_head",
        "prediction_head",
        "classification_head",
        "backbone_momentum",
        "projection_head_momentum",
    ]
    shapes = {name: [tuple(m.weight.shape) for m in getattr(model, name) if isinstance(m, nn.Linear)] for name in names[1:4]}
    assert shapes == {
        "projection_head": [(4096, 2048), (256, 4096)],
        "prediction_head": [(4096, 256), (256, 4096)],
        "classification_head": [(2048, 2048), (2, 2048)],
    }
    assert all(torch.equal(target, online) for target, online in pairs(model))


@pytest.mark.parametrize("channels", [1, 3])
def test_features_and_logits_of_one_or_three_channels(channels):
    model = MammogramBYOL(build_backbone("resnet18"), hidden_dim=8, proj_dim=4, num_classes=3).eval()
    x = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        assert model.get_features(x.expand(-1, channels, -1, -1)).shape == (2, 512)
        logits = model.classify(x.expand(-1, channels, -1, -1))
        torch.testing.assert_close(logits, model.classify(x), rtol=1e-4, atol=1e-5)
    assert logits.shape == (2, 3)


def test_a_step_lowers_the_loss_on_a_fixed_batch():
    model = small_byol()
    views = torch.randn(8, 1, 9, 9), torch.randn(8, 1, 9, 9)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(20):
        loss = model(*views).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def test_the_examples_of_the_room_run():
    assert doctest.testmod(models).failed == 0
    with pytest.raises(AttributeError, match="nothing"):
        models.nothing  # noqa: B018
    assert all(getattr(models, name) for name in models.__all__)
