"""The options of a probe."""

from __future__ import annotations

from dataclasses import dataclass

from mammostream.common.errors import BadInput
from mammostream.common.options import option
from mammostream.train.run.config import RuntimeConfig, require_not_negative


@dataclass(frozen=True)
class ProbeConfig(RuntimeConfig):
    """Linear and nearest-neighbour probes of frozen features."""

    seeds: tuple[str, ...] = option(
        ("0", "1", "2"), "Seeds of the random weights, the draw of labels and the folds of patients."
    )
    score: str = option(
        "max", "Score of an image or breast: its highest tile score, or the mean of its three highest.", choices=("max", "top3")
    )
    bootstrap: int = option(1000, "Resamples of patients for the 95 % intervals (0 = none).")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_not_negative(self, "bootstrap")
        if not all(seed.isdecimal() for seed in self.seeds) or not 0 < len(set(map(int, self.seeds))) == len(self.seeds):
            raise BadInput(f"--seeds {' '.join(self.seeds)}: give different whole numbers from 0 on")

    @property
    def seed_numbers(self) -> tuple[int, ...]:
        """The seeds as numbers."""
        return tuple(map(int, self.seeds))
