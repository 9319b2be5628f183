"""Writes a BYOL checkpoint's backbone in half precision, cut into pieces for a transfer that limits a file's size.

python benchmarks/gpu/half_weights.py CHECKPOINT.pth NAME     # NAME.pth.00, NAME.pth.01, ... of 15 MiB
cat NAME.pth.?? > NAME.pth                                # load_byol, finetune and probe take it
"""

from __future__ import annotations

import sys
from io import BytesIO
from pathlib import Path

import torch

from mammostream.models.checkpoints import load_checkpoint

PIECE = 15 * 2**20  # bytes


def write_pieces(checkpoint: Path, name: Path) -> None:
    """Write the pieces next to each other."""
    state = load_checkpoint(checkpoint, "byol")["model_state_dict"]
    halved = {
        key: value.half() if value.is_floating_point() else value for key, value in state.items() if key.startswith("backbone.")
    }
    stored = BytesIO()
    torch.save({"model_state_dict": halved}, stored)
    data = stored.getvalue()
    for number, start in enumerate(range(0, len(data), PIECE)):
        name.with_name(f"{name.name}.pth.{number:02d}").write_bytes(data[start : start + PIECE])


if __name__ == "__main__":
    write_pieces(Path(sys.argv[1]), Path(sys.argv[2]))
