"""What every training and prediction shares.

In: the options of a run. Out: device, precision and processes (``runtime``), schedules, the trainable stages of a backbone,
labels joined to tiles, metrics written as JSON lines and charts, and what makes an interrupted run resumable (``resuming``,
``stopping``). Nothing here knows a loss or a model; the other rooms of ``train`` import from here, never the reverse.
"""
