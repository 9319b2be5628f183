"""Fine-tuning for multi-label classification of tiles.

In: a BYOL checkpoint and labelled tiles (:mod:`mammostream.train.run.labels`). Out: ``*_classification_model.pth`` with class
names, calibrations and thresholds, ``metrics.json`` and curves. Validation tiles select and calibrate; they never train.
"""
