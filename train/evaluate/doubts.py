"""What may flatter the figures of an evaluation: patients that the model was fitted on, and rows that are not judged."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from mammostream.shards.identity import SEEN
from mammostream.train.evaluate.matching import Matched

LIMIT = 0.05
"""A larger share that is not judged is a warning."""
_PURPOSES = {"trained": "trained", "validated": "chosen and calibrated"}  # what flatters; views without labels hardly do


def warnings(matched: Matched) -> list[str]:
    """Return what may flatter the figures, one line each, the gravest first."""
    return [*_seen_warnings(matched), *_left_out_warnings(matched)]


def seen_counts(matched: Matched) -> dict[str, dict[str, int]] | None:
    """Return rows and patients by what the model was fitted on them for; None if nothing is known."""
    if matched.seen is None:
        return None
    found = {purpose: matched.seen == purpose for purpose in SEEN}
    return {name: {"rows": int(rows.sum()), "patients": len(set(matched.patients[rows]))} for name, rows in found.items()}


def _seen_warnings(matched: Matched) -> list[str]:
    counts: dict[str, Any] = seen_counts(matched) or {}
    patients = len(set(matched.patients))
    return [
        f"warning: the model was {what} on {counts[purpose]['patients']} of these {patients} patients "
        f"({counts[purpose]['rows']} of {len(matched.labels)} {matched.level}s): the figures are flattered; judge it on "
        "held-out patients"
        for purpose, what in _PURPOSES.items()
        if purpose in counts and counts[purpose]["rows"]
    ]


def _left_out_warnings(matched: Matched) -> list[str]:
    lines = []
    for name, labels in zip(matched.class_names, matched.labels.T, strict=True):
        left_out = matched.left_out[name]
        judged = {"positives": np.sum(labels == 1), "negatives": np.sum(labels == 0)}
        lost = {kind: sum(reasons.values()) for kind, reasons in left_out.items()}
        total = {kind: lost[kind] + judged[kind] for kind in lost}
        if any(lost[kind] > LIMIT * total[kind] for kind in lost):
            reasons = Counter(left_out["positives"]) + Counter(left_out["negatives"])
            lines.append(
                f"warning: {name}: {lost['positives']} of {total['positives']} positive and {lost['negatives']} of "
                f"{total['negatives']} negative {matched.level}s are not judged "
                f"({', '.join(f'{count} {reason}' for reason, count in reasons.items())}): the figures may be flattered"
            )
    unlabelled = matched.counts["predictions_without_label"]
    if unlabelled > LIMIT * (unlabelled + len(matched.labels)):
        lines.append(
            f"warning: {unlabelled} of {unlabelled + len(matched.labels)} predicted {matched.level}s have no label and are not "
            "judged"
        )
    return lines
