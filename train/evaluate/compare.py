"""Two predictions of the same cases: DeLong's test of the AUCs, and differences of all figures over resampled patients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import norm, rankdata

from mammostream.common.errors import BadInput
from mammostream.train.evaluate.matching import Matched
from mammostream.train.evaluate.metrics import (
    MEANS,
    Draws,
    ExtraFigure,
    bootstrap_draws,
    evaluate_predictions,
    interval,
    mean_over_classes,
)

_NAMED = 100  # cases of one file only that metrics.json names
_QUANTILE = float(norm.ppf(0.975))


class DeLong(NamedTuple):
    """DeLong's test of two AUCs on the same rows."""

    difference: float
    standard_error: float
    z: float
    p: float
    interval: tuple[float, float]


def delong(labels: np.ndarray, first: np.ndarray, second: np.ndarray) -> DeLong | None:
    """Test whether two scores of the same independent rows have the same AUC; two-sided, 95 % interval.

    DeLong, DeLong and Clarke-Pearson 1988; the structural components come from midranks (Sun and Xu 2014), in O(N log N).

    Parameters
    ----------
    labels
        (N,) of 0 and 1.
    first, second
        (N,) scores; the higher, the more likely positive.

    Returns
    -------
    DeLong
        Of the first AUC minus the second; None with fewer than two positives or negatives, or where the
        AUCs differ without any variance (1 against 0, say).
    """
    positive = labels == 1
    m, n = int(positive.sum()), int((~positive).sum())
    if min(m, n) < 2:
        return None
    v10, v01 = zip(*(_components(scores[positive], scores[~positive]) for scores in (first, second)), strict=True)
    covariance = np.cov(v10) / m + np.cov(v01) / n
    difference = float(v10[0].mean() - v10[1].mean())
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    error = float(np.sqrt(max(variance, 0)))
    if error <= 1e-9:  # 0 up to rounding: both order the rows alike, or at least one separates them without any variance
        if abs(difference) > 1e-9:
            return None
        return DeLong(0.0, 0.0, 0.0, 1.0, (0.0, 0.0))
    z = difference / error
    limits = (difference - _QUANTILE * error, difference + _QUANTILE * error)
    return DeLong(difference, error, z, float(2 * norm.sf(abs(z))), limits)


def _components(positives: np.ndarray, negatives: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each positive the share of negatives below it, for each negative that of positives above; ties are half."""
    ranks = rankdata(np.concatenate([positives, negatives]))
    m, n = len(positives), len(negatives)
    return (ranks[:m] - rankdata(positives)) / n, 1 - (ranks[m:] - rankdata(negatives)) / m


def compare(
    first: Matched,
    second: Matched,
    thresholds: tuple[Sequence[float | None], Sequence[float | None]],
    names: tuple[Path, Path],
    bootstrap: int = 1000,
    extra: Sequence[ExtraFigure] = (),
) -> tuple[dict[str, Any], tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]]:
    """Compare two predictions on the cases that both judge.

    Parameters
    ----------
    first, second
        Matched to the same labels.
    thresholds
        Of the classes of each.
    names
        Their files.
    bootstrap
        Resamples of patients; 0 for no intervals of the differences but DeLong's.
    extra
        Further figures.

    Returns
    -------
    comparison : dict
        ``rows``, ``patients``, ``only_in_first`` and ``only_in_second`` (``count`` and ``names``, the first hundred);
        ``per_class`` and ``overall``: figure -> ``first``, ``second``, ``difference`` (first minus second), ``interval`` and
        ``p`` from the paired bootstrap over patients; and for the AUC of a class ``delong``, see :class:`DeLong`.
    data : tuple
        Labels, both probabilities, (N, C) each, and the classes' names, for the picture.

    Raises
    ------
    BadInput
        They judge other things, have no class or no case in common.
    """
    mine, theirs, only = _common(first, second, names)
    classes = [name for name in first.class_names if name in second.class_names]
    if not classes:
        raise BadInput(
            f"--compare-with {names[1]} predicts none of the classes of {names[0]} ({', '.join(first.class_names)}); its "
            f"classes are: {', '.join(second.class_names)}"
        )
    columns = [[m.class_names.index(name) for name in classes] for m in (first, second)]
    labels, patients = first.labels[mine][:, columns[0]], first.patients[mine]
    scores = first.probabilities[mine][:, columns[0]], second.probabilities[theirs][:, columns[1]]
    cuts = [[limits[c] for c in picked] for limits, picked in zip(thresholds, columns, strict=True)]
    each = [
        evaluate_predictions(labels, p, classes, patients, t, bootstrap=0, extra=extra)
        for p, t in zip(scores, cuts, strict=True)
    ]
    used = np.array([figures["threshold"] for one in each for figures in one["per_class"].values()])
    # Both models as classes of one: a resample takes the same patients for both.
    both = np.hstack([labels, labels]), np.hstack(scores), used
    exact = np.stack([_exact(labels, p, t) for p, t in zip(scores, np.split(used, 2), strict=True)], 1)
    complete = ~np.isnan(labels).any(1)
    draws = bootstrap_draws(*both, patients, bootstrap, extra=extra, sums=np.column_stack([exact, complete]))
    result = {
        "files": [str(name) for name in names],
        "rows": len(labels),
        "patients": len(set(patients)),
        **only,
        "per_class": {
            name: _class_differences(c, name, each, draws, labels[:, c], [p[:, c] for p in scores])
            for c, name in enumerate(classes)
        },
        "overall": _overall_differences(each, draws, len(classes)),
        "bootstrap": bootstrap,
    }
    return result, (labels, *scores, classes)


def comparison_lines(found: Mapping[str, Any]) -> list[str]:
    """Return a comparison as lines for the console."""
    first, second = found["files"]
    lines = [f"{first} (first) against {second} (second): {found['rows']} common cases of {found['patients']} patients"]
    for which, path in (("first", first), ("second", second)):
        only = found[f"only_in_{which}"]
        if only["count"]:
            named = ", ".join(only["names"][:3]) + (" ..." if only["count"] > 3 else "")
            lines.append(f"  {only['count']} judged in {path} only: not compared ({named})")
    rows = [["class", "figure", "first", "second", "difference", "p", "by"]]
    for name, figures in (*found["per_class"].items(), ("mean", found["overall"])):
        for figure, values in figures.items():
            tests = [("DeLong", values["delong"])] if values.get("delong") else []
            for by, test in (*tests, ("bootstrap", values)):
                rows.append([name, figure, *(_number(values[w]) for w in ("first", "second")), _difference(test), _p(test), by])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines += ["  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    if found["patients"] < found["rows"]:
        lines.append(
            f"  DeLong's test takes the {found['rows']} cases for independent, but they are of {found['patients']} patients: "
            "trust the bootstrap over patients"
        )
    return lines


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def _difference(test: Mapping[str, Any]) -> str:
    limits = test["interval"]
    return _number(test["difference"]) + (f" ({limits[0]:.3f} to {limits[1]:.3f})" if limits else "")


def _p(test: Mapping[str, Any]) -> str:
    return "" if test["p"] is None else f"{test['p']:.2g}"


def _common(first: Matched, second: Matched, files: tuple[Path, Path]) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Return the rows of each that both have, in the same order, and what only one has."""
    if first.level != second.level:
        raise BadInput(
            f"--compare-with {files[1]} has {second.level}s, but {files[0]} has {first.level}s; give tables of the same kind"
        )
    ours, other = first.rows["name"].to_numpy(str), second.rows["name"].to_numpy(str)
    names, mine, theirs = np.intersect1d(ours, other, return_indices=True)
    if not len(names):
        raise BadInput(
            f"--compare-with {files[1]} judges no case of {files[0]} (the first of each: {other[0]!r} and {ours[0]!r}); "
            "predict the same images with both models"
        )
    only = {"only_in_first": np.setdiff1d(ours, other), "only_in_second": np.setdiff1d(other, ours)}
    order = np.argsort(mine)
    counted = {which: {"count": len(cases), "names": cases[:_NAMED].tolist()} for which, cases in only.items()}
    return mine[order], theirs[order], counted


def _exact(labels: np.ndarray, probabilities: np.ndarray, cuts: np.ndarray) -> np.ndarray:
    return ((probabilities >= cuts) == (labels == 1)).all(1) & ~np.isnan(labels).any(1)


def _class_differences(
    c: int, name: str, each: Sequence[Mapping[str, Any]], draws: Draws, labels: np.ndarray, scores: Sequence[np.ndarray]
) -> dict[str, Any]:
    count = draws.figures.shape[0] // 2
    differences: dict[str, Any] = {}
    for figure in draws.names:
        drawn = draws.of(figure)
        values = [one["per_class"][name][figure] for one in each]
        differences[figure] = _tested(values, drawn[c] - drawn[count + c])
    known = ~np.isnan(labels)
    test = delong(labels[known], *(p[known] for p in scores)) if differences["auc"]["difference"] is not None else None
    differences["auc"]["delong"] = test._asdict() | {"interval": list(test.interval)} if test else None
    return differences


def _overall_differences(each: Sequence[Mapping[str, Any]], draws: Draws, count: int) -> dict[str, Any]:
    with np.errstate(invalid="ignore", divide="ignore"):
        drawn = {
            name: mean_over_classes(draws.of(figure)[:count]) - mean_over_classes(draws.of(figure)[count:])
            for name, figure in MEANS.items()
        }
        drawn["exact_match"] = (draws.sums[:, 0] - draws.sums[:, 1]) / draws.sums[:, 2]
    return {name: _tested([one[name] for one in each], values) for name, values in drawn.items()}


def _tested(values: Sequence[float | None], drawn: np.ndarray) -> dict[str, Any]:
    """Return a figure of both with its difference, interval and two-sided p-value from the resampled differences.

    The p-value is twice the smaller share of resamples on one side of 0, the share above which percentile intervals leave out
    0; with the observation itself counted in, so that it is never 0.
    """
    first, second = values
    difference = first - second if first is not None and second is not None else None
    known = drawn[~np.isnan(drawn)] if difference is not None else drawn[:0]
    sides = ((known <= 0).sum() + 1, (known >= 0).sum() + 1)
    return {
        "first": first,
        "second": second,
        "difference": difference,
        "interval": interval(known),
        "p": min(1.0, float(2 * min(sides) / (len(known) + 1))) if len(known) else None,
    }
