"""The options of fine-tuning."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mammostream.common.errors import BadInput
from mammostream.common.options import option
from mammostream.models.architectures import ARCHITECTURES
from mammostream.train.run.config import TrainingConfig, require_not_negative, require_positive


@dataclass(frozen=True)
class FinetuneConfig(TrainingConfig):
    """Multi-label classification on a pre-trained backbone: AdamW, cosine schedule, backbone frozen at first."""

    arch: str | None = option(None, "Backbone; default: the checkpoint's. Any other is refused.", choices=ARCHITECTURES)
    epochs: int = option(50, "Passes over the training tiles.")
    lr_backbone: float = option(1e-5, "Peak learning rate of the pre-trained backbone (AdamW, one cosine to 0).")
    lr_head: float = option(1e-3, "Peak learning rate of the classification head (AdamW, one cosine to 0).")
    freeze_backbone_epochs: int = option(
        10, "Number of first epochs that train the head alone; batch-norm statistics are frozen too (0 = never freeze)."
    )
    unfreeze_every: int = option(
        0,
        "After the frozen epochs unfreeze a stage of the backbone every this many epochs, the last stage first (0 = all at "
        "once).",
    )
    weight_decay: float = option(1e-4, "AdamW's weight decay.")
    dropout: float = option(0.2, "Dropout rate of the head's hidden features, in [0, 1).")
    loss: str = option(
        "bce",
        "bce = binary cross entropy; focal = less weight on easy labels (Lin et al. 2017); asymmetric = less weight on easy "
        "negatives (Ridnik et al. 2021).",
        choices=("bce", "focal", "asymmetric"),
    )
    label_smoothing: float | None = option(
        None,
        "Pull labels this far towards 0.5: 1 becomes 1 - s/2, 0 becomes s/2; default: 0.1 for --loss bce, 0 for the others, "
        "which weigh labels by how well they are predicted.",
    )
    sampling: str = option(
        "natural",
        "Tiles of an epoch: natural = each once; balanced = as many draws, equally many from the positives of each class and "
        "from the tiles positive in none (where a missing label counts as not positive); each of these sets is gone through "
        "evenly, a small one several times, and of a large one another part each epoch.",
        choices=("natural", "balanced"),
    )
    pos_weight: tuple[str, ...] = option(
        (),
        "Weight of positive labels: auto = negatives / positives of each class, as --sampling draws them; or one number per "
        "class; default: 1.",
    )
    focal_gamma: float = option(2.0, "--loss focal: how steeply easy labels lose weight.")
    asymmetric_gamma_positive: float = option(0.0, "--loss asymmetric: how steeply easy positives lose weight.")
    asymmetric_gamma_negative: float = option(4.0, "--loss asymmetric: how steeply easy negatives lose weight.")
    asymmetric_margin: float = option(0.05, "--loss asymmetric: negatives predicted below this probability do not count.")
    mixup_alpha: float = option(0.0, "Blend pairs of tiles and their labels, with a weight from Beta(alpha, alpha) (0 = off).")
    ema_decay: float = option(
        0.0, "Evaluate and save an average of the weights over about the last 1 / (1 - decay) steps (0 = off)."
    )
    early_stopping: int = option(
        0,
        "Stop after this many epochs without a better validation AUC, counted once nothing is left to unfreeze (0 = never).",
    )
    gradient_checkpointing: bool = option(
        False, "Recompute activations instead of storing them: less memory, one more forward pass, the same result."
    )
    save_every_steps: int | None = option(
        None, "Save last_classification_model.pth every this many steps too; default: after each epoch, and when stopped."
    )
    max_samples: int | None = option(None, "Use at most this many tiles of each CSV, for a quick trial.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_smoothing is None:
            object.__setattr__(self, "label_smoothing", 0.1 if self.loss == "bce" else 0.0)
        require_positive(self, "max_samples", "save_every_steps")
        require_not_negative(
            self,
            *("lr_backbone", "lr_head", "freeze_backbone_epochs", "unfreeze_every", "focal_gamma", "mixup_alpha"),
            *("asymmetric_gamma_positive", "asymmetric_gamma_negative", "early_stopping"),
        )
        for name in ("label_smoothing", "dropout", "asymmetric_margin", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise BadInput(f"--{name.replace('_', '-')} {getattr(self, name)} is not in [0, 1)")
        for value in self.pos_weight:
            if not (_is_positive(value) or self.pos_weight == ("auto",)):
                raise BadInput(
                    f"--pos-weight {' '.join(self.pos_weight)}: '{value}' is not a number above 0; give auto or numbers"
                )


def _is_positive(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False
