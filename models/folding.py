"""Batch norms folded into the convolutions before them: the same function in evaluation, with fewer passes over memory."""

from __future__ import annotations

import copy

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def fold_batch_norms(module: nn.Module) -> nn.Module:
    """Return a copy whose batch norms are part of the convolutions that feed them.

    A batch norm with fixed statistics is a factor and a shift a channel, which the convolution's weights and bias can hold.
    Equal up to rounding. Which batch norm follows which convolution is read from the traced graph; what else takes a
    convolution's output keeps both apart.

    Parameters
    ----------
    module
        In evaluation mode, traceable by torch.fx, as torchvision's networks are.

    Returns
    -------
    nn.Module
        Of the same class, folded batch norms being ``nn.Identity``.
    """
    folded = copy.deepcopy(module)
    for node in fx.symbolic_trace(folded).graph.nodes:
        if node.op != "call_module" or not isinstance(node.args[0], fx.Node) or node.args[0].op != "call_module":
            continue
        before = node.args[0]
        conv, norm = folded.get_submodule(str(before.target)), folded.get_submodule(str(node.target))
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and len(before.users) == 1:
            folded.set_submodule(str(before.target), fuse_conv_bn_eval(conv, norm))
            folded.set_submodule(str(node.target), nn.Identity())
    return folded
