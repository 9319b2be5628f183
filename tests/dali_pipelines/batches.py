"""What tests of loaders do with batches."""

from __future__ import annotations

import torch


def numbers_of(loader):
    return [n for *_, numbers in loader for n in numbers.tolist()]


def copies(batches):
    return [tuple(tensor.clone() for tensor in batch) for batch in batches]


def assert_same(first, second):
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a, b)
