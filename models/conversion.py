"""Conversion of other programs' state dicts to this package's names, with a report of what was changed and what fits."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mammostream.common.normalisation import MEAN, STD

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SCRIPT_MEAN, SCRIPT_STD = (0.5,) * 3, (0.5,) * 3  # of the scripts that the guides describe
COUNTER = "num_batches_tracked"  # of a batch norm: older files lack it, and nothing needs it
_NESTS = ("model_state_dict", "state_dict", "model")
_WRAPPED = "byol_model"  # the old classifier's name for the BYOL model in it
_WRAPPERS = ("module", "_orig_mod", _WRAPPED)  # DistributedDataParallel's, torch.compile's, the old classifier's
# nn.Sequential(*resnet.children()) has numbers instead of torchvision's names; 2, 3 and 8 have no tensors.
_CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
_TORCHVISION = (*_CHILDREN.values(), "fc", "features", "classifier")  # a ResNet's children, a ConvNeXt's
_BACKBONES = ("backbone", "backbone_momentum")
# The first convolution, the tensor that absorbs its constant (a batch norm's running mean, or the bias), and the sign.
_STEMS = (("conv1.weight", "bn1.running_mean", -1), ("features.0.0.weight", "features.0.0.bias", 1))


@dataclass(frozen=True)
class Conversion:
    """A state dict in this package's names, for one-channel input.

    Attributes
    ----------
    state
        Name -> tensor.
    sources
        Name -> name in the file.
    folded
        Names that were folded from three channels.
    normalisation
        The input normalisation that the file's network expects, in words.
    """

    state: dict[str, Tensor]
    sources: dict[str, str]
    folded: list[str]
    normalisation: str


@dataclass(frozen=True)
class LoadReport:
    """What was done with a file's tensors.

    Attributes
    ----------
    source
        The file.
    arch
        The backbone that fits best.
    normalisation
        The input normalisation that the file's network expects, in words.
    matched
        Names in this package that were found with the right shape.
    folded
        Those among them that were folded from three channels.
    missing
        Names of the model that the file lacks or has in another shape: these tensors keep their initial values.
    unexpected
        Names in the file that the model does not have: these tensors are ignored.
    """

    source: str
    arch: str
    normalisation: str
    matched: list[str]
    folded: list[str]
    missing: list[str]
    unexpected: list[str]

    @property
    def backbone_share(self) -> float:
        """Fraction of the online backbone's tensors that matched, 0-1, not counting batch norms' counters."""
        matched, missing = (
            sum(n.startswith("backbone.") and not n.endswith(COUNTER) for n in names) for names in (self.matched, self.missing)
        )
        return matched / max(1, matched + missing)

    def lines(self) -> list[str]:
        """Return the report as lines to print."""
        lines = [f"{self.source}: {self.arch}, {len(self.matched)} tensors matched, input normalised by {self.normalisation}"]
        for what, names in (
            ("folded from three channels to one", self.folded),
            ("missing, left as initialised", self.missing),
            ("unexpected, left out", self.unexpected),
        ):
            if names:
                lines.append(f"  {what}: {len(names)} ({examples(names)})")
        return lines


def examples(names: Sequence[str]) -> str:
    """Return the first three names, followed by ``...`` if there are more."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def find_state(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the state dict in a file's dict: itself, or what is under ``model_state_dict``, ``state_dict`` or ``model``."""
    while inner := next((value[name] for name in _NESTS if isinstance(value.get(name), Mapping)), None):
        value = inner
    return value


def convert_state(state: Mapping[str, Any]) -> Conversion:
    """Return the tensors of a state dict under this package's names, with first convolutions folded to one channel.

    Prefixes of wrappers are removed wherever they occur; a backbone's children, numbered or not, get torchvision's names under
    ``backbone.``; heads lose the ``layers.`` in between; a wrapped BYOL model is unwrapped, and the wrapper's classification
    head replaces its own. A three-channel first convolution is assumed to expect ImageNet's normalisation if the file has
    torchvision's names, otherwise mean and standard deviation 0.5, with which the guides' scripts train.
    """
    tensors = [name for name, value in state.items() if isinstance(value, Tensor)]
    own = {_strip(name)[0] for name in tensors if _WRAPPED not in name.split(".")}
    sources = {_canonical_name(name): name for name in tensors if _WRAPPED not in name.split(".") or _strip(name)[0] not in own}
    found = {name: state[source] for name, source in sources.items()}

    torchvision_names = any(_strip(name)[0] in ("conv1", "features") for name in tensors)
    folded = []
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if torchvision_names else (SCRIPT_MEAN, SCRIPT_STD)
    for backbone, (convolution, absorber, sign) in itertools.product(_BACKBONES, _STEMS):
        names = [f"{backbone}.{convolution}", f"{backbone}.{absorber}"]
        weight, absorbing = (found.get(name) for name in names)
        if weight is not None and absorbing is not None and weight.ndim == 4 and weight.shape[1] == 3:
            grey, constant = fold_first_convolution(weight, mean, std)
            found |= {names[0]: grey, names[1]: (absorbing.double() + sign * constant).to(absorbing.dtype)}
            folded += names
    words = "ImageNet's mean and std" if torchvision_names else "mean 0.5, std 0.5"
    return Conversion(found, sources, folded, words if folded else f"mean {MEAN}, std {STD}")


def _strip(name: str) -> list[str]:
    return [part for part in name.split(".") if part not in _WRAPPERS] or [name]


def _canonical_name(name: str) -> str:
    parts = _strip(name)
    if parts[0] in _TORCHVISION or parts[0] in _CHILDREN:
        parts = ["backbone", *parts]
    if parts[0] in _BACKBONES:
        parts[1:2] = [_CHILDREN.get(part, part) for part in parts[1:2]]
    elif parts[1:2] == ["layers"]:
        del parts[1]
    return ".".join(parts)


def fold_first_convolution(
    weight: Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> tuple[Tensor, Tensor]:
    """Turn a three-channel first convolution into a one-channel one that gives the same output up to a constant.

    A grey pixel x replicated over three channels enters channel c as (x - m_c) / s_c; the one-channel network sees
    u = (x - MEAN) / STD instead. Substitute x = STD u + MEAN in the sum over channels::

        sum_c w_c * (x - m_c) / s_c  =  (sum_c w_c STD / s_c) * u  +  sum_c sum(w_c) (MEAN - m_c) / s_c

    The first term is the one-channel convolution. The second is a constant k per output channel. A convolution's bias can
    absorb it. So can a batch norm: y + k with running mean r gives the same as y with r - k. (In training mode the batch's
    mean removes the constant.) This is exact where the kernel lies within the image, so everywhere for ConvNeXt, whose first
    convolution has no padding. In a ResNet's padded border, zeros stand for a normalised grey that differs slightly between
    the two: this affects two rows and columns of the first convolution's outputs on each side.

    Parameters
    ----------
    weight
        (O, 3, K, K) weight of the convolution.
    mean, std
        The normalisation that the three-channel network was trained with.

    Returns
    -------
    weight
        (O, 1, K, K) in the input's type, for an input normalised by :data:`MEAN` and :data:`STD`.
    constant
        (O,) float64 k.
    """
    m, s = (torch.tensor(v, dtype=torch.float64, device=weight.device) for v in (mean, std))
    w = weight.double()
    folded = (w * (STD / s).view(1, 3, 1, 1)).sum(1, keepdim=True)
    constant = (w.sum((2, 3)) * ((MEAN - m) / s)).sum(1)
    return folded.to(weight.dtype), constant
