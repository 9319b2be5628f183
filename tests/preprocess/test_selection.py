"""Selection: the grid, exact box means, gates, rules and their counts, rescue tiles."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mammostream.common.errors import BadInput
from mammostream.preprocess.selection import (
    ScoreMaps,
    Scores,
    SelectionConfig,
    TileSelection,
    box_means,
    grid_positions,
    integral,
    select_tiles,
)

UNIT = st.floats(0, 1, width=32, allow_subnormal=False)  # ratios are of single precision


@given(length=st.integers(1, 300), size=st.integers(1, 100), stride=st.integers(1, 120), min_step=st.integers(1, 20))
def test_grid_covers_the_axis_and_ends_flush(length, size, stride, min_step):
    positions = grid_positions(length, size, stride, min_step)
    if length <= size:
        assert positions.tolist() == [0]
        return
    assert positions[-1] + size == length
    assert (positions[:-1] % stride == 0).all()
    assert (np.diff(positions) >= min(stride, min_step)).all()
    assert np.diff(positions, prepend=0).max() < stride + min_step
    if min_step == 1:
        assert positions[0] == 0
        if stride <= size:
            covered = np.zeros(length, bool)
            for position in positions:
                covered[position : position + size] = True
            assert covered.all()


def brute_mean(values, top, left, height, width):
    """Weigh every pixel by the area that it shares with the box."""
    rows, columns = (np.arange(n) for n in values.shape)
    rows = np.clip(np.minimum(rows + 1, top + height) - np.maximum(rows, top), 0, 1)
    columns = np.clip(np.minimum(columns + 1, left + width) - np.maximum(columns, left), 0, 1)
    weights = rows[:, None] * columns[None, :]
    return (values * weights).sum() / weights.sum()


@given(
    values=arrays.arrays(np.float64, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.floats(0, 1000)),
    corner=st.tuples(UNIT, UNIT),
    box=st.tuples(st.floats(0.05, 6), st.floats(0.05, 6)),
)
def test_box_means_are_exact_for_fractions(values, corner, box):
    top, left = corner[0] * (values.shape[0] - 0.05), corner[1] * (values.shape[1] - 0.05)
    got = box_means(integral(values), np.array([top, 0.0]), np.array([left, 0.0]), *box)
    # Differences of sums: the error grows with the sum, and a sliver of a box divides it by its small area.
    for i, (y, x) in enumerate([(top, left), (0.0, 0.0)]):
        assert got[i] == pytest.approx(brute_mean(values, y, x, *box), rel=1e-6, abs=1e-6)


def test_box_means_of_a_mask_are_shares():
    mask = np.zeros((10, 10), bool)
    mask[:, 5:] = True
    np.testing.assert_allclose(box_means(integral(mask), np.zeros(3), np.array([0, 2.5, 5]), 10, 5), [0, 0.5, 1])


@dataclass
class Case:
    """What `select_tiles` is given."""

    shape: tuple[int, int]
    maps: ScoreMaps
    config: SelectionConfig
    clusters: np.ndarray | None
    min_step: int

    def select(self, **changes) -> TileSelection:
        config = replace(self.config, **changes)
        return select_tiles(self.shape, self.maps, config, self.clusters, self.min_step)

    def scores(self, x: int, y: int) -> tuple[float, float, float, float]:
        """Measure a tile's breast ratio, energy, intensity and share of non-zero pixels pixel by pixel."""
        size, maps = self.config.tile_size, self.maps

        def mean(values, scale):
            return brute_mean(values, y / scale, x / scale, size / scale, size / scale)

        return mean(maps.mask, maps.mask_scale), *(
            mean(values, maps.scale) for values in (maps.energy, maps.intensity, maps.nonzero)
        )

    def gates(self, x: int, y: int) -> bool:
        """Tell whether a tile passes; a tile on the brink, where sums in another order decide, ends the example."""
        _, _, intensity, nonzero = self.scores(x, y)
        for value, limit in ((intensity, self.config.intensity_gate), (nonzero, self.config.min_nonzero)):
            assume(abs(value - limit) > 1e-7 or limit == 0)
        return intensity >= self.config.intensity_gate and nonzero >= self.config.min_nonzero

    def held_by(self, box: np.ndarray, x: int, y: int) -> bool:
        size = self.config.tile_size
        return x <= box[0] and y <= box[1] and box[2] <= x + size and box[3] <= y + size


@st.composite
def cases(draw, clusters: bool = False):
    size = draw(st.integers(2, 12))
    shape = height, width = draw(st.integers(size, 40)), draw(st.integers(size, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    scale, mask_scale = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2, 2.7, 4]))

    def grid(scale):
        return tuple(int(np.ceil(n / scale)) for n in shape)

    # Blocks of bright and dark, so that every gate rejects something.
    rows, columns = grid(scale)
    blocks = rng.choice([0.0, 0.1, 0.5, 1.0], (rows // 3 + 1, columns // 3 + 1))
    maps = ScoreMaps(
        intensity=np.kron(blocks, np.ones((3, 3)))[:rows, :columns].astype(np.float32),
        nonzero=np.sqrt(rng.random((rows, columns))).astype(np.float32),
        energy=(rng.random((rows, columns)) ** 4 * 100).astype(np.float32) * draw(st.sampled_from([0, 1])),
        mask=rng.random(grid(mask_scale)) < draw(UNIT),
        scale=scale,
        mask_scale=mask_scale,
    )
    config = SelectionConfig(
        tile_size=size,
        stride=draw(st.integers(size if clusters else 1, 2 * size)),  # gaps for clusters to lie in
        min_breast_ratio=draw(UNIT),
        min_freq_energy=draw(st.floats(0, 40)),
        min_intensity=draw(st.sampled_from([0.0, 0.15, 40.0] if clusters else [0.0, 0.15, 40.0, 100.0])),
        min_nonzero=draw(st.floats(0, 0.7) if clusters else UNIT),
        select=draw(st.sampled_from(["either", "both", "breast", "frequency"])),
        freq_percentile=draw(st.none() | st.floats(0, 100)),
        max_tiles_per_image=draw(st.none() | st.integers(1, 20)),
    )
    boxes = None
    if clusters:
        low = rng.random((draw(st.integers(1, 5)), 2)) * (width, height)
        high = np.minimum(low + rng.random(low.shape) * draw(st.sampled_from([0.5, 0.9, 1.2])) * size, (width, height))
        boxes = np.hstack([low, high])
    return Case(shape, maps, config, boxes, draw(st.integers(1, 3)))


def places(tiles: Scores) -> list[tuple[int, int]]:
    return list(zip(tiles.x.tolist(), tiles.y.tolist(), strict=True))


@given(cases(clusters=True))
def test_tiles_lie_inside_and_counts_add_up(case):
    found = case.select()
    size = case.config.tile_size
    for tiles in (found.tiles, found.candidates):
        assert ((tiles.x >= 0) & (tiles.x + size <= case.shape[1])).all()
        assert ((tiles.y >= 0) & (tiles.y + size <= case.shape[0])).all()
        for ratio in (tiles.breast_ratio, tiles.nonzero_ratio, tiles.mean_intensity, tiles.pectoral_ratio):
            assert ((ratio >= 0) & (ratio <= 1)).all()
        assert (tiles.freq_energy >= 0).all()
        assert len({len(getattr(tiles, field.name)) for field in fields(Scores)}) == 1
    assert len(set(places(found.tiles))) == len(found.tiles.x) == len(found.rule)
    counts = found.counts
    on_grid = counts["kept"] - counts["kept_rescue"]
    rejected = {name: n for name, n in counts.items() if name.startswith("rejected_")}
    assert set(rejected) == {"rejected_intensity", "rejected_nonzero", "rejected_rules", "rejected_pectoral", "rejected_limit"}
    assert counts["candidates"] == on_grid + sum(rejected.values()) == len(found.candidates.x)
    assert counts["kept"] == len(found.rule) == sum(n for name, n in counts.items() if name.startswith("kept_"))
    assert (found.fate == "kept").sum() == on_grid
    # Those of the grid come first, in row order, with the scores that they had as candidates.
    assert found.rule[:on_grid].tolist() == [rule for rule in found.rule if rule != "rescue"]
    for field in fields(Scores):
        np.testing.assert_array_equal(
            getattr(found.tiles, field.name)[:on_grid], getattr(found.candidates, field.name)[found.fate == "kept"]
        )
    order = [(y, x) for x, y in places(found.candidates)]
    assert order == sorted(set(order))


@given(cases())
def test_against_a_brute_force_selection(case):
    case.config = replace(case.config, freq_percentile=None, max_tiles_per_image=None)
    config = case.config
    expected = {}
    for y in grid_positions(case.shape[0], config.tile_size, config.stride, case.min_step).tolist():
        for x in grid_positions(case.shape[1], config.tile_size, config.stride, case.min_step).tolist():
            breast, energy, *_ = scores = case.scores(x, y)
            # Sums in another order may fall on the other side of a threshold they hit exactly.
            for value, limit in ((breast, config.min_breast_ratio), (energy, config.min_freq_energy)):
                assume(abs(value - limit) > 1e-7 or limit == 0)
            rules = breast >= config.min_breast_ratio, energy >= config.min_freq_energy
            chosen = {"either": any(rules), "both": all(rules), "breast": rules[0], "frequency": rules[1]}[config.select]
            if case.gates(x, y) and chosen:
                expected[x, y] = ("both" if all(rules) else ("breast" if rules[0] else "frequency"), scores)
    found = case.select()
    assert places(found.tiles) == list(expected)
    tiles = found.tiles
    for i, (rule, scores) in enumerate(expected.values()):
        assert found.rule[i] == rule
        got = (tiles.breast_ratio[i], tiles.freq_energy[i], tiles.mean_intensity[i], tiles.nonzero_ratio[i])
        assert got == pytest.approx(scores, rel=1e-5, abs=1e-5)


@given(cases())
def test_a_tile_is_rejected_by_the_first_thing_that_fails(case):
    found = case.select(max_tiles_per_image=None)
    for (x, y), fate in zip(places(found.candidates), found.fate, strict=True):
        passes = case.gates(x, y)
        bright = case.scores(x, y)[2] >= case.config.intensity_gate
        assert fate in (("kept", "rules") if passes else ("nonzero",) if bright else ("intensity",))


@given(cases())
def test_modes_are_the_sets_they_are_called(case):
    kept = {
        mode: set(places(case.select(select=mode, max_tiles_per_image=None).tiles))
        for mode in ("either", "both", "breast", "frequency")
    }
    assert kept["either"] == kept["breast"] | kept["frequency"]
    assert kept["both"] == kept["breast"] & kept["frequency"]


@given(cases(clusters=True), st.integers(1, 10))
def test_limit_keeps_the_tiles_of_highest_energy(case, limit):
    everything, limited = case.select(max_tiles_per_image=None), case.select(max_tiles_per_image=limit)
    assert len(limited.rule) == min(limit, len(everything.rule))
    best = np.sort(everything.tiles.freq_energy)[::-1][:limit]
    np.testing.assert_array_equal(np.sort(limited.tiles.freq_energy)[::-1], best)
    # What is left keeps its order, and what is gone from the grid is counted.
    order = [place for place in places(everything.tiles) if place in set(places(limited.tiles))]
    assert places(limited.tiles) == order
    assert limited.counts["rejected_limit"] == (everything.rule != "rescue").sum() - (limited.rule != "rescue").sum()


@given(cases(), st.floats(0, 100))
def test_percentile_is_of_the_films_own_candidates(case, percentile):
    changes = {"select": "frequency", "max_tiles_per_image": None}
    gated = case.select(min_freq_energy=0.0, freq_percentile=None, **changes).tiles  # all that pass the gates
    found = case.select(freq_percentile=percentile, **changes).tiles
    assert set(places(found)) <= set(places(gated))
    if (gated.freq_energy > 0).any():
        assert len(found.x) >= max(1, np.floor((gated.freq_energy > 0).sum() * (1 - percentile / 100)))
        assert (found.freq_energy >= np.percentile(gated.freq_energy, percentile) - 1e-5).all()
    # No percentile keeps a tile in which nothing stands out.
    assert (found.freq_energy > 0).all()
    # --min-freq-energy has no say then.
    assert places(case.select(freq_percentile=percentile, min_freq_energy=99.0, **changes).tiles) == places(found)


@given(cases())
def test_stricter_thresholds_keep_a_subset(case):
    config = case.config
    fixed = {"max_tiles_per_image": None, "freq_percentile": None}
    loose = set(places(case.select(**fixed).tiles))
    for change in (
        {"min_breast_ratio": min(1.0, config.min_breast_ratio + 0.2)},
        {"min_freq_energy": config.min_freq_energy + 5},
        {"min_intensity": 0.6},
        {"min_nonzero": min(1.0, config.min_nonzero + 0.2)},
    ):
        assert set(places(case.select(**fixed, **change).tiles)) <= loose


@given(cases(clusters=True))
def test_rescue_tiles_hold_what_no_other_tile_holds(case):
    found = case.select(max_tiles_per_image=None)
    plain = select_tiles(case.shape, case.maps, replace(case.config, max_tiles_per_image=None), None, case.min_step)
    kept = places(plain.tiles)
    # Rescue tiles change nothing on the grid.
    assert places(found.tiles)[: len(kept)] == kept
    rescued = places(found.tiles)[len(kept) :]
    if case.config.select == "breast":
        assert not rescued
        assert found.counts["clusters"] == 0
        return
    assert found.counts["clusters"] == len(case.clusters)
    for box in case.clusters:
        if any(case.held_by(box, *place) for place in kept):
            continue  # a tile holds it already
        size, (height, width) = case.config.tile_size, case.shape
        step = case.min_step  # tiles as small as these are tried at every place
        ys, xs = (
            sorted(
                {*range(max(int(np.ceil(high)) - size, 0), last, step), last} if (last := min(int(low), n - size)) >= 0 else []
            )
            for low, high, n in ((box[1], box[3], height), (box[0], box[2], width))
        )
        fitting = [
            (x, y)
            for y in ys
            for x in xs
            if case.held_by(box, x, y)
            and case.gates(x, y)
            and all(abs(x - u) >= case.min_step or abs(y - v) >= case.min_step for u, v in kept)
            and (case.config.select != "both" or case.scores(x, y)[0] >= case.config.min_breast_ratio)
        ]
        if not fitting:
            continue
        centre = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        off = [np.hypot(x + size / 2 - centre[0], y + size / 2 - centre[1]) for x, y in fitting]
        chosen = rescued.pop(0)
        assert chosen in fitting
        assert np.hypot(chosen[0] + size / 2 - centre[0], chosen[1] + size / 2 - centre[1]) == pytest.approx(min(off))
        kept.append(chosen)
    assert not rescued  # none is made without need
    assert found.unheld == sum(not any(case.held_by(box, *place) for place in kept) for box in case.clusters)


@given(cases(clusters=True), UNIT)
def test_maximum_of_muscle_drops_exactly_the_tiles_above_it(case, maximum):
    case.maps = replace(case.maps, pectoral=np.tril(np.ones(case.maps.mask.shape, bool))[:, ::-1])
    case.config = replace(case.config, max_tiles_per_image=None)
    everything, found = case.select(), case.select(max_pectoral_ratio=maximum)
    for i, (x, y) in enumerate(places(everything.tiles)):
        edge = case.config.tile_size / case.maps.mask_scale
        expected = brute_mean(case.maps.pectoral, y / case.maps.mask_scale, x / case.maps.mask_scale, edge, edge)
        assert everything.tiles.pectoral_ratio[i] == pytest.approx(expected, abs=1e-5)
    on_grid = everything.rule != "rescue"
    little = everything.tiles.pectoral_ratio <= maximum
    grid = found.rule != "rescue"
    assert places(found.tiles.take(grid)) == places(everything.tiles.take(on_grid & little))
    assert found.rule[grid].tolist() == everything.rule[on_grid & little].tolist()
    assert found.counts["rejected_pectoral"] == (on_grid & ~little).sum()
    # A cluster that a dropped tile held may get a rescue tile, with no more muscle than that.
    assert (found.tiles.pectoral_ratio <= maximum).all()
    assert everything.counts["rejected_pectoral"] == 0


@given(cases(clusters=True), st.integers(1, 4))
def test_clusters_whose_tile_the_limit_takes_are_unheld(case, limit):
    found = case.select(max_tiles_per_image=limit)
    if case.config.select != "breast":
        held = [any(case.held_by(box, *place) for place in places(found.tiles)) for box in case.clusters]
        assert found.unheld == found.counts["clusters_unheld"] == held.count(False)


@given(cases(clusters=True))
def test_no_two_tiles_share_a_native_corner(case):
    tiles = places(case.select().tiles)
    step = min(case.min_step, case.config.stride)
    assert all(max(abs(x - u), abs(y - v)) >= step for number, (x, y) in enumerate(tiles) for u, v in tiles[:number])


def test_a_cluster_at_the_skin_gets_a_tile_shifted_inwards():
    """Breast left of column 60, background right of it; a cluster at columns 50-58, where the grid's tiles are rejected."""
    image = np.zeros((200, 120), np.float32)
    image[:, :60] = 0.5
    maps = ScoreMaps(image, image > 0, np.zeros_like(image), image > 0, 1, 1)
    config = SelectionConfig(tile_size=40, stride=40)
    cluster = np.array([[50.0, 90, 58, 98]])
    for specks, expected in ((None, []), (cluster, [(32, 74)])):
        found = select_tiles(image.shape, maps, config, specks)
        assert [place for place, rule in zip(places(found.tiles), found.rule, strict=True) if rule == "rescue"] == expected
        assert found.unheld == 0
    # Deeper in the background no tile passes the gates: it is said.
    found = select_tiles(image.shape, maps, config, cluster + [25, 0, 25, 0])
    assert (found.unheld, found.counts["kept_rescue"]) == (1, 0)


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
        ({"max_pectoral_ratio": 1.1}, "--max-pectoral-ratio"),
        ({"min_intensity": 256}, "--min-intensity"),
        ({"freq_percentile": 101}, "--freq-percentile"),
        ({"max_tiles_per_image": 0}, "--max-tiles-per-image"),
        ({"cluster_specks": -1}, "--cluster-specks"),
        ({"cluster_mm": 0.0}, "--cluster-mm"),
        ({"min_speck": -1.0}, "--min-speck"),
    ],
)
def test_impossible_options_are_named(options, name):
    with pytest.raises(BadInput, match=name):
        SelectionConfig(**options)
