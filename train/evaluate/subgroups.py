"""Figures by subgroup: by any column of a table of the judged rows, numbers in bands."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from mammostream.common.errors import BadInput, nearest
from mammostream.shards.identity import clean_ids, clean_patients, clean_sides, key_of_path, known_breast
from mammostream.shards.manifest import LABEL_PREFIX
from mammostream.train.evaluate.matching import Matched
from mammostream.train.evaluate.metrics import ExtraFigure, evaluate_predictions
from mammostream.train.evaluate.reading import read_table
from mammostream.train.levels.calibration import BREAST, TILE

MIN_CASES = 10
"""With fewer positives or negatives a subgroup has no figures: one case would move a sensitivity by more than 10 %."""
MOST_VALUES = 10  # a column of numbers with more different ones is put into bands
MOST_GROUPS = 50
MISSING, SEVERAL = "missing", "several"
_BAND = "_band"
_DICOM_AGE = re.compile(r"(\d{3})Y")


class Wanted(NamedTuple):
    """A column to divide by."""

    text: str
    column: str
    edges: tuple[float, ...] = ()


def read_columns(texts: Sequence[str]) -> list[Wanted]:
    """Read ``density``, ``age`` or ``age:40/50/60``: a column, and the inner edges of its bands.

    Raises
    ------
    BadInput
        Edges that are no ascending numbers.
    """
    wanted = []
    for text in texts:
        column, _, edges = text.partition(":") if not text.startswith(LABEL_PREFIX) else (text, "", "")
        try:
            values = tuple(float(edge) for edge in edges.split("/")) if edges else ()
        except ValueError:
            values = (np.nan,)
        if not column or not all(np.isfinite(values)) or list(values) != sorted(set(values)):
            raise BadInput(f"--by {text}: the edges of bands are ascending numbers; write them as age:40/50/60")
        wanted.append(Wanted(text, column, values))
    return list(dict.fromkeys(wanted))


def groups_of(matched: Matched, path: Path, wanted: Sequence[Wanted]) -> dict[str, tuple[np.ndarray, list[str], str]]:
    """Return each judged row's value of each wanted column.

    A row of the table belongs to a judged tile by ``tile_path``, else by ``image_id``; to an image by ``image_id``; to a breast
    by ``patient_id`` and ``laterality``; to any of them by ``patient_id`` alone if the table has nothing better. A row whose
    table rows disagree, such as a breast by ``view``, has the value ``several``; one without a value, ``missing``.

    Parameters
    ----------
    matched
        The judged rows.
    path
        CSV or Parquet with the columns, such as a manifest.
    wanted
        See :func:`read_columns`.

    Returns
    -------
    dict
        Column as it was asked for -> (N,) values as text, the values in their order, how numbers were put into bands or "".

    Raises
    ------
    BadInput
        No such column, no row that belongs to a judged one, or too many different values.
    """
    table = read_table(path, "--by-table", "give a CSV or Parquet with the columns of --by")
    sources = {one: _source(one, table, path) for one in wanted}
    names, keys = _joined(matched, table, path)
    mine = keys.isin(names[names != ""])  # bands and numbers of values are those of the judged rows
    keys = keys[mine]
    found = {}
    for one, column in sources.items():
        values, order, how = _valued(one, column[mine], path)
        known = pd.DataFrame({"key": keys.to_numpy(str), "value": values})
        known = known[(known["key"] != "") & (known["value"] != "")].drop_duplicates()
        each = known.groupby("key")["value"].agg(lambda group: group.iloc[0] if len(group) == 1 else SEVERAL)
        value_of = dict(zip(each.index, each, strict=True))
        own = np.array([value_of.get(name, MISSING) for name in names], dtype=str)
        found[one.text] = own, [value for value in dict.fromkeys((*order, SEVERAL, MISSING)) if (own == value).any()], how
    return found


def judge_subgroups(
    matched: Matched,
    groups: Mapping[str, tuple[np.ndarray, list[str], str]],
    thresholds: Sequence[float | None],
    bootstrap: int = 1000,
    extra: Sequence[ExtraFigure] = (),
) -> dict[str, Any]:
    """Return the figures of each value of each column, by the same thresholds, with 95 % intervals over its patients.

    Returns
    -------
    dict
        Column -> ``bands`` (how numbers were put into bands, or None) and ``values``: one entry per value with ``value``,
        ``rows``, ``patients`` and ``per_class``. A class with fewer than :data:`MIN_CASES` positives or negatives has
        ``positives``, ``negatives`` and ``too_few`` (why, in words), and no figure.
    """
    result: dict[str, Any] = {}
    for column, (values, order, how) in groups.items():
        result[column] = {"bands": how or None, "values": []}
        for value in order:
            rows = values == value
            labels = matched.labels[rows]
            counts = np.stack([(labels == 1).sum(0), (labels == 0).sum(0)], 1)
            enough = np.all(counts >= MIN_CASES, axis=1)
            judged = [c for c in range(len(matched.class_names)) if enough[c]]
            figures = evaluate_predictions(
                labels[:, judged],
                matched.probabilities[rows][:, judged],
                [matched.class_names[c] for c in judged],
                matched.patients[rows],
                [thresholds[c] for c in judged],
                bootstrap,
                extra=extra,
            )["per_class"]
            per_class = {
                name: figures.get(name) or _too_few(*map(int, counts[c])) for c, name in enumerate(matched.class_names)
            }
            about = {"value": value, "rows": int(rows.sum()), "patients": len(set(matched.patients[rows]))}
            result[column]["values"].append(about | {"per_class": per_class})
    return result


def subgroup_lines(found: Mapping[str, Any]) -> list[str]:
    """Return the figures by subgroup as lines for the console."""
    lines = []
    for column, groups in found.items():
        lines.append(f"by {column}" + (f" ({groups['bands']})" if groups["bands"] else "") + ":")
        rows = [["value", "rows", "patients", "class", "positive", "AUC", "AP", "sens. at 90 % spec."]]
        for group in groups["values"]:
            for name, figures in group["per_class"].items():
                total = figures["positives"] + figures["negatives"]
                cells = [group["value"], str(group["rows"]), str(group["patients"]), name, f"{figures['positives']} of {total}"]
                if "too_few" in figures:
                    rows.append([*cells, figures["too_few"], "", ""])
                else:
                    rows.append([*cells, *(_cell(figures, f) for f in ("auc", "ap", "sensitivity_at_90_specificity"))])
        widths = [max(len(row[i]) for row in rows if i != 5 or row[6]) for i in range(len(rows[0]))]
        lines += ["  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return lines


def _cell(figures: Mapping[str, Any], name: str) -> str:
    limits = figures["intervals"][name]
    return f"{figures[name]:.3f}" + (f" ({limits[0]:.3f}-{limits[1]:.3f})" if limits else "")


def _too_few(positives: int, negatives: int) -> dict[str, Any]:
    few = [f"{n} {what}" for n, what in ((positives, "positives"), (negatives, "negatives")) if n < MIN_CASES]
    return {
        "positives": positives,
        "negatives": negatives,
        "too_few": f"no figures: {' and '.join(few)}, fewer than {MIN_CASES}",
    }


def _source(one: Wanted, table: pd.DataFrame, path: Path) -> pd.Series:
    """Return the table's column for what was asked for: its name, a label's, that without ``_band``, or one of its labels.

    A manifest has the density as labels ``density_a`` to ``density_d``: of those that are 1, the rest of the name is the value.
    """
    for name in (one.column, LABEL_PREFIX + one.column, one.column.removesuffix(_BAND)):
        if name in table:
            return table[name]
    prefix = f"{LABEL_PREFIX}{one.column}_"
    if len(parts := table[[c for c in table if str(c).startswith(prefix)]].columns) > 1:
        held = table[parts].apply(pd.to_numeric, errors="coerce").fillna(0).to_numpy(np.float64) == 1
        named = np.array([part.removeprefix(prefix) for part in parts])
        values = np.where(held.sum(1) > 1, SEVERAL, np.where(held.any(1), named[held.argmax(1)], ""))
        return pd.Series(values, table.index, name=one.column)
    columns = list(map(str, table.columns))
    raise BadInput(
        f"--by {one.text}: {path} has no column '{one.column}'{nearest(one.column, columns)}; its columns are: "
        f"{', '.join(columns)}; give the table that has it with --by-table"
    )


def _joined(matched: Matched, table: pd.DataFrame, path: Path) -> tuple[pd.Series, pd.Series]:
    """Return what judged rows and the table's rows join by."""
    rows = matched.rows
    pairs: list[tuple[pd.Series, pd.Series]] = []
    if matched.level == TILE and "tile_path" in table:
        pairs.append(
            (rows["name"], clean_ids(table["tile_path"]).map(lambda p: key_of_path(p.rpartition("/")[2]) if p else ""))
        )
    if matched.level != BREAST and "image_id" in table:
        pairs.append((rows["image"], clean_ids(table["image_id"])))
    if "patient_id" in table:
        patients = clean_patients(table["patient_id"])
        if matched.level == BREAST and "laterality" in table:
            sides = clean_sides(table["laterality"])
            breasts = known_breast(patients.to_numpy(str), sides.to_numpy(str))
            pairs.append((rows["name"], pd.Series(breasts, table.index)))
        if not pairs:
            pairs.append((rows["patient"], patients))
    for names, keys in pairs:
        if names[names != ""].isin(keys).any():
            return names, keys
    if not pairs:
        raise BadInput(
            f"--by-table {path} does not name {matched.level}s; give image_id (for breasts patient_id and laterality) or "
            f"patient_id; its columns are: {', '.join(map(str, table.columns))}"
        )
    names, keys = pairs[0]
    first = ["nothing" if not (v != "").any() else repr(v[v != ""].iloc[0]) for v in (keys, names)]
    raise BadInput(
        f"--by-table {path} has no row of a judged {matched.level} (the first of each: {' and '.join(first)}); give a table of "
        f"these {matched.level}s"
    )


def _valued(one: Wanted, column: pd.Series, path: Path) -> tuple[np.ndarray, list[str], str]:
    """Return a column as text, its values in order, and how its numbers were put into bands."""
    text = clean_ids(column)
    ages = text.str.fullmatch(_DICOM_AGE)
    numbers = pd.to_numeric(text.str.removesuffix("Y").where(ages, text), errors="coerce").to_numpy(np.float64)
    numeric = bool((text != "").any() and np.isfinite(numbers[text != ""]).all())
    band = bool(one.edges) or one.column not in (column.name, str(column.name).removeprefix(LABEL_PREFIX))
    if band and not numeric:
        wrong = text[(text != "") & ~np.isfinite(numbers)]
        what = repr(wrong.iloc[0]) if len(wrong) else "nothing but empty cells"
        raise BadInput(
            f"--by {one.text}: column '{column.name}' of {path} holds {what}, which is no number; give it without bands"
        )
    if numeric and (band or len(np.unique(numbers[np.isfinite(numbers)])) > MOST_VALUES):
        is_age = bool(ages.any()) or "age" in re.split(r"[\W_\d]+", one.column.casefold())
        names, place, how = _bands(one.edges, numbers, is_age)
        return np.where(text == "", "", np.array(names)[place]), names, how
    rank = dict(zip(text, numbers if numeric else text, strict=True))
    order = sorted(set(text) - {""}, key=rank.__getitem__)
    if len(order) > MOST_GROUPS:
        raise BadInput(
            f"--by {one.text}: column '{column.name}' of {path} has {len(order)} different values, more than {MOST_GROUPS}; "
            "choose a column that divides the cases into few groups"
        )
    return text.to_numpy(str), order, ""


def _bands(edges: Sequence[float], numbers: np.ndarray, is_age: bool) -> tuple[list[str], np.ndarray, str]:
    """Return the names of bands, each number's band, and how they were made: by the edges given, by tens, by quartiles."""
    known, how = numbers[np.isfinite(numbers)], "bands as given"
    if not edges and is_age:
        edges, how = [10.0 * ten for ten in range(int(known.min() // 10) + 1, int(known.max() // 10) + 1)], "bands of ten"
    elif not edges:
        edges, how = np.unique(np.quantile(known, (0.25, 0.5, 0.75))).tolist(), "quartiles"
    names = [f"{low:g} to < {high:g}" for low, high in pairwise(edges)]
    names = [f"< {edges[0]:g}", *names, f">= {edges[-1]:g}"] if edges else [f">= {known.min():g}"]
    return names, np.searchsorted(edges, np.nan_to_num(numbers), side="right"), how
