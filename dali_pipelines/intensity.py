"""The one normalisation of tiles: full scale to [0, 1], then mean and standard deviation."""

from __future__ import annotations

from common.errors import BadInput
from common.normalisation import MEAN, STD

FULL_SCALE = 65535  # every tile is decoded to uint16; an 8-bit tile is multiplied by 257, so that 255 becomes 65535


def scale_and_shift(mean: float, std: float) -> tuple[float, float]:
    """Return (scale, shift) such that ``pixel * scale + shift`` normalises a uint16 pixel.

    Parameters
    ----------
    mean, std
        In units of full scale: black is 0, white is 1.

    Raises
    ------
    BadInput
        `std` is not positive.
    """
    if not std > 0:
        raise BadInput(f"std {std} is not positive; give mean and std in units of full scale, such as {MEAN} and {STD}")
    return 1 / (FULL_SCALE * std), -mean / std
