"""Folding batch norms into the convolutions before them: the same function in evaluation, with fewer passes over memory."""

from __future__ import annotations

import copy

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def fold_batch_norms(module: nn.Module) -> nn.Module:
    """Return a copy whose batch norms are merged into the convolutions that feed them.

    A batch norm with fixed statistics is one factor and one shift per channel, which the convolution's weights and bias can
    absorb. The result is equal up to rounding. The traced graph shows which batch norm follows which convolution; a convolution
    whose output is also used elsewhere is left alone.

    Parameters
    ----------
    module
        In evaluation mode and traceable by torch.fx, as torchvision's networks are.

    Returns
    -------
    nn.Module
        Same class; folded batch norms are ``nn.Identity``.
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
