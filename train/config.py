"""The options of training and inference. They live apart from the code they configure, so that --help need not import torch."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from common.errors import BadInput
from common.options import option
from models.architectures import ARCHITECTURES


@dataclass(frozen=True)
class RuntimeConfig:
    """What both trainings and inference share: where they run and how they read."""

    batch_size: int = option(32, "Tiles a batch, of each process where torchrun started several.")
    num_workers: int = option(min(16, os.cpu_count() or 1), "CPU threads that decode and augment tiles.")
    device: str = option("auto", "auto = the GPU where there is one, else the CPU.", choices=("auto", "cpu", "cuda"))
    precision: str = option(
        "auto",
        "auto = bf16 on a GPU that has it, fp16 on an older one, fp32 on the CPU.",
        choices=("auto", "fp32", "bf16", "fp16"),
    )

    def __post_init__(self) -> None:
        _require_positive(self, "batch_size", "num_workers")


@dataclass(frozen=True)
class TrainingConfig(RuntimeConfig):
    """What both trainings share."""

    seed: int = option(0, "Seed of the weights, the order of tiles and the augmentations.")
    gradient_clip: float = option(1.0, "Largest gradient norm; larger ones are scaled down.")
    wandb_project: str = option("mammostream", "Weights & Biases project.")
    wandb_mode: str = option(
        "auto",
        "auto = online where a key is set up, else offline below the run's folder; metrics.jsonl is always written.",
        choices=("auto", "online", "offline", "disabled"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(self, "epochs", "gradient_clip")
        _require_not_negative(self, "seed", "weight_decay")


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
    save_every: int = option(10, "Keep a checkpoint of its own every so many epochs.")
    save_every_steps: int | None = option(
        None, "Save the last checkpoint every so many steps too, not only after each epoch; a run goes on from it exactly."
    )
    max_steps: int | None = option(None, "Stop after so many steps; the schedules then end there. Default: --epochs decides.")
    limit_tiles: int | None = option(None, "Use only this many tiles, for a quick trial.")
    views: str | None = option(None, "YAML or JSON file with view1 and view2, instead of the recipe's views.")
    view_size: int | None = option(
        None,
        "Edge of the views in pixels; default: the tiles'. A smaller one shows the whole tile, or the recipe's crop.",
    )
    mmap: bool = option(True, "Map the tars into memory; --no-mmap reads them, as network file systems (NFS, Lustre) want it.")
    accumulate: int = option(
        1,
        "Batches a step: their gradients are averaged, so the memory stays that of one. The batch norms still see one batch at "
        "a time: it does not replace a larger --batch-size.",
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
        "Stop after so many steps in a row whose gradients are not finite; single ones are skipped and counted. fp16 may need "
        "up to 16 at the start to find its scale.",
    )
    on_collapse: str = option(
        "warn",
        "What to do where all tiles begin to look alike to the network: warn, or save and stop with exit code 2.",
        choices=("warn", "stop"),
    )
    probe_csv: str | None = option(
        None,
        "CSV of tile_path and 0/1 columns: every few epochs a linear and a nearest-neighbour probe learn from frozen features, "
        "no patient on both sides; the linear probe's AUC then decides which epoch is best.",
    )
    probe_every: int = option(5, "Epochs between two probes; the last epoch is probed, too.")
    probe_class_names: tuple[str, ...] = option((), "Columns to probe; default: all that hold only 0, 1 and empty.")
    probe_tiles: int = option(2000, "Probe at most this many of the labelled tiles, the same ones each time.")

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(self, "lr", "hidden_dim", "proj_dim", "save_every", "limit_tiles", "save_every_steps", "max_steps")
        _require_positive(self, "view_size", "accumulate", "max_bad_steps", "probe_every", "probe_tiles")
        _require_not_negative(self, "warmup_epochs")
        if self.batch_size < 2:
            raise BadInput("--batch-size 1 is too small for BYOL's batch norm; use at least 2")
        if not 0 <= self.momentum <= 1:
            raise BadInput(f"--momentum {self.momentum} is not between 0 and 1")


@dataclass(frozen=True)
class FinetuneConfig(TrainingConfig):
    """Multi-label classification on a pre-trained backbone: AdamW, cosine schedule, a frozen phase first."""

    arch: str | None = option(
        None, "Backbone; default: the checkpoint's. Another than the checkpoint's is refused.", choices=ARCHITECTURES
    )
    epochs: int = option(50, "Passes over the training tiles.")
    lr_backbone: float = option(1e-5, "Peak learning rate of the pre-trained backbone (AdamW, one cosine to 0).")
    lr_head: float = option(1e-3, "Peak learning rate of the classification head (AdamW, one cosine to 0).")
    freeze_backbone_epochs: int = option(
        10, "First epochs that train the head alone; the batch norms' statistics stay too (0 = never freeze)."
    )
    unfreeze_every: int = option(
        0,
        "After the frozen epochs unfreeze a stage of the backbone every so many epochs, the last one first (0 = all at once).",
    )
    label_smoothing: float = option(0.1, "Pull labels this far towards 0.5: 1 becomes 1 - s/2, 0 becomes s/2.")
    weight_decay: float = option(1e-4, "AdamW's weight decay.")
    dropout: float = option(0.2, "Share of the head's hidden features dropped in training, 0 to below 1.")
    loss: str = option(
        "bce",
        "bce = binary cross entropy; focal = less weight to what is easy (Lin et al. 2017); asymmetric = less weight to easy "
        "negatives (Ridnik et al. 2021).",
        choices=("bce", "focal", "asymmetric"),
    )
    pos_weight: tuple[str, ...] = option(
        (), "Weight of positive labels: auto = negatives / positives of each class, or a number for each class; default: 1."
    )
    focal_gamma: float = option(2.0, "--loss focal: how steeply easy labels lose weight.")
    asymmetric_gamma_positive: float = option(0.0, "--loss asymmetric: how steeply easy positives lose weight.")
    asymmetric_gamma_negative: float = option(4.0, "--loss asymmetric: how steeply easy negatives lose weight.")
    asymmetric_margin: float = option(0.05, "--loss asymmetric: negatives predicted below this probability do not count.")
    mixup_alpha: float = option(0.0, "Blend tiles and labels in pairs, by a share from Beta(alpha, alpha) (0 = off).")
    ema_decay: float = option(
        0.0, "Evaluate and save an average of the weights over about the last 1 / (1 - decay) steps (0 = off)."
    )
    early_stopping: int = option(
        0,
        "Stop after so many epochs without a better validation AUC, counted once nothing is left to unfreeze (0 = never).",
    )
    gradient_checkpointing: bool = option(
        False, "Compute activations twice instead of keeping them: less memory for a second forward pass, the same result."
    )
    max_samples: int | None = option(None, "Use at most this many tiles of each CSV, for a quick trial.")

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(self, "max_samples")
        _require_not_negative(
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
                    f"--pos-weight {' '.join(self.pos_weight)}: '{value}' is no number above 0; give auto or numbers"
                )


@dataclass(frozen=True)
class EmbedConfig(RuntimeConfig):
    """A network run over tiles, without training."""

    compile: str = option(
        "auto",
        "torch.compile: half a minute at the start, then on a CPU nearly twice as fast (it needs a C++ compiler); auto = on a "
        "GPU only.",
        choices=("auto", "on", "off"),
    )

    def compiles(self, device: str) -> bool:
        """Whether the network is compiled on a device, ``cpu`` or ``cuda``."""
        return self.compile == "on" or (self.compile == "auto" and device == "cuda")


@dataclass(frozen=True)
class InferConfig(EmbedConfig):
    """Prediction over shards, films or tile images."""

    threshold: float | None = option(
        None,
        "Probability from which every class counts as found, 0-1; default: those that the checkpoint's validation gave, else "
        "0.5. Tables hold the probabilities themselves.",
    )
    temperature: float | None = option(
        None, "Logits are divided by it, so that probabilities are calibrated; default: the checkpoint's, else 1."
    )
    top_tiles: int = option(3, "Of how many of its highest tiles an image's or breast's top score is the mean.")
    embeddings: bool = option(False, "Add each tile's features to the tile table (Parquet and JSON).")

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(self, "temperature", "top_tiles")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise BadInput(f"--threshold {self.threshold} is not a probability between 0 and 1")


@dataclass(frozen=True)
class ProbeConfig(RuntimeConfig):
    """Linear and nearest-neighbour probes of frozen features."""

    seeds: tuple[str, ...] = option(
        ("0", "1", "2"), "Seeds of the random weights, of the labels drawn and of the folds of patients."
    )
    score: str = option(
        "max", "An image's or breast's score: its highest tile's, or the mean of its three highest.", choices=("max", "top3")
    )
    bootstrap: int = option(1000, "Resamples of patients for the 95 % intervals (0 = none).")

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_not_negative(self, "bootstrap")
        if not all(seed.isdecimal() for seed in self.seeds) or not 0 < len(set(map(int, self.seeds))) == len(self.seeds):
            raise BadInput(f"--seeds {' '.join(self.seeds)}: give different whole numbers from 0 on")

    @property
    def seed_numbers(self) -> tuple[int, ...]:
        """The seeds as numbers."""
        return tuple(map(int, self.seeds))


def _require_positive(config: RuntimeConfig, *names: str) -> None:
    """Raise BadInput for the first of the options that is given and not above 0."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise BadInput(f"--{name.replace('_', '-')} {value} is not positive")


def _require_not_negative(config: RuntimeConfig, *names: str) -> None:
    """Raise BadInput for the first of the options that is given and below 0."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= 0:
            raise BadInput(f"--{name.replace('_', '-')} {value} is negative")


def _is_positive(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False
