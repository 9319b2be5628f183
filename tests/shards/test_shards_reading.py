"""What a model learnt from and what it is used on must be the same kind of tiles."""

from __future__ import annotations

import pytest

from mammostream.common.errors import BadInput
from mammostream.shards.reading import check_same_pixels

LEARNT = {"tile_size": 512, "pixel_spacing_mm": None, "mapping": "m", "native_spacing_mm": [0.05, 0.05]}


@pytest.mark.parametrize(
    "given",
    [{"tile_size": 256}, {"pixel_spacing_mm": 0.1}, {"mapping": "n"}, {"native_spacing_mm": [0.05, 0.07]}],
)
def test_other_pixels_are_refused(given):
    with pytest.raises(BadInput, match="the model learnt from"):
        check_same_pixels(LEARNT, LEARNT | given, "these shards")


@pytest.mark.parametrize(
    "given", [{}, {"native_spacing_mm": [0.045, 0.055]}, {"native_spacing_mm": None}, {"min_intensity": 3}]
)
def test_the_same_pixels_pass(given):
    check_same_pixels(LEARNT, LEARNT | given, "these shards")


def test_resampled_tiles_may_come_from_any_film():
    learnt = LEARNT | {"pixel_spacing_mm": 0.1}
    check_same_pixels(learnt, learnt | {"native_spacing_mm": [0.2, 0.2]}, "these shards")


def test_what_a_model_does_not_say_is_not_compared():
    """Checkpoints of other programs know their mean and std, and the size that they resize any tile to."""
    check_same_pixels({"mean": 0.5, "std": 0.5, "tile_size": 256}, LEARNT, "these shards")
