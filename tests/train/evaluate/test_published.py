"""DeLong's test and partial AUCs: against the figures that pROC records for its data set aSAH.

The data are of Turck et al. 2010 (Intensive Care Medicine 36(1):107-115): 41 patients with poor and 72 with good outcome. All
figures here depend only on the order of the values, and that follows from the placements (for each patient the share of the
others' that is lower) that pROC's tests record (deLongPlacementsCpp): the numbers below are ranks, equal values alike.
"""

from __future__ import annotations

import numpy as np
import pytest

from mammostream.train.evaluate.compare import delong
from mammostream.train.evaluate.figures import PartialAUC, Point
from mammostream.train.evaluate.metrics import extra_value

POOR = {
    "ndka": "37 24 28 35 3 9 18 43 47 43 43 14 32 39 5 7 30 1 51 39 16 18 22 30 41 26 39 7 49 34 3 12 39 3 11 43 20 "
    "32 45 18 35",
    "wfns": "2 1 3 4 4 4 4 1 4 1 0 1 4 3 3 1 4 4 4 1 4 1 4 1 3 4 3 3 0 3 3 1 1 4 4 1 1 4 4 4 4",
    "s100b": "8 5 11 7 25 30 28 2 19 4 2 23 21 27 30 15 30 30 30 2 30 17 0 4 13 30 15 30 3 15 8 5 6 13 30 9 30 18 30 30 25",
}
GOOD = {
    "ndka": "0 8 6 17 4 34 4 38 29 38 36 46 10 4 23 4 4 50 25 13 13 38 2 6 4 12 27 6 33 44 6 4 23 10 6 27 42 40 15 21 48 4 36 "
    "13 17 17 33 2 36 23 10 17 38 17 21 6 13 17 42 8 23 26 44 19 23 10 42 15 31 40 4 29",
    "wfns": "0 0 0 0 4 0 1 1 0 1 1 0 0 0 1 0 1 0 0 2 3 0 3 0 4 4 0 0 1 3 0 0 1 1 0 1 0 1 1 0 0 0 0 1 0 1 0 0 2 1 3 1 0 3 0 0 4 "
    "3 1 1 0 0 0 2 0 1 1 3 3 0 0 0",
    "s100b": "8 9 5 1 26 12 5 5 1 3 1 4 6 2 12 2 6 8 12 1 11 9 20 4 29 26 11 2 24 26 6 3 4 3 1 8 5 9 10 1 1 4 1 4 3 11 4 3 19 "
    "6 16 2 5 18 2 1 14 22 5 10 3 9 5 2 1 12 10 26 12 10 29 27",
}
OUTCOME = np.repeat([1.0, 0.0], [41, 72])


def scores(marker):
    return np.array((POOR[marker] + " " + GOOD[marker]).split(), float) / 100


# tests/testthat/test-roc.test.R of pROC: Z, p, interval
DELONG = {
    ("wfns", "s100b"): (2.20898359144091, 0.0271757822291882, 0.0104061769564846, 0.174214419249478),
    ("wfns", "ndka"): (2.79777591868904, 0.00514557970691098, 0.0634011709339876, 0.3600405634833566),
    ("ndka", "s100b"): (-1.39077002573558, 0.164295175223054, -0.2876917446341914, 0.0488706064228094),
}


@pytest.mark.parametrize("pair", DELONG)
def test_delongs_test_gives_the_figures_of_proc(pair):
    found = delong(OUTCOME, scores(pair[0]), scores(pair[1]))
    assert (found.z, found.p, *found.interval) == pytest.approx(DELONG[pair], abs=1e-12)


# tests/testthat/test-auc.R of pROC, partial.auc.correct = TRUE
PARTIAL = {
    ("wfns", "specificity", 0.9): 0.649693339038653,
    ("wfns", "sensitivity", 0.9): 0.68473648552275,
    ("ndka", "specificity", 0.9): 0.530024247610897,
}


@pytest.mark.parametrize("case", PARTIAL)
def test_partial_aucs_are_those_of_proc(case):
    marker, kind, value = case
    assert extra_value(PartialAUC(Point(kind, value)), OUTCOME, scores(marker)) == pytest.approx(PARTIAL[case], abs=1e-12)
