"""The backbones there are; apart from the code that builds them, so that --help need not import torch."""

ARCHITECTURES = ("resnet18", "resnet34", "resnet50", "resnet101", "convnext_tiny")
