"""``mammostream bench step``: the training step measured one rung of the ladder after the other."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._inductor.cudagraph_trees import reset_cudagraph_trees

from mammostream.common.errors import first_line
from mammostream.common.machine import describe
from mammostream.common.normalisation import MEAN, STD
from mammostream.common.progress import progress
from mammostream.dali_pipelines import RECIPES, PretrainLoader
from mammostream.models.tensors import place
from mammostream.train.bench.ladder import (
    _LR,
    _MOMENTUM,
    NAIVE,
    RUNGS,
    AsTorchMakesIt,
    Rung,
    Task,
    build_model,
    plain_step,
    rung_config,
)
from mammostream.train.byol.flops import flops_per_pair, mfu, peak_flops
from mammostream.train.byol.optimisation import build_optimizer, resolve_optimisation
from mammostream.train.byol.speed import accelerate, collecting_on_schedule, resolve_compile, search_convolutions
from mammostream.train.byol.step import TrainingState, train_step
from mammostream.train.run.runtime import resolve_runtime

_PROFILED_STEPS = 5


@dataclass
class Result:
    """What a rung came to.

    Attributes
    ----------
    rates
        Pairs per second of each turn.
    waits
        Share of each turn that the step waited for data, 0-1; empty with synthetic views.
    peak_bytes
        Torch's memory at its peak, of this rung alone; None on a CPU.
    failure
        Why it failed, in one line; turns before that stay.
    """

    rates: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    failure: str = ""


def measure(task: Task, names: Sequence[str]) -> dict[str, Result]:
    """Give each rung a turn a round and return what they came to, by name.

    A rung that fails, by lack of memory or in a compiler, says so in its result; the others continue. CUDA graphs keep their
    memory, so they are measured by themselves after the others.
    """
    apart = [name for name in names if RUNGS[name].compiling == "graphs"]
    together = [name for name in names if name not in apart]
    results = {name: Result() for name in names}
    groups = [group for group in (together, *([name] for name in apart)) if group]
    with (
        progress(None, f"batch {task.batch_size}", "turn", total=len(names) * (task.rounds + 1)) as bar,
        collecting_on_schedule(),
    ):
        for group in groups:
            _measure_group(task, group, results, bar)
            torch.compiler.reset()
            reset_cudagraph_trees()  # which the line above leaves, with their memory
            _free()
    return results


def _measure_group(task: Task, names: Sequence[str], results: dict[str, Result], bar: Any) -> None:
    """Measure rungs that take turns; what they hold goes with the end of this function."""
    running = {}
    for name in names:
        running[name] = _attempt(results[name], _Contender, task, RUNGS[name])
        if running[name] is not None:
            results[name].peak_bytes = running[name].peak_bytes
        bar.update()
    for number in range(task.rounds):
        for name in names if number % 2 == 0 else names[::-1]:
            if running[name] is not None:
                _attempt(results[name], running[name].turn, results[name])
            if results[name].failure:
                running[name] = None
                _free()
            bar.update()


def profile(task: Task, name: str) -> str:
    """Return torch's table of the operations that a rung's steps spend the most time in."""
    contender = _Contender(task, RUNGS[name])
    on_gpu = contender.runtime.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        for _ in range(_PROFILED_STEPS):
            contender.step()
        contender.wait()
    order = f"self_{'cuda' if on_gpu else 'cpu'}_time_total"
    return profiler.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=80)


class _Contender:
    """A rung's network and data, warmed up."""

    def __init__(self, task: Task, rung: Rung) -> None:
        self._task, self._rung = task, rung
        config = rung_config(task, rung)
        self.runtime = resolve_runtime(config)
        device = self.runtime.device
        compiling = resolve_compile(config, self.runtime)
        search_convolutions(device)
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0

        self._config = config
        self._state = self._make_state(compiling)
        self._loader = self._make_loader() if rung.real else None
        self._batches = self._endlessly() if rung.real else self._synthetic()
        for number in range(task.warmup):
            self.step()
            if number == 0 and device.type == "cuda":  # without what cuDNN's search took
                torch.cuda.reset_peak_memory_stats(device)
        self.wait()
        self.peak_bytes = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None

    def turn(self, result: Result) -> None:
        """Take a turn's steps after one that does not count, and note its figures."""
        self.step()
        self.wait()
        waited = self._loader.wait_seconds if self._loader else 0.0
        seconds = self._time_steps()
        result.rates.append(self._task.steps * self._task.batch_size / seconds)
        if self._loader:
            result.waits.append((self._loader.wait_seconds - waited) / seconds)

    def step(self) -> None:
        """Take one step."""
        if self._rung.plain:
            plain_step(self._state, self.runtime, self._config, next(self._batches))
        else:
            train_step(self._state, self.runtime, self._config, [next(self._batches)])
            self._state.step = 0  # the schedules here never end

    def wait(self) -> None:
        """Wait for the device."""
        if self.runtime.device.type == "cuda":
            torch.cuda.synchronize(self.runtime.device)

    def _time_steps(self) -> float:
        """Return the seconds that a turn's steps take, on a GPU by its own clock."""
        if self.runtime.device.type != "cuda":
            start = time.perf_counter()
            for _ in range(self._task.steps):
                self.step()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(self._task.steps):
            self.step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    def _make_state(self, compiling: str) -> TrainingState:
        rung, device = self._rung, self.runtime.device
        torch.manual_seed(0)
        model = build_model(self._task.arch, rung)
        model = (place(model, device) if rung.channels_last else model.to(device)).train()
        optimizer = build_optimizer(model, resolve_optimisation(self._config, self._task.batch_size))
        if rung.plain or not rung.fused:
            optimizer = AsTorchMakesIt([p for p in model.parameters() if p.requires_grad], lr=0.0, weight_decay=1e-4)
        return TrainingState(
            model, accelerate(model, compiling), optimizer, self.runtime.scaler(), np.array([_LR]), np.array([_MOMENTUM])
        )

    def _synthetic(self) -> Iterator[tuple[Tensor, Tensor]]:
        task, rung = self._task, self._rung
        layout = torch.channels_last if rung.channels_last else torch.contiguous_format
        view1, view2 = (
            torch.randn(task.batch_size, 1, task.tile_size, task.tile_size)
            .expand(-1, rung.channels, -1, -1)
            .to(self.runtime.device)
            .contiguous(memory_format=layout)
            for _ in range(2)
        )
        while True:
            yield view1, view2

    def _make_loader(self) -> PretrainLoader:
        task = self._task
        return PretrainLoader(
            task.shards,
            batch_size=task.batch_size,
            views=RECIPES["guide"],
            tile_size=task.shard_tile_size,
            view_size=task.tile_size,
            mean=MEAN,
            std=STD,
            device="gpu" if self.runtime.device.type == "cuda" else "cpu",
            num_threads=task.workers,
        )

    def _endlessly(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            assert self._loader is not None
            for view1, view2, _ in self._loader:
                yield view1, view2


def _attempt(result: Result, action: Callable[..., Any], *arguments: Any) -> Any:
    """Return what an action returns; where it fails, note why, free what it held, and return None."""
    try:
        return action(*arguments)
    except Exception as error:  # a compiler raises whatever it meets
        result.failure = f"{type(error).__name__}: {first_line(error)}"
    _free()
    return None


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def describe_task(task: Task, flops: int) -> list[str]:
    """Return the lines that a table of figures needs above it: machine, versions, task, method."""
    runtime = resolve_runtime(rung_config(task, Rung("")))
    peak = peak_flops(runtime.device)
    against = f"; MFU against {peak / 1e12:.0f} TFLOP/s, the datasheet's dense bf16" if peak else ""
    return [
        describe(),
        f"Task: a BYOL step of {task.arch} on two views of {task.tile_size}×{task.tile_size} pixels, {runtime}; "
        f"{flops / 1e9:.1f} GFLOP a pair, counted by torch{against}.",
        f"Method: {task.rounds} rounds of turns of {task.steps} steps in alternating order after {task.warmup} steps to warm "
        "up, CUDA graphs by themselves; medians; synthetic views but for real-data. Memory is torch's at its peak, without "
        "DALI's.",
    ]


def rows(task: Task, results: dict[str, Result], flops: int) -> list[dict[str, Any]]:
    """Return a dict of plain types for each rung: its medians and every turn."""
    device = resolve_runtime(rung_config(task, Rung(""))).device
    naive = results.get(NAIVE, Result()).rates
    made = []
    for name, result in results.items():
        rate = statistics.median(result.rates) if result.rates else None
        ratios = [ours / theirs for ours, theirs in zip(result.rates, naive, strict=False)]
        made.append(
            {
                "batch_size": task.batch_size,
                "rung": name,
                "what": RUNGS[name].what,
                "pairs_per_second": rate,
                "times_naive": statistics.median(ratios) if ratios else None,
                "mfu": mfu(rate, flops, device) if rate else None,
                "bytes_per_pair": result.peak_bytes / task.batch_size if result.peak_bytes else None,
                "data_wait": statistics.median(result.waits) if result.waits else None,
            }
            | asdict(result)
        )
    return made


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table; what there is no figure for is ``-``."""

    def figure(value: float | None, form: str, scale: float = 1.0) -> str:
        return "-" if value is None else format(value * scale, form)

    lines = [
        "| batch | rung | pairs/s | lowest-highest | × naive | MFU % | peak GiB | MiB a pair | data wait % | what |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        spread = f"{min(row['rates']):.2f}-{max(row['rates']):.2f}" if row["rates"] else "-"
        failure = f"**failed**: {row['failure'].replace('|', '/')}; " if row["failure"] else ""
        cells = [
            str(row["batch_size"]),
            row["rung"],
            figure(row["pairs_per_second"], ".2f"),
            spread,
            figure(row["times_naive"], ".2f"),
            figure(row["mfu"], ".1f", 100),
            figure(row["peak_bytes"], ".2f", 2**-30),
            figure(row["bytes_per_pair"], ".0f", 2**-20),
            figure(row["data_wait"], ".1f", 100),
            failure + row["what"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def flops_of(task: Task) -> int:
    """Return the floating-point operations of a pair, the same for all rungs: one channel's."""
    with torch.device("meta"):
        model = build_model(task.arch, Rung(""))
    return flops_per_pair(model, task.tile_size)
