"""The two kinds of arrays: which libraries serve them, and that CuPy's offer what the code asks NumPy's for."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from mammostream.preprocess.backend import Backend, _cupy_backend, backend_of

ROOT = Path(__file__).resolve().parents[2]
ROOM = ROOT / "preprocess"
ROOMS = ("preprocess", "shards", "dali_pipelines", "models", "train", "mammostream", "benchmarks", "tests")
LIBRARIES = ("xp", "ndimage", "filters", "transform")


class Use(NamedTuple):
    """A function or constant that code takes from the backend."""

    place: str
    library: str
    name: str
    positional: int | None  # None: taken but not called here, or called with * or **
    keywords: tuple[str, ...] = ()


def uses_of(source: str, place: str) -> list[Use]:
    """Collect what a module takes from a backend: ``xp.f(…)``, ``ndimage.f(…)``, ``<anything>.xp.f(…)`` and so on."""
    tree = ast.parse(source)
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }

    def taken(node: ast.AST) -> tuple[str, str] | None:
        if not isinstance(node, ast.Attribute):
            return None
        owner = node.value
        if isinstance(owner, ast.Name) and owner.id in LIBRARIES and owner.id not in imported:
            return owner.id, node.attr
        if isinstance(owner, ast.Attribute) and owner.attr in LIBRARIES and isinstance(node.ctx, ast.Load):
            return owner.attr, node.attr
        return None

    uses, called = [], set()
    for node in ast.walk(tree):  # a call comes before what it calls
        if isinstance(node, ast.Call) and (found := taken(node.func)):
            called.add(id(node.func))
            spread = any(isinstance(a, ast.Starred) for a in node.args) or any(k.arg is None for k in node.keywords)
            keywords = tuple(k.arg for k in node.keywords if k.arg)
            uses.append(Use(f"{place}:{node.lineno}", *found, None if spread else len(node.args), keywords))
        elif id(node) not in called and (found := taken(node)):
            uses.append(Use(f"{place}:{node.lineno}", *found, None))
    return uses


def complaint(use: Use, backend: Backend) -> str | None:
    """Tell what is wrong with a use on a backend, or None."""
    where = f"{use.place}: {use.library}.{use.name}"
    function = getattr(getattr(backend, use.library), use.name, None)
    if function is None:
        return f"{where} does not exist in {backend.name}"
    if use.positional is None or isinstance(function, type):
        return None
    if hasattr(function, "nin"):  # an elementwise function: it has no signature
        good = function.nin <= use.positional <= function.nin + function.nout and set(use.keywords) <= {"out", "dtype"}
        return None if good else f"{where} takes {function.nin} arrays, out and dtype"
    try:
        inspect.signature(function).bind(*[None] * use.positional, **dict.fromkeys(use.keywords))
    except TypeError as error:
        return f"{where}: {error}"
    return None


@pytest.mark.parametrize("first", ["", "import torch", "import nvidia.dali", "import cupy"])
def test_cucim_is_imported_whatever_came_before(first):
    """In its own process with a time limit: with the reader of slides, importing cuCIM may never return."""
    code = f"{first}\nfrom mammostream.preprocess.backend import gpu_library_versions\nprint(gpu_library_versions())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOM.parent, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "cucim" in done.stdout
    assert "libcuda" not in done.stderr  # what the reader says where there is no driver


def test_only_the_backend_imports_cucim():
    """Whoever imports it first decides whether that hangs."""
    sources = {path: path.read_text() for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    assert {ROOT / "preprocess/backend.py", Path(__file__)} < sources.keys()
    importing = {
        path
        for path, source in sources.items()
        if "cucim" in source
        for node in ast.walk(ast.parse(source))
        if (isinstance(node, ast.Import) and any(alias.name.partition(".")[0] == "cucim" for alias in node.names))
        or (isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "cucim")
    }
    assert importing == {ROOT / "preprocess/backend.py"}


@pytest.fixture(scope="module")
def cupy_backend() -> Backend:
    return _cupy_backend()  # both libraries import without a GPU


def test_cupy_offers_all_that_the_code_takes_from_the_backend(cupy_backend):
    uses = [use for path in sorted(ROOM.glob("*.py")) for use in uses_of(path.read_text(), path.name)]
    assert [message for use in uses if (message := complaint(use, cupy_backend))] == []
    # The collector sees what is there: each library, through each spelling.
    assert {use.library for use in uses} == set(LIBRARIES)
    names = {(use.library, use.name) for use in uses}
    assert len(names) > 30
    assert names >= {
        ("ndimage", "distance_transform_edt"),
        ("ndimage", "correlate1d"),
        ("filters", "threshold_otsu"),
        ("transform", "resize"),
        ("xp", "float32"),
        ("xp", "percentile"),
    }
    assert ("ndimage", "gaussian_filter") in {(u.library, u.name) for u in uses if not u.place.startswith("simulation")}
    assert not [use for use in uses if use.place.startswith("simulation")]  # scipy's own, on the host


def test_the_same_holds_for_numpy():
    """The check itself is sound: it has nothing against the backend that all other tests run on."""
    backend = backend_of(np.zeros(1))
    for path in sorted(ROOM.glob("*.py")):
        for use in uses_of(path.read_text(), path.name):
            assert hasattr(getattr(backend, use.library), use.name), use


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("backend.ndimage.watershed_ift(image, markers)", "watershed_ift does not exist"),
        ("ndimage.watershed_ift", "watershed_ift does not exist"),
        ("backend_of(a).xp.memmap", "memmap does not exist"),
        ("xp.percentile(a, 50, weights=w)", "weights"),
        ("ndimage.label(mask, connectivity=2)", "connectivity"),
        ("backend.filters.threshold_otsu(image, 256, None)", "too many positional"),
        ("backend.transform.resize(image)", "output_shape"),
        ("xp.maximum(a)", "takes 2 arrays"),
        ("xp.maximum(a, b, where=c)", "takes 2 arrays"),
    ],
)
def test_what_cupy_lacks_is_found(cupy_backend, line, expected):
    """Each line is good for NumPy and its companions, or nearly so, and none for CuPy's."""
    (use,) = uses_of(f"def f(backend, xp, ndimage):\n    return {line}\n", "example.py")
    assert use.place == "example.py:2"
    assert expected in complaint(use, cupy_backend)


@pytest.mark.parametrize(
    "line",
    [
        "xp.maximum(a, b)",
        "xp.pad(a, 1, mode='edge')",
        "xp.zeros(s, dtype=bool)",
        "xp.float32(3)",
        "xp.stack(*a)",
        "ndimage.label(m)",
    ],
)
def test_what_cupy_has_is_not_complained_of(cupy_backend, line):
    (use,) = uses_of(line, "example.py")
    assert complaint(use, cupy_backend) is None


def test_libraries_that_a_module_imports_itself_are_its_own_affair():
    assert uses_of("from scipy import ndimage\nndimage.watershed_ift(a, b)\nimport numpy as xp\nxp.memmap", "example.py") == []


def test_the_arrays_type_chooses(tmp_path, cupy_backend):
    for array in (np.zeros(3), np.float32(1), np.memmap(tmp_path / "a", shape=3, mode="w+")):
        backend = backend_of(array)
        assert backend.name == "numpy"
        assert backend.to_host(array) is array
    # No array of CuPy's can be made without a GPU; its type decides.
    assert backend_of(object.__new__(type("ndarray", (), {"__module__": "cupy._core.core"}))) is cupy_backend
    assert cupy_backend.name == "cupy"
