"""The one place that knows whether arrays live in host memory (NumPy) or on a GPU (CuPy)."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from types import ModuleType
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
