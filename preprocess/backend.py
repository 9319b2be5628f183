"""The one place that knows whether arrays live in host memory (NumPy) or on a GPU (CuPy)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any


@dataclass(frozen=True)
class Backend:
    """The libraries that serve one kind of array; both kinds offer the same functions under these names."""

    name: str
    xp: Any  # numpy | cupy
    ndimage: Any  # scipy.ndimage | cupyx.scipy.ndimage
    filters: Any  # skimage.filters | cucim.skimage.filters
    transform: Any  # skimage.transform | cucim.skimage.transform

    def to_host(self, array: Any) -> Any:
        """Return `array` as a NumPy array."""
        return array if self.name == "numpy" else array.get()


@cache
def _numpy_backend() -> Backend:
    import numpy
    import scipy.ndimage
    import skimage.filters
    import skimage.transform

    return Backend("numpy", numpy, scipy.ndimage, skimage.filters, skimage.transform)


@cache
def _cupy_backend() -> Backend:
    import cucim.skimage.filters
    import cucim.skimage.transform
    import cupy
    import cupyx.scipy.ndimage

    return Backend("cupy", cupy, cupyx.scipy.ndimage, cucim.skimage.filters, cucim.skimage.transform)


def backend_of(array: Any) -> Backend:
    """Return the backend that `array` belongs to, by its type alone."""
    return _cupy_backend() if type(array).__module__.partition(".")[0] == "cupy" else _numpy_backend()
