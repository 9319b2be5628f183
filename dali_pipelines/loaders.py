"""Loaders: DALI batches as torch tensors, epochs of a known length, and a state to resume from."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline

from common.errors import BadInput, first_line
from common.files import sha256_json
from dali_pipelines.pipelines import evaluation_pipeline, labelled_pipeline, pretrain_pipeline
from dali_pipelines.readers import open_source
from dali_pipelines.views import RECIPES, View
from shards.reading import Shard


class _Loader:
    """What the loaders share: the pipeline's life, the count of batches, torch tensors, the state.

    DALI's readers know no end: rank r of W reads its slice of the N tiles, pads the last batch by repeating a sample, and
    goes on with the next epoch. So batches are counted here: an epoch takes the same number of batches on every rank, and
    what is padding follows from the slice's size.

    Iterating goes on where the last iteration stopped: after ``break``, the next ``for`` gives the rest of the epoch.
    """

    def __init__(
        self,
        source: Sequence[Shard] | Sequence[str | Path],
        graph: Callable[..., Pipeline],
        *graph_args: Any,
        batch_size: int,
        tile_size: int,
        mean: float,
        std: float,
        shuffle: bool,
        initial_fill: int,
        drop_tail: bool,
        seed: int,
        device: str,
        num_threads: int,
        tiles: Iterable[int] | None,
        rank: int,
        world_size: int,
    ) -> None:
        if device not in ("cpu", "gpu"):
            raise BadInput(f"device '{device}' is neither 'cpu' nor 'gpu'")
        if device == "gpu" and not torch.cuda.is_available():
            raise BadInput("there is no usable GPU; choose --device cpu or see 'mammostream doctor'")
        if batch_size < 1 or num_threads < 1 or not 0 <= rank < world_size:
            raise BadInput(
                f"batch size {batch_size}, {num_threads} threads, rank {rank} of {world_size}: the first two must be at "
                "least 1, and ranks run from 0"
            )
        self._source = open_source(source, tile_size=tile_size, tiles=tiles)
        self._device_id = torch.cuda.current_device() if device == "gpu" else None

        self.tiles = self._source.count
        """Number of tiles, all ranks together."""
        self.epoch = 0
        """Number of finished epochs, which is the number of the one that goes on."""
        self.wait_seconds = 0.0
        """Time spent waiting for batches so far."""

        if self.tiles < world_size:
            raise BadInput(f"{self.tiles} tiles are fewer than {world_size} processes; start fewer")
        # Rank r's slice is [r N / W, (r + 1) N / W), rounded down: DALI's own rule.
        smallest, largest = self.tiles // world_size, -(-self.tiles // world_size)
        mine = (rank + 1) * self.tiles // world_size - rank * self.tiles // world_size
        # DALI pads every slice to the largest one and to whole batches; some of these are cut or left out here.
        self._reads = -(-largest // batch_size)
        if drop_tail:
            self._rows = [batch_size] * (smallest // batch_size)
        else:
            self._rows = [min(batch_size, mine - done) for done in range(0, mine, batch_size)]
        self._done = 0  # batches of this epoch that were read
        self._setting = {
            "tiles": self.tiles,
            "batch_size": batch_size,
            "seed": seed,  # DALI's checkpoint has its random states, but not the seed of the tars' order
            "rank": rank,
            "world_size": world_size,
            "views": sha256_json(repr(graph_args))[:8],
        }
        self._pipeline: Pipeline | None = None
        self._checkpoint: bytes | None = None  # where to start the pipeline
        self._failure: Exception | None = None  # why the pipeline ended

        # The reader's order must be the same on all ranks, so that their slices are disjoint; the draws must not.
        reader = {
            "shuffle": shuffle,
            "initial_fill": initial_fill,
            **({"shuffle_after_epoch_seed": seed} if shuffle else {}),
            # Without a shuffle DALI would move every rank to the next slice each epoch.
            "stick_to_shard": not shuffle,
            "pad_last_batch": True,
            "num_shards": world_size,
            "shard_id": rank,
        }
        draws = int(np.random.SeedSequence([seed, rank]).generate_state(1)[0] >> 1)

        self._build = partial(
            graph,
            self._source,
            *graph_args,
            tile_size=tile_size,
            mean=mean,
            std=std,
            device=device,
            reader=reader,
            batch_size=batch_size,
            num_threads=num_threads,
            device_id=self._device_id,
            seed=draws,
            enable_checkpointing=True,
        )

    def __len__(self) -> int:
        """Return the number of batches of a whole epoch."""
        return len(self._rows)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yield the batches left of this epoch."""
        while self._done < self._reads:
            batch = self._next()
            self._done += 1
            if self._done <= len(self._rows):
                rows = self._rows[self._done - 1]
                yield tuple(tensor[:rows] for tensor in batch)
        self._done = 0
        self.epoch += 1

    def _next(self) -> tuple[torch.Tensor, ...]:
        """Return the next batch: images (batch_size, 1, H, W) on the device, then the numbers on the CPU."""
        if self._failure is not None:
            raise self._failure
        start = time.perf_counter()
        # On a GPU the batch is bound to torch's stream: the host does not wait for it.
        stream = None if self._device_id is None else torch.cuda.current_stream(self._device_id)
        try:
            if self._pipeline is None:
                self._pipeline = self._build(checkpoint=self._checkpoint)
                self._pipeline.schedule_run()
            outputs = self._pipeline.outputs(stream)
            self._pipeline.schedule_run()  # the next batches are made while this one is used
            *images, numbers = (torch.from_dlpack(output.as_tensor()) for output in outputs)
        except RuntimeError as error:
            # DALI cannot go on after a failure: let go of its memory and threads, and fail again if asked again.
            self._pipeline, self._failure = None, self._explain(error)
            if self._failure is error:
                raise
            raise self._failure from error
        self.wait_seconds += time.perf_counter() - start
        # (N, H, W, 1) seen as (N, 1, H, W) is channels_last already: nothing is copied.
        return (*(image.permute(0, 3, 1, 2) for image in images), numbers)

    def _explain(self, error: RuntimeError) -> Exception:
        """Return BadInput where the data or the state are at fault, else the error itself."""
        text = str(error)
        # The telling line of a DALI error stands below the traceback of the graph.
        reason = first_line(RuntimeError(text.rpartition("encountered:")[2]))
        if "CUDA" in text or "out of memory" in text:
            return error
        if "fn.readers." in text or "fn.decoders." in text:
            return BadInput(f"{self._source.blame()} ({reason})")
        if self._checkpoint is not None and "checkpoint" in text:
            return BadInput(
                f"the saved loader's state does not fit this loader ({reason}); resume with the same device and views"
            )
        return error

    def state_dict(self) -> dict[str, Any]:
        """Return where the loader stands after the batch it gave last.

        Returns
        -------
        dict
            Plain numbers and one uint8 tensor of a few kB, fit for ``torch.save`` and ``torch.load(weights_only=True)``.
            Each rank has its own.
        """
        if self._failure is not None:
            raise self._failure
        checkpoint = self._checkpoint if self._pipeline is None else self._pipeline.checkpoint()
        return {
            **self._setting,
            "epoch": self.epoch,
            "batch": self._done,
            "pipeline": None if checkpoint is None else torch.frombuffer(bytearray(checkpoint), dtype=torch.uint8),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken: the next batches are the same, bit for bit.

        The loader must be made with the same arguments; only `num_threads` may differ.

        Raises
        ------
        BadInput
            The number of tiles, the batch size, the seed, the rank, the number of processes or the views differ. While
            iterating: the state is of another kind of pipeline or damaged.
        """
        for name, value in self._setting.items():
            if state[name] != value:
                raise BadInput(
                    f"the saved loader had {name.replace('_', ' ')} {state[name]}, this one has {value}: resume with the same "
                    "shards, views, --batch-size, --seed and number of processes"
                )
        self.epoch, self._done = state["epoch"], state["batch"]
        self._checkpoint = None if state["pipeline"] is None else state["pipeline"].cpu().numpy().tobytes()
        self._pipeline = self._failure = None


class PretrainLoader(_Loader):
    """Two views of each tile, shuffled anew each epoch; the tail that fills no batch is dropped.

    Yields ``(view1, view2, numbers)``: float32 tensors (batch_size, 1, tile_size, tile_size) on the device, in
    ``channels_last`` strides, and int64 tile numbers (batch_size,) on the CPU. Every rank yields the same number of
    batches.

    Parameters
    ----------
    shards
        The shards to read.
    batch_size
        Tiles a batch and rank.
    views
        What may vary in each view.
    tile_size
        Edge of the tiles in pixels.
    mean, std
        Normalisation in units of full scale.
    seed
        Decides the order and all draws; ranks draw differently.
    device
        ``cpu`` or ``gpu`` (torch's current device).
    num_threads
        CPU threads of the pipeline; they change nothing but speed.
    rank, world_size
        This process, and how many share the tiles.
    tiles
        The numbers of the only tiles to read; None reads all.
    initial_fill
        Samples in the shuffle buffer; the order of the tars changes each epoch besides.

    Raises
    ------
    BadInput
        A shard is damaged, or the tiles fill no batch. While iterating: a tile cannot be read.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        *,
        batch_size: int,
        tile_size: int,
        mean: float,
        std: float,
        views: tuple[View, View] = RECIPES["guide"],
        seed: int = 0,
        device: str = "cpu",
        num_threads: int = 2,
        rank: int = 0,
        world_size: int = 1,
        tiles: Iterable[int] | None = None,
        initial_fill: int = 1024,
    ) -> None:
        super().__init__(
            shards,
            pretrain_pipeline,
            tuple(views),
            batch_size=batch_size,
            tile_size=tile_size,
            mean=mean,
            std=std,
            shuffle=True,
            initial_fill=initial_fill,
            drop_tail=True,
            seed=seed,
            device=device,
            num_threads=num_threads,
            tiles=tiles,
            rank=rank,
            world_size=world_size,
        )
        if not len(self):
            raise BadInput(
                f"{self.tiles} tiles over {world_size} processes fill no batch of {batch_size}; lower --batch-size to "
                f"{self.tiles // world_size} or less"
            )


class LabelledLoader(_Loader):
    """One view of each tile, or the tile as it is; every tile exactly once an epoch, so the last batch may be smaller.

    Yields ``(tiles, numbers)``: a float32 tensor (N, 1, tile_size, tile_size) on the device, in ``channels_last`` strides,
    and int64 numbers (N,) on the CPU, ``N <= batch_size``. Labels join by number. With several ranks, each yields its
    share, and the numbers of batches may differ by one.

    Parameters
    ----------
    source
        Shards, or paths of tile images (PNG or TIFF, 8 or 16 bits; colours are reduced to grey, other sizes resized to
        `tile_size`). A file's number is its position in the list.
    batch_size
        Most tiles a batch and rank.
    tile_size
        Edge of the tiles in pixels.
    mean, std
        Normalisation in units of full scale.
    view
        What may vary; None is the evaluation pipeline, which draws nothing.
    shuffle
        Whether the order changes each epoch; otherwise it is the source's.
    seed, device, num_threads, rank, world_size, tiles, initial_fill
        As for :class:`PretrainLoader`; `tiles` are positions where the source is files.

    Raises
    ------
    BadInput
        A shard is damaged or a file missing. While iterating: a tile or file cannot be read.
    """

    def __init__(
        self,
        source: Sequence[Shard] | Sequence[str | Path],
        *,
        batch_size: int,
        tile_size: int,
        mean: float,
        std: float,
        view: View | None = None,
        shuffle: bool = False,
        seed: int = 0,
        device: str = "cpu",
        num_threads: int = 2,
        tiles: Iterable[int] | None = None,
        rank: int = 0,
        world_size: int = 1,
        initial_fill: int = 1024,
    ) -> None:
        graph, graph_args = (evaluation_pipeline, ()) if view is None else (labelled_pipeline, (view,))
        super().__init__(
            source,
            graph,
            *graph_args,
            batch_size=batch_size,
            tile_size=tile_size,
            mean=mean,
            std=std,
            shuffle=shuffle,
            initial_fill=initial_fill,
            drop_tail=False,
            seed=seed,
            device=device,
            num_threads=num_threads,
            tiles=tiles,
            rank=rank,
            world_size=world_size,
        )
