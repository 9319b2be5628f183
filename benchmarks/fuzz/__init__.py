"""Damaged inputs for every reader: ``python -m benchmarks.fuzz --help``."""
