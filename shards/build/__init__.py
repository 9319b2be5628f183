"""From a manifest to finished shards.

In: a manifest and the options of the tiling. Out: tars, DALI indexes and tables in a shard directory. ``plan`` decides what
goes where; ``build`` writes one shard as a pure function of the plan; ``launch`` runs shards in processes or on Dask; ``merge``
joins the tables; ``verify`` checks every byte; ``pack`` takes tiles that exist already. A shard's own table, renamed last,
alone marks it as finished.
"""
