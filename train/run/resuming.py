"""Resuming an interrupted training: which checkpoint, and whether it belongs to this run."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mammostream.common.errors import BadInput, first_line
from mammostream.models.checkpoints import load_checkpoint
from mammostream.train.run.config import TrainingConfig


def find_resume(resume: str | None, last: Path) -> Path | None:
    """Return the checkpoint that ``--resume`` names: none, a path, or for ``auto`` the run's last one if there is one.

    Parameters
    ----------
    resume
        The option.
    last
        Where the run keeps its last checkpoint.

    Raises
    ------
    BadInput
        The run's folder holds checkpoints and ``--resume`` is not given: they would be overwritten.
    """
    if resume is None:
        if last.exists():
            raise BadInput(f"{last} is there already; resume with --resume auto, or choose another --output-dir")
        return None
    if resume == "auto":
        return last if last.exists() else None
    return Path(resume)


def load_to_resume(path: Path, kind: str) -> dict[str, Any]:
    """Read the checkpoint to resume from.

    Parameters
    ----------
    path
        The checkpoint.
    kind
        As for :func:`mammostream.models.checkpoints.load_checkpoint`.

    Raises
    ------
    BadInput
        It cannot be read, or holds nothing to resume from. Where an older one next to it can, the error names it.
    """
    try:
        return _load(path, kind)
    except BadInput as error:
        others = [other for other in path.parent.glob("*.pth") if other != path] if path.is_file() else []
        for older in sorted(others, key=lambda p: p.stat().st_mtime, reverse=True):
            try:
                step = _load(older, kind)["step"]
            except BadInput:
                continue
            raise BadInput(f"{error}. An older one is whole, of step {step}: resume with --resume {older}") from error
        raise


def _load(path: Path, kind: str) -> dict[str, Any]:
    checkpoint = load_checkpoint(path, kind)
    if "resume" not in checkpoint:
        raise BadInput(f"checkpoint {path} holds nothing to resume from; resume from one that this version wrote")
    return checkpoint


def check_same_options(path: Path, trained: Mapping[str, Any], config: TrainingConfig, free: Collection[str]) -> None:
    """Check that a checkpoint's training had this one's options, but for the `free` ones, which change no result.

    Raises
    ------
    BadInput
        Naming the first that differs.
    """
    for name, value in asdict(config).items():
        if name not in free and trained.get(name) != value:
            flag = f"--{name.replace('_', '-')}"
            raise BadInput(f"checkpoint {path} was trained with {flag} {trained.get(name)}, not {value}; resume with it")


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the states of torch's random generators that a training draws from."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(state: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Set what :func:`random_state` returned; a GPU's is ignored where there is none.

    Raises
    ------
    ValueError
        It is not a state.
    """
    try:
        torch.set_rng_state(state["cpu"])
        if device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], device)
    except RuntimeError as error:
        raise ValueError(f"no state of torch's random generators: {first_line(error)}") from error
