"""Learned aggregation: from the features of tiles to a probability of a film, a breast or a patient.

Comes in: a table of features that ``embed`` wrote, a manifest with labels of films. Goes out: a checkpoint of the heads, a
table of predictions for each. Backbones and shards are not touched.
"""
