"""Checkpoint files: dicts of tensors and plain types, written atomically and read without executing anything in them.

Required keys: ``kind`` ("byol", "classifier" or "aggregator"), ``arch``, ``model_state_dict``, ``config`` and, but for BYOL,
``class_names``. The trainer adds ``optimizer_state_dict``, ``epoch``, ``step``, ``metrics`` and ``preprocessing``.
"""

from __future__ import annotations

import shutil
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mammostream.common.errors import BadInput, first_line
from mammostream.common.files import whole_file
from mammostream.common.normalisation import MEAN, STD
from mammostream.models.architectures import ARCHITECTURES
from mammostream.models.backbones import build_backbone, feature_dim
from mammostream.models.byol import MammogramBYOL
from mammostream.models.classifier import MammogramClassifier, build_classification_head
from mammostream.models.conversion import COUNTER, LoadReport, convert_state, examples, find_state
from mammostream.models.tensors import load_state, read_torch

BACKBONES = ("byol", "classifier")
"""The kinds of checkpoints that hold a backbone."""
_MENDS = {
    "byol": "give a mammogram_byol_*.pth that 'mammostream pretrain' wrote",
    "classifier": "give a *_classification_model.pth or classification_epoch_*.pth that 'mammostream finetune' wrote",
    "aggregator": "give a *_aggregator.pth that 'mammostream aggregate train' wrote",
    None: "give a checkpoint that 'mammostream pretrain' or 'mammostream finetune' wrote",
}
_REQUIRED = {"model_state_dict": dict, "config": dict, "arch": str}
_MIN_SHARE = 0.9  # fraction of a backbone's tensors that another program's file must have
_GUIDE_TILE_SIZE = 512  # to which the guides' scripts resize every tile
# Types of entries that later code relies on, where they are there.
_ENTRIES: dict[str, Any] = {
    "preprocessing": dict,
    "metrics": dict,
    "fitted_on": (dict, type(None)),
    "subjects": (list, tuple),
    "epoch": int,
    "step": int,
    "preprocessing.tile_size": int,
    "preprocessing.mean": (int, float),
    "preprocessing.std": (int, float),
    "preprocessing.view_size": (int, type(None)),
}
_FULL = 2**20  # a disk with fewer free bytes counts as full: torch writes more at a time
_SCALARS = (type(None), bool, int, float, str, bytes)


def save_checkpoint(path: str | Path, checkpoint: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically: an older file of that name stays until the new one is on disk.

    Parameters
    ----------
    path
        The file.
    checkpoint
        The keys listed in the module's docstring. Values are tensors, None, bool, int, float, str, bytes, and lists,
        tuples and dicts of them: only those can be read back without executing the file.

    Raises
    ------
    TypeError
        An entry is of another type (a NumPy number, a path); the error names its key.
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
            raise  # whole_file reports it
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            full = shutil.disk_usage(temporary.parent).free < _FULL
            raise BadInput(
                f"cannot write checkpoint {path}: {'the disk is full' if full else first_line(error)}; make room or choose "
                "another output directory"
            ) from error


def load_checkpoint(path: str | Path, kind: str | None) -> dict[str, Any]:
    """Read a checkpoint of this package, or convert one of another program, onto the CPU.

    Another program's file is a state dict, or a dict with one below ``model_state_dict``, ``state_dict`` or ``model``: of a
    torchvision ResNet, or of the models that the guides' scripts trained. With ``class_names`` next to it, it is a classifier,
    otherwise a BYOL model, whose heads may be missing. See :func:`mammostream.models.conversion.convert_state`. The result has
    ``load_report``, a :class:`mammostream.models.conversion.LoadReport`, and in ``preprocessing`` only what is known: the mean
    and std that the folded network expects, and the guides' tile size.

    Parameters
    ----------
    path
        The file.
    kind
        ``"byol"``, ``"classifier"`` or ``"aggregator"``; None accepts both kinds that hold a backbone.

    Raises
    ------
    BadInput
        The file is missing, not a checkpoint, damaged, of the other kind, or has under 90 % of a backbone's tensors.
    """
    path = Path(path)
    checkpoint = read_torch(path, "checkpoint", _MENDS[kind])
    if "kind" in checkpoint:
        _check_bytes(path, _MENDS[kind])
    else:
        checkpoint = _adopt(checkpoint, f"checkpoint {path}", _MENDS[kind])
    _check_kind(checkpoint, BadInput, f"checkpoint {path}", f"; {_MENDS[kind]}")
    if checkpoint["kind"] not in ((kind,) if kind else BACKBONES):
        wanted = kind or " or ".join(BACKBONES)
        what, other = (f"a{'n' if name[0] == 'a' else ''} {name} model" for name in (checkpoint["kind"], wanted))
        raise BadInput(f"checkpoint {path} holds {what}, not {other}; {_MENDS[kind]}")
    for name, types in _ENTRIES.items():
        outer, _, key = name.rpartition(".")
        holder = checkpoint.get(outer, {}) if outer else checkpoint
        if key in holder and not isinstance(holder[key], types):
            raise BadInput(f"checkpoint {path} is damaged: its '{name}' is {str(holder[key])[:40]!r}; {_MENDS[kind]}")
    return checkpoint


@contextmanager
def entries_of(path: str | Path, kind: str | None) -> Iterator[None]:
    """Report what a missing or damaged entry of a checkpoint sets off, while it is put to use, as one line.

    Raises
    ------
    BadInput
        Instead of the error of whatever used the entry.
    """
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        raise BadInput(f"checkpoint {path} has an entry that is missing or damaged ({what}); {_MENDS[kind]}") from error


def restore_byol(checkpoint: Mapping[str, Any], path: str | Path, arch: str | None = None) -> MammogramBYOL:
    """Build the model of a checkpoint that :func:`load_checkpoint` read, in evaluation mode on the CPU.

    Parameters
    ----------
    checkpoint
        Of kind ``"byol"``.
    path
        The file it was read from, for error messages.
    arch
        The architecture that the user requested; None uses the checkpoint's.

    Raises
    ------
    BadInput
        The checkpoint holds another architecture, or its tensors do not fit it.
    """
    what = f"checkpoint {path}"
    if arch not in (None, checkpoint["arch"]):
        raise BadInput(f"{what} holds {checkpoint['arch']}, not {arch}; pass --arch {checkpoint['arch']}")
    report = checkpoint.get("load_report")
    model = _build_byol(checkpoint["arch"], checkpoint["model_state_dict"], what, foreign=report is not None)
    load_state(model, checkpoint["model_state_dict"], what, optional=report.missing if report else ())
    return model.eval()


def restore_classifier(checkpoint: Mapping[str, Any], path: str | Path) -> MammogramClassifier:
    """Build the model of a checkpoint that :func:`load_checkpoint` read, in evaluation mode on the CPU.

    Raises
    ------
    BadInput
        The tensors do not fit the architecture or the class names.
    """
    what, state, report = f"checkpoint {path}", checkpoint["model_state_dict"], checkpoint.get("load_report")
    num_classes = _rows(state, "classification_head.3.weight", what)
    if num_classes != len(checkpoint["class_names"]):
        raise BadInput(f"{what} has {len(checkpoint['class_names'])} class names but {num_classes} outputs; train it again")
    model = _build_classifier(checkpoint["arch"], state, what)
    # Predictions of a partly random head would be meaningless.
    missing = report.missing if report else ()
    load_state(model, state, what, optional=[name for name in missing if name.startswith("backbone.")])
    return model.eval()


def load_byol(path: str | Path, device: str | torch.device = "cpu", arch: str | None = None) -> MammogramBYOL:
    """Read a BYOL model from its checkpoint, in evaluation mode; see :func:`load_checkpoint` and :func:`restore_byol`."""
    return restore_byol(load_checkpoint(path, "byol"), path, arch).to(device)


def load_classifier(
    path: str | Path, device: str | torch.device = "cpu"
) -> tuple[MammogramClassifier, list[str], dict[str, Any]]:
    """Read a classifier from its checkpoint: the model in evaluation mode, its class names, its training config."""
    checkpoint = load_checkpoint(path, "classifier")
    model = restore_classifier(checkpoint, path).to(device)
    return model, list(checkpoint["class_names"]), checkpoint["config"]


load_classification_model = load_classifier  # as the guide calls it


def _check_bytes(path: Path, mend: str) -> None:
    """Check the checksums within a file that ``torch.save`` wrote; torch itself does not, and would load changed weights."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError, EOFError, zlib.error) as error:
        damaged = first_line(error)
    if damaged is not None:
        raise BadInput(f"checkpoint {path} is damaged: its bytes changed since it was written ({damaged}); {mend}")


def _adopt(raw: Mapping[str, Any], what: str, mend: str) -> dict[str, Any]:
    """Return another program's file as a checkpoint of this package."""
    source = find_state(raw)
    converted = convert_state(source)
    state = dict(converted.state)
    kind = "classifier" if "class_names" in raw else "byol"
    arch = _nearest_arch(state)
    if kind == "byol":
        _fill_byol(state)
    build = _build_byol if kind == "byol" else _build_classifier
    expected = _shapes(lambda: build(arch, state, what, foreign=True))
    fitting = {name: tensor for name, tensor in state.items() if tensor.shape == expected.get(name)}
    used = {converted.sources[name] for name in fitting if name in converted.sources}
    report = LoadReport(
        source=what,
        arch=arch,
        normalisation=converted.normalisation,
        matched=[name for name in fitting if name in converted.sources],
        folded=converted.folded,
        missing=[name for name in expected if name not in fitting and not name.endswith(COUNTER)],
        unexpected=[name for name, value in source.items() if isinstance(value, torch.Tensor) and name not in used],
    )
    if report.backbone_share < _MIN_SHARE:
        lost = f"missing: {examples(report.missing)}" + (f"; unexpected: {examples(report.unexpected)}" if source else "")
        raise BadInput(
            f"{what} does not fit: only {report.backbone_share:.0%} of the tensors of {arch}, the nearest of "
            f"{', '.join(ARCHITECTURES)}, are in it ({lost}); {mend}"
        )
    config = raw.get("config")
    return {
        "kind": kind,
        "arch": arch,
        "model_state_dict": fitting,
        "config": dict(config) if isinstance(config, Mapping) else {},
        "class_names": raw.get("class_names"),
        "preprocessing": {"mean": MEAN, "std": STD, "tile_size": _GUIDE_TILE_SIZE, "shard_config_hash": None},
        "load_report": report,
    }


def _nearest_arch(state: Mapping[str, torch.Tensor]) -> str:
    """Return the architecture that most tensors fit; in a tie, the one with the fewest tensors."""

    def fit(arch: str) -> tuple[int, int]:
        shapes = _shapes(lambda: build_backbone(arch))
        found = sum(f"backbone.{name}" in state and state[f"backbone.{name}"].shape == shape for name, shape in shapes.items())
        return found, -len(shapes)

    return max(ARCHITECTURES, key=fit)


def _fill_byol(state: dict[str, torch.Tensor]) -> None:
    """Add what another program's BYOL model leaves out: a target equal to the online network, biases of 0."""
    for name, tensor in list(state.items()):
        head, _, rest = name.partition(".")
        if head in ("backbone", "projection_head"):
            state.setdefault(f"{head}_momentum.{rest}", tensor)
    for name, tensor in list(state.items()):
        if name.endswith(("_head.0.weight", "_head_momentum.0.weight")):
            state.setdefault(name.replace("weight", "bias"), tensor.new_zeros(len(tensor)))


def _shapes(build: Callable[[], nn.Module]) -> dict[str, torch.Size]:
    """Return the shapes of a model's tensors, without allocating them."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in build().state_dict().items()}


def _build_byol(arch: str, state: Mapping[str, Any], what: str, foreign: bool) -> MammogramBYOL:
    """Build a model whose heads are as wide as the state's; a state of another program may lack them."""
    hidden = _rows(state, "projection_head.0.weight", what, 4096 if foreign else None)
    proj = _rows(state, "projection_head.3.weight", what, 256 if foreign else None)
    model = MammogramBYOL(build_backbone(arch), hidden_dim=hidden, proj_dim=proj)
    model.classification_head = _build_head(model.input_dim, state, what, foreign)
    return model


def _build_classifier(arch: str, state: Mapping[str, Any], what: str, foreign: bool = False) -> MammogramClassifier:
    backbone = build_backbone(arch)
    return MammogramClassifier(backbone, _build_head(feature_dim(backbone), state, what, foreign))


def _build_head(dim: int, state: Mapping[str, Any], what: str, foreign: bool = False) -> nn.Sequential:
    """Build a classification head as wide as the state's; one of another program may lack it."""
    classes = _rows(state, "classification_head.3.weight", what, 2 if foreign else None)
    hidden = _rows(state, "classification_head.0.weight", what, dim if foreign else None)
    return build_classification_head(dim, classes, hidden_dim=hidden)


def _check_kind(checkpoint: Mapping[str, Any], error: type[Exception], what: str, mend: str = "") -> None:
    """Raise `error` where a key that every checkpoint of its kind needs is missing or of another type."""
    if checkpoint.get("kind") not in (*BACKBONES, "aggregator"):
        raise error(f"{what} does not say its kind ('byol', 'classifier' or 'aggregator'){mend}")
    classifier: dict[str, Any] = {} if checkpoint["kind"] == "byol" else {"class_names": (list, tuple)}
    required: dict[str, Any] = {**_REQUIRED, **classifier}
    for key, kind in required.items():
        if not isinstance(checkpoint.get(key), kind):
            raise error(f"{what} has no '{key}'{mend}")
    if classifier and not all(isinstance(name, str) for name in checkpoint["class_names"]):
        raise error(f"{what} has a class name that is no text{mend}")


def _check_plain(place: str, value: Any) -> None:
    """Raise TypeError that names the key of the first value that could not be read back."""
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


def _rows(state: Mapping[str, Any], name: str, what: str, default: int | None = None) -> int:
    """Return the output width of the linear layer whose weight is `name`; where there is none, `default` if it is given."""
    weight = state.get(name)
    if weight is None and default is not None:
        return default
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2:
        raise BadInput(f"{what} does not fit this model: it has no matrix '{name}'")
    return weight.shape[0]
