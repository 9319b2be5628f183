"""From a decoded film to its tiles: where they lie, padding, spacing, boxes in native pixels, cutting, rescue tiles."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from film_outlines import BORDERS, BREASTS, LETTERS, PECTORAL_OUTLINES
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.draw import polygon2mask

from mammostream.common.errors import BadInput
from mammostream.preprocess.intensity import MAPPINGS, map_to_unit, mapping_option, to_stored
from mammostream.preprocess.reading import Header, Mammogram
from mammostream.preprocess.resampling import block_mean
from mammostream.preprocess.selection import box_means, integral
from mammostream.preprocess.simulation import ClusterConfig, plant_clusters
from mammostream.preprocess.tiling import TilingConfig, check_spacings, preprocessing_record, tile_film

SMALL = TilingConfig(tile_size=64, stride=32)


def mammogram_of(film, spacing=0.2, cut=slice(None)):
    pixels = film.pixels[cut]
    return Mammogram(pixels, Header(*pixels.shape, bits=16, spacing_mm=spacing))


@pytest.fixture(scope="module")
def tiled(films):
    mammogram = mammogram_of(films[1])
    return mammogram, tile_film(mammogram, SMALL)


def test_tiles_are_pieces_of_the_mapped_film(tiled):
    mammogram, film = tiled
    assert film.scale == 1
    assert film.flags == ()
    assert film.mapping.startswith("percentile ")
    assert 100 < len(film.tiles.x) < 1000
    expected = np.rint(film.image * 65535).astype(np.uint16)
    for i in range(0, len(film.tiles.x), 17):
        x, y = film.tiles.x[i], film.tiles.y[i]
        np.testing.assert_array_equal(film.cut(i, 64, 16), expected[y : y + 64, x : x + 64])
        eight = film.cut(i, 64, 8)
        assert eight.dtype == np.uint8
        assert np.abs(eight / 255.0 - film.cut(i, 64, 16) / 65535.0).max() < 0.5 / 255 + 1e-4
    # One mapping a film, and it keeps the order of grey values.
    order = np.argsort(mammogram.pixels.ravel()[::101])
    assert (np.diff(film.image.ravel()[::101][order]) >= 0).all()
    assert film.image.min() == 0
    assert film.image.max() <= 1


@pytest.mark.parametrize("size", [64, 128])
def test_no_kept_tile_lies_on_a_label_a_border_or_the_background(films, size):
    """Against what a person draws on the films; 128 pixels of 0.2 mm are as large as 512 native ones."""
    for film in films:
        tiled = tile_film(mammogram_of(film), TilingConfig(tile_size=size, stride=size // 2))
        breast = polygon2mask([-(-n // 2) for n in film.pixels.shape], BREASTS[film.name])
        top, left, edge = tiled.tiles.y / 2, tiled.tiles.x / 2, size / 2
        assert len(top) > 20, film.name
        for above, below, before, after in LETTERS[film.name]:
            apart = (top >= below) | (top + edge <= above) | (left >= after) | (left + edge <= before)
            assert apart.all(), film.name
        # Drawn by hand and without looking at intensities: the share of breast is well above the rule's 0.15.
        assert box_means(integral(breast), top, left, edge, edge).min() > 0.4, film.name
        # Tiles at the top hold the breast next to at most a thin border (the grid starts at the film's edge).
        above, below = BORDERS.get(film.name, (0, 0))
        assert (above - top).max(initial=0) / edge <= 0.2, film.name
        assert (top + edge).max() <= len(breast) - below, film.name


def test_a_border_leaves_the_mapping(films):
    """Percentiles are taken inside the breast: white borders and labels have no say."""
    for film in films[::2]:
        bordered = film.pixels.copy()
        bordered[:12] = bordered[-12:] = 64000
        highs = [
            float(tile_film(Mammogram(pixels, Header(*pixels.shape, bits=16, spacing_mm=0.2)), SMALL).mapping.split("..")[1])
            for pixels in (film.pixels, bordered)
        ]
        assert highs[1] == pytest.approx(highs[0], rel=0.02), film.name


def test_native_boxes_are_the_tiles_own_pixels(tiled):
    mammogram, film = tiled
    height, width = mammogram.pixels.shape
    for i in range(len(film.tiles.x)):
        x, y, size = film.native_box(i, 64)
        assert (x, y, size) == (film.tiles.x[i], film.tiles.y[i], 64)
        assert 0 <= x <= width - size
        assert 0 <= y <= height - size


@pytest.mark.parametrize("spacing", [0.1, 0.27, 0.4])
def test_native_boxes_of_a_resampled_film(films, spacing):
    mammogram = mammogram_of(films[1])
    film = tile_film(mammogram, TilingConfig(tile_size=64, stride=64, pixel_spacing=spacing, min_freq_energy=99))
    scale = spacing / 0.2
    assert film.scale == pytest.approx(scale)
    assert len(film.tiles.x) >= 8
    shown, native = [], []
    height, width = mammogram.pixels.shape
    slack = np.ceil(scale)  # the last pixel of a resampled film may stand for a part of one
    for i in range(len(film.tiles.x)):
        x, y, size = film.native_box(i, 64)
        assert size == round(64 * scale)
        assert 0 <= x <= width - size + slack
        assert 0 <= y <= height - size + slack
        shown.append(_cells(film.cut(i, 64, 16), 4))
        native.append(_cells(mammogram.pixels[y : y + size, x : x + size], 4))
    # The tiles show what their native boxes show (the mapping is linear within its range).
    assert np.corrcoef(np.ravel(shown), np.ravel(native))[0, 1] > 0.999


def _cells(image, cells):
    rows = np.array_split(image, cells, axis=0)
    return np.array([[part.mean() for part in np.array_split(row, cells, axis=1)] for row in rows])


def test_small_film_is_padded_and_flagged(films):
    # 60 x 200 pixels from the inside of the breast.
    film = tile_film(mammogram_of(films[1], cut=np.s_[500:560, 20:220]), TilingConfig(tile_size=64, stride=64, min_nonzero=0.5))
    assert "padded" in film.flags
    assert film.image.shape == (64, 200)
    assert (film.image[60:] == 0).all()
    assert film.selection.counts["candidates"] == 4
    for i in range(len(film.tiles.x)):
        assert film.cut(i, 64, 16).shape == (64, 64)


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (3, 500), (500, 3), (300, 200)])
@pytest.mark.parametrize("value", [0, 30000, 65535])
@pytest.mark.parametrize("percentile", [None, 50.0])
def test_no_film_gives_no_tiles_and_a_flag(shape, value, percentile):
    pixels = np.full(shape, value, np.uint16)
    config = TilingConfig(tile_size=64, stride=32, freq_percentile=percentile, min_intensity=0, min_nonzero=0)
    film = tile_film(Mammogram(pixels, Header(*shape, bits=16, spacing_mm=0.1)), config)
    assert "no_breast" in film.flags
    assert ("padded" in film.flags) == (min(shape) < 64)
    assert film.selection.counts["kept"] == 0


PICTURES = ("black", "white", "constant", "noise", "gradient", "half", "ellipse", "speck", "specks")


def picture(kind, shape, dtype, rng):
    top, (rows, columns) = np.iinfo(dtype).max, np.indices(shape)
    image = {
        "black": lambda: np.zeros(shape),
        "white": lambda: np.ones(shape),
        "constant": lambda: np.full(shape, rng.random()),
        "noise": lambda: rng.random(shape),
        "gradient": lambda: np.linspace(0, 1, rows.size).reshape(shape),
        "half": lambda: (columns < shape[1] / 2) * 0.6,
        "ellipse": lambda: np.clip(1 - (rows / shape[0] * 2.4 - 1.2) ** 2 - (columns / shape[1] * 1.5) ** 2, 0, 1) * 0.8,
        "speck": lambda: (rows == rng.integers(shape[0])) * (columns == rng.integers(shape[1])) * 1.0,
        "specks": lambda: (columns < 0.7 * shape[1]) * (0.4 + 0.3 * (rng.random(shape) < 0.02)),
    }[kind]()
    return np.rint(image * top).astype(dtype)


@settings(max_examples=120)
@given(
    kind=st.sampled_from(PICTURES),
    shape=st.tuples(st.integers(1, 150), st.integers(1, 150)) | st.sampled_from([(1, 1), (2, 3), (1, 2000), (1500, 2)]),
    dtype=st.sampled_from([np.uint8, np.uint16]),
    spacings=st.sampled_from(
        [(None, None), (0.01, None), (0.2, None), (1.0, None), (0.2, 0.1), (0.2, 0.37), (0.1, 0.2), (1.0, 0.6)]
    ),
    config=st.fixed_dictionaries(
        {
            "tile_size": st.sampled_from([1, 7, 32, 64]),
            "stride": st.sampled_from([5, 16, 40]),
            "select": st.sampled_from(["either", "both", "breast", "frequency"]),
            "freq_percentile": st.sampled_from([None, 0.0, 80.0]),
            "max_tiles_per_image": st.sampled_from([None, 3]),
            "min_intensity": st.sampled_from([0.0, 40.0]),
            "min_nonzero": st.sampled_from([0.0, 0.7]),
            "cluster_specks": st.sampled_from([0, 1, 5]),
        }
    ),
    seed=st.integers(0, 99),
)
def test_any_image_gives_tiles_or_says_why_not(kind, shape, dtype, spacings, config, seed):
    pixels = picture(kind, shape, dtype, np.random.default_rng(seed))
    config = TilingConfig(**config, pixel_spacing=spacings[1])
    film = tile_film(Mammogram(pixels, Header(*shape, bits=8 * pixels.itemsize, spacing_mm=spacings[0])), config)
    counts, size = film.selection.counts, config.tile_size
    assert counts["candidates"] >= 1
    assert np.isfinite(film.image).all()
    assert ((film.image >= 0) & (film.image <= 1)).all()
    assert np.isfinite(film.response).all()
    whole = abs(film.scale - round(film.scale)) < 1e-3
    resampled = [math.ceil(n / round(film.scale)) if whole else max(1, round(n / film.scale)) for n in shape]
    assert ("padded" in film.flags) == (min(resampled) < size)
    assert film.image.shape == tuple(max(n, size if "padded" in film.flags else 0) for n in resampled)
    assert ("cluster_not_held" in film.flags) == (counts["clusters_unheld"] > 0)
    assert ("no_spacing" in film.flags) == (spacings[0] is None)
    for index in range(counts["kept"]):
        assert film.cut(index, size, 16).shape == (size, size)
    if kind in ("black", "white", "constant"):
        assert "no_breast" in film.flags
        assert counts["kept"] == 0
    if not counts["kept"]:  # no silent nothing: a flag, or gates and rules that say how many tiles each rejected
        rejected = sum(n for name, n in counts.items() if name.startswith("rejected_"))
        assert rejected == counts["candidates"]
    if "no_breast" in film.flags:
        assert (
            counts["clusters"] == counts["kept_breast_only"] == counts["kept_both_rules"] == counts["kept_frequency_only"] == 0
        )


def test_edge_tiles_are_flush_with_the_border(films):
    film = tile_film(mammogram_of(films[2]), TilingConfig(tile_size=100, stride=70, min_intensity=0, min_nonzero=0))
    grid = film.selection.candidates
    assert grid.y.max() + 100 == film.image.shape[0]
    assert grid.x.max() + 100 == film.image.shape[1]
    assert (grid.y.min(), grid.x.min()) == (0, 0)
    assert (film.tiles.x + 100 == film.image.shape[1]).any()  # a right breast: kept tiles at the chest wall


def test_rescue_tiles_hold_clusters_near_the_skin(films):
    """Clusters planted 3-8 mm from the skin line at contrast 8 into native pixels; films tiled at 0.1 mm."""
    import pydicom

    config = ClusterConfig(
        clusters_per_image=8, min_specks=8, contrast=8, skin_distance_mm=3, max_skin_distance_mm=8, max_cluster_mm=5
    )
    tiling, size = TilingConfig(tile_size=256, stride=128), 256
    held, without, flagged, rescues = [], [], 0, 0
    for number, film in enumerate(films):
        planted, boxes = plant_clusters(pydicom.dcmread(film.path).pixel_array, 0.05, config, (0, number))
        pixels = np.rint(block_mean(planted, 2)).astype(np.uint16)
        tiled = tile_film(Mammogram(pixels, Header(*pixels.shape, bits=16, spacing_mm=0.1)), tiling)
        tiles, rescue = tiled.tiles, tiled.selection.rule == "rescue"
        for xmin, ymin, xmax, ymax in np.array(boxes) / 2:
            holds = (tiles.x <= xmin) & (tiles.y <= ymin) & (tiles.x + size >= xmax) & (tiles.y + size >= ymax)
            held.append(holds.any())
            without.append(holds[~rescue].any())
        flagged += tiled.selection.unheld
        rescues += int(rescue.sum())
        assert rescue.sum() == tiled.selection.counts["kept_rescue"]
    assert len(held) >= 60
    assert np.mean(held) >= 0.95
    assert np.mean(without) < 0.8
    assert rescues >= sum(held) - sum(without) - 5  # one tile may hold two
    assert flagged >= held.count(False)  # what no tile can hold is said


@pytest.mark.parametrize(
    ("spacing", "target"), [(0.05, None), (0.1, None), (0.14, None), (0.1, 0.05), (0.05, 0.1), (0.1, 0.13)]
)
def test_specks_are_measured_in_millimetres_at_any_pixel_size(spacing, target):
    """A simulated breast with film grain and 6 specks of 0.4 mm on a circle of 5 mm."""
    rows, columns = np.mgrid[: round(80 / spacing), : round(50 / spacing)] * spacing
    breast = (rows - 40) ** 2 + columns**2 < 35**2
    film = 20000.0 * breast + np.random.default_rng(0).normal(0, 12 / spacing, breast.shape)
    angles = np.arange(6) * np.pi / 3
    specks = np.stack([30 + 2.5 * np.sin(angles), 15 + 2.5 * np.cos(angles)], axis=1)
    for y, x in specks:
        film += 6000 * np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / 2 / 0.15**2)
    pixels = np.clip(film, 0, 65535).astype(np.uint16)
    config = TilingConfig(tile_size=64, stride=64, pixel_spacing=target)
    tiled = tile_film(Mammogram(pixels, Header(*pixels.shape, bits=16, spacing_mm=spacing)), config)
    pixel = target or spacing
    # One cluster: the box of its specks and a margin of 1 mm.
    assert len(tiled.selection.clusters) == 1
    (xmin, ymin, xmax, ymax) = tiled.selection.clusters[0] * pixel
    (top, left), (bottom, right) = specks.min(axis=0), specks.max(axis=0)
    assert (xmin, ymin, xmax, ymax) == pytest.approx((left - 1, top - 1, right + 1, bottom + 1), abs=0.25)
    # Specks count from 1.2 mm inside the skin line and the chest wall on.
    rows, columns = ((np.arange(n) + 0.5) * pixel * tiled.response_scale for n in tiled.response.shape)
    counted = tiled.response != 0
    assert columns[counted.any(axis=0)].min() == pytest.approx(1.2, abs=0.4)
    distance = np.hypot(rows[:, None] - 40, columns[None, :])
    assert distance[counted].max() == pytest.approx(35 - 1.2, abs=0.8)


def test_no_rescue_tiles_where_they_are_not_asked_for(films):
    """At 0.2 mm only bright specks are seen; each rescue tile is of a cluster, and none is made for `--select breast`."""
    planted, _ = plant_clusters(
        films[2].pixels, 0.2, ClusterConfig(contrast=30, min_specks=10, skin_distance_mm=3, max_skin_distance_mm=8), 0
    )
    mammogram = Mammogram(planted, Header(*planted.shape, bits=16, spacing_mm=0.2))
    counts = {
        name: tile_film(mammogram, TilingConfig(tile_size=128, stride=64, **options)).selection.counts
        for name, options in {
            "either": {},
            "frequency": {"select": "frequency"},
            "breast": {"select": "breast"},
            "none": {"cluster_specks": 0},
            "bright": {"min_speck": 1e6},
        }.items()
    }
    assert 1 <= counts["either"]["kept_rescue"] <= counts["either"]["clusters"]
    assert counts["frequency"]["clusters"] == counts["either"]["clusters"]
    for name in ("breast", "none", "bright"):
        assert counts[name]["kept_rescue"] == counts[name]["clusters"] == 0
    assert counts["none"]["kept"] == counts["either"]["kept"] - counts["either"]["kept_rescue"]


def test_muscle_is_scored_and_dropped_only_where_asked(films):
    film = next(f for f in films if f.name == "P0_rmlo")
    mammogram = mammogram_of(film)
    from_above, oblique = (tile_film(mammogram.with_view(view), SMALL) for view in ("CC", "MLO"))
    assert not from_above.pectoral.any()
    assert from_above.pectoral_area_mm2 == 0
    assert (from_above.tiles.pectoral_ratio == 0).all()
    # Whether there is a muscle changes neither mask nor tiles.
    assert places(oblique) == places(from_above)
    np.testing.assert_array_equal(oblique.segmentation.mask, from_above.segmentation.mask)
    np.testing.assert_array_equal(oblique.tiles.breast_ratio, from_above.tiles.breast_ratio)
    assert oblique.pectoral_area_mm2 == pytest.approx(oblique.pectoral.sum() * 0.16)
    whole = polygon2mask(oblique.pectoral.shape, PECTORAL_OUTLINES[film.name])
    for x, y, ratio in zip(oblique.tiles.x, oblique.tiles.y, oblique.tiles.pectoral_ratio, strict=True):
        assert ratio == pytest.approx(whole[y // 2 : (y + 64) // 2, x // 2 : (x + 64) // 2].mean(), abs=0.25)
    for maximum in (0.0, 0.5):
        found = tile_film(mammogram.with_view("MLO"), replace(SMALL, max_pectoral_ratio=maximum))
        kept = (oblique.tiles.pectoral_ratio <= maximum) & (oblique.selection.rule != "rescue")
        assert places(found, found.selection.rule != "rescue") == places(oblique, kept)
        assert found.selection.counts["rejected_pectoral"] > 10
        assert (found.tiles.pectoral_ratio <= maximum).all()


def places(film, chosen=slice(None)):
    return list(zip(film.tiles.x[chosen].tolist(), film.tiles.y[chosen].tolist(), strict=True))


def test_an_oblique_view_without_muscle_is_flagged(films):
    film = films[1]
    assert film.view.endswith("cc")
    for view, flags in (("", ()), ("CC", ()), ("ML", ()), ("MLO", ("no_pectoral",))):
        assert tile_film(mammogram_of(film).with_view(view), SMALL).flags == flags
    spot = mammogram_of(film).with_view("MLO")
    spot = replace(spot, header=replace(spot.header, view_modifiers="magnification spot"))
    assert tile_film(spot, SMALL).flags == ()
    black = np.zeros((300, 200), np.uint16)
    found = tile_film(Mammogram(black, Header(300, 200, bits=16, spacing_mm=0.2, view="MLO")), SMALL)
    assert found.flags == ("no_breast",)


def test_muscle_of_a_film_smaller_than_a_tile_and_resampled(films):
    film = next(f for f in films if f.name == "P0_lmlo")
    mammogram = mammogram_of(film).with_view("MLO")
    plain = tile_film(mammogram, TilingConfig(tile_size=128, stride=128))
    coarse = tile_film(mammogram, TilingConfig(tile_size=64, stride=64, pixel_spacing=0.4))
    place = np.flatnonzero((coarse.tiles.x == 0) & (coarse.tiles.y == 64))
    same = np.flatnonzero((plain.tiles.x == 0) & (plain.tiles.y == 128))
    assert coarse.tiles.pectoral_ratio[place] == pytest.approx(plain.tiles.pectoral_ratio[same], abs=0.02)
    height, width = film.pixels.shape
    padded = tile_film(mammogram, TilingConfig(tile_size=1500, stride=64, min_intensity=0, min_nonzero=0))
    assert padded.pectoral.sum() == plain.pectoral.sum()
    assert padded.tiles.pectoral_ratio[0] == pytest.approx(padded.pectoral.sum() * 4 / 1500**2, rel=1e-3)


def test_a_view_of_its_own_is_what_an_empty_one_leaves(films):
    mammogram = mammogram_of(films[0])
    assert mammogram.with_view("MLO").with_view("").header.view == "MLO"
    assert mammogram.with_view("MLO").with_view("CC").header.view == "CC"


def test_common_spacing_needs_the_films_own(films):
    with pytest.raises(BadInput, match="--pixel-spacing needs each film's own spacing.*--assume-spacing"):
        tile_film(mammogram_of(films[0], spacing=None), TilingConfig(tile_size=64, stride=64, pixel_spacing=0.1))


def test_display_of_the_file_wins(films):
    mammogram = mammogram_of(films[1])
    voi = np.clip(np.arange(65536, dtype=np.float32) / 40000, 0, 1)
    film = tile_film(Mammogram(mammogram.pixels, mammogram.header, voi), SMALL)
    assert film.mapping == "voi"
    np.testing.assert_array_equal(film.image, voi[mammogram.pixels])


def test_depth_does_not_matter(films):
    mammogram = mammogram_of(films[3])
    eight = Mammogram((mammogram.pixels >> 8).astype(np.uint8), Header(*mammogram.pixels.shape, bits=8, spacing_mm=0.2))
    a, b = tile_film(mammogram, SMALL), tile_film(eight, SMALL)
    places = [set(zip(f.tiles.x.tolist(), f.tiles.y.tolist(), strict=True)) for f in (a, b)]
    assert len(places[0] & places[1]) > 0.95 * len(places[0] | places[1])
    assert a.guide_8bit_kept == pytest.approx(b.guide_8bit_kept, rel=0.05)
    assert 0 < a.guide_8bit_kept <= len(a.tiles.x)


@pytest.mark.parametrize(
    ("spacings", "message"),
    [
        ([0.05, 0.0626], "differ by more than 1.25x"),
        ([0.1, 0.1, 0.05], r"from 0\.05 to 0\.1 mm"),
    ],
)
def test_different_spacings_are_refused(spacings, message):
    with pytest.raises(BadInput, match=message):
        check_spacings(np.array(spacings), SMALL)
    check_spacings(np.array(spacings), TilingConfig(pixel_spacing=0.1))


@pytest.mark.parametrize("spacings", [[0.05, 0.0625], [0.07], [np.nan, np.nan], [np.nan, 0.07, 0.08], []])
def test_like_spacings_pass(spacings):
    check_spacings(np.array(spacings, dtype=float), SMALL)


def test_unknown_spacing_and_a_common_one_are_refused():
    with pytest.raises(BadInput, match="1 of 2 films have no pixel spacing"):
        check_spacings(np.array([0.1, np.nan]), TilingConfig(pixel_spacing=0.1))
    with pytest.raises(BadInput, match="--pixel-spacing 3"):
        TilingConfig(pixel_spacing=3.0)


def test_record_says_how_tiles_were_made():
    record = preprocessing_record(TilingConfig(tile_size=128, stride=64), np.array([0.05, np.nan, 0.06]), 16)
    assert record["tile_size"] == 128
    assert record["native_spacing_mm"] == [0.05, 0.06]
    assert preprocessing_record(SMALL, np.array([np.nan]), 8)["native_spacing_mm"] is None


def test_a_mapping_is_recorded_by_its_version_and_found_again():
    records = {name: preprocessing_record(TilingConfig(mapping=name), np.array([0.05]), 16)["mapping"] for name in MAPPINGS}
    assert records["voi"] == "voi-or-percentile-v1"  # as shards of 0.1.0 have it
    assert len(set(records.values())) == 3
    assert {name: mapping_option(version) for name, version in records.items()} == {name: name for name in MAPPINGS}
    assert mapping_option(None) == "voi"  # of tiles that came as image files


def test_mapping_keeps_room_above_the_brightest():
    values = np.linspace(1000, 2000, 100_000)
    pixels = np.array([[0, 1000, 1500, 2000, 2200, 65535]], np.uint16)
    image, mapping = map_to_unit(pixels, None, values)
    assert mapping == "percentile 1001.0..2248.5"
    assert image.dtype == np.float32
    assert (np.diff(image[0]) >= 0).all()
    assert image[0, 4] < 1 == image[0, 5]
    assert to_stored(np.array([0, 0.5, 1]), 8).tolist() == [0, 128, 255]
    assert to_stored(np.array([0, 1]), 16).tolist() == [0, 65535]


def test_padding_adds_no_energy_at_the_chest_wall():
    # A smooth right breast: its chest wall is the image's right edge, where padding would put a bright step.
    rows, columns = np.mgrid[-700:700, -900:0]
    pixels = (np.clip(1 - (rows / 600) ** 2 - (columns / 700) ** 2, 0, 1) * 30000).astype(np.uint16)
    film = Mammogram(pixels, Header(*pixels.shape, bits=16, spacing_mm=0.1))
    padded = tile_film(film, TilingConfig(tile_size=1024, stride=64, min_intensity=0, min_nonzero=0))
    assert "padded" in padded.flags
    assert len(padded.tiles.x)
    assert padded.tiles.freq_energy.max() < 0.1


@pytest.mark.parametrize("target", [0.08, 0.13, 0.19])
def test_no_two_tiles_share_a_native_corner_when_upsampled(films, target):
    film = tile_film(
        mammogram_of(films[1]), TilingConfig(tile_size=64, stride=31, pixel_spacing=target, min_intensity=0, min_nonzero=0)
    )
    corners = [film.native_box(i, 64)[:2] for i in range(len(film.tiles.x))]
    assert len(set(corners)) == len(corners)
