"""Cross-validation by patient: each fold is tested by a model that was trained, chosen and calibrated on the others.

When fold i is tested, fold i + 1 (after the last, the first) validates: it chooses the best epoch, stops the run early if
requested and decides calibrations and thresholds. The others train. So nothing of a test patient touches the model that
predicts it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mammostream.common.errors import BadInput
from mammostream.common.files import sha256_file, sha256_json, write_json
from mammostream.dali_pipelines import LabelledLoader
from mammostream.models.checkpoints import load_checkpoint, restore_classifier
from mammostream.models.tensors import place
from mammostream.train.classify.config import FinetuneConfig
from mammostream.train.classify.finetune import finetune
from mammostream.train.classify.out_of_fold import (
    TABLES,
    gather_tables,
    read_facts,
    read_fold,
    summarise_folds,
    write_fold,
)
from mammostream.train.classify.run import CHECKPOINT_NAME, FREE, LabelledData, loader_config
from mammostream.train.classify.validation import predict
from mammostream.train.levels.calibration import TILE
from mammostream.train.run.folds import FoldPlan, record_plan
from mammostream.train.run.labels import LabelledTiles, find_leakage
from mammostream.train.run.resuming import find_resume
from mammostream.train.run.runtime import Runtime

_LISTED = 3


@dataclass(frozen=True)
class Pool:
    """The labelled tiles of all folds.

    Attributes
    ----------
    tiles
        Tiles with a label, and those without one whose film or breast has tiles with one.
    class_names
        C names.
    preprocessing
        See :class:`mammostream.train.classify.run.LabelledData`.
    plan
        The fold of each patient.
    places
        Columns of the out-of-fold tile table besides the predictions, by key: ``split, x, y, size`` of tiles in shards.
    leakage
        What folds share and the user allowed.
    """

    tiles: LabelledTiles
    class_names: Sequence[str]
    preprocessing: dict[str, Any] | None
    plan: FoldPlan
    places: pd.DataFrame | None = None
    leakage: Mapping[str, list[str]] = field(default_factory=dict)

    def side(self, fold: int, role: str) -> LabelledTiles:
        """Return the tiles that do something when a fold is tested: ``train``, ``val`` or ``test``; training needs labels."""
        mine = np.isin(self.plan.of(self.tiles.people), self.plan.roles(fold)[role])
        if role == "train":
            mine &= ~np.isnan(self.tiles.labels).all(1)
        return self.tiles.take(np.flatnonzero(mine))

    def data(self, fold: int) -> LabelledData:
        """Return what trains and validates when a fold is tested."""
        sides = self.side(fold, "train"), self.side(fold, "val")
        return LabelledData(*sides, self.class_names, self.preprocessing, self.leakage)

    def facts(self, byol_checkpoint: Path, config: FinetuneConfig) -> dict[str, Any]:
        """Return what all folds must have in common, for :func:`mammostream.train.run.folds.record_plan`."""
        labels = LabelledData(self.tiles, self.tiles, self.class_names, None).fingerprint()
        options = {
            f"--{name.replace('_', '-')}": list(value) if isinstance(value, tuple) else value
            for name, value in asdict(config).items()
            if name not in FREE
        }
        made = {} if self.preprocessing is None else {"tiles": sha256_json(self.preprocessing)}
        return options | {"labels": labels, "--byol-checkpoint": sha256_file(byol_checkpoint)} | made


def shared_by_folds(tiles: LabelledTiles, plan: FoldPlan) -> dict[str, list[str]]:
    """Return what several folds share: films of two patients, tiles with the same pixels; see :func:`find_leakage`."""
    folds = plan.of(tiles.people)
    found: dict[str, list[str]] = {}
    for fold in range(plan.count - 1):
        sides = (tiles.take(np.flatnonzero(mask)) for mask in (folds == fold, folds > fold))
        for kind, names in find_leakage(*sides).items():
            found.setdefault(kind, []).extend(names)
    return found


def refuse_shared(shared: Mapping[str, Sequence[str]]) -> None:
    """Raise BadInput that names what several folds share, if they do."""
    if shared:
        parts = []
        for kind, names in shared.items():
            more = ", …" if len(names) > _LISTED else ""
            parts.append(f"{len(names)} {kind if len(names) > 1 else kind[:-1]} ({', '.join(names[:_LISTED])}{more})")
        raise BadInput(
            f"patients of different folds share {' and '.join(parts)}, so folds would be tested on training data: correct the "
            "patients or drop the copies, or pass --allow-leakage, which every checkpoint then records"
        )


def folder_of(output_dir: Path, fold: int) -> Path:
    """Return the folder of a fold's run."""
    return output_dir / f"fold-{fold}"


def cross_validate(
    byol_checkpoint: Path,
    pool: Pool,
    output_dir: Path,
    config: FinetuneConfig,
    command: Mapping[str, Any],
    *,
    only: int | None,
    resume: str | None,
    runtime: Runtime,
) -> tuple[dict[str, Any] | None, list[int]]:
    """Run the folds that are not finished, and gather them once all are.

    Parameters
    ----------
    byol_checkpoint, config, command, runtime
        See :func:`mammostream.train.classify.finetune.finetune`.
    pool
        Tiles, labels and folds.
    output_dir
        Gets ``folds.parquet``, a folder ``fold-<i>`` per fold with its run and the predictions of its test patients and, once
        all are there, the tables of all folds and ``folds.json``.
    only
        The fold to run; None: all.
    resume
        ``auto``, or None if no fold has been begun.

    Returns
    -------
    summary, left
        What ``folds.json`` holds, in the main process; None while folds are left. The folds that are left.

    Raises
    ------
    BadInput
        As in :func:`mammostream.train.classify.finetune.finetune`; or the folder's folds have other inputs or options.
    Stopped
        A fold was stopped, and saved.
    """
    wanted = range(pool.plan.count) if only is None else [only]
    last = CHECKPOINT_NAME.format("last")
    checkpoints = {fold: find_resume(resume, folder_of(output_dir, fold) / last) for fold in wanted}
    load_checkpoint(byol_checkpoint, "byol")  # before anything is written
    begun = any(path.suffix == ".pth" for fold in range(pool.plan.count) for path in folder_of(output_dir, fold).glob("*"))
    facts = pool.facts(byol_checkpoint, config)
    digest = record_plan(output_dir, pool.plan, facts, begun=runtime.from_main(begun), write=runtime.is_main)
    finished = runtime.from_main([_is_finished(output_dir, fold, digest) for fold in range(pool.plan.count)])
    for fold, checkpoint in checkpoints.items():
        if not finished[fold]:
            folder = folder_of(output_dir, fold)
            its_command = dict(command) | {"fold": fold}
            finetune(byol_checkpoint, pool.data(fold), folder, config, its_command, resume=checkpoint, runtime=runtime)
            _predict(pool, fold, folder, config, digest, runtime)
    # Other tasks of an array may have finished theirs meanwhile: whoever sees all of them gathers.
    finished = runtime.from_main([_is_finished(output_dir, fold, digest) for fold in range(pool.plan.count)])
    left = [fold for fold, done in enumerate(finished) if not done]
    return (_gather(pool, output_dir, digest) if runtime.is_main and not left else None), left


def _is_finished(output_dir: Path, fold: int, digest: str) -> bool:
    path = folder_of(output_dir, fold) / TABLES[TILE]
    if not path.is_file():
        return False
    if read_facts(path).get("folds") != digest:
        raise BadInput(f"{path} is of other folds than {output_dir / 'folds.parquet'}; delete its folder to train it again")
    return True


def _predict(pool: Pool, fold: int, folder: Path, config: FinetuneConfig, digest: str, runtime: Runtime) -> None:
    """Predict a fold's test patients with the last epoch's model, and write the tables."""
    path = folder / CHECKPOINT_NAME.format("final")
    checkpoint = load_checkpoint(path, "classifier")
    model = place(restore_classifier(checkpoint, path), runtime.device)
    tiles = pool.side(fold, "test")
    reading = loader_config(checkpoint["preprocessing"], config, runtime)
    logits = predict(model, LabelledLoader(tiles.source, reading, tiles=tiles.numbers), tiles, runtime)
    if logits is not None:
        places = {} if pool.places is None else pool.places.loc[tiles.keys].to_dict("series")
        more: dict[str, Any] = {name: column.to_numpy() for name, column in places.items()}
        facts = {"folds": digest, "model_sha256": sha256_file(path)}
        write_fold(folder, tiles, logits, checkpoint, facts, fold=fold, **more)
    runtime.wait()


def _gather(pool: Pool, output_dir: Path, digest: str) -> dict[str, Any]:
    """Write the tables of all folds and their figures."""
    count = pool.plan.count
    folders = [folder_of(output_dir, fold) for fold in range(count)]
    judged = [read_fold(folder, pool.side(fold, "test"), pool.class_names) for fold, folder in enumerate(folders)]
    gather_tables(folders, output_dir, {"class_names": list(pool.class_names), "folds": digest})
    counted = ["fold", *(column for column in pool.plan.table if column.partition(":")[0] in ("positive", "negative"))]
    of_folds = pool.plan.table[counted].groupby("fold").agg(lambda counts: int((counts > 0).sum()))
    summary = {
        "folds": count,
        "patients": pool.plan.table.groupby("fold").size().tolist(),
        "patients_with": {name: of_folds[name].tolist() for name in of_folds},
        "levels": summarise_folds(judged, pool.class_names),
    }
    write_json(output_dir / "folds.json", summary)
    return summary
