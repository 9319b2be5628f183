"""The options of learned aggregation."""

from __future__ import annotations

from dataclasses import dataclass

from mammostream.common.errors import BadInput
from mammostream.common.options import option
from mammostream.train.levels.calibration import BREAST, IMAGE, PATIENT
from mammostream.train.run.config import TrainingConfig, require_positive

LEVELS = (IMAGE, BREAST, PATIENT)


@dataclass(frozen=True)
class AggregateConfig(TrainingConfig):
    """Heads over bags of tile features: gated attention, and simple poolings beside it."""

    level: str = option("breast", "What a bag is and has one label: an image, a breast or a patient.", choices=LEVELS)
    epochs: int = option(40, "Passes over the training bags.")
    lr: float = option(3e-4, "Peak learning rate (AdamW, one cosine to 0).")
    weight_decay: float = option(1e-3, "AdamW's weight decay.")
    hidden_dim: int = option(128, "Width of what each tile's features are projected to.")
    attention_dim: int = option(64, "Width of the attention's gate.")
    attention: str = option("shared", "One attention for all classes, or one per class.", choices=("shared", "per-class"))
    position: bool = option(
        False, "Tell the heads where each tile lies (mm from the film's upper left corner), and its film's view and side."
    )
    top: int = option(3, "Pooling 'top': of how many of a bag's highest tiles the mean is taken.")
    dropout: float = option(0.25, "Dropout rate of the projected features, in [0, 1).")
    label_smoothing: float = option(0.0, "Pull labels this far towards 0.5: 1 becomes 1 - s/2, 0 becomes s/2.")
    pos_weight: tuple[str, ...] = option(
        (), "Weight of positive labels: auto = negatives / positives of each class, or one number per class; default: 1."
    )
    early_stopping: int = option(10, "Stop after this many epochs in which no head's validation AUC got better (0 = never).")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "lr", "hidden_dim", "attention_dim", "top")
        for name in ("dropout", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise BadInput(f"--{name.replace('_', '-')} {getattr(self, name)} is not in [0, 1)")
        if self.early_stopping < 0:
            raise BadInput(f"--early-stopping {self.early_stopping} is negative")
