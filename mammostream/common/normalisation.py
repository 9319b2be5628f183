"""The normalisation of a one-channel tile in [0, 1]: the averages of ImageNet's channel means and standard deviations."""

MEAN, STD = 0.449, 0.226
