"""From annotations and images to a manifest.

In: a data set's CSVs and folder of images, read by an adapter of :mod:`mammostream.shards.annotations`. Out:
``manifest.parquet``, ``findings.parquet`` and ``problems.csv``. No patient is ever in two splits.
"""
