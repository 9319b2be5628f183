"""The table of breasts: the tiles of all images of a patient's side, and the images that could not be predicted."""

from __future__ import annotations

import pandas as pd

from mammostream.train.levels.aggregation import TOP_TILES, Groups
from mammostream.train.levels.calibration import BREAST
from mammostream.train.predict.config import InferConfig
from mammostream.train.predict.network import Predictor

_BY = ["patient_id", "laterality"]


class Breasts:
    """Images and their tiles gathered by breast; what is kept of a breast does not grow with its tiles.

    Parameters
    ----------
    predictor
        The network, for its classes and calibrations.
    """

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        top = predictor.config.top_tiles if isinstance(predictor.config, InferConfig) else TOP_TILES
        self._groups = Groups(_BY, predictor.class_names, top)
        self._images: list[pd.DataFrame] = []
        self.unknown = 0
        """Images whose patient or side is unknown: they are of no breast."""

    def add(self, tiles: pd.DataFrame, images: pd.DataFrame) -> None:
        """Add the tiles of images, and the images: ``image_id, patient_id, laterality, tiles, reason``."""
        sides = images["laterality"] if "laterality" in images else pd.Series("", images.index)
        known = (images["patient_id"].fillna("") != "") & sides.isin(["L", "R"])
        self.unknown += int((~known).sum())
        mine = images.assign(laterality=sides, failed=images["tiles"] == 0)[known]
        if len(mine):
            self._images.append(mine[[*_BY, "failed", "reason"]])
            self._groups.add(tiles.merge(mine[["image_id", "laterality"]], on="image_id"))

    def table(self) -> pd.DataFrame:
        """Return one row per breast, in the order of their images; without scores and with a reason if all images failed."""
        if not self._images:
            return pd.DataFrame(columns=_BY)
        images = pd.concat(self._images, ignore_index=True)
        groups = images.groupby(_BY, sort=False)
        rows = groups.agg(images=("failed", "size"), failed_images=("failed", "sum"), reason=("reason", "max")).reset_index()
        rows = rows.merge(self._groups.table(self._predictor.calibrations.get(BREAST)), on=_BY, how="left")
        rows["tiles"] = rows["tiles"].fillna(0).astype(int)
        rows["reason"] = rows["reason"].where(rows["tiles"] == 0, "")
        return rows.assign(seen=self._predictor.seen(rows["patient_id"], rows["patient_id"]))
