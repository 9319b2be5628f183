"""BYOL pre-training without labels.

In: a shard directory and a :class:`~mammostream.train.byol.config.PretrainConfig`. Out: checkpoints
(``mammogram_byol_*.pth``), ``metrics.jsonl`` and pictures in the run's folder. ``pretrain`` holds the loop and the step;
``measures`` and ``monitoring`` detect collapse; ``optimisation`` turns a recipe into an optimiser. Nothing in the step may wait
for the GPU.
"""
