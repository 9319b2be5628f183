"""Backbones for one-channel tiles, with random weights, ImageNet weights or weights from a file."""

from __future__ import annotations

import pickle
from pathlib import Path

import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from mammostream.common.errors import BadInput, first_line, nearest
from mammostream.models.architectures import ARCHITECTURES
from mammostream.models.conversion import convert_state, find_state
from mammostream.models.tensors import load_state, read_torch

# The first recipe's weights, for every architecture. The second recipe scores higher on ImageNet itself, but losses
# that pull classes tightly together give features that transfer less well (Kornblith et al. 2021, arXiv:2010.16402).
_IMAGENET_RECIPE = "IMAGENET1K_V1"
_CLASSIFYING = ("fc.", "classifier.2.")  # the last layer of a ResNet, of a ConvNeXt


def build_backbone(arch: str, weights: str | Path = "none") -> nn.Module:
    """Build a torchvision ResNet or ConvNeXt with one input channel and no classification layer.

    ConvNeXt is built without stochastic depth (torchvision's drops up to a tenth of its blocks in training): BYOL's target must
    be the same network as the online one.

    Parameters
    ----------
    arch
        ``resnet18``, ``resnet34``, ``resnet50`` or ``resnet101`` (He et al. 2016, arXiv:1512.03385), ``convnext_tiny``
        (Liu et al. 2022, arXiv:2201.03545), or ``resnet18_narrow``, a ResNet-18 with a quarter of the channels: a sixteenth of
        the weights, for trials on a CPU.
    weights
        ``"none"`` (random), ``"imagenet"`` (torchvision's, from its cache or the network), or the path of a file with
        torchvision's tensor names, or of a checkpoint, whose online backbone is used. Three channels are folded into one,
        see :func:`mammostream.models.conversion.convert_state`; the final classification layer is dropped.

    Returns
    -------
    nn.Module
        Maps (N, 1, H, W) normalised by :mod:`mammostream.common.normalisation` to (N, num_features). Two attributes describe
        it: ``arch`` (str) and ``num_features`` (int: 512 for resnet18 and 34, 2048 for resnet50 and 101, 768 for
        convnext_tiny, 128 for resnet18_narrow).

    Raises
    ------
    BadInput
        The architecture is unknown, or the weights cannot be read or do not fit.
    """
    if arch not in ARCHITECTURES:
        raise BadInput(f"unknown architecture '{arch}'{nearest(arch, ARCHITECTURES)}; known: {', '.join(ARCHITECTURES)}")
    backbone = _build_convnext(arch) if arch.startswith("convnext") else _build_resnet(arch)
    backbone.arch = arch  # type: ignore[assignment]  # not a module, and never registered as one
    if str(weights) != "none":
        found = convert_state(find_state(_read_weights(arch, weights))).state
        online = {name.removeprefix("backbone."): tensor for name, tensor in found.items() if name.startswith("backbone.")}
        state = {name: tensor for name, tensor in online.items() if not name.startswith(_CLASSIFYING)}
        load_state(backbone, state, f"weights '{weights}' for {arch}")
    return backbone


def with_input_channels(backbone: nn.Module) -> nn.Module:
    """Note on a backbone how many channels it takes, as ``input_channels``, and return it.

    Those of its first convolution; 1 if it has none. It is noted once, since looking for it in each step would cost time.
    """
    if not isinstance(getattr(backbone, "input_channels", None), int):
        first = next((module for module in backbone.modules() if isinstance(module, nn.Conv2d)), None)
        backbone.input_channels = 1 if first is None else first.in_channels  # type: ignore[assignment]  # not a module
    return backbone


def to_channels(x: Tensor, channels: int) -> Tensor:
    """Return tiles (N, C, H, W) with as many channels as a backbone takes.

    One channel is repeated; three are reduced to their mean if the backbone takes one, which is exact for grey images stored as
    RGB and normalised alike in each channel (by :mod:`mammostream.common.normalisation`).

    Raises
    ------
    BadInput
        Another number of dimensions, or channels that fit neither way.
    """
    if x.ndim == 4 and x.shape[1] == channels:
        return x
    if x.ndim == 4 and x.shape[1] == 1:
        return x.expand(-1, channels, -1, -1)
    if x.ndim == 4 and (x.shape[1], channels) == (3, 1):
        return x.mean(1, keepdim=True)
    other = 3 if channels == 1 else 1
    raise BadInput(f"the model takes tiles of shape (N, {channels}, H, W) or (N, {other}, H, W), not {tuple(x.shape)}")


def encode(backbone: nn.Module, x: Tensor) -> Tensor:
    """Return the backbone's features as (N, dim) for (N, 1, H, W) or (N, 3, H, W); (N, dim, 1, 1) is flattened.

    The tiles get the channels that :func:`with_input_channels` noted on the backbone; without a note it takes one.
    """
    return backbone(to_channels(x, getattr(backbone, "input_channels", 1))).flatten(1)


def feature_dim(backbone: nn.Module, given: int | None = None) -> int:
    """Return the length of the backbone's features: its ``num_features``, or `given` if it has none.

    Raises
    ------
    BadInput
        Neither is known, or they disagree.
    """
    known: int | None = getattr(backbone, "num_features", None)
    if known is not None and given is not None and known != given:
        raise BadInput(f"the backbone {getattr(backbone, 'arch', '')} gives {known} features; pass input_dim={known}")
    dim = given if known is None else known
    if dim is None:
        raise BadInput("the backbone has no num_features; pass input_dim, the length of its feature vector")
    return dim


class _NarrowResNet(ResNet):  # type: ignore[misc]  # torchvision has no types
    """A ResNet with a quarter of the channels everywhere."""

    def _make_layer(
        self, block: type[BasicBlock | Bottleneck], planes: int, blocks: int, stride: int = 1, dilate: bool = False
    ) -> nn.Sequential:
        if planes == 64:  # the first stage, behind the stem
            self.inplanes //= 4
            self.bn1 = nn.BatchNorm2d(self.inplanes)
        return super()._make_layer(block, planes // 4, blocks, stride, dilate)


def _build_resnet(arch: str) -> nn.Module:
    backbone = _NarrowResNet(BasicBlock, [2, 2, 2, 2]) if arch == "resnet18_narrow" else torchvision.models.get_model(arch)
    backbone.num_features = backbone.layer4[-1].conv1.in_channels
    backbone.fc = nn.Identity()
    backbone.conv1 = nn.Conv2d(1, backbone.bn1.num_features, kernel_size=7, stride=2, padding=3, bias=False)
    nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision does
    return backbone


def _build_convnext(arch: str) -> nn.Module:
    backbone = torchvision.models.get_model(arch, weights=None, stochastic_depth_prob=0.0)
    backbone.num_features = backbone.classifier[2].in_features
    backbone.classifier[2] = nn.Identity()
    stem = backbone.features[0]
    stem[0] = nn.Conv2d(1, stem[0].out_channels, kernel_size=4, stride=4)
    nn.init.trunc_normal_(stem[0].weight, std=0.02)  # as torchvision does
    nn.init.zeros_(stem[0].bias)
    return backbone


def _read_weights(arch: str, weights: str | Path) -> dict[str, Tensor]:
    """Read a state dict with torchvision's names: the ImageNet one, or a file's."""
    if str(weights) == "imagenet":
        if arch == "resnet18_narrow":
            raise BadInput("there are no ImageNet weights of resnet18_narrow; pass --weights none")
        entry = torchvision.models.get_model_weights(arch)[_IMAGENET_RECIPE]
        try:
            return entry.get_state_dict(progress=False, check_hash=True, weights_only=True)
        # No network, a download with a wrong checksum, or a damaged file in the cache.
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise BadInput(
                f"cannot get the ImageNet weights of {arch} ({first_line(error)}); download {entry.url} on a "
                "machine with network access and pass --weights FILE, or pass --weights none"
            ) from error
    path = Path(weights)
    hint = nearest(str(weights), ("none", "imagenet"))
    return read_torch(path, "weights", f"give 'none', 'imagenet' or a state dict file{hint}")
