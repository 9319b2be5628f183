"""Damage to checkpoints: keys, shapes, types, values that are not finite, and pickles that hold code."""

from __future__ import annotations

import io
import os
import pickle
from random import Random
from typing import Any

from benchmarks.fuzz.damage import JUNK

MARK = "executed"


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {MARK}",)


def checkpoint_damage(data: bytes, rng: Random) -> tuple[bytes, str]:
    """A key removed, a value replaced, a tensor of another shape, type or content, or code."""
    import torch

    checkpoint = torch.load(io.BytesIO(data), weights_only=True)
    how = rng.choice(("remove", "replace", "replace", "tensor", "tensor", "tensor", "deep", "deep", "code", "other"))
    note = how
    if how in ("remove", "replace"):
        key = rng.choice(list(checkpoint))
        note += f" {key}"
        if how == "remove":
            del checkpoint[key]
        else:
            checkpoint[key] = rng.choice(JUNK)
            note += f" {checkpoint[key]!r:.30}"
    elif how == "deep":
        from benchmarks.fuzz.damage import tree_damage

        keys = [k for k, v in checkpoint.items() if isinstance(v, (dict, list)) and v and k != "model_state_dict"]
        key = rng.choice(keys)
        note += f" {key}{tree_damage(checkpoint[key], rng)}"
    elif how == "tensor":
        state = checkpoint["model_state_dict"]
        name = rng.choice(list(state))
        tensor = state[name]
        kind = rng.choice(
            ("nan", "inf", "all nan", "half", "integer", "flat", "transposed", "cut", "scalar", "text", "sparse", "complex")
        )
        note += f" {name} {kind}"
        state[name] = _tensor(tensor, kind)
    elif how == "code":
        checkpoint = {**checkpoint, "config": _Code()} if rng.random() < 0.5 else _Code()
        if rng.random() < 0.5:
            return pickle.dumps(checkpoint if isinstance(checkpoint, _Code) else {"config": _Code()}), "bare pickle with code"
    else:
        checkpoint = rng.choice(([], {}, 3, "x", torch.zeros(3), {"model_state_dict": {}}, {1: 2}, None))
        note += f" {checkpoint!r:.30}"
    file = io.BytesIO()
    torch.save(checkpoint, file)
    return file.getvalue(), note


def _tensor(tensor: Any, kind: str) -> Any:
    import torch

    if kind in ("nan", "inf", "all nan"):
        new = tensor.clone().float()
        (new if kind == "all nan" or not new.ndim else new.contiguous().view(-1)[:1]).fill_(float(kind[-3:]))
        return new
    made = {
        "half": lambda: tensor.half(),
        "integer": lambda: tensor.long(),
        "flat": lambda: tensor.reshape(-1),
        "transposed": lambda: tensor.transpose(0, -1) if tensor.ndim else tensor,
        "cut": lambda: tensor[:-1] if tensor.ndim else tensor,
        "scalar": lambda: torch.tensor(0.5),
        "text": lambda: "weights",
        "sparse": lambda: tensor.to_sparse() if tensor.ndim else tensor,
        "complex": lambda: tensor.to(torch.complex64),
    }
    return made[kind]()
