"""The options of BYOL pre-training."""

from __future__ import annotations

from dataclasses import dataclass

from mammostream.common.errors import BadInput
from mammostream.common.options import option
from mammostream.models.architectures import ARCHITECTURES
from mammostream.train.run.config import TrainingConfig, require_not_negative, require_positive


@dataclass(frozen=True)
class PretrainConfig(TrainingConfig):
    """BYOL pre-training (Grill et al. 2020)."""

    recipe: str = option(
        "guide",
        "Views, learning rate and what scales with the effective batch (batch x processes x accumulated). guide: rotation, "
        "scale, flips, contrast, blur; AdamW, 2e-3 at any batch, decay of all parameters. mammo: also crops; AdamW, 3e-4 x "
        "sqrt(batch / 32), no decay of norms and biases, momentum to the power batch / 32.",
        choices=("guide", "mammo"),
    )
    arch: str = option("resnet50", "Backbone.", choices=ARCHITECTURES)
    weights: str = option("none", "Backbone to start from: none, imagenet, or a file with a state dict.")
    epochs: int = option(100, "Passes over the tiles.")
    warmup_epochs: float = option(10.0, "Epochs of linear warm-up; at most a tenth of --epochs is used.")
    optimizer: str = option(
        "auto",
        "auto = the recipe's, AdamW; lars = layer-wise rates for large batches (You et al. 2017), 0.2 x batch / 256.",
        choices=("auto", "adamw", "lars"),
    )
    lr: float | None = option(None, "Peak learning rate; default: the recipe's or the optimizer's.")
    weight_decay: float | None = option(None, "Weight decay; default: 1e-4 for AdamW, 1.5e-6 for LARS.")
    momentum: float = option(
        0.996, "Momentum of the target network at the start, at a batch of 32 with --recipe mammo; a cosine takes it to 1."
    )
    concat_views: bool = option(
        False, "Pass both views through the networks in one batch, so that batch norms see both; default: each on its own."
    )
    hidden_dim: int = option(4096, "Hidden width of the projection and prediction heads.")
    proj_dim: int = option(256, "Output width of the heads.")
    compile: str = option(
        "auto", "torch.compile; auto = on a GPU that Triton supports (compute capability 7.0).", choices=("auto", "on", "off")
    )
    cuda_graphs: bool = option(
        False, "Replay the compiled step as CUDA graphs: for small batches, where starting kernels takes longer than they do."
    )
    save_every: int = option(10, "Keep a separate checkpoint every this many epochs.")
    save_every_steps: int | None = option(
        None, "Save the last checkpoint every this many steps too, not only after each epoch; a run resumes from it exactly."
    )
    max_steps: int | None = option(None, "Stop after this many steps; the schedules then end there. Default: --epochs decides.")
    limit_tiles: int | None = option(None, "Use only this many tiles, for a quick trial.")
    views: str | None = option(None, "YAML or JSON file with view1 and view2, instead of the recipe's views.")
    view_size: int | None = option(
        None,
        "Edge of the views in pixels; default: the tiles'. A smaller one shows the whole tile, or the recipe's crop.",
    )
    mmap: bool = option(True, "Map the tars into memory; --no-mmap reads them, as network file systems (NFS, Lustre) want it.")
    accumulate: int = option(
        1,
        "Batches per step: their gradients are averaged, so the memory stays that of one. The batch norms still see one batch "
        "at a time: it does not replace a larger --batch-size.",
    )
    gradient_checkpointing: bool = option(
        False, "Compute activations twice instead of keeping them: less memory for a second forward pass, the same result."
    )
    sync_bn: str = option(
        "auto",
        "Batch norms over the batches of all processes that torchrun started; auto = wherever there are several.",
        choices=("auto", "on", "off"),
    )
    deterministic: bool = option(
        False,
        "Only algorithms that give the same bits each time, so that a resumed run equals an uninterrupted one on a GPU too; "
        "slower there, since the fastest convolutions are none of them. On a CPU a run is bit-equal without it.",
    )
    max_bad_steps: int = option(
        20,
        "Stop after this many steps in a row whose gradients are not finite; single ones are skipped and counted. fp16 may "
        "need up to 16 at the start to find its scale.",
    )
    on_collapse: str = option(
        "warn",
        "What to do where tiles begin to look alike to the network, or their views find each other much less often than at the "
        "start: warn, or save and stop with exit code 2.",
        choices=("warn", "stop"),
    )
    probe_csv: str | None = option(
        None,
        "CSV of tile_path and 0/1 columns: every few epochs a linear and a nearest-neighbour probe of frozen features learn "
        "from the split train and score val, or cross-validate by patient where only one of them has labels; the linear "
        "probe's AUC then decides which epoch is best. Labels of the split test are not used.",
    )
    probe_every: int = option(5, "Epochs between two probes; the last epoch is probed, too.")
    probe_class_names: tuple[str, ...] = option((), "Columns to probe; default: all that hold only 0, 1 and empty.")
    probe_tiles: int = option(2000, "Probe at most this many of the labelled tiles, the same ones each time.")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "lr", "hidden_dim", "proj_dim", "save_every", "limit_tiles", "save_every_steps", "max_steps")
        require_positive(self, "view_size", "accumulate", "max_bad_steps", "probe_every", "probe_tiles")
        require_not_negative(self, "warmup_epochs")
        if self.batch_size < 2:
            raise BadInput("--batch-size 1 is too small for BYOL's batch norm; use at least 2")
        if not 0 <= self.momentum <= 1:
            raise BadInput(f"--momentum {self.momentum} is not between 0 and 1")
