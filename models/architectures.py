"""The names of the backbones, separate from the code that builds them, so that --help does not import torch."""

ARCHITECTURES = ("resnet18", "resnet34", "resnet50", "resnet101", "convnext_tiny", "resnet18_narrow")
