"""A trained network as an ONNX file, checked against torch before it gets its name."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mammostream.common.errors import BadInput
from mammostream.common.files import sha256_file, whole_file
from mammostream.models.checkpoints import entries_of, load_checkpoint, restore_byol, restore_classifier
from mammostream.shards.reading import ShardSet, check_same_pixels
from mammostream.train.levels.calibration import PROB, TILE, Calibration, plain, stored_calibrations

REAL_TILES = 16
_RANDOM_BATCHES = (1, 5)  # of two sizes: the file takes any
INPUT = "tiles"


class _Exported(nn.Module):
    """The network with what the file is to hold next to it: normalisation before, probabilities after."""

    def __init__(self, model: nn.Module, normalisation: tuple[float, float] | None, calibration: Calibration | None) -> None:
        super().__init__()
        self.model: Any = model
        self.normalisation = normalisation
        self.features = calibration is None
        if calibration is not None:
            self.register_buffer("slope", torch.from_numpy(calibration.slope).float())
            self.register_buffer("intercept", torch.from_numpy(calibration.intercept).float())

    def forward(self, tiles: Tensor) -> tuple[Tensor, ...]:
        if self.normalisation is not None:
            mean, std = self.normalisation
            tiles = (tiles - mean) / std
        if self.features:
            return (self.model.get_features(tiles),)
        logits = self.model.classify(tiles)
        return logits, torch.sigmoid(logits * self.slope + self.intercept)


def export_onnx(
    model_path: Path,
    output: Path,
    *,
    features: bool = False,
    include_normalisation: bool = False,
    shards: ShardSet | None = None,
    tolerance: float = 1e-4,
) -> dict[str, float]:
    """Write a checkpoint's network as ONNX, compare it with torch, and only then give the file its name.

    The input ``tiles`` is (N, 1, S, S) float32 of any N, S being the model's tile size: normalised as in the training, or grey
    in [0, 1] with `include_normalisation`. The outputs are ``logits`` and ``probabilities`` (N, classes), the latter calibrated
    as the checkpoint says, or ``features`` (N, dim). The file's ``metadata_props`` say how tiles are made and normalised, the
    classes, their thresholds and the calibrations of images and breasts, and the hash of the checkpoint.

    torch's exporter through ``torch.export`` is used: it is the one that torch maintains, in 2.8 as in later versions; the
    older one, through TorchScript, is deprecated since 2.9.

    Parameters
    ----------
    model_path
        A classifier's checkpoint; with `features` a BYOL model's will do.
    output
        The ONNX file.
    features
        Export the backbone's features instead of the classifier's answer.
    include_normalisation
        Put the normalisation into the file.
    shards
        Shards whose tiles are compared, too; None compares random tiles alone.
    tolerance
        Largest difference allowed, as a share of the largest output, or absolute where that is below 1.

    Returns
    -------
    dict
        Kind of tiles (``random`` and ``real``) -> the largest difference found.

    Raises
    ------
    BadInput
        The checkpoint is of the wrong kind, the shards' tiles are made differently, or ONNX and torch differ by more than
        `tolerance`.
    """
    import onnx
    import onnxruntime
    import onnxscript  # noqa: F401 - torch's exporter writes through it

    checkpoint = load_checkpoint(model_path, None if features else "classifier")
    with entries_of(model_path, None):
        record = checkpoint["preprocessing"]
        if shards is not None:
            check_same_pixels(record, shards.preprocessing, str(shards.directory))
        restore = restore_byol if checkpoint["kind"] == "byol" else restore_classifier
        normalisation = (record["mean"], record["std"]) if include_normalisation else None
        calibration = None if features else stored_calibrations(checkpoint)[TILE][PROB]
        network = _Exported(restore(checkpoint, model_path), normalisation, calibration).eval()
        size = record.get("view_size") or record["tile_size"]
        properties = _properties(checkpoint, model_path, features, include_normalisation)
    names = ["features"] if features else ["logits", "probabilities"]
    proto = _convert(network, size, names)
    onnx.helper.set_model_props(proto, properties)
    onnx.checker.check_model(proto)
    differences: dict[str, float] = {}
    with whole_file(output) as temporary:
        onnx.save(proto, temporary)
        session = onnxruntime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
        for kind, tiles in _tiles_to_compare(record, include_normalisation, shards):
            difference = _difference(network, session, tiles)
            differences[kind] = max(difference, differences.get(kind, 0.0))
            if not difference <= tolerance:
                raise BadInput(
                    f"the ONNX file of {model_path} differs from torch by {difference:.2g} on {kind} tiles, more than "
                    f"{tolerance:g}; nothing was written: raise --tolerance, or use other versions of torch and onnxruntime"
                )
    return differences


def _convert(network: nn.Module, size: int, names: list[str]) -> Any:
    """Return a network of tiles (N, 1, size, size) as an ONNX model of any N."""
    with _quiet():
        program = torch.onnx.export(
            network,
            (torch.zeros(2, 1, size, size),),
            input_names=[INPUT],
            output_names=names,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    return program.model_proto


def _properties(checkpoint: Mapping[str, Any], path: Path, features: bool, normalised_inside: bool) -> dict[str, str]:
    """Return what the file says of itself: its input, how tiles are made, and what turns logits into decisions."""
    record = checkpoint["preprocessing"]
    properties = {
        "input": "grey in [0, 1]" + ("" if normalised_inside else f", minus {record['mean']}, divided by {record['std']}"),
        "preprocessing": json.dumps(record),
        "arch": checkpoint["arch"],
        "model_sha256": sha256_file(path),
        "mammostream": importlib.metadata.version("mammostream"),
    }
    if not features:
        properties["class_names"] = json.dumps(list(checkpoint["class_names"]))
        properties["calibration"] = json.dumps(plain(stored_calibrations(checkpoint)))
        properties["thresholds"] = json.dumps(checkpoint.get("thresholds"))
    return properties


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter from reporting on operators that no network here has."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def _tiles_to_compare(record: dict[str, Any], plain: bool, shards: ShardSet | None) -> Iterator[tuple[str, Tensor]]:
    """Yield (kind, tiles) as the file takes them: random ones in batches of two sizes, then real ones."""
    mean, std, tile_size = record["mean"], record["std"], record["tile_size"]
    size = record.get("view_size") or tile_size
    generator = torch.Generator().manual_seed(0)
    for count in _RANDOM_BATCHES:
        tiles = torch.rand(count, 1, size, size, generator=generator)
        yield "random", tiles if plain else (tiles - mean) / std
    if shards is None:
        return
    from mammostream.dali_pipelines import LabelledLoader

    numbers = shards.tiles()["tile"].to_numpy()
    chosen = numbers[np.linspace(0, len(numbers) - 1, min(REAL_TILES, len(numbers))).astype(int)]
    options = {"batch_size": len(chosen), "tile_size": tile_size, "view_size": size, "mean": mean, "std": std}
    for tiles, _ in LabelledLoader(shards.shards(), tiles=chosen.tolist(), **options):
        yield "real", (tiles * std + mean if plain else tiles).contiguous()


@torch.no_grad()
def _difference(network: nn.Module, session: Any, tiles: Tensor) -> float:
    """Return the largest difference of any output, as a share of its largest value where that is above 1."""
    largest = 0.0
    for expected, found in zip(network(tiles), session.run(None, {INPUT: tiles.numpy()}), strict=True):
        expected = expected.numpy()
        if found.shape != expected.shape or not np.isfinite(found).all():
            return float("inf")
        largest = max(largest, float(np.abs(found - expected).max() / max(1.0, np.abs(expected).max())))
    return largest
