"""ResNet backbones for one-channel tiles, and the exact folding of three-channel weights into them."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from common.errors import BadInput, first_line, nearest
from common.normalisation import MEAN, STD
from models.architectures import ARCHITECTURES
from models.tensors import load_state, read_torch

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# The first recipe's weights, for every architecture. The second recipe scores higher on ImageNet itself, but losses
# that press classes together give features that transfer less well (Kornblith et al. 2021, arXiv:2010.16402).
_IMAGENET_RECIPE = "IMAGENET1K_V1"


def build_backbone(arch: str, weights: str | Path = "none") -> nn.Module:
    """Build a torchvision ResNet with one input channel and no classification layer.

    Parameters
    ----------
    arch
        ``resnet18``, ``resnet34``, ``resnet50`` or ``resnet101`` (He et al. 2016, arXiv:1512.03385).
    weights
        ``"none"`` (random), ``"imagenet"`` (torchvision's, from its cache or the network), or the path of a state
        dict file with torchvision's tensor names. Three-channel weights are taken to expect ImageNet's normalisation
        and are folded, see :func:`fold_first_convolution`; a classification layer ``fc`` in them is dropped.

    Returns
    -------
    nn.Module
        Maps (N, 1, H, W) normalised by :data:`MEAN` and :data:`STD` to (N, num_features). Two attributes say what it
        is: ``arch`` (str) and ``num_features`` (int: 512 for resnet18 and 34, else 2048).

    Raises
    ------
    BadInput
        The architecture is unknown, the weights cannot be had, or they do not fit.
    """
    if arch not in ARCHITECTURES:
        raise BadInput(f"unknown architecture '{arch}'{nearest(arch, ARCHITECTURES)}; known: {', '.join(ARCHITECTURES)}")
    backbone = torchvision.models.get_model(arch, weights=None)
    backbone.arch = arch
    backbone.num_features = backbone.fc.in_features
    backbone.fc = nn.Identity()
    backbone.conv1 = nn.Conv2d(1, 64, kernel_size=7, stride=2, padding=3, bias=False)
    nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision does
    if str(weights) != "none":
        state = _read_weights(arch, weights)
        load_state(backbone, _fold_state(state), f"weights '{weights}' for {arch}")
    return backbone


def fold_first_convolution(
    weight: Tensor,
    running_mean: Tensor,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> tuple[Tensor, Tensor]:
    """Turn a three-channel first convolution and its batch norm into a one-channel one that computes the same.

    A grey pixel x replicated over three channels enters channel c as (x - m_c) / s_c; the one-channel network sees
    u = (x - MEAN) / STD instead. Put x = STD u + MEAN into the sum over channels::

        sum_c w_c * (x - m_c) / s_c  =  (sum_c w_c STD / s_c) * u  +  sum_c sum(w_c) (MEAN - m_c) / s_c

    The first term is the one-channel convolution. The second is a constant per output channel k, and a batch norm
    that subtracts its running mean r takes y + k with r as it takes y with r - k. (In training mode the batch's own
    mean removes the constant.) It is exact where the kernel lies within the image: in the padded border, zeros stand
    for a normalised grey that differs slightly between the two.

    Parameters
    ----------
    weight
        (O, 3, K, K) weight of a convolution without bias.
    running_mean
        (O,) running mean of the batch norm behind it.
    mean, std
        The normalisation that the three-channel network was trained with.

    Returns
    -------
    weight, running_mean
        (O, 1, K, K) and (O,), in the inputs' types, for an input normalised by :data:`MEAN` and :data:`STD`.
    """
    m, s = (torch.tensor(v, dtype=torch.float64, device=weight.device) for v in (mean, std))
    w = weight.double()
    folded = (w * (STD / s).view(1, 3, 1, 1)).sum(1, keepdim=True)
    constant = (w.sum((2, 3)) * ((MEAN - m) / s)).sum(1)
    return folded.to(weight.dtype), (running_mean.double() - constant).to(running_mean.dtype)


def one_channel(x: Tensor) -> Tensor:
    """Reduce (N, 3, H, W) to (N, 1, H, W) by the channels' mean; (N, 1, H, W) passes through.

    Exact for grey images stored as RGB and normalised alike in each channel (by :data:`MEAN` and :data:`STD`).

    Raises
    ------
    BadInput
        Another number of dimensions or channels.
    """
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise BadInput(f"the model takes tiles of shape (N, 1, H, W) or (N, 3, H, W), not {tuple(x.shape)}")
    return x if x.shape[1] == 1 else x.mean(1, keepdim=True)


def encode(backbone: nn.Module, x: Tensor) -> Tensor:
    """Return the backbone's features as (N, dim) for (N, 1, H, W) or (N, 3, H, W); (N, dim, 1, 1) is flattened."""
    return backbone(one_channel(x)).flatten(1)


def feature_dim(backbone: nn.Module, given: int | None = None) -> int:
    """Return the length of the backbone's features: its ``num_features``, or `given` where it does not say.

    Raises
    ------
    BadInput
        Neither is known, or they disagree.
    """
    known = getattr(backbone, "num_features", None)
    if known is None and given is None:
        raise BadInput("the backbone has no num_features; pass input_dim, the length of its feature vector")
    if None not in (known, given) and known != given:
        raise BadInput(f"the backbone {getattr(backbone, 'arch', '')} gives {known} features; pass input_dim={known}")
    return given if known is None else known


def _read_weights(arch: str, weights: str | Path) -> dict[str, Tensor]:
    """Read a state dict with torchvision's names: the ImageNet one, or a file's."""
    if str(weights) == "imagenet":
        entry = torchvision.models.get_model_weights(arch)[_IMAGENET_RECIPE]
        try:
            return entry.get_state_dict(progress=False, check_hash=True)
        # No network, a download with a wrong checksum, a damaged file in the cache.
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise BadInput(
                f"cannot get the ImageNet weights of {arch} ({first_line(error)}); download {entry.url} where "
                "there is a network and pass --weights FILE, or pass --weights none"
            ) from error
    path = Path(weights)
    hint = nearest(str(weights), ("none", "imagenet"))
    return read_torch(path, "weights", f"give 'none', 'imagenet' or a state dict file{hint}")


def _fold_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop the classification layer of a torchvision state dict and fold its first convolution where it has three."""
    state = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
    weight, running_mean = state.get("conv1.weight"), state.get("bn1.running_mean")
    both = isinstance(weight, Tensor) and isinstance(running_mean, Tensor)
    if both and weight.ndim == 4 and weight.shape[1] == 3:
        state["conv1.weight"], state["bn1.running_mean"] = fold_first_convolution(weight, running_mean)
    return state
