"""The one place that knows whether arrays live in host memory (NumPy) or on a GPU (CuPy)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

STRIP_BYTES = 2**18  # of input: about what the cache of a core holds


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


def _import_cucim() -> ModuleType:
    """Import cuCIM without its reader of slides, ``cucim.clara``, which nothing here uses.

    Loading its library opens the cuFile driver. Where torch has brought a libcufile and there is no driver, that never
    returns; on machines with GPUDirect Storage it has aborted the process (https://github.com/rapidsai/cucim/issues/346).
    cuCIM does without the reader where importing it fails.
    """
    if "cucim" not in sys.modules:
        sys.modules.setdefault("cucim.clara", None)  # type: ignore[arg-type]  # None: Python's own sign for "do not import"
    import cucim

    return cucim


@cache
def _cupy_backend() -> Backend:
    _import_cucim()
    import cucim.skimage.filters
    import cucim.skimage.transform
    import cupy
    import cupyx.scipy.ndimage

    return Backend("cupy", cupy, cupyx.scipy.ndimage, cucim.skimage.filters, cucim.skimage.transform)


def gpu_library_versions() -> dict[str, str]:
    """Return the versions of the libraries that work on arrays on a GPU: ``cupy`` and ``cucim``."""
    return {"cupy": _cupy_backend().xp.__version__, "cucim": _import_cucim().__version__}


def backend_of(array: Any) -> Backend:
    """Return the backend that `array` belongs to, by its type alone."""
    return _cupy_backend() if type(array).__module__.partition(".")[0] == "cupy" else _numpy_backend()


def by_strips(function: Callable[[Any], Any], values: Any, height: int = 1, reach: int = 0) -> Any:
    """Apply a function to strips of rows and put the results below each other.

    On the CPU a strip stays in the cache while the function's operations go over it; on a GPU the whole is one strip.

    Parameters
    ----------
    function
        From (n, W) to (ceil(n / height), w).
    values
        (H, W) array.
    height
        How many rows of `values` make a row of the result.
    reach
        How many rows above and below a row the function looks at; then `height` is 1.

    Returns
    -------
    Any
        (ceil(H / height), w), the same as of ``function(values)``.
    """
    rows = height * max(1, STRIP_BYTES // max(1, height * values.shape[1] * values.itemsize))
    if backend_of(values).name == "cupy" or rows >= len(values):
        return function(values)
    result = None
    for start in range(0, len(values), rows):
        above = min(start, reach)
        part = function(values[start - above : start + rows + reach])[above : above + rows // height]
        if result is None:
            result = _numpy_backend().xp.empty((-(-len(values) // height), *part.shape[1:]), part.dtype)
        result[start // height : start // height + len(part)] = part
    return result
