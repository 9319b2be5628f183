"""The options of prediction and of embedding."""

from __future__ import annotations

from dataclasses import dataclass

from mammostream.common.errors import BadInput
from mammostream.common.options import option
from mammostream.train.run.config import RuntimeConfig, require_positive


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
        "Probability from which every class counts as found, 0-1, in tiles, images and breasts; default: those of each level "
        "that the checkpoint's validation gave, else 0.5. Tables hold the probabilities themselves.",
    )
    temperature: float | None = option(
        None,
        "Divide logits by this instead of calibrating them as the checkpoint says; images and breasts then have raw scores.",
    )
    top_tiles: int = option(3, "Of how many of its highest tiles an image's or breast's top score is the mean.")
    embeddings: bool = option(False, "Add each tile's features to the tile table (Parquet and JSON).")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "temperature", "top_tiles")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise BadInput(f"--threshold {self.threshold} is not a probability between 0 and 1")
