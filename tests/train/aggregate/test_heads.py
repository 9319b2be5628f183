"""The heads against references that are written from the papers' formulas, bag by bag."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mammostream.train.aggregate.heads import POOLINGS, BagHead, segment_softmax, segment_top_mean

DIM, CLASSES = 7, 3


def head_of(pooling, per_class=False, seed=0):
    torch.manual_seed(seed)
    options = {"hidden_dim": 6, "attention_dim": 5, "top": 2, "dropout": 0.5}
    head = BagHead(pooling, DIM, CLASSES, per_class=per_class, **options).eval()
    head.mean.normal_()
    head.std.uniform_(0.5, 2)
    return head


def reference(head, tiles):
    """Logits of one bag (n, DIM), and the weights of its tiles, in NumPy."""
    p = {name: tensor.detach().double().numpy() for name, tensor in head.state_dict().items()}
    x = (tiles.double().numpy() - p["mean"]) / p["std"]
    h = np.maximum(x @ p["project.weight"].T + p["project.bias"], 0)
    w, b = p["classifier.weight"], p["classifier.bias"]
    if head.pooling == "gated":
        gate = np.tanh(h @ p["attention.v.weight"].T + p["attention.v.bias"])
        gate /= 1 + np.exp(-(h @ p["attention.u.weight"].T + p["attention.u.bias"]))
        scores = gate @ p["attention.w.weight"].T
        a = np.exp(scores) / np.exp(scores).sum(0)
        pooled = a.T @ h  # (A, hidden)
        return np.array([w[c] @ pooled[min(c, len(pooled) - 1)] + b[c] for c in range(CLASSES)]), a
    if head.pooling == "mean":
        return w @ h.mean(0) + b, None
    ordered = np.sort(h @ w.T + b, axis=0)[::-1]
    return ordered[: 1 if head.pooling == "max" else 2].mean(0), None


@st.composite
def bags_of_tiles(draw):
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    return [torch.from_numpy(rng.normal(size=(size, DIM)).astype(np.float32)) for size in sizes]


@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
@settings(max_examples=25, deadline=None)
@given(bags=bags_of_tiles(), seed=st.integers(0, 100))
def test_each_bag_is_what_the_formula_says_whatever_is_beside_it(pooling, per_class, bags, seed):
    head = head_of(pooling, per_class, seed)
    bag = torch.repeat_interleave(torch.arange(len(bags)), torch.tensor([len(tiles) for tiles in bags]))
    with torch.no_grad():
        logits, weights = head(torch.cat(bags), bag, len(bags))
    for n, tiles in enumerate(bags):
        expected, attention = reference(head, tiles)
        np.testing.assert_allclose(logits[n], expected, atol=1e-4)
        if attention is not None:
            np.testing.assert_allclose(weights[bag == n], attention, atol=1e-5)
            np.testing.assert_allclose(weights[bag == n].sum(0), 1, atol=1e-5)
            assert weights.shape[1] == (CLASSES if per_class else 1)


@pytest.mark.parametrize("pooling", POOLINGS)
@settings(max_examples=20, deadline=None)
@given(bags=bags_of_tiles(), seed=st.integers(0, 100))
def test_the_order_of_tiles_changes_nothing(pooling, bags, seed):
    head = head_of(pooling)
    bag = torch.repeat_interleave(torch.arange(len(bags)), torch.tensor([len(tiles) for tiles in bags]))
    generator = torch.Generator().manual_seed(seed)
    moved = [tiles[torch.randperm(len(tiles), generator=generator)] for tiles in bags]
    with torch.no_grad():
        torch.testing.assert_close(head(torch.cat(moved), bag, len(bags))[0], head(torch.cat(bags), bag, len(bags))[0])


def test_large_scores_do_not_overflow():
    weights = segment_softmax(torch.tensor([[1e4], [1e4], [-1e4]]), torch.tensor([0, 0, 1]), 2)
    torch.testing.assert_close(weights, torch.tensor([[0.5], [0.5], [1.0]]))


def test_gradients_reach_the_highest_tiles_only():
    logits = torch.tensor([[3.0], [1.0], [2.0], [5.0]], requires_grad=True)
    segment_top_mean(logits, torch.tensor([0, 0, 0, 1]), 2, 2).sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[0.5], [0.0], [0.5], [1.0]]))
