"""Checkpoint files: dicts of tensors and plain types, whole or absent, read without executing anything in them.

Keys: ``kind`` ("byol" or "classifier"), ``arch``, ``model_state_dict``, ``config``, ``class_names`` (classifier) must
be there; ``optimizer_state_dict``, ``epoch``, ``step``, ``metrics`` and ``preprocessing`` are the trainer's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from common.errors import BadInput, first_line
from common.files import whole_file
from models.backbones import build_backbone
from models.byol import MammogramBYOL
from models.classifier import MammogramClassifier, build_classification_head
from models.tensors import load_state, read_torch

_MENDS = {
    "byol": "give a mammogram_byol_*.pth that 'mammostream pretrain' wrote",
    "classifier": "give a *_classification_model.pth or classification_epoch_*.pth that 'mammostream finetune' wrote",
    None: "give a checkpoint that 'mammostream pretrain' or 'mammostream finetune' wrote",
}
_REQUIRED = {"model_state_dict": dict, "config": dict, "arch": str}
_SCALARS = (type(None), bool, int, float, str, bytes)


def save_checkpoint(path: str | Path, checkpoint: Mapping[str, Any]) -> None:
    """Write a checkpoint, whole or not at all: an older file of that name stays until the new one is on the disk.

    Parameters
    ----------
    path
        The file.
    checkpoint
        The keys of the module's docstring, with nothing but tensors, None, bool, int, float, str, bytes, and lists,
        tuples and dicts of them: only those can be read back without executing the file.

    Raises
    ------
    TypeError
        An entry is of another type (a NumPy number, a path); its place is named.
    ValueError
        A required key is missing.
    BadInput
        The file cannot be written.
    """
    path = Path(path)
    _check_kind(checkpoint, ValueError, f"checkpoint {path}")
    for key, value in checkpoint.items():
        _check_plain(key, value)
    with whole_file(path) as temporary:
        try:
            torch.save(dict(checkpoint), temporary)
        except PermissionError:
            raise  # whole_file has a line for it
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            raise BadInput(
                f"cannot write checkpoint {path}: {first_line(error)}; make room or choose another output directory"
            ) from error


def load_checkpoint(path: str | Path, kind: str | None) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Parameters
    ----------
    path
        The file.
    kind
        ``"byol"`` or ``"classifier"``; None takes either.

    Raises
    ------
    BadInput
        The file is missing, not a checkpoint, damaged, or of the other kind.
    """
    path = Path(path)
    checkpoint = read_torch(path, "checkpoint", _MENDS[kind])
    _check_kind(checkpoint, BadInput, f"checkpoint {path}", f"; {_MENDS[kind]}")
    if kind is not None and checkpoint["kind"] != kind:
        raise BadInput(f"checkpoint {path} holds a {checkpoint['kind']} model, not a {kind} model; {_MENDS[kind]}")
    return checkpoint


def restore_byol(checkpoint: Mapping[str, Any], path: str | Path, arch: str | None = None) -> MammogramBYOL:
    """Build the model of a checkpoint that :func:`load_checkpoint` read, in evaluation mode on the CPU.

    Parameters
    ----------
    checkpoint
        Of kind ``"byol"``.
    path
        Where it came from, for the errors.
    arch
        The architecture that the user asked for; None takes the checkpoint's.

    Raises
    ------
    BadInput
        The checkpoint holds another architecture, or its tensors do not fit it.
    """
    what, state = f"checkpoint {path}", checkpoint["model_state_dict"]
    if arch not in (None, checkpoint["arch"]):
        raise BadInput(f"{what} holds {checkpoint['arch']}, not {arch}; pass --arch {checkpoint['arch']}")
    model = MammogramBYOL(
        build_backbone(checkpoint["arch"]),
        hidden_dim=_rows(state, "projection_head.0.weight", what),
        proj_dim=_rows(state, "projection_head.3.weight", what),
        num_classes=_rows(state, "classification_head.3.weight", what),
    )
    load_state(model, state, what)
    return model.eval()


def restore_classifier(checkpoint: Mapping[str, Any], path: str | Path) -> MammogramClassifier:
    """Build the model of a checkpoint that :func:`load_checkpoint` read, in evaluation mode on the CPU.

    Raises
    ------
    BadInput
        The tensors do not fit the architecture or the class names.
    """
    what, state = f"checkpoint {path}", checkpoint["model_state_dict"]
    num_classes = _rows(state, "classification_head.3.weight", what)
    if num_classes != len(checkpoint["class_names"]):
        raise BadInput(f"{what} has {len(checkpoint['class_names'])} class names but {num_classes} outputs; train it again")
    backbone = build_backbone(checkpoint["arch"])
    model = MammogramClassifier(backbone, build_classification_head(backbone.num_features, num_classes))
    load_state(model, state, what)
    return model.eval()


def load_byol(path: str | Path, device: str | torch.device = "cpu", arch: str | None = None) -> MammogramBYOL:
    """Read a BYOL model from its checkpoint, in evaluation mode; see :func:`restore_byol`."""
    return restore_byol(load_checkpoint(path, "byol"), path, arch).to(device)


def load_classifier(
    path: str | Path, device: str | torch.device = "cpu"
) -> tuple[MammogramClassifier, list[str], dict[str, Any]]:
    """Read a classifier from its checkpoint: the model in evaluation mode, its class names, its training's config."""
    checkpoint = load_checkpoint(path, "classifier")
    model = restore_classifier(checkpoint, path).to(device)
    return model, list(checkpoint["class_names"]), checkpoint["config"]


def _check_kind(checkpoint: Mapping[str, Any], error: type[Exception], what: str, mend: str = "") -> None:
    """Raise `error` where a key that every checkpoint of its kind needs is missing or of another type."""
    if checkpoint.get("kind") not in ("byol", "classifier"):
        raise error(f"{what} does not say its kind ('byol' or 'classifier'){mend}")
    classifier = {"class_names": (list, tuple)} if checkpoint["kind"] == "classifier" else {}
    for key, kind in {**_REQUIRED, **classifier}.items():
        if not isinstance(checkpoint.get(key), kind):
            raise error(f"{what} has no '{key}'{mend}")


def _check_plain(place: str, value: Any) -> None:
    """Raise TypeError naming the place of the first value that could not be read back."""
    # Exact types: numpy.float64 is a float by inheritance, but its pickle needs NumPy's code.
    if type(value) in _SCALARS or isinstance(value, torch.Tensor):
        return
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            _check_plain(f"a key of {place}", key)
            _check_plain(f"{place}.{key}", item)
    elif type(value) in (list, tuple):
        for i, item in enumerate(value):
            _check_plain(f"{place}[{i}]", item)
    else:
        raise TypeError(f"checkpoint entry {place} is a {type(value).__name__}; convert it to a plain type")


def _rows(state: Mapping[str, Any], name: str, what: str) -> int:
    """Return the output width of the linear layer whose weight is `name`."""
    weight = state.get(name)
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2:
        raise BadInput(f"{what} does not fit this model: it has no matrix '{name}'")
    return weight.shape[0]
