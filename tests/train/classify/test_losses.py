"""Losses: each against its paper's formula in float64; effects of weights, smoothing, missing labels and mixup."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import sigmoid_focal_loss

from mammostream.common.errors import BadInput
from mammostream.train.classify.config import FinetuneConfig
from mammostream.train.classify.losses import asymmetric_loss, bce_loss, build_loss, focal_loss, mix, positive_weights

KINDS = [
    {"loss": "bce"},
    {"loss": "focal", "focal_gamma": 2.0},
    {"loss": "focal", "focal_gamma": 0.5},
    {"loss": "asymmetric"},
    {"loss": "asymmetric", "asymmetric_gamma_positive": 1.0, "asymmetric_gamma_negative": 0.5, "asymmetric_margin": 0.2},
]


def reference(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray, config: FinetuneConfig) -> np.ndarray:
    """The papers' formulas, in float64; 0 where the label is missing."""
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    if config.loss == "asymmetric":
        shifted = np.maximum(p - config.asymmetric_margin, 1e-8)
        log_q_of_negatives = np.log(1 - shifted)
        of_positives = (1 - p) ** config.asymmetric_gamma_positive
        of_negatives = shifted**config.asymmetric_gamma_negative
    else:
        gamma = config.focal_gamma if config.loss == "focal" else 0
        log_q_of_negatives = np.log(1 - p)
        of_positives, of_negatives = (1 - p) ** gamma, p**gamma
    half = config.label_smoothing / 2
    positive = weights * of_positives * ((1 - half) * np.log(p) + half * np.log(1 - p))
    negative = of_negatives * (half * np.log(p) + (1 - half) * log_q_of_negatives)
    return np.where(np.isnan(labels), 0, -np.where(labels == 1, positive, negative))


@settings(max_examples=100)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 9),
    st.integers(1, 4),
    st.sampled_from(KINDS),
    st.just(0.0) | st.floats(1e-3, 0.9),
    st.sampled_from([0.0, 0.3, 1.0]),
)
def test_each_loss_is_its_papers_formula_over_known_labels(seed, rows, classes, kind, smoothing, missing):
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((rows, classes)) * rng.choice([0.1, 5])).astype(np.float32)
    labels = rng.integers(0, 2, (rows, classes)).astype(np.float32)
    labels[rng.random((rows, classes)) < missing] = np.nan
    weights = rng.uniform(0.2, 9, classes).astype(np.float32)
    config = FinetuneConfig(label_smoothing=smoothing, **kind)
    tensor = torch.from_numpy(logits).requires_grad_()
    losses = build_loss(config, torch.from_numpy(weights))(tensor, torch.from_numpy(labels))
    assert losses.dtype == torch.float32
    np.testing.assert_allclose(losses.detach().numpy(), reference(logits, labels, weights, config), rtol=2e-3, atol=2e-5)
    losses.sum().backward()
    assert torch.isfinite(tensor.grad).all()
    assert (tensor.grad.numpy()[np.isnan(labels)] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("label", [0.0, 1.0])
def test_losses_and_gradients_stay_finite_where_probabilities_round_to_0_and_1(kind, label):
    logits = torch.tensor([[-300.0, -90.0, -20.0, 0.0, 20.0, 90.0, 300.0]], requires_grad=True)
    losses = build_loss(FinetuneConfig(label_smoothing=0.0, **kind), torch.ones(7))(logits, torch.full((1, 7), label))
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert torch.isfinite(logits.grad).all()
    # A confident correct prediction costs nothing, a confident wrong one most.
    order = losses.detach()[0] if label == 0 else losses.detach()[0].flip(0)
    assert order[0] == pytest.approx(0, abs=1e-6)
    assert (order.diff() >= -1e-6).all()


def test_the_focal_loss_is_torchvisions_and_the_losses_meet_where_their_parameters_do():
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((50, 3)) * 4)
    y = torch.from_numpy(rng.integers(0, 2, (50, 3)).astype(float))
    one = torch.ones(3)
    torch.testing.assert_close(focal_loss(x, y, one, 2.0), sigmoid_focal_loss(x, y, alpha=-1, gamma=2.0))
    torch.testing.assert_close(focal_loss(x, y, one, 0.0), bce_loss(x, y, one.double()))
    torch.testing.assert_close(asymmetric_loss(x, y, one, 2.0, 2.0, 0.0), focal_loss(x, y, one, 2.0))


@pytest.mark.parametrize("kind", [{"loss": "bce"}, {"loss": "focal"}, {"loss": "asymmetric"}])
@pytest.mark.parametrize("weight", [1.0, 39.0])
def test_the_best_probability_of_a_certain_negative_is_no_higher_than_its_smoothed_label(kind, weight):
    """Weighed by the smoothed label, it was 0.72 with a weight of 39, 0.25 with the focal and 0.42 with the asymmetric loss."""
    logits = torch.linspace(-12, 12, 4801).view(-1, 1)
    losses = build_loss(FinetuneConfig(label_smoothing=0.1, **kind), torch.tensor([weight]))(logits, torch.zeros(4801, 1))
    best = torch.sigmoid(logits[losses.argmin()]).item()
    assert best <= 0.051


def test_only_the_cross_entropy_smooths_labels_by_default():
    assert [FinetuneConfig(loss=loss).label_smoothing for loss in ("bce", "focal", "asymmetric")] == [0.1, 0.0, 0.0]
    assert FinetuneConfig(loss="focal", label_smoothing=0.2).label_smoothing == 0.2


def test_the_losses_are_float32_whatever_the_logits():
    loss = build_loss(FinetuneConfig(), torch.ones(2))(torch.tensor([[3.3, -1.2]], dtype=torch.bfloat16), torch.ones(1, 2))
    assert loss.dtype == torch.float32


# ---------------------------------------------------------------- weights of positive labels


def test_auto_weights_are_the_guides_over_known_labels():
    labels = np.array([[1, 0, 1], [0, 0, 1], [0, 0, np.nan], [np.nan, 0, 1], [0, 0, 1]], np.float32)
    weights = positive_weights(labels, ("auto",), ["a", "b", "c"])
    np.testing.assert_array_equal(weights, [3, 1, 1])  # b has no positive and c no negative: nothing to balance
    np.testing.assert_array_equal(positive_weights(labels, (), ["a", "b", "c"]), [1, 1, 1])
    np.testing.assert_array_equal(positive_weights(labels, ("2", "0.5", "1e1"), ["a", "b", "c"]), [2, 0.5, 10])


def test_auto_weights_make_positives_and_negatives_count_alike():
    labels = (np.random.default_rng(0).random((200, 1)) < 0.1).astype(np.float32)
    weights = torch.from_numpy(positive_weights(labels, ("auto",), ["a"]))
    losses = build_loss(FinetuneConfig(label_smoothing=0.0), weights)(torch.zeros(200, 1), torch.from_numpy(labels))
    assert losses[labels == 1].sum().item() == pytest.approx(losses[labels == 0].sum().item(), rel=1e-5)


def test_weights_that_do_not_fit_are_refused():
    with pytest.raises(BadInput, match=r"--pos-weight has 2 values for 3 classes.*\(a, b, c\)"):
        positive_weights(np.ones((4, 3), np.float32), ("1", "2"), ["a", "b", "c"])
    for wrong in (("auto", "auto"), ("2", "auto"), ("-1",), ("0",), ("inf",), ("nan",), ("many",)):
        with pytest.raises(BadInput, match="--pos-weight"):
            FinetuneConfig(pos_weight=wrong)


# ---------------------------------------------------------------- mixup


def test_mixup_blends_tiles_and_labels_by_the_same_share():
    torch.manual_seed(3)
    tiles = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 1, 2, 2)
    labels = torch.stack([torch.arange(8.0), torch.full((8,), torch.nan)], 1)
    labels[2, 0] = torch.nan
    mixed_tiles, mixed_labels = mix(tiles, labels, 0.4)
    known = ~mixed_labels[:, 0].isnan()
    torch.testing.assert_close(mixed_tiles[known, 0, 0, 0], mixed_labels[known, 0])
    assert not torch.equal(mixed_tiles, tiles)
    assert 1 <= (~known).sum() <= 2  # the one without a label, and its partner
    assert mixed_labels[:, 1].isnan().all()
    torch.manual_seed(3)
    assert torch.equal(mix(tiles, labels, 0.4)[0], mixed_tiles)
