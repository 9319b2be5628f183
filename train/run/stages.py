"""The stages of a backbone: which of them train, and which recompute their activations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.convnext import CNBlock
from torchvision.models.resnet import BasicBlock, Bottleneck

STAGE_COUNT = 5  # of every backbone, the stem counted in

_RESNET = (("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",))
# A ConvNeXt's stages, each with the downsampling before it, and the last with the norm behind it.
_CONVNEXT = (
    ("features.0",),
    ("features.1",),
    ("features.2", "features.3"),
    ("features.4", "features.5"),
    ("features.6", "features.7", "classifier.0"),
)


def stages_of(backbone: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Return the names of a backbone's parts with parameters, stage by stage from the input on; see ``build_backbone``."""
    return _CONVNEXT if str(backbone.arch).startswith("convnext") else _RESNET


def train_top_stages(backbone: nn.Module, count: int) -> None:
    """Let the `count` stages nearest to the output train and freeze the others.

    A frozen stage gets no gradient, and none is computed for it; its batch norms use and keep their running statistics.
    """
    for depth, names in enumerate(reversed(stages_of(backbone))):
        trains = depth < count
        for name in names:
            backbone.get_submodule(name).train(trains).requires_grad_(trains)


def checkpoint_activations(backbone: nn.Module, compiled: bool = False) -> None:
    """Make each block forget its activations and compute them again in the backward pass (Chen et al. 2016, arXiv:1604.06174).

    Memory falls to about a block's activations and the blocks' inputs, for one forward pass more. Gradients and batch norms
    are those without it, bit for bit: the second pass leaves the running statistics alone.

    Parameters
    ----------
    backbone
        See ``build_backbone``.
    compiled
        Whether torch.compile will take the backbone in: it leaves the statistics alone by itself, and takes no contexts.
    """
    for block in backbone.modules():
        if isinstance(block, (BasicBlock, Bottleneck, CNBlock)):
            contexts: dict[str, Any] = {} if compiled else {"context_fn": partial(_contexts, block)}
            # The attribute hides the method: the module's names, and so its state dict, stay as they are.
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, **contexts)


def _contexts(block: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    return nullcontext(), _kept_statistics(block)


@contextmanager
def _kept_statistics(block: nn.Module) -> Iterator[None]:
    """Let batch norms compute as in training, without touching their running statistics."""
    norms = [module for module in block.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, tracked) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, tracked
