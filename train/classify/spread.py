"""Mean and standard deviation of a figure over runs: seeds, or folds of a cross-validation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def spread(values: list[float | None]) -> dict[str, Any]:
    """Return mean, standard deviation (of the sample, n - 1) and the values; None where one of them is undefined."""
    known = [value for value in values if value is not None]
    defined = len(known) == len(values)
    return {
        "mean": float(np.mean(known)) if defined else None,
        "sd": float(np.std(known, ddof=1)) if defined and len(known) > 1 else None,
        "values": values,
    }


def spread_words(found: Mapping[str, Any]) -> str:
    """Return what :func:`spread` found in words."""
    if found["mean"] is None:
        return "undefined"
    return f"{found['mean']:.3f}" + (f" ± {found['sd']:.3f}" if found["sd"] is not None else "")


def summarise(runs: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Return mean, standard deviation (of the sample, n - 1) and values over seeds of each metric, undefined ones as None.

    Parameters
    ----------
    runs
        Seed -> metrics as :func:`finetune` returns them.
    """
    metrics = list(runs.values())
    return {
        "seeds": list(runs),
        **{name: spread([m[name] for m in metrics]) for name in ("mean_auc", "mean_ap", "exact_match", "val_loss")},
        "per_class": {
            name: {figure: spread([m["per_class"][name][figure] for m in metrics]) for figure in ("auc", "ap")}
            for name in metrics[0]["per_class"]
        },
    }
