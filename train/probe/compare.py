"""Comparison of networks on labels, and the probe that runs during pre-training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from mammostream.common.progress import progress
from mammostream.train.probe.config import ProbeConfig
from mammostream.train.probe.features import Network, cached_features, extract_features
from mammostream.train.probe.labelled import CHOOSING, ProbeSet, describe_folds, for_choosing, make_folds
from mammostream.train.probe.scores import LEVELS, PROBES, SHARES, level_pairs, point_estimate, score_tiles, summary
from mammostream.train.run.runtime import Runtime


class OnlineProbe:
    """Probes a network while it trains: linear and kNN AUC over tiles, for each class and their mean.

    Its figures choose the best checkpoint, so it neither fits on nor scores tiles of the split ``test``: it fits on ``train``
    and scores ``val``, or cross-validates over the patients of the one that has labels. The folds and the tiles are the same
    each time, so that the figures of two epochs can be compared.

    Parameters
    ----------
    probe_set
        Labelled tiles of any splits.
    runtime
        Device and precision.
    config
        ``batch_size`` and ``num_workers``.
    max_tiles
        Use only this many of the tiles that are not of the split ``test``.
    view_size
        Edge in pixels that tiles are resized to before the network sees them; None for their own size.

    Raises
    ------
    BadInput
        See :func:`mammostream.train.probe.labelled.for_choosing`.
    """

    def __init__(
        self,
        probe_set: ProbeSet,
        runtime: Runtime,
        config: Any,
        max_tiles: int | None = None,
        view_size: int | None = None,
    ) -> None:
        self._probe_set, self._runtime, self._config = for_choosing(probe_set, max_tiles), runtime, config
        self._view_size = view_size
        self._folds = make_folds(self._probe_set, seed=0)
        labelled = ~np.isnan(probe_set.tiles.labels).all(1)
        left_out = int((labelled & ~np.isin(probe_set.splits, CHOOSING)).sum())
        self.about = describe_folds(self._probe_set, self._folds)
        """On which splits it is fitted and scored, and how many labelled tiles it must not use, in words."""
        if left_out:
            self.about += f" ({left_out} labelled tiles of test are left out)"

    def __call__(self, backbone: nn.Module) -> dict[str, dict[str, float | None]]:
        """Return AUCs by probe, then by class or ``mean``; None if undefined."""
        probe_set = self._probe_set
        features = extract_features(backbone, probe_set, self._runtime, self._config, view_size=self._view_size)
        found = {}
        for probe in PROBES:
            scores, _ = score_tiles(features, probe_set, self._folds, probe)
            aucs = {
                name: point_estimate(level_pairs(probe_set, self._folds, scores, c, "tile", "max"))
                for c, name in enumerate(probe_set.class_names)
            }
            known = [auc for auc in aucs.values() if auc is not None]
            found[probe] = aucs | {"mean": float(np.mean(known)) if known else None}
        return found


def compare(
    networks: Sequence[Network], probe_set: ProbeSet, runtime: Runtime, config: ProbeConfig, cache: Path
) -> dict[str, Any]:
    """Probe several networks: each share of the labels, class and level, over several seeds.

    Parameters
    ----------
    networks
        The networks to compare.
    config
        Seeds, bootstrap, how tile scores are aggregated.
    cache
        Folder for cached features.

    Returns
    -------
    dict
        ``rows``: one dict per figure with ``network, probe, level, class, share, drawn_by, auc`` (mean over seeds), ``sd`` over
        seeds, ``low`` and ``high`` (95 % interval over patients of that mean), ``aucs`` (by seed), ``patients, positives,
        negatives`` that are scored; None if undefined. ``folds``: on which splits the probes were fitted and scored. ``notes``:
        what else a reader must know.
    """
    rows = []
    folds = {seed: make_folds(probe_set, seed) for seed in config.seed_numbers}
    for network in networks:
        features = {seed: cached_features(network, seed, probe_set, runtime, config, cache) for seed in config.seed_numbers}
        combinations = [(probe, share, seed) for probe in PROBES for share in SHARES for seed in config.seed_numbers]
        scored = {
            (probe, share, seed): score_tiles(features[seed], probe_set, folds[seed], probe, share, seed)
            for probe, share, seed in progress(combinations, f"probing {network.name}", "probe")
        }
        for probe in PROBES:
            for share in SHARES:
                by_seed = {seed: scored[probe, share, seed] for seed in config.seed_numbers}
                unit = "tiles" if any(u == "tiles" for _, u in by_seed.values()) else "patients"
                about = {"network": network.name, "probe": probe, "share": share, "drawn_by": unit}
                for level in LEVELS:
                    for c, name in enumerate(probe_set.class_names):
                        pairs = [level_pairs(probe_set, folds[s], t, c, level, config.score) for s, (t, _) in by_seed.items()]
                        rows.append(about | {"level": level, "class": name} | summary(pairs, config.bootstrap))
    how = describe_folds(probe_set, folds[config.seed_numbers[0]])
    return {"rows": rows, "folds": how, "notes": probe_set.notes, "seeds": list(config.seed_numbers)}


def markdown(result: dict[str, Any]) -> Iterator[str]:
    """Yield :func:`compare`'s figures as Markdown: one table per class and level, one column per share of the labels."""
    rows = pd.DataFrame(result["rows"])
    for (name, level), table in rows.groupby(["class", "level"], sort=False):
        first = table.iloc[-1]
        counts = f"{first['positives']} positive, {first['negatives']} negative, {first['patients']} patients"
        yield f"**{name}**, by {level}: {counts}"
        yield ""
        heads = [f"{share:.0%} of the labels ({by})" for share, by in table[["share", "drawn_by"]].drop_duplicates().to_numpy()]
        yield "| network | probe | " + " | ".join(heads) + " |"
        yield "|---" * (2 + len(heads)) + "|"
        for (network, probe), cells in table.groupby(["network", "probe"], sort=False):
            yield f"| {network} | {probe} | " + " | ".join(_cell(row) for row in cells.to_dict("records")) + " |"
        yield ""
    yield f"AUC over {len(result['seeds'])} seeds: mean ± standard deviation (95 % interval over patients); {result['folds']}."
    yield from (f"Note: {note}." for note in result["notes"])


def _cell(row: dict[str, Any]) -> str:
    if row["auc"] is None or np.isnan(row["auc"]):
        return "undefined"
    spread = f" ± {row['sd']:.3f}" if row["sd"] is not None and not np.isnan(row["sd"]) else ""
    interval = f" ({row['low']:.3f}-{row['high']:.3f})" if row["low"] is not None and not np.isnan(row["low"]) else ""
    return f"{row['auc']:.3f}{spread}{interval}"
