"""The DALI graphs: two views for pre-training, one for training with labels, none for evaluation.

Every graph decodes a tile once and gives float32 (tile_size, tile_size, 1) images on its device, followed by the tile's
number on the CPU. The device decides where decoding and augmentation run; the graph is the same.
"""

from __future__ import annotations

from typing import Any

from nvidia.dali import fn, pipeline_def, types

from dali_pipelines.readers import FileSource, ShardSource
from dali_pipelines.views import View, apply_view, normalise


def read_tiles(source: ShardSource | FileSource, tile_size: int, device: str, **options: Any) -> tuple[Any, Any]:
    """Return DALI nodes ``(tile, number)``.

    Parameters
    ----------
    source
        What to read.
    tile_size
        Edge in pixels; a file of another size is resized to it with an antialiasing filter.
    device
        ``cpu``, or ``gpu`` for decoding there as far as the codec allows (PNG never does).
    options
        Arguments of the source's ``nodes``.

    Returns
    -------
    tuple of DataNode
        uint16 (tile_size, tile_size, 1) on `device`, full scale 65535 whatever the stored depth; int64 () on the CPU.
    """
    raw, number = source.nodes(**options)
    # GRAY always: leaving the colours as they are (ANY_DATA) corrupts memory on grayscale JPEG.
    tile = fn.decoders.image(raw, device="mixed" if device == "gpu" else "cpu", output_type=types.GRAY, dtype=types.UINT16)
    if source.resizes:
        tile = fn.resize(tile, size=[tile_size, tile_size], antialias=True)
    return tile, fn.reshape(fn.cast(number, dtype=types.INT64), shape=[])


@pipeline_def(enable_conditionals=True)
def pretrain_pipeline(
    source: ShardSource | FileSource,
    views: tuple[View, View],
    *,
    tile_size: int,
    mean: float,
    std: float,
    device: str,
    reader: dict[str, Any],
) -> tuple[Any, Any, Any]:
    """Return ``(view1, view2, number)``: two independently drawn views of each tile."""
    tile, number = read_tiles(source, tile_size, device, **reader)
    view1 = apply_view(tile, views[0], tile_size=tile_size, mean=mean, std=std)
    view2 = apply_view(tile, views[1], tile_size=tile_size, mean=mean, std=std)
    return view1, view2, number


@pipeline_def(enable_conditionals=True)
def labelled_pipeline(
    source: ShardSource | FileSource,
    view: View,
    *,
    tile_size: int,
    mean: float,
    std: float,
    device: str,
    reader: dict[str, Any],
) -> tuple[Any, Any]:
    """Return ``(view, number)``."""
    tile, number = read_tiles(source, tile_size, device, **reader)
    return apply_view(tile, view, tile_size=tile_size, mean=mean, std=std), number


@pipeline_def(enable_conditionals=True)
def evaluation_pipeline(
    source: ShardSource | FileSource,
    *,
    tile_size: int,
    mean: float,
    std: float,
    device: str,
    reader: dict[str, Any],
) -> tuple[Any, Any]:
    """Return ``(tile, number)``: decoded and normalised, nothing random."""
    tile, number = read_tiles(source, tile_size, device, **reader)
    return normalise(tile, mean, std), number


@pipeline_def
def _decode_pipeline(source: FileSource) -> Any:
    return read_tiles(source, 8, "cpu", shuffle=False, initial_fill=1)[0]


def count_readable(source: FileSource) -> int:
    """Return how many files, from the first on, DALI reads and decodes before one fails."""
    # One file a batch, in order: the batches that came before the failure tell which file it was.
    pipeline = _decode_pipeline(source, batch_size=1, num_threads=1, device_id=None)
    for done in range(source.count):
        try:
            pipeline.run()
        except RuntimeError:
            return done
    return source.count
