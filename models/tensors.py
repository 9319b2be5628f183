"""Tensors from files and into modules: nothing is executed on reading, and a misfit is one line that names the tensor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.errors import BadInput, first_line


def read_torch(path: Path, what: str, mend: str) -> dict[str, Any]:
    """Read a dict that ``torch.save`` wrote, onto the CPU, without executing anything in it.

    Always the CPU: a file written on a GPU opens anywhere, and the GPU never holds the weights twice.

    Parameters
    ----------
    path
        The file.
    what
        What the file is, for the error ("checkpoint").
    mend
        What to give instead ("give ...").

    Raises
    ------
    BadInput
        The file is missing, not a dict of tensors and plain types, or cut short.
    """
    if not path.is_file():
        raise BadInput(f"{what} {path} {'is not a file' if path.exists() else 'does not exist'}; {mend}")
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise BadInput(f"{what} {path} cannot be read: {error.strerror or first_line(error)}") from error
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to spell
        raise BadInput(
            f"{what} {path} is damaged or holds more than tensors and plain types, which is never unpickled since it "
            f"can run code; {mend}"
        ) from error
    if not isinstance(value, dict):
        raise BadInput(f"{what} {path} holds a {type(value).__name__}, not a dict; {mend}")
    return value


def load_state(module: nn.Module, state: Mapping[str, Any], what: str) -> None:
    """Copy `state` into `module`; every tensor must be there, have its shape, and have its place.

    ``num_batches_tracked`` of a batch norm may be missing (torchvision's older files have none): nothing reads it
    while the batch norm has a momentum.

    Raises
    ------
    BadInput
        A tensor is missing, has another shape or has no place in the module; the first such tensor is named.
    """
    own = module.state_dict()
    for name, tensor in own.items():
        if name not in state:
            if name.endswith("num_batches_tracked"):
                continue
            raise BadInput(f"{what} does not fit this model: it has no tensor '{name}'")
        found = state[name]
        if not isinstance(found, torch.Tensor):
            raise BadInput(f"{what} does not fit this model: '{name}' is a {type(found).__name__}, not a tensor")
        if found.shape != tensor.shape:
            raise BadInput(
                f"{what} does not fit this model: tensor '{name}' has the shape {tuple(found.shape)}, not {tuple(tensor.shape)}"
            )
    for name in state:
        if name not in own:
            raise BadInput(f"{what} does not fit this model: it has the extra tensor '{name}'")
    module.load_state_dict({**own, **state})
