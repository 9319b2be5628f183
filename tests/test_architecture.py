"""The structure of the project: what is installed, who may import whom, how long a function or file may be."""

from __future__ import annotations

import ast
import fnmatch
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each room of the project and of `train`, and the rooms that it may import.
ROOMS = {
    "common": set(),
    "preprocess": {"common"},
    "shards": {"common", "preprocess"},
    "dali_pipelines": {"common", "shards"},
    "models": {"common"},
    "train": {"common", "preprocess", "shards", "dali_pipelines", "models"},
}
TRAIN_ROOMS = {
    "run": set(),
    "levels": set(),
    "predict": {"run", "levels"},
    "evaluate": {"run", "levels", "predict"},
    "probe": {"run", "levels"},
    "byol": {"run", "probe"},
    "classify": {"run", "levels", "evaluate"},
    "export": {"run", "levels"},
    "report": {"run", "levels", "predict", "evaluate"},
    "aggregate": {"run", "levels", "evaluate", "classify"},
    "bench": {"run", "byol", "levels", "predict"},
}
SOURCES = sorted(
    path
    for folder in (*ROOMS.keys() - {"common"}, "mammostream", "benchmarks", "docs", "examples", "tests")
    for path in (ROOT / folder).rglob("*.py")
)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the modules that a file imports, at its top or later, with their lines."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and not node.level:
            yield node.lineno, node.module
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)


def module_of(path: Path) -> list[str]:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return parts[1:] if parts[0] == "mammostream" else parts


def test_every_import_of_the_project_goes_through_its_one_name():
    bare = {*ROOMS, "demo", "doctor"}
    found = [(path, line, name) for path in SOURCES for line, name in imports(path) if name.split(".")[0] in bare]
    assert not found


def test_rooms_import_only_what_they_may():
    wrong = []
    for path in SOURCES:
        room, *inner = module_of(path)
        if room not in ROOMS:
            continue
        for line, name in imports(path):
            if not name.startswith("mammostream."):
                continue
            other, *other_inner = name.split(".")[1:]
            allowed = other == room or other in ROOMS[room] or len(inner) < 2 and other == "cli"
            if allowed and room == other == "train" and len(inner) > 1:
                allowed = other_inner[0] == inner[0] or other_inner[0] in TRAIN_ROOMS[inner[0]]
            if not allowed:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong


def test_modules_import_each_other_in_one_direction():
    """No import cycles, neither at the top of modules nor within functions."""
    graph = {}
    for path in SOURCES:
        module = ".".join(module_of(path))
        if module.split(".")[0] in ROOMS:
            graph[module] = {name.removeprefix("mammostream.") for _, name in imports(path) if name.startswith("mammostream.")}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way[way.index(module) :], module))
        if module not in done:
            for other in graph.get(module, ()):
                visit(other, (*way, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_functions_and_files_can_be_read_at_a_sitting():
    """No function of more than 80 lines, no file of more than 400, outside the tests."""
    long = []
    for path in SOURCES:
        if path.relative_to(ROOT).parts[0] == "tests":
            continue
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > 400:
            long.append(str(path.relative_to(ROOT)))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= 80:
                long.append(f"{path.relative_to(ROOT)}: {node.name}")
    assert not long


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # From a copy: building leaves folders behind.
    copy = folder / "source"
    left_out = {".git", ".venv", "runs", "tests", "build"}
    shutil.copytree(
        ROOT, copy, symlinks=True, ignore=lambda place, names: left_out & {*names} if Path(place) == ROOT else ["__pycache__"]
    )
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(folder)]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(copy)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_a_wheel_holds_one_name_and_everything_of_it(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in names} == {"mammostream"}
    installed = [path for path in SOURCES if path.relative_to(ROOT).parts[0] in {*ROOMS, "mammostream"}]
    here = {f"mammostream/{'/'.join(module_of(path))}.py" for path in installed}
    assert here <= names
    assert {"mammostream/py.typed", "mammostream/__init__.pyi", "mammostream/models/__init__.pyi"} <= names
    assert "mammostream/train/report/templates/report.html" in names


@pytest.mark.parametrize("place", ["wheel", "checkout"])
def test_it_runs_from_a_wheel_and_from_a_checkout_on_the_path(wheel, place, tmp_path):
    if place == "wheel":
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(tmp_path)
    path = tmp_path if place == "wheel" else ROOT
    code = f"""
import sys
# What an editable installation put there must not answer in place of the path.
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
import pickle, mammostream
from mammostream.models import load_classifier
from mammostream.shards.build.build import build_shard
assert mammostream.__file__ == {str(path / "mammostream/__init__.py")!r}, mammostream.__file__
assert mammostream.load_classifier is load_classifier
assert pickle.loads(pickle.dumps(build_shard)) is build_shard
assert not {{"models", "train", "shards", "common"}} & sys.modules.keys()
mammostream.main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, "shards", "build", "--help"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "--tile-size" in done.stdout


def test_importing_the_package_imports_no_room():
    code = "import sys, mammostream; print([m for m in sys.modules if m.startswith('mammostream') or m == 'numpy'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "['mammostream']"
    import mammostream

    assert all(getattr(mammostream, name) for name in mammostream.__all__)


def test_old_names_of_the_programs_still_start_in_a_checkout():
    for name in ("train.pretrain", "train.infer", "mammostream.train.pretrain"):
        done = subprocess.run([sys.executable, "-m", name, "--help"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert f"Usage: mammostream {name.rpartition('.')[2]} [OPTIONS]" in done.stdout


def test_pytest_looks_into_every_folder_of_tests(pytestconfig):
    left_out = pytestconfig.getini("norecursedirs")  # pytest's own list has 'build'
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "tests").rglob("test_*.py")}
    assert Path("tests/shards/build") in folders
    assert [f for f in folders if any(fnmatch.fnmatch(part, pattern) for part in f.parts for pattern in left_out)] == []
