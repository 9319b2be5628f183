"""Other ways to compute a ResNet's first convolution: 7 x 7, stride 2, one channel, a shape that suits no tensor core.

Each keeps the convolution's weight under the same name and gives the same outputs and gradients (up to rounding), so
checkpoints fit with and without it.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class PaddedStem(nn.Module):
    """The convolution with the input padded with channels of zeros: NHWC kernels need a multiple of 8 channels.

    Parameters
    ----------
    conv
        Without bias; its weight is shared.
    channels
        Number of channels after padding.
    """

    def __init__(self, conv: nn.Conv2d, channels: int = 8) -> None:
        super().__init__()
        self.weight = conv.weight
        self.stride, self.padding = conv.stride, conv.padding
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of (N, C, H, W)."""
        missing = (0, 0, 0, 0, 0, self.channels - x.shape[1])
        return F.conv2d(F.pad(x, missing), F.pad(self.weight, missing), stride=self.stride, padding=self.padding)


class SpaceToDepthStem(nn.Module):
    """A 7 x 7 convolution of stride 2 and padding 3 over one channel, as 4 x 4 of stride 1 over four at half the resolution.

    ``y[i] = sum_a w[a] x[2 i + a - 3]``: with a row of zeros before w and four pixels of zeros before x, tap a of 8 reads
    ``x[2 i + a]``, and the even and the odd taps are two convolutions of stride 1 over the even and the odd pixels.
    Of 64 products of a tap and a pixel 49 are not 0.

    Parameters
    ----------
    conv
        7 x 7, stride 2, padding 3, one channel, without bias; its weight is shared.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        form = (conv.kernel_size, conv.stride, conv.padding, conv.in_channels, conv.bias)
        if form != ((7, 7), (2, 2), (3, 3), 1, None):
            raise ValueError(f"not a 7 x 7 convolution of stride 2 and padding 3 over one channel without bias: {conv}")
        self.weight = conv.weight

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of (N, 1, H, W); H and W even."""
        pixels = F.pad(F.pixel_unshuffle(x, 2), (2, 1, 2, 1))
        return F.conv2d(pixels, F.pixel_unshuffle(F.pad(self.weight, (1, 0, 1, 0)), 2))
