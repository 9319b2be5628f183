"""Quality of frozen features: linear and nearest-neighbour probes on labels.

In: networks (checkpoints, random or ImageNet weights) and labelled tiles. Out: AUCs with intervals over patients, as JSON,
CSV and a chart; during pre-training, one figure per probe. No patient is ever both fitted on and scored.
"""
