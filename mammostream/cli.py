"""The command line: a group that imports the commands of a room only when one of them runs."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any, NoReturn

import click

from mammostream.common.errors import BadInput, MachineFault, Stopped, speaks_for_all
from mammostream.common.options import Group
from mammostream.common.packages import how_to_install
from mammostream.common.surroundings import make_do

_LONGEST_MESSAGE = 1800
# name -> (module, attribute, one line for --help): --help must not import the rooms.
BENCHMARKS = {
    "build": (".shards.build.bench_command", "build", "Films per second from file to shard, and time per stage."),
    "infer": (
        ".train.bench.infer_command",
        "infer",
        "Tiles and films per second of prediction, compared with a plain PIL and torchvision loop.",
    ),
    "loader": (
        ".dali_pipelines.commands",
        "loader",
        "Tiles per second of the loader and of loaders of other libraries.",
    ),
    "step": (
        ".train.bench.step_command",
        "step",
        "Pairs per second of the training step, one optimisation after the other, compared with a plain step.",
    ),
}
COMMANDS = {
    "demo": (".demo", "demo", "The whole pipeline on 8 real films, on the CPU, in minutes."),
    "doctor": (".doctor", "doctor", "What this machine has and what will be used."),
    "prepare": (
        ".shards.prepare.command",
        "prepare",
        "Annotations and images -> manifest.parquet, split by patient.",
    ),
    "simulate": (
        ".shards.prepare.simulate_command",
        "simulate",
        "Plant simulated micro-calcification clusters into copies of films.",
    ),
    "preview": (".shards.prepare.preview_command", "preview", "Pictures of the mask and the kept tiles of each film."),
    "shards": (".shards.commands", "shards", "Build, verify, label, pack and unpack WebDataset shards of tiles."),
    "pretrain": (".train.byol.command", "pretrain", "BYOL pre-training on shards."),
    "probe": (".train.probe.command", "probe", "Frozen features on labels, compared with random and ImageNet weights."),
    "finetune": (
        ".train.classify.command",
        "finetune",
        "Fine-tune a pre-trained backbone for multi-label classification.",
    ),
    "infer": (".train.predict.command", "infer", "Predict the tiles of shards, or raw films with heat maps."),
    "embed": (".train.predict.command", "embed", "Write a backbone's features of the tiles of shards."),
    "aggregate": (
        ".train.aggregate.command",
        "aggregate",
        "Learn to aggregate tile features to films, breasts or patients, and predict with it.",
    ),
    "evaluate": (
        ".train.evaluate.command",
        "evaluate",
        "Compare predictions with labels: metrics with intervals, and plots.",
    ),
    "export": (".train.export.command", "export", "Write a trained network as an ONNX file, compared with torch."),
    "report": (".train.report.command", "report", "Write one self-contained page with a run's data, curves and pictures."),
    "bench": (".cli", "bench", "Measure speed, compared with other libraries and plain scripts."),
}


class LazyGroup(Group):
    """A group that knows its commands by name and imports each one when it is used."""

    def __init__(self, *args: Any, lazy: dict[str, tuple[str, str, str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lazy = lazy

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._lazy:
            return None
        module, attribute, _ = self._lazy[cmd_name]
        return getattr(importlib.import_module(module, __package__), attribute)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, _, line) in self._lazy.items()])


@click.group(cls=LazyGroup, lazy=COMMANDS)
@click.version_option(package_name="mammostream")
def cli() -> None:
    """Mammograms in, tiles out, shards on disk, a GPU that never waits.

    The pipeline: prepare -> shards build -> pretrain -> finetune -> infer -> evaluate -> report.
    Exit codes: 0 done, 2 bad input (one line), 3 too many bad items, 75 stopped and saved (run it again).
    """


@click.group(cls=LazyGroup, lazy=BENCHMARKS)
def bench() -> None:
    """Measure a part of mammostream compared with what others do, and print a Markdown table."""


def main() -> None:
    """Run the command line; print an error as one line, whatever the number of processes, and exit with its code."""
    make_do()
    try:
        code = cli.main(prog_name="mammostream", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "mammostream"
        _end(f"error: {error.format_message()} (see '{command} --help')", 2)
    except (BadInput, MachineFault, click.ClickException) as error:
        _end(f"error: {error}", error.exit_code)
    except Stopped as stopped:
        _end(str(stopped), stopped.exit_code)
    except ModuleNotFoundError as error:
        message = how_to_install(error)
        if message is None:
            raise
        _end(f"error: {message}", 2)
    except BrokenPipeError:
        # The reader of a pipe has closed it ('... | head'): nothing more can be written there, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (KeyboardInterrupt, click.Abort):
        _end("stopped", 130)


def _end(message: str, code: int) -> NoReturn:
    if len(message) > _LONGEST_MESSAGE:  # it quotes something that is no text for people
        message = f"{message[: _LONGEST_MESSAGE // 2]} … {message[-_LONGEST_MESSAGE // 2 :]}"
    if speaks_for_all():
        print(message, file=sys.stderr, flush=True)
    sys.exit(code)
