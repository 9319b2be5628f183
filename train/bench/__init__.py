"""Measurements of the training step and of prediction, beside what a plain script does.

In: shards and the options to compare. Out: tables of throughput. Every contender does the same work with the same weights.
"""
