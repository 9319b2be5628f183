"""Labels of images, breasts and patients from the labels of their parts."""

from __future__ import annotations

import numpy as np


def labels_of_units(labels: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Return the labels of what the rows are parts of: tiles of images, images of breasts, breasts of patients.

    Positive if any part is positive, negative if all parts are, missing if none is positive and one is missing: it might be.

    Parameters
    ----------
    labels
        (N, C) of 1, 0 and NaN for a missing label.
    units
        (N,) unit of each row, as numbers from 0 to G - 1.

    Returns
    -------
    numpy.ndarray
        (G, C) of 1, 0 and NaN.
    """
    count = int(units.max()) + 1 if len(units) else 0
    found = np.zeros((count, labels.shape[1]))
    for value in (np.nan, 1.0):  # a positive part outweighs a missing one
        rows, columns = np.nonzero(np.isnan(labels) if np.isnan(value) else labels == value)
        found[units[rows], columns] = value
    return found
