"""A warning about scores of images that no calibration turns into probabilities."""

from __future__ import annotations

import numpy as np
import pandas as pd

from mammostream.train.levels.aggregation import NOISY_OR
from mammostream.train.levels.calibration import IMAGE, UNFITTED
from mammostream.train.predict.network import Predictor


class RawScores:
    """Gathers the noisy-or of images for classes that have no calibration of images.

    Parameters
    ----------
    predictor
        The network, for its classes and calibrations.
    """

    def __init__(self, predictor: Predictor) -> None:
        calibration = predictor.calibrations.get(IMAGE, {}).get(NOISY_OR)
        fits = calibration.fits if calibration else [UNFITTED] * len(predictor.class_names)
        self._names = [name for name, fit in zip(predictor.class_names, fits, strict=True) if fit == UNFITTED]
        self._scores: list[np.ndarray] = []

    def add(self, images: pd.DataFrame) -> None:
        """Add rows of the image table."""
        columns = [f"{NOISY_OR}:{name}" for name in self._names]
        if columns:
            self._scores.append(images[columns].dropna().to_numpy(np.float64))

    def warning(self) -> str:
        """Return what the scores do not mean, with the median noisy-or of each class; "" if all are calibrated."""
        scores = np.concatenate(self._scores) if self._scores else np.empty((0, 0))
        if not len(scores):
            return ""
        medians = ", ".join(f"{name} {median:.2f}" for name, median in zip(self._names, np.median(scores, 0), strict=True))
        return (
            f"warning: images and breasts have no calibration and no thresholds of their own for {', '.join(self._names)} (too "
            "few validation images, a model of an earlier version, or --temperature): their scores are no probabilities, and "
            f"most images exceed a threshold that suits tiles; median noisy_or of {len(scores)} images: {medians}"
        )
