"""Training and what follows from it, one room per task.

Each room has a ``command.py`` (its command line), a ``config.py`` (its options) and the code that they run. ``run`` holds what
the others share; ``predict`` and ``evaluate`` know nothing of training; ``byol``, ``classify`` and ``probe`` train or score
networks; ``export``, ``report`` and ``bench`` read what the others wrote or measure them. ``pretrain.py`` and ``infer.py`` only
start the commands of these names under ``torchrun -m``.
"""
