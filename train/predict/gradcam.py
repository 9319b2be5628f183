"""Grad-CAM: where in a tile a class's answer comes from (Selvaraju et al. 2017, arXiv:1610.02391)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mammostream.models.classifier import MammogramClassifier


def grad_cam(model: MammogramClassifier, tiles: Tensor, class_index: int) -> Tensor:
    """Return where in each tile the evidence for a class lies.

    A channel of the last feature map counts as much as the class's logit rises with it, on average over its positions; the map
    is the sum of the channels so weighted, without its negative part. Its resolution is the feature map's: 1/32 of the
    tile's, whatever size it is enlarged to.

    Parameters
    ----------
    model
        In evaluation mode. Its backbone pools its last feature map in a module called ``avgpool``.
    tiles
        (N, 1, H, W), normalised, on the model's device.
    class_index
        Which logit.

    Returns
    -------
    Tensor
        (N, H, W) float32 on the same device; each tile's highest point is 1, or all are 0 where nothing speaks for the class.
    """
    maps: list[Tensor] = []

    def keep(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        maps.append(inputs[0].detach().requires_grad_())
        # Only what comes after needs gradients: the layers before, and their memory, do without.
        torch.set_grad_enabled(True)
        return (maps[0],)

    with model.backbone.get_submodule("avgpool").register_forward_pre_hook(keep), torch.no_grad():
        logits = model.classify(tiles)
    # Tiles do not touch each other in evaluation mode: the gradient of the sum holds each tile's own.
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(logits[:, class_index].sum(), maps[0])
    weights = gradient.mean(dim=(2, 3), keepdim=True)
    cam = F.relu((weights * maps[0].detach()).sum(1, keepdim=True)).float()
    cam = F.interpolate(cam, size=tiles.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    highest = cam.amax(dim=(1, 2), keepdim=True)
    return torch.where(highest > 0, cam / highest, cam)
