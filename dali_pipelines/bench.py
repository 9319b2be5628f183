"""``mammostream bench loader``: the same views from several libraries, measured in turns.

Each contender runs in its own process, so that its CPU time and memory can be measured, and waits while another one runs.
In a round each contender has one turn. Medians over the rounds are reported, and the ratio to ours is taken round by round, so
that a machine that slows down in between slows down both.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from mammostream.common.errors import BadInput
from mammostream.common.files import whole_file
from mammostream.common.machine import describe
from mammostream.common.normalisation import MEAN, STD
from mammostream.common.progress import progress
from mammostream.dali_pipelines.recipes import View
from mammostream.shards.reading import Shard, ShardSet

OURS = "mammostream"
_DISCARDED = 6  # batches at the start of a turn: more than any contender has prefetched
_CLOCK_TICK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Task:
    """The task of every contender: the same tiles, views, batch size and number of workers."""

    shards: tuple[Shard, ...]
    tile_size: int
    views: tuple[View, View]
    batch_size: int
    workers: int
    device: str  # cpu | gpu


@dataclass(frozen=True)
class Turn:
    """One turn of one contender.

    Attributes
    ----------
    rate
        Tiles per second.
    cpu_ms
        CPU time per tile in ms, of the contender and its workers.
    memory_gib
        Memory at the end of the turn, with shared pages counted once (proportional set size).
    """

    rate: float
    cpu_ms: float
    memory_gib: float


def _ours(task: Task) -> Iterator[Any]:
    from mammostream.dali_pipelines.loaders import PretrainLoader

    loader = PretrainLoader(
        task.shards,
        batch_size=task.batch_size,
        views=task.views,
        tile_size=task.tile_size,
        mean=MEAN,
        std=STD,
        device=task.device,
        num_threads=task.workers,
    )
    while True:
        yield from loader


def _decode_only(task: Task) -> Iterator[Any]:
    from mammostream.dali_pipelines.loaders import LabelledLoader

    loader = LabelledLoader(
        task.shards,
        batch_size=task.batch_size,
        tile_size=task.tile_size,
        mean=MEAN,
        std=STD,
        shuffle=True,
        device=task.device,
        num_threads=task.workers,
    )
    while True:
        yield from loader


def _synthetic(task: Task) -> Iterator[Any]:
    import torch

    shape = (task.batch_size, 1, task.tile_size, task.tile_size)
    views = [torch.randn(shape, device=_torch_device(task)) for _ in range(2)]
    while True:
        yield views


def _opencv(task: Task) -> Iterator[Any]:
    from mammostream.dali_pipelines.baselines import OpenCVViews

    yield from _in_workers(task, OpenCVViews(task.views, _form(task)))


def _torchvision(task: Task) -> Iterator[Any]:
    from mammostream.dali_pipelines.baselines import TorchvisionViews

    yield from _in_workers(task, TorchvisionViews(task.views, _form(task)))


def _kornia(task: Task) -> Iterator[Any]:
    from mammostream.dali_pipelines.baselines import kornia_view, unit_tile

    views = [kornia_view(view, _form(task)) for view in task.views]
    for (tiles,) in _in_workers(task, lambda tile: (unit_tile(tile),)):
        yield [view(tiles) for view in views]


def _in_workers(task: Task, transform: Callable) -> Iterator[Any]:
    from mammostream.dali_pipelines.baselines import TileDataset, batches

    for batch in batches(TileDataset(task.shards, transform), task.batch_size, task.workers, task.device):
        yield [tensor.to(_torch_device(task), non_blocking=True) for tensor in batch]


def _form(task: Task) -> Any:
    from mammostream.dali_pipelines.intensity import ImageFormat

    return ImageFormat(task.tile_size, MEAN, STD)


def _torch_device(task: Task) -> str:
    return "cuda" if task.device == "gpu" else "cpu"


# name -> (maker of its batches, packages it needs, description)
CONTENDERS: dict[str, tuple[Callable[[Task], Iterator[Any]], tuple[str, ...], str]] = {
    OURS: (_ours, (), "both views in one DALI graph"),
    "opencv": (_opencv, ("cv2",), "OpenCV in a DataLoader: one homography, one pass over the intensities"),
    "torchvision": (_torchvision, ("torchvision",), "torchvision.transforms.v2 in a DataLoader"),
    "kornia": (_kornia, ("kornia",), "decoding in a DataLoader, kornia on whole batches on the device"),
    "decode only": (_decode_only, (), "our reader and decoder, no views"),
    "synthetic": (_synthetic, (), "the same two tensors every time"),
}


RIVALS = ("opencv", "torchvision", "kornia")  # which do the same work as ours; the other contenders do less


def installed() -> list[str]:
    """Return the contenders whose packages are installed."""
    return [
        name for name, (_, packages, _) in CONTENDERS.items() if all(importlib.util.find_spec(package) for package in packages)
    ]


def measure(task: Task, names: Sequence[str], rounds: int, seconds: float) -> dict[str, list[Turn]]:
    """Give each contender one turn per round and return the turns by name.

    Parameters
    ----------
    task
        The task of every contender.
    names
        Contenders, in the order of the first round; every second round runs in reverse order.
    rounds
        Number of turns of each contender.
    seconds
        Minimum length of a turn.

    Raises
    ------
    BadInput
        A contender fails.
    """
    # Fresh interpreters: no contender inherits another's memory.
    context = multiprocessing.get_context("spawn")
    turns: dict[str, list[Turn]] = {name: [] for name in names}
    children: dict[str, tuple[Any, Connection]] = {}
    try:
        for name in names:
            ours, theirs = context.Pipe()
            child = context.Process(target=_serve, args=(theirs, name, task))
            child.start()
            theirs.close()
            children[name] = (child, ours)
        order = [name for number in range(rounds) for name in (names if number % 2 == 0 else names[::-1])]
        for name in names:
            _answer(name, *children[name])
        for name in progress(order, "measuring", "turn"):
            child, connection = children[name]
            connection.send(seconds)
            turns[name].append(_answer(name, child, connection))
    finally:
        for child, connection in children.values():
            connection.close()  # which ends the child
            child.join(timeout=10)
            child.kill()
    return turns


def _answer(name: str, child: Any, connection: Connection) -> Any:
    try:
        answer = connection.recv()
    except EOFError:
        child.join()
        raise BadInput(f"contender '{name}' ended with exit code {child.exitcode}; see its error above") from None
    if isinstance(answer, str):
        raise BadInput(f"contender '{name}': {answer}")
    return answer


def _serve(connection: Connection, name: str, task: Task) -> None:
    """Run in a contender's process: receive the length of each turn, make batches for that long, and answer with the turn."""
    make = CONTENDERS[name][0]
    try:
        made = make(task)
        next(made)
        connection.send(True)
        while True:
            connection.send(_take_turn(made, connection.recv(), task))
    except (EOFError, ConnectionResetError):  # the parent needs no more
        pass
    except BadInput as error:
        connection.send(str(error))


def _take_turn(made: Iterator[Any], seconds: float, task: Task) -> Turn:
    for _ in range(_DISCARDED):
        next(made)
    tiles, cpu, start = 0, _cpu_seconds(), time.perf_counter()
    while time.perf_counter() - start < seconds:
        tiles += len(next(made)[0])
    if task.device == "gpu":
        import torch

        torch.cuda.synchronize()
    elapsed = time.perf_counter() - start
    return Turn(tiles / elapsed, 1000 * (_cpu_seconds() - cpu) / tiles, _memory_bytes() / 2**30)


def _family() -> list[int]:
    """Return the ids of this process and of its children, which have no children themselves."""
    children = Path("/proc/self/task").glob("*/children")
    return [os.getpid(), *(int(pid) for file in children for pid in file.read_text().split())]


def _cpu_seconds() -> float:
    total = 0
    for pid in _family():
        # The second field, the name, may contain spaces; user and system time are the 14th and 15th.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / _CLOCK_TICK


def _memory_bytes() -> int:
    total = 0
    for pid in _family():
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
    return total


def describe_task(task: Task, shards: ShardSet, recipe: str, rounds: int, seconds: float) -> list[str]:
    """Return the lines to put above the table of results: machine, versions, task."""
    tiles = sum(shard.tiles for shard in task.shards)
    return [
        describe(),
        f"Task: {tiles} tiles of {task.tile_size}×{task.tile_size} pixels, {shards.meta['bits']} bits, codec "
        f"{shards.codec}; recipe {recipe}, two views per tile in float32, batches of {task.batch_size}, {task.workers} threads "
        f"or worker processes, on the {'GPU' if task.device == 'gpu' else 'CPU'}.",
        f"Method: {rounds} rounds of turns of {seconds:g} s in alternating order, each contender in its own process; "
        "medians; the tiles were read before, so they come from the page cache.",
    ]


def table(turns: dict[str, list[Turn]]) -> str:
    """Return a Markdown table of the medians, one row per contender."""
    lines = [
        "| contender | two-view tiles/s | lowest-highest | mammostream is | CPU ms/tile | memory GiB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, all_turns in turns.items():
        rates = [turn.rate for turn in all_turns]
        times = "–"
        if name in RIVALS and OURS in turns:
            ratios = [ours.rate / turn.rate for ours, turn in zip(turns[OURS], all_turns, strict=True)]
            times = f"{statistics.median(ratios):.2f}×"
        cpu, memory = (statistics.median(getattr(t, field) for t in all_turns) for field in ("cpu_ms", "memory_gib"))
        lines.append(
            f"| {name}: {CONTENDERS[name][2]} | {_figure(statistics.median(rates))} | {_figure(min(rates))}-"
            f"{_figure(max(rates))} | {times} | {cpu:.2f} | {memory:.2f} |"
        )
    return "\n".join(lines)


def _figure(rate: float) -> str:
    return f"{rate:,.0f}" if rate < 1e6 else "over a million"


def draw(turns: dict[str, list[Turn]], path: Path, title: str) -> None:
    """Draw the rates of the contenders that do the same work as bars, with the lowest and highest turn."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = {name: [turn.rate for turn in turns[name]] for name in (OURS, *RIVALS) if name in turns}
    figure = Figure(figsize=(7, 0.5 * len(shown) + 1.1), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for position, (name, rates) in enumerate(shown.items()):
        low, median, high = min(rates), statistics.median(rates), max(rates)
        axes.barh(position, median, color="#1769aa" if name == OURS else "#9aa7b0")
        axes.plot([low, high], [position] * 2, color="#39444b", linewidth=1)
        axes.text(high, position, f"  {median:,.0f}", va="center", fontsize=9)
    axes.set_yticks(range(len(shown)), list(shown))
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("tiles per second, two views each; lines: lowest to highest turn", fontsize=9)
    axes.set_title(title, fontsize=10)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
