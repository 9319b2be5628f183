"""From tiles to images and breasts: how labels and scores follow from each other, and what a score means as a probability.

In: logits and labels of tiles, and the image and breast of each. Out: scores of images and breasts, their labels, and for each
level and score a calibration with decision thresholds. Nothing here needs torch. docs/metrics.md explains the rules.
"""
