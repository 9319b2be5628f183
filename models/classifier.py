"""A backbone with a multi-label classification head."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from mammostream.models.backbones import encode, with_input_channels


class Pretrained(Protocol):
    """What a classifier needs from a pre-trained model; :class:`mammostream.models.byol.MammogramBYOL` is one."""

    backbone: nn.Module
    input_dim: int


def build_classification_head(
    input_dim: int, num_classes: int, dropout: float = 0.2, hidden_dim: int | None = None
) -> nn.Sequential:
    """Return Linear, ReLU, Dropout, Linear: one logit per label. By default the hidden layer is as wide as the input."""
    hidden_dim = hidden_dim or input_dim
    return nn.Sequential(
        nn.Linear(input_dim, hidden_dim),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
        nn.Linear(hidden_dim, num_classes),
    )


class MammogramClassifier(nn.Module):
    """Multi-label classifier of mammogram tiles.

    Labels are not mutually exclusive: ``torch.sigmoid`` of the logits gives a probability per label.

    Parameters
    ----------
    backbone
        Maps (N, 1, H, W), or (N, 3, H, W), to (N, dim); tiles get as many channels as its first convolution takes.
    classification_head
        Maps (N, dim) to (N, classes), see :func:`build_classification_head`.
    """

    def __init__(self, backbone: nn.Module, classification_head: nn.Module) -> None:
        super().__init__()
        self.backbone = with_input_channels(backbone)
        self.classification_head = classification_head

    @classmethod
    def from_byol(cls, byol: Pretrained, num_classes: int, dropout: float = 0.2) -> MammogramClassifier:
        """Take a pre-trained model's online backbone (shared, not copied) and put a new, random head on it."""
        return cls(byol.backbone, build_classification_head(byol.input_dim, num_classes, dropout))

    def get_features(self, x: Tensor) -> Tensor:
        """Return features (N, dim) of normalised tiles (N, 1, H, W) or (N, 3, H, W), whichever the backbone takes."""
        return encode(self.backbone, x)

    def classify(self, x: Tensor) -> Tensor:
        """Return logits (N, classes) of normalised tiles (N, 1, H, W) or (N, 3, H, W), whichever the backbone takes."""
        return self.classification_head(self.get_features(x))

    forward = classify
