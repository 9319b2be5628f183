"""Predictions against labels.

In: tables of predictions and of labels. Out: metrics with intervals over patients, ROC, precision-recall and reliability
plots. ``metrics`` is pure NumPy on arrays and also serves fine-tuning and probes.
"""
