"""Simulated clusters: seeded, within their boxes, brighter, and as their config says."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from mammostream.common.errors import BadInput
from mammostream.preprocess.simulation import ClusterConfig, plant_clusters

SPACING = 0.2
# Specks far apart and of one size, so that they can be counted at 0.2 mm a pixel.
COUNTED = ClusterConfig(
    clusters_per_image=3, min_specks=5, max_specks=7, min_speck_mm=0.6, max_speck_mm=1.0, min_cluster_mm=14, max_cluster_mm=20
)


def planted_parts(film, config, seed):
    planted, boxes = plant_clusters(film.pixels, SPACING, config, seed)
    return planted, boxes, planted.astype(int) - film.pixels


def test_same_seed_same_copy_and_the_film_stays(films):
    before = films[2].pixels.copy()
    first, second = (plant_clusters(films[2].pixels, SPACING, ClusterConfig(), (4, 2)) for _ in range(2))
    other = plant_clusters(films[2].pixels, SPACING, ClusterConfig(), (4, 3))
    np.testing.assert_array_equal(films[2].pixels, before)
    np.testing.assert_array_equal(first[0], second[0])
    assert first[1] == second[1] != other[1]
    assert (first[0] != other[0]).any()


@pytest.mark.parametrize("seed", range(8))
def test_changes_lie_in_the_boxes_and_are_brighter(films, seed):
    film = films[seed]
    planted, boxes, change = planted_parts(film, ClusterConfig(), seed)
    assert planted.dtype == film.pixels.dtype
    assert planted.shape == film.pixels.shape
    assert len(boxes) == 4
    assert (change >= 0).all()
    outside = change.copy()
    height, width = film.pixels.shape
    for xmin, ymin, xmax, ymax in boxes:
        assert 0 <= xmin < xmax <= width
        assert 0 <= ymin < ymax <= height
        assert change[ymin:ymax, xmin:xmax].any()
        outside[max(0, ymin - 1) : ymax + 1, max(0, xmin - 1) : xmax + 1] = 0  # a disc's edge is one pixel soft
    assert not outside.any()


def test_boxes_are_tight(films):
    _, boxes, change = planted_parts(films[0], ClusterConfig(), 0)
    for xmin, ymin, xmax, ymax in boxes:
        rows, columns = np.nonzero(change[ymin:ymax, xmin:xmax])
        assert rows.min() <= 2
        assert columns.min() <= 2
        assert rows.max() >= ymax - ymin - 3
        assert columns.max() >= xmax - xmin - 3


def test_specks_and_sizes_are_within_the_config(films):
    counted = []
    for seed, film in enumerate(films):
        _, boxes, change = planted_parts(film, COUNTED, seed)
        for xmin, ymin, xmax, ymax in boxes:
            limit = (COUNTED.max_cluster_mm + COUNTED.max_speck_mm) / SPACING + 2
            assert max(xmax - xmin, ymax - ymin) <= limit
            labels, count = ndimage.label(change[ymin:ymax, xmin:xmax] > 0, np.ones((3, 3)))
            counted.append(count)
            for part in ndimage.find_objects(labels):
                if count >= COUNTED.min_specks:  # none merged, so each part is a speck
                    extent = [s.stop - s.start for s in part]
                    assert min(extent) >= 1
                    assert max(extent) <= 2 * (COUNTED.max_speck_mm / SPACING + 2)
    assert max(counted) <= COUNTED.max_specks
    assert {5, 6, 7} & set(counted)
    assert np.median(counted) >= COUNTED.min_specks - 1  # a pair may touch


def test_contrast_is_in_deviations_of_the_local_noise(films):
    _, _, faint = planted_parts(films[5], ClusterConfig(contrast=5.0), 1)
    _, _, strong = planted_parts(films[5], ClusterConfig(contrast=20.0), 1)
    assert strong.max() == pytest.approx(4 * faint.max(), rel=0.01)
    assert 10 < faint.max() < 5000


def test_clusters_lie_in_the_breast_away_from_the_skin_and_from_each_other(films):
    from mammostream.preprocess.segmentation import segment_breast

    config = ClusterConfig(skin_distance_mm=15.0, clusters_per_image=6)
    for film in films[::3]:
        segmentation = segment_breast(film.pixels, SPACING)
        depth = ndimage.distance_transform_edt(np.pad(segmentation.mask, 1))[1:-1, 1:-1] * segmentation.spacing_mm
        _, boxes = plant_clusters(film.pixels, SPACING, config, 0)
        assert boxes
        centres = np.array([((a + c) / 2, (b + d) / 2) for a, b, c, d in boxes])
        for x, y in centres:
            # A box is around its specks, which need not lie evenly about the centre.
            assert depth[int(y) // 2, int(x) // 2] > config.skin_distance_mm - config.max_cluster_mm / 2
        apart = np.linalg.norm(centres[:, None] - centres[None], axis=-1) * SPACING
        assert apart[~np.eye(len(boxes), dtype=bool)].min(initial=99) > config.max_cluster_mm


def test_clusters_lie_near_the_skin_where_asked_for(films):
    from mammostream.preprocess.segmentation import segment_breast

    config = ClusterConfig(skin_distance_mm=3.0, max_skin_distance_mm=8.0, max_cluster_mm=5.0, clusters_per_image=6)
    for film in films[::3]:
        segmentation = segment_breast(film.pixels, SPACING)
        # The chest wall is no skin: the breast continues beyond the film's edge.
        depth = ndimage.distance_transform_edt(np.pad(segmentation.mask, 1, mode="edge"))[1:-1, 1:-1] * segmentation.spacing_mm
        _, boxes = plant_clusters(film.pixels, SPACING, config, 0)
        assert len(boxes) == 6
        slack = config.max_cluster_mm / 2  # a box is around its specks, which need not lie evenly about the centre
        for xmin, ymin, xmax, ymax in boxes:
            distance = depth[int(ymin + ymax) // 4, int(xmin + xmax) // 4]
            assert 3.0 - slack <= distance <= 8.0 + slack, film.name


def test_no_breast_no_clusters():
    pixels = np.zeros((300, 200), np.uint16)
    planted, boxes = plant_clusters(pixels, SPACING, ClusterConfig(), 0)
    assert boxes == []
    assert not planted.any()


def test_eight_bits_do_not_wrap(films):
    pixels = (films[4].pixels >> 8).astype(np.uint8)
    planted, boxes = plant_clusters(pixels, SPACING, ClusterConfig(contrast=500.0), 0)
    assert planted.dtype == np.uint8
    assert (planted >= pixels).all()
    assert planted.max() == 255
    assert boxes


@pytest.mark.parametrize(
    "options", [{"min_specks": 9, "max_specks": 8}, {"min_speck_mm": 0.0}, {"contrast": 0.0}, {"clusters_per_image": -1}]
)
def test_impossible_options_are_refused(options):
    with pytest.raises(BadInput, match="--"):
        ClusterConfig(**options)
