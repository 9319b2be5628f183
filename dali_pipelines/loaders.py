"""Loaders: DALI batches as torch tensors, epochs of a known length, and a state to resume from.

How well tiles are mixed: ``shards build`` assigns films to shards at random and shuffles the tiles within each shard. Here the
tars come in a new order each epoch, and samples pass through a buffer of `initial_fill`, from which each batch is drawn. So a
batch mixes the tiles of the tars that the buffer spans: choose `initial_fill` at least as large as the number of tiles in a few
tars. Each of W ranks reads one contiguous W-th of an epoch's order, a different one each epoch.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mammostream.common.buckets import lost_connection
from mammostream.common.errors import BadInput, first_line
from mammostream.common.files import sha256_json
from mammostream.dali_pipelines.draws import drawn_source
from mammostream.dali_pipelines.freed_memory import keep_freed_memory
from mammostream.dali_pipelines.inference import resize
from mammostream.dali_pipelines.intensity import ImageFormat
from mammostream.dali_pipelines.loader_config import LoaderConfig
from mammostream.dali_pipelines.pipelines import evaluation_pipeline, view_pipeline
from mammostream.dali_pipelines.readers import FileSource, ShardSource, allow_open_files, open_source
from mammostream.dali_pipelines.recipes import RECIPES, View
from mammostream.shards.reading import Shard


class UnreadableTile(BadInput):
    """A tile that DALI cannot read. Which one is looked up only when the message is needed, since that may take time."""

    def __init__(self, source: ShardSource | FileSource, error: str, reason: str) -> None:
        super().__init__(source, error, reason)

    def __str__(self) -> str:
        source, error, reason = self.args
        return source.blame(error, reason)


class _Loader:
    """What both loaders share: starting the pipeline, counting batches, torch tensors, the state.

    DALI's readers do not stop at the end of an epoch: rank r of W reads its slice of the N tiles, pads the last batch by
    repeating a sample, and continues with the next epoch. So batches are counted here: an epoch takes the same number of
    batches on every rank, and the size of the slice tells which rows are padding.

    Iteration continues where the last one stopped: after ``break``, the next ``for`` yields the rest of the epoch.

    On a GPU, a batch belongs to the stream that was torch's current one when the batch was returned: its memory is reused once
    the batch is freed and that stream has reached this point. Wait for work on other streams before freeing a batch.
    """

    def __init__(
        self,
        source: Sequence[Shard] | Sequence[str | Path],
        config: LoaderConfig,
        *,
        views: tuple[View, ...],
        tiles: Iterable[int] | None,
        shuffle: bool,
        drop_tail: bool,
        draw: Callable[[int], np.ndarray] | None = None,
    ) -> None:
        rank, world_size = config.rank_and_world_size()
        batch_size, device = config.batch_size, config.device
        if device == "gpu" and not torch.cuda.is_available():
            raise BadInput("there is no usable GPU; choose --device cpu or see 'mammostream doctor'")
        form = ImageFormat(config.size, config.mean, config.std, config.dtype)
        self._source = open_source(source, tile_size=config.tile_size, tiles=tiles)
        self._draw = draw
        self._read = self._source  # what the pipeline reads: with `draw`, the tiles of this epoch
        self._device_id = torch.cuda.current_device() if device == "gpu" else None
        if not config.mmap:
            allow_open_files(self._source.file_count)
        if device == "cpu" and config.keep_memory:
            keep_freed_memory()

        self.tiles = self._source.count
        """Number of tiles, all ranks together."""
        self.epoch = 0
        """Number of finished epochs, which is the index of the current one."""
        self.wait_seconds = 0.0
        """Time spent waiting for batches so far."""

        if self.tiles < world_size:
            raise BadInput(f"{self.tiles} tiles are too few for {world_size} processes; start fewer processes")
        # Rank r's slice is [r N / W, (r + 1) N / W), rounded down: DALI's own rule.
        smallest, largest = self.tiles // world_size, -(-self.tiles // world_size)
        mine = (rank + 1) * self.tiles // world_size - rank * self.tiles // world_size
        # DALI pads every slice to the largest one and to whole batches; the padding is cut off or skipped here.
        self._reads = -(-largest // batch_size)
        if drop_tail:
            self._rows = [batch_size] * (smallest // batch_size)
        else:
            self._rows = [min(batch_size, mine - done) for done in range(0, mine, batch_size)]
        self._done = 0  # batches read so far in this epoch
        self._setting: dict[str, Any] = {
            "tiles": self.tiles,
            "seed": config.seed,  # DALI's checkpoint has its random states, but not the seed of the order of the tars
            "views": sha256_json(repr((views, form, config.tile_size)))[:8],
            # These may differ when the number of processes differs.
            "world_size": world_size,
            "rank": rank,
            "batch_size": batch_size,
            "initial_fill": config.initial_fill,
        }
        self._pipeline: Any = None
        self._checked = True  # whether the pipeline reads headers before it decodes; one whose state is older does not
        self._checkpoint: bytes | None = None  # where to start the pipeline
        self._origin = 0  # the epoch at whose start the order and the draws were last seeded
        self._failure: Exception | None = None  # why the pipeline ended

        self._reader = {
            "shuffle": shuffle,
            "initial_fill": config.initial_fill,
            # Without a shuffle DALI would move every rank to the next slice each epoch.
            "stick_to_shard": not shuffle,
            "pad_last_batch": True,
            "num_shards": world_size,
            "shard_id": rank,
            "dont_use_mmap": not config.mmap,
        }
        self._build = partial(
            partial(view_pipeline, views=views) if views else evaluation_pipeline,
            form=form,
            tile_size=config.tile_size,
            device=device,
            batch_size=batch_size,
            num_threads=config.num_threads,
            device_id=self._device_id,
            enable_checkpointing=True,
        )

    def __len__(self) -> int:
        """Return the number of batches of a whole epoch."""
        return len(self._rows)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yield the remaining batches of this epoch."""
        while self._done < self._reads:
            batch = self._next()
            self._done += 1
            if self._done <= len(self._rows):
                rows = self._rows[self._done - 1]
                yield tuple(tensor[:rows] for tensor in batch)
        self._done = 0
        self.epoch += 1
        if self._draw is not None:  # the pipeline reads the tiles of one epoch
            self._pipeline = None
            self._begin_anew()

    def start(self) -> None:
        """Build the pipeline and start reading, so that the first batch is ready, or nearly, when it is requested.

        Otherwise both happen with the first batch. It may run in another thread, if it ends before the iteration starts.
        """
        if self._pipeline is None and self._failure is None:
            try:
                self._start()
            except RuntimeError as error:
                self._fail(error)

    def _fail(self, error: RuntimeError) -> None:
        """Raise the error that explains a failure of DALI."""
        # DALI cannot continue after a failure: release its memory and threads, and raise the same error on the next call.
        self._pipeline, self._failure = None, self._explain(error)
        if self._failure is error:
            raise error
        raise self._failure from error

    def _next(self) -> tuple[torch.Tensor, ...]:
        """Return the next batch: images (batch_size, 1, H, W) on the device, then the numbers on the CPU."""
        if self._failure is not None:
            raise self._failure
        start = time.perf_counter()
        # On a GPU the batch is ordered on torch's stream, so the host does not wait for it.
        stream = None if self._device_id is None else torch.cuda.current_stream(self._device_id)
        try:
            if self._pipeline is None:
                self._start()
            outputs = self._pipeline.outputs(stream)
            self._pipeline.schedule_run()  # the next batches are prepared while this one is used
            images = [torch.from_dlpack(output.as_tensor()) for output in outputs[: -self._source.label_count]]
            numbers = self._source.numbers(*outputs[-self._source.label_count :])
        except RuntimeError as error:
            self._fail(error)
        self.wait_seconds += time.perf_counter() - start
        # (N, H, W, 1) viewed as (N, 1, H, W) is already channels_last: nothing is copied.
        return (*(image.permute(0, 3, 1, 2) for image in images), numbers)

    def _start(self) -> None:
        """Build the pipeline at the position of the checkpoint, or at the start of an epoch."""
        seed, rank = self._setting["seed"], self._setting["rank"]
        # The reader's order must be the same on all ranks, so that their slices are disjoint; the random draws must differ.
        order = {"shuffle_after_epoch_seed": seed + self._origin} if self._reader["shuffle"] else {}
        draws = int(np.random.SeedSequence([seed, rank, self._origin]).generate_state(1)[0] >> 1)
        if self._draw is not None:
            self._read = drawn_source(self._source, self._draw(self.epoch))
        self._pipeline = self._build(
            self._read, reader=self._reader | order, seed=draws, checkpoint=self._checkpoint, checked=self._checked
        )
        self._pipeline.schedule_run()

    def _explain(self, error: RuntimeError) -> Exception:
        """Return BadInput if the data or the state are at fault, otherwise the error itself."""
        text = str(error)
        # The informative line of a DALI error comes after the traceback of the graph.
        reason = first_line(RuntimeError(text.rpartition("encountered:")[2]))
        if "CUDA" in text or "out of memory" in text:
            return error
        # All members are known to lie within their tars, so a read that fails in a bucket is a lost connection.
        if self._source.bucket is not None and "fn.readers." in text:
            return lost_connection(self._source.bucket, reason)
        if any(name in text for name in ("fn.readers.", "fn.peek_image_shape", "fn.decoders.", "fn.reinterpret", "fn.reshape")):
            return UnreadableTile(self._read, text, reason)
        if self._checkpoint is not None and "checkpoint" in text:
            return BadInput(
                f"the saved loader's state does not fit this loader ({reason}); resume with the same device and views"
            )
        return error

    def state_dict(self) -> dict[str, Any]:
        """Return the loader's position after the last batch that it returned.

        Returns
        -------
        dict
            Plain numbers and one uint8 tensor of a few kB, suitable for ``torch.save`` and ``torch.load(weights_only=True)``.
            Each rank has a different state.
        """
        if self._failure is not None:
            raise self._failure
        checkpoint = self._checkpoint if self._pipeline is None else self._pipeline.checkpoint()
        return {
            **self._setting,
            "epoch": self.epoch,
            "batch": self._done,
            "origin": self._origin,
            "checked": self._checked,
            "pipeline": None if checkpoint is None else torch.frombuffer(bytearray(checkpoint), dtype=torch.uint8),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken: the next batches are the same, bit for bit.

        The loader must be made with the same arguments; only `num_threads` and `mmap` may differ. With another number of
        processes, the state of any rank can be loaded: the unfinished epoch then restarts in a new order, with a warning, and
        `batch_size` and `initial_fill` may differ too.

        Raises
        ------
        BadInput
            The tiles, the seed or the views differ; or, with the same number of processes, the rank, the batch size or
            `initial_fill`. While iterating: the state is damaged or belongs to another kind of pipeline.
        """
        moved = state["world_size"] != self._setting["world_size"]
        for name in ("tiles", "seed", "views") if moved else self._setting:
            if state[name] != self._setting[name]:
                raise BadInput(
                    f"the saved loader had {name.replace('_', ' ')} {state[name]}, this one has {self._setting[name]}: resume "
                    "with the same shards, views, --batch-size and --seed"
                )
        self.epoch, self._done, self._origin = state["epoch"], state["batch"], state["origin"]
        self._checkpoint = None if state["pipeline"] is None else state["pipeline"].cpu().numpy().tobytes()
        self._checked = self._checkpoint is None or state.get("checked", False)
        self._pipeline = self._failure = None
        if moved:
            if self._done:
                warnings.warn(
                    f"the state was saved by {state['world_size']} processes but is loaded by {self._setting['world_size']}: "
                    f"epoch {self.epoch + 1} restarts from its beginning ({self._done} of its batches had been read)",
                    stacklevel=2,
                )
            self._begin_anew()

    def _begin_anew(self) -> None:
        """Begin the current epoch with an order and draws of its own, which no earlier epoch decides."""
        self._done, self._origin, self._checkpoint, self._checked = 0, self.epoch, None, True


class PretrainLoader(_Loader):
    """Two views of each tile, reshuffled each epoch; an incomplete last batch is dropped.

    Yields ``(view1, view2, numbers)``: tensors (batch_size, 1, view_size, view_size) on the device, in ``channels_last``
    strides, and int64 tile numbers (batch_size,) on the CPU. Every rank yields the same number of batches.

    Parameters
    ----------
    shards
        The shards to read, of one directory or several; for the tile numbers see :mod:`mammostream.dali_pipelines.readers`.
    config
        How to read them; None if `options` holds everything.
    views
        What may vary in each view.
    view_size
        Edge of the views in pixels; None uses the tiles' size. A smaller view shows the whole tile, resampled once without
        an antialiasing filter; it is meant for recipes that crop.
    tiles
        Numbers of the tiles to read; None reads all.
    options
        Fields of :class:`~mammostream.dali_pipelines.loader_config.LoaderConfig`: used instead of `config`, or to
        override some of its fields.

    Raises
    ------
    BadInput
        A shard is damaged, or there are fewer tiles than one batch per rank. While iterating: a tile cannot be read.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        config: LoaderConfig | None = None,
        *,
        views: tuple[View, View] = RECIPES["guide"],
        tiles: Iterable[int] | None = None,
        **options: Any,
    ) -> None:
        config = LoaderConfig.of(config, options)
        super().__init__(shards, config, views=tuple(views), tiles=tiles, shuffle=True, drop_tail=True)
        if not len(self):
            processes = self._setting["world_size"]
            raise BadInput(
                f"{self.tiles} tiles over {processes} processes fill no batch of {config.batch_size}; lower --batch-size to "
                f"{self.tiles // processes} or less"
            )


class LabelledLoader(_Loader):
    """One view of each tile, or the tile as it is; each once per epoch unless drawn, so the last batch may be smaller.

    Yields ``(tiles, numbers)``: a tensor (N, 1, view_size, view_size) on the device, in ``channels_last`` strides, and int64
    numbers (N,) on the CPU, ``N <= batch_size``. Labels are joined by number. With several ranks, each yields its share, and
    the number of batches may differ by one.

    Parameters
    ----------
    source
        Shards, or paths of tile images (PNG or TIFF, 8 or 16 bits; colours are reduced to grey, other sizes resized to
        `tile_size`). A file's number is its position in the list.
    config
        How to read them; None if `options` holds everything.
    view
        What may vary; None selects the evaluation pipeline, which draws nothing.
    shuffle
        Whether the order changes each epoch; otherwise it is the source's.
    tiles
        Numbers of the tiles to read, or positions if the source is files; None reads all.
    draw
        Epoch (from 0) -> the numbers to read in it, as many as there are `tiles`: some several times, others not at all. None
        reads each once. It needs `shuffle`, `tiles` and memory maps, and is the same on all ranks, which share its draws.
    options
        Fields of :class:`~mammostream.dali_pipelines.loader_config.LoaderConfig`: used instead of `config`, or to
        override some of its fields.

    Raises
    ------
    BadInput
        A shard is damaged or a file missing. While iterating: a tile or file cannot be read.
    """

    def __init__(
        self,
        source: Sequence[Shard] | Sequence[str | Path],
        config: LoaderConfig | None = None,
        *,
        view: View | None = None,
        shuffle: bool = False,
        tiles: Iterable[int] | None = None,
        draw: Callable[[int], np.ndarray] | None = None,
        **options: Any,
    ) -> None:
        config = LoaderConfig.of(config, options)
        views = () if view is None else (view,)
        if draw is not None and not (tiles is not None and shuffle and config.mmap):  # each part of an epoch opens its tars
            raise ValueError("draws need a choice of tiles, a shuffle and memory maps")
        super().__init__(source, config, views=views, tiles=tiles, shuffle=shuffle, drop_tail=False, draw=draw)
        self._size = config.size

    def _next(self) -> tuple[torch.Tensor, ...]:
        tiles, numbers = super()._next()
        # A view is drawn at its size; tiles as they are get it by the filter that single tiles in memory get it by.
        return resize(tiles, self._size), numbers
