"""The format of the images that a loader returns: size, normalisation and type."""

from __future__ import annotations

from dataclasses import dataclass

from mammostream.common.errors import BadInput
from mammostream.common.normalisation import MEAN, STD

FULL_SCALE = 65535  # every tile is decoded to uint16; an 8-bit tile is multiplied by 257, so that 255 becomes 65535
DTYPES = ("float32", "float16")


@dataclass(frozen=True)
class ImageFormat:
    """The format of a model's input images.

    Parameters
    ----------
    size
        Edge in pixels.
    mean, std
        Normalisation in units of full scale: black is 0, white is 1.
    dtype
        One of :data:`DTYPES`. DALI does not support bfloat16: cast to it in torch.

    Raises
    ------
    BadInput
        A field is outside its range.
    """

    size: int
    mean: float
    std: float
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise BadInput(f"an image size of {self.size} pixels is out of range; give at least 1")
        if self.dtype not in DTYPES:
            raise BadInput(f"dtype '{self.dtype}' is neither {' nor '.join(DTYPES)}")
        scale_and_shift(self.mean, self.std)


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
