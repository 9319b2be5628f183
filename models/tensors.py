"""Reading tensors from files and loading them into modules: no code is executed, and a mismatch is a one-line error."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from mammostream.common.errors import BadInput, first_line

M = TypeVar("M", bound=nn.Module)


def read_torch(path: Path, what: str, mend: str) -> dict[str, Any]:
    """Read a dict that ``torch.save`` wrote, onto the CPU, without executing anything in it except making NumPy numbers.

    Always the CPU: a file written on a GPU opens anywhere, and the GPU never holds the weights twice.

    Parameters
    ----------
    path
        The file.
    what
        What the file is, for the error ("checkpoint").
    mend
        How to fix it: what to give instead ("give ...").

    Raises
    ------
    BadInput
        The file is missing, not a dict of tensors and plain types, or cut short.
    """
    if not path.is_file():
        raise BadInput(f"{what} {path} {'is not a file' if path.exists() else 'does not exist'}; {mend}")
    try:
        with torch.serialization.safe_globals(_numpy_numbers()):
            value = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise BadInput(f"{what} {path} cannot be read: {error.strerror or first_line(error)}") from error
    except Exception as error:  # a damaged pickle can raise any exception
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        held = f"holds '{wanted[1]}'," if wanted else "is damaged or holds"
        raise BadInput(
            f"{what} {path} {held} more than tensors and plain types, which is never unpickled since it can run code; {mend}; "
            "or, if you trust the file, save its model_state_dict alone with the program that wrote it"
        ) from error
    if not isinstance(value, dict):
        raise BadInput(f"{what} {path} holds a {type(value).__name__}, not a dict; {mend}")
    return value


def load_state(module: nn.Module, state: Mapping[str, Any], what: str, optional: Collection[str] = ()) -> None:
    """Copy `state` into `module`; except for the optional ones, names and shapes of all tensors must match.

    ``num_batches_tracked`` of a batch norm may be missing (older torchvision files lack it): it is not used as long as
    the batch norm has a momentum.

    Raises
    ------
    BadInput
        A tensor is missing, has another shape or is not in the module; the error names the first such tensor.
    """
    own = module.state_dict()
    for name, tensor in own.items():
        if name not in state:
            if name.endswith("num_batches_tracked") or name in optional:
                continue
            raise BadInput(f"{what} does not fit this model: it has no tensor '{name}'")
        found = state[name]
        if not isinstance(found, torch.Tensor):
            raise BadInput(f"{what} does not fit this model: '{name}' is a {type(found).__name__}, not a tensor")
        if found.layout != tensor.layout or found.is_complex():
            raise BadInput(f"{what} does not fit this model: '{name}' is no dense tensor of real numbers")
        if found.shape != tensor.shape:
            raise BadInput(
                f"{what} does not fit this model: tensor '{name}' has the shape {tuple(found.shape)}, not {tuple(tensor.shape)}"
            )
    for name in state:
        if name not in own:
            raise BadInput(f"{what} does not fit this model: it has the extra tensor '{name}'")
    module.load_state_dict({**own, **state})


def _numpy_numbers() -> list[Any]:
    """Return what unpickling a NumPy number calls: other programs' metrics often contain them, and they run no code."""
    scalar = np.float64(0).__reduce__()[0]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")  # NumPy 1 and 2
    types = (bool, np.int32, np.int64, np.float16, np.float32, np.float64)
    return [*((scalar, name) for name in names), np.dtype, *(type(np.dtype(t)) for t in types)]


def place(module: M, device: torch.device) -> M:
    """Return the module on a device, with weights in the ``channels_last`` layout: GPUs convolve fastest in it."""
    return module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in the stub
