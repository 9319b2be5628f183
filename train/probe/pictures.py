"""The chart of a probe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mammostream.train.run.charts import new_figure, save_figure


def draw_probe(rows: Sequence[Mapping], path: Path) -> None:
    """Draw AUC by share of the labels: one panel per level and class, one colour per network, with intervals over patients.

    Parameters
    ----------
    rows
        What :func:`mammostream.train.probe.compare.compare` found; undefined figures are left out.
    path
        The PNG.
    """
    levels, classes, networks = (list(dict.fromkeys(row[name] for row in rows)) for name in ("level", "class", "network"))
    figure = new_figure(4.2 * len(levels), 3.2 * len(classes) + 0.4)
    grid = figure.subplots(len(classes), len(levels), squeeze=False, sharey=True)
    for line, name in zip(grid, classes, strict=True):
        for axes, level in zip(line, levels, strict=True):
            axes.axhline(0.5, color="#9aa7b0", linestyle=":")
            for number, network in enumerate(networks):
                for probe, style in (("linear", "-"), ("kNN", "--")):
                    wanted = {"network": network, "probe": probe, "level": level, "class": name}
                    found = [row for row in rows if wanted.items() <= row.items() and row["auc"] is not None]
                    if not found:
                        continue
                    share, auc = (np.array([row[column] for row in found]) for column in ("share", "auc"))
                    # Offset, so that intervals do not overlap.
                    share = share * 1.06 ** (2 * number + (probe == "kNN") - len(networks))
                    axes.plot(share, auc, style, color=f"C{number % 10}", marker="o", markersize=3, label=f"{network}, {probe}")
                    bounded = [
                        (x, row["low"], row["high"]) for x, row in zip(share, found, strict=True) if row["low"] is not None
                    ]
                    if bounded:
                        axes.vlines(*zip(*bounded, strict=True), color=f"C{number % 10}", linewidth=1, alpha=0.6)
            axes.set_xscale("log")
            axes.set_title(f"{name}, by {level}", fontsize=9)
            axes.set_xlabel("share of the labels", fontsize=8)
            axes.set_ylabel("AUC", fontsize=8)
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.3)
    handles = {label: handle for axes in grid.flat for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if handles:
        figure.legend(handles.values(), handles.keys(), fontsize=7, loc="outside lower center", ncols=min(4, len(handles)))
    save_figure(figure, path)
