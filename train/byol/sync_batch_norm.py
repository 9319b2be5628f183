"""Batch norm over the tiles of all processes, on CPUs too: torch's own (``nn.SyncBatchNorm``) needs CUDA."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm

M = TypeVar("M", bound=nn.Module)


def synchronise_batch_norms(model: M, device: torch.device) -> M:
    """Return `model` with batch norms that normalise by the statistics of all processes' batches in training.

    Names, parameters and statistics stay as they are, so state dicts fit both ways.

    Parameters
    ----------
    model
        Changed in place.
    device
        CUDA takes torch's own layer, the CPU :class:`GlooBatchNorm`.
    """
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, _BatchNorm):
                setattr(module, name, GlooBatchNorm.of(child))
    return model


class GlooBatchNorm(_BatchNorm):
    """Synchronised batch norm out of differentiable sums over the processes; it works with any backend, also gloo.

    (N, C, ...) of any number of dimensions; the processes may have different N. The variance is that of the deviations from
    the common mean, in a second sum: the mean of squares less the square of the mean would lose digits.
    """

    @classmethod
    def of(cls, norm: _BatchNorm) -> GlooBatchNorm:
        """Return a layer with the parameters, the statistics and the mode of `norm`."""
        made = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        made.__dict__.update(norm.__dict__)
        return made

    def _check_input_dim(self, x: Tensor) -> None:
        if x.ndim < 2:
            raise ValueError(f"expected at least 2 dimensions, got {x.ndim}")

    def forward(self, x: Tensor) -> Tensor:
        """Normalise; in evaluation as any batch norm does."""
        self._check_input_dim(x)
        if not self.training or not distributed.is_initialized():
            return super().forward(x)
        dims = [0, *range(2, x.ndim)]
        shape = [1, -1, *(1 for _ in dims[1:])]
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        sums = all_reduce(torch.cat([values.sum(dims), values.new_tensor([values.numel() / x.shape[1]])]))
        mean, count = sums[:-1] / sums[-1], sums[-1].detach()
        centred = values - mean.view(shape)
        variance = all_reduce(centred.square().sum(dims)) / count
        if self.track_running_stats:
            self._follow(mean.detach(), variance.detach() * count / (count - 1))
        normalised = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            normalised = torch.addcmul(self.bias.view(shape), self.weight.view(shape), normalised)
        return normalised.to(x.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics as torch does: the variance unbiased, by `momentum` or as a plain average."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        momentum = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance, momentum)
