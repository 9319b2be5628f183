"""The DALI graphs: two views for pre-training, one for training with labels, none for evaluation.

Every graph decodes a tile once and returns (H, W, 1) images on its device, followed by the source's labels on the CPU: the
tile's number and, where shards of several directories are read, the tar it came from. The device decides where decoding and
augmentation run; the graph is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import do_not_convert

from mammostream.dali_pipelines.intensity import ImageFormat
from mammostream.dali_pipelines.readers import FileSource, ShardSource
from mammostream.dali_pipelines.recipes import View
from mammostream.dali_pipelines.views import apply_view, normalise


@do_not_convert
def read_tiles(
    source: ShardSource | FileSource, tile_size: int, device: str, *, checked: bool, **options: Any
) -> tuple[Any, list[Any]]:
    """Return DALI nodes ``(tile, labels)``.

    Parameters
    ----------
    source
        What to read.
    tile_size
        Edge in pixels; a file of another size is resized to it with an antialiasing filter.
    device
        ``cpu``, or ``gpu`` to decode there where the codec allows it (PNG and TIFF with zstd do not).
    checked
        Read the header of each image before the decoder does.
    options
        Arguments of the source's ``nodes``.

    Returns
    -------
    tile, labels
        uint16 (tile_size, tile_size, 1) on `device`, full scale 65535 for every bit depth; the source's labels.
    """
    data, labels = source.nodes(**options)
    if source.raw_bits is not None:
        return _reinterpret(data.gpu() if device == "gpu" else data, source.raw_bits, tile_size), labels
    if checked:
        data = _with_known_header(data)
    # GRAY always: leaving the colours as they are (ANY_DATA) corrupts memory on grayscale JPEG.
    tile = fn.decoders.image(data, device="mixed" if device == "gpu" else "cpu", output_type=types.GRAY, dtype=types.UINT16)
    if source.resizes:
        tile = fn.resize(tile, size=[tile_size, tile_size], antialias=True)
    return tile, labels


def _with_known_header(data: Any) -> Any:
    """Return the same bytes; a batch with bytes that are no image ends here, with an error.

    In DALI 2.4 a header that the decoder cannot parse ends the process if it is one of 32 or more: the tasks of
    other threads go on after what they use is gone.
    """
    shape = fn.peek_image_shape(data)
    # The decoder must not start before: so the length of its input is made to depend on the shape.
    length = fn.slice(fn.cat(data.shape(), shape), 0, 1, axes=[0])
    return fn.reshape(data, shape=fn.cast(length, dtype=types.INT32))


def _reinterpret(data: Any, bits: int, tile_size: int) -> Any:
    shape = [tile_size, tile_size, 1]
    if bits == 16:
        return fn.reinterpret(data, dtype=types.UINT16, shape=shape, layout="HWC")
    return fn.cast(fn.reshape(data, shape=shape, layout="HWC"), dtype=types.UINT16) * types.Constant(257, dtype=types.UINT16)


@pipeline_def(enable_conditionals=True)
def view_pipeline(
    source: ShardSource | FileSource,
    views: Sequence[View],
    *,
    tile_size: int,
    form: ImageFormat,
    device: str,
    checked: bool,
    reader: dict[str, Any],
) -> tuple[Any, ...]:
    """Return independently drawn views of each tile, two for pre-training, and its labels."""
    tile, labels = read_tiles(source, tile_size, device, checked=checked, **reader)
    return *[apply_view(tile, view, tile_size, form) for view in views], *labels


@pipeline_def
def evaluation_pipeline(
    source: ShardSource | FileSource, *, tile_size: int, form: ImageFormat, device: str, checked: bool, reader: dict[str, Any]
) -> tuple[Any, ...]:
    """Return the tile, decoded and normalised with nothing random, and its labels."""
    tile, labels = read_tiles(source, tile_size, device, checked=checked, **reader)
    return normalise(tile, form), *labels
