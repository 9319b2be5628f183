"""Networks to compare, and their features of tiles, cached on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mammostream.common.files import sha256_file, sha256_json, whole_file
from mammostream.common.normalisation import MEAN, STD
from mammostream.dali_pipelines import LabelledLoader
from mammostream.models.backbones import build_backbone, encode
from mammostream.models.checkpoints import entries_of, load_checkpoint, restore_byol, restore_classifier
from mammostream.models.tensors import place
from mammostream.shards.reading import ShardSet, check_same_pixels, view_size_of
from mammostream.train.probe.config import ProbeConfig
from mammostream.train.probe.labelled import ProbeSet
from mammostream.train.run.runtime import Runtime


@dataclass(frozen=True)
class Network:
    """A backbone to probe.

    Attributes
    ----------
    name
        Shown in tables.
    build
        Maps a seed to the backbone, on the CPU.
    identity
        Maps a seed to a string that identifies the weights, for the cache.
    mean, std
        The input normalisation that it expects.
    view_size
        Edge in pixels that tiles are resized to before it sees them; None for their own size.
    """

    name: str
    build: Callable[[int], nn.Module]
    identity: Callable[[int], str]
    mean: float = MEAN
    std: float = STD
    view_size: int | None = None


@torch.no_grad()
def extract_features(
    backbone: nn.Module,
    probe_set: ProbeSet,
    runtime: Runtime,
    config: Any,
    mean: float = MEAN,
    std: float = STD,
    view_size: int | None = None,
) -> np.ndarray:
    """Return the features (N, D) float32 of the labelled tiles, through the pipeline that inference uses.

    The backbone runs in evaluation mode and its mode is restored; no random number is drawn from torch's generators.

    Parameters
    ----------
    config
        ``batch_size`` and ``num_workers``.
    """
    tiles, was_training = probe_set.tiles, backbone.training
    loader = LabelledLoader(
        tiles.source,
        batch_size=config.batch_size,
        tile_size=probe_set.shards.preprocessing["tile_size"],
        view_size=view_size,
        mean=mean,
        std=std,
        device="gpu" if runtime.device.type == "cuda" else "cpu",
        num_threads=config.num_workers,
        tiles=tiles.numbers.tolist(),
        rank=0,
        world_size=1,
    )
    features = np.empty((len(tiles.numbers), 0), np.float32)
    backbone.eval()
    try:
        for batch, numbers in loader:
            with runtime.autocast():
                found = encode(backbone, batch).float().cpu().numpy()
            if not features.shape[1]:
                features = np.empty((len(tiles.numbers), found.shape[1]), np.float32)
            features[tiles.rows(numbers).numpy()] = found
    finally:
        backbone.train(was_training)
    return features


def cached_features(
    network: Network, seed: int, probe_set: ProbeSet, runtime: Runtime, config: ProbeConfig, folder: Path
) -> np.ndarray:
    """Return :func:`extract_features` of a network, cached in `folder`.

    The file's name is a hash of the weights, the shards' bytes, the tiles, the normalisation and the precision.
    """
    what = {
        "network": network.identity(seed),
        "shards": probe_set.shards.sha256,  # it holds the hash of each tar
        "tiles": sha256_json(probe_set.tiles.numbers.tolist()),
        "normalisation": [network.mean, network.std],
        **({"view_size": network.view_size} if network.view_size else {}),
        "runtime": str(runtime),
    }
    path = folder / f"features_{sha256_json(what)[:16]}.npy"
    if path.is_file():
        return np.load(path)
    backbone = place(network.build(seed), runtime.device)
    features = extract_features(backbone, probe_set, runtime, config, network.mean, network.std, network.view_size)
    with whole_file(path) as temporary, temporary.open("wb") as file:
        np.save(file, features)
    return features


def checkpoint_network(path: Path, name: str, shards: ShardSet) -> tuple[Network, str]:
    """Return the backbone of a BYOL or classifier checkpoint, and its architecture.

    Raises
    ------
    BadInput
        It is not a checkpoint, or was trained on tiles of another size, mapping or spacing than the shards'.
    """
    checkpoint = load_checkpoint(path, None)
    with entries_of(path, None):
        record = checkpoint["preprocessing"]
        check_same_pixels(record, shards.preprocessing, str(shards.directory))
        restore = restore_byol if checkpoint["kind"] == "byol" else restore_classifier
        backbone = restore(checkpoint, path).backbone
        digest = sha256_file(path)
        size = view_size_of(record, shards.preprocessing["tile_size"])
        return Network(name, lambda _: backbone, lambda _: digest, record["mean"], record["std"], size), checkpoint["arch"]


def random_network(arch: str, view_size: int | None = None) -> Network:
    """Return a backbone with random weights, different for each seed."""

    def build(seed: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return build_backbone(arch)

    identity = f"random {arch}"
    return Network(
        identity + _at(view_size), build, lambda seed: f"{identity} {seed} torch {torch.__version__}", view_size=view_size
    )


def imagenet_network(arch: str, weights: str | Path = "imagenet", view_size: int | None = None) -> Network:
    """Return a backbone with ImageNet weights, from torchvision or from a file.

    Raises
    ------
    BadInput
        The weights cannot be downloaded or read.
    """
    backbone = build_backbone(arch, weights)
    identity = f"imagenet {arch}" if str(weights) == "imagenet" else sha256_file(Path(weights))
    return Network(f"ImageNet {arch}" + _at(view_size), lambda _: backbone, lambda _: identity, view_size=view_size)


def _at(view_size: int | None) -> str:
    return f" at {view_size} px" if view_size else ""
