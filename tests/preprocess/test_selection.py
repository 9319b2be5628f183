"""Selection: the grid, exact box means, gates, rules and their counts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from common.errors import BadInput
from preprocess.selection import NONZERO_ABOVE, SelectionConfig, box_means, grid_positions, select_tiles

UNIT = st.floats(0, 1)


@given(length=st.integers(1, 300), size=st.integers(1, 100), stride=st.integers(1, 120))
def test_grid_covers_the_axis_and_ends_flush(length, size, stride):
    positions = grid_positions(length, size, stride)
    assert positions[0] == 0
    assert (np.diff(positions) > 0).all()
    if length <= size:
        assert positions.tolist() == [0]
        return
    assert positions[-1] + size == length
    assert np.diff(positions).max(initial=0) <= stride
    assert (positions[:-1] % stride == 0).all()
    if stride <= size:
        covered = np.zeros(length, bool)
        for position in positions:
            covered[position : position + size] = True
        assert covered.all()


def brute_mean(values, top, left, height, width):
    """Weigh every pixel by the area that it shares with the box."""
    rows = np.clip(np.minimum(np.arange(values.shape[0]) + 1, top + height) - np.maximum(np.arange(values.shape[0]), top), 0, 1)
    cols = np.clip(
        np.minimum(np.arange(values.shape[1]) + 1, left + width) - np.maximum(np.arange(values.shape[1]), left), 0, 1
    )
    weights = rows[:, None] * cols[None, :]
    return (values * weights).sum() / weights.sum()


@given(
    values=arrays.arrays(np.float64, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.floats(0, 1000)),
    corner=st.tuples(UNIT, UNIT),
    box=st.tuples(st.floats(0.05, 6), st.floats(0.05, 6)),
)
def test_box_means_are_exact_for_fractions(values, corner, box):
    top, left = corner[0] * (values.shape[0] - 0.05), corner[1] * (values.shape[1] - 0.05)
    got = box_means(values, np.array([top, 0.0]), np.array([left, 0.0]), *box)
    # Differences of sums: the error grows with the sum, and a sliver of a box divides it by its small area.
    for i, (y, x) in enumerate([(top, left), (0.0, 0.0)]):
        assert got[i] == pytest.approx(brute_mean(values, y, x, *box), rel=1e-6, abs=1e-6)


def test_box_means_of_a_mask_are_shares():
    mask = np.zeros((10, 10), bool)
    mask[:, 5:] = True
    np.testing.assert_allclose(box_means(mask, np.zeros(3), np.array([0, 2.5, 5]), 10, 5), [0, 0.5, 1])


@st.composite
def cases(draw):
    size = draw(st.integers(2, 12))
    height, width = draw(st.integers(size, 40)), draw(st.integers(size, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    # Blocks of bright and dark, so that every gate rejects something.
    blocks = rng.choice([0.0, 0.1, 0.5, 1.0], (height // 5 + 1, width // 5 + 1))
    image = np.kron(blocks, np.ones((5, 5)))[:height, :width].astype(np.float32)
    scale = draw(st.sampled_from([1, 2, 4]))
    mask = rng.random((-(-height // scale), -(-width // scale))) < draw(UNIT)
    energy = rng.random((height, width)) ** 4 * 4
    config = SelectionConfig(
        tile_size=size,
        stride=draw(st.integers(1, 2 * size)),
        min_breast_ratio=draw(UNIT),
        min_freq_energy=draw(st.floats(0, 2)),
        min_intensity=draw(st.sampled_from([0.0, 0.15, 40.0])),
        min_nonzero=draw(UNIT),
        select=draw(st.sampled_from(["either", "both", "breast", "frequency"])),
        freq_percentile=draw(st.none() | st.floats(0, 100)),
        max_tiles_per_image=draw(st.none() | st.integers(1, 20)),
    )
    return image, mask, energy, config, scale


def select(case, **changes):
    image, mask, energy, config, scale = case
    return select_tiles(image, mask, energy, replace(config, **changes), mask_scale=scale, energy_scale=1)


def places(selection):
    return set(zip(selection.x.tolist(), selection.y.tolist(), strict=True))


@given(cases())
def test_kept_tiles_lie_inside_and_counts_add_up(case):
    image, _, _, config, _ = case
    found = select(case)
    size = config.tile_size
    assert (found.x >= 0).all()
    assert (found.y >= 0).all()
    assert (found.x + size <= image.shape[1]).all()
    assert (found.y + size <= image.shape[0]).all()
    assert len(places(found)) == len(found.x)
    for ratio in (found.breast_ratio, found.nonzero_ratio):
        assert ((ratio >= 0) & (ratio <= 1 + 1e-6)).all()
    assert (found.freq_energy >= 0).all()
    counts = found.counts
    assert counts["kept"] == len(found.x) == len(found.rule)
    assert counts["candidates"] == counts["kept"] + sum(v for k, v in counts.items() if k.startswith("rejected_"))
    assert counts["kept"] == sum(v for k, v in counts.items() if k.startswith("kept_"))
    rows, columns = (grid_positions(n, size, config.stride) for n in image.shape)
    assert counts["candidates"] == len(rows) * len(columns)
    assert all(v >= 0 for v in counts.values())


@given(cases())
def test_against_a_brute_force_selection(case):
    image, mask, energy, config, scale = case
    case = (image, mask, energy, replace(config, freq_percentile=None, max_tiles_per_image=None), scale)
    config = case[3]
    size = config.tile_size
    gate = config.min_intensity / 255 if config.min_intensity > 1 else config.min_intensity
    expected = {}
    for y in grid_positions(image.shape[0], size, config.stride).tolist():
        for x in grid_positions(image.shape[1], size, config.stride).tolist():
            tile = image[y : y + size, x : x + size].astype(float)
            breast = brute_mean(mask, y / scale, x / scale, size / scale, size / scale)
            score = np.sqrt(energy[y : y + size, x : x + size].mean())
            nonzero = (tile > NONZERO_ABOVE).mean()
            # Sums in another order may fall on the other side of a threshold they hit exactly.
            for value, limit in (
                (tile.mean(), gate),
                (nonzero, config.min_nonzero),
                (breast, config.min_breast_ratio),
                (score, config.min_freq_energy),
            ):
                assume(abs(value - limit) > 1e-7 or limit == 0)
            rules = breast >= config.min_breast_ratio, score >= config.min_freq_energy
            chosen = {"either": any(rules), "both": all(rules), "breast": rules[0], "frequency": rules[1]}[config.select]
            if tile.mean() >= gate and nonzero >= config.min_nonzero and chosen:
                rule = "both" if all(rules) else ("breast" if rules[0] else "frequency")
                expected[x, y] = (rule, breast, score, tile.mean(), nonzero)
    found = select(case)
    assert places(found) == set(expected)
    for i, place in enumerate(zip(found.x.tolist(), found.y.tolist(), strict=True)):
        rule, *scores = expected[place]
        assert found.rule[i] == rule
        got = (found.breast_ratio[i], found.freq_energy[i], found.mean_intensity[i], found.nonzero_ratio[i])
        assert got == pytest.approx(scores, rel=1e-5, abs=1e-5)


@given(cases())
def test_modes_are_the_sets_they_are_called(case):
    kept = {
        mode: places(select(case, select=mode, max_tiles_per_image=None)) for mode in ("either", "both", "breast", "frequency")
    }
    assert kept["either"] == kept["breast"] | kept["frequency"]
    assert kept["both"] == kept["breast"] & kept["frequency"]


@given(cases(), st.integers(1, 10))
def test_limit_keeps_the_tiles_of_highest_energy(case, limit):
    everything, limited = select(case, max_tiles_per_image=None), select(case, max_tiles_per_image=limit)
    assert len(limited.x) == min(limit, len(everything.x))
    assert places(limited) <= places(everything)
    assert limited.counts["rejected_limit"] == len(everything.x) - len(limited.x)
    best = np.sort(everything.freq_energy)[::-1][:limit]
    np.testing.assert_array_equal(np.sort(limited.freq_energy)[::-1], best)
    order = list(zip(limited.y.tolist(), limited.x.tolist(), strict=True))
    assert order == sorted(order)


@given(cases(), st.floats(0, 100))
def test_percentile_is_of_the_films_own_candidates(case, percentile):
    changes = {"select": "frequency", "max_tiles_per_image": None}
    gated = select(case, freq_percentile=0.0, **changes)  # all that pass the gates
    found = select(case, freq_percentile=percentile, **changes)
    assert gated.counts["rejected_rules"] == 0
    assert places(found) <= places(gated)
    if len(gated.x):
        assert len(found.x) >= max(1, np.floor(len(gated.x) * (1 - percentile / 100)))
        top = np.percentile(gated.freq_energy.astype(float), percentile)
        assert (found.freq_energy >= top - 1e-5).all()
    # --min-freq-energy has no say then.
    assert places(select(case, freq_percentile=percentile, min_freq_energy=99.0, **changes)) == places(found)


@given(cases())
def test_stricter_thresholds_keep_a_subset(case):
    config = case[3]
    loose = places(select(case, max_tiles_per_image=None, freq_percentile=None))
    for change in (
        {"min_breast_ratio": min(1.0, config.min_breast_ratio + 0.2)},
        {"min_freq_energy": config.min_freq_energy + 0.3},
        {"min_intensity": 0.6},
        {"min_nonzero": min(1.0, config.min_nonzero + 0.2)},
    ):
        assert places(select(case, max_tiles_per_image=None, freq_percentile=None, **change)) <= loose


def test_intensities_above_one_are_on_the_8_bit_scale():
    assert SelectionConfig(min_intensity=51).intensity_gate == pytest.approx(0.2)
    assert SelectionConfig(min_intensity=0.2).intensity_gate == 0.2


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"tile_size": 0}, "--tile-size"),
        ({"stride": -1}, "--stride"),
        ({"min_breast_ratio": 1.5}, "--min-breast-ratio"),
        ({"min_nonzero": -0.1}, "--min-nonzero"),
        ({"min_intensity": 256}, "--min-intensity"),
        ({"freq_percentile": 101}, "--freq-percentile"),
        ({"max_tiles_per_image": 0}, "--max-tiles-per-image"),
    ],
)
def test_impossible_options_are_named(options, name):
    with pytest.raises(BadInput, match=name):
        SelectionConfig(**options)
