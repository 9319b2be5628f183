"""Measurements of the training step and of prediction, next to what a plain script does.

In: shards and the options to compare. Out: tables of throughput. Every contender does the same work with the same weights.
"""
