"""Schedules: end points, monotonicity, refusals."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mammostream.common.errors import BadInput
from mammostream.train.run.schedules import byol_momenta, learning_rates, trainable_stages

STEPS = st.integers(1, 3000)


@given(st.floats(1e-8, 1e3), STEPS, st.integers(0, 3000), st.floats(0, 1))
def test_learning_rate_rises_to_its_peak_and_falls_to_its_end(base, steps, warmup, share):
    final = base * share
    rates = learning_rates(base, steps, warmup, final)
    assert rates.shape == (steps,)
    assert rates.dtype == np.float64
    assert (rates > 0).all() or final == 0
    assert (rates <= base * (1 + 1e-12)).all()
    assert (np.diff(rates[: warmup + 1]) > 0).all()
    assert (np.diff(rates[warmup:]) <= base * 1e-12).all()
    if warmup < steps:
        assert rates[warmup] == pytest.approx(base, rel=1e-12)
    if warmup < steps - 1:
        assert rates[-1] == pytest.approx(final, rel=1e-12, abs=base * 1e-12)
    if warmup:
        assert rates[0] == pytest.approx(base / (warmup + 1))


def test_learning_rate_of_a_small_run_by_hand():
    np.testing.assert_allclose(
        learning_rates(1.0, 6, 1), [0.5, 1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0], atol=1e-15
    )


@given(st.floats(0, 1), STEPS)
def test_momentum_rises_from_base_to_one(base, steps):
    momenta = byol_momenta(base, steps)
    assert momenta.shape == (steps,)
    assert momenta[0] == pytest.approx(base, abs=1e-15)
    assert ((momenta >= 0) & (momenta <= 1)).all()
    assert (np.diff(momenta) >= -1e-15).all()
    if steps > 1:
        assert momenta[-1] == 1


def test_momentum_is_the_papers_formula():
    k, last = 37, 99
    expected = 1 - (1 - 0.996) * (math.cos(math.pi * k / last) + 1) / 2
    assert byol_momenta(0.996, last + 1)[k] == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    "call",
    [
        lambda: learning_rates(0.1, 0),
        lambda: learning_rates(0, 10),
        lambda: learning_rates(float("nan"), 10),
        lambda: learning_rates(0.1, 10, -1),
        lambda: learning_rates(0.1, 10, 0, 0.2),
        lambda: byol_momenta(0.996, 0),
        lambda: byol_momenta(1.5, 10),
        lambda: byol_momenta(float("nan"), 10),
    ],
)
def test_values_outside_their_range_are_refused(call):
    with pytest.raises(BadInput, match="give"):
        call()


def test_stages_unfreeze_after_the_frozen_epochs_at_once_or_one_by_one():
    assert [trainable_stages(epoch, 2, 0, 5) for epoch in range(1, 6)] == [0, 0, 5, 5, 5]
    assert [trainable_stages(epoch, 2, 1, 5) for epoch in range(1, 10)] == [0, 0, 1, 2, 3, 4, 5, 5, 5]
    assert [trainable_stages(epoch, 1, 2, 3) for epoch in range(1, 9)] == [0, 1, 1, 2, 2, 3, 3, 3]
    assert [trainable_stages(epoch, 0, 0, 5) for epoch in (1, 2)] == [5, 5]
